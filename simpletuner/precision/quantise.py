"""Frozen weights in fewer bits: which layers, what it saves, and what stays as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from simpletuner.core.errors import ConfigError, is_out_of_memory
from simpletuner.core.extras import require
from simpletuner.precision.blocks import blocks_of
from simpletuner.precision.dtypes import short_name
from simpletuner.precision.quantisers import QUANTISERS, quantised_in

if TYPE_CHECKING:
    from simpletuner.precision.settings import PrecisionSettings

GRID = 16
"""Both sides of a matrix are multiples of this; the kernels are wrong, or refuse, otherwise."""


@dataclass(frozen=True)
class Quantised:
    """What became of one model.

    Args:
        part: The model's name in the pipeline.
        name: The format.
        layers: How many linear layers are held in it.
        kept: How many of its kind were left as they were, by the reason.
        before: Bytes of all weights as opened.
        after: Bytes of all weights now.
        dtype: Of the weights that stayed.
        outside: What has linear layers outside the blocks, which stay too.
    """

    part: str
    name: str
    layers: int
    kept: dict[str, int]
    before: int
    after: int
    dtype: torch.dtype
    outside: tuple[str, ...] = ()

    @property
    def short(self) -> str:
        """`dtype` as the settings call it."""
        return short_name(self.dtype)

    def __str__(self) -> str:
        dtype, size = str(self.dtype).removeprefix("torch."), f"{self.after / 2**20:,.1f} MiB"
        if not self.layers:
            return f"{self.part} in {dtype}, {size}"
        rest = "".join(f", {count} layers left {why}" for why, count in self.kept.items())
        return (
            f"{self.part}: {self.layers} linear layers in {self.name}, the rest in {dtype}{rest};"
            f" {size} instead of {self.before / 2**20:,.1f}"
        )


class Quantiser:
    """Holds the parts of a model as the settings say, when they are opened.

    Raises:
        ExtraMissing: A format's package is not installed.

    Attributes:
        told: What became of each part that was opened, by its name.
    """

    def __init__(self, settings: PrecisionSettings) -> None:
        self.told: dict[str, Quantised] = {}
        self._via = settings.quantize_via
        self._denoiser = settings.base_model_precision
        self._encoders = {
            "text_encoder": settings.text_encoder_1_precision,
            "text_encoder_2": settings.text_encoder_2_precision,
            "text_encoder_3": settings.text_encoder_3_precision,
        }
        for name in {self._denoiser, *self._encoders.values()} - {"no_change"}:
            row = QUANTISERS[name]  # what is missing is told before anything is encoded
            require(row.fact("module"), extra=row.needs or "train", why=name)

    def __call__(self, part: str, model: nn.Module, device: torch.device) -> None:
        """Quantise a part in place, if the settings ask for it; see `quantise`."""
        self.told[part] = quantise(model, part, self.format(part), device, via=self._via)

    def format(self, part: str) -> str:
        """The row of QUANTISERS that a part is held in."""
        return self._encoders.get(part, self._denoiser)


def quantise(
    model: nn.Module, part: str, name: str, device: torch.device, *, via: str
) -> Quantised:
    """Hold the linear layers of a frozen model's repeated blocks in fewer bits, in place.

    Embeddings, norms, convolutions and what stands before and after the blocks stay: they are a
    small part of the weights and a large one of the loss. So do layers that the model's own class
    keeps in fp32, and those whose sides are no multiples of 16.

    Args:
        model: Frozen, on the CPU; adapters come after.
        part: Its name in the pipeline, for messages.
        name: A row of QUANTISERS.
        device: Where it is going to run; it is not moved.
        via: ``accelerator`` converts each layer there, ``cpu`` all of them before the move.

    Raises:
        ConfigError: The format does not work on the device, or the model has no such layers.
        ExtraMissing: Its package is not installed.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if why := quantised_in(name, device.type, short_name(dtype)):
        raise ConfigError(why)
    make, before = QUANTISERS[name].load(), weight_bytes(model)
    if name == "no_change":
        return Quantised(part, name, 0, {}, before, before, dtype)
    kept: Counter[str] = Counter()
    outside, layers = _outside(model), 0
    for path, layer in list(_candidates(model)):
        if why := _left_for(model, path, layer):
            kept[why] += 1
        else:
            made = make(layer.to(device if via == "accelerator" else "cpu"))
            if not layers:
                _try(made.to(device), name, dtype)
            _replace(model, path, made.requires_grad_(False))
            layers += 1
    if not layers:
        raise ConfigError(
            f"{part} has no layers that {name} could hold",
            fix="set its precision to no_change",
        )
    return Quantised(part, name, layers, dict(kept), before, weight_bytes(model), dtype, outside)


