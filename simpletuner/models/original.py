"""The names that modules have in a model's original release, which ComfyUI and kohya's tools use.

A table of rows, each a module of diffusers and its place in the original. ``{i}`` stands for a
number and is the same on both sides. Where the original holds several of diffusers' modules in one
matrix, a row says which part of its outputs it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where a module is in the original.

    Args:
        module: The original's name of the matrix.
        part: Which share of its outputs this is, counted from 0.
        shares: The sizes of all of them, one being the unit; ``(1,)`` for a matrix of its own.
        swapped: Where the matrix makes two vectors as wide as its input, scale and shift, they
            stand in the other order.
        leaves: Its tensors that are called otherwise there: our name and theirs, which is empty
            where the module's own name is all there is.
        kernel: The matrix is a convolution of 1 x 1 there.
        transposed: The matrix is the other way round there.
    """

    module: str
    part: int = 0
    shares: tuple[int, ...] = (1,)
    swapped: bool = False
    leaves: tuple[tuple[str, str], ...] = ()
    kernel: bool = False
    transposed: bool = False

    def swaps(self, rows: int, columns: int) -> bool:
        """True if the halves of a matrix [rows, columns] stand in the other order."""
        return self.swapped and rows == 2 * columns


class OriginalNames:
    """The table of one architecture.

    Args:
        rows: Diffusers' name and the place; the first that fits counts.
    """

    def __init__(self, rows: Iterable[tuple[str, Place]]) -> None:
        self._rows = [_Line.of(ours, place) for ours, place in rows]

    def place(self, module: str) -> Place | None:
        """Where a module of diffusers is; None where the original has no such matrix."""
        for line in self._rows:
            if found := line.ours.fullmatch(module):
                name = line.place.module.format_map(found.groupdict())
                return replace(line.place, module=name)
        return None

    def modules(self, original: str, *, flat: bool = False) -> list[tuple[str, Place]]:
        """The modules of diffusers that a matrix of the original holds, each with its place.

        Args:
            original: The original's name.
            flat: It is written with underscores for dots.
        """
        found = []
        for line in self._rows:
            if held := (line.flat if flat else line.original).fullmatch(original):
                numbers = held.groupdict()
                name = line.place.module.format_map(numbers)
                module = line.template.format_map(numbers)
                found.append((module, replace(line.place, module=name)))
        return found

    def unflat(self, flat: str) -> str | None:
        """The module of diffusers whose own name, with underscores for dots, this is."""
        for line in self._rows:
            if held := line.flat_ours.fullmatch(flat):
                return line.template.format_map(held.groupdict())
        return None


@dataclass(frozen=True)
class _Line:
    template: str
    place: Place
    ours: re.Pattern[str]
    original: re.Pattern[str]

    @classmethod
    def of(cls, template: str, place: Place) -> _Line:
        return cls(template, place, _pattern(template), _pattern(place.module))

    @cached_property
    def flat(self) -> re.Pattern[str]:
        return _pattern(self.place.module.replace(".", "_"))

    @cached_property
    def flat_ours(self) -> re.Pattern[str]:
        return _pattern(self.template.replace(".", "_"))


def _pattern(template: str) -> re.Pattern[str]:
    seen: set[str] = set()

    def number(found: re.Match[str]) -> str:
        name = found[1]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return rf"(?P<{name}>\d+)"

    return re.compile(re.sub(r"\\\{(\w+)\\\}", number, re.escape(template)))


def fused(
    ours: Sequence[str], module: str, shares: Sequence[int] = (), **more: Any
) -> list[tuple[str, Place]]:
    """Rows for modules that are one matrix in the original, in the order of its outputs.

    Args:
        shares: Their sizes, one being the unit; all alike without it.
        more: What else Place is told of each.
    """
    sizes = tuple(shares) or (1,) * len(ours)
    return [(name, Place(module, part, sizes, **more)) for part, name in enumerate(ours)]


# --- the UNet of Stable Diffusion ----------------------------------------------------------------

_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
_ATTENTION = (
    "norm",
    "proj_in",
    "proj_out",
    *(
        f"transformer_blocks.{{t}}.attn{kind}.{part}"
        for kind in (1, 2)
        for part in ("to_q", "to_k", "to_v", "to_out.0")
    ),
    *(f"transformer_blocks.{{t}}.norm{number}" for number in (1, 2, 3)),
    "transformer_blocks.{t}.ff.net.0.proj",
    "transformer_blocks.{t}.ff.net.2",
)
_OUTSIDE = (
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
)


def unet_names(attends_up: Sequence[bool], layers: int = 2) -> OriginalNames:
    """The UNets of Stable Diffusion 1, 2 and XL.

    The original counts resnets (each with its attention) and samplers through all blocks.

    Args:
        attends_up: For each block on the way up, whether it has attention.
        layers: Resnets of a block on the way down; one more on the way up.
    """
    return OriginalNames((ours, Place(name)) for ours, name in _unet(attends_up, layers))


