"""A run, from its settings to the saved LoRA, in one straight line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.adapters import controlnet, named
from simpletuner.adapters.ema import Ema
from simpletuner.adapters.method import attach
from simpletuner.adapters.preset import with_preset
from simpletuner.adapters.weights import Weights
from simpletuner.core.errors import RESUME, TrainingError, is_out_of_memory
from simpletuner.core.files import put_in_place
from simpletuner.core.seeds import Seeds
from simpletuner.data.opening import open_sources
from simpletuner.data.plan import BatchPlan
from simpletuner.data.report import DataReport
from simpletuner.models.encoders import TextEncoders
from simpletuner.models.loading import open_family
from simpletuner.optim.build import build_optimizer
from simpletuner.precision import offload
from simpletuner.precision.dtypes import run_dtype
from simpletuner.precision.fit import fit
from simpletuner.precision.quantise import Quantiser
from simpletuner.precision.scaling import Scaler
from simpletuner.runtime.runtime import Runtime
from simpletuner.training.checkpoint import Checkpointer
from simpletuner.training.control import Control
from simpletuner.training.held import opened_at
from simpletuner.training.identity import starting_state
from simpletuner.training.precompute import precompute
from simpletuner.training.prefetch import Prefetcher
from simpletuner.training.report import Report
from simpletuner.training.stepper import Stepper
from simpletuner.training.timetable import Timetable
from simpletuner.training.trainer import Trainer
from simpletuner.validation.prompts import Prompts
from simpletuner.validation.validator import Validator

if TYPE_CHECKING:
    from simpletuner.adapters.method import Trainable, Verified
    from simpletuner.adapters.settings import AdapterSettings
    from simpletuner.config.root import Config
    from simpletuner.core.events import Bus
    from simpletuner.core.files import RunFolder
    from simpletuner.core.types import Place
    from simpletuner.data.settings import Datasets
    from simpletuner.data.source import DataSource
    from simpletuner.models.family import Family


def train(config: Config, datasets: Datasets, folder: RunFolder, bus: Bus) -> Path:
    """Train as `config` says and leave the result in `folder`.

    Returns:
        The weights a user loads elsewhere.

    Raises:
        SimpleTunerError: Of the kind that failed; what was saved before stays.
    """
    with Control() as control:
        try:
            return _train(config, datasets, folder, bus, control)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"the memory is full: {str(error).splitlines()[0] if str(error) else 'of the CPU'}",
                fix=f"{_less_memory(config)}; {RESUME}",
            ) from error


def _less_memory(config: Config) -> str:
    """What is left to do against a full memory; what keeps the plan of the run comes first."""
    precision, smaller = config.precision, "resolution"
    keep = ["gradient_checkpointing true"] * (not precision.gradient_checkpointing)
    keep += ["mixed_precision bf16"] * (precision.mixed_precision == "no")
    if config.schedule.train_batch_size > 1:
        smaller = "train_batch_size or resolution"
    first = f"set {' and '.join(keep)}; if that is not enough, " if keep else ""
    return f"{first}lower {smaller} and start again with --on_data_change continue"


def _planned(
    config: Config, sources: Sequence[DataSource], seeds: Seeds, place: Place
) -> tuple[BatchPlan, Timetable]:
    """What is drawn in which step, and when the run ends.

    Raises:
        DataError: In some step there is nothing to draw.
    """
    plan = BatchPlan.of(
        sources,
        **config.schedule.window_shape,
        data_backend_sampling=config.data.data_backend_sampling,
        seeds=seeds,
        world=place.world,
    )
    timetable = Timetable.of(config.schedule, config.validation, plan.steps)
    plan.check_covers(timetable.total_steps)
    return plan, timetable


def _train(
    config: Config, datasets: Datasets, folder: RunFolder, bus: Bus, control: Control
) -> Path:
    # 1. the machine and the randomness
    precision = config.precision
    place = Runtime.start(run_dtype(precision), tf32=not precision.disable_tf32).place
    seeds = Seeds(config.runtime.seed)
    # 2. the data and the model, and everything that text encoders and VAE have to do
    root = config.cache.root(folder.root)
    batch = config.schedule.train_batch_size
    found = open_sources(datasets, index_folder=root / "index", train_batch_size=batch, bus=bus)
    drawn = len(datasets.training)  # of them; those behind are kept to measure by
    planned = _planned(config, found[:drawn], seeds, place)  # refused before anything is encoded
    bus.notice("\n".join(DataReport.of(found, planned[0]).lines()))
    family = open_family(config.model, digests=root / "digests.json")
    _check_what_trains(family, config.adapter)
    prompts = Prompts.of(config.validation)
    quantiser = Quantiser(config.precision)
    caches = precompute(
        *(family, found, prompts, datasets, config.cache, quantiser, seeds, place, bus),
        trains_text=config.adapter.train_text_encoder,
    )
    # 3. the plan: which samples each step sees, and when the run ends
    sources = caches.sources[:drawn]
    same = sources == tuple(found[:drawn])  # all of it could be encoded
    plan, timetable = planned if same else _planned(config, sources, seeds, place)
    # 4. the denoiser with what trains on it
    weights, encoders = _weights(config, family, quantiser, seeds, place)
    trainable = weights.trainable
    # 5. where the run stands
    state = starting_state(config, family, plan, sources, timetable.total_steps, place)
    report = Report(config, datasets, family, trainable, quantiser.told, folder, bus)
    limit = config.schedule.checkpoints_total_limit
    saver = Checkpointer(folder, state, weights, limit, report.metadata, bus)
    resumed = saver.resume(
        config.schedule.resume_from_checkpoint, on_data_change=config.schedule.on_data_change
    )
    report.started(sources, plan, timetable, state, place, resumed)
    # 6. the loop
    stepper = Stepper.of(
        place, family, weights, config.diffusion, config.optimizer, timetable.total_steps, seeds
    )
    validator = Validator(
        *(family, weights, caches, encoders.shown if encoders else caches.embeds, prompts),
        *(config.validation, folder, place, bus, control.leaving),
    )
    duties = {
        "checkpoint": saver.save,
        "validate": lambda state: validator.sample(state.step, last=timetable.ends(state.step)),
    }
    prefetching = closing(Prefetcher(plan, caches, place, timetable.total_steps))
    with control.deferred(), closing(caches), prefetching as prefetcher:
        Trainer(stepper, plan, prefetcher, timetable, duties, control, bus).run(state)
    # 7. the result, read back by the stock loader before it replaces an earlier one
    with weights.at("eval"):
        file, verified = _export(trainable, folder, report.metadata(state))
    report.finished(state, file, verified)
    return file


def _check_what_trains(family: Family, adapter: AdapterSettings) -> None:
    """Refuse what this model has nothing for, before anything is encoded."""
    controlnet.check(family, adapter)
    named.check(family, adapter)


def _weights(
    config: Config, family: Family, quantiser: Quantiser, seeds: Seeds, place: Place
) -> tuple[Weights, TextEncoders | None]:
    """The denoiser with what trains on it and what moves that; text encoders if they train."""
    adapter = config.adapter
    shrink = with_preset(adapter, family, quantiser)
    denoiser = family.open_denoiser(opened_at(config, place), shrink)
    trains_text = adapter.train_text_encoder
    encoders = TextEncoders.opened(family, place, quantiser) if trains_text else None
    seeds.reseed_torch("adapter")
    trainable = attach(denoiser, family, adapter, encoders)
    fit(trainable.modules, config.precision, place.device)
    optimizer = build_optimizer(config.optimizer, trainable.groups(), seeds)
    average = Ema.of(trainable.parameters(), adapter)
    return Weights(trainable, optimizer, average, Scaler.of(place.dtype, place.device)), encoders


def _export(
    trainable: Trainable, folder: RunFolder, metadata: Mapping[str, str]
) -> tuple[Path, Verified]:
    """Write the user's files; none replaces an earlier one before the first was read back."""
    offload.release(trainable.modules)
    with folder.writing("the weights"), folder.staging() as staging:
        written, *others = trainable.export(staging, metadata)
        verified = trainable.verify(written)
        for each in (*others, written):
            put_in_place(each, folder.root / each.name)
        return folder.root / written.name, verified
