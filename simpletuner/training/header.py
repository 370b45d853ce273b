"""What stands in the header of the user's weights: facts for the reader, no paths, no secrets.

Two vocabularies: ModelSpec (github.com/Stability-AI/ModelSpec), and the ``ss_`` fields of kohya's
scripts, which LoRA managers and A1111 show.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simpletuner.config.root import Config
    from simpletuner.data.settings import Datasets
    from simpletuner.data.source import DataSource
    from simpletuner.models.family import Family
    from simpletuner.training.state import TrainState

_MOST_TAGS = 500


def header_facts(
    config: Config,
    datasets: Datasets,
    family: Family,
    sources: Sequence[DataSource],
    state: TrainState,
    name: str,
) -> dict[str, str]:
    """The facts of a run at a step.

    Args:
        sources: What is trained on.
        name: What the run is called.
    """
    training = [e for e in datasets.training if not e.is_regularisation_data]
    words = (_prompts(entry.trigger_word or entry.instance_prompt) for entry in training)
    facts: dict[str, Any] = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.architecture}/{config.adapter.trains}",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": _resolution(sources),
        "modelspec.prediction_type": family.prediction_type,
        "modelspec.trigger_phrase": ", ".join(sorted({word for each in words for word in each})),
        "modelspec.comment": config.publish.modelspec_comment,
        "base_model": family.checkpoint.label,
        "steps": state.step,
        "simpletuner_version": state.versions["simpletuner"],
        **_kohya(config, family, sources, state, name),
    }
    return {key: str(value) for key, value in facts.items() if value not in (None, "")}


def _kohya(
    config: Config, family: Family, sources: Sequence[DataSource], state: TrainState, name: str
) -> dict[str, Any]:
    schedule, optimizer = config.schedule, config.optimizer
    rate = optimizer.text_encoder_lr or optimizer.learning_rate
    text_rate = rate if config.adapter.train_text_encoder else None
    return {
        "ss_base_model_version": family.kohya_version,
        "ss_sd_model_name": family.checkpoint.label,
        "ss_output_name": name,
        "ss_steps": state.step,
        "ss_epoch": state.epoch + 1,
        "ss_num_train_images": sum(len(source) for source in sources),
        "ss_batch_size_per_device": schedule.train_batch_size,
        "ss_gradient_accumulation_steps": schedule.gradient_accumulation_steps,
        "ss_learning_rate": f"{optimizer.learning_rate:g}",
        "ss_text_encoder_lr": text_rate and f"{text_rate:g}",
        "ss_lr_scheduler": optimizer.lr_scheduler,
        "ss_optimizer": optimizer.optimizer,
        "ss_mixed_precision": config.precision.mixed_precision,
        "ss_seed": config.runtime.seed,
        "ss_training_comment": config.publish.modelspec_comment,
        "ss_bucket_info": _buckets(sources),
        "ss_tag_frequency": _tags(sources) if config.publish.ss_tag_frequency else None,
    }


def _counted(sources: Sequence[DataSource]) -> Counter[tuple[int, int]]:
    """How many pictures are encoded in each size, width and height in px."""
    return Counter((int(w), int(h)) for source in sources for w, h in source.buckets.tolist())


def _resolution(sources: Sequence[DataSource]) -> str:
    """The size that most pictures have."""
    counted = _counted(sources)
    if not counted:
        return ""
    width, height = min(counted, key=lambda size: (-counted[size], size))
    return f"{width}x{height}"


def _buckets(sources: Sequence[DataSource]) -> str:
    counted = sorted(_counted(sources).items())
    buckets = {
        str(number): {"resolution": list(size), "count": count}
        for number, (size, count) in enumerate(counted)
    }
    return json.dumps({"buckets": buckets}) if buckets else ""


def _tags(sources: Sequence[DataSource]) -> str:
    """How many pictures of each dataset have a tag, the pieces between commas of their captions.

    What one picture alone has is a sentence rather than a tag, and stays out.
    """
    found = {}
    for source in sources:
        tags: Counter[str] = Counter()
        for row in range(len(source)):
            pieces = (piece for text in source.captions(row) for piece in text.split(","))
            tags.update({tag for piece in pieces if (tag := piece.strip())})
        common = [(tag, n) for tag, n in tags.items() if n > 1]
        found[source.id] = dict(sorted(common, key=lambda each: (-each[1], each[0]))[:_MOST_TAGS])
    found = {name: tags for name, tags in found.items() if tags}
    return json.dumps(found, ensure_ascii=False) if found else ""


def _prompts(setting: str | Sequence[str] | None) -> list[str]:
    if not setting:
        return []
    return [setting] if isinstance(setting, str) else list(setting)
