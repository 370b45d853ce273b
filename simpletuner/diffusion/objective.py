"""Objectives: how a clean latent is corrupted and what the denoiser should answer.

Letters: B batch, C channels, *S = H,W; T steps of the training schedule; abar = cumulative alpha.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from simpletuner.core.errors import ConfigError
from simpletuner.core.types import Draw, to_device, wide
from simpletuner.diffusion.settings import DiffusionSettings
from simpletuner.diffusion.timesteps import chances, flow_law

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.diffusion.timesteps import Law


class Objective(Protocol):
    """Pure fp32 mathematics of one prediction type."""

    def timesteps(self, u: Tensor, tokens: int, offset: float = 0.0) -> Tensor:
        """The law: quantiles [B] in [0, 1) to timesteps [B], on the CPU.

        Args:
            u: [B], fp64.
            tokens: What the denoiser makes of each latent of the batch.
            offset: Moves a logit-normal law, in standard deviations; below 0 to less noise.
        """

    def draw(
        self, clean: Tensor, t: Tensor, noise: Tensor, perturbed: Tensor | None = None
    ) -> Draw:
        """Corrupt `clean` [B, C, *S] with `noise` at CPU timesteps `t` [B].

        Args:
            perturbed: What the denoiser sees in place of `noise`; the target stays that of `noise`.
        """

    def clean(self, draw: Draw, prediction: Tensor) -> Tensor:
        """The clean latent [B, C, *S] that `prediction` [B, C, *S] implies."""

    def shares(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """The shares of the clean latent and of the noise in ``draw.noisy``, [B] each."""

    @property
    def last(self) -> int:
        """The timestep of most noise."""

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`shares` of CPU timesteps `t` [B], in fp64 on the CPU."""

    def flow_ratio(self, draw: Draw) -> Tensor:
        """[B] how far off ``noise - x0`` is for a prediction that is off by one.

        The noisy latent and the prediction give noise and x0, each in a line (Schusterbauer et al.
        2025, arXiv 2506.02221).
        """

    def min_snr(self, draw: Draw, gamma: float, soft: bool = False) -> Tensor:
        """[B] what min-SNR makes of each sample's weight: less where there is little noise.

        Args:
            gamma: The SNR that an x0 loss weighs at most.
            soft: Near it as ``SNR gamma / (SNR + gamma)`` instead of by the smaller of the two.
        """


