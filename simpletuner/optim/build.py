"""From settings and parameter groups to an optimizer, and its memory by parameter name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simpletuner.core.errors import TrainingError
from simpletuner.optim.optimizers import OPTIMIZERS, numbers

if TYPE_CHECKING:
    from simpletuner.core.seeds import Seeds
    from simpletuner.core.types import ParamGroup
    from simpletuner.optim.settings import OptimizerSettings


def options_of(settings: OptimizerSettings) -> dict[str, Any]:
    """The numbers of the optimizer of `settings`: its own under what the user set.

    Raises:
        ConfigError: The optimizer does not take what was set.
    """
    beta1, beta2 = settings.optimizer_beta1, settings.optimizer_beta2
    return numbers(
        settings.optimizer,
        betas=None if beta1 is None or beta2 is None else (beta1, beta2),
        weight_decay=settings.adam_weight_decay,
        eps=settings.adam_epsilon,
        config=settings.optimizer_config,
    )


def build_optimizer(
    settings: OptimizerSettings, groups: Sequence[ParamGroup], seeds: Seeds
) -> torch.optim.Optimizer:
    """The optimizer of `settings`, with one parameter group for each of `groups`.

    A parameter group has ``name``; ``names`` beside ``params``; and ``lr_scale`` for whoever sets
    the learning rate.

    Raises:
        ConfigError: The optimizer does not take what was set.
        ExtraMissing: Its package is not installed.
    """
    assert len({group.name for group in groups}) == len(groups), "state is kept by group name"
    row = OPTIMIZERS[settings.optimizer]
    scales = [g.lr_scale * settings.share_of(text=g.text, whole=g.whole) for g in groups]
    make = row.load()
    options = options_of(settings)
    decay = options.pop("weight_decay")
    if settings.gradient_precision == "fp32":
        for parameter in _parameters(groups).values():
            parameter.grad_dtype = torch.float32
    if settings.prodigy_steps is not None:
        options["steps"] = settings.prodigy_steps
    ready = [
        {
            "name": group.name,
            "names": list(group.parameters),
            "params": list(group.parameters.values()),
            "weight_decay": decay if group.decay else 0.0,
            "lr": settings.learning_rate * scale,
            "lr_scale": scale,
            "optimizer": row.name,
            "remembers": row.fact("remembers", ()),
        }
        for group, scale in zip(groups, scales, strict=True)
    ]
    optimizer: torch.optim.Optimizer = make(
        ready, cls=row.fact("cls"), seed=seeds.seed, lr=settings.learning_rate, **options
    )
    return optimizer


# --- what it remembers, by name ------------------------------------------------------------------


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, groups: Sequence[ParamGroup]
) -> dict[str, Tensor]:
    """Everything the optimizer remembers, copied, as ``<what>:<parameter>`` in its own dtype.

    Plain numbers become 0-dim int64 or fp64 tensors; what belongs to a whole group is
    ``group:<what>:<group>``.
    """
    held = _held(optimizer, groups)
    return {key: _as_tensor(holder[place]) for key, (holder, place) in held.items()}


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, groups: Sequence[ParamGroup], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave, bit for bit; the weights stay as they are.

    Torch's own ``load_state_dict`` casts moments to the weights' dtype and is not used.

    Raises:
        TrainingError: They are another optimizer's, or name parameters that do not train now.
    """
    parameters = _parameters(groups)
    pairs = [key.partition(":")[::2] for key in tensors]
    stored = {name for what, name in pairs if what != "group"}
    if strangers := sorted(stored - parameters.keys()):
        raise _mismatch(f"remembers {strangers[0]}, which does not train now")
    optimizer.state.clear()
    if tensors:
        _take_empty_step(optimizer, {id(parameters[name]) for name in stored})
    now = optimizer_tensors(optimizer, groups)
    if differing := sorted(now.keys() ^ tensors.keys()):
        whose = "lacks" if differing[0] in now else "remembers"
        raise _mismatch(f"{whose} {differing[0]}")
    held = _held(optimizer, groups)
    for key, tensor in tensors.items():
        if tensor.shape != now[key].shape:
            shapes = f"{tuple(tensor.shape)}, now {tuple(now[key].shape)}"
            raise _mismatch(f"remembers {key} of shape {shapes}")
        if tensor.dtype != now[key].dtype:
            dtypes = f"{_name(tensor.dtype)}, now {_name(now[key].dtype)}"
            raise _mismatch(f"remembers {key} in {dtypes}")
        holder, place = held[key]
        before = holder[place]
        if isinstance(before, Tensor):
            before.copy_(tensor)
        else:
            holder[place] = type(before)(tensor.item())


def _take_empty_step(optimizer: torch.optim.Optimizer, members: set[int]) -> None:
    """Let the optimizer set itself up, as each does in its first step, without moving a weight.

    What it then remembers is overwritten; what it decided about itself (whether to compensate
    rounding, which kernels to use) is as in an unbroken run.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [(p, p.grad, p.detach().clone() if id(p) in members else None) for p in parameters]
    rates = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
    for p in parameters:
        p.grad = torch.zeros_like(p, dtype=p.grad_dtype) if id(p) in members else None
    optimizer.step()
    with torch.no_grad():
        for p, gradient, value in kept:
            p.grad = gradient
            if value is not None:
                p.copy_(value)
    for group, (rate, decay) in zip(optimizer.param_groups, rates, strict=True):
        group["lr"], group["weight_decay"] = rate, decay


def _parameters(groups: Sequence[ParamGroup]) -> dict[str, torch.nn.Parameter]:
    return {name: p for group in groups for name, p in group.parameters.items()}


def _held(
    optimizer: torch.optim.Optimizer, groups: Sequence[ParamGroup]
) -> dict[str, tuple[Any, Any]]:
    """Where each thing the optimizer remembers is held: a mapping or list, and its place there."""
    found: dict[str, tuple[Any, Any]] = {}
    for name, parameter in _parameters(groups).items():
        state = optimizer.state.get(parameter, {})
        for what in state:
            for title, holder, place in _pieces(str(what), state, what):
                found[f"{title}:{name}"] = (holder, place)
    for group in optimizer.param_groups:
        for what in group["remembers"]:
            if what in group:
                found[f"group:{what}:{group['name']}"] = (group, what)
    return found


def _pieces(title: str, holder: Any, place: Any) -> Iterator[tuple[str, Any, Any]]:
    """The tensors and numbers in one thing that is remembered, which may be a list of them."""
    value = holder[place]
    if isinstance(value, list):
        for number in range(len(value)):
            yield from _pieces(f"{title}.{number}", value, number)
    elif isinstance(value, Tensor | int | float):
        yield title, holder, place


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mismatch(what: str) -> TrainingError:
    return TrainingError(
        f"the optimizer saved in the checkpoint {what}",
        fix="set optimizer, optimizer_config and the trained layers back to what the checkpoint was"
        " made with, or start anew with resume_from_checkpoint none",
    )
