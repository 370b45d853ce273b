"""Base models that ship with the package: trained, small, found by name and never fetched."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

_OWNER = "simpletuner/"


def embedded_folder(name: str) -> Path | None:
    """The folder of the embedded model `name`, such as ``simpletuner/emoji-sdxl``; else None."""
    if not name.startswith(_OWNER):
        return None
    folder = Path(str(resources.files(__name__))) / Path(name.removeprefix(_OWNER)).name
    return folder if (folder / "model_index.json").is_file() else None
