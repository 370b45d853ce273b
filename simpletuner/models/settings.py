"""Which model is trained and where its weights come from."""

from __future__ import annotations

from typing import Literal

from simpletuner.core.section import Section, setting
from simpletuner.models.families import FAMILIES


class ModelSettings(Section):
    """The base model."""

    model_family: str = setting(table=FAMILIES)
    """The architecture to train."""

    model_flavour: str | None = setting(None)
    """A named checkpoint of the family; without it the family's first one. Not together with
    pretrained_model_name_or_path."""

    pretrained_model_name_or_path: str | None = setting(None)
    """The base weights: a hub id (owner/name), a folder in diffusers layout, or a single
    .safetensors file. Without it, those of model_flavour. simpletuner/emoji-sdxl is a small SDXL
    that ships with the program and is never fetched: it draws 64 emoji at 128 px."""

    pretrained_vae_model_name_or_path: str | None = setting(None)
    """A VAE to use instead of the base model's own: a hub id or a folder."""

    revision: str | None = setting(None)
    """The hub branch, tag or commit of the base weights; without it, the main branch."""

    variant: str | None = setting(None)
    """Which of several sets of weight files to take, such as fp16; without it, the plain one."""

    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_matching"] | None = setting(
        None
    )
    """What the denoiser predicts; without it, what the checkpoint's own scheduler says."""

    data_aesthetic_score: float = setting(7.0, ge=0, le=10)
    """The aesthetic score told to an SDXL refiner with every picture; higher asks for prettier."""

    rescale_betas_zero_snr: bool = setting(False)
    """Rescale the noise schedule so that its last step holds no signal at all: very dark and very
    bright pictures become possible. Not for a model that predicts the noise, which has nothing to
    say there."""

    tokenizer_max_length: int | None = setting(None, ge=1, le=1024, unit="tokens")
    """Longest prompt that text encoders with a variable length see; without it, the family's own
    (154 for sd3, 512 for flux). Larger keeps more of a long caption and makes its cache larger."""

    pretrained_transformer_model_name_or_path: str | None = setting(None, pending=True)
    """A hub id or folder to take the transformer from instead of the base model's."""

    pretrained_transformer_subfolder: str = setting("transformer", pending=True)
    """The folder inside pretrained_transformer_model_name_or_path; none for its root."""

    pretrained_unet_model_name_or_path: str | None = setting(None, pending=True)
    """A hub id or folder to take the UNet from instead of the base model's."""

    pretrained_unet_subfolder: str = setting("unet", pending=True)
    """The folder inside pretrained_unet_model_name_or_path; none for its root."""

    pretrained_t5_model_name_or_path: str | None = setting(None, pending=True)
    """A hub id or folder to take the T5 text encoder from instead of the base model's."""

    t5_padding: Literal["unmodified", "zero"] = setting("unmodified")
    """What the positions behind a caption's end hold: what T5 made of them, or zeros."""

    sd3_clip_uncond_behaviour: Literal["empty_string", "zero"] = setting("empty_string")
    """What a dropped caption, and an empty negative prompt, becomes for SD3's CLIP encoders: the
    encoded empty text, or zeros."""

    sd3_t5_uncond_behaviour: Literal["empty_string", "zero"] | None = setting(None)
    """What these become for SD3's T5: the encoded empty text, or zeros; without it, the same as
    sd3_clip_uncond_behaviour."""

    flux_guidance_mode: Literal["constant", "random-range"] = setting("constant")
    """Whether FLUX trains with one guidance value or with one drawn for each sample."""

    flux_guidance_value: float = setting(1.0, ge=0)
    """The guidance value FLUX trains with; 1 suits most data."""

    flux_guidance_min: float = setting(0.0, ge=0)
    """The smallest guidance value under random-range."""

    flux_guidance_max: float = setting(4.0, ge=0)
    """The largest guidance value under random-range."""

    flux_attention_masked_training: bool = setting(False)
    """Keep FLUX from attending to the positions behind a caption's end."""
