"""The optimizers a user can name, what each starts from, and what settings make of that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError

from simpletuner.core.errors import ConfigError, Problem, did_you_mean
from simpletuner.core.section import Section, setting
from simpletuner.core.table import Row, Table

Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamOptions(Section):
    """What AdamW takes; without a value, the number of the optimizer's row."""

    betas: tuple[Beta, Beta] | None = setting(None)
    """The same as optimizer_beta1 and optimizer_beta2."""

    weight_decay: float | None = setting(None, ge=0)
    """The same as adam_weight_decay."""

    eps: float | None = setting(None, gt=0)
    """The same as adam_epsilon."""


class OptimiLionOptions(Section):
    """What torch-optimi's Lion takes; it divides by nothing and so has no eps."""

    betas: tuple[Beta, Beta] | None = setting(None)
    """The same as optimizer_beta1 and optimizer_beta2."""

    weight_decay: float | None = setting(None, ge=0)
    """The same as adam_weight_decay."""

    kahan_sum: bool | None = setting(None)
    """Compensate the rounding of bf16 weights; without a value, wherever weights are bf16."""

    decouple_lr: bool = setting(False)
    """Take weight decay off whole instead of times learning_rate, falling as the rate falls; use a
    far smaller weight decay then."""


class OptimiAdamOptions(OptimiLionOptions):
    """What torch-optimi's AdamW takes."""

    eps: float | None = setting(None, gt=0)
    """The same as adam_epsilon."""


def _numbers(
    weight_decay: float,
    eps: float | None = None,
    betas: tuple[float, ...] | None = (0.9, 0.999),
    **more: Any,
) -> dict[str, Any]:
    """The facts of a row: what it starts from where the user says nothing."""
    return {"betas": betas, "weight_decay": weight_decay, "eps": eps, **more}


_ADAM = _numbers(0.0, 1e-8)
_ADAMW = _numbers(1e-2, 1e-6)
_LION = _numbers(0.0, betas=(0.9, 0.99))
_ADEMAMIX = _numbers(1e-2, 1e-8, (0.9, 0.999, 0.9999))
_PLAIN = _numbers(0.0, betas=None)

_BUILT = (
    Row(
        "adamw_bf16",
        "simpletuner.optim.make:adamw_bf16",
        "AdamW with fp32 moments; bf16 weights are rounded stochastically, so that small updates"
        " are not lost.",
        options=AdamOptions,
        facts=_ADAMW | {"bf16_weights": True},
    ),
    Row(
        "torch-adamw",
        "simpletuner.optim.make:torch_adamw",
        "PyTorch's AdamW.",
        options=AdamOptions,
        facts=_numbers(1e-2, 1e-8),
    ),
    Row(
        "optimi-adamw",
        "simpletuner.optim.make:optimi_adamw",
        "AdamW of torch-optimi; Kahan summation for bf16 weights.",
        needs="train",
        options=OptimiAdamOptions,
        facts=_numbers(1e-2, 1e-6, (0.9, 0.99)),
    ),
    Row(
        "optimi-lion",
        "simpletuner.optim.make:optimi_lion",
        "Lion of torch-optimi: steps of one size by the sign of the momentum, half the memory of"
        " AdamW; wants a learning rate 3 to 10 times smaller.",
        needs="train",
        options=OptimiLionOptions,
        facts=_LION,
    ),
)

