"""The precision plan of a run: every part of it that holds weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from simpletuner.precision.dtypes import run_dtype, short_name, vae_dtype_of
from simpletuner.precision.plan import PlanRow, quantised_row, unopened_row
from simpletuner.precision.quantise import Quantiser

if TYPE_CHECKING:
    from simpletuner.adapters.method import Trainable
    from simpletuner.config.root import Config
    from simpletuner.models.family import Family
    from simpletuner.precision.quantise import Quantised

_ENCODED = "not opened: what it encodes is in the cache"


def precision_plan(
    config: Config,
    family: Family,
    trainable: Trainable,
    told: Mapping[str, Quantised],
    unopened: str = _ENCODED,
) -> list[PlanRow]:
    """What each part computes in and is held in.

    Args:
        config: The settings.
        family: Of the model.
        trainable: What trains, in the dtype it trains in.
        told: What became of the parts that were opened, by name; the denoiser is one of them.
        unopened: What to say of the others.
    """
    run = short_name(run_dtype(config.precision))
    vae = vae_dtype_of(config.cache.vae_dtype, run)
    rows, formats = [], Quantiser(config.precision)
    for part in family.text_parts:
        if part in told:
            rows.append(quantised_row(told[part], run))
        elif not part.startswith("tokenizer"):
            rows.append(unopened_row(part, run, formats.format(part), unopened))
    rows += [PlanRow("vae", vae, vae), quantised_row(told[family.denoiser], run)]
    weights = list(trainable.parameters().values())
    dtype, size = short_name(weights[0].dtype), sum(p.numel() * p.itemsize for p in weights)
    if config.adapter.trains != "full":  # which trains the denoiser's own
        rows.append(PlanRow("trained", run, dtype, before=size, after=size))
    if config.adapter.use_ema:
        size = 4 * sum(p.numel() for p in weights)
        where = f"on the {config.adapter.ema_device}"
        rows.append(PlanRow("average", "fp32", "fp32", before=size, after=size, note=where))
    return rows
