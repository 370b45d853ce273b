"""A ControlNet beside a frozen base: it begins by adding nothing; without it the base is itself."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from simpletuner.core.errors import ConfigError, ModelError
from simpletuner.models.loading import controlnet_folder, open_family
from simpletuner.models.settings import ModelSettings
from simpletuner.precision.fit import fit
from simpletuner.precision.settings import PrecisionSettings
from simpletuner.training.stepper import Stepper
from tests.tiny.build import build_sdxl
from tests.unit.training.builds import build_stepper, gradients_of, make_batch, window_of

FAMILIES = ("sd1x", "sd3", "sdxl")
NET = {"model_type": "full", "controlnet": True}


def stepper_of(folder: Path, family: str, **adapter: Any) -> Stepper:
    return build_stepper(folder, adapter={**NET, **adapter}, family_name=family)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def stepper(family: str, request: pytest.FixtureRequest) -> Stepper:
    return stepper_of(request.getfixturevalue(f"tiny_{family}"), family)


def answer(stepper: Stepper, **more: Any) -> torch.Tensor:
    """What is predicted of one batch; without control pictures, by the denoiser alone."""
    batch = make_batch(0, 1, family_name=stepper.family.name, **more)
    ((planned, _),) = window_of(batch)
    batch, draw = stepper.draw(0, 0, planned, batch)
    trainable = stepper.weights.trainable
    with torch.no_grad():
        if not batch.controls:
            return stepper.family.predict(trainable.denoiser, draw, batch)
        return trainable.predict(stepper.family, draw, batch)


def test_a_new_net_adds_nothing_and_a_trained_one_does_unless_it_is_disabled(
    stepper: Stepper,
) -> None:
    base = answer(stepper)
    assert torch.equal(answer(stepper, controlled=True), base)

    for step in range(2):
        stepper.step(
            step, window_of(make_batch(2, family_name=stepper.family.name, controlled=True))
        )

    assert torch.equal(answer(stepper), base)
    trained = answer(stepper, controlled=True)
    assert not torch.equal(trained, base)
    trainable = stepper.weights.trainable
    with trainable.disabled():
        assert torch.equal(answer(stepper, controlled=True), base)
        with torch.no_grad():
            for parameter in trainable.parameters().values():
                parameter.fill_(torch.nan)
        with trainable.disabled():
            assert torch.equal(answer(stepper, controlled=True), base)
        assert torch.equal(answer(stepper, controlled=True), base)
    assert answer(stepper, controlled=True).isnan().any()


def test_it_begins_as_a_copy_and_all_of_it_but_what_is_idle_trains(stepper: Stepper) -> None:
    trainable = stepper.weights.trainable
    base, net = (dict(module.named_parameters()) for module in trainable.modules)
    copied = {name for name in net.keys() & base.keys() if net[name].shape == base[name].shape}
    assert all(torch.equal(net[name], base[name]) for name in copied)
    own = {name.split(".")[0] for name in net.keys() - copied}
    begins = ("controlnet_", "pos_embed_input", "transformer_blocks")
    assert all(name.startswith(begins) for name in own)
    assert not any(parameter.requires_grad for parameter in base.values())
    idle = net.keys() - trainable.parameters().keys()
    assert bool(idle) == (stepper.family.name == "sd3")
    assert net["time_text_embed.text_embedder.linear_1.weight" if idle else "conv_in.weight"].any()


def test_checkpointing_in_base_and_net_changes_no_gradient(stepper: Stepper) -> None:
    window = window_of(make_batch(0, 1, family_name=stepper.family.name, controlled=True))
    for step in range(3):  # until no layer is zero any more
        stepper.step(step, window)
    plain = gradients_of(stepper, window)
    assert plain.keys() == stepper.weights.trainable.parameters().keys()
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())
    modules = stepper.weights.trainable.modules
    fit(modules, PrecisionSettings(gradient_checkpointing=True), torch.device("cpu"))
    assert all(module.is_gradient_checkpointing for module in modules)
    for name, gradient in gradients_of(stepper, window).items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-7, rtol=1e-5)


def test_base_and_net_are_both_held_for_eval(stepper: Stepper) -> None:
    modules = stepper.weights.trainable.modules
    with stepper.weights.at("eval"):
        assert not any(each.training for module in modules for each in module.modules())
    assert all(module.training for module in modules)


def test_a_vae_of_fewer_bits_takes_the_control_picture_in_fp32(tiny_sd3: Path) -> None:
    trainable = stepper_of(tiny_sd3, "sd3").weights.trainable
    family = open_family(
        ModelSettings(model_family="sd3", pretrained_model_name_or_path=str(tiny_sd3))
    )
    vae = family.open_vae(torch.device("cpu"), torch.bfloat16)
    assert trainable.open_sampler(family, vae).vae.dtype == torch.float32


@pytest.mark.parametrize("halvings", [1, 2, 4])
def test_a_new_net_makes_the_picture_as_small_as_the_vae_does(
    tmp_path: Path, tiny_sdxl: Path, halvings: int
) -> None:
    widths, blocks = [8] * (halvings + 1), ["DownEncoderBlock2D"] * (halvings + 1)
    ups = ["UpDecoderBlock2D"] * (halvings + 1)
    vae = AutoencoderKL(
        down_block_types=blocks,
        up_block_types=ups,
        block_out_channels=widths,
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
    )
    folder = shutil.copytree(tiny_sdxl, tmp_path / "model")
    vae.save_pretrained(folder / "vae")
    stepper = stepper_of(folder, "sdxl")
    batch = make_batch(0)
    picture = torch.rand(1, 3, 12 * 2**halvings, 8 * 2**halvings)
    batch = replace(batch, controls={"controlnet_cond": picture})
    assert stepper.step(0, window_of(batch)).loss.isfinite()

    (net,) = stepper.weights.trainable.export(tmp_path, {})
    with pytest.raises(ConfigError, match=f"smaller by {2**halvings}, the model's VAE by 8"):
        stepper_of(tiny_sdxl, "sdxl", controlnet_model_name_or_path=str(net))


def test_a_refiner_takes_no_net(tmp_path: Path) -> None:
    folder = build_sdxl(tmp_path / "refiner", refiner=True)
    family = open_family(
        ModelSettings(model_family="sdxl", pretrained_model_name_or_path=str(folder))
    )
    with pytest.raises(ConfigError, match="controlnet: refiner is a refiner"):
        family.check_control()


def test_a_net_is_found_where_an_output_folder_or_a_folder_has_it(
    tmp_path: Path, tiny_sdxl: Path, tiny_sd3: Path
) -> None:
    trainable = stepper_of(tiny_sdxl, "sdxl").weights.trainable
    (net,) = trainable.export(tmp_path, {})
    assert controlnet_folder(str(tmp_path)) == controlnet_folder(str(net)) == net
    again = stepper_of(tiny_sdxl, "sdxl", controlnet_model_name_or_path=str(tmp_path))
    theirs = again.weights.trainable.parameters()
    assert all(torch.equal(p, theirs[name]) for name, p in trainable.parameters().items())

    for named, why in (
        (tmp_path / "nowhere", "nowhere does not exist"),
        (net / "config.json", "is a file"),
        (tiny_sdxl, "has no config.json"),
    ):
        with pytest.raises(ModelError, match=why):
            controlnet_folder(str(named))
    with pytest.raises(ConfigError, match="is a ControlNetModel, not a SD3ControlNetModel"):
        stepper_of(tiny_sd3, "sd3", controlnet_model_name_or_path=str(net))
    weights = net / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be opened"):
        stepper_of(tiny_sdxl, "sdxl", controlnet_model_name_or_path=str(net))
