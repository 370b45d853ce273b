"""LyCORIS files in the layouts of other programs: the numbers stay, the names of modules change.

The library calls a module ``lycoris_`` and its name in diffusers made flat. ComfyUI takes that too,
and ``diffusion_model.`` before the original name, or ``transformer.`` before that of diffusers
where the original holds several modules in one matrix; kohya's programs take ``lora_unet_`` before
the flat original name alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from simpletuner.core.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.models.family import Family
    from simpletuner.models.original import OriginalNames

LIBRARY = "lycoris_"
_LEAF = re.compile(
    r"(?P<module>.+?)\.(?P<leaf>alpha|dora_scale|scalar|diff|diff_b|w_norm|b_norm|rescale"
    r"|oft_\w+|hada_\w+|lokr_\w+|(?:lora_(?:up|down|mid)|[ab][12]|bm)\.weight)"
)
_PLAIN = ("alpha", "dora_scale", "lora_up.weight", "lora_down.weight")


def is_lycoris(keys: Iterable[str]) -> bool:
    """True if a file with these keys is of LyCORIS and not a plain LoRA."""
    found = [_LEAF.fullmatch(key) for key in keys]
    return any(each is not None and each["leaf"] not in _PLAIN for each in found)


def to_library(
    tensors: Mapping[str, Tensor], family: type[Family], names: OriginalNames | None = None
) -> dict[str, Tensor]:
    """A file in any layout, by the names that the library gives.

    Args:
        names: The table of the denoiser at hand; without it, that of the family's base model.

    Raises:
        ModelError: It holds what is no LyCORIS of this family's denoiser.
    """
    found = {}
    for key, tensor in tensors.items():
        module, leaf = _split(key)
        flat = _module(module, family, names or family.original).replace(".", "_")
        found[f"{LIBRARY}{flat}.{leaf}"] = tensor
    return found


def to_layout(
    tensors: Mapping[str, Tensor],
    layout: str,
    family: type[Family],
    names: OriginalNames | None = None,
) -> dict[str, Tensor]:
    """A file by the names of one of FORMATS; that of diffusers is the library's own.

    Raises:
        ModelError: The layout has no name for a module.
    """
    table = names or family.original
    ours = to_library(tensors, family, table)
    if layout == "diffusers":
        return ours
    found = {}
    for key, tensor in ours.items():
        flat, leaf = _split(key)
        module = _module(flat, family, table)
        found[f"{_named(module, layout, family, table)}.{leaf}"] = tensor
    return found


def _named(module: str, layout: str, family: type[Family], names: OriginalNames) -> str:
    if layout == "kohya" and family.kohya_names == "diffusers":
        return f"lora_unet_{module.replace('.', '_')}"
    place = names.place(module)
    if place is not None and place.shares == (1,) and not place.swapped:
        whole = place.module
        return (
            f"diffusion_model.{whole}"
            if layout == "comfyui"
            else f"lora_unet_{whole.replace('.', '_')}"
        )
    if layout == "comfyui" and place is not None:
        return f"{family.denoiser}.{module}"
    raise ModelError(
        f"{module} is a part of a matrix in the original layout of {family.title}, and {layout}"
        " has no name for a LyCORIS adapter of such a part",
        fix="take comfyui, which has",
    )


def _split(key: str) -> tuple[str, str]:
    found = _LEAF.fullmatch(key)
    if found is None:
        raise ModelError(f"{key} is no tensor of a LyCORIS adapter", fix="name another file")
    return found["module"], found["leaf"]


def _module(named: str, family: type[Family], names: OriginalNames) -> str:
    """The module of diffusers that a file's name means."""
    for begin, flat in ((LIBRARY, True), ("lora_unet_", True), ("diffusion_model.", False)):
        if not named.startswith(begin):
            continue
        rest = named.removeprefix(begin)
        held = names.modules(rest, flat=flat) if begin != LIBRARY else []
        ours = names.unflat(rest) if flat and not held else None
        if len(held) == 1:
            return held[0][0]
        if ours is not None:
            return ours
    if named.startswith(f"{family.denoiser}."):
        return named.removeprefix(f"{family.denoiser}.")
    raise ModelError(
        f"{named} is no module of the {family.denoiser} of {family.title}",
        fix="name the family it was made for",
    )
