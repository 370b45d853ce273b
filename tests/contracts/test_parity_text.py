"""Ten steps that train text encoders too are those of a loop of diffusers, peft and torch alone.

As in diffusers' train_text_to_image_lora_sdxl.py: captions are encoded in the step, the text
encoders' adapters are a parameter group with a learning rate of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from simpletuner.core.types import Batch
from simpletuner.diffusion.noise import noise_for
from simpletuner.training.stepper import Stepper
from tests.unit.training.builds import SEEDS, build_stepper, make_batch, window_of

STEPS = 10
RATE, TEXT_RATE = 1e-3, 4e-4
RANK, ALPHA = 4, 6
CAPTIONS = ("a photo of a cat", "", "a red house in the snow, a dog beside it", "a cat", "a boat")


def batches() -> Iterator[Batch]:
    for step in range(STEPS):
        batch = make_batch(3 * step, 3 * step + 1, 3 * step + 2)
        samples = tuple(
            replace(sample, caption=CAPTIONS[(3 * step + n) % len(CAPTIONS)])
            for n, sample in enumerate(batch.samples)
        )
        yield replace(batch, samples=samples, embeds={})


class Stock:
    """The three models with peft's adapters on them, and what encodes captions."""

    def __init__(self, folder: Path) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        self.texts = [
            CLIPTextModel.from_pretrained(folder, subfolder="text_encoder"),
            CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder_2"),
        ]
        self.tokenizers = [
            CLIPTokenizer.from_pretrained(folder, subfolder=name)
            for name in ("tokenizer", "tokenizer_2")
        ]
        self.scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        for model, targets in (
            (self.unet, ["to_k", "to_q", "to_v", "to_out.0"]),
            *((text, ["q_proj", "k_proj", "v_proj", "out_proj"]) for text in self.texts),
        ):
            model.requires_grad_(False)
            model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
            model.train()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Ours are called as in the file, where every CLIP has its ``text_model``."""
        found = {}
        named = zip(("text_encoder", "text_encoder_2"), self.texts, strict=True)
        for begin, model in (("", self.unet), *named):
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    inner = name.replace(".default", "")
                    if begin and not inner.startswith("text_model."):
                        inner = f"text_model.{inner}"
                    found[f"{begin}.{inner}".lstrip(".")] = parameter
        return found

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """[B, L, D] of both, side by side; [B, D] of the second."""
        states = []
        for tokenizer, text in zip(self.tokenizers, self.texts, strict=True):
            tokens = tokenizer(
                captions,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            answer = text(tokens.input_ids, output_hidden_states=True)
            states.append(answer.hidden_states[-2])
        return torch.cat(states, dim=-1), answer[0]

    def loss(self, batch: Batch, drawn: Any) -> Tensor:
        noise = noise_for(batch.samples, 0, tuple(batch.latents.shape[1:]), SEEDS)
        timesteps = drawn.timestep.long()
        text, pooled = self.encode([sample.caption for sample in batch.samples])
        sizes = torch.tensor([[96.0, 64.0, 0.0, 0.0, 96.0, 64.0]] * len(batch.samples))
        answer = self.unet(
            self.scheduler.add_noise(batch.latents, noise, timesteps),
            timesteps,
            text,
            added_cond_kwargs={"time_ids": sizes, "text_embeds": pooled},
        ).sample
        return nn.functional.mse_loss(answer.float(), noise.float(), reduction="mean")


def reference(
    stock: Stock, start: dict[str, Tensor], stepper: Stepper
) -> tuple[list[float], dict[str, nn.Parameter]]:
    """The losses of ten steps, and the trained weights by their names in `start`."""
    trained = {name: p for name, p in stock.parameters().items() if name in start}
    assert trained.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[name])
    ours = {name: p for name, p in trained.items() if name.startswith("text_encoder")}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in trained.items() if name not in ours], "lr": RATE},
            {"params": list(ours.values()), "lr": TEXT_RATE},
        ],
        weight_decay=1e-2,
    )
    losses = []
    for step, batch in enumerate(batches()):
        ((planned, _),) = window_of(batch)
        _, drawn = stepper.draw(step, 0, planned, batch)
        loss = stock.loss(batch, drawn)
        loss.backward()
        nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, trained


@pytest.fixture(scope="module")
def stepper(tiny_sdxl: Path) -> Stepper:
    return build_stepper(
        tiny_sdxl,
        adapter={"lora_rank": RANK, "lora_alpha": ALPHA, "train_text_encoder": True},
        learning_rate=RATE,
        text_encoder_lr=TEXT_RATE,
        optimizer="torch-adamw",
    )


def test_ten_steps_with_text_encoders_are_those_of_the_stock_loop(
    stepper: Stepper, tiny_sdxl: Path
) -> None:
    parameters = stepper.weights.trainable.parameters()
    start = {name: p.detach().clone() for name, p in parameters.items()}
    stock = Stock(tiny_sdxl)
    wanted, weights = reference(stock, start, stepper)

    losses = [
        stepper.step(step, window_of(batch)).loss.item() for step, batch in enumerate(batches())
    ]

    assert losses == pytest.approx(wanted, rel=1e-5)
    for name, parameter in parameters.items():
        assert torch.allclose(parameter.detach(), weights[name], atol=1e-4, rtol=0), name
    still = [n for n in start if torch.allclose(weights[n], start[n], atol=1e-4)]
    assert still == []
    # what the stock loop gives an adapter too, and ours leaves out, has learned nothing there
    spare = {n: p for n, p in stock.parameters().items() if n not in start}
    assert {name.partition(".self_attn")[0] for name in spare} == {
        "text_encoder.text_model.encoder.layers.2"
    }
    assert all(p.grad is None for p in spare.values())
