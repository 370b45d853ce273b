"""One LoRA through every layout: the names of the original release, and the same change."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_unet_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simpletuner.adapters.formats import FORMATS, Change, read_changes, write_changes
from simpletuner.core.errors import ConfigError, ModelError
from simpletuner.core.tensors import header
from simpletuner.models.families import FAMILIES
from simpletuner.models.family import Family
from tests.tiny.single_file import _unet as original_unet

Weights = dict[str, Tensor]


def family_of(name: str) -> type[Family]:
    return FAMILIES[name].load()  # type: ignore[return-value]


def sdxl_unet() -> UNet2DConditionModel:
    """The shape of SDXL's, narrow."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(16, 32, 64),
        layers_per_block=2,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 8),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2, 3),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=32,
    )


def sd1_unet() -> UNet2DConditionModel:
    """The shape of SD 1's, narrow."""
    torch.manual_seed(0)
    attends, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    return UNet2DConditionModel(
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
        down_block_types=(attends, attends, attends, plain),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        attention_head_dim=4,
        cross_attention_dim=32,
    )


UNETS = {"sdxl": sdxl_unet, "sd1x": sd1_unet}


def sd3_transformer(folder: Path) -> SD3Transformer2DModel:
    return SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


def lora_for(model: nn.Module, ranks: tuple[int, ...], scale: float, ends: tuple[str, ...]) -> Any:
    """A random LoRA over the layers whose names end so; ranks by turns."""
    generator = torch.Generator().manual_seed(1)
    changes = {}
    names = [name for name in layers(model) if name.endswith(ends)]
    for number, name in enumerate(names):
        weight, rank = layers(model)[name].weight, ranks[number % len(ranks)]
        out, into, *kernel = weight.shape
        down = torch.randn(rank, into, *kernel, generator=generator)
        up = torch.randn(out, rank, *[1] * len(kernel), generator=generator)
        changes[name] = Change(down, up, scale * rank)
    return changes


def assert_same(found: Mapping[str, Change], wanted: Mapping[str, Change]) -> None:
    assert set(found) == set(wanted)
    for name, change in wanted.items():
        assert torch.allclose(found[name].delta(), change.delta(), rtol=1e-5, atol=1e-5), name
        assert (found[name].magnitude is None) == (change.magnitude is None)
        if change.magnitude is not None:
            assert torch.equal(found[name].magnitude, change.magnitude)


def applied(weights: Weights, file: Path, begin: str, flat: bool) -> Weights:
    """The weights of a model in its original layout with a LoRA file merged in, by its keys alone.

    As ComfyUI does it: ``W + alpha / r * up @ down`` for each key that the model has.
    """
    found, merged = load_file(file), dict(weights)
    names = {key.removesuffix(".weight"): key for key in weights if key.endswith(".weight")}
    if flat:
        names = {name.replace(".", "_"): key for name, key in names.items()}
    modules = {key.rsplit(".", 1)[0] for key in found if key.endswith(".alpha")}
    assert modules
    for module in modules:
        key = names[module.removeprefix(begin)]  # one that the model lacks is an error here
        ends = ("lora_down", "lora_up") if flat else ("lora_A", "lora_B")
        down, up = (found[f"{module}.{end}.weight"] for end in ends)
        scale = found[f"{module}.alpha"] / len(down)
        delta = scale * (up.flatten(1) @ down.flatten(1))
        merged[key] = weights[key] + delta.reshape(weights[key].shape)
    return merged


def merged_here(model: nn.Module, changes: Mapping[str, Change]) -> Weights:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, change in changes.items():
        key = f"{name}.weight"
        weights[key] += change.delta().reshape(weights[key].shape)
    return weights


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
@pytest.mark.parametrize("family", UNETS)
def test_merged_into_the_original_unet_it_is_the_same_model(
    family: str, layout: str, tmp_path: Path
) -> None:
    unet = UNETS[family]()
    changes = lora_for(unet, (4,), 0.5, ("",))
    write_changes(tmp_path / "lora.safetensors", changes, layout, family_of(family), {})

    flat, begin = layout == "kohya", {"kohya": "lora_unet_", "comfyui": "diffusion_model."}[layout]
    original = original_unet(dict(unet.state_dict()))
    whole = applied(original, tmp_path / "lora.safetensors", begin, flat)
    ours = convert_ldm_unet_checkpoint(
        {f"model.diffusion_model.{name}": tensor for name, tensor in whole.items()}, unet.config
    )

    wanted = merged_here(unet, changes)
    assert set(ours) == set(wanted)
    assert all(torch.allclose(ours[name], wanted[name], atol=1e-5) for name in wanted)