@dataclass(frozen=True, eq=False)
class VariancePreserving(ABC):
    """``noisy = sqrt(abar) x0 + sqrt(1 - abar) noise`` (Ho et al. 2020, eq. 4).

    Args:
        abar: [T] fp32 on the CPU.
        chances: [T] fp64 what is drawn how often; None for all alike.
    """

    abar: Tensor
    chances: Tensor | None = None

    def timesteps(self, u: Tensor, tokens: int, offset: float = 0.0) -> Tensor:
        """From 0 … T - 1, whatever the size: the inverse of the summed chances at each quantile."""
        if self.chances is None:
            return (u * len(self.abar)).long().clamp(max=len(self.abar) - 1)
        summed = self.chances.cumsum(0) / self.chances.sum()
        return torch.searchsorted(summed, u, right=True).clamp(max=len(self.abar) - 1)

    def draw(
        self, clean: Tensor, t: Tensor, noise: Tensor, perturbed: Tensor | None = None
    ) -> Draw:
        """See Objective."""
        abar = self.abar[t]
        signal = wide(abar.sqrt(), clean)
        sigma = to_device((1 - abar).sqrt(), clean.device)
        spread = wide(sigma, clean)
        return Draw(
            noisy=signal * clean + spread * (noise if perturbed is None else perturbed),
            target=self.target(clean, noise, signal, spread),
            noise=noise,
            sigma=sigma,
            timestep=to_device(t.float(), clean.device),
            weight=torch.ones_like(sigma),
        )

    def mix(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """`shares` as [B, 1, …]."""
        signal, spread = self.shares(draw)
        return wide(signal, draw.noisy), wide(spread, draw.noisy)

    def shares(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """See Objective.

        Looked up: near t = T the first is lost in the rounding of ``sqrt(1 - sigma^2)``.
        """
        abar = to_device(self.abar, draw.noisy.device)[draw.timestep.long()]
        return abar.sqrt(), (1 - abar).sqrt()

    @property
    def last(self) -> int:
        """See Objective."""
        return len(self.abar) - 1

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """See Objective."""
        abar = self.abar[t].double()
        return abar.sqrt(), (1 - abar).sqrt()

    def flow_ratio(self, draw: Draw) -> Tensor:
        """See Objective."""
        signal, spread = self.shares(draw)
        return self.ratio(signal, spread)

    def min_snr(self, draw: Draw, gamma: float, soft: bool = False) -> Tensor:
        """See Objective; the weight of the x0 loss that equals the loss of this prediction.

        With signal^2 + spread^2 = 1 all cases are ``gamma share / over``, which has a limit where
        there is no signal.
        """
        signal, spread = (share.square() for share in self.shares(draw))
        capped = gamma * spread
        over = signal + capped if soft else torch.maximum(signal, capped)
        return gamma * self.share(signal, spread) / over

    @abstractmethod
    def share(self, signal: Tensor, spread: Tensor) -> Tensor:
        """signal^2 over what turns an x0 loss into this one; given both squares, [B] each."""

    @abstractmethod
    def ratio(self, signal: Tensor, spread: Tensor) -> Tensor:
        """`flow_ratio` of the shares, [B] each."""

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        """What the denoiser should answer; `signal` and `spread` are [B, 1, …]."""


class Epsilon(VariancePreserving):
    """The denoiser answers the noise (Ho et al. 2020, eq. 14)."""

    def target(self, clean: Tensor, noise: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        """The noise."""
        return noise

    def share(self, signal: Tensor, spread: Tensor) -> Tensor:
        """The x0 loss is the noise loss over the SNR, so ``min(SNR, gamma) / SNR``."""
        return spread

    def ratio(self, signal: Tensor, spread: Tensor) -> Tensor:
        """x0 is off by spread / signal as much, the other way."""
        return (signal + spread) / signal

    def clean(self, draw: Draw, prediction: Tensor) -> Tensor:
        """``(noisy - sqrt(1 - abar) eps) / sqrt(abar)``; not finite where abar is 0."""
        signal, spread = self.mix(draw)
        return (draw.noisy - spread * prediction) / signal


class Clean(VariancePreserving):
    """The denoiser answers the clean latent (Salimans & Ho 2022, section 4)."""

    def target(self, clean: Tensor, noise: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        """The clean latent."""
        return clean.float()

    def share(self, signal: Tensor, spread: Tensor) -> Tensor:
        """It is the x0 loss, so ``min(SNR, gamma)``."""
        return signal

    def ratio(self, signal: Tensor, spread: Tensor) -> Tensor:
        """The noise is off by signal / spread as much, the other way."""
        return (signal + spread) / spread

    def clean(self, draw: Draw, prediction: Tensor) -> Tensor:
        """The prediction."""
        return prediction


class Velocity(VariancePreserving):
    """The denoiser answers ``v = sqrt(abar) noise - sqrt(1 - abar) x0`` (Salimans & Ho 2022)."""

    def target(self, clean: Tensor, noise: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        """The velocity v."""
        return signal * noise - spread * clean

    def share(self, signal: Tensor, spread: Tensor) -> Tensor:
        """The x0 loss is the v loss over SNR + 1, so ``min(SNR, gamma) / (SNR + 1)``."""
        return signal * spread

    def ratio(self, signal: Tensor, spread: Tensor) -> Tensor:
        """The noise is off by the signal's share, x0 by the spread the other way."""
        return signal + spread

    def clean(self, draw: Draw, prediction: Tensor) -> Tensor:
        """``sqrt(abar) noisy - sqrt(1 - abar) v``."""
        signal, spread = self.mix(draw)
        return signal * draw.noisy - spread * prediction


@dataclass(frozen=True)
class Flow:
    """``noisy = (1 - sigma) x0 + sigma noise``; the denoiser answers ``noise - x0``.

    Rectified flow (Liu et al. 2022, arXiv 2209.03003) as Esser et al. 2024 (arXiv 2403.03206) train
    it. A timestep is 1000 sigma and need not be whole.

    Args:
        law: Quantiles, tokens and the offset to sigma.
    """

    law: Law

    def timesteps(self, u: Tensor, tokens: int, offset: float = 0.0) -> Tensor:
        """[B] fp64 in 0 … 1000."""
        return 1000 * self.law(u, tokens, offset)

    def draw(
        self, clean: Tensor, t: Tensor, noise: Tensor, perturbed: Tensor | None = None
    ) -> Draw:
        """See Objective."""
        sigma = to_device((t / 1000).float(), clean.device)
        share, x0 = wide(sigma, clean), clean.float()
        return Draw(
            noisy=(1 - share) * x0 + share * (noise if perturbed is None else perturbed),
            target=noise - x0,
            noise=noise,
            sigma=sigma,
            timestep=1000 * sigma,
            weight=torch.ones_like(sigma),
        )

    def clean(self, draw: Draw, prediction: Tensor) -> Tensor:
        """``noisy - sigma prediction``."""
        return draw.noisy - wide(draw.sigma, draw.noisy) * prediction

    def shares(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """See Objective."""
        return 1 - draw.sigma, draw.sigma

    @property
    def last(self) -> int:
        """See Objective."""
        return 1000

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """See Objective."""
        sigma = t.double() / 1000
        return 1 - sigma, sigma

    def flow_ratio(self, draw: Draw) -> Tensor:
        """1."""
        return torch.ones_like(draw.sigma)

    def min_snr(self, draw: Draw, gamma: float, soft: bool = False) -> Tensor:
        """1: the settings refuse it for flow matching, whose law of noise does that work."""
        return torch.ones_like(draw.sigma)


def objective_of(
    prediction_type: str,
    scheduler_config: Mapping[str, Any],
    settings: DiffusionSettings | None = None,
) -> Objective:
    """The objective of a model.

    Args:
        prediction_type: ``epsilon``, ``v_prediction``, ``sample`` or ``flow_matching``.
        scheduler_config: The family's, for its betas or its shift by size.
        settings: How noise levels are drawn; the defaults without it.

    Raises:
        ConfigError: A prediction type that is not built.
    """
    if prediction_type == "flow_matching":
        return Flow(flow_law(settings or DiffusionSettings(), scheduler_config))
    kinds: dict[str, type[Epsilon | Velocity | Clean]] = {
        "epsilon": Epsilon,
        "v_prediction": Velocity,
        "sample": Clean,
    }
    if prediction_type not in kinds:
        raise ConfigError(
            f"prediction_type {prediction_type!r} is not one of {', '.join(kinds)}, flow_matching",
            fix="set prediction_type to what the model was trained with",
        )
    from diffusers import DDPMScheduler

    # A loaded scheduler's config lists in "_use_default_values" keys that DDPM would then ignore.
    own = {key: value for key, value in scheduler_config.items() if not key.startswith("_")}
    schedule = DDPMScheduler.from_config(own)
    abar = schedule.alphas_cumprod.float()
    return kinds[prediction_type](abar, chances(settings or DiffusionSettings(), len(abar)))
