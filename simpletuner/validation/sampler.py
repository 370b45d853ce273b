"""One picture from the stock pipeline on cached text conditioning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import ImageOps

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from simpletuner.adapters.method import Trainable
    from simpletuner.core.types import Embeds, Place
    from simpletuner.models.family import Family


@dataclass(frozen=True)
class Shot:
    """What is asked of the pipeline for one picture; sizes in px."""

    width: int
    height: int
    seed: int
    guidance: float
    num_inference_steps: int


class Sampler:
    """The stock pipeline around the live denoiser; held open for one round of pictures."""

    def __init__(self, pipe: Any, family: Family, place: Place) -> None:
        self._pipe, self._family, self._place = pipe, family, place

    @property
    def scheduler(self) -> dict[str, Any]:
        """The scheduler's class and configuration."""
        scheduler = self._pipe.scheduler
        return {"class": type(scheduler).__name__, **dict(scheduler.config)}

    @property
    def facts(self) -> dict[str, str]:
        """The stock pipeline's class, and the dtypes of denoiser and VAE."""
        return {
            "pipeline": type(self._pipe).__name__,
            "dtype": str(self._place.dtype).removeprefix("torch."),
            "vae_dtype": str(self._pipe.vae.dtype).removeprefix("torch."),
        }

    def picture(
        self, shot: Shot, embeds: Embeds, negative: Embeds, control: Image | None = None
    ) -> Image:
        """Render one picture.

        The noise is drawn on the CPU from the shot's seed, as the stock pipeline does with such a
        generator.

        Args:
            control: What a ControlNet sees; cut to the middle if it has another shape.
        """
        arguments = self._family.sampler_arguments(
            self._move(embeds), self._move(negative), shot.width, shot.height
        )
        if control is not None:
            assert self._family.control is not None, "a net was opened for this family"
            size = (shot.width, shot.height)
            arguments[self._family.control.argument] = ImageOps.fit(control, size)
            torch.manual_seed(shot.seed)  # which a pipeline encodes the control picture by
        with torch.no_grad(), self._place.autocast():
            output = self._pipe(
                **arguments,
                guidance_scale=shot.guidance,
                num_inference_steps=shot.num_inference_steps,
                generator=torch.Generator("cpu").manual_seed(shot.seed),
                output_type="latent",
            ).images
        latents = self._family.sampled_latents(output, shot.width, shot.height)
        # outside autocast, which would decode in the model's dtype whatever the VAE's is
        pixels = self._family.decode_latents(self._pipe.vae, latents)
        image: Image = self._pipe.image_processor.postprocess(pixels, output_type="pil")[0]
        return image

    def _move(self, embeds: Embeds) -> dict[str, Tensor]:
        return {
            name: value.to(
                self._place.device, self._place.dtype if value.is_floating_point() else None
            )
            for name, value in embeds.items()
            if not isinstance(value, tuple)
        }


@contextmanager
def open_sampler(
    family: Family, trainable: Trainable, open_vae: Callable[[], nn.Module], place: Place
) -> Iterator[Sampler]:
    """A Sampler with the VAE loaded; frees it afterwards."""
    vae = open_vae()
    pipe = trainable.open_sampler(family, vae)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield Sampler(pipe, family, place)
    finally:
        del pipe, vae
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
