"""Frozen weights that wait in the computer's memory, or on its disk, until their turn.

A hook of diffusers brings copies of a group's weights to the device before its module computes, and
puts the waiting ones back in their place after it. What a step saves for its gradients are the
copies, which live as long as they are needed; diffusers' own offloading changes a weight where it
is, also under a step that has saved it, and takes along what trains.

A block that is recomputed for its gradients is called like any other, so groups are the blocks that
gradient checkpointing recomputes, or smaller.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from simpletuner.core.errors import ConfigError
from simpletuner.precision.blocks import blocks_of

if TYPE_CHECKING:
    from simpletuner.precision.settings import PrecisionSettings

CPU = torch.device("cpu")

_HOOK = "group_offloading"
"""The name by which a pipeline finds the hook, and in it the device to compute on."""


@dataclass(frozen=True)
class Group:
    """Frozen weights that come and go together.

    Args:
        name: Of `module` in its model.
        module: Whose call needs them.
        whole: All that is inside it, not only its own.
    """

    name: str
    module: nn.Module
    whole: bool

    def places(self) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        """Where each tensor is kept, its name there, and itself."""
        found = _places(self.module.modules() if self.whole else (self.module,))
        return (place for place in found if not place[2].requires_grad)

    @property
    def nbytes(self) -> int:
        """What they take on the device."""
        return sum(tensor.nbytes for _, _, tensor in self.places())


def _places(modules: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    for module in modules:
        held: dict[str, Any]
        for held in (module._parameters, module._buffers):
            for name, tensor in list(held.items()):
                if tensor is not None:
                    yield held, name, tensor


def groups_of(model: nn.Module, settings: PrecisionSettings) -> list[Group]:
    """What of `model` comes and goes, in the order of its modules.

    Raises:
        ConfigError: More blocks are to be swapped than there are.
    """
    if settings.enable_group_offload and settings.group_offload_type == "leaf_level":
        return [group for group in _layers(model) if group.nbytes]
    found = [Group(name, block, whole=True) for name, block in blocks_of(model)]
    found = [group for group in found if group.nbytes]
    count = settings.musubi_blocks_to_swap
    if count > len(found) > 0:
        raise ConfigError(
            f"musubi_blocks_to_swap: the model has {len(found)} blocks, {count} are asked for",
            fix=f"set it to at most {len(found)}, or set enable_group_offload in its place",
        )
    return found[-count:]  # all of them without a count


def _layers(model: nn.Module) -> Iterator[Group]:
    """Each module with what is its own; one that carries an adapter with what is inside as well.

    DoRA reads the weights of the layer inside before that is called.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        whole = isinstance(module, BaseTunerLayer)
        if module not in inside:
            yield Group(name, module, whole)
        if whole:
            inside.update(module.modules())


def apply(models: Sequence[nn.Module], settings: PrecisionSettings, device: torch.device) -> None:
    """Let the groups of each model come and go, and put all else on `device`.

    Args:
        models: On the CPU.
        settings: What is asked for.
        device: Where they compute.

    Raises:
        ConfigError: More blocks are to be swapped than there are.
    """
    for model in models:
        folder = _folder(model, settings)
        waiting: set[int] = set()
        for number, group in enumerate(groups_of(model, settings)):
            hook = _Turn(group, device, folder and folder / f"{number}.safetensors")
            HookRegistry.check_if_exists_or_initialize(group.module).register_hook(hook, _HOOK)
            waiting.update(id(tensor) for _, _, tensor in group.places())
        for held, name, tensor in _places(model.modules()):
            if id(tensor) in waiting:
                continue
            if _is_plain(tensor):
                tensor.data = tensor.data.to(device)
            else:
                held[name] = _like(tensor, tensor.to(device))


def release(models: Sequence[nn.Module]) -> None:
    """Take the hooks off; what waited stays where it is.

    A loader of adapters would put diffusers' own in their place.
    """
    for module in (each for model in models for each in model.modules()):
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None:
            registry.remove_hook(_HOOK, recurse=False)


def _folder(model: nn.Module, settings: PrecisionSettings) -> Path | None:
    """A folder for the weights of this model, which goes with it."""
    root = settings.group_offload_to_disk_path
    if root is None:
        return None
    root.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="offloaded-", dir=root)
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@dataclass(frozen=True)
class _OnDevice:
    """What a pipeline reads of a hook."""

    onload_device: torch.device


class _Turn(ModelHook):  # type: ignore[misc]
    """Brings a group's weights for a call of its module."""

    def __init__(self, group: Group, device: torch.device, file: Path | None) -> None:
        super().__init__()
        self._group, self.config = group, _OnDevice(device)
        places = list(group.places())
        if file is not None:
            save_file({str(i): t.contiguous() for i, (*_, t) in enumerate(places)}, file)
            mapped = load_file(file)  # read from the disk at each use, as far as memory is scarce
            homes = [_like(t, mapped[str(i)]) for i, (*_, t) in enumerate(places)]
        elif device.type == "cuda":
            homes = [_like(t, _pinned(t)) for *_, t in places]
        else:
            homes = [t for *_, t in places]
        self._homes = [
            (held, name, home) for (held, name, _), home in zip(places, homes, strict=True)
        ]
        self._set(lambda home: home)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """See ModelHook."""
        device = self.config.onload_device
        self._set(lambda home: _like(home, home.to(device, copy=True, non_blocking=True)))
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """See ModelHook."""
        self._set(lambda home: home)
        return output

    def _set(self, of: Callable[[Tensor], Tensor]) -> None:
        for held, name, home in self._homes:
            held[name] = of(home)


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """`values` as a parameter where `tensor` is one."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values.detach(), requires_grad=False)
    return values


def _pinned(tensor: Tensor) -> Tensor:
    """In memory that the device reads by itself; quantised weights know of no such."""
    return tensor.detach().pin_memory() if _is_plain(tensor) else tensor


def _is_plain(tensor: Tensor) -> bool:
    """False for one that is made of others, as quantised ones are: it cannot be set in place."""
    return not is_traceable_wrapper_subclass(tensor)
