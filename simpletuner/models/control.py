"""ControlNets: which class of diffusers a family's is, how one begins, and how one is opened.

A ControlNet is a copy of the denoiser's first half that sees a picture besides; what it makes of
that picture is added inside the denoiser (Zhang et al. 2023, arXiv 2302.05543).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from simpletuner.core.errors import ConfigError, ModelError
from simpletuner.core.files import read_json

if TYPE_CHECKING:
    from torch import nn

    from simpletuner.models.family import Family

PART = "controlnet"
"""The net's component name in the stock pipelines, and its folder's name."""

PICTURE = "controlnet_cond"
"""What every net's `forward` calls the control picture, and so its name in ``batch.controls``."""

_KEY = "controlnet_model_name_or_path"
_WHOLE = "check that its folder is complete"


@dataclass(frozen=True)
class ControlNet:
    """What the ControlNet of a family is.

    Args:
        net: Its class in diffusers.
        pipeline: The stock pipeline that takes one.
        argument: What that pipeline calls the control picture.
        picture: What the net sees of it: ``pixels`` [B, 3, H, W] in [0, 1], or its ``latents``.
        begin: Makes a net of a denoiser and of how often its VAE halves a picture: a copy of the
            denoiser's first half, which adds nothing yet.
        shared: The names in the denoiser's config that a net must agree with, or what it adds does
            not fit inside.
        fixed: What else must stand in the config of a net that is trained here.
    """

    net: str
    pipeline: str
    argument: str
    picture: Literal["pixels", "latents"]
    begin: Callable[[nn.Module, int], Any]
    shared: Sequence[str]
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def misfit(self, net: Mapping[str, Any], base: Mapping[str, Any], halvings: int) -> str | None:
        """Why a net of the config `net` cannot be trained on a denoiser of `base`; None if it can.

        Both are configs as they are read from a file; `halvings` are the VAE's.
        """
        if net.get("_class_name") != self.net:
            return f"is a {net.get('_class_name')}, not a {self.net}"
        wanted = {name: base.get(name) for name in self.shared} | dict(self.fixed)
        for name, value in wanted.items():
            if name in net and net[name] != value:
                return f"has {name} {net[name]}, the model needs {value}"
        own = len(net.get("conditioning_embedding_out_channels", _WIDTHS)) - 1
        if self.picture == "pixels" and own != halvings:
            return f"makes a picture smaller by {2**own}, the model's VAE by {2**halvings}"
        return None


_WIDTHS = (16, 32, 96, 256)
"""Channels of diffusers' net on the picture's way to an eighth of its size."""


def unet_control(pipeline: str) -> ControlNet:
    """The ControlNet of a UNet."""
    return ControlNet(
        net="ControlNetModel",
        pipeline=pipeline,
        argument="image",
        picture="pixels",
        begin=_of_unet,
        shared=(
            "in_channels",
            "block_out_channels",
            "layers_per_block",
            "cross_attention_dim",
            "addition_embed_type",
            "projection_class_embeddings_input_dim",
        ),
        fixed=MappingProxyType({"conditioning_channels": 3}),
    )


def _of_unet(unet: nn.Module, halvings: int) -> nn.Module:
    from diffusers import ControlNetModel, UNet2DConditionModel

    assert isinstance(unet, UNet2DConditionModel)
    widths = _WIDTHS[-halvings - 1 :]
    widths = _WIDTHS[:1] * (halvings + 1 - len(widths)) + widths
    net: nn.Module = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths)
    return net


def net_folder(name: str) -> Path | None:
    """The folder on this machine that `name` means, with a net's config; None if it is none."""
    path = Path(name).expanduser()
    return next((p for p in (path, path / PART) if (p / "config.json").is_file()), None)


def open_beside(family: Family, folder: Path | None = None, label: str = "") -> nn.Module:
    """A ControlNet of `family` in fp32 on the CPU: a new one, or the one in `folder`.

    Args:
        folder: As for `Family.check_control`.
        label: Likewise.

    Raises:
        ConfigError: The model takes none, or not this one.
        ModelError: It cannot be read.
    """
    import torch

    kind = family.check_control(folder, label)
    if folder is not None:
        return open_control(kind, folder, label)
    # read anew in fp32: the live denoiser may be in fewer bits, and `begin` may change its config
    base = family.checkpoint.open_part(family.denoiser, torch.float32)
    net = kind.begin(base, family.halvings)
    net.register_to_config(_name_or_path="")  # it names no folder
    return net


def check_fits(
    kind: ControlNet, folder: Path, base: Mapping[str, Any], halvings: int, label: str
) -> None:
    """Refuse the net in `folder` if it is of another model than `base`; reads no weights.

    Args:
        base: The denoiser's config.
        halvings: How often the model's VAE halves a picture.
        label: What the user named.

    Raises:
        ConfigError: It is.
    """
    if why := kind.misfit(read_json(folder / "config.json"), base, halvings):
        raise ConfigError(f"{_KEY}: {label} {why}", fix="name a ControlNet of this model")


def open_control(kind: ControlNet, folder: Path, label: str) -> nn.Module:
    """The net in `folder`, fp32, on the CPU.

    Args:
        label: What the user named.

    Raises:
        ModelError: It cannot be read.
    """
    import diffusers
    import torch
    from safetensors import SafetensorError

    cls = getattr(diffusers, kind.net)
    options = {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True}
    try:
        net: nn.Module
        net, told = cls.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{_KEY}: {label} cannot be opened: {error}", fix=_WHOLE) from error
    if missing := sorted(told["missing_keys"]):
        raise ModelError(
            f"{_KEY}: {label} lacks {len(missing)} weights, such as {missing[0]}", fix=_WHOLE
        )
    return net
