"""What a checkpoint's tensors mean: a resume that changes it is not one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simpletuner.config.root import Config
    from simpletuner.data.plan import BatchPlan
    from simpletuner.data.source import DataSource
    from simpletuner.models.family import Family


def data_identity(plan: BatchPlan, sources: Sequence[DataSource]) -> Mapping[str, str]:
    """What is trained on and in which order, by name, so that a change can be named."""
    captions = {f"{source.id}: captions": source.caption_digest() for source in sources}
    return {**plan.fingerprint, **captions}


def model_identity(config: Config, family: Family) -> Mapping[str, str]:
    """What the trained tensors are added to and how, by the settings that decide it."""
    adapter = config.adapter
    return {
        "base model": family.checkpoint.digest((family.denoiser,)),
        "text encoders": family.fingerprint("text"),
        "VAE": family.fingerprint("vae"),
        "prediction_type": family.prediction_type,
        "model_type": adapter.model_type,
        "lora_rank": str(adapter.lora_rank),
        "lora_alpha": f"{adapter.lora_alpha or adapter.lora_rank:g}",
    }


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names whose values differ, sorted."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
