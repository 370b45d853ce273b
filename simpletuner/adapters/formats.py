"""LoRA files in the layouts of diffusers, kohya and ComfyUI: read, rewritten, the change kept.

One module's change of its weight is ``(alpha / r) * up @ down``, down [r, in], up [out, r], with
kernels behind for convolutions. DoRA (Liu et al. 2024, arXiv 2402.09353) has a magnitude [out]
beside. Letters: r rank.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simpletuner.adapters.export import adapter_metadata, write_lora
from simpletuner.core.errors import ConfigError, ModelError
from simpletuner.core.tensors import read_tensors, write_tensors
from simpletuner.models.encoders import CLIP, is_text, module_of, named_in
from simpletuner.models.original import OriginalNames, Place, swapped

if TYPE_CHECKING:
    from simpletuner.models.family import Family

FORMATS = ("diffusers", "kohya", "comfyui")


@dataclass(frozen=True)
class Change:
    """What a LoRA does to one module.

    Args:
        down: [r, in, …].
        up: [out, r, …].
        alpha: The strength is alpha / r.
        magnitude: [out] of DoRA; None for a plain LoRA.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """The number of its directions."""
        return len(self.down)

    def delta(self) -> Tensor:
        """[out, in · …] fp32, the change of the flattened weight; of DoRA, before its norm."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.alpha / self.rank * product


Changes = Mapping[str, Change]
"""By the module's name in diffusers: within the denoiser, or with the text encoder's before it."""


# --- reading --------------------------------------------------------------------------------------


def read_changes(
    path: Path, family: type[Family], names: OriginalNames | None = None
) -> dict[str, Change]:
    """A LoRA of the denoiser, and of text encoders that can train, in any of the layouts.

    Args:
        names: The table of the denoiser at hand; without it, that of the family's base model.

    Raises:
        ConfigError: There is no such file.
        ModelError: It cannot be read, or holds what is not a LoRA of this family; names the first
            key.
    """
    from safetensors import SafetensorError

    if not path.is_file():
        raise ConfigError(f"{path} does not exist", fix="correct the path")
    try:
        found, header = read_tensors(path), adapter_metadata(path) or {}
    except (SafetensorError, ValueError) as error:
        raise ModelError(
            f"{path.name} cannot be read: {error}", fix="copy or download it again"
        ) from error
    parts: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    scaled: set[str] = set()  # peft's vectors are of the outputs always, [1, out, 1, 1] of kernels
    for key, tensor in found.items():
        module, role = _split(key)
        if role is None:
            raise _strange(path, key, family)
        parts[module][role] = tensor
        if key.endswith(".dora_scale"):
            scaled.add(module)
    changes: dict[str, Change] = {}
    for module, held in parts.items():
        if not {"down", "up"} <= held.keys():
            raise _strange(path, module, family)
        size = held.get("size")
        if module in scaled and size is not None and size.shape[:1] != held["up"].shape[:1]:
            raise ModelError(
                f"{path.name} is a DoRA whose magnitudes are of the inputs of {module}",
                fix="train it with wd_on_out, as is usual; peft and diffusers know no other",
            )
        change = _change(module, held, header)
        changes |= _placed(path, module, change, family, names or family.original)
    if not changes:
        raise ModelError(f"{path.name} holds no tensors", fix="name another file")
    return changes


_ROLES = (
    (re.compile(r"(.+)\.lora_(?:A|down)(?:\.default)?\.weight"), "down"),
    (re.compile(r"(.+)\.lora_(?:B|up)(?:\.default)?\.weight"), "up"),
    (re.compile(r"(.+)\.alpha"), "alpha"),
    (re.compile(r"(.+)\.(?:dora_scale|lora_magnitude_vector(?:\.default)?(?:\.weight)?)"), "size"),
)


def _split(key: str) -> tuple[str, str | None]:
    for pattern, role in _ROLES:
        if found := pattern.fullmatch(key):
            return found[1], role
    return key, None


def _change(module: str, held: Mapping[str, Tensor], header: Mapping[str, Any]) -> Change:
    rank = len(held["down"])
    alpha = float(held["alpha"]) if "alpha" in held else _alpha_of(module, rank, header)
    size = held.get("size")
    return Change(held["down"], held["up"], alpha, None if size is None else size.flatten())


def _alpha_of(module: str, rank: int, header: Mapping[str, Any]) -> float:
    """The alpha that the header of a diffusers file has for a module; its rank without one."""
    prefix, _, name = module.partition(".")
    patterns: Mapping[str, float] = header.get(f"{prefix}.alpha_pattern") or {}
    for pattern, alpha in patterns.items():
        if re.fullmatch(rf"(.*\.)?{pattern}", name):  # peft's own rule
            return float(alpha)
    return float(header.get(f"{prefix}.lora_alpha", rank))


def _placed(
    path: Path, module: str, change: Change, family: type[Family], names: OriginalNames
) -> dict[str, Change]:
    """A file's module as the modules of diffusers that it is."""
    prefix = f"{family.denoiser}."
    if module.startswith(prefix):
        return {module.removeprefix(prefix): change}
    text = module_of(module, family.trained_text)
    if text is not None:
        return {text: change}
    for begin, flat in (("diffusion_model.", False), ("lora_unet_", True), ("lycoris_", True)):
        if not module.startswith(begin):
            continue
        rest = module.removeprefix(begin)
        held = names.modules(rest, flat=flat)
        if held:
            return dict(_parts(change, held))
        ours = names.unflat(rest) if flat else None
        if ours is not None:
            return {ours: change}
    raise _strange(path, module, family)


