"""A contact sheet of the exact pixels that are trained on, beside what they were cut from."""

from __future__ import annotations

import textwrap
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO

from PIL import Image, ImageDraw, ImageFont

from simpletuner.core.text import printable
from simpletuner.core.types import Geometry
from simpletuner.data.source import DataSource

_EDGE, _GAP, _LETTER, _LINES = 240, 8, 13, 5  # px; lines of text below a pair
_LETTERS_A_LINE = 66
_BOX = "#e4002b"
_SHOWN_EDGE = 960  # px; twice what a page shows of a whole picture, for fine screens
_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>What is trained on</title>
<style>
body {{ font: 14px/1.4 sans-serif; margin: 1em; }}
td {{ vertical-align: top; padding: 0 1em 1em 0; }}
td:first-child img {{ max-width: 480px; max-height: 480px; }}
img {{ image-rendering: pixelated; background: #e8e8e8; }}
</style></head>
<body><table>
<tr><th>in the file, with the box that is cut out</th><th>what is trained on</th><th></th></tr>
{rows}
</table></body></html>
"""


@dataclass(frozen=True)
class Shown:
    """One picture of a preview.

    Args:
        dataset: The id of its dataset.
        path: Inside the dataset.
        whole: The picture upright and flattened, as large as it is shown at most.
        trained: The pixels the encoder sees.
        geometry: What lies between the two.
        captions: Its alternatives.
        mask: White where it is learned, of the size of `trained`; None for all of it.
        conditions: What goes with it, as it is given to the model, each by its dataset's id.
    """

    dataset: str
    path: str
    whole: Image.Image
    trained: Image.Image
    geometry: Geometry
    captions: tuple[str, ...]
    mask: Image.Image | None = None
    conditions: tuple[tuple[str, Image.Image], ...] = ()

    @property
    def scale(self) -> float:
        """The factor of its resize."""
        return self.geometry.resize[0] / self.geometry.source[0]

    def lines(self) -> list[str]:
        """What is said below it."""
        width, height = self.geometry.crop[2:]
        more = f"  (+{len(self.captions) - 1} more)" if len(self.captions) > 1 else ""
        caption = (self.captions[0] or "(empty caption)") + more
        return [
            f"{self.dataset}: {self.path}",
            f"{self.geometry.source[0]}x{self.geometry.source[1]} px, scaled by {self.scale:.3g},"
            f" cut to {width}x{height}",
            *textwrap.wrap(caption, _LETTERS_A_LINE, max_lines=_LINES - 2, placeholder=" …"),
        ]


def look(source: DataSource, row: int) -> Shown:
    """One picture of a dataset as a preview shows it.

    Raises:
        PictureError: It cannot be decoded.
        DataError: It is not the file that was indexed.
    """
    geometry = source.geometry(row)
    whole = source.picture(row)
    whole.thumbnail((_SHOWN_EDGE, _SHOWN_EDGE))  # many large ones would not fit into memory
    return Shown(
        dataset=source.id,
        path=printable(source.path(row)),
        whole=whole,
        trained=Image.fromarray(source.pixels(row)),
        geometry=geometry,
        captions=source.captions(row),
        mask=Image.fromarray(source.mask(row, geometry)) if source.masked else None,
        conditions=tuple(
            (name, Image.fromarray(source.condition(name, row, geometry)))
            for name, _ in source.conditions
        ),
    )


def chosen(count: int, most: int) -> list[int]:
    """At most `most` rows of `count`, spread evenly."""
    return [i * count // min(count, most) for i in range(min(count, most))]


def sheet(shown: Sequence[Shown], columns: int = 3) -> Image.Image:
    """Pictures side by side: what is in the file with the box that is cut, and what is trained."""
    font = ImageFont.load_default(_LETTER)
    line = _LETTER + 4
    wide, high = 2 * _EDGE + 3 * _GAP, _EDGE + 2 * _GAP + _LINES * line
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    made = Image.new("RGB", (columns * wide, rows * high), "white")
    draw = ImageDraw.Draw(made)
    for number, each in enumerate(shown):
        x, y = number % columns * wide + _GAP, number // columns * high + _GAP
        made.paste(_framed(_boxed(each)), (x, y))
        made.paste(_framed(_beside(each)), (x + _EDGE + _GAP, y))
        text = "\n".join(each.lines())
        draw.multiline_text((x, y + _EDGE + 4), text, "black", font)
    return made


def page(shown: Sequence[Shown]) -> str:
    """The same as one HTML file, the trained pixels unchanged."""
    rows = "\n".join(
        f"<tr><td>{_embedded(_boxed(each), 'JPEG')}</td><td>{_embedded(_beside(each), 'PNG')}</td>"
        f"<td>{'<br>'.join(escape(line) for line in each.lines()[:2])}"
        f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in each.captions)}</ul></td></tr>"
        for each in shown
    )
    return _PAGE.format(rows=rows)


def _embedded(picture: Image.Image, kind: str) -> str:
    file = BytesIO()
    picture.save(file, kind)
    data = b64encode(file.getvalue()).decode()
    return f'<img src="data:image/{kind.lower()};base64,{data}" alt="">'


def _boxed(each: Shown) -> Image.Image:
    """The whole picture with the box that is cut out of it."""
    left, top, width, height = each.geometry.crop
    across, down = (each.geometry.resize[i] / each.whole.size[i] for i in (0, 1))
    picture = each.whole.copy()
    thick = max(2, round(max(picture.size) / 120))
    box = (left / across, top / down, (left + width) / across - 1, (top + height) / down - 1)
    ImageDraw.Draw(picture).rectangle(box, outline=_BOX, width=thick)
    return picture


def _beside(each: Shown) -> Image.Image:
    """The pixels that are trained on, with what goes with them to the right."""
    pictures = [_masked(each), *(picture for _, picture in each.conditions)]
    if len(pictures) == 1:
        return pictures[0]
    made = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)))
    left = 0
    for picture in pictures:
        made.paste(picture, (left, 0))
        left += picture.width
    return made


def _masked(each: Shown) -> Image.Image:
    """The pixels that are trained on, tinted where they are not learned."""
    if each.mask is None:
        return each.trained
    tinted = Image.blend(each.trained, Image.new("RGB", each.trained.size, _BOX), 0.6)
    return Image.composite(each.trained, tinted, each.mask)


def _framed(picture: Image.Image) -> Image.Image:
    """In the middle of a grey square; never enlarged with smoothing, so that pixels stay pixels."""
    frame = Image.new("RGB", (_EDGE, _EDGE), "#e8e8e8")
    scale = _EDGE / max(picture.size)
    size = tuple(max(1, round(edge * scale)) for edge in picture.size)
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    small = picture.resize((size[0], size[1]), how)
    frame.paste(small, ((_EDGE - size[0]) // 2, (_EDGE - size[1]) // 2))
    return frame
