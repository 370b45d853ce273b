"""The sd1x family against the stock pipeline. L tokens, D width, H W in px."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from simpletuner.core.types import Batch
from simpletuner.diffusion.noise import noise_for
from simpletuner.diffusion.timesteps import quantiles
from simpletuner.models.checkpoint import Checkpoint
from simpletuner.models.families.sd1x import SD1
from simpletuner.models.family import Family
from simpletuner.models.loading import open_family
from simpletuner.models.settings import ModelSettings
from tests.contracts.test_families import Tiny, sampled
from tests.tiny.build import build_sd1x
from tests.tiny.hub import mini_hub
from tests.tiny.single_file import configs_of, write_single_file
from tests.unit.models.test_loading import in_fresh_process
from tests.unit.training.builds import CPU, SEEDS, build_stepper, make_batch, window_of


@pytest.fixture(scope="module")
def tiny_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 1 that predicts v; read it only."""
    folder = tmp_path_factory.mktemp("tiny") / "sd1x-v"
    return build_sd1x(folder, prediction_type="v_prediction")


def open_tiny(folder: Path, **more: Any) -> Family:
    return open_family(
        ModelSettings(model_family="sd1x", pretrained_model_name_or_path=str(folder), **more)
    )


def test_a_model_that_predicts_v_gives_the_stock_pipelines_latents(tiny_v: Path) -> None:
    tiny = Tiny("sd1x", tiny_v)
    assert tiny.family.prediction_type == "v_prediction"
    ours, stock, _ = sampled(tiny)
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)


def test_captions_are_encoded_as_the_stock_pipeline_does(tiny_sd1x: Path) -> None:
    captions = ["a photo of a cat in the snow", "", "a dog " * 80]
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd1x)
    with torch.no_grad():
        prompt, _ = pipe.encode_prompt(captions, CPU.device, 1, False)
    family = open_tiny(tiny_sd1x)
    ours = family.encode_text(family.open_text(CPU), captions)
    assert prompt.shape == (3, 77, 32)
    assert torch.equal(torch.stack([each["prompt_embeds"] for each in ours]), prompt)  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_a_reference_written_with_diffusers_alone(
    tiny_sd1x: Path, tiny_v: Path, kind: str
) -> None:
    folder = tiny_sd1x if kind == "epsilon" else tiny_v
    batch = make_batch(1, 2, 3, family_name="sd1x")
    ours = build_stepper(folder, family_name="sd1x").step(4, window_of(batch)).loss

    scheduler = diffusers.DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    t = (quantiles(SEEDS, 4, 3) * 1000).long()
    noise = noise_for(batch.samples, 0, (4, 12, 8), SEEDS)
    v = scheduler.get_velocity(batch.latents, noise, t)
    with torch.no_grad():
        noisy = scheduler.add_noise(batch.latents, noise, t)
        answer = unet(noisy, t, encoder_hidden_states=batch.embeds["prompt_embeds"]).sample
    target = noise if kind == "epsilon" else v
    reference = torch.nn.functional.mse_loss(answer, target)
    assert ours.item() == pytest.approx(reference.item(), rel=1e-5)


def test_a_sampler_that_cannot_have_zero_terminal_snr_gives_way_to_one_that_can(
    tiny_v: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_v, tmp_path / "model")
    config = diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler").config
    diffusers.PNDMScheduler.from_config(config).save_pretrained(folder / "scheduler")
    family = open_tiny(folder, rescale_betas_zero_snr=True)

    scheduler = family.scheduler()
    scheduler.set_timesteps(4)

    assert type(scheduler).__name__ == "DDIMScheduler"
    assert scheduler.alphas_cumprod[-1] == 0
    assert scheduler.timesteps[0] == 999
    assert type(open_tiny(folder).scheduler()).__name__ == "PNDMScheduler"


def test_a_prediction_type_the_user_sets_reaches_loss_and_sampler(tiny_sd1x: Path) -> None:
    window = window_of(make_batch(1, 2, family_name="sd1x"))
    losses = [
        build_stepper(tiny_sd1x, family_name="sd1x", options=options).step(0, window).loss.item()
        for options in ({}, {"prediction_type": "v_prediction"})
    ]
    assert losses[0] != losses[1]
    family = open_tiny(tiny_sd1x, prediction_type="v_prediction")
    pipe = family.open_sampler(family.open_denoiser(CPU), family.open_vae(CPU.device, CPU.dtype))
    assert pipe.scheduler.config.prediction_type == "v_prediction"


def with_a_checker(folder: Path, target: Path) -> Path:
    """A copy of `folder` whose index names a safety checker, as that of 1.5 does."""
    shutil.copytree(folder, target)
    index = json.loads((target / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (target / "model_index.json").write_text(json.dumps(index))
    (target / "safety_checker").mkdir()
    return target


def test_the_safety_checker_is_not_opened(tiny_sd1x: Path, tmp_path: Path) -> None:
    family = open_tiny(with_a_checker(tiny_sd1x, tmp_path / "x"))  # its weights are not even there
    assert family.open_text(CPU).safety_checker is None
    vae = family.open_vae(CPU.device, CPU.dtype)
    assert family.open_sampler(family.open_denoiser(CPU), vae).safety_checker is None


@pytest.mark.slow
def test_the_safety_checker_is_not_fetched(tiny_sd1x: Path, tmp_path: Path) -> None:
    folder = with_a_checker(tiny_sd1x, tmp_path / "hub/owner/one")
    weights = folder / "safety_checker/model.safetensors"
    shutil.copy(folder / "text_encoder/model.safetensors", weights)
    shutil.copy(folder / "text_encoder/config.json", weights.with_name("config.json"))
    with mini_hub(tmp_path / "hub") as endpoint:
        settings = '{"model_family": "sd1x", "pretrained_model_name_or_path": "owner/one"}'
        answer = in_fresh_process(tmp_path, endpoint, settings)
    assert "unet" in answer
    fetched = {path.parent.name for path in (tmp_path / "hf").rglob("*.safetensors")}
    assert fetched == {"unet", "vae", "text_encoder"}


def test_a_single_file_of_the_original_layout_is_the_same_model(
    tiny_sd1x: Path, tmp_path: Path
) -> None:
    file = write_single_file(tiny_sd1x, tmp_path / "model.safetensors")
    assert any(name.startswith("cond_stage_model.transformer.") for name in load_file(file))
    configs = configs_of(tiny_sd1x, tmp_path / "configs")
    ours, theirs = SD1(Checkpoint("one", configs, file=file)), open_tiny(tiny_sd1x)
    opened = []
    for family in (ours, theirs):
        text = family.open_text(CPU).text_encoder
        vae = family.open_vae(CPU.device, CPU.dtype)
        parts = {"text": text, "vae": vae, "unet": family.open_denoiser(CPU)}
        opened.append({name: module.state_dict() for name, module in parts.items()})
    for name, wanted in opened[1].items():
        assert opened[0][name].keys() == wanted.keys()
        assert all(torch.equal(opened[0][name][key], wanted[key]) for key in wanted)


def test_flavours_are_named_as_people_name_them() -> None:
    assert tuple(SD1.flavours) == ("dreamshaper", "1.5", "1.4")


def test_a_batch_has_one_text_output_only(tiny_sd1x: Path) -> None:
    batch: Batch = make_batch(1, family_name="sd1x")
    assert set(batch.embeds) == set(open_tiny(tiny_sd1x).layouts) == {"prompt_embeds"}