def original_sd3(model: nn.Module) -> Weights:
    """The weights by Stability's names, by the table that is tested and the norms it leaves out."""
    weights, names = model.state_dict(), family_of("sd3").original
    whole: Weights = {"pos_embed": weights["pos_embed.pos_embed"]}
    joined: dict[str, dict[int, Tensor]] = {}
    blocks = len(model.transformer_blocks)
    for key, tensor in weights.items():
        module, _, kind = key.rpartition(".")
        block = module.split(".")[1] if module.startswith("transformer_blocks") else ""
        if module.endswith("norm1_context.linear"):
            last = int(block) == blocks - 1
            halves = tensor.chunk(2)
            value = torch.cat((halves[1], halves[0])) if last else tensor
            whole[f"joint_blocks.{block}.context_block.adaLN_modulation.1.{kind}"] = value
        elif ".norm_" in module:
            attention, norm = module.rsplit(".", 2)[1:]
            whose = "context_block" if "added" in norm else "x_block"
            there = f"joint_blocks.{block}.{whose}.{attention}.ln_{norm[-1]}"
            whole[f"{there}.{kind}"] = tensor
        elif module != "pos_embed":
            place = names.place(module)
            assert place is not None, module
            halves = tensor.chunk(2)
            value = torch.cat((halves[1], halves[0])) if place.swapped else tensor
            joined.setdefault(f"{place.module}.{kind}", {})[place.part] = value
    for name, parts in joined.items():
        whole[name] = torch.cat([parts[part] for part in sorted(parts)])
    return whole


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
@pytest.mark.parametrize("ends", [("to_k", "to_q", "to_v", "to_out.0"), ("to_v", "add_q_proj")])
def test_merged_into_the_original_sd3_it_is_the_same_model(
    layout: str, ends: tuple[str, ...], tiny_sd3: Path, tmp_path: Path
) -> None:
    model = sd3_transformer(tiny_sd3)
    changes = lora_for(model, (4, 2, 8), 0.5, (*ends, "ff.net.2", "norm_out.linear"))
    write_changes(tmp_path / "lora.safetensors", changes, layout, family_of("sd3"), {})

    flat, begin = layout == "kohya", {"kohya": "lora_unet_", "comfyui": "diffusion_model."}[layout]
    whole = applied(original_sd3(model), tmp_path / "lora.safetensors", begin, flat)
    ours = convert_sd3_transformer_checkpoint_to_diffusers(whole)

    wanted = merged_here(model, changes)
    assert set(ours) == set(wanted)
    assert all(torch.allclose(ours[name], wanted[name], atol=1e-5) for name in wanted)


def original_flux(model: nn.Module) -> Weights:
    """The weights by Black Forest Labs' names: the table that is tested, and the norms."""
    names, whole = family_of("flux").original, {}
    joined: dict[str, dict[int, Tensor]] = {}
    for key, tensor in model.state_dict().items():
        module, _, kind = key.rpartition(".")
        if ".attn.norm_" in module:
            block, norm = module.split(".attn.norm_")
            single = block.startswith("single")
            whose = "" if single else "txt_attn." if "added" in norm else "img_attn."
            there = block.replace("single_transformer", "single").replace("transformer", "double")
            which = {"q": "query", "k": "key"}[norm[-1]]
            whole[f"{there}.{whose}norm.{which}_norm.scale"] = tensor
            continue
        place = names.place(module)
        assert place is not None, module
        halves = tensor.chunk(2)
        value = torch.cat((halves[1], halves[0])) if place.swapped else tensor
        joined.setdefault(f"{place.module}.{kind}", {})[place.part] = value
    for name, parts in joined.items():
        whole[name] = torch.cat([parts[part] for part in sorted(parts)])
    return whole


