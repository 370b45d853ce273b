"""Validation pictures, made with the weights as they are saved; their JSON reproduces them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from simpletuner.core.events import Bus, ImagesMade
from simpletuner.core.files import RunFolder, read_json, safe_name, write_json, write_through
from simpletuner.validation.comparison import Row, comparison_sheet
from simpletuner.validation.sampler import Sampler, Shot, open_sampler

if TYPE_CHECKING:
    from simpletuner.adapters.weights import Weights
    from simpletuner.cache.caches import Caches
    from simpletuner.core.types import Embeds, Place
    from simpletuner.models.family import Family
    from simpletuner.validation.prompts import Prompt, Prompts
    from simpletuner.validation.settings import ValidationSettings

    Wanted = tuple[Prompt, int, Shot]

log = logging.getLogger(__name__)

_ROUND = "round"
"""Where a sheet and a recipe keep the digest of the round they belong to."""


@dataclass(frozen=True)
class Validator:
    """Renders every prompt at every resolution.

    Args:
        embeds: The conditioning of prompts, [B, …], by the weights as they are when it is called.
        leaving: True once the run is to end; asked before each picture, and none is begun then.
    """

    family: Family
    weights: Weights
    caches: Caches
    embeds: Callable[[Sequence[str]], Embeds]
    prompts: Prompts
    settings: ValidationSettings
    folder: RunFolder
    place: Place
    bus: Bus
    leaving: Callable[[], bool]

    def sample(self, step: int, *, last: bool = False) -> list[Path]:
        """Write ``step_N_NAME_I_WxH.png`` and ``.json`` for each picture; never stops training.

        After the `last` step, unless the benchmark is disabled, the same pictures of the untouched
        base model go to ``benchmarks/base_model/``, and ``before_after.png`` shows both. Where all
        of that is there already, nothing is made.

        Returns:
            What was made, also where the rest failed or an order to leave came.
        """
        began = time.perf_counter()
        made: list[Path] = []
        try:
            self._sample(step, last, made)
        except Exception as error:  # door 4 of 4: pictures are for looking, the run goes on
            log.exception("validation after step %d failed", step)
            self.bus.notice(f"validation after step {step} failed: {error}", "warning")
        if made:
            self.bus.emit(ImagesMade(step=step, images=made, seconds=time.perf_counter() - began))
        return made

    def _sample(self, step: int, last: bool, made: list[Path]) -> None:
        wanted = list(self._wanted())
        both = last and not self.settings.disable_benchmark
        asked = self._asked(wanted, step)
        if not _shows(self._sheet, asked):  # it is of an earlier run, of other steps or prompts
            self._sheet.unlink(missing_ok=True)
        if not wanted:
            return
        end = self._sheet if both else self._path(wanted[-1], step).with_suffix(".json")
        if last and _shows(end, asked):  # a finished run was started again
            return
        if not self.leaving():
            self._render_all(wanted, (step, None) if both else (step,), asked, made)
        total = len(wanted) * (1 + both)
        if len(made) < total:
            missing = f"; {self._sheet.name} is missing, the next start makes it" if both else ""
            self.bus.notice(
                f"validation after step {step} ended with {len(made)} of {total} pictures: the run"
                f" was asked to leave{missing}"
            )
        elif both:
            made.append(self._compare(made[len(wanted) :], made[: len(wanted)], step, asked))

    def _asked(self, wanted: Sequence[Wanted], step: int) -> str:
        """A digest of what a round shows: the saved weights of its step, and every picture."""
        manifest = self.folder.checkpoint(step) / "manifest.json"
        weights = manifest.read_bytes() if manifest.is_file() else b""
        shots = [
            (prompt.name, prompt.text, prompt.control and prompt.control.name, number, shot)
            for prompt, number, shot in wanted
        ]
        told = repr((step, self.prompts.negative, shots)).encode()
        return blake2b(weights + told, digest_size=16).hexdigest()

    def _render_all(
        self, wanted: Sequence[Wanted], steps: Sequence[int | None], asked: str, made: list[Path]
    ) -> None:
        """The pictures of each step, or with None of the base; those up to an order to leave."""
        trainable = self.weights.trainable
        with (
            self.weights.at("eval"),
            open_sampler(self.family, trainable, self.caches.open_vae, self.place) as sampler,
        ):
            for step in steps:
                with trainable.disabled() if step is None else nullcontext():
                    for each in takewhile(lambda _: not self.leaving(), wanted):
                        self._render(sampler, each, step, asked, made)

    def _wanted(self) -> Iterator[Wanted]:
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

    @property
    def _sheet(self) -> Path:
        return self.folder.root / "before_after.png"

    def _path(self, wanted: Wanted, step: int | None) -> Path:
        prompt, number, shot = wanted
        name = f"{safe_name(prompt.name)}_{number}_{shot.width}x{shot.height}.png"
        if step is None:
            return self.folder.benchmarks / name
        return self.folder.images / f"step_{step}_{name}"

    def _render(
        self, sampler: Sampler, wanted: Wanted, step: int | None, asked: str, made: list[Path]
    ) -> None:
        """Write one picture and its recipe; `step` None is the untouched base model."""
        prompt, _, shot = wanted
        texts = ([prompt.text], [self.prompts.negative])
        image = sampler.picture(shot, *(self.embeds(text) for text in texts), self._control(prompt))
        path = self._path(wanted, step)
        write_through(path, lambda temporary: image.save(temporary, format="PNG"))
        made.append(path)
        recipe = self._recipe(sampler, step, prompt, shot) | {_ROUND: asked}
        write_json(path.with_suffix(".json"), recipe)

    def _control(self, prompt: Prompt) -> Image.Image | None:
        """What a ControlNet sees: what the prompt names, or the first that it was trained with."""
        if self.caches.controls.first is None:
            return None
        if prompt.control is None:
            return self.caches.controls.first.picture(0)
        with Image.open(prompt.control) as image:
            return image.convert("RGB")

    def _compare(self, base: Sequence[Path], made: Sequence[Path], step: int, asked: str) -> Path:
        """Write ``before_after.png``: the first picture of each prompt, and its reference."""
        each = len(base) // len(self.prompts.entries)
        prompts = self.prompts.entries
        before, after = ([Image.open(path) for path in paths[::each]] for paths in (base, made))
        columns: dict[str, list[Image.Image | None]] = {
            "base": [*before],
            f"after {step} steps": [*after],
            "control": [self._control(prompt) for prompt in prompts],
            "reference": [p.reference and Image.open(p.reference) for p in prompts],
        }
        shown = {name: column for name, column in columns.items() if any(column)}
        rows = [
            Row(prompt.text, pictures)
            for prompt, *pictures in zip(prompts, *shown.values(), strict=True)
        ]
        sheet = comparison_sheet(list(shown), rows)
        note = PngInfo()
        note.add_text(_ROUND, asked)
        write_through(
            self._sheet, lambda temporary: sheet.save(temporary, format="PNG", pnginfo=note)
        )
        return self._sheet

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
            **self._control_told(prompt),
            "weights": self._weights_file(step),
            "step": step,
        }

    def _control_told(self, prompt: Prompt) -> dict[str, str]:
        """Where what the ControlNet saw is found again; no paths of this machine."""
        first = self.caches.controls.first
        if first is None:
            return {}
        return {
            "control": prompt.control.name if prompt.control else f"{first.id}: {first.path(0)}"
        }

    def _weights_file(self, step: int | None) -> str | None:
        """The saved weights of this step inside the output folder; None if none were due."""
        if step is None:
            return None
        folder = self.folder.checkpoint(step)
        return f"{folder.name}/{self.weights.trainable.file}" if folder.is_dir() else None


def _shows(path: Path, asked: str) -> bool:
    """True if a sheet or a recipe is there and belongs to the round `asked`."""
    try:
        if path.suffix == ".json":
            return bool(read_json(path).get(_ROUND) == asked)
        with Image.open(path) as sheet:
            return sheet.info.get(_ROUND) == asked
    except (OSError, ValueError):
        return False
