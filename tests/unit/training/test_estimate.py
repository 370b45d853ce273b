"""What a run needs, against what runs take. Sizes are bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from simpletuner.adapters.method import attach
from simpletuner.adapters.settings import AdapterSettings
from simpletuner.apps.cli import main
from simpletuner.core.types import Place
from simpletuner.precision.quantise import foreseen, quantise
from simpletuner.training.estimate import Live, peak_of
from tests.journeys.test_controlnet import controlled
from tests.runs import Run
from tests.unit.models.test_sdxl import CPU, open_tiny


def unet() -> tuple[nn.Module, Callable[[torch.device], dict[str, Any]]]:
    """A UNet of SDXL's kind."""
    model = diffusers.UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(192, 384, 384),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 4),
        attention_head_dim=(3, 6, 6),
        cross_attention_dim=512,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=32 * 6 + 128,
        use_linear_projection=True,
    )

    def inputs(device: torch.device) -> dict[str, Any]:
        return {
            "sample": torch.zeros(2, 4, 32, 32, device=device),
            "timestep": torch.zeros(2, device=device),
            "encoder_hidden_states": torch.zeros(2, 77, 512, device=device),
            "added_cond_kwargs": {
                "text_embeds": torch.zeros(2, 128, device=device),
                "time_ids": torch.zeros(2, 6, device=device),
            },
        }

    return model, inputs


def sd3() -> tuple[nn.Module, Callable[[torch.device], dict[str, Any]]]:
    """A transformer of SD3's kind."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=32,
        num_layers=6,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=512,
        caption_projection_dim=512,
        pooled_projection_dim=256,
        pos_embed_max_size=32,
    )

    def inputs(device: torch.device) -> dict[str, Any]:
        return {
            "hidden_states": torch.zeros(2, 16, 32, 32, device=device),
            "timestep": torch.zeros(2, device=device),
            "encoder_hidden_states": torch.zeros(2, 154, 512, device=device),
            "pooled_projections": torch.zeros(2, 256, device=device),
        }

    return model, inputs


def flux() -> tuple[nn.Module, Callable[[torch.device], dict[str, Any]]]:
    """A transformer of FLUX's kind."""
    model = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=512,
        pooled_projection_dim=256,
        axes_dims_rope=(16, 24, 24),
    )

    def inputs(device: torch.device) -> dict[str, Any]:
        return {
            "hidden_states": torch.zeros(2, 256, 64, device=device),
            "timestep": torch.zeros(2, device=device),
            "encoder_hidden_states": torch.zeros(2, 128, 512, device=device),
            "pooled_projections": torch.zeros(2, 256, device=device),
            "img_ids": torch.zeros(256, 3, device=device),
            "txt_ids": torch.zeros(128, 3, device=device),
        }

    return model, inputs


@pytest.mark.parametrize("make", [unet, sd3, flux])
def test_activations_are_what_stays_alive_in_a_real_step(make: Callable[[], Any]) -> None:
    """Of models of 50 million weights and more, whose first layer trains: all that is kept."""
    model, inputs = make()
    model.requires_grad_(False)
    next(model.parameters()).requires_grad_(True)
    assert sum(p.numel() for p in model.parameters()) > 50e6
    peaks: dict[str, list[int]] = {"cpu": [], "meta": []}
    for recomputed in (False, True):
        if recomputed:
            model.enable_gradient_checkpointing()
        for name, found in peaks.items():
            model.to(name) if name == "meta" else model.to_empty(device="cpu")
            for parameter in model.parameters():
                parameter.grad = None
                if name == "cpu":
                    nn.init.normal_(parameter, std=0.02)
            given = inputs(torch.device(name))

            def loss(given: dict[str, Any] = given) -> torch.Tensor:
                return model(**given, return_dict=False)[0].square().mean()

            if name == "meta":
                found.append(peak_of(loss))
                continue
            with Live() as live:
                loss().backward()
                found.append(live.peak)
    assert peaks["meta"] == pytest.approx(peaks["cpu"], rel=0.15)
    plain, recomputed_peak = peaks["cpu"]
    assert recomputed_peak < 0.85 * plain


@pytest.mark.parametrize("name", ["int8-quanto", "fp8-quanto", "nf4-bnb", "int8-torchao"])
def test_quantised_weights_take_what_they_are_said_to(tiny_sdxl: Path, name: str) -> None:
    family = open_tiny(tiny_sdxl)
    real = family.open_denoiser(CPU)
    said = foreseen(family.blueprint(torch.float32), "unet", name)
    told = quantise(real, "unet", name, torch.device("cpu"), via="cpu")
    assert said.after == pytest.approx(told.after, rel=1e-3)
    assert replace(said, after=told.after) == told
    assert said.after < told.before


def test_a_blueprint_is_the_denoiser_without_weights(tiny_sdxl: Path) -> None:
    family = open_tiny(tiny_sdxl)
    real = family.open_denoiser(Place(torch.device("cpu"), torch.bfloat16))
    drawn = family.blueprint(torch.bfloat16)
    shapes = [
        {n: (tuple(p.shape), p.dtype) for n, p in model.named_parameters()}
        for model in (real, drawn)
    ]
    assert shapes[0] == shapes[1]
    assert {p.device.type for p in drawn.parameters()} == {"meta"}
    assert all(not p.requires_grad for p in attached(drawn, family))