def converted_flux(whole: Weights, width: int) -> Weights:
    """By diffusers, which knows single blocks of width 3072 alone: theirs are padded and cut."""
    wide = dict(whole)
    for name, tensor in whole.items():
        if ".linear1." in name:
            parts = tensor.split((width, width, width, 4 * width))
            padded = [
                torch.cat((part, part.new_zeros((size - len(part), *part.shape[1:]))))
                for part, size in zip(parts, (3072, 3072, 3072, 4 * 3072), strict=True)
            ]
            wide[name] = torch.cat(padded)
    found = convert_flux_transformer_checkpoint_to_diffusers(wide)
    return {
        name: tensor[: 4 * width if "proj_mlp" in name else width]
        if "single" in name and ("proj_mlp" in name or ".to_" in name)
        else tensor
        for name, tensor in found.items()
    }


def flux_transformer(folder: Path) -> FluxTransformer2DModel:
    return FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
@pytest.mark.parametrize("ends", [("",), ("to_v", "proj_mlp", "add_k_proj", "norm_out.linear")])
def test_merged_into_the_original_flux_it_is_the_same_model(
    layout: str, ends: tuple[str, ...], tiny_flux: Path, tmp_path: Path
) -> None:
    model = flux_transformer(tiny_flux)
    changes = lora_for(model, (4, 2, 8), 0.5, ends)
    write_changes(tmp_path / "lora.safetensors", changes, layout, family_of("flux"), {})

    flat, begin = layout == "kohya", {"kohya": "lora_unet_", "comfyui": "diffusion_model."}[layout]
    original = original_flux(model)
    assert {"double_blocks.1.img_attn.qkv.weight", "single_blocks.1.linear1.bias"} <= set(original)
    whole = applied(original, tmp_path / "lora.safetensors", begin, flat)
    ours = converted_flux(whole, 32)

    wanted = merged_here(model, changes)
    assert set(ours) == set(wanted)
    assert all(torch.allclose(ours[name], wanted[name], atol=1e-5) for name in wanted)


@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0])
def test_the_stock_flux_pipeline_reads_the_kohya_layout(
    scale: float, tiny_flux: Path, tmp_path: Path
) -> None:
    # its reader takes single blocks for 3072 wide, so a narrow model has double blocks alone
    model = flux_transformer(tiny_flux)
    named = lora_for(model, (4,), scale, ("to_q", "to_k", "to_v", "add_q_proj", "ff.net.2"))
    changes = {name: c for name, c in named.items() if not name.startswith("single")}
    file = tmp_path / "lora.safetensors"
    write_changes(file, changes, "kohya", family_of("flux"), {})
    wanted = merged_here(model, changes)

    pipe = FluxPipeline.from_pretrained(tiny_flux)
    pipe.load_lora_weights(file)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    found = pipe.transformer.state_dict()
    for name in changes:
        assert torch.allclose(found[f"{name}.weight"], wanted[f"{name}.weight"], atol=1e-5), name


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
@pytest.mark.parametrize("scale", [0.25, 0.5, 1.0, 2.0])
def test_a_round_through_every_layout_keeps_the_change(
    family: str, scale: float, tiny_sd3: Path, tmp_path: Path
) -> None:
    model = sdxl_unet() if family == "sdxl" else sd3_transformer(tiny_sd3)
    ends = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_out", "norm_out.linear")
    first = lora_for(model, (4, 8, 2), scale, ends)
    changes: Mapping[str, Change] = first
    for before, layout in pairwise(("", *FORMATS, *reversed(FORMATS))):
        file = tmp_path / f"{before}-{layout}.safetensors"
        write_changes(file, changes, layout, family_of(family), {"steps": "3"})
        assert header(file)["steps"] == "3"
        changes = read_changes(file, family_of(family))
        assert_same(changes, first)