_NOT_BUILT = (
    ("adamw_schedulefree", "AdamW that needs no schedule.", None, _numbers(1e-2, 1e-8)),
    ("torch-adam", "PyTorch's Adam.", None, _ADAM),
    ("torch-adafactor", "Adafactor: factored moments, little memory.", None, _PLAIN),
    ("torch-adagrad", "PyTorch's Adagrad.", None, _numbers(0.0, 1e-10, None)),
    ("torch-adadelta", "PyTorch's Adadelta.", None, _numbers(0.0, 1e-6, None)),
    ("torch-adamax", "PyTorch's Adamax.", None, _ADAM),
    ("torch-asgd", "PyTorch's averaged SGD.", None, _PLAIN),
    ("torch-nadam", "PyTorch's NAdam.", None, _ADAM),
    ("torch-radam", "PyTorch's RAdam.", None, _ADAM),
    ("torch-rmsprop", "PyTorch's RMSprop.", None, _numbers(0.0, 1e-8, None)),
    ("torch-sgd", "PyTorch's SGD.", None, _PLAIN),
    ("optimi-adam", "Adam of torch-optimi.", "train", _numbers(0.0, 1e-6, (0.9, 0.99))),
    ("optimi-adan", "Adan of torch-optimi.", "train", _numbers(2e-2, 1e-6, (0.98, 0.92, 0.999))),
    ("optimi-radam", "RAdam of torch-optimi.", "train", _numbers(0.0, 1e-6, (0.9, 0.99))),
    ("optimi-ranger", "Ranger of torch-optimi.", "train", _numbers(0.0, 1e-6, (0.9, 0.99))),
    ("optimi-sgd", "SGD of torch-optimi.", "train", _PLAIN),
    ("optimi-stableadamw", "AdamW that clips itself.", "train", _numbers(1e-2, 1e-6, (0.9, 0.99))),
    ("bnb-adagrad", "Adagrad of bitsandbytes.", "bnb", _numbers(0.0, 1e-10, None)),
    ("bnb-adagrad8bit", "Adagrad, 8-bit.", "bnb", _numbers(0.0, 1e-10, None)),
    ("bnb-adam", "Adam of bitsandbytes.", "bnb", _ADAM),
    ("bnb-adam8bit", "Adam with 8-bit moments.", "bnb", _ADAM),
    ("bnb-adamw", "AdamW of bitsandbytes.", "bnb", _ADAMW),
    ("bnb-adamw8bit", "AdamW with 8-bit moments.", "bnb", _ADAMW),
    ("bnb-adamw-paged", "AdamW whose moments page to the CPU.", "bnb", _ADAMW),
    ("bnb-adamw8bit-paged", "AdamW with 8-bit moments that page.", "bnb", _ADAMW),
    ("bnb-lion", "Lion of bitsandbytes.", "bnb", _LION),
    ("bnb-lion8bit", "Lion with 8-bit momentum.", "bnb", _LION),
    ("bnb-lion-paged", "Lion whose momentum pages to the CPU.", "bnb", _LION),
    ("bnb-lion8bit-paged", "Lion with 8-bit momentum that pages.", "bnb", _LION),
    ("bnb-ademamix", "AdEMAMix: a fast and a slow momentum.", "bnb", _ADEMAMIX),
    ("bnb-ademamix8bit", "AdEMAMix with 8-bit moments.", "bnb", _ADEMAMIX),
    ("bnb-ademamix-paged", "AdEMAMix whose moments page.", "bnb", _ADEMAMIX),
    ("bnb-ademamix8bit-paged", "AdEMAMix with 8-bit moments that page.", "bnb", _ADEMAMIX),
    ("ao-adamw8bit", "AdamW of torchao with 8-bit moments.", None, _ADAMW),
    ("ao-adamw4bit", "AdamW of torchao with 4-bit moments.", None, _ADAMW),
    ("ao-adamfp8", "Adam of torchao with fp8 moments.", None, _ADAMW),
    ("ao-adamwfp8", "AdamW of torchao with fp8 moments.", None, _ADAMW),
    ("prodigy", "Finds its own learning rate; set learning_rate to 1.", None, _LION),
    ("soap", "Adam in Shampoo's eigenbasis.", None, _numbers(1e-2, 1e-8, (0.95, 0.95))),
    ("muon", "Orthogonalised momentum for matrices.", None, _numbers(0.1, 1e-7, None)),
)

OPTIMIZERS = Table(
    "optimizer",
    (
        *_BUILT,
        *(
            Row(name, None, summary, needs, facts=facts)
            for name, summary, needs, facts in _NOT_BUILT
        ),
    ),
)


def numbers(
    optimizer: str,
    *,
    betas: tuple[float, float] | None,
    weight_decay: float | None,
    eps: float | None,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """What an optimizer is made with: its row's numbers under what the user set.

    Args:
        optimizer: A built optimizer.
        betas: optimizer_beta1 and optimizer_beta2.
        weight_decay: adam_weight_decay.
        eps: adam_epsilon.
        config: optimizer_config.

    Raises:
        ConfigError: The optimizer does not take what was set, or two settings disagree; all of it.
    """
    row = OPTIMIZERS[optimizer]
    assert row.options is not None, f"{optimizer} is built and takes options"
    try:
        chosen = row.options.model_validate(dict(config)).model_dump(exclude_none=True)
    except ValidationError as error:
        raise ConfigError(problems=tuple(_option_problems(row, error))) from None
    problems = []
    keys = {"betas": "optimizer_beta1", "weight_decay": "adam_weight_decay", "eps": "adam_epsilon"}
    given = {"betas": betas, "weight_decay": weight_decay, "eps": eps}
    for name, value in given.items():
        if value is None:
            continue
        if row.fact(name) is None:
            sentence = f"{optimizer} has no {name}; remove it"
            problems.append(Problem(sentence, keys[name]))
        elif chosen.setdefault(name, value) != value:
            sentence = f"is {value:g} here" if isinstance(value, float) else f"is {value} here"
            problems.append(
                Problem(
                    f"{sentence} and {chosen[name]} in optimizer_config; remove one", keys[name]
                )
            )
    if problems:
        raise ConfigError(problems=problems)
    start = {name: row.fact(name) for name in given if row.fact(name) is not None}
    return {**start, **chosen}


def _option_problems(row: Row, error: ValidationError) -> Iterator[Problem]:
    assert row.options is not None
    known = row.options.model_fields
    for fault in error.errors():
        name = str(fault["loc"][0])
        if name in known:
            message = f"{name}: {fault['msg']}"
        else:
            near = did_you_mean(name, known) or f"; it has {', '.join(known)}"
            message = f"{row.name} has no option {name!r}{near}"
        yield Problem(message, "optimizer_config")
