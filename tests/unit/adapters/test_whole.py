"""Weights that train whole: by their names, beside a LoRA, in its files, and back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simpletuner.adapters import named
from simpletuner.adapters.lora import LoRA
from simpletuner.adapters.method import attach
from simpletuner.adapters.settings import AdapterSettings
from simpletuner.apps.cli import main
from simpletuner.core.errors import ConfigError, TrainingError
from simpletuner.core.tensors import header
from simpletuner.core.types import Place
from simpletuner.models.loading import open_family
from simpletuner.models.settings import ModelSettings
from simpletuner.training.guards import LearningGuard
from tests.tiny.single_file import _unet as original_unet
from tests.unit.adapters.test_lora import forward, lora_on
from tests.unit.models.test_sdxl import CPU, open_tiny
from tests.unit.training.builds import build_stepper, make_batch, window_of

WHOLE = ("conv_in", "norm3")
FILE = "unet_weights.safetensors"


def mixed(folder: Path, place: Place = CPU, **settings: Any) -> LoRA:
    """A LoRA of the queries beside weights that train whole, all of it moved."""
    chosen = {"trainable_models": WHOLE, "peft_lora_target_modules": ["to_q"], **settings}
    lora = lora_on(folder, place, **chosen)
    with torch.no_grad():
        for parameter in lora.parameters().values():
            parameter += 0.05 * torch.randn(parameter.shape)
    return lora


def stock(folder: Path) -> dict[str, Tensor]:
    return UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["conv_in"], r"conv_in\..*"),
        (["unet.conv_in", "dit.conv_out"], r"conv_(in|out)\..*"),
        (["norm3"], r".*\.norm3\..*"),
        (["unet.mid_block"], r"mid_block\..*"),
        (["unet.*.attn2.to_k"], r".*\.attn2\.to_k\..*"),
        (["attn*.to_out"], r".*\.attn[12]\.to_out\..*"),
        (["conv_in.bias"], r"conv_in\.bias"),
        (["unet"], ".*"),
        (["dit"], ".*"),
    ],
)
def test_a_name_is_of_a_path_its_end_or_all_and_nothing_else_moves(
    tiny_sdxl: Path, names: list[str], pattern: str
) -> None:
    base = stock(tiny_sdxl)
    wanted = {name for name in base if re.fullmatch(pattern, name)}
    assert wanted
    adapter = {"model_type": "full", "trainable_models": names}
    stepper = build_stepper(tiny_sdxl, adapter=adapter, optimizer="torch-adam")
    trainable = stepper.weights.trainable
    assert trainable.parameters().keys() == wanted
    for step in range(2):
        stepper.step(step, window_of(make_batch(1, 2)))
    after = trainable.denoiser.state_dict()
    assert {name for name, value in base.items() if not torch.equal(after[name], value)} == wanted


@pytest.mark.parametrize(
    ("adapter", "message", "fix"),
    [
        (
            {"trainable_models": ["conv_im"]},
            "trainable_models: nothing of the unet is called 'conv_im'",
            "the nearest are conv_in",
        ),
        (
            {"trainable_models": ["unet.norm3"]},  # which is a path from the model on
            "nothing of the unet is called 'unet.norm3'",
            "the nearest are norm3",
        ),
        (
            {"trainable_models": ["unet.mid_block"]},
            r"trainable_models: mid_block\.\S+ would train whole and get an adapter as well",
            "peft_lora_target_modules",
        ),
        (
            {"trainable_models": ["to_q.weight"], "peft_lora_target_modules": ["to_q"]},
            r"\.to_q would train whole and get an adapter",
            "name fewer modules there",
        ),
        (
            {"model_type": "full", "trainable_models": ["attn1.to_q"]}
            | {"layer_freeze_strategy": "bitfit"},
            "nothing of attn1.to_q has a bias",
            "remove one of the two",
        ),
    ],
)
def test_names_that_cannot_be_are_refused_with_what_to_do(
    tiny_sdxl: Path, adapter: dict[str, Any], message: str, fix: str
) -> None:
    family, settings = open_tiny(tiny_sdxl), AdapterSettings(**{"lora_rank": 4, **adapter})
    with pytest.raises(ConfigError, match=message) as error:
        attach(family.open_denoiser(CPU), family, settings)
    assert fix in str(error.value.fix)
    if settings.layer_freeze_strategy == "none":  # without a weight read, too
        with pytest.raises(ConfigError, match=message):
            named.check(family, settings)


def test_what_nothing_reads_does_not_train_and_alone_is_refused(tiny_sd3: Path) -> None:
    model = ModelSettings(model_family="sd3", pretrained_model_name_or_path=str(tiny_sd3))
    family = open_family(model)
    unused = sorted(family.unused(family.open_denoiser(CPU)))
    for names, said in ((unused, "does not depend on"), (["dit"], None)):
        settings = AdapterSettings(model_type="full", trainable_models=names)
        if said:
            with pytest.raises(ConfigError, match=said):
                attach(family.open_denoiser(CPU), family, settings)
        else:
            found = attach(family.open_denoiser(CPU), family, settings)
            assert not set(unused) & found.parameters().keys()
            assert found.summary == "full, the whole transformer"


def test_a_weight_in_fewer_bits_is_refused_and_one_beside_it_trains(tiny_sdxl: Path) -> None:
    adapter = {"peft_lora_target_modules": ["to_q"], "lora_rank": 4}
    held = {"base_format": "int8-quanto"}
    with pytest.raises(ConfigError, match=r"to_v\.weight is held in fewer bits") as error:
        build_stepper(tiny_sdxl, adapter={**adapter, "trainable_models": ["to_v"]}, **held)
    assert "set base_model_precision no_change" in str(error.value.fix)
    stepper = build_stepper(tiny_sdxl, adapter={**adapter, "trainable_models": WHOLE}, **held)
    before = {n: p.detach().clone() for n, p in stepper.weights.trainable.parameters().items()}
    for step in range(2):
        stepper.step(step, window_of(make_batch(1, 2)))
    after = stepper.weights.trainable.parameters()
    assert not [name for name, value in before.items() if torch.equal(after[name], value)]


# --- beside a LoRA --------------------------------------------------------------------------------


def test_both_train_in_fp32_and_vectors_do_not_decay(tiny_sdxl: Path) -> None:
    lora = lora_on(
        tiny_sdxl, Place(CPU.device, torch.bfloat16), trainable_models=WHOLE, loraplus_lr_ratio=4
    )
    training = {id(p) for p in lora.denoiser.parameters() if p.requires_grad}
    assert training == {id(p) for p in lora.parameters().values()}
    assert {p.dtype for p in lora.parameters().values()} == {torch.float32}
    groups = {group.name: group for group in lora.groups()}
    assert list(groups) == ["lora", "lora, B", "matrices", "vectors"]
    assert list(groups["matrices"].parameters) == ["conv_in.weight"]
    assert {p.ndim for p in groups["vectors"].parameters.values()} == {1}
    assert not groups["vectors"].decay
    assert sum(len(group.parameters) for group in groups.values()) == len(training)
    count = len(lora.whole.parameters)
    assert lora.summary.endswith(f"B at 4 times the rate, and {count} weights of the unet whole")


def test_whole_weights_have_a_rate_of_their_own_that_follows_the_schedule(tiny_sdxl: Path) -> None:
    """Closed form: a plain step goes the rate times the gradient; of ten the sixth 4/9 of that."""
    adapter = {"trainable_models": WHOLE, "peft_lora_target_modules": ["to_q"]}
    rates = {"learning_rate": 1e-2, "trainable_models_lr": 1e-3}
    more = {"optimizer": "torch-sgd", "lr_scheduler": "linear", "lr_end": 0.0, "max_grad_norm": 0.0}
    stepper = build_stepper(tiny_sdxl, adapter=adapter, **rates, **more)
    held = stepper.weights.trainable.parameters()
    for step, share in ((0, 1.0), (5, 4 / 9)):
        before = {name: p.detach().clone() for name, p in held.items()}
        stepper.step(step, window_of(make_batch(1, 2)))
        for name, parameter in held.items():
            rate = 1e-2 if ".lora_" in name else 1e-3
            assert parameter.grad is not None
            wanted = before[name] - share * rate * parameter.grad
            torch.testing.assert_close(parameter.detach(), wanted, rtol=0, atol=1e-7)


def test_disabled_is_the_base_and_afterwards_all_is_as_it_was(tiny_sdxl: Path) -> None:
    base = forward(open_tiny(tiny_sdxl).open_denoiser(CPU))
    lora = mixed(tiny_sdxl)
    trained = forward(lora.denoiser)
    assert (trained - base).abs().max() > 1e-3
    with lora.disabled(), lora.disabled():
        assert torch.equal(forward(lora.denoiser), base)
    assert torch.equal(forward(lora.denoiser), trained)


def test_a_regularising_batch_learns_towards_the_untouched_base(tiny_sdxl: Path) -> None:
    """Its target is what the base says, so that the loss is the way that both have gone."""
    adapter = {"trainable_models": WHOLE, "peft_lora_target_modules": ["to_q"]}
    stepper = build_stepper(tiny_sdxl, adapter=adapter)
    ((planned, batch),) = window_of(make_batch(1, 2, regularises=True))
    assert stepper.micro_loss(0, 0, planned, batch).item() == 0
    with torch.no_grad():
        stepper.weights.trainable.parameters()["conv_in.weight"] += 0.1
    loss = stepper.micro_loss(0, 0, planned, batch)
    loss.backward()
    assert loss.item() > 1e-4
    assert stepper.weights.trainable.parameters()["conv_in.weight"].grad is not None


def test_a_named_weight_that_does_not_learn_is_told(tiny_sdxl: Path) -> None:
    adapter = {"trainable_models": WHOLE, "peft_lora_target_modules": ["to_q"]}
    stepper = build_stepper(tiny_sdxl, adapter=adapter)
    guard = LearningGuard(stepper.weights)
    stepper.weights.trainable.parameters()["conv_in.bias"].requires_grad_(False)
    losses = [stepper.step(step, window_of(make_batch(1, 2))).loss for step in range(2)]
    for loss in losses:
        guard.watch(loss)
    with pytest.raises(TrainingError, match=r"1 of \d+ .* got no gradient .*: conv_in\.bias"):
        guard.watch(losses[-1])


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"lora_init_type": "pissa"}])
def test_the_lines_that_are_told_make_diffusers_answer_the_same(
    tiny_sdxl: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    lora = mixed(tiny_sdxl, **more)
    trained = forward(lora.denoiser)
    files = lora.export(tmp_path, {"base_model": "tiny"})
    assert [file.name for file in files] == ["pytorch_lora_weights.safetensors", FILE]
    modules = len(lora.layers()) + len({n.rpartition(".")[0] for n in lora.whole.parameters})
    assert str(lora.verify(files[0])) == f"verified: {modules} of {modules} modules"
    assert all(parameter.requires_grad for parameter in lora.parameters().values())
    assert torch.equal(forward(lora.denoiser), trained)

    told: dict[str, Any] = {}
    exec("\n".join(lora.usage(str(tiny_sdxl), tmp_path)), told)
    assert isinstance(told["pipe"], DiffusionPipeline)
    torch.testing.assert_close(forward(told["pipe"].unet), trained, atol=1e-5, rtol=1e-5)
    assert header(tmp_path / FILE)["base_model"] == "tiny"


def test_verification_sees_a_weight_that_is_another_or_not_there(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    lora = mixed(tiny_sdxl)
    (path, whole) = lora.export(tmp_path, {})
    tensors = load_file(whole)
    save_file({**tensors, "conv_in.bias": tensors["conv_in.bias"] + 1e-3}, whole)
    with pytest.raises(TrainingError, match=r"1 modules differ, for example conv_in\.bias"):
        lora.verify(path)
    save_file({k: v for k, v in tensors.items() if k != "conv_in.weight"}, whole)
    with pytest.raises(TrainingError, match=r"1 modules differ, for example conv_in\.weight"):
        lora.verify(path)


def test_comfyuis_file_holds_both_and_its_differences_are_those_of_the_weights(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    """Added to the original's weights under its names, as another writer of them has them."""
    lora = mixed(tiny_sdxl, lora_format="comfyui")
    after = {**stock(tiny_sdxl), **{n: p.detach() for n, p in lora.whole.parameters.items()}}
    file = lora.export(tmp_path, {})[-1]
    found = load_file(file)
    base, wanted = original_unet(stock(tiny_sdxl)), original_unet(after)
    moved = {name for name in base if not torch.equal(base[name], wanted[name])}
    leaves = {"diff": "weight", "diff_b": "bias"}
    named_so = {}
    for key, value in found.items():
        module, _, leaf = key.rpartition(".")
        if leaf in leaves:
            named_so[f"{module.removeprefix('diffusion_model.')}.{leaves[leaf]}"] = value
    assert named_so.keys() == moved
    for name, value in named_so.items():
        torch.testing.assert_close(base[name] + value, wanted[name])
    assert sum(".lora_A." in key for key in found) == len(lora.layers())