def test_the_stock_loader_reads_the_diffusers_layout_with_mixed_ranks(
    tiny_sd3: Path, tmp_path: Path
) -> None:
    model = sd3_transformer(tiny_sd3)
    changes = lora_for(model, (4, 2), 0.5, ("to_q", "ff.net.2"))
    file = tmp_path / "lora.safetensors"
    write_changes(file, changes, "diffusers", family_of("sd3"), {})
    wanted = merged_here(model, changes)

    from simpletuner.adapters.export import adapter_metadata

    model.load_lora_adapter(load_file(file), prefix="transformer", metadata=adapter_metadata(file))
    model.fuse_lora()
    model.unload_lora()
    found = model.state_dict()
    for name in changes:
        assert torch.allclose(found[f"{name}.weight"], wanted[f"{name}.weight"], atol=1e-5), name


def test_a_strength_that_all_parts_of_a_matrix_have_stays_in_alpha(
    tiny_sd3: Path, tmp_path: Path
) -> None:
    model, family = sd3_transformer(tiny_sd3), family_of("sd3")
    for ranks, scales in (((4,), {2.0}), ((4, 2), {2.0})):
        changes = lora_for(model, ranks, 2.0, ("attn.to_q", "attn.to_k", "attn.to_v"))
        write_changes(tmp_path / "lora.safetensors", changes, "kohya", family, {})
        found = read_changes(tmp_path / "lora.safetensors", family)
        assert_same(found, changes)
        assert {change.alpha / change.rank for change in found.values()} == scales
    name = next(iter(changes))
    mixed = {**changes, name: Change(changes[name].down, changes[name].up, 1.0)}
    write_changes(tmp_path / "lora.safetensors", mixed, "kohya", family, {})
    assert_same(read_changes(tmp_path / "lora.safetensors", family), mixed)


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_the_magnitude_of_dora_is_kept_or_refused(
    layout: str, tiny_sd3: Path, tmp_path: Path
) -> None:
    model, family = sd3_transformer(tiny_sd3), family_of("sd3")
    whole = {
        name: Change(c.down, c.up, c.alpha, torch.rand(len(c.up)))
        for name, c in lora_for(model, (4,), 1.0, ("attn.to_q", "attn.to_k", "attn.to_v")).items()
    }
    write_changes(tmp_path / "whole.safetensors", whole, layout, family, {})
    assert_same(read_changes(tmp_path / "whole.safetensors", family), whole)

    part = {name: change for name, change in whole.items() if not name.endswith("to_k")}
    with pytest.raises(ModelError, match="DoRA was trained on parts of it"):
        write_changes(tmp_path / "part.safetensors", part, layout, family, {})


def test_diffusers_own_flat_names_are_read_too(tmp_path: Path) -> None:
    changes = lora_for(sdxl_unet(), (4,), 0.5, ("to_q", "conv1"))
    flat = {}
    for name, change in changes.items():
        begin = f"lora_unet_{name.replace('.', '_')}"
        flat[f"{begin}.lora_down.weight"], flat[f"{begin}.lora_up.weight"] = change.down, change.up
        flat[f"{begin}.alpha"] = torch.tensor(change.alpha)
    save_file(flat, tmp_path / "lora.safetensors")
    assert_same(read_changes(tmp_path / "lora.safetensors", family_of("sdxl")), changes)


def test_strangers_are_named(tmp_path: Path) -> None:
    sdxl = family_of("sdxl")
    with pytest.raises(ConfigError, match="does not exist"):
        read_changes(tmp_path / "none.safetensors", sdxl)
    save_file({"unet.conv_in.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"it holds unet\.conv_in\.weight"):
        read_changes(tmp_path / "model.safetensors", sdxl)
    other = {
        f"diffusion_model.double_blocks.0.img_attn.qkv.lora_{x}.weight": torch.zeros(2, 2)
        for x in "AB"
    }
    save_file(other, tmp_path / "flux.safetensors")
    with pytest.raises(ModelError, match="name the family it was made for"):
        read_changes(tmp_path / "flux.safetensors", sdxl)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="download it again"):
        read_changes(tmp_path / "broken.safetensors", sdxl)
