"""The optimizers a user can name, what each starts from, and what settings make of that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from simpletuner.core.errors import ConfigError, Problem, did_you_mean
from simpletuner.core.section import Section
from simpletuner.core.table import Row, Table
from simpletuner.optim.options import (
    AdafactorOptions,
    AdamOptions,
    Bnb8bitLionOptions,
    Bnb8bitOptions,
    BnbAdEMAMixOptions,
    CAMEOptions,
    LionOptions,
    MuonOptions,
    OptimiAdamOptions,
    OptimiAdanOptions,
    OptimiLionOptions,
    ProdigyOptions,
    ScheduleFreeOptions,
    SGDOptions,
    SOAPOptions,
)


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

_MAKE = "simpletuner.optim.make:"

_PAGE, _PAGES = (f"{move} to the CPU when memory is short" for move in ("move", "moves"))


def _row(
    name: str,
    make: str,
    summary: str,
    options: type[Section],
    numbers: Mapping[str, Any],
    *,
    state_bytes: float,
    needs: str | None = None,
    **facts: Any,
) -> Row:
    """A row that is built.

    Args:
        state_bytes: What it remembers, in bytes for each fp32 weight of a large matrix.
        facts: ``cls``: the library's class. ``syncs``: a step waits for the device.
            ``bf16_weights``: it may train weights that are held in bf16; ``fp32_gradients``: with
            gradients that are not. ``on``: the kinds of
            device it runs on, where not all do. ``remembers``: numbers of a parameter group that a
            step changes. ``no_schedule``: its rate must not fall. ``own_rate``: it finds its rate
            itself.
    """
    known = {**numbers, "state_bytes": state_bytes, **facts}
    return Row(name, f"{_MAKE}{make}", summary, needs=needs, options=options, facts=known)


_BNB: tuple[tuple[str, str, str, type[Section], Mapping[str, Any], float], ...] = (
    ("bnb-adamw", "AdamW", "AdamW of bitsandbytes.", AdamOptions, _ADAMW, 8),
    ("bnb-adamw8bit", "AdamW8bit", "AdamW with 8-bit moments.", Bnb8bitOptions, _ADAMW, 2.03),
    ("bnb-adamw-paged", "PagedAdamW", f"AdamW whose moments {_PAGE}.", AdamOptions, _ADAMW, 8),
    (
        "bnb-adamw8bit-paged",
        "PagedAdamW8bit",
        f"AdamW with 8-bit moments that {_PAGE}.",
        Bnb8bitOptions,
        _ADAMW,
        2.03,
    ),
    ("bnb-lion", "Lion", "Lion of bitsandbytes.", LionOptions, _LION, 4),
    ("bnb-lion8bit", "Lion8bit", "Lion with an 8-bit momentum.", Bnb8bitLionOptions, _LION, 1.02),
    ("bnb-lion-paged", "PagedLion", f"Lion whose momentum {_PAGES}.", LionOptions, _LION, 4),
    (
        "bnb-lion8bit-paged",
        "PagedLion8bit",
        f"Lion with an 8-bit momentum that {_PAGES}.",
        Bnb8bitLionOptions,
        _LION,
        1.02,
    ),
    (
        "bnb-ademamix",
        "AdEMAMix",
        "AdEMAMix of bitsandbytes: AdamW with a second, slow momentum.",
        BnbAdEMAMixOptions,
        _ADEMAMIX,
        12,
    ),
    (
        "bnb-ademamix8bit",
        "AdEMAMix8bit",
        "AdEMAMix with 8-bit moments.",
        BnbAdEMAMixOptions,
        _ADEMAMIX,
        3.05,
    ),
)

_BUILT = (
    _row(
        "adamw_bf16",
        "adamw_bf16",
        "AdamW with fp32 moments; bf16 weights are rounded stochastically, so that small updates"
        " are not lost.",
        AdamOptions,
        _ADAMW,
        state_bytes=8,
        bf16_weights=True,
        fp32_gradients=True,
    ),
    _row(
        "torch-adamw",
        "torchs",
        "PyTorch's AdamW.",
        AdamOptions,
        _numbers(1e-2, 1e-8),
        cls="AdamW",
        state_bytes=8,
    ),
    _row("torch-adam", "torchs", "PyTorch's Adam.", AdamOptions, _ADAM, cls="Adam", state_bytes=8),
    _row("torch-sgd", "torchs", "PyTorch's SGD.", SGDOptions, _PLAIN, cls="SGD", state_bytes=0),
    _row(
        "torch-adafactor",
        "torchs",
        "Adafactor of PyTorch: factored squares and no momentum, next to no memory.",
        AdafactorOptions,
        _PLAIN,
        cls="Adafactor",
        state_bytes=0.02,
        syncs=True,
    ),
    _row(
        "muon",
        "muon",
        "Orthogonalised momentum for matrices (Muon of PyTorch), at AdamW's rates; AdamW for"
        " everything else, such as biases and kernels.",
        MuonOptions,
        _numbers(0.1, betas=None),
        state_bytes=4,
    ),
    _row(
        "optimi-adamw",
        "optimis",
        "AdamW of torch-optimi; Kahan summation for bf16 weights.",
        OptimiAdamOptions,
        _numbers(1e-2, 1e-6, (0.9, 0.99)),
        cls="AdamW",
        needs="train",
        state_bytes=8,
        remembers=("step",),
        bf16_weights=True,
    ),
    _row(
        "optimi-adam",
        "optimis",
        "Adam of torch-optimi; Kahan summation for bf16 weights.",
        OptimiAdamOptions,
        _numbers(0.0, 1e-6, (0.9, 0.99)),
        cls="Adam",
        needs="train",
        state_bytes=8,
        remembers=("step",),
        bf16_weights=True,
    ),
    _row(
        "optimi-lion",
        "optimis",
        "Lion of torch-optimi: steps of one size by the sign of the momentum, half the memory of"
        " AdamW; wants a learning rate 3 to 10 times smaller.",
        OptimiLionOptions,
        _LION,
        cls="Lion",
        needs="train",
        state_bytes=4,
        bf16_weights=True,
    ),
    _row(
        "optimi-stableadamw",
        "optimis",
        "AdamW of torch-optimi that bounds each tensor's update: steady without max_grad_norm.",
        OptimiAdamOptions,
        _numbers(1e-2, 1e-6, (0.9, 0.99)),
        cls="StableAdamW",
        needs="train",
        state_bytes=8,
        remembers=("step",),
        bf16_weights=True,
    ),
    _row(
        "optimi-adan",
        "optimis",
        "Adan of torch-optimi: Adam with Nesterov's momentum, of 3 betas; takes larger rates.",
        OptimiAdanOptions,
        _numbers(2e-2, 1e-6, (0.98, 0.92, 0.999)),
        cls="Adan",
        needs="train",
        state_bytes=16,
        remembers=("step",),
    ),
    *(
        _row(
            name,
            "bitsandbytes",
            summary,
            options,
            numbers,
            cls=cls,
            needs="bnb",
            state_bytes=state_bytes,
            syncs=True,  # it calls torch.cuda.synchronize() after every tensor
            on=("cuda", "cpu"),
        )
        for name, cls, summary, options, numbers, state_bytes in _BNB
    ),
    _row(
        "prodigy",
        "prodigy",
        "Prodigy: AdamW that finds its own rate; learning_rate is a factor on it, usually 1.",
        ProdigyOptions,
        _numbers(0.0, 1e-8, (0.9, 0.99)),
        needs="optimizers",
        state_bytes=16,
        syncs=True,
        own_rate=True,
        remembers=("k", "d", "d_max", "d_numerator"),
    ),
    _row(
        "adamw_schedulefree",
        "schedule_free",
        "Schedule-free AdamW (Defazio et al. 2024): an average of the weights takes the place of a"
        " falling rate; that average is what is shown, saved and exported.",
        ScheduleFreeOptions,
        _numbers(1e-2, 1e-8),
        needs="optimizers",
        state_bytes=8,
        no_schedule=True,
        remembers=("k", "weight_sum", "lr_max"),
    ),
    _row(
        "soap",
        "soap",
        "SOAP: Adam in the eigenbasis of Shampoo; remembers the squares of both sides of a matrix.",
        SOAPOptions,
        _numbers(1e-2, 1e-8, (0.95, 0.95)),
        needs="optimizers",
        state_bytes=24,
        remembers=("step",),
    ),
    _row(
        "came",
        "came",
        "CAME: Adafactor with a momentum and a guard against unsure updates; half AdamW's memory.",
        CAMEOptions,
        _numbers(0.0, betas=(0.9, 0.999, 0.9999)),
        needs="optimizers",
        state_bytes=4.06,
        remembers=("step",),
    ),
)

_NOT_BUILT = (
    ("torch-adagrad", "PyTorch's Adagrad.", None, _numbers(0.0, 1e-10, None)),
    ("torch-adadelta", "PyTorch's Adadelta.", None, _numbers(0.0, 1e-6, None)),
    ("torch-adamax", "PyTorch's Adamax.", None, _ADAM),
    ("torch-asgd", "PyTorch's averaged SGD.", None, _PLAIN),
    ("torch-nadam", "PyTorch's NAdam.", None, _ADAM),
    ("torch-radam", "PyTorch's RAdam.", None, _ADAM),
    ("torch-rmsprop", "PyTorch's RMSprop.", None, _numbers(0.0, 1e-8, None)),
    ("optimi-radam", "RAdam of torch-optimi.", "train", _numbers(0.0, 1e-6, (0.9, 0.99))),
    ("optimi-ranger", "Ranger of torch-optimi.", "train", _numbers(0.0, 1e-6, (0.9, 0.99))),
    ("optimi-sgd", "SGD of torch-optimi.", "train", _PLAIN),
    ("bnb-adagrad", "Adagrad of bitsandbytes.", "bnb", _numbers(0.0, 1e-10, None)),
    ("bnb-adagrad8bit", "Adagrad, 8-bit.", "bnb", _numbers(0.0, 1e-10, None)),
    ("bnb-adam", "Adam of bitsandbytes.", "bnb", _ADAM),
    ("bnb-adam8bit", "Adam with 8-bit moments.", "bnb", _ADAM),
    ("bnb-ademamix-paged", "AdEMAMix whose moments page; CUDA only.", "bnb", _ADEMAMIX),
    (
        "bnb-ademamix8bit-paged",
        "AdEMAMix with 8-bit moments that page; CUDA only.",
        "bnb",
        _ADEMAMIX,
    ),
    ("ao-adamw8bit", "AdamW of torchao with 8-bit moments.", None, _ADAMW),
    ("ao-adamw4bit", "AdamW of torchao with 4-bit moments.", None, _ADAMW),
    ("ao-adamfp8", "Adam of torchao with fp8 moments.", None, _ADAMW),
    ("ao-adamwfp8", "AdamW of torchao with fp8 moments.", None, _ADAMW),
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
        elif name == "betas" and len(row.fact(name)) != 2:
            count = len(row.fact(name))
            sentence = f"{optimizer} has {count} betas; write them in optimizer_config"
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
