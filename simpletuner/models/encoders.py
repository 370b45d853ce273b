"""Text encoders that train beside the denoiser: their names in files, and the live ones.

Letters: B batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simpletuner.models import original

if TYPE_CHECKING:
    from torch import nn

    from simpletuner.core.types import Embeds, Place
    from simpletuner.models.family import Family, Shrink

CLIP = "text_model."
"""Begins the names of CLIP's modules in files, also where the class of transformers has no such."""

_ATTENTION = tuple(f"self_attn.{each}" for each in ("q_proj", "k_proj", "v_proj", "out_proj"))
_MODULES = original.OriginalNames(
    (name, original.Place(name))
    for part in (*_ATTENTION, "mlp.fc1", "mlp.fc2")
    for name in (f"{CLIP}encoder.layers.{{i}}.{part}",)
)


@dataclass(frozen=True)
class TrainedEncoder:
    """A CLIP that can train, and what it is called elsewhere.

    Args:
        kohya: What its keys begin with in the files of kohya's scripts.
        comfyui: Its name in ComfyUI.
        spare_layers: How many of its last layers the pipeline takes nothing from.
    """

    kohya: str
    comfyui: str
    spare_layers: int = 0

    def targets(self, encoder: nn.Module) -> list[str]:
        """Names in `encoder` of what gets an adapter: the attention that the pipeline hears of."""
        config: Any = encoder.config
        begin, heard = own_begin(encoder), config.num_hidden_layers - self.spare_layers
        return [f"{begin}encoder.layers.{i}.{part}" for i in range(heard) for part in _ATTENTION]


def own_begin(encoder: nn.Module) -> str:
    """What the names of CLIP's modules begin with in this class: `CLIP`, or nothing."""
    return CLIP if hasattr(encoder, "text_model") else ""


# --- names in files -------------------------------------------------------------------------------


def module_of(named: str, encoders: Mapping[str, TrainedEncoder]) -> str | None:
    """The module that a LoRA file calls `named`, as ``text_encoder.text_model.…``.

    Args:
        named: In the layout of diffusers, kohya or ComfyUI.
        encoders: Those that can train, by their names in the pipeline.

    Returns:
        None for what is no layer of these.
    """
    for part, encoder in encoders.items():
        for begin in (f"{part}.", f"text_encoders.{encoder.comfyui}.transformer."):
            if named.startswith(begin):
                module = CLIP + named.removeprefix(begin).removeprefix(CLIP)
                return f"{part}.{module}" if _MODULES.place(module) else None
        if named.startswith(f"{encoder.kohya}_"):
            flat = _MODULES.unflat(named.removeprefix(f"{encoder.kohya}_"))
            return f"{part}.{flat}" if flat else None
    return None


def is_text(module: str) -> bool:
    """True for a name that `module_of` gives, which no module of a denoiser has."""
    return module.startswith("text_encoder")


def named_in(layout: str, module: str, encoders: Mapping[str, TrainedEncoder]) -> str:
    """What ``kohya`` or ``comfyui`` call a module whose name `module_of` gave."""
    part, _, rest = module.partition(".")
    if layout == "comfyui":
        return f"text_encoders.{encoders[part].comfyui}.transformer.{rest}"
    return f"{encoders[part].kohya}_{rest.replace('.', '_')}"


# --- live -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextEncoders:
    """The stock pipeline's text encoders, loaded for the whole run.

    Args:
        family: Whose they are.
        pipe: The pipeline with them and their tokenizers alone.
        place: Where and in what dtype they run.
    """

    family: Family
    pipe: Any
    place: Place

    @classmethod
    def opened(cls, family: Family, place: Place, shrink: Shrink | None = None) -> TextEncoders:
        """Those of `family`, frozen; what can train is in training mode."""
        found = cls(family, family.open_text(place, shrink), place)
        for encoder in found.trained.values():
            encoder.train()
        return found

    @classmethod
    def blueprint(cls, family: Family, place: Place) -> TextEncoders:
        """The same on the ``meta`` device: shapes and no weights."""
        import diffusers

        parts = {
            part: family.checkpoint.text_blueprint(part, place.dtype) for part in family.text_parts
        }
        nothing = {family.denoiser: None, "vae": None, **family.pipeline_options}
        pipeline = getattr(diffusers, family.pipeline)
        pipe = pipeline(**parts, **nothing, scheduler=family.scheduler())
        found = cls(family, pipe, place)
        for encoder in found.trained.values():
            encoder.train()
        return found

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Every encoder by its name in the pipeline, those that stay as they are too."""
        parts = {part: self.pipe.components[part] for part in self.family.text_parts}
        return {part: m for part, m in parts.items() if hasattr(m, "requires_grad_")}

    @property
    def trained(self) -> dict[str, nn.Module]:
        """Those that can train."""
        return {n: m for n, m in self.modules.items() if n in self.family.trained_text}

    def embeds(self, captions: Sequence[str]) -> Embeds:
        """The conditioning of B captions by the pipeline's argument names, [B, …].

        On the device and with its graph, in the encoders' dtype.
        """
        import torch

        encoded: Any = self.family.encode_text(self.pipe, captions)
        return {name: torch.stack([each[name] for each in encoded]) for name in encoded[0]}

    def shown(self, captions: Sequence[str]) -> Embeds:
        """The same for a picture to look at, without a graph."""
        import torch

        with torch.no_grad(), self.place.autocast():
            return self.embeds(captions)
