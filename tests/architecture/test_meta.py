"""A whole optimizer step on the `meta` device.

A CPU tensor that meets the model raises there, and so does every read of a value (`.item()`, `if
tensor:`): what passes is placed right and never waits for the device. What it cannot see: 0-dim CPU
tensors, and draws from a device generator.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner.adapters.ema import Ema
from simpletuner.adapters.method import attach
from simpletuner.adapters.settings import AdapterSettings
from simpletuner.adapters.weights import Weights
from simpletuner.core.seeds import Seeds
from simpletuner.core.types import Batch, Geometry, Place, PlannedBatch, Sample
from simpletuner.diffusion.settings import DiffusionSettings
from simpletuner.models.encoders import TextEncoders
from simpletuner.models.families import FAMILIES
from simpletuner.models.loading import open_family
from simpletuner.models.settings import ModelSettings
from simpletuner.optim.build import build_optimizer
from simpletuner.optim.optimizers import OPTIMIZERS
from simpletuner.optim.settings import OptimizerSettings
from simpletuner.training.stepper import Stepper
from tests.unit.training.builds import SHAPES, control_pictures

SIZE = (64, 64)


LOADED = {
    "loss_type": "smooth_l1",
    "snr_gamma": 5.0,
    "offset_noise": True,
    "input_perturbation": 0.1,
    "timestep_bias_strategy": "later",
    "timestep_bias_multiplier": 3.0,
    "mask_normalize": True,
    "prior_loss_weight": 0.5,
    "scheduled_sampling_max_step_offset": 4,
    "scheduled_sampling_probability": 1.0,
}
"""Everything that shapes noise and loss, at once."""

OPTIONS: dict[str, dict[str, Any]] = {
    "flux": {"flux_guidance_mode": "random-range", "flux_attention_masked_training": True}
}
"""What more a family can be told of a step."""

BUILT = [
    name
    for name, row in OPTIMIZERS.items()
    if not row.pending and not row.fact("syncs") and name != "optimi-stableadamw"
]
"""Those that wait for nothing; StableAdamW goes another way here than on a GPU, see tests/gpu."""


@pytest.mark.parametrize(
    ("family", "folder", "optimizer", "diffusion"),
    [
        ("flux", "tiny_flux", BUILT[0], {}),
        ("sd1x", "tiny_sd1x", BUILT[0], LOADED),
        *(("sdxl", "tiny_sdxl", optimizer, {}) for optimizer in BUILT),
        ("sdxl", "tiny_sdxl_v", BUILT[0], {}),
        ("sd3", "tiny_sd3", BUILT[0], {}),
        ("sdxl", "tiny_sdxl", BUILT[0], LOADED),
        ("sdxl", "tiny_sdxl_v", BUILT[0], LOADED),
        ("sd3", "tiny_sd3", BUILT[0], {"loss_type": "huber", "flow_use_beta_schedule": True}),
    ],
)
def test_an_optimizer_step_touches_no_cpu_tensor_and_waits_for_nothing(
    family: str,
    folder: str,
    optimizer: str,
    diffusion: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    stepper = stepper_on_meta(family, request.getfixturevalue(folder), optimizer, diffusion)

    kept = micro_batch(family, first=2, regularises=True, mask=torch.ones(2, 1, 8, 8))
    outcome = stepper.step(0, [micro_batch(family, first=0), kept])

    assert outcome.loss.device.type == outcome.grad_norm.device.type == "meta"
    assert all(p.grad is not None for p in stepper.weights.trainable.parameters().values())


LOKR = {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1.0, "factor": 4}


METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora-text": {"train_text_encoder": True},
    "full": {"model_type": "full"},
    "lokr": {"lora_type": "lycoris", "lycoris_config": LOKR},
    "controlnet": {"model_type": "full", "controlnet": True},
}


@pytest.mark.parametrize(
    ("family", "method"),
    [
        (family, method)
        for family in ("flux", "sd1x", "sd3", "sdxl")
        for method in METHODS
        if method != "controlnet" or FAMILIES[family].fact("control")
    ],
)
def test_every_method_in_every_family_with_an_average_waits_for_nothing(
    family: str, method: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    settings = {**METHODS[method], "use_ema": True, "ema_device": "accelerator"}
    stepper = stepper_on_meta(family, folder, "adamw_bf16", {}, **settings)

    outcome = stepper.step(0, [micro_batch(family, first=0), micro_batch(family, first=2)])

    assert outcome.loss.device.type == outcome.grad_norm.device.type == "meta"
    parameters = stepper.weights.trainable.parameters()
    assert all(p.grad is not None for p in parameters.values())
    assert stepper.weights.ema is not None
    assert stepper.weights.ema.shadow.keys() == parameters.keys()


def test_the_meta_device_refuses_what_the_rule_forbids() -> None:
    on_meta = torch.ones(2, device="meta")

    with pytest.raises(RuntimeError):
        on_meta + torch.ones(2)
    with pytest.raises(RuntimeError):
        on_meta.sum().item()


def stepper_on_meta(
    name: str, folder: Path, optimizer: str, diffusion: dict[str, Any], **adapter: Any
) -> Stepper:
    seeds, place = Seeds(0), Place(torch.device("meta"), torch.float32)
    settings = ModelSettings(
        model_family=name, pretrained_model_name_or_path=str(folder), **OPTIONS.get(name, {})
    )
    family = open_family(settings)
    denoiser = family.open_denoiser(Place(torch.device("cpu"), torch.float32)).to("meta")
    chosen = AdapterSettings(**adapter)
    encoders = TextEncoders.blueprint(family, place) if chosen.train_text_encoder else None
    trainable = attach(denoiser, family, chosen, encoders)
    average = Ema.of(trainable.parameters(), chosen)
    optimizing = OptimizerSettings(optimizer=optimizer)
    return Stepper.of(
        place,
        family,
        Weights(trainable, build_optimizer(optimizing, trainable.groups(), seeds), average),
        DiffusionSettings(**diffusion),
        optimizing,
        10,
        seeds,
    )


def micro_batch(
    name: str, first: int, regularises: bool = False, mask: torch.Tensor | None = None
) -> tuple[PlannedBatch, Batch]:
    """Two samples of a window of four, on the CPU as the caches give them."""
    geometry = Geometry(source=SIZE, resize=SIZE, crop=(0, 0, *SIZE))
    samples = tuple(
        Sample(f"{i:032x}", "d", f"{i}.png", "a cat", geometry, regularises=regularises)
        for i in (first, first + 1)
    )
    planned = PlannedBatch(
        source=0,
        rows=(first, first + 1),
        occurrences=(0, 0),
        weights=(1.0, 1.0),
        positions=(first, first + 1),
        window_samples=4,
        epoch=0,
    )
    shapes = dict(SHAPES[name])
    latents = torch.zeros(2, shapes.pop("latents"), 8, 8)
    embeds = {
        text: torch.ones(2, *shape, dtype=torch.bool if text.endswith("_mask") else None)
        for text, shape in shapes.items()
    }
    controls = control_pictures(name, range(2), *SIZE)
    return planned, Batch(latents, embeds, samples, mask, controls=controls)
