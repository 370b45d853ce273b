"""The sheet that shows what training changed."""

import numpy as np
import pytest
from PIL import Image

from simpletuner.validation.comparison import Row, comparison_sheet


def solid(colour: str, size: tuple[int, int] = (256, 256)) -> Image.Image:
    return Image.new("RGB", size, colour)


def at(sheet: Image.Image, column: int, line: int) -> Image.Image:
    x, y = 208 + 264 * column, 31 + 264 * line
    return sheet.crop((x, y, x + 256, y + 256))


def test_each_picture_stands_in_its_prompts_line_under_its_column():
    rows = [
        Row("one", (solid("red"), solid("lime"))),
        Row("two", (solid("blue"), None)),
    ]

    sheet = comparison_sheet(["base", "after"], rows)

    assert sheet.size == (208 + 2 * 264, 31 + 2 * 264)
    found = [[at(sheet, x, y).getpixel((128, 128)) for x in (0, 1)] for y in (0, 1)]
    assert found == [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]]


def test_pictures_keep_their_aspect():
    sheet = comparison_sheet(["base"], [Row("wide", (solid("red", (512, 256)),))])

    red = np.asarray(at(sheet, 0, 0))[:, :, 1] == 0
    assert red.all(1).sum() == 128
    assert not red[:64].any()


def test_small_pictures_are_enlarged_to_clear_squares():
    small = Image.new("RGB", (2, 2), "white")
    small.putpixel((0, 0), (255, 0, 0))

    shown = np.asarray(at(comparison_sheet(["base"], [Row("dot", (small,))]), 0, 0))

    assert (shown[:128, :128] == (255, 0, 0)).all()
    assert (shown[128:] == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_references_of_any_mode_lie_on_white(mode: str):
    clear = Image.new("RGBA", (256, 256), (255, 0, 0, 0)).convert(mode)

    shown = np.asarray(at(comparison_sheet(["reference"], [Row("", (clear,))]), 0, 0))

    assert (shown == 255).all()


def test_prompts_are_written_and_wrapped():
    blank = comparison_sheet(["base"], [Row("", (solid("white"),))])
    long = comparison_sheet(["base"], [Row("a prompt of many words " * 4, (solid("white"),))])

    ink = [(np.asarray(sheet)[31:, :200] < 128).any(axis=(1, 2)).sum() for sheet in (blank, long)]
    assert ink[1] > 2 * ink[0] > 0


def test_a_long_prompt_ends_with_dots_in_its_own_line():
    fits, long, blank = "Ägypten " * 39, "Ägypten " * 200, Row("", (solid("white"),))

    def written(text: str) -> np.ndarray:
        sheet = comparison_sheet(["base"], [Row(text, (solid("white"),)), blank])
        return np.asarray(sheet)[31:, :200]

    whole, cut = written(fits), written(long)
    assert (cut[256:264] == 255).all()
    assert (cut[264:] == whole[264:]).all()
    assert (cut[:228] == whole[:228]).all()  # 12 of 13 lines
    assert (cut[228:256] != whole[228:256]).any()  # the dots