def unet_names_of(config: Mapping[str, Any]) -> OriginalNames:
    """The names of a UNet whose blocks its config tells."""
    attends = ["CrossAttn" in kind for kind in config["up_block_types"]]
    return unet_names(attends, int(config["layers_per_block"]))


def _unet(attends_up: Sequence[bool], layers: int) -> Iterator[tuple[str, str]]:
    stride = layers + 1
    pairs: list[tuple[str, str, Iterable[tuple[str, str]]]] = [
        (f"mid_block.resnets.{n}", f"middle_block.{2 * n}", _RESNET) for n in (0, 1)
    ]
    attention = tuple((name, name) for name in _ATTENTION)
    pairs.append(("mid_block.attentions.0", "middle_block.1", attention))
    for block, attends in enumerate(attends_up):
        for way, first, count in (("down", 1, layers), ("up", 0, stride)):
            side = "input_blocks" if way == "down" else "output_blocks"
            for n in range(count):
                at = f"{side}.{block * stride + n + first}"
                pairs.append((f"{way}_blocks.{block}.resnets.{n}", f"{at}.0", _RESNET))
                pairs.append((f"{way}_blocks.{block}.attentions.{n}", f"{at}.1", attention))
        after = (block + 1) * stride
        yield f"down_blocks.{block}.downsamplers.0.conv", f"input_blocks.{after}.0.op"
        place = 2 if attends else 1
        yield f"up_blocks.{block}.upsamplers.0.conv", f"output_blocks.{after - 1}.{place}.conv"
    for ours, original, inner in pairs:
        for name, named in inner:
            yield f"{ours}.{name}", f"{original}.{named}"
    yield from _OUTSIDE


# --- the VAE of them all --------------------------------------------------------------------------

_VAE_RESNET = (
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("conv_shortcut", "nin_shortcut"),
)


def vae_names_of(config: Mapping[str, Any]) -> OriginalNames:
    """The names of CompVis' VAE: blocks on the way up count from the picture."""
    return OriginalNames(_vae(len(config["up_block_types"])))


def _vae(blocks: int) -> Iterator[tuple[str, Place]]:
    resnets = [
        ("encoder.down_blocks.{i}.resnets.{n}", "encoder.down.{i}.block.{n}"),
        *(
            (f"decoder.up_blocks.{i}.resnets.{{n}}", f"decoder.up.{blocks - 1 - i}.block.{{n}}")
            for i in range(blocks)
        ),
    ]
    for side in ("encoder", "decoder"):
        yield f"{side}.conv_in", Place(f"{side}.conv_in")
        yield f"{side}.conv_norm_out", Place(f"{side}.norm_out")
        yield f"{side}.conv_out", Place(f"{side}.conv_out")
        ours, there = f"{side}.mid_block", f"{side}.mid"
        resnets += [(f"{ours}.resnets.{n}", f"{there}.block_{n + 1}") for n in (0, 1)]
        yield f"{ours}.attentions.0.group_norm", Place(f"{there}.attn_1.norm")
        for name, named in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            yield f"{ours}.attentions.0.{name}", Place(f"{there}.attn_1.{named}", kernel=True)
    for ours, there in resnets:
        for name, named in _VAE_RESNET:
            yield f"{ours}.{name}", Place(f"{there}.{named}")
    yield "encoder.down_blocks.{i}.downsamplers.0.conv", Place("encoder.down.{i}.downsample.conv")
    for i in range(blocks):
        there = f"decoder.up.{blocks - 1 - i}.upsample.conv"
        yield f"decoder.up_blocks.{i}.upsamplers.0.conv", Place(there)
    for name in ("quant_conv", "post_quant_conv"):
        yield name, Place(name)


# --- text encoders --------------------------------------------------------------------------------


def open_clip_names(_: Mapping[str, Any]) -> OriginalNames:
    """The names of OpenCLIP: query, key and value are one matrix, the projection is transposed."""
    return OriginalNames(_open_clip())


def _open_clip() -> Iterator[tuple[str, Place]]:
    alone = (("weight", ""),)  # a tensor that is no module's
    yield "text_model.embeddings.token_embedding", Place("token_embedding")
    yield (
        "text_model.embeddings.position_embedding",
        Place("positional_embedding", leaves=alone),
    )
    layer, there = "text_model.encoder.layers.{i}", "transformer.resblocks.{i}"
    one = tuple((leaf, f"in_proj_{leaf}") for leaf in ("weight", "bias"))
    parts = [f"{layer}.self_attn.{letter}_proj" for letter in "qkv"]
    yield from fused(parts, f"{there}.attn", leaves=one)
    for name, named in (
        ("self_attn.out_proj", "attn.out_proj"),
        ("layer_norm1", "ln_1"),
        ("layer_norm2", "ln_2"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ):
        yield f"{layer}.{name}", Place(f"{there}.{named}")
    yield "text_model.final_layer_norm", Place("ln_final")
    yield "text_projection", Place("text_projection", leaves=alone, transposed=True)


def swapped(values: Tensor) -> Tensor:
    """The second half of the rows before the first: shift and scale, the other way round."""
    import torch

    first, second = values.chunk(2)
    return torch.cat((second, first))
