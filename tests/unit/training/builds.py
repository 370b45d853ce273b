"""A stepper on a tiny model with made-up batches. B batch, h w latent cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from simpletuner.adapters.method import attach
from simpletuner.adapters.settings import AdapterSettings
from simpletuner.adapters.weights import Weights
from simpletuner.core.seeds import Seeds
from simpletuner.core.types import Batch, Geometry, Place, PlannedBatch, Sample
from simpletuner.diffusion.settings import DiffusionSettings
from simpletuner.models.encoders import TextEncoders
from simpletuner.models.loading import open_family
from simpletuner.models.settings import ModelSettings
from simpletuner.optim.build import build_optimizer
from simpletuner.optim.settings import OptimizerSettings
from simpletuner.precision.quantise import Quantiser
from simpletuner.precision.settings import PrecisionSettings
from simpletuner.training.stepper import Stepper

CPU = Place(torch.device("cpu"), torch.float32)
SEEDS = Seeds(7)
SHAPES = MappingProxyType(
    {
        "flux": {
            "latents": 16,
            "prompt_embeds": (512, 32),
            "pooled_prompt_embeds": (32,),
            "prompt_embeds_mask": (512,),
        },
        "sd1x": {"latents": 4, "prompt_embeds": (77, 32)},
        "sdxl": {"latents": 4, "prompt_embeds": (77, 64), "pooled_prompt_embeds": (32,)},
        "sd3": {"latents": 16, "prompt_embeds": (77 + 154, 64), "pooled_prompt_embeds": (64,)},
    }
)
"""The latents' channels and the shape of each text output of the tiny models."""


def build_stepper(
    model: Path,
    place: Place = CPU,
    base: torch.dtype = torch.float32,
    adapter: dict[str, Any] | None = None,
    diffusion: dict[str, Any] | None = None,
    family_name: str = "sdxl",
    options: dict[str, Any] | None = None,
    base_format: str = "no_change",
    **optimizer: Any,
) -> Stepper:
    """The stepper `training.run` would build, on `place`."""
    chosen_model = ModelSettings(
        model_family=family_name, pretrained_model_name_or_path=str(model), **(options or {})
    )
    family = open_family(chosen_model)
    quantiser = Quantiser(PrecisionSettings(base_model_precision=base_format))
    denoiser = family.open_denoiser(Place(torch.device("cpu"), base), quantiser)
    settings = AdapterSettings(**{"lora_rank": 4, "lora_alpha": 6, **(adapter or {})})
    beside = Place(torch.device("cpu"), base)
    encoders = TextEncoders.opened(family, beside) if settings.train_text_encoder else None
    SEEDS.reseed_torch("adapter")
    trainable = attach(denoiser, family, settings, encoders)
    for module in trainable.modules:
        module.to(place.device)
    chosen = OptimizerSettings(**{"learning_rate": 1e-3, "lr_scheduler": "constant", **optimizer})
    weights = Weights(trainable, build_optimizer(chosen, trainable.groups(), SEEDS))
    objective = DiffusionSettings(**(diffusion or {}))
    return Stepper.of(place, family, weights, objective, chosen, 10, SEEDS)


def make_batch(
    *numbers: int,
    width: int = 64,
    height: int = 96,
    family_name: str = "sdxl",
    regularises: bool = False,
    controlled: bool = False,
) -> Batch:
    """One sample per number; everything about it follows from the number."""
    shapes = dict(SHAPES[family_name])
    channels = shapes.pop("latents")
    latents: list[torch.Tensor] = []
    texts: dict[str, list[torch.Tensor]] = {name: [] for name in shapes}
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        size = (channels, height // 8, width // 8)
        latents.append(torch.randn(size, generator=generator))
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator)
            texts[name].append(value > 0 if name.endswith("_mask") else value)
    geometry = Geometry((width, height), (width, height), (0, 0, width, height))
    samples = tuple(
        Sample(f"{n:032x}", "set", f"{n}.png", "a", geometry, regularises=regularises)
        for n in numbers
    )
    embeds = {name: torch.stack(values) for name, values in texts.items()}
    controls = control_pictures(family_name, numbers, width, height) if controlled else {}
    return Batch(torch.stack(latents), embeds, samples, controls=controls)


def control_pictures(
    family: str, numbers: Sequence[int], width: int, height: int
) -> dict[str, torch.Tensor]:
    """[B, 3, H, W] in [0, 1], or latents [B, C, h, w] for SD3; each follows from its number."""
    size = (16, height // 8, width // 8) if family == "sd3" else (3, height, width)
    draw = torch.randn if family == "sd3" else torch.rand
    found = [draw(size, generator=torch.Generator().manual_seed(100 + n)) for n in numbers]
    return {"controlnet_cond": torch.stack(found)}


def window_of(*batches: Batch) -> list[tuple[PlannedBatch, Batch]]:
    """Batches as one accumulation window of one process."""
    total = sum(len(batch.samples) for batch in batches)
    window, position = [], 0
    for batch in batches:
        count = len(batch.samples)
        planned = PlannedBatch(
            source=0,
            rows=tuple(range(count)),
            occurrences=(0,) * count,
            weights=(1.0,) * count,
            positions=tuple(range(position, position + count)),
            window_samples=total,
            epoch=0,
        )
        window.append((planned, batch))
        position += count
    return window


def gradients_of(
    stepper: Stepper, window: Sequence[tuple[PlannedBatch, Batch]]
) -> dict[str, torch.Tensor]:
    """The gradients of one window, nothing clipped or updated."""
    parameters = stepper.weights.trainable.parameters()
    for parameter in parameters.values():
        parameter.grad = None
    for micro, (planned, batch) in enumerate(window):
        stepper.micro_loss(0, micro, planned, batch).backward()
    return {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
