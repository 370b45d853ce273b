"""Validation pictures, made with the weights as they are saved; their JSON reproduces them."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.adapters.export import LORA_FILE
from simpletuner.core.events import Bus, ImagesMade
from simpletuner.core.files import RunFolder, safe_name, write_json, write_through
from simpletuner.validation.sampler import Sampler, Shot, open_sampler

if TYPE_CHECKING:
    from simpletuner.adapters.weights import Weights
    from simpletuner.cache.caches import Caches
    from simpletuner.core.types import Place
    from simpletuner.models.family import Family
    from simpletuner.validation.prompts import Prompt, Prompts
    from simpletuner.validation.settings import ValidationSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Validator:
    """Renders every prompt at every resolution."""

    family: Family
    weights: Weights
    caches: Caches
    prompts: Prompts
    settings: ValidationSettings
    folder: RunFolder
    place: Place
    bus: Bus

    def sample(self, step: int) -> list[Path]:
        """Write ``step_N_NAME_I_WxH.png`` and ``.json`` for each picture; never stops training."""
        began = time.perf_counter()
        try:
            made = self._sample(step)
        except Exception as error:  # door 4 of 4: pictures are for looking, the run goes on
            log.exception("validation after step %d failed", step)
            self.bus.notice(f"validation after step {step} failed: {error}", "warning")
            return []
        if made:
            self.bus.emit(ImagesMade(step=step, images=made, seconds=time.perf_counter() - began))
        return made

    def _sample(self, step: int) -> list[Path]:
        if not self.prompts.entries:
            return []
        denoiser = self.weights.trainable.denoiser
        with (
            self.weights.at("eval"),
            open_sampler(self.family, denoiser, self.caches.open_vae, self.place) as sampler,
        ):
            return [
                self._render(sampler, step, prompt, number, size)
                for prompt in self.prompts.entries
                for size in self.settings.validation_resolution
                for number in range(self.settings.num_validation_images)
            ]

    def _render(
        self, sampler: Sampler, step: int, prompt: Prompt, number: int, size: tuple[int, int]
    ) -> Path:
        chosen = self.settings.validation_seed
        shot = Shot(
            width=size[0],
            height=size[1],
            seed=(self.caches.seeds.seed if chosen is None else chosen) + number,
            guidance=self.settings.validation_guidance,
            num_inference_steps=self.settings.validation_num_inference_steps,
        )
        image = sampler.picture(
            shot, self.caches.embeds([prompt.text]), self.caches.embeds([self.prompts.negative])
        )
        name = f"step_{step}_{safe_name(prompt.name)}_{number}_{size[0]}x{size[1]}"
        path = self.folder.images / f"{name}.png"
        write_through(path, lambda temporary: image.save(temporary, format="PNG"))
        write_json(path.with_suffix(".json"), self._recipe(sampler, step, prompt, shot))
        return path

    def _recipe(self, sampler: Sampler, step: int, prompt: Prompt, shot: Shot) -> dict[str, Any]:
        """Everything that makes the picture again with the stock pipeline."""
        told = self.family.prompt_arguments
        return {
            **{name: value for name, value in told.items() if value is not None},
            "text_options": dict(self.family.text_options),
            "prompt": prompt.text,
            "negative_prompt": self.prompts.negative,
            "width": shot.width,
            "height": shot.height,
            "seed": shot.seed,
            "generator_device": "cpu",
            "guidance_scale": shot.guidance,
            "num_inference_steps": shot.num_inference_steps,
            "scheduler": sampler.scheduler,
            **self.family.checkpoint.facts,
            **sampler.facts,
            "weights": self._weights_file(step),
            "step": step,
        }

    def _weights_file(self, step: int) -> str | None:
        """The saved weights of this step inside the output folder; None if none were due."""
        folder = self.folder.checkpoint(step)
        return f"{folder.name}/{LORA_FILE}" if folder.is_dir() else None
