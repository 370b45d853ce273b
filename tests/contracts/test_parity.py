"""Ten steps are those of a loop written with diffusers, peft and torch alone, as in their examples.

Both get the same pictures, noise and timesteps; everything else of the reference is stock: the
schedulers' mixing and targets, the models' calls, torch's AdamW and gradient clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from peft import LoraConfig
from torch import Tensor, nn

from simpletuner.core.types import Batch
from simpletuner.diffusion.noise import noise_for
from simpletuner.training.stepper import Stepper
from tests.unit.training.builds import SEEDS, build_stepper, make_batch, window_of

STEPS = 10
RATE = 1e-3
RANK, ALPHA = 4, 6


def batches(family: str) -> Iterator[Batch]:
    for step in range(STEPS):
        numbers = (3 * step, 3 * step + 1, 3 * step + 2)
        yield make_batch(*numbers, family_name=family, controlled=True)


def sdxl_loss(
    unet: nn.Module, net: nn.Module | None, folder: Path, batch: Batch, drawn: Any
) -> Tensor:
    """Epsilon, as in diffusers' train_text_to_image_sdxl.py and train_controlnet_sdxl.py."""
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    noise = noise_for(batch.samples, 0, tuple(batch.latents.shape[1:]), SEEDS)
    timesteps = drawn.timestep.long()
    sizes = torch.tensor([[96.0, 64.0, 0.0, 0.0, 96.0, 64.0]] * len(batch.samples))
    inputs = (
        scheduler.add_noise(batch.latents, noise, timesteps),
        timesteps,
        batch.embeds["prompt_embeds"],
    )
    added = {"time_ids": sizes, "text_embeds": batch.embeds["pooled_prompt_embeds"]}
    more = {}
    if net is not None:
        pixels = batch.controls["controlnet_cond"]
        down, middle = net(
            *inputs, controlnet_cond=pixels, added_cond_kwargs=added, return_dict=False
        )
        more = {
            "down_block_additional_residuals": [sample.float() for sample in down],
            "mid_block_additional_residual": middle,
        }
    answer = unet(*inputs, added_cond_kwargs=added, **more).sample
    return nn.functional.mse_loss(answer.float(), noise.float(), reduction="mean")


def sd3_loss(
    transformer: nn.Module, net: nn.Module | None, folder: Path, batch: Batch, drawn: Any
) -> Tensor:
    """Flow matching towards noise minus latents, as in diffusers' train_dreambooth_sd3.py.

    With a net as StableDiffusion3ControlNetPipeline calls it: no pooled text, latents not shifted.
    """
    noise = noise_for(batch.samples, 0, tuple(batch.latents.shape[1:]), SEEDS)
    timesteps = drawn.timestep
    sigmas = (timesteps / 1000).view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * batch.latents + sigmas * noise
    text, pooled = batch.embeds["prompt_embeds"], batch.embeds["pooled_prompt_embeds"]
    blocks = None
    if net is not None:
        vae = AutoencoderKL.load_config(folder, subfolder="vae")
        raw = batch.controls["controlnet_cond"] / vae["scaling_factor"] + vae["shift_factor"]
        blocks = net(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=text,
            pooled_projections=torch.zeros_like(pooled),
            controlnet_cond=raw * vae["scaling_factor"],
            return_dict=False,
        )[0]
    answer = transformer(
        hidden_states=noisy,
        timestep=timesteps,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        block_controlnet_hidden_states=blocks,
        return_dict=False,
    )[0]
    target = noise - batch.latents
    return torch.mean(((answer.float() - target.float()) ** 2).reshape(len(target), -1), 1).mean()


FAMILIES = {
    "sdxl": (UNet2DConditionModel, "unet", sdxl_loss),
    "sd3": (SD3Transformer2DModel, "transformer", sd3_loss),
}


WHOLE = {
    "sdxl": ("conv_in", "mid_block.attentions.0.norm"),
    "sd3": ("context_embedder", "transformer_blocks.0.norm1"),
}
"""What trains whole where only that does, or beside a LoRA."""

NETS: dict[str, Callable[[Any], nn.Module]] = {
    "sdxl": ControlNetModel.from_unet,
    "sd3": partial(
        SD3ControlNetModel.from_transformer, num_layers=1, num_extra_conditioning_channels=0
    ),
}


def reference(
    family: str, method: str, folder: Path, start: dict[str, Tensor], stepper: Stepper
) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of ten steps, and the trained weights by their names in `start`."""
    cls, part, loss_of = FAMILIES[family]
    model = cls.from_pretrained(folder, subfolder=part)
    net = None
    if method == "controlnet":
        model.requires_grad_(False)
        base = cls.from_pretrained(folder, subfolder=part)  # which from_transformer changes
        net = NETS[family](base).train()
    if method in ("lora", "mixed"):
        model.requires_grad_(False)
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    if method == "mixed":
        for name in WHOLE[family]:
            model.get_submodule(name).requires_grad_(True)
    trained = {
        name.replace(".default", ""): p
        for name, p in (net or model).named_parameters()
        if p.requires_grad
    }
    trained = {name: p for name, p in trained.items() if name in start}
    assert trained.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[name])
    decays = [p for p in trained.values() if p.ndim > 1 or method == "lora"]
    plain = [p for p in trained.values() if not (p.ndim > 1 or method == "lora")]
    groups = [{"params": decays, "weight_decay": 1e-2}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=RATE)
    losses = []
    model.train()
    for step, batch in enumerate(batches(family)):
        ((planned, _),) = window_of(batch)
        _, drawn = stepper.draw(step, 0, planned, batch)
        loss = loss_of(model, net, folder, batch, drawn)
        loss.backward()
        nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in trained.items()}


def _kind(name: str) -> str:
    return "adapter" if ".lora_" in name else "whole"


@pytest.mark.parametrize("method", ["lora", "full", "mixed", "parts", "controlnet"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_steps_are_those_of_the_stock_loop(
    family: str, method: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    adapter: dict[str, Any] = {
        "lora": {"lora_rank": RANK, "lora_alpha": ALPHA},
        "full": {"model_type": "full"},
        "mixed": {"lora_rank": RANK, "lora_alpha": ALPHA, "trainable_models": WHOLE[family]},
        "parts": {"model_type": "full", "trainable_models": WHOLE[family]},
        "controlnet": {"model_type": "full", "controlnet": True},
    }[method]
    stepper = build_stepper(
        folder, adapter=adapter, family_name=family, learning_rate=RATE, optimizer="torch-adamw"
    )
    parameters = stepper.weights.trainable.parameters()
    start = {name: p.detach().clone() for name, p in parameters.items()}
    wanted, weights = reference(family, method, folder, start, stepper)

    losses = [
        stepper.step(step, window_of(batch)).loss.item()
        for step, batch in enumerate(batches(family))
    ]

    assert losses == pytest.approx(wanted, rel=1e-5)
    for name, parameter in parameters.items():
        assert torch.allclose(parameter.detach(), weights[name], atol=1e-4, rtol=0), name
    moved = [name for name in start if not torch.allclose(weights[name], start[name], atol=1e-4)]
    assert len(moved) == len(start)
    assert (method == "mixed") == ({"whole", "adapter"} == {_kind(name) for name in start})
