"""The model families: one file each, found by being here; names that are known but not built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simpletuner.core.table import Row, Table, discover

if TYPE_CHECKING:
    from simpletuner.models.family import Family

_NOT_BUILT = {
    "auraflow": "AuraFlow",
    "chroma": "Chroma",
    "flux": "FLUX.1",
    "flux2": "FLUX.2",
    "hidream": "HiDream-I1",
    "kolors": "Kolors",
    "lumina2": "Lumina-Image 2.0",
    "pixart": "PixArt-Σ",
    "qwen_image": "Qwen-Image",
    "sana": "Sana",
    "sd1x": "Stable Diffusion 1.x",
    "sd3": "Stable Diffusion 3 and 3.5",
    "z_image": "Z-Image",
}


def _rows() -> tuple[Row, ...]:
    built = {
        family.name: Row(family.name, family, _summary(family), facts=_facts(family))
        for family in discover(__name__, "FAMILY").values()
    }
    waiting = {
        name: Row(name, None, title) for name, title in _NOT_BUILT.items() if name not in built
    }
    return tuple(row for _, row in sorted({**built, **waiting}.items()))


def _summary(family: type[Family]) -> str:
    return f"{family.title}; flavours: {', '.join(family.flavours)}"


def _facts(family: type[Family]) -> dict[str, Any]:
    """What the checks of a configuration ask, long before anything is loaded."""
    return {
        "flavours": tuple(family.flavours),
        "prediction_types": family.prediction_types,
        "own_settings": family.own_settings,
        "alignment": family.alignment,
        "most_tokens": family.most_tokens,
        "architecture": family.architecture,
        "denoiser": family.denoiser,
        "control": family.control is not None,
        "trained_text": tuple(family.trained_text),
    }


FAMILIES = Table("model_family", _rows())


def predicted_by(family: str) -> tuple[str, ...]:
    """What the family of this name can be trained to predict; nothing of one that is not built."""
    found: tuple[str, ...] = ()
    if family in FAMILIES:
        found = FAMILIES[family].fact("prediction_types", ())
    return found
