"""A whole model in one file, by the names of its original release: written here, read by diffusers.

ComfyUI, A1111, Forge and kohya's scripts take such files. ``Family.single_file`` says where each
part is in it; the tables of ``models.original`` say what its tensors are called there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.core.errors import ModelError
from simpletuner.core.tensors import write_tensors
from simpletuner.models.original import OriginalNames, Place, swapped

if TYPE_CHECKING:
    from torch import Tensor, nn

    from simpletuner.models.family import Family

    Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class FilePart:
    """Where a part of a model is in its one file.

    Args:
        prefix: What the names of its tensors begin with.
        names: The table for a part of this config; None where its names stay as they are.
        others: What they begin with in other people's files.
    """

    prefix: str
    names: Callable[[Mapping[str, Any]], OriginalNames] | None = None
    others: tuple[str, ...] = ()

    @property
    def begins(self) -> tuple[str, ...]:
        """All that its names may begin with."""
        return (self.prefix, *self.others)


def parts_inside(names: Iterable[str], parts: Mapping[str, FilePart]) -> frozenset[str]:
    """The parts that a file with tensors of these names holds."""
    told = tuple(names)
    return frozenset(
        part for part, place in parts.items() if any(name.startswith(place.begins) for name in told)
    )


def to_original(weights: Weights, names: OriginalNames) -> dict[str, Tensor]:
    """A part's weights by the names of the original; those of one matrix made one.

    Raises:
        ModelError: The original has no such tensor.
    """
    import torch

    found: defaultdict[str, dict[int, Tensor]] = defaultdict(dict)
    for key, tensor in weights.items():
        module, leaf = _split(key)
        place = names.place(module)
        if place is None:
            raise ModelError(
                f"{key} has no name in the original layout of this model",
                fix="keep the diffusers layout",
            )
        if _swaps(place, weights.get(f"{module}.weight")):
            tensor = swapped(tensor)
        if place.kernel and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        named = dict(place.leaves).get(leaf, leaf)
        there = f"{place.module}.{named}" if named else place.module
        found[there][place.part] = tensor.T if place.transposed else tensor
    return {
        name: parts[0] if len(parts) == 1 else torch.cat([parts[part] for part in sorted(parts)])
        for name, parts in found.items()
    }


def from_original(weights: Weights, names: OriginalNames) -> dict[str, Tensor]:
    """The way back; a tensor that the table does not know is left out."""
    found = {}
    for key, tensor in weights.items():
        for module, leaf in ((key, ""), _split(key)):
            for ours, place in names.modules(module):
                named = {theirs: mine for mine, theirs in place.leaves}
                if place.leaves and leaf not in named:
                    continue
                if not place.leaves and not leaf:
                    continue
                value = tensor.T if place.transposed else tensor
                unit = len(value) // sum(place.shares)
                first = unit * sum(place.shares[: place.part])
                value = value[first : first + unit * place.shares[place.part]]
                if place.kernel and value.ndim == 4:
                    value = value[:, :, 0, 0]
                if _swaps(place, weights.get(f"{place.module}.weight")):
                    value = swapped(value)
                found[f"{ours}.{named.get(leaf, leaf)}"] = value
    return found


def _split(key: str) -> tuple[str, str]:
    module, _, leaf = key.rpartition(".")
    return module, leaf


def _swaps(place: Place, weight: Tensor | None) -> bool:
    return weight is not None and place.swaps(len(weight), weight.shape[-1])


def write_single_file(
    path: Path,
    family: Family,
    modules: Mapping[str, nn.Module],
    dtype: Any,
    metadata: Mapping[str, str],
) -> int:
    """Write these parts of a model as one file, atomically, and read it back.

    Args:
        modules: By the names of their parts; those that have no place in such a file are left out.
        dtype: What all numbers are written in; None for what each is held in.
        metadata: Facts for the reader; no paths, no secrets.

    Returns:
        How many tensors of the parts the file gives back, bit for bit: all of them.

    Raises:
        ModelError: A tensor has no place in the original layout, or reads back another.
        OSError: The disk refused.
    """
    import torch
    from safetensors import safe_open

    tables, wanted, tensors = {}, {}, dict(family.file_marks)
    for part, place in family.file_parts.items():
        if part not in modules:
            continue
        weights = _weights(modules[part])
        if dtype is not None:
            weights = {k: t.to(dtype) if t.is_floating_point() else t for k, t in weights.items()}
        table = place.names(_config(modules[part])) if place.names else None
        named = weights if table is None else to_original(weights, table)
        tensors |= {f"{place.prefix}{name}": t.contiguous() for name, t in named.items()}
        tables[place.prefix], wanted[place.prefix] = table, weights
    write_tensors(path, tensors, {"format": "pt", **metadata})
    same = 0
    with safe_open(path, "pt") as handle:
        keys = list(handle.keys())
        for prefix, table in tables.items():
            held = {
                k.removeprefix(prefix): handle.get_tensor(k) for k in keys if k.startswith(prefix)
            }
            back = held if table is None else from_original(held, table)
            wrong = sorted(back.keys() ^ wanted[prefix].keys()) or [
                name
                for name, tensor in wanted[prefix].items()
                if not torch.equal(tensor, back[name])
            ]
            if wrong:
                raise ModelError(
                    f"{path.name} was written, but {len(wrong)} of its tensors read back others,"
                    f" for example {prefix}{wrong[0]}",
                    fix="keep the folder you have, and report this",
                )
            same += len(back)
    return same


def _config(module: nn.Module) -> Mapping[str, Any]:
    config: Any = module.config
    told: Mapping[str, Any] = config.to_dict() if hasattr(config, "to_dict") else config
    return told


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """A part's tensors on the CPU, by the names that all releases of a library give.

    transformers 5.6 took the module ``text_model`` out of CLIPTextModel; files still name it. T5's
    embedding has two names, and its stock reader wants both.
    """
    bare = hasattr(module, "embeddings") and not hasattr(module, "text_model")
    found: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in module.state_dict().items():
        held = tensor.detach().cpu()
        found[f"text_model.{name}" if bare else name] = (
            held.clone() if held.data_ptr() in seen else held  # no file holds one memory twice
        )
        seen.add(held.data_ptr())
    return found
