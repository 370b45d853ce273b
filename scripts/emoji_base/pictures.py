"""Draws the emoji of four styles and gives each its words. Pictures are uint8 [N, 3, H, W]."""

from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scripts.build_emoji_example import CONCEPTS, npm_package, picture_of
from scripts.emoji_base.work import Work

NAMES = "emojibase-data@17.0.0"
PHOTO_STYLE = "@lobehub/fluent-emoji-3d@1.1.0"
DRAWN_STYLES = {
    "noto": ("@iconify-json/noto@1.2.9", 128),
    "flat": ("@iconify-json/fluent-emoji-flat@1.2.6", 64),
    "twemoji": ("@iconify-json/twemoji@1.2.5", 64),
}
SIZE = 128
_PARTS_OF_EMOJI = 2  # emojibase's group of skin tones and hair


def make_pictures(work: Work) -> None:
    """Write ``concepts.json`` and ``pictures.safetensors``.

    Rows of `noto` and `3d` are concepts; `flat` and `twemoji` lack some, so `flat_rows` and
    `twemoji_rows` say which concept each row is.
    """
    packages = work.folder / "packages"
    packages.mkdir(exist_ok=True)
    icons = {style: _icons(_package(name, packages)) for style, (name, _) in DRAWN_STYLES.items()}
    rendered = _package(PHOTO_STYLE, packages)
    names = _package(NAMES, packages)
    entries = json.loads((names / "en" / "data.json").read_text(encoding="utf-8"))
    concepts = _concepts(entries, icons["noto"], rendered, work)
    tensors = {"3d": _stack(_rendered(rendered, concept) for concept in concepts)}
    for style, (_, size) in DRAWN_STYLES.items():
        rows = [i for i, concept in enumerate(concepts) if concept["slug"] in icons[style]]
        drawn = (_drawn(icons[style][concepts[i]["slug"]], size) for i in rows)
        tensors[style] = _stack(drawn)
        tensors[f"{style}_rows"] = torch.tensor(rows)
    assert len(tensors["noto"]) == len(concepts)
    work.save_tensors("pictures.safetensors", tensors)
    work.save_facts("concepts.json", concepts)
    print(f"pictures: {len(concepts)} concepts")


def rows(work: Work, part: str) -> list[int]:
    """The concepts of a part: ``base``, ``held_out`` or ``train`` (all but the held out)."""
    concepts = work.facts("concepts.json")
    if part == "train":
        return [i for i, concept in enumerate(concepts) if concept["part"] != "held_out"]
    return [i for i, concept in enumerate(concepts) if concept["part"] == part]


def floats(pictures: Tensor) -> Tensor:
    """Pictures as float32 in [-1, 1]."""
    return pictures.float().div_(127.5).sub_(1)


def _package(package: str, folder: Path) -> Path:
    mine = folder / re.sub(r"[^\w.]+", "-", package).strip("-")
    if not (mine / "package" / "package.json").exists():
        if mine.exists():
            raise SystemExit(f"{mine} is half unpacked; remove it and start again")
        return npm_package(package, mine)
    return mine / "package"


def _icons(package: Path) -> dict[str, str]:
    """A style's SVG documents by slug."""
    content = json.loads((package / "icons.json").read_text(encoding="utf-8"))
    documents = {}
    for slug, icon in content["icons"].items():
        width = icon.get("width", content.get("width", 16))
        height = icon.get("height", content.get("height", 16))
        documents[slug] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
    for slug, alias in content.get("aliases", {}).items():
        if set(alias) == {"parent"} and alias["parent"] in documents:
            documents[slug] = documents[alias["parent"]]
    return documents


def _concepts(
    entries: list[dict[str, Any]], icons: dict[str, str], rendered: Path, work: Work
) -> list[dict[str, Any]]:
    """The emoji that have a name, a Noto and a 3D picture, those of the base first."""
    phrases = {
        re.sub(r"^an? ", "", p): p for p in (" ".join(p.split()) for p in CONCEPTS.split(","))
    }
    found = {}
    for entry in entries:
        slug = re.sub(r"[^a-z0-9]+", "-", re.sub("['’]", "", entry["label"].lower())).strip("-")
        if entry.get("group", _PARTS_OF_EMOJI) == _PARTS_OF_EMOJI or slug not in icons:
            continue
        if not any(_candidates(rendered, entry["hexcode"])):
            continue
        label = entry["label"]
        phrase = phrases.get(label, label)
        facts = {"label": label, "phrase": phrase, "tags": entry.get("tags", []), "slug": slug}
        found[label] = facts | {"hexcode": entry["hexcode"].lower(), "part": "train"}
    others = sorted(set(found) - set(phrases))
    random.Random(work.seed).shuffle(others)
    held_out, others = others[: work.held_out], others[work.held_out :]
    base = [label for label in phrases if label in found]
    base = (_spread(base, work.concepts) + others)[: work.concepts]
    for label in base:
        found[label]["part"] = "base"
    for label in held_out:
        found[label]["part"] = "held_out"
    chosen = list(dict.fromkeys([*base, *held_out, *phrases.keys() & found.keys(), *others]))
    order = {label: i for i, label in enumerate(found)}
    chosen = chosen[: work.limit] if work.limit else sorted(chosen, key=order.__getitem__)
    return [found[label] for label in chosen]


def _spread(labels: list[str], count: int) -> list[str]:
    """At most `count` labels, evenly from the whole list."""
    if count >= len(labels):
        return labels
    return [labels[i * len(labels) // count] for i in range(count)]


def _candidates(rendered: Path, hexcode: str) -> list[Path]:
    bare = hexcode.lower().removesuffix("-fe0f")
    paths = (rendered / "assets" / f"{name}.webp" for name in (bare, f"{bare}-fe0f"))
    return [path for path in paths if path.exists()]


def _rendered(package: Path, concept: dict[str, Any]) -> Tensor:
    picture = Image.open(picture_of(package, concept["hexcode"])).convert("RGBA")
    return _on_white(picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def _drawn(document: str, size: int) -> Tensor:
    import resvg_py

    picture = Image.open(io.BytesIO(resvg_py.svg_to_bytes(document, width=size, height=size)))
    picture = picture.convert("RGBA")
    if picture.size != (size, size):  # a few are not square
        square = Image.new("RGBA", (size, size))
        picture.thumbnail((size, size))
        square.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
        picture = square
    return _on_white(picture)


def _on_white(picture: Image.Image) -> Tensor:
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture).convert("RGB")
    return torch.from_numpy(np.array(flat)).permute(2, 0, 1)


def _stack(pictures: Any) -> Tensor:
    return torch.stack(list(pictures))