@pytest.mark.parametrize(
    ("weight", "key", "places"),
    [
        # query, key and value are one there, of which the key trains here
        ("transformer_blocks.0.attn.to_k.bias", "joint_blocks.0.x_block.attn.qkv", (None, 0, None)),
        # scale and shift stand the other way round there
        ("norm_out.linear.bias", "final_layer.adaLN_modulation.1", (1, 0)),
    ],
)
def test_comfyuis_differences_are_where_the_original_has_the_weights(
    tiny_sd3: Path, tmp_path: Path, weight: str, key: str, places: tuple[int | None, ...]
) -> None:
    model = ModelSettings(model_family="sd3", pretrained_model_name_or_path=str(tiny_sd3))
    family = open_family(model)
    settings = AdapterSettings(
        trainable_models=[f"dit.{weight}"],
        peft_lora_target_modules=["to_out.0"],
        lora_format="comfyui",
    )
    lora = attach(family.open_denoiser(CPU), family, settings)
    (parameter,) = (p for n, p in lora.parameters().items() if ".lora_" not in n)
    moved = torch.arange(1.0, len(parameter) + 1)
    with torch.no_grad():
        parameter += moved
    found = load_file(lora.export(tmp_path, {})[-1])
    assert [name for name in found if ".diff" in name] == [f"diffusion_model.{key}.diff_b"]
    shares = moved.chunk(sum(place is not None for place in places))
    wanted = [torch.zeros_like(shares[0]) if place is None else shares[place] for place in places]
    difference = found[f"diffusion_model.{key}.diff_b"]
    torch.testing.assert_close(difference, torch.cat(wanted), atol=1e-5, rtol=1e-5)


