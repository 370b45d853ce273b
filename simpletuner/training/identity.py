"""What a checkpoint was trained with: what a resume may not change, and what it tells of.

Every fact is a name and a plain value in ``state.json``. *Model* facts say what the tensors are and
are refused when they differ; *data* facts say what the plan and the pictures are and are refused
unless the user goes on; *settings* may change, and each change is told.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from simpletuner.adapters.export import lora_file
from simpletuner.adapters.settings import STARTS
from simpletuner.core.errors import DataError, TrainingError
from simpletuner.core.files import sha256_file
from simpletuner.core.section import hint_of
from simpletuner.diffusion.needs import idle, overruled
from simpletuner.optim.build import options_of
from simpletuner.optim.schedules import SCHEDULES
from simpletuner.precision.dtypes import vae_dtype_of
from simpletuner.precision.quantise import Quantiser
from simpletuner.training.state import TrainState

if TYPE_CHECKING:
    from simpletuner.adapters.settings import AdapterSettings
    from simpletuner.config.root import Config
    from simpletuner.core.types import Place
    from simpletuner.data.plan import BatchPlan
    from simpletuner.data.source import DataSource
    from simpletuner.models.family import Family
    from simpletuner.optim.settings import OptimizerSettings

Facts = Mapping[str, str]

_DIGESTS = frozenset(
    {
        "preset LoRA",
        "base model",
        "text encoders",
        "VAE",
        "pictures",
        "sizes",
        "resizes",
        "captions",
        "masks",
    }
)
"""Facts whose values say nothing to a reader."""

_DECIDED_BY = MappingProxyType(
    {
        "sizes": " (by resolution, crop, crop_aspect, rare_buckets or aspect_bucket_alignment)",
        "resizes": " (by resolution, crop, maximum_image_size or target_downsample_size)",
    }
)

_FOLLOWING = frozenset({"sizes", "resizes", "captions", "masks"})
"""Facts of a dataset that change with its pictures."""

_WHOLE = "no_change"
"""Of a text encoder, where nothing is said: as it comes."""

_UNUSED = "unused"
_DEFAULT = "default: "
"""Begins a value that stands for what another setting says."""


# --- what is kept ---------------------------------------------------------------------------------


def starting_state(
    config: Config,
    family: Family,
    plan: BatchPlan,
    sources: Sequence[DataSource],
    total_steps: int,
    place: Place,
) -> TrainState:
    """A run before its first step, with everything a resume is compared by."""
    return TrainState(
        data=data_identity(config, family, plan, sources),
        model=model_identity(config, family),
        settings=settings_in_use(config, family, total_steps),
        threads=torch.get_num_threads(),
        device=place.device.type,
    )


def data_identity(
    config: Config, family: Family, plan: BatchPlan, sources: Sequence[DataSource]
) -> Facts:
    """What is trained on and in which order."""
    cache = config.cache
    vae = vae_dtype_of(cache.vae_dtype, config.precision.mixed_precision)
    found: dict[str, Any] = {
        **plan.fingerprint,
        "vae_dtype": f"{_DEFAULT * (cache.vae_dtype == 'default')}{vae}",
        "vae_enable_tiling": cache.vae_enable_tiling,
    }
    if "data_aesthetic_score" in family.own_settings:
        found["data_aesthetic_score"] = config.model.data_aesthetic_score
    formats = Quantiser(config.precision)
    for number, part in enumerate(p for p in family.text_parts if p.startswith("text_encoder")):
        if (name := formats.format(part)) != _WHOLE:
            found[f"text_encoder_{number + 1}_precision"] = name
    for source in sources:
        found |= {f"dataset {source.id}: {name}": v for name, v in source.identity().items()}
    return _plain(found)


def model_identity(config: Config, family: Family) -> Facts:
    """What the trained tensors and the optimizer's memory belong to."""
    adapter = config.adapter
    return _plain(
        {
            "base model": family.checkpoint.digest((family.denoiser,)),
            "text encoders": family.checkpoint.digest(family.text_parts),
            "VAE": family.fingerprint("vae"),
            **family.text_options,
            "prediction_type": family.prediction_type,
            **_schedule_identity(family),
            **_preset_identity(adapter),
            "model_type": adapter.model_type,
            **_whole_identity(adapter),
            **_adapter_identity(adapter),
            "optimizer": config.optimizer.optimizer,
        }
    )


def _schedule_identity(family: Family) -> dict[str, Any]:
    if "rescale_betas_zero_snr" not in family.own_settings:
        return {}
    return {"rescale_betas_zero_snr": family.options["rescale_betas_zero_snr"]}


