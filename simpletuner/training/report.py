"""What a run says of itself: its summary, run.json, the weights' header, the closing block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from simpletuner.adapters.export import lora_file
from simpletuner.core.events import Bus, RunFinished, RunStarted
from simpletuner.core.files import RunFolder, write_json
from simpletuner.core.section import hint_of
from simpletuner.models.embedded import embedded_folder
from simpletuner.precision.plan import plan_lines
from simpletuner.training.header import header_facts
from simpletuner.training.precision_plan import precision_plan

if TYPE_CHECKING:
    from pathlib import Path

    from simpletuner.adapters.method import Trainable, Verified
    from simpletuner.config.root import Config
    from simpletuner.core.section import Section
    from simpletuner.core.types import Place
    from simpletuner.data.plan import BatchPlan
    from simpletuner.data.settings import Datasets
    from simpletuner.data.source import DataSource
    from simpletuner.models.family import Family
    from simpletuner.precision.quantise import Quantised
    from simpletuner.training.state import TrainState
    from simpletuner.training.timetable import Timetable


class Report:
    """Tells the bus and the output folder what runs and how it ended."""

    def __init__(
        self,
        config: Config,
        datasets: Datasets,
        family: Family,
        trainable: Trainable,
        held: Mapping[str, Quantised],
        folder: RunFolder,
        bus: Bus,
    ) -> None:
        self._config, self._datasets, self._family, self._held = config, datasets, family, held
        self._trainable, self._folder, self._bus = trainable, folder, bus
        self._facts: dict[str, Any] = {}
        self._sources: Sequence[DataSource] = ()
        self._header: Mapping[str, str] = {}

    def metadata(self, state: TrainState) -> dict[str, str]:
        """The header of the user's weights: facts for the reader, no paths, no secrets."""
        if not self._header:
            self._header = header_facts(
                *(self._config, self._datasets, self._family, self._sources, state),
                self._folder.root.resolve().name,
            )
        moved = {"steps": state.step, "ss_steps": state.step, "ss_epoch": state.epoch + 1}
        told = {**self._header, **self._trainable.facts}
        return told | {name: str(value) for name, value in moved.items()}

    def started(
        self,
        sources: Sequence[DataSource],
        plan: BatchPlan,
        timetable: Timetable,
        state: TrainState,
        place: Place,
        resumed: Path | None,
    ) -> None:
        """Write resolved_config.json and run.json, and tell what was resolved."""
        self._sources = sources
        summary = self._summary(sources, plan, timetable, place)
        if resumed is not None:
            summary["resumed"] = f"{resumed.name}, {state.step} steps done"
        held = precision_plan(self._config, self._family, self._trainable, self._held)
        self._facts = {
            "versions": dict(state.versions),
            "summary": summary,
            "precision": [asdict(row) for row in held],
            "result": None,
        }
        with self._folder.writing(self._folder.resolved_config.name):
            write_json(self._folder.resolved_config, self._resolved())
        self._write_facts()
        self._bus.emit(
            RunStarted(
                summary=summary, total_steps=timetable.total_steps, first_step=state.step + 1
            )
        )
        self._bus.notice("\n".join(plan_lines(held)))
        drawn = plan.seen(timetable.total_steps)
        for number, source in enumerate(sources):
            if number not in drawn:
                self._bus.notice(f"dataset {source.id} is not drawn from in this run", "warning")
        if state.step >= timetable.total_steps:
            self._bus.notice(
                f"this run is finished: {state.step} of {timetable.total_steps} steps are done;"
                " raise max_train_steps or num_train_epochs to go on"
            )

    def _summary(
        self,
        sources: Sequence[DataSource],
        plan: BatchPlan,
        timetable: Timetable,
        place: Place,
    ) -> dict[str, str]:
        config = self._config
        weights = list(self._trainable.parameters().values())
        optimizer = config.optimizer
        rates = {
            "the text encoders": optimizer.text_encoder_lr,
            "trainable_models": optimizer.trainable_models_lr,
        }
        own = ", ".join(f"{rate:g} for {what}" for what, rate in rates.items() if rate)
        data = ", ".join(
            f"{s.id}: {len(s)} pictures in {len({tuple(b) for b in s.buckets.tolist()})} shapes"
            for s in sources
        )
        return {
            "model": f"{self._family.title}, {self._family.checkpoint.label},"
            f" {self._family.prediction_type}",
            "method": f"{self._trainable.summary},"
            f" {len(weights)} tensors, {sum(p.numel() for p in weights):,} weights",
            "data": data,
            "schedule": f"{timetable.total_steps} steps of"
            f" {config.schedule.train_batch_size} x {config.schedule.gradient_accumulation_steps},"
            f" {_pace(plan)}",
            "optimizer": f"{optimizer.optimizer}, learning rate {optimizer.learning_rate:g}"
            f"{f' ({own})' * bool(own)}, {optimizer.lr_scheduler}",
            "precision": f"{str(place.dtype).removeprefix('torch.')} on {place.device},"
            f" trained in {str(weights[0].dtype).removeprefix('torch.')};"
            f" {self._held[self._family.denoiser]}",
            "output": str(self._folder.root),
        }

    def _resolved(self) -> dict[str, Any]:
        """Every setting as the run uses it: what was left open is filled in."""
        config = self._config
        settings: dict[str, Any] = {}
        for section in dict(config).values():
            settings |= _settings_in_use(section)
        settings["lora_alpha"] = config.adapter.lora_alpha or config.adapter.lora_rank
        settings["prediction_type"] = self._family.prediction_type
        settings["pretrained_model_name_or_path"] = (
            config.model.pretrained_model_name_or_path or self._family.checkpoint.label
        )
        if config.validation.validation_seed is None:
            settings["validation_seed"] = config.runtime.seed
        return {
            "settings": settings,
            "datasets": [_settings_in_use(entry) for entry in self._datasets.pictures],
            "paired": {
                name: [each.model_dump(mode="json", include=_OF_PAIRED) for each in entries]
                for name, entries in self._datasets.paired.items()
            },
            "text_embeds": _settings_in_use(self._datasets.text_embeds),
            "captions": {name: each.id for name, each in self._datasets.captions.items()},
        }

    def finished(self, state: TrainState, file: Path, verified: Verified) -> None:
        """Complete run.json and tell the closing block; its last line says what was verified."""
        self._facts["result"] = {
            "weights": file.name,
            "steps": state.step,
            "samples_seen": state.samples_seen,
            "skipped_steps": state.skipped,
            "verified": str(verified),
            "largest_relative_error": verified.largest_error,
        }
        self._write_facts()
        lines = [f"weights: {file}", *self._usage(), str(verified)]
        self._bus.emit(
            RunFinished(step=state.step, weights=file, verified=str(verified), lines=lines)
        )

    def _write_facts(self) -> None:
        with self._folder.writing(self._folder.run.name):
            write_json(self._folder.run, self._facts)

    def _usage(self) -> list[str]:
        checkpoint = self._family.checkpoint
        named = self._config.model.pretrained_model_name_or_path or checkpoint.label
        base = (
            checkpoint.folder if embedded_folder(named) else named
        )  # diffusers knows no such name
        lines = self._trainable.usage(str(base), self._folder.root)
        adapter = self._config.adapter
        if (preset := adapter.preset_lora_path) and adapter.trains != "full":  # which holds it
            place = next(i for i, line in enumerate(lines) if line.startswith("pipe = ")) + 1
            file = lora_file(preset)
            lines[place:place] = [
                f'pipe.load_lora_weights("{file.parent}", weight_name="{file.name}")',
                "pipe.fuse_lora()",
                "pipe.unload_lora_weights()",
            ]
        lines += self._family.sampler_usage()
        return ["use them:", *(f"  {line}" for line in lines)]


def _pace(plan: BatchPlan) -> str:
    """How many steps an epoch has, and where that changes."""
    first, *others = plan.phases.all
    changes = [f"{phase.windows} from step {phase.first + 1} on" for phase in others]
    return ", ".join([f"{first.windows} steps an epoch", *changes])


def _settings_in_use(section: Section) -> dict[str, Any]:
    """Every value of a section that something reads, as JSON values."""
    fields = type(section).model_fields
    values = section.model_dump(mode="json")
    return {key: values[key] for key, field in fields.items() if hint_of(field).pending is not True}


_OF_PAIRED = {"id", "conditioning_type", "instance_data_dir"}
