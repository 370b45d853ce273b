"""Everything a run is told, one section for each package that reads it."""

from __future__ import annotations

from simpletuner.adapters.settings import AdapterSettings
from simpletuner.cache.settings import CacheSettings
from simpletuner.config.schedule import ScheduleSettings
from simpletuner.core.section import Section
from simpletuner.data.settings import DataSettings
from simpletuner.diffusion.settings import DiffusionSettings
from simpletuner.models.settings import ModelSettings
from simpletuner.optim.settings import OptimizerSettings
from simpletuner.precision.settings import PrecisionSettings
from simpletuner.publish.settings import PublishSettings
from simpletuner.runtime.settings import RuntimeSettings
from simpletuner.tracking.settings import TrackingSettings
from simpletuner.validation.settings import ValidationSettings


class Config(Section):
    """The settings of a run; on disk its keys are flat, for each is unique among all sections."""

    model: ModelSettings
    """The base model."""

    adapter: AdapterSettings = AdapterSettings()
    """What is trained."""

    data: DataSettings = DataSettings()
    """What holds for every dataset."""

    cache: CacheSettings = CacheSettings()
    """The caches on disk."""

    schedule: ScheduleSettings = ScheduleSettings()
    """Steps, epochs, batches and checkpoints."""

    optimizer: OptimizerSettings = OptimizerSettings()
    """The optimizer and the learning rate."""

    diffusion: DiffusionSettings = DiffusionSettings()
    """The training objective."""

    precision: PrecisionSettings = PrecisionSettings()
    """Dtypes, quantisation, attention and memory."""

    validation: ValidationSettings = ValidationSettings()
    """Validation pictures and scores."""

    tracking: TrackingSettings = TrackingSettings()
    """Trackers and webhooks."""

    publish: PublishSettings = PublishSettings()
    """Uploads."""

    runtime: RuntimeSettings = RuntimeSettings()
    """The run's folder, seed and processes."""
