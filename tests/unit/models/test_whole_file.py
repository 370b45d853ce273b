"""A model written as one file is, to diffusers' own readers, the same model bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simpletuner.core.errors import ModelError
from simpletuner.core.types import Place
from simpletuner.models import loading
from simpletuner.models.checkpoint import Checkpoint
from simpletuner.models.families import FAMILIES
from simpletuner.models.families.flux import Flux
from simpletuner.models.family import Family
from simpletuner.models.settings import ModelSettings
from simpletuner.models.single_file import (
    from_original,
    parts_inside,
    to_original,
    write_single_file,
)
from tests.tiny.build import BUILDERS, build_sdxl
from tests.tiny.single_file import build_sd3_of_two_widths, build_sdxl_of_two_widths, configs_of
from tests.tiny.single_file import write_single_file as reference

CPU = Place(torch.device("cpu"), torch.float32)
TWO_WIDTHS = {"sdxl": build_sdxl_of_two_widths, "sd3": build_sd3_of_two_widths}


def family_at(name: str, folder: Path, **more: object) -> Family:
    return FAMILIES[name].load()(Checkpoint(folder.name, folder, **more))  # type: ignore[arg-type,return-value]


def modules_of(family: Family) -> dict[str, nn.Module]:
    """Every part with weights, as the folder has it."""
    components = family.open_text(CPU).components
    found = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
    found["vae"] = family.open_vae(CPU.device, CPU.dtype)
    found[family.denoiser] = family.open_denoiser(CPU)
    return found


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module", params=["flux", "sd1x", "sd3", "sdxl"])
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Family, dict[str, nn.Module], Path]:
    name, root = request.param, tmp_path_factory.mktemp("whole")
    family = family_at(name, TWO_WIDTHS.get(name, BUILDERS[name])(root / name))
    modules = modules_of(family)
    file = root / f"{name}.safetensors"
    tensors = write_single_file(file, family, modules, None, {"steps": "3"})
    assert tensors == sum(len(module.state_dict()) for module in modules.values())
    return family, modules, file


def test_the_stock_pipeline_opens_it_bit_for_bit(
    written: tuple[Family, dict[str, nn.Module], Path],
) -> None:
    family, modules, file = written
    # its reader of FLUX takes every transformer for 3072 wide: that one is tested by itself below
    given = {"transformer": modules["transformer"]} if family.name == "flux" else {}
    configs = str(family.checkpoint.folder)
    cls = getattr(diffusers, family.pipeline)
    pipe = cls.from_single_file(str(file), config=configs, local_files_only=True, **given)
    for part, module in modules.items():
        assert_same(getattr(pipe, part).state_dict(), module.state_dict())


def test_it_is_a_base_to_train_on_and_what_it_lacks_comes_from_the_folder(
    written: tuple[Family, dict[str, nn.Module], Path], tmp_path: Path
) -> None:
    family, modules, file = written
    cls, whole = type(family), load_file(file)
    assert parts_inside(whole, cls.single_file) == modules.keys()
    if family.whole_in_one_file:  # SD's releases are whole
        return
    encoders = [part for part in family.text_parts if part in modules]
    for lacking in ({"vae"}, {encoders[-1]}, set(encoders), {*encoders, "vae"}):
        kept = {part: place for part, place in family.file_parts.items() if part not in lacking}
        path = tmp_path / "x.safetensors"
        begins = tuple(place.prefix for place in kept.values())
        save_file({k: t for k, t in whole.items() if k.startswith(begins)}, path)
        inside = parts_inside(load_file(path), cls.single_file)
        assert inside == modules.keys() - lacking
        checkpoint = Checkpoint("x", family.checkpoint.folder, file=path, inside=inside)
        opened = cls(checkpoint).open_text(CPU).components
        opened["vae"] = cls(checkpoint).open_vae(CPU.device, CPU.dtype)
        for part in (*encoders, "vae"):
            assert_same(opened[part].state_dict(), modules[part].state_dict())
        assert (path in checkpoint._files("vae")) == ("vae" in inside)


def test_the_denoiser_alone_by_its_bare_names_is_one_too(
    written: tuple[Family, dict[str, nn.Module], Path], tmp_path: Path
) -> None:
    family, modules, file = written
    if family.whole_in_one_file:
        return
    cls, part = type(family), family.denoiser
    begin = family.file_parts[part].prefix
    bare = {
        name.removeprefix(begin): tensor
        for name, tensor in load_file(file).items()
        if name.startswith(begin)
    }
    assert parts_inside(bare, cls.single_file) == {part}
    assert_same(from_original(bare, cls.original), modules[part].state_dict())
    if family.name == "sd3":
        save_file(bare, tmp_path / "bare.safetensors")
        checkpoint = Checkpoint(
            "bare",
            family.checkpoint.folder,
            file=tmp_path / "bare.safetensors",
            inside=frozenset({part}),
        )
        found = cls(checkpoint).open_denoiser(CPU).state_dict()
        assert_same(found, modules[part].state_dict())


@pytest.mark.parametrize("name", ["sdxl", "sd1x"])
def test_the_names_are_those_that_an_independent_writer_gives(name: str, tmp_path: Path) -> None:
    folder = BUILDERS[name](tmp_path / name)
    family = family_at(name, folder)
    write_single_file(tmp_path / "ours.safetensors", family, modules_of(family), None, {})
    ours = load_file(tmp_path / "ours.safetensors")
    theirs = load_file(reference(folder, tmp_path / "theirs.safetensors"))
    extra = {key for key in theirs if key.endswith(("position_ids", "logit_scale"))}
    assert_same(ours, {key: tensor for key, tensor in theirs.items() if key not in extra})


def test_a_refiner_s_text_encoder_stands_first(tmp_path: Path) -> None:
    folder = build_sdxl(tmp_path / "refiner", refiner=True)
    family, file = family_at("sdxl", folder), tmp_path / "refiner.safetensors"
    modules = modules_of(family)
    write_single_file(file, family, modules, None, {})
    again = Checkpoint("refiner", configs_of(folder, tmp_path / "configs"), file=file)
    for part, module in modules_of(type(family)(again)).items():
        assert_same(module.state_dict(), modules[part].state_dict())
    assert type(family).flavour_of(load_file(file)) == "refiner-1.0"


def test_other_programs_are_told_of_v_prediction_and_of_the_dtype(
    tiny_sdxl_v: Path, tmp_path: Path
) -> None:
    family, file = family_at("sdxl", tiny_sdxl_v), tmp_path / "v.safetensors"
    write_single_file(file, family, modules_of(family), torch.bfloat16, {})
    found = load_file(file)
    assert "v_pred" in found
    assert {tensor.dtype for name, tensor in found.items() if name != "v_pred"} == {torch.bfloat16}


def test_a_projection_that_the_file_has_no_place_for_is_no_silent_loss(
    tiny_sd3: Path, tmp_path: Path
) -> None:
    """Readers of SD3 take the first CLIP's projection for the identity, as the real one is."""
    family, file = family_at("sd3", tiny_sd3), tmp_path / "x.safetensors"
    modules = modules_of(family)
    write_single_file(file, family, modules, None, {})
    name = "text_encoders.clip_l.transformer.text_projection.weight"
    wanted = modules["text_encoder"].state_dict()["text_projection.weight"]
    assert torch.equal(load_file(file)[name], wanted)


