"""A tiny SDXL or SD 1 folder as ONE file in the original layout, as model sites offer it.

The way back from what ``diffusers.loaders.single_file_utils`` does. Only names differ, but for
three things: the VAE's attention is made of 1x1 convolutions; the second text encoder has query,
key and value in one matrix; its projection is transposed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import (
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tests.tiny.build import build_sd3, build_sdxl

Weights = dict[str, Tensor]

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_MIDDLE = {
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
    "final_layer_norm": "ln_final",
}


def build_sdxl_of_two_widths(folder: Path) -> Path:
    """A tiny SDXL whose second text encoder is the wider one, as in the real model.

    diffusers tells the two encoders in a single file apart by their widths alone.
    """
    build_sdxl(folder)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        config = CLIPTextConfig.from_pretrained(folder / "text_encoder_2", hidden_size=48)
        unet = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(folder / "unet"), cross_attention_dim=32 + 48
        )
        pipe = StableDiffusionXLPipeline.from_pretrained(
            folder, unet=unet, text_encoder_2=CLIPTextModelWithProjection(config)
        )
    pipe.save_pretrained(folder)
    return folder


def build_sd3_of_two_widths(folder: Path) -> Path:
    """A tiny SD3 as the real one: the second CLIP is the wider, the first's projection is none."""
    build_sd3(folder)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        config = CLIPTextConfig.from_pretrained(folder / "text_encoder_2", hidden_size=48)
        transformer = SD3Transformer2DModel.from_config(
            SD3Transformer2DModel.load_config(folder / "transformer"), pooled_projection_dim=32 + 32
        )
        pipe = StableDiffusion3Pipeline.from_pretrained(
            folder, transformer=transformer, text_encoder_2=CLIPTextModelWithProjection(config)
        )
    with torch.no_grad():
        pipe.text_encoder.text_projection.weight.copy_(torch.eye(32))
    pipe.save_pretrained(folder)
    return folder


def configs_of(folder: Path, target: Path) -> Path:
    """A copy of `folder` without its weights."""
    return shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))


def write_single_file(folder: Path, path: Path) -> Path:
    """Write the SDXL or SD 1 in `folder` to `path` in original layout."""
    parts = {p.parent.name: load_file(p) for p in sorted(folder.glob("*/*.safetensors"))}
    whole = _under("model.diffusion_model", _unet(parts["unet"]))
    whole |= _under("first_stage_model", _vae(parts["vae"]))
    if "text_encoder_2" not in parts:
        whole |= _under("cond_stage_model.transformer", _clip(parts["text_encoder"]))
        return _saved(whole, path)
    embedder = 0
    if "text_encoder" in parts:  # a refiner has the second alone
        whole |= _under("conditioner.embedders.0.transformer", _clip(parts["text_encoder"]))
        embedder = 1
    whole |= _under(f"conditioner.embedders.{embedder}.model", _open_clip(parts["text_encoder_2"]))
    return _saved(whole, path)


def _saved(weights: Weights, path: Path) -> Path:
    save_file({name: value.contiguous() for name, value in weights.items()}, path)
    return path


def _under(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}.{name}": value for name, value in weights.items()}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """`name` with each whole run of its dotted pieces that `names` knows replaced."""
    for new, old in names.items():
        name = re.sub(rf"(^|(?<=\.)){re.escape(new)}(?=\.|$)", old, name)
    return name


def _unet(weights: Weights) -> Weights:
    """Blocks in one running count: a resnet with its attention is one, a downsampler is one."""
    stride = len([name for name in weights if re.match(r"up_blocks.0.resnets.\d.conv1.bias", name)])
    attends = {name.split(".attentions.")[0] for name in weights if ".attentions." in name}

    def block(found: re.Match[str]) -> str:
        way, index, kind = found[1], int(found[2]), found[3]
        count = index * stride + int(found[4])
        if kind == "downsamplers":
            return f"input_blocks.{(index + 1) * stride}.0"
        if kind == "upsamplers":
            place = 2 if f"up_blocks.{index}" in attends else 1
            return f"output_blocks.{(index + 1) * stride - 1}.{place}"
        place = {"resnets": 0, "attentions": 1}[kind]
        return (
            f"input_blocks.{count + 1}.{place}"
            if way == "down"
            else f"output_blocks.{count}.{place}"
        )

    def original(name: str) -> str:
        if "_block" not in name:
            return _renamed(name, _UNET_ENDS)
        if ".resnets." in name:
            name = _renamed(name, _UNET_RESNET)
        name = _renamed(name.replace("downsamplers.0.conv", "downsamplers.0.op"), _UNET_MIDDLE)
        return re.sub(r"^(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)", block, name)

    return {original(name): value for name, value in weights.items()}


def _vae(weights: Weights) -> Weights:
    """Decoder blocks counted from the picture; attention as 1x1 convolutions."""
    ups = {name.split(".")[2] for name in weights if name.startswith("decoder.up_blocks.")}
    found: Weights = {}
    for name, value in weights.items():
        if "attentions" in name and "group_norm" not in name and value.ndim == 2:
            value = value[:, :, None, None]
        name = _renamed(name, _VAE).replace("resnets", "block").replace("down_blocks", "down")
        name = re.sub(r"up_blocks\.(\d)", lambda up: f"up.{len(ups) - 1 - int(up[1])}", name)
        found[name] = value
    return found


def _clip(weights: Weights) -> Weights:
    """transformers' own names, and the positions that its older releases saved."""
    named = {f"text_model.{name.removeprefix('text_model.')}": v for name, v in weights.items()}
    length = len(named["text_model.embeddings.position_embedding.weight"])
    return named | {"text_model.embeddings.position_ids": torch.arange(length)[None]}


def _open_clip(weights: Weights) -> Weights:
    """OpenCLIP's names, query over key over value in one matrix, the projection transposed."""
    found: Weights = {"logit_scale": torch.tensor(4.6)}
    for name, value in weights.items():
        original = _renamed(name.removeprefix("text_model."), _OPEN_CLIP)
        if name == "text_projection.weight":
            found["text_projection"] = value.T
        elif ".q_proj." in name:
            fused = [weights[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            found[original.replace("q_proj.", "in_proj_")] = torch.cat(fused)
        elif ".k_proj." not in name and ".v_proj." not in name:
            found[original] = value
    return found