# --- and back -------------------------------------------------------------------------------------


def test_init_lora_goes_on_from_both_files(tiny_sdxl: Path, tmp_path: Path) -> None:
    lora = mixed(tiny_sdxl)
    lora.export(tmp_path, {})
    adapter: dict[str, Any] = {"peft_lora_target_modules": ["to_q"], "init_lora": str(tmp_path)}
    again = lora_on(tiny_sdxl, trainable_models=WHOLE, **adapter)
    found = again.parameters()
    assert all(torch.equal(found[name], p) for name, p in lora.parameters().items())
    with again.disabled():  # what is new is still known
        assert torch.equal(
            forward(again.denoiser), forward(open_tiny(tiny_sdxl).open_denoiser(CPU))
        )
    with pytest.raises(ConfigError, match=r"unet_weights\S+ does not fit: 2 weights differ"):
        lora_on(tiny_sdxl, trainable_models=["norm3"], **adapter)
    with pytest.raises(ConfigError, match="does not fit") as error:
        lora_on(tiny_sdxl, **adapter)
    assert error.value.fix == "set trainable_models to what was trained whole there"
    (tmp_path / FILE).unlink()
    with pytest.raises(ConfigError, match="which is not beside it"):
        lora_on(tiny_sdxl, trainable_models=WHOLE, **adapter)


def test_half_of_it_is_never_taken_for_all(
    tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from simpletuner.adapters.preset import fuse

    (path, _) = mixed(tiny_sdxl).export(tmp_path, {})
    family = open_tiny(tiny_sdxl)
    with pytest.raises(ConfigError, match=rf"was trained with {FILE}, which is not fused"):
        fuse(family.open_denoiser(CPU), str(path), family)
    assert main(["convert-lora", str(path), "--to", "kohya", "--model_family", "sdxl"]) == 2
    said = capsys.readouterr().err
    assert f"is half of what was trained: the rest is in {FILE}" in said
    assert not list(tmp_path.glob("*.kohya.safetensors"))


def test_a_plain_lora_has_no_second_file(tiny_sdxl: Path, tmp_path: Path) -> None:
    lora = lora_on(tiny_sdxl)
    assert [file.name for file in lora.export(tmp_path, {})] == ["pytorch_lora_weights.safetensors"]
    assert "trained_beside" not in header(tmp_path / "pytorch_lora_weights.safetensors")
    assert isinstance(lora.denoiser, nn.Module)
