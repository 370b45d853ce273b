"""Stable Diffusion XL: the base models and the refiners."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from simpletuner.core.errors import ConfigError
from simpletuner.core.types import to_device
from simpletuner.models.control import PICTURE, unet_control
from simpletuner.models.encoders import TrainedEncoder
from simpletuner.models.family import Family, Flavour
from simpletuner.models.original import (
    open_clip_names,
    unet_names,
    unet_names_of,
    vae_names_of,
)
from simpletuner.models.single_file import FilePart

if TYPE_CHECKING:
    from torch import Tensor, nn

    from simpletuner.core.types import Batch, Draw, Embeds
    from simpletuner.models.control import ControlNet


_REFINER_TEXT = "conditioner.embedders.0.model."


class SDXL(Family):
    """SDXL: a UNet with two CLIP text encoders and size conditioning, ε or v by its scheduler.

    Size conditioning follows Podell et al. 2023 (arXiv 2307.01952, section 2.2): the size of the
    file before any resize, the crop's corner inside the resized picture, the encoded size. It
    stays fp32 and is not dropped with the caption, for the stock pipeline gives it to the
    unconditional pass too.
    """

    name = "sdxl"
    title = "Stable Diffusion XL"
    architecture = "stable-diffusion-xl-v1-base"
    kohya_version = "sdxl_base_v1-0"
    pipeline = "StableDiffusionXLPipeline"
    flavours = MappingProxyType(
        {
            "base-1.0": Flavour("stabilityai/stable-diffusion-xl-base-1.0", "the base model"),
            "refiner-1.0": Flavour(
                "stabilityai/stable-diffusion-xl-refiner-1.0", "the low-noise expert of 1.0"
            ),
            "base-0.9": Flavour("stabilityai/stable-diffusion-xl-base-0.9", "the research release"),
            "refiner-0.9": Flavour(
                "stabilityai/stable-diffusion-xl-refiner-0.9", "the low-noise expert of 0.9"
            ),
        }
    )
    prediction_types = ("epsilon", "v_prediction", "sample")
    own_settings = (
        "data_aesthetic_score",
        "rescale_betas_zero_snr",
        "unet_attention_slice",
    )
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    text_outputs = ("prompt_embeds", None, "pooled_prompt_embeds", None)
    trained_text = MappingProxyType(
        {
            "text_encoder": TrainedEncoder("lora_te1", "clip_l", spare_layers=1),
            "text_encoder_2": TrainedEncoder("lora_te2", "clip_g"),
        }
    )
    layouts = MappingProxyType({"prompt_embeds": "stack", "pooled_prompt_embeds": "stack"})
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")
    original = unet_names((True, True, False))
    control = unet_control("StableDiffusionXLControlNetPipeline")
    single_file = MappingProxyType(
        {
            "unet": FilePart("model.diffusion_model.", unet_names_of),
            "vae": FilePart("first_stage_model.", vae_names_of, ("vae.",)),
            "text_encoder": FilePart("conditioner.embedders.0.transformer."),
            "text_encoder_2": FilePart(
                "conditioner.embedders.1.model.", open_clip_names, (_REFINER_TEXT,)
            ),
        }
    )

    @classmethod
    def flavour_of(cls, names: Collection[str]) -> str:
        """A refiner has the second text encoder alone, in the place of the first."""
        refiner = any(name.startswith(_REFINER_TEXT) for name in names)
        return "refiner-1.0" if refiner else "base-1.0"

    @property
    def file_parts(self) -> Mapping[str, FilePart]:
        """A refiner's text encoder stands in the place of the first."""
        if not self._refiner:
            return self.single_file
        return {**self.single_file, "text_encoder_2": FilePart(_REFINER_TEXT, open_clip_names)}

    @property
    def file_marks(self) -> dict[str, Tensor]:
        """ComfyUI takes a model for one of ε unless an empty tensor says v, as for zero SNR."""
        import torch

        says = {
            "v_pred": self.prediction_type == "v_prediction",
            "ztsnr": self.scheduler_config.get("rescale_betas_zero_snr"),
        }
        return {name: torch.empty(0) for name, holds in says.items() if holds}

    @property
    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Both CLIPs' 77 tokens side by side, and what the second says of the whole caption."""
        numbers = self._config["addition_time_embed_dim"] * (5 if self._refiner else 6)
        pooled = self._config["projection_class_embeddings_input_dim"] - numbers
        tokens = (77, self._config["cross_attention_dim"])
        return {"prompt_embeds": tokens, "pooled_prompt_embeds": (pooled,)}

    def predict(
        self,
        denoiser: nn.Module,
        draw: Draw,
        batch: Batch,
        residuals: Mapping[str, Any] = MappingProxyType({}),
    ) -> Tensor:
        """One UNet call."""
        answer: Tensor = denoiser(**self._inputs(denoiser, draw, batch), **residuals)[0]
        return answer.float()

    def residuals(self, net: nn.Module, draw: Draw, batch: Batch) -> Mapping[str, Any]:
        """One call of the net, told all that the UNet is told."""
        inputs = self._inputs(net, draw, batch)
        picture = batch.controls[PICTURE].to(inputs["sample"].dtype)
        down, middle = net(**inputs, **{PICTURE: picture})
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    def _inputs(self, module: nn.Module, draw: Draw, batch: Batch) -> dict[str, Any]:
        """What UNet and ControlNet are both called with."""
        text: Tensor = batch.embeds["prompt_embeds"]  # [B, L, D]
        pooled: Tensor = batch.embeds["pooled_prompt_embeds"]  # [B, D]
        return {
            "sample": draw.noisy.to(text.dtype),
            "timestep": draw.timestep,
            "encoder_hidden_states": text,
            "added_cond_kwargs": {
                "text_embeds": pooled,
                "time_ids": self._time_ids(module, batch),
            },
            "return_dict": False,
        }

    def _time_ids(self, denoiser: nn.Module, batch: Batch) -> Tensor:
        """[B, 6] fp32: heights before widths; [B, 5] with the aesthetic score for a refiner."""
        import torch

        config, pooled = denoiser.config, batch.embeds["pooled_prompt_embeds"]
        inputs = config["projection_class_embeddings_input_dim"] - pooled.shape[-1]
        refiner = inputs // config["addition_time_embed_dim"] == 5
        rows = []
        for sample in batch.samples:
            geometry = sample.geometry
            (width, height), (left, top) = geometry.source, geometry.crop[:2]
            last = [self._score] if refiner else [geometry.target[1], geometry.target[0]]
            rows.append([height, width, top, left, *last])
        return to_device(torch.tensor(rows, dtype=torch.float32), batch.latents.device)

    @property
    def _score(self) -> float:
        return float(self.options.get("data_aesthetic_score", 7.0))

    @property
    def _refiner(self) -> bool:
        return bool(self.checkpoint.index.get("requires_aesthetics_score"))

    def check_control(self, folder: Path | None = None, label: str = "") -> ControlNet:
        """See Family; no stock pipeline takes one beside a refiner."""
        if self._refiner:
            raise ConfigError(
                f"controlnet: {self.checkpoint.label} is a refiner, which takes no ControlNet",
                fix="train it beside the base model",
            )
        return super().check_control(folder, label)

    def open_sampler(
        self, denoiser: nn.Module, vae: nn.Module, net: nn.Module | None = None
    ) -> Any:
        """The stock pipeline; the image-to-image one for a refiner, which has no other."""
        if not self._refiner:
            return super().open_sampler(denoiser, vae, net)
        import diffusers

        return diffusers.StableDiffusionXLImg2ImgPipeline(
            **dict.fromkeys(self.text_parts),
            unet=denoiser,
            vae=vae,
            scheduler=self.scheduler(),
            requires_aesthetics_score=True,
        )

    def sampler_arguments(
        self, embeds: Embeds, negative: Embeds, width: int, height: int
    ) -> dict[str, Any]:
        """A refiner starts from an empty latent at full strength: from noise alone."""
        arguments = super().sampler_arguments(embeds, negative, width, height)
        if self._refiner:
            import torch

            del arguments["width"], arguments["height"]
            arguments["image"] = torch.zeros(1, 4, height // 8, width // 8)
            arguments |= {"strength": 1.0, "aesthetic_score": self._score}
        return arguments


FAMILY = SDXL