def _parts(change: Change, held: list[tuple[str, Place]]) -> Iterator[tuple[str, Change]]:
    """The shares of a matrix's change, each without the directions that do nothing to it."""
    for module, place in held:
        unit = len(change.up) // sum(place.shares)
        first = unit * sum(place.shares[: place.part])
        rows = slice(first, first + unit * place.shares[place.part])
        up = change.up[rows]
        size = None if change.magnitude is None else change.magnitude[rows]
        if place.swaps(len(up), change.down.shape[1]):
            up, size = swapped(up), None if size is None else swapped(size)
        used = up.flatten(2).abs().sum((0, 2)) > 0 if up.ndim > 2 else up.abs().sum(0) > 0
        if len(place.shares) == 1 or bool(used.all()):
            yield module, Change(change.down, up, change.alpha, size)
        elif bool(used.any()):
            rank = int(used.sum())
            alpha = change.alpha * rank / change.rank
            yield module, Change(change.down[used], up[:, used], alpha, size)


def _strange(path: Path, key: str, family: type[Family]) -> ModelError:
    return ModelError(
        f"{path.name} is not a LoRA of the {family.denoiser} of {family.title}: it holds {key}",
        fix="name the family it was made for; layouts of diffusers, kohya and ComfyUI are read",
    )


# --- writing --------------------------------------------------------------------------------------