def _outside(model: nn.Module) -> tuple[str, ...]:
    """The linear layers outside the repeated blocks, of a list by their last name, else the first.

    FLUX's ``time_text_embed.timestep_embedder.linear_1`` is of its ``time_text_embed``, a UNet's
    ``down_blocks.0.resnets.1.time_emb_proj`` one of its ``time_emb_proj``.
    """
    inside = {id(layer) for _, layer in _candidates(model)}
    linear = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.Linear)]
    paths = [name.split(".") for name, each in linear if id(each) not in inside]
    names = [_title(path) for path in paths]
    return tuple(dict.fromkeys(names))


def _title(path: list[str]) -> str:
    words = [word for word in path if not word.isdigit()]
    return words[0] if words == path else words[-1]


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers inside the blocks of a model, each once."""
    seen: set[int] = set()
    for outer, block in blocks_of(model):
        for inner, layer in block.named_modules():
            if isinstance(layer, nn.Linear) and id(layer) not in seen:
                seen.add(id(layer))
                yield f"{outer}.{inner}", layer


def _try(layer: nn.Linear, name: str, dtype: torch.dtype) -> None:
    """Compute with one layer, so that kernels that cannot be had fail now and not in step 1.

    Also back, for what is trained before it learns through it.
    """
    device = layer.weight.device
    try:
        x = torch.zeros(1, layer.in_features, dtype=dtype, device=device, requires_grad=True)
        layer(x).sum().backward()
    except (RuntimeError, OSError, ImportError) as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"{name} cannot compute here: {str(error).splitlines()[0] if str(error) else error!r}",
            fix="quanto compiles its kernels of 4 and 2 bits: it needs ninja and g++, and nvcc with"
            " CUDA; without them take nf4-bnb, int8-quanto or int8-torchao",
        ) from error


def _left_for(model: nn.Module, path: str, layer: nn.Linear) -> str:
    """Why a layer stays as it is; empty for one that does not."""
    if layer.in_features % GRID or layer.out_features % GRID:
        return f"for a side that is no multiple of {GRID}"
    exact = getattr(model, "_keep_in_fp32_modules", None) or ()
    if any(part in exact for part in path.split(".")):
        return "for the model's class keeps them exact"
    return ""


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def foreseen(model: nn.Module, part: str, name: str) -> Quantised:
    """What becomes of a model on ``meta`` once `quantise` holds it in `name`.

    One layer of each shape is really converted, on the CPU, so scales and padding count too.
    """
    before = total = weight_bytes(model)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if name == "no_change":
        return Quantised(part, name, 0, {}, before, before, dtype)
    make, saved = QUANTISERS[name].load(), dict[tuple[Any, ...], int]()
    kept: Counter[str] = Counter()
    layers = 0
    for path, layer in _candidates(model):
        if why := _left_for(model, path, layer):
            kept[why] += 1
            continue
        layers += 1
        shape = (layer.in_features, layer.out_features, layer.bias is not None)
        if shape not in saved:
            real = nn.Linear(*shape, dtype=layer.weight.dtype).requires_grad_(False)
            whole = weight_bytes(real)
            saved[shape] = whole - weight_bytes(make(real))
        total -= saved[shape]
    return Quantised(part, name, layers, dict(kept), before, total, dtype, _outside(model))


def weight_bytes(model: nn.Module) -> int:
    """What the weights of a model take, those of quantised layers included."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(_bytes(tensor) for tensor in tensors)


def _bytes(tensor: Tensor) -> int:
    state = getattr(tensor, "quant_state", None)  # bitsandbytes keeps its scales beside the weight
    if state is not None:
        parts = [state.absmax, state.code]
        if state.nested:
            parts += [state.state2.absmax, state.state2.code]
        return tensor.nbytes + sum(part.nbytes for part in parts)
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if type(tensor) in (Tensor, nn.Parameter) or flatten is None:
        return tensor.nbytes
    return sum(_bytes(getattr(tensor, name)) for name in flatten()[0])