def _preset_identity(adapter: AdapterSettings) -> dict[str, Any]:
    if adapter.preset_lora_path is None:
        return {}
    return {"preset LoRA": sha256_file(lora_file(adapter.preset_lora_path))[:32]}


def _whole_identity(adapter: AdapterSettings) -> dict[str, Any]:
    if adapter.trainable_models is None:
        return {}
    return {"trainable_models": ", ".join(adapter.trainable_models)}


def _adapter_identity(adapter: AdapterSettings) -> dict[str, Any]:
    if adapter.trains == "controlnet":
        return {"controlnet": True}
    if adapter.trains == "full":
        return {"layer_freeze_strategy": adapter.layer_freeze_strategy}
    if adapter.lora_type == "lycoris":
        return {"lycoris_config": json.dumps(adapter.lycoris_config, sort_keys=True)}
    return {
        "lora_rank": adapter.lora_rank,
        "lora_alpha": float(adapter.lora_alpha or adapter.lora_rank),
        "lora_init_type": adapter.lora_init_type if adapter.lora_init_type in STARTS else "nothing",
        "use_dora": adapter.use_dora,
        "use_rslora": adapter.use_rslora,
        **({"train_text_encoder": True} if adapter.train_text_encoder else {}),
    }


def settings_in_use(config: Config, family: Family, total_steps: int) -> Facts:
    """What shapes the steps to come and may be another from a checkpoint on.

    Settings without an effect beside the others are left out.
    """
    precision = config.precision
    of_lora = (config.adapter.trains, config.adapter.lora_type) == ("lora", "standard")
    found: dict[str, Any] = {
        **_optimizer_settings(config.optimizer, total_steps),
        **(_lora_settings(config.adapter) if of_lora else {}),
        **_own_rates(config),
        "use_ema": config.adapter.use_ema,
        "mixed_precision": precision.mixed_precision,
        "base_model_precision": precision.base_model_precision,
        "disable_tf32": precision.disable_tf32,
        **family.step_options,
    }
    if config.adapter.use_ema:
        names = ("ema_decay", "ema_update_interval", "ema_warmup_steps")
        found |= {name: dict(config.adapter)[name] for name in names}
    if precision.mixed_precision != "no":
        held = precision.base_model_default_dtype or precision.mixed_precision
        found["base_model_default_dtype"] = held
    diffusion, flow = config.diffusion, family.prediction_type == "flow_matching"
    values = dict(diffusion)
    unused = {name for name, _ in idle(values)} | {name for name, *_ in overruled(values)}
    if diffusion.use_soft_min_snr:
        unused.add("snr_gamma")
    if "flux_fast_schedule" not in family.own_settings:
        unused.add("flux_fast_schedule")
    for name, field in type(diffusion).model_fields.items():
        of_flow = name.startswith("flow_")
        if hint_of(field).pending is not True and (flow or not of_flow) and name not in unused:
            found[name] = values[name]
    return _plain(found)


def _lora_settings(adapter: AdapterSettings) -> dict[str, Any]:
    ratio = adapter.loraplus_lr_ratio
    plus = {} if ratio is None else {"loraplus_lr_ratio": ratio}
    return {"lora_dropout": adapter.lora_dropout, **plus}


def _own_rates(config: Config) -> dict[str, Any]:
    adapter, optimizer, found = config.adapter, config.optimizer, {}
    if adapter.train_text_encoder:
        found["text_encoder_lr"] = optimizer.text_encoder_lr or optimizer.learning_rate
    if adapter.trainable_models and adapter.trains == "lora":
        found["trainable_models_lr"] = optimizer.trainable_models_lr or optimizer.learning_rate
    return found


def _optimizer_settings(optimizer: OptimizerSettings, total_steps: int) -> dict[str, Any]:
    """The rate, its curve, the bounds and the optimizer's own numbers, defaults filled in."""
    settings, row = dict(optimizer), SCHEDULES[optimizer.lr_scheduler]
    shape = ("lr_warmup_steps",) * bool(row.fact("warmup")) + row.fact("takes", ())
    bound = ("max_grad_norm", *("grad_clip_method",) * bool(optimizer.max_grad_norm))
    found = {name: settings[name] for name in ("learning_rate", "lr_scheduler", *shape, *bound)}
    if optimizer.gradient_precision == "fp32":
        found["gradient_precision"] = "fp32"
    if optimizer.prodigy_steps is not None:
        found["prodigy_steps"] = optimizer.prodigy_steps
    if row.fact("falls"):
        found["total steps"] = total_steps
    names = {"weight_decay": "adam_weight_decay", "eps": "adam_epsilon"}
    for name, value in options_of(optimizer).items():
        if name == "betas":
            found |= {f"optimizer_beta{i}": beta for i, beta in enumerate(value, 1)}
        else:
            found[names.get(name, f"optimizer_config.{name}")] = value
    return found


