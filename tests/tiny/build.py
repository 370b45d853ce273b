"""Tiny diffusers folders with seeded random weights: the geometry of the real models, small widths.

What training code depends on is real: the VAE's factor, channels and constants, the number and type
of text encoders, the added conditions. Widths are multiples of 16, because int8 kernels on the CPU
are wrong for most others. Two builds with one seed are equal byte for byte.

    python -m tests.tiny.build sdxl FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from tests.tiny.tokenizers import clip_tokenizer, t5_tokenizer


def build_sdxl(
    folder: Path, *, prediction_type: str = "epsilon", refiner: bool = False, seed: int = 0
) -> Path:
    """Write a tiny SDXL to `folder`.

    Args:
        prediction_type: What its scheduler's config says: ``epsilon`` or ``v_prediction``.
        refiner: Build a refiner: the second text encoder alone, and an aesthetic score.
        seed: Of the random weights.
    """
    return _write(folder, seed, lambda: _sdxl(prediction_type, refiner))


def build_sd3(folder: Path, *, seed: int = 0) -> Path:
    """Write a tiny SD3 (three text encoders, qk norm, dual attention in one block) to `folder`."""
    return _write(folder, seed, _sd3)


def build_sd1x(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Write a tiny Stable Diffusion 1 to `folder`.

    Args:
        prediction_type: What its scheduler's config says: ``epsilon`` or ``v_prediction``.
        seed: Of the random weights.
    """
    return _write(folder, seed, lambda: _sd1x(prediction_type))


def build_flux(folder: Path, *, guided: bool = True, seed: int = 0) -> Path:
    """Write a tiny FLUX.1 to `folder`.

    Args:
        guided: Its transformer is told a guidance strength, as dev is and schnell is not.
        seed: Of the random weights.
    """
    return _write(folder, seed, lambda: _flux(guided))


BUILDERS: Mapping[str, Callable[[Path], Path]] = MappingProxyType(
    {"flux": build_flux, "sd1x": build_sd1x, "sd3": build_sd3, "sdxl": build_sdxl}
)
"""A builder for each model family, by its name."""


def _sd1x(prediction_type: str) -> DiffusionPipeline:
    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=2,
            cross_attention_dim=32,
        ),
        vae=_vae(latent_channels=4, scaling_factor=0.18215),
        text_encoder=CLIPTextModel(_clip(tokenizer, act="quick_gelu")),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _flux(guided: bool) -> DiffusionPipeline:
    first, second = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guided,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        transformer=transformer,
        vae=_vae(
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(_clip(first, act="quick_gelu")),
        tokenizer=first,
        text_encoder_2=T5EncoderModel(_t5(second, width=32)),
        tokenizer_2=second,
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
    )


def _sdxl(prediction_type: str, refiner: bool) -> DiffusionPipeline:
    first, second = clip_tokenizer(), clip_tokenizer(pad_token="!")
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        # six numbers (a refiner: five) and the pooled text
        projection_class_embeddings_input_dim=(5 if refiner else 6) * 8 + 32,
        cross_attention_dim=32 if refiner else 32 + 32,  # hidden states side by side
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction_type,
    )
    if refiner:
        return StableDiffusionXLImg2ImgPipeline(
            unet=unet,
            vae=_vae(latent_channels=4, scaling_factor=0.13025),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=CLIPTextModelWithProjection(_clip(second)),
            tokenizer_2=second,
            scheduler=scheduler,
            requires_aesthetics_score=True,
        )
    return StableDiffusionXLPipeline(
        unet=unet,
        vae=_vae(latent_channels=4, scaling_factor=0.13025),
        text_encoder=CLIPTextModel(_clip(first, act="quick_gelu")),
        tokenizer=first,
        text_encoder_2=CLIPTextModelWithProjection(_clip(second)),
        tokenizer_2=second,
        scheduler=scheduler,
    )


def _sd3() -> DiffusionPipeline:
    first, second, third = clip_tokenizer(), clip_tokenizer(pad_token="!"), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,  # both CLIP states side by side, padded to T5's width
        caption_projection_dim=32,
        pooled_projection_dim=32 + 32,
        pos_embed_max_size=96,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        vae=_vae(
            latent_channels=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModelWithProjection(_clip(first)),
        tokenizer=first,
        text_encoder_2=CLIPTextModelWithProjection(_clip(second)),
        tokenizer_2=second,
        text_encoder_3=T5EncoderModel(_t5(third, width=64)),
        tokenizer_3=third,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _vae(**constants: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=64,
        force_upcast=True,
        **constants,
    )


def _clip(tokenizer: Any, *, act: str = "gelu") -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=32,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5(tokenizer: Any, *, width: int) -> T5Config:
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
    )


def _write(folder: Path, seed: int, make: Any) -> Path:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        pipe = make()
        _fill_zeros(pipe)
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def _fill_zeros(pipe: DiffusionPipeline) -> None:
    """Give zero-initialised weights small values, or the output is 0 and most gradients vanish."""
    for module in pipe.components.values():
        if not isinstance(module, torch.nn.Module):
            continue
        with torch.no_grad():
            for weight in module.parameters():
                if weight.ndim >= 2 and not weight.any():
                    weight.normal_(std=0.02)


if __name__ == "__main__":
    _, family, target = sys.argv
    BUILDERS[family](Path(target))
