"""Validation pictures, made with the weights as they are saved; their JSON reproduces them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from simpletuner.adapters.export import LORA_FILE
from simpletuner.core.events import Bus, ImagesMade
from simpletuner.core.files import RunFolder, safe_name, write_json, write_through
from simpletuner.validation.comparison import Row, comparison_sheet
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
    """Renders every prompt at every resolution.

    Args:
        leaving: True once the run is to end; asked before each picture, and none is begun then.
    """

    family: Family
    weights: Weights
    caches: Caches
    prompts: Prompts
    settings: ValidationSettings
    folder: RunFolder
    place: Place
    bus: Bus
    leaving: Callable[[], bool]

    def sample(self, step: int, *, last: bool = False) -> list[Path]:
        """Write ``step_N_NAME_I_WxH.png`` and ``.json`` for each picture; never stops training.

        After the `last` step, unless the benchmark is disabled, the same pictures of the untouched
        base model go to ``benchmarks/base_model/``, and ``before_after.png`` shows both.
        """
        began = time.perf_counter()
        try:
            made = self._sample(step, last=last)
        except Exception as error:  # door 4 of 4: pictures are for looking, the run goes on
            log.exception("validation after step %d failed", step)
            self.bus.notice(f"validation after step {step} failed: {error}", "warning")
            return []
        if made:
            self.bus.emit(ImagesMade(step=step, images=made, seconds=time.perf_counter() - began))
        return made

    def _sample(self, step: int, *, last: bool) -> list[Path]:
        if not self.prompts.entries:
            return []
        trainable, wanted = self.weights.trainable, list(self._wanted())
        both = last and not self.settings.disable_benchmark
        base: list[Path] = []
        with (
            self.weights.at("eval"),
            open_sampler(
                self.family, trainable.denoiser, self.caches.open_vae, self.place
            ) as sampler,
        ):
            made = self._round(sampler, wanted, step)
            if both:
                with trainable.disabled():
                    base = self._round(sampler, wanted, None)
        total, done = len(wanted) * (1 + both), len(made) + len(base)
        if done < total:
            self.bus.notice(
                f"validation after step {step} ended with {done} of {total} pictures: the run was"
                " asked to leave"
            )
        elif both:
            return [*made, *base, self._compare(base, made, step)]
        return [*made, *base]

    def _round(
        self, sampler: Sampler, wanted: Sequence[tuple[Prompt, int, Shot]], step: int | None
    ) -> list[Path]:
        """The pictures of a step, or with None of the base; those up to an order to leave."""
        begun = takewhile(lambda _: not self.leaving(), wanted)
        return [self._render(sampler, each, step) for each in begun]

    def _wanted(self) -> Iterator[tuple[Prompt, int, Shot]]:
        """Every picture of a round: its prompt, its number, and what is asked of the pipeline."""
        chosen = self.settings.validation_seed
        seed = self.caches.seeds.seed if chosen is None else chosen
        for prompt in self.prompts.entries:
            for width, height in self.settings.validation_resolution:
                for number in range(self.settings.num_validation_images):
                    yield (
                        prompt,
                        number,
                        Shot(
                            width=width,
                            height=height,
                            seed=seed + number,
                            guidance=self.settings.validation_guidance,
                            num_inference_steps=self.settings.validation_num_inference_steps,
                        ),
                    )

    def _render(self, sampler: Sampler, wanted: tuple[Prompt, int, Shot], step: int | None) -> Path:
        """Write one picture and its recipe; `step` None is the untouched base model."""
        prompt, number, shot = wanted
        image = sampler.picture(
            shot, self.caches.embeds([prompt.text]), self.caches.embeds([self.prompts.negative])
        )
        name = f"{safe_name(prompt.name)}_{number}_{shot.width}x{shot.height}.png"
        if step is None:
            path = self.folder.benchmarks / name
        else:
            path = self.folder.images / f"step_{step}_{name}"
        write_through(path, lambda temporary: image.save(temporary, format="PNG"))
        write_json(path.with_suffix(".json"), self._recipe(sampler, step, prompt, shot))
        return path

    def _compare(self, base: Sequence[Path], made: Sequence[Path], step: int) -> Path:
        """Write ``before_after.png``: the first picture of each prompt, and its reference."""
        each = len(base) // len(self.prompts.entries)
        columns = ["base", f"after {step} steps"]
        if any(prompt.reference for prompt in self.prompts.entries):
            columns.append("reference")
        rows = []
        for prompt, before, after in zip(
            self.prompts.entries, base[::each], made[::each], strict=True
        ):
            shown = (before, after, prompt.reference)[: len(columns)]
            pictures = tuple(None if path is None else Image.open(path) for path in shown)
            rows.append(Row(prompt.text, pictures))
        sheet = comparison_sheet(columns, rows)
        path = self.folder.root / "before_after.png"
        write_through(path, lambda temporary: sheet.save(temporary, format="PNG"))
        return path

    def _recipe(
        self, sampler: Sampler, step: int | None, prompt: Prompt, shot: Shot
    ) -> dict[str, Any]:
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

    def _weights_file(self, step: int | None) -> str | None:
        """The saved weights of this step inside the output folder; None if none were due."""
        if step is None:
            return None
        folder = self.folder.checkpoint(step)
        return f"{folder.name}/{LORA_FILE}" if folder.is_dir() else None
