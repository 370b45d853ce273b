"""Stable Diffusion 1.x."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from simpletuner.models.control import PICTURE, unet_control
from simpletuner.models.encoders import TrainedEncoder
from simpletuner.models.family import Family, Flavour
from simpletuner.models.original import unet_names, unet_names_of, vae_names_of
from simpletuner.models.single_file import FilePart

if TYPE_CHECKING:
    from torch import Tensor, nn

    from simpletuner.core.types import Batch, Draw


class SD1(Family):
    """SD 1.x: a UNet with one CLIP text encoder, ε or v by its scheduler.

    A prompt is the last states of CLIP, 77 tokens (Rombach et al. 2022, arXiv 2112.10752). The
    safety checker is not opened and not fetched: nothing here is shown to strangers.
    """

    name = "sd1x"
    title = "Stable Diffusion 1.x"
    architecture = "stable-diffusion-v1"
    kohya_version = "sd_v1"
    pipeline = "StableDiffusionPipeline"
    pipeline_options = MappingProxyType(
        {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    )
    flavours = MappingProxyType(
        {
            "dreamshaper": Flavour("Lykon/dreamshaper-8", "a model of 1.5 for paintings"),
            "1.5": Flavour("stable-diffusion-v1-5/stable-diffusion-v1-5", "the base model"),
            "1.4": Flavour("CompVis/stable-diffusion-v1-4", "the base model before 1.5"),
        }
    )
    prediction_types = ("epsilon", "v_prediction", "sample")
    own_settings = ("rescale_betas_zero_snr", "unet_attention_slice")
    text_parts = ("text_encoder", "tokenizer")
    text_outputs = ("prompt_embeds", None)
    trained_text = MappingProxyType({"text_encoder": TrainedEncoder("lora_te", "clip_l")})
    layouts = MappingProxyType({"prompt_embeds": "stack"})
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")
    original = unet_names((False, True, True, True))
    control = unet_control("StableDiffusionControlNetPipeline")
    single_file = MappingProxyType(
        {
            "unet": FilePart("model.diffusion_model.", unet_names_of),
            "vae": FilePart("first_stage_model.", vae_names_of, ("vae.",)),
            "text_encoder": FilePart("cond_stage_model.transformer."),
        }
    )

    @classmethod
    def flavour_of(cls, names: Collection[str]) -> str:
        """All have the same configs; those of the base model are told."""
        return "1.5"

    @property
    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """CLIP's 77 tokens."""
        return {"prompt_embeds": (77, self._config["cross_attention_dim"])}

    def predict(
        self,
        denoiser: nn.Module,
        draw: Draw,
        batch: Batch,
        residuals: Mapping[str, Any] = MappingProxyType({}),
    ) -> Tensor:
        """One UNet call."""
        answer: Tensor = denoiser(**self._inputs(draw, batch), **residuals)[0]
        return answer.float()

    def residuals(self, net: nn.Module, draw: Draw, batch: Batch) -> Mapping[str, Any]:
        """One call of the net, told all that the UNet is told."""
        inputs = self._inputs(draw, batch)
        picture = batch.controls[PICTURE].to(inputs["sample"].dtype)
        down, middle = net(**inputs, **{PICTURE: picture})
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    def _inputs(self, draw: Draw, batch: Batch) -> dict[str, Any]:
        """What UNet and ControlNet are both called with."""
        text: Tensor = batch.embeds["prompt_embeds"]  # [B, L, D]
        return {
            "sample": draw.noisy.to(text.dtype),
            "timestep": draw.timestep,
            "encoder_hidden_states": text,
            "return_dict": False,
        }


FAMILY = SD1