def write_changes(
    path: Path,
    changes: Changes,
    layout: str,
    family: type[Family],
    metadata: Mapping[str, str],
    names: OriginalNames | None = None,
    more: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write a LoRA in one of FORMATS, atomically.

    Args:
        metadata: Facts for the reader; no paths, no secrets.
        names: The table of the denoiser at hand; without it, that of the family's base model.
        more: What else a layout other than diffusers holds, by its keys.

    Raises:
        ModelError: A module has no name in the original, or DoRA cannot be kept.
    """
    if layout == "diffusers":
        _write_diffusers(path, changes, family, metadata)
        return
    tensors: dict[str, Tensor] = dict(more)
    comfy = layout == "comfyui"
    ends = ("lora_A.weight", "lora_B.weight") if comfy else ("lora_down.weight", "lora_up.weight")
    text, ours = _split_text(changes)
    named = {
        f"diffusion_model.{module}" if comfy else f"lora_unet_{module.replace('.', '_')}": change
        for module, change in _named(ours, layout, family, names or family.original).items()
    }
    named |= {named_in(layout, name, family.trained_text): change for name, change in text.items()}
    for begin, change in named.items():
        tensors[f"{begin}.{ends[0]}"] = change.down.contiguous()
        tensors[f"{begin}.{ends[1]}"] = change.up.contiguous()
        tensors[f"{begin}.alpha"] = torch.tensor(change.alpha)
        if change.magnitude is not None:
            shape = (-1, *[1] * (change.down.ndim - 1))
            tensors[f"{begin}.dora_scale"] = change.magnitude.reshape(shape).contiguous()
    ranks = sorted({change.rank for change in named.values()})
    alphas = sorted({change.alpha for change in named.values()})
    header = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks[0]) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas[0]:g}" if len(alphas) == 1 else "Dynamic",
        **metadata,
    }
    write_tensors(path, tensors, header)


def _split_text(changes: Changes) -> tuple[dict[str, Change], dict[str, Change]]:
    """Those of text encoders, and those of the denoiser."""
    text = {name: change for name, change in changes.items() if is_text(name)}
    return text, {name: change for name, change in changes.items() if name not in text}


def _named(
    changes: Changes, layout: str, family: type[Family], names: OriginalNames
) -> dict[str, Change]:
    """The changes by the names of `layout`; those of one matrix made one."""
    if layout == "kohya" and family.kohya_names == "diffusers":
        return dict(changes)
    together: defaultdict[str, dict[int, Change]] = defaultdict(dict)
    places: dict[str, Place] = {}
    for module, change in changes.items():
        place = names.place(module)
        if place is None:
            raise ModelError(
                f"{module} has no name in the original layout of {family.title}, so {layout}"
                " cannot hold it",
                fix="keep the diffusers layout, or train without this module",
            )
        if place.swaps(len(change.up), change.down.shape[1]):
            size = None if change.magnitude is None else swapped(change.magnitude)
            change = replace(change, up=swapped(change.up), magnitude=size)
        together[place.module][place.part] = change
        places[place.module] = place
    return {module: _one(module, held, places[module].shares) for module, held in together.items()}


def _one(module: str, held: Mapping[int, Change], shares: tuple[int, ...]) -> Change:
    """The changes of a matrix's shares as one, their directions side by side.

    A strength that all have stays in alpha, so that the file can be gone on from; others go in up.
    """
    if len(shares) == 1:
        return held[0]
    sizes = [change.magnitude for _, change in sorted(held.items())]
    with_size = [size for size in sizes if size is not None]
    if with_size and len(with_size) < len(shares):
        raise ModelError(
            f"{module} is one matrix in the original layout, and DoRA was trained on parts of it",
            fix="keep the diffusers layout, or train all of its parts",
        )
    part, first = next(iter(held.items()))
    unit = len(first.up) // shares[part]
    rank = sum(change.rank for change in held.values())
    up = first.up.new_zeros(unit * sum(shares), rank)
    column, strengths = 0, {change.alpha / change.rank for change in held.values()}
    common = strengths.pop() if len(strengths) == 1 else 1.0
    for part, change in sorted(held.items()):
        row = unit * sum(shares[:part])
        block = up[row : row + len(change.up), column : column + change.rank]
        block.copy_(change.up * (change.alpha / change.rank / common))
        column += change.rank
    down = torch.cat([change.down for _, change in sorted(held.items())])
    return Change(down, up, common * rank, torch.cat(with_size) if with_size else None)


def _write_diffusers(
    path: Path, changes: Changes, family: type[Family], metadata: Mapping[str, str]
) -> None:
    text, ours = _split_text(changes)
    parts = {family.denoiser: ours} if ours else {}
    for name, change in text.items():
        part, _, module = name.partition(".")
        parts.setdefault(part, {})[module] = change
    tensors: dict[str, Tensor] = {}
    for part, held in parts.items():
        size = "lora_magnitude_vector" + ".weight" * is_text(part)  # as each loader reads it
        for module, change in held.items():
            begin = f"{part}.{module}"
            tensors[f"{begin}.lora_A.weight"] = change.down.contiguous()
            tensors[f"{begin}.lora_B.weight"] = change.up.contiguous()
            if change.magnitude is not None:
                tensors[f"{begin}.{size}"] = change.magnitude.contiguous()
    write_lora(path, tensors, {part: _told(held) for part, held in parts.items()}, metadata)


def _told(changes: Changes) -> dict[str, Any]:
    """What peft says of the adapter of one part, by its modules' names in it."""
    from peft import LoraConfig

    named = {name.removeprefix(CLIP): change for name, change in changes.items()}
    first = next(iter(named.values()))
    config = LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,  # type: ignore[arg-type]
        target_modules=sorted(named),
        use_dora=first.magnitude is not None,
        rank_pattern={n: c.rank for n, c in named.items() if c.rank != first.rank},
        alpha_pattern={n: c.alpha for n, c in named.items() if c.alpha != first.alpha},
    )
    return config.to_dict()