def _plain(facts: Mapping[str, Any]) -> Facts:
    """The values as a user writes them."""
    return {name: _word(value) for name, value in facts.items()}


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:.12g}" if isinstance(value, float) else str(value)


# --- what differs ---------------------------------------------------------------------------------


def check_model(before: Facts, now: Facts) -> None:
    """Refuse a checkpoint whose tensors mean something else here.

    Raises:
        TrainingError: Names what changed.
    """
    if told := list(_told(before, now)):
        raise TrainingError(
            f"this run cannot go on from the checkpoint: {', '.join(told)}",
            fix="undo the change, or start over: resume_from_checkpoint=none",
        )


def check_data(before: Facts, now: Facts, on_data_change: str) -> str:
    """Compare what is trained on.

    Returns:
        What to tell of the changes that are gone on with; empty without any.

    Raises:
        DataError: Something changed and `on_data_change` does not allow it.
    """
    encoders = {n: _WHOLE for n in {*before, *now} if n.startswith("text_encoder_")}
    told = list(_told({**encoders, **before}, {**encoders, **now}))
    if not told:
        return ""
    if on_data_change == "continue":
        return f"{', '.join(told)} since the checkpoint; going on with what is there now"
    data = ", ".join(each for each in told if each.startswith("dataset "))
    settings = ", ".join(each for each in told if not each.startswith("dataset "))
    kinds = [f"on other data: {data}"] * bool(data)
    kinds += [f"with other settings: {settings}"] * bool(settings)
    raise DataError(
        f"the checkpoint was trained {'; and '.join(kinds)}",
        fix="undo the change, or go on with what is there now: --on_data_change continue",
    )


def settings_told(before: Facts, now: Facts) -> str:
    """What to tell of settings that changed; empty without any."""
    told = list(_was_and_now(before, now))
    if before.keys() & now.keys() & {"total steps"} and before["total steps"] != now["total steps"]:
        told.append(f"{now['lr_scheduler']} depends on the total steps: the learning rate jumps")
    return f"changed since the checkpoint: {'; '.join(told)}" if told else ""


def machine_told(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What to tell of another machine or other libraries; empty where both are the same.

    Args:
        before: ``state.json``.
        now: The same of this run.
    """
    was, is_now = (
        {**facts["versions"], "device": facts["device"], "CPU threads": str(facts["threads"])}
        for facts in (before, now)
    )
    told = "; ".join(_was_and_now(was, is_now))
    ending = "results may differ in the last digits"
    return f"not as when the checkpoint was made: {told}: {ending}" if told else ""


def _changed(before: Facts, now: Facts) -> list[str]:
    names = sorted(before.keys() | now.keys())
    return [name for name in names if not _same(before.get(name), now.get(name))]


def _same(before: str | None, now: str | None) -> bool:
    """A default is the same as its value written out, and as a default that another setting moves.

    That other setting is compared on its own.
    """
    if before is None or now is None:
        return before is now
    both = before.startswith(_DEFAULT) and now.startswith(_DEFAULT)
    return both or before.removeprefix(_DEFAULT) == now.removeprefix(_DEFAULT)


def _was_and_now(before: Facts, now: Facts) -> Iterator[str]:
    for name in _changed(before, now):
        yield f"{name}: was {before.get(name, _UNUSED)}, now {now.get(name, _UNUSED)}"


def _told(before: Facts, now: Facts) -> Iterator[str]:
    """A phrase for each change; one for a dataset that came or went."""
    whole: set[str] = set()
    changed = _changed(before, now)
    for name in changed:
        dataset, _, what = name.rpartition(": ")
        if what in _FOLLOWING and f"{dataset}: pictures" in changed:
            continue
        if name in before and name in now:
            was = f" (was {before[name]}, now {now[name]})"
            yield f"{name} changed{_DECIDED_BY.get(what, '') if what in _DIGESTS else was}"
        elif (title := dataset or name) not in whole:
            whole.add(title)
            yield f"{title} is {'new' if name in now else 'gone'}"
