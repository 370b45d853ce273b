"""One optimizer step: draw, predict, loss, backward, clip, update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simpletuner.core.types import to_device
from simpletuner.diffusion.losses import Loss, per_sample
from simpletuner.diffusion.noise import Noises
from simpletuner.diffusion.objective import objective_of
from simpletuner.diffusion.rollout import Rollout
from simpletuner.diffusion.timesteps import Quantiles
from simpletuner.optim.schedules import learning_rate

if TYPE_CHECKING:
    from simpletuner.adapters.weights import Weights
    from simpletuner.core.seeds import Seeds
    from simpletuner.core.types import Batch, Draw, Place, PlannedBatch
    from simpletuner.diffusion.objective import Objective
    from simpletuner.diffusion.settings import DiffusionSettings
    from simpletuner.models.family import Family
    from simpletuner.optim.settings import OptimizerSettings


@dataclass(frozen=True)
class Clip:
    """How gradients are bounded before the update; 0 leaves them alone and only measures them."""

    method: str
    limit: float

    def __call__(self, parameters: Sequence[torch.nn.Parameter]) -> Tensor:
        """Bound the gradients in place; returns their global L2 norm before that, 0-dim."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.limit and self.method == "norm":
            torch.nn.utils.clip_grads_with_norm_(parameters, self.limit, norm)
        elif self.limit:
            torch.nn.utils.clip_grad_value_(parameters, self.limit)
        return norm


@dataclass(frozen=True)
class Outcome:
    """What a step left on the device; read it one step later, when that costs no wait.

    Args:
        loss: Mean loss over the window, 0-dim.
        grad_norm: Global norm before clipping, 0-dim.
        lr: The learning rate used.
        skipped: True if the step was not taken: a scaled loss overflowed.
    """

    loss: Tensor
    grad_norm: Tensor
    lr: float
    skipped: bool = False


@dataclass(frozen=True)
class Stepper:
    """Optimises one window at a time; a pure function of the weights, the window and the step."""

    place: Place
    family: Family
    weights: Weights
    objective: Objective
    quantiles: Quantiles
    noises: Noises
    rollout: Rollout
    loss: Loss
    mask_normalize: bool
    prior_loss_weight: float
    clip: Clip
    learning_rate: Callable[[int], float]
    seeds: Seeds

    @classmethod
    def of(
        cls,
        place: Place,
        family: Family,
        weights: Weights,
        diffusion: DiffusionSettings,
        optimizer: OptimizerSettings,
        total_steps: int,
        seeds: Seeds,
    ) -> Stepper:
        """The stepper of `family` as the settings want it."""
        rate = partial(
            learning_rate,
            optimizer.lr_scheduler,
            total=total_steps,
            base=optimizer.learning_rate,
            warmup=optimizer.warmup_of(total_steps),
            end=optimizer.lr_end,
            power=optimizer.lr_power,
            cycles=optimizer.lr_num_cycles,
        )
        objective = objective_of(family.prediction_type, family.scheduler_config, diffusion)
        return cls(
            place=place,
            family=family,
            weights=weights,
            objective=objective,
            quantiles=Quantiles(diffusion, seeds),
            noises=Noises(diffusion, seeds),
            rollout=Rollout(diffusion, objective, seeds),
            loss=Loss.of(diffusion, objective),
            mask_normalize=diffusion.mask_normalize,
            prior_loss_weight=diffusion.prior_loss_weight,
            clip=Clip(optimizer.grad_clip_method, optimizer.max_grad_norm),
            learning_rate=rate,
            seeds=seeds,
        )

    def step(self, step: int, window: Sequence[tuple[PlannedBatch, Batch]]) -> Outcome:
        """Train on the window of optimizer step `step` (0-based)."""
        optimizer, scaler = self.weights.optimizer, self.weights.scaler
        optimizer.zero_grad(set_to_none=True)
        total: Tensor | None = None
        for micro, (planned, batch) in enumerate(window):
            share = self.micro_loss(step, micro, planned, batch)
            (scaler.scaled(share) if scaler else share).backward()
            total = share.detach() if total is None else total + share.detach()
        assert total is not None, "a window has at least one batch"
        if scaler:
            scaler.unscale(optimizer)
        norm = self.clip([p for group in optimizer.param_groups for p in group["params"]])
        lr = self.learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if scaler and not scaler.step(optimizer):
            return Outcome(total, norm, lr, skipped=True)
        if not scaler:
            optimizer.step()
        self.weights.follow(step)
        return Outcome(total, norm, lr)

    def micro_loss(self, step: int, micro: int, planned: PlannedBatch, batch: Batch) -> Tensor:
        """The share of one micro-batch in the window's mean loss, 0-dim, with its graph.

        Sums the samples' losses by their plan weights and divides by the samples of the whole
        window, so that the gradients of all micro-batches add up to the exact mean.
        """
        batch, draw = self.draw(step, micro, planned, batch)
        if batch.regularises:
            with self.weights.trainable.disabled(), torch.no_grad():
                draw = replace(draw, target=self._predict(step, micro, batch, draw))
        errors = self.loss.errors(self._predict(step, micro, batch, draw), draw)
        losses = per_sample(errors, batch.mask, normalise=self.mask_normalize)
        losses = losses * self.loss.weights(draw)
        if batch.regularises:
            losses = losses * self.prior_loss_weight
        weights = to_device(torch.tensor(planned.weights), self.place.device)
        return (losses * weights).sum() * (self.place.world / planned.window_samples)

    def _predict(self, step: int, micro: int, batch: Batch, draw: Draw) -> Tensor:
        """[B, C, *S] fp32, what the model says; the same each time it is asked in a step."""
        self.seeds.reseed_torch("step", step, micro, self.place.rank)
        with self.place.autocast():
            return self.weights.trainable.predict(self.family, draw, batch).float()

    def draw(
        self, step: int, micro: int, planned: PlannedBatch, batch: Batch
    ) -> tuple[Batch, Draw]:
        """The batch on its device and its random corruption, drawn on the CPU and copied."""
        u = self.quantiles(step, planned.window_samples)[list(planned.positions)]
        shape = tuple(batch.latents.shape[1:])
        drawn = self.noises.draw(batch.samples, planned.epoch, shape, step)
        told = self.family.drawn(batch.samples, planned.epoch, self.seeds)
        controls = {name: to_device(value, self.place.device) for name, value in told.items()}
        batch = batch.to(self.place)
        batch = replace(batch, controls={**batch.controls, **controls})
        noise, perturbed = (
            None if each is None else to_device(each, self.place.device) for each in drawn
        )
        assert noise is not None, "only what the denoiser sees in its place may be absent"
        tokens = self.family.tokens(batch.latents)
        t = self.objective.timesteps(u, tokens, batch.timestep_offset)
        lengths = self.rollout.lengths(batch.samples, planned.epoch, step, t)
        if lengths.any():
            answer = partial(self._predict, step, micro, batch)
            noise = self.rollout.noise(batch.latents, t, noise, lengths, answer)
        return batch, self.objective.draw(batch.latents, t, noise, perturbed)


def gradients(weights: Weights) -> Iterator[tuple[str, Tensor | None]]:
    """Name and gradient of everything that trains."""
    for name, parameter in weights.trainable.parameters().items():
        yield name, parameter.grad
