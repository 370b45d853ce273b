"""A sheet that shows what training changed: prompts below each other, pictures side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

_EDGE, _GAP, _TEXT, _SIZE = 256, 8, 200, 15  # px: picture, margin, column of prompts, letters
_LETTERS_A_LINE, _LINES = 24, 13  # 13 lines of 19 px are the most that stand beside a picture


@dataclass(frozen=True)
class Row:
    """One prompt and its pictures, one a column; None leaves a place empty."""

    prompt: str
    pictures: Sequence[Image.Image | None]


def comparison_sheet(columns: Sequence[str], rows: Sequence[Row]) -> Image.Image:
    """Draw `rows` under the names of their `columns`; pictures keep their aspect.

    Small pictures are enlarged without smoothing, so that one sees what is there.
    """
    font = ImageFont.load_default(_SIZE)
    step = _EDGE + _GAP
    top = _SIZE + 2 * _GAP
    size = (_TEXT + _GAP + step * len(columns), top + step * len(rows))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, name in enumerate(columns):
        draw.text((_TEXT + _GAP + number * step, _GAP), name, "black", font)
    for line, row in enumerate(rows):
        y = top + line * step
        prompt = textwrap.fill(
            row.prompt or "(empty prompt)", _LETTERS_A_LINE, max_lines=_LINES, placeholder=" …"
        )
        draw.multiline_text((_GAP, y), prompt, "black", font)
        for number, picture in enumerate(row.pictures):
            if picture is not None:
                sheet.paste(_fitted(picture), (_TEXT + _GAP + number * step, y))
    return sheet


def _fitted(picture: Image.Image) -> Image.Image:
    """`picture` on white, as large as its place allows."""
    whole = picture.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
    enlarge = max(flat.size) <= _EDGE // 2
    method = Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS
    return ImageOps.pad(flat, (_EDGE, _EDGE), method, "white")