def attached(denoiser: nn.Module, family: Any) -> list[nn.Parameter]:
    """The base's weights once adapters are on it."""
    lora = attach(denoiser, family, AdapterSettings(lora_rank=4))
    own = {id(p) for p in lora.parameters().values()}
    return [p for p in denoiser.parameters() if id(p) not in own]


def cached(run: Run) -> int:
    """What the entries of a run's caches hold, without what fills the gaps between them."""
    packs = (run.out / "cache").rglob("*.safetensors")
    named = (each for pack in packs for each in load_file(pack).items())
    return sum(tensor.nbytes for name, tensor in named if not name.startswith("~"))


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw_bf16", "use_ema": True},
        {"optimizer": "torch-adafactor"},
        {"optimizer": "bnb-adamw8bit"},
        {"optimizer": "optimi-lion", "model_type": "full", "learning_rate": 1e-5},
        {"optimizer": "muon", "lora_init_type": "pissa"},
        {"trainable_models": "conv_in,norm3", "use_ema": True},
        {"trainable_models": "conv_in,norm3", "model_type": "full", "learning_rate": 1e-5},
    ],
)
def test_the_estimate_of_a_run_is_what_its_files_hold(
    tmp_path: Path, tiny_sdxl: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, optimizer and average of its checkpoint, and its caches on the disk."""
    run = Run(tmp_path, tiny_sdxl)
    if "model_type" in settings:
        del run.settings["lora_rank"]
    run.settings |= {"validation_disable": True, "max_train_steps": 2, **settings}
    assert main(["estimate", "--config", str(run.write()), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert run.train() == 0

    folder = run.out / "checkpoint-2"
    sizes = {
        name: sum(t.nbytes for t in load_file(folder / f"{name}.safetensors").values() if t.ndim)
        for name in ("trainable", "optimizer", *(["ema"] if "use_ema" in settings else []))
    }
    twice = 2 if "lora_init_type" in settings else 1
    assert said["optimizer"] == sizes["optimizer"]
    assert said["gradients"] == sizes["trainable"]
    assert said["adapters"] == (0 if "model_type" in settings else twice * sizes["trainable"])
    assert said["average"] == sizes.get("ema", 0)
    (base,) = (tiny_sdxl / "unet").glob("*.safetensors")
    beside = folder / "unet_weights.safetensors"
    apart = load_file(beside) if beside.exists() else {}
    assert said["base"] == sum(t.nbytes for n, t in load_file(base).items() if n not in apart)
    assert said["cache"] == cached(run)
    assert said["width"] % 16 == said["height"] % 16 == 0
    assert 0.7 < said["width"] * said["height"] / 64**2 < 1.5


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_text_encoders_that_train_stay_loaded_and_count(
    tmp_path: Path,
    family: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = request.getfixturevalue(f"tiny_{family}")
    run = Run(tmp_path, model)
    run.settings |= {"model_family": family, "validation_disable": True, "max_train_steps": 2}
    said = []
    for trains in (False, True):
        config = str(run.write(train_text_encoder=trains))
        assert main(["estimate", "--config", config, "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert run.train(train_text_encoder=True) == 0
    capsys.readouterr()
    without, beside = said
    held = [t for f in model.glob("text_encoder*/*.safetensors") for t in load_file(f).values()]
    floats = sum(t.nbytes for t in held if t.is_floating_point())
    assert (without["encoders"], beside["encoders"]) == (0, pytest.approx(floats, rel=0.02))
    sizes = {
        name: sum(
            t.nbytes for t in load_file(run.out / f"checkpoint-2/{name}.safetensors").values()
        )
        for name in ("trainable", "optimizer")
    }
    assert beside["adapters"] == beside["gradients"] == sizes["trainable"]
    assert beside["optimizer"] == pytest.approx(sizes["optimizer"], rel=0.02)  # and step numbers
    assert beside["cache"] == cached(run) < without["cache"]
    assert beside["activations"] > without["activations"]


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_a_controlnet_counts_beside_the_model(
    tmp_path: Path,
    family: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = controlled(tmp_path, request.getfixturevalue(f"tiny_{family}"), family)
    del run.settings["lora_rank"]
    assert main(["estimate", "--config", str(run.write(max_train_steps=2)), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert run.train(max_train_steps=2) == 0
    net = load_file(run.out / "controlnet/diffusion_pytorch_model.safetensors")
    held = load_file(run.out / "checkpoint-2/optimizer.safetensors")
    assert said["adapters"] == sum(tensor.nbytes for tensor in net.values())
    assert said["cache"] == cached(run)  # sd3's with the latents of the control pictures
    assert said["optimizer"] == sum(t.nbytes for t in held.values() if t.ndim)
    capsys.readouterr()
    assert main(["estimate", "--config", str(run.write(train_batch_size=1)), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["activations"] < said["activations"]


def test_the_table_is_read_by_people(
    tmp_path: Path, tiny_sdxl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, tiny_sdxl)
    assert main(["estimate", "--config", str(run.write())]) == 0
    told = capsys.readouterr().out.splitlines()
    shown = told[: told.index("precision plan")]
    assert [line.split("  ")[0] for line in shown] == [
        "the model's weights",
        "adapters",
        "gradients",
        "optimizer",
        "activations",
        "a training step",
        "caches on the disk",
    ]
    assert all(" MiB" in line for line in shown)
    assert not (run.out / "checkpoint-2").exists()