def test_a_tensor_without_a_place_is_named() -> None:
    with pytest.raises(ModelError, match=r"controlnet\.weight has no name"):
        to_original({"controlnet.weight": torch.zeros(1)}, Flux.original)


@pytest.mark.parametrize(
    ("family", "names", "flavour"),
    [
        ("flux", ["guidance_in.in_layer.bias", "img_in.weight"], "dev"),
        ("flux", ["model.diffusion_model.img_in.weight"], "schnell"),
        ("sd3", ["model.diffusion_model.joint_blocks.37.x_block.mlp.fc1.bias"], "large"),
        ("sd3", ["joint_blocks.0.x_block.attn2.qkv.bias"], "medium"),
        ("sd3", ["joint_blocks.0.x_block.attn.qkv.bias"], "medium-3.0"),
        ("sdxl", ["conditioner.embedders.1.model.ln_final.bias"], "base-1.0"),
        ("sdxl", ["conditioner.embedders.0.model.ln_final.bias"], "refiner-1.0"),
        ("sd1x", ["cond_stage_model.transformer.text_model.final_layer_norm.bias"], "1.5"),
    ],
)
def test_whose_configs_fit_is_told_by_the_file(family: str, names: list[str], flavour: str) -> None:
    assert FAMILIES[family].load().flavour_of(names) == flavour  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_stock_reader_opens_flux_at_its_real_width(tmp_path: Path) -> None:
    """One double and one single block, 3072 wide, half a billion weights of two bytes."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            in_channels=4,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            attention_head_dim=128,
            num_attention_heads=24,
        ).to(torch.bfloat16)
    model.to_empty(device="cpu")
    pattern = torch.randint(0, 2**14, (1_000_003,), dtype=torch.int16)  # finite, of no period
    for tensor in model.state_dict().values():
        for piece in tensor.view(-1).view(torch.int16).split(len(pattern)):
            piece.copy_(pattern[: len(piece)])
    model.save_config(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(
        json.dumps({"transformer": ["diffusers", "FluxTransformer2DModel"]})
    )
    file = tmp_path / "flux1.safetensors"
    family = family_at("flux", tmp_path)
    write_single_file(file, family, {"transformer": model}, None, {})
    checkpoint = Checkpoint("flux1", tmp_path, file=file, inside=frozenset({"transformer"}))
    opened = Flux(checkpoint).open_denoiser(Place(CPU.device, torch.bfloat16))
    assert_same(opened.state_dict(), model.state_dict())
    file.unlink()


def test_a_flux_file_takes_the_rest_from_its_flavour(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub itself is in test_loading and test_single_file: here, what is asked of it."""
    asked: list[Any] = []

    def configs(repo: str, label: str) -> Path:
        asked.append(repo)
        return tiny_flux

    monkeypatch.setattr(loading, "_configs", configs)
    monkeypatch.setattr(loading, "fetch", lambda *told: asked.append(told))
    denoiser = family_at("flux", tiny_flux).open_denoiser(CPU)
    bare = to_original(denoiser.state_dict(), Flux.original)
    file = tmp_path / "flux1-dev.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in bare.items()}, file)
    settings = ModelSettings(model_family="flux", pretrained_model_name_or_path=str(file))
    family = loading.open_family(settings)
    dev = "black-forest-labs/FLUX.1-dev"
    assert asked == [dev, (dev, None, None, {"transformer": None})]
    assert family.checkpoint.inside == {"transformer"}
    assert family.checkpoint.label == "flux1-dev.safetensors"
    (embeds,) = family.encode_text(family.open_text(CPU), ["a"])
    assert len(embeds["prompt_embeds"]) == 512

    schnell = settings.model_copy(update={"model_flavour": "schnell"})
    assert loading.open_family(schnell).checkpoint.inside == {"transformer"}
    assert asked[2] == "black-forest-labs/FLUX.1-schnell"
    save_file({"vae.decoder.conv_in.bias": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match="is not a whole model: it has no denoiser"):
        loading.open_family(settings)
