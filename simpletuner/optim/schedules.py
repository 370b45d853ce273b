"""Learning rates as closed forms of the optimizer step: no state, so nothing to save or to drift.

Let n = 1 … N number the steps (n = step + 1) and w = max(warmup, 1). The rate rises as base · n / w
up to n = w, which is the first step at `base`; from there it is base · f(p) + end · (1 − f(p)) with
p = (n − w) / (N − w), so that the last step is at `end` exactly. This is the stock schedule of
torch and transformers, read at the end of each step instead of its beginning, where the first step
would be lost at rate 0 and the last would stop short of `end`.
"""

from __future__ import annotations

import math

from simpletuner.core.table import Row, Table


def flat(p: float, *, power: float, cycles: int) -> float:
    """The shape f = 1."""
    return 1.0


def straight(p: float, *, power: float, cycles: int) -> float:
    """The shape f = 1 − p."""
    return 1.0 - p


def half_cosines(p: float, *, power: float, cycles: int) -> float:
    """The shape f = ½ (1 + cos((2 cycles − 1) π p)).

    One cycle is one half cosine down; each further one adds a half up and a half down, so that
    every run ends at the bottom.
    """
    return 0.5 * (1.0 + math.cos((2 * cycles - 1) * math.pi * p))


def restarted_cosines(p: float, *, power: float, cycles: int) -> float:
    """The shape f = ½ (1 + cos(π q)), q being the fraction of cycles · p: up at once between."""
    return 0.5 * (1.0 + math.cos(math.pi * (1.0 if p >= 1.0 else (cycles * p) % 1.0)))


def swings(p: float, *, power: float, cycles: int) -> float:
    """The shape f = ½ (1 + cos(2 π cycles p)): down and up again, so that it ends at the top."""
    return 0.5 * (1.0 + math.cos(2 * math.pi * cycles * p))


def reflected(p: float, *, power: float, cycles: int) -> float:
    """The shape f = (1 − p) / (1 − p / 2), REX (Chen et al. 2021, arXiv 2107.04197)."""
    return (1.0 - p) / (1.0 - p / 2)


def curve(p: float, *, power: float, cycles: int) -> float:
    """The shape f = (1 − p) ^ power."""
    return math.pow(1.0 - p, power)


SCHEDULES = Table(
    "lr_scheduler",
    (
        Row(
            "constant",
            flat,
            "learning_rate from the first step to the last, without warm-up.",
            facts={"warmup": False, "falls": False},
        ),
        Row(
            "constant_with_warmup",
            flat,
            "Rises to learning_rate over lr_warmup_steps and stays there.",
            facts={"warmup": True, "falls": False},
        ),
        Row(
            "linear",
            straight,
            "Falls in a straight line to lr_end at the last step.",
            facts={"warmup": True, "falls": True, "takes": ("lr_end",)},
        ),
        Row(
            "cosine",
            half_cosines,
            "Falls along half a cosine to lr_end at the last step; each lr_num_cycles above 1 adds"
            " one rise and one fall.",
            facts={"warmup": True, "falls": True, "takes": ("lr_end", "lr_num_cycles")},
        ),
        Row(
            "polynomial",
            curve,
            "Falls as (1 − p) ^ lr_power to lr_end at the last step.",
            facts={"warmup": True, "falls": True, "takes": ("lr_end", "lr_power")},
        ),
        Row(
            "cosine_with_restarts",
            restarted_cosines,
            "Falls along half a cosine lr_num_cycles times, back to learning_rate at once between.",
            facts={"warmup": True, "falls": True, "takes": ("lr_end", "lr_num_cycles")},
        ),
        Row(
            "sine",
            swings,
            "Swings from learning_rate to lr_end and back, lr_num_cycles times.",
            facts={"warmup": True, "falls": False, "takes": ("lr_end", "lr_num_cycles")},
        ),
        Row(
            "rex",
            reflected,
            "Falls slowly at first and fast at the end, to lr_end at the last step.",
            facts={"warmup": True, "falls": True, "takes": ("lr_end",)},
        ),
    ),
)


def learning_rate(
    name: str,
    step: int,
    *,
    total: int,
    base: float,
    warmup: int,
    end: float,
    power: float,
    cycles: int,
) -> float:
    """The learning rate of one optimizer step.

    Args:
        name: The schedule.
        step: The optimizer step about to be taken, from 0.
        total: Optimizer steps of the whole run; the rate stays at its last value after them.
        base: The rate at the top.
        warmup: Steps of the linear rise; schedules without a warm-up ignore it.
        end: The rate at the last step of a schedule that falls.
        power: Exponent of ``polynomial``.
        cycles: Cycles of ``cosine``.
    """
    row = SCHEDULES[name]
    top = max(warmup, 1) if row.fact("warmup") else 1
    number = step + 1
    if number < top:
        return base * number / top
    progress = min((number - top) / max(total - top, 1), 1.0)
    share = row.load()(progress, power=power, cycles=cycles)
    return float(base * share + end * (1.0 - share))
