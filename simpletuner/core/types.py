"""The values that cross packages.

Letters: B batch, C channels, F frames, H W height width, L tokens, D width; *S = H,W or F,H,W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Embeds = Mapping[str, Tensor | tuple[Tensor, ...]]
    """Text conditioning by the pipeline's own argument names; ragged outputs stay tuples."""


@dataclass(frozen=True)
class Place:
    """Where and in what dtype the model runs, and which share of the work is ours."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1

    def autocast(self) -> AbstractContextManager[object]:
        """Autocast for one forward: a longer block would keep stale copies of the adapters."""
        import torch

        if self.dtype == torch.float32 or self.device.type == "meta":
            return nullcontext()
        context: AbstractContextManager[object] = torch.autocast(self.device.type, self.dtype)
        return context


@dataclass(frozen=True)
class Geometry:
    """What happened to a picture between its file and the encoder; all sizes (width, height) in px.

    Args:
        source: The oriented size of the file.
        resize: The size after the one resize.
        crop: Left, top, width, height of the box cut out of the resized picture.
        flip: Mirrored left to right, after the crop.
    """

    source: tuple[int, int]
    resize: tuple[int, int]
    crop: tuple[int, int, int, int]
    flip: bool = False

    @property
    def numbers(self) -> tuple[int, ...]:
        """All of it, in the order of its fields."""
        return (*self.source, *self.resize, *self.crop, int(self.flip))

    @property
    def target(self) -> tuple[int, int]:
        """The size that is encoded."""
        return self.crop[2], self.crop[3]


@dataclass(frozen=True)
class Sample:
    """One draw of one picture.

    Args:
        id: Content digest, 32 hex digits: what noise and dropout are keyed by.
        dataset: The dataset's id.
        path: Relative path inside the dataset, for messages.
        caption: As drawn: after choice among variants, prefix and dropout (``""`` when dropped).
        geometry: What was done to the picture.
        occurrence: The how-manieth time this sample is drawn in this epoch, from 0.
        masked: Its mask is applied to its loss.
        regularises: It is trained towards what the untouched base model says of it.
        timestep_offset: Moves the law that its timestep is drawn from; below 0 to less noise.
    """

    id: str
    dataset: str
    path: str
    caption: str
    geometry: Geometry
    occurrence: int = 0
    masked: bool = False
    regularises: bool = False
    timestep_offset: float = 0.0


@dataclass(frozen=True)
class Draw:
    """One random corruption of a clean batch, all fp32.

    Args:
        noisy: [B, C, *S], what the denoiser sees.
        target: [B, C, *S], what it should answer.
        noise: [B, C, *S].
        sigma: [B], the standard deviation of the noise in `noisy`.
        timestep: [B], what the denoiser is told, in 0..1000.
        weight: [B], the loss weight of the objective (1 unless a law says otherwise).
    """

    noisy: Tensor
    target: Tensor
    noise: Tensor
    sigma: Tensor
    timestep: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Batch:
    """Samples of one shape, ready to be trained on.

    Args:
        latents: [B, C, *S] fp32, scaled as the denoiser expects them.
        embeds: Text conditioning of the B captions.
        samples: The B draws.
        mask: [B, 1, *S] fp32 in 0..1, a factor on the loss of each cell; None for 1.
        references: Reference latents of edit models.
        controls: Control inputs by the own argument names of the denoiser or its ControlNet.
    """

    latents: Tensor
    embeds: Embeds
    samples: tuple[Sample, ...]
    mask: Tensor | None = None
    references: tuple[Tensor, ...] = ()
    controls: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def regularises(self) -> bool:
        """Its target is the base model's own prediction; a batch is of one dataset."""
        return any(sample.regularises for sample in self.samples)

    @property
    def timestep_offset(self) -> float:
        """That of its samples; a batch is of one dataset."""
        return self.samples[0].timestep_offset

    def pinned(self) -> Batch:
        """The batch in memory a CUDA device can copy from while the CPU goes on."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, place: Place) -> Batch:
        """The batch on `place`: latents stay fp32, text conditioning takes the model's dtype."""
        moved = self._each(lambda tensor: to_device(tensor, place.device))
        return replace(moved, embeds=_cast(moved.embeds, place.dtype))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        embeds = {
            name: tuple(change(v) for v in value) if isinstance(value, tuple) else change(value)
            for name, value in self.embeds.items()
        }
        mask = None if self.mask is None else change(self.mask)
        controls = {name: change(value) for name, value in self.controls.items()}
        latents = change(self.latents)
        return replace(self, latents=latents, embeds=embeds, mask=mask, controls=controls)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; the CPU does not wait for a copy to a CUDA device.

    Only a copy from pinned memory goes on by itself; torch keeps that memory until it is done.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def wide(values: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, …] on the device of `like` [B, …]."""
    moved = to_device(values, like.device)
    return moved.view(-1, *[1] * (like.ndim - 1))


def _cast(embeds: Embeds, dtype: torch.dtype) -> Embeds:
    """`embeds` with its floating tensors in `dtype`."""

    def cast(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    return {
        name: tuple(cast(v) for v in value) if isinstance(value, tuple) else cast(value)
        for name, value in embeds.items()
    }


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share their optimizer settings.

    Args:
        name: For the log.
        parameters: By name, in a stable order.
        decay: False keeps weight decay off them.
        lr_scale: Multiplies the learning rate.
        text: They are of text encoders, which may have a learning rate of their own.
        whole: They train whole beside adapters, and may have one too.
    """

    name: str
    parameters: Mapping[str, torch.nn.Parameter]
    decay: bool = True
    lr_scale: float = 1.0
    text: bool = False
    whole: bool = False


@dataclass(frozen=True)
class PlannedBatch:
    """One micro-batch of the plan: which rows of which dataset, and what they weigh.

    Args:
        source: Index of the dataset in the plan's order.
        rows: Row numbers in that dataset's index, one per sample of this rank.
        occurrences: Which pass of the epoch each row belongs to (0 … repeats).
        weights: 1.0 for a real sample, 0.0 for a ghost that only keeps shapes equal across ranks.
        positions: Place of each sample in the whole window of all ranks, 0 … window_samples − 1.
        window_samples: Real samples in the whole window: what the loss sum is divided by.
        epoch: What its draws are keyed by: no draw of a dataset comes twice in one. Counts from 0
            with the run's epochs, also with those cut short, or under mix with the dataset's own.
    """

    source: int
    rows: tuple[int, ...]
    occurrences: tuple[int, ...]
    weights: tuple[float, ...]
    positions: tuple[int, ...]
    window_samples: int
    epoch: int
