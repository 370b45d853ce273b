"""AdamW for fp32 and bf16 weights: fp32 moments, fp32 updates, stochastic rounding where bf16.

Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2. A bf16 weight near 1 cannot take a step
under 2^-9, so plain rounding freezes it; rounding up with the probability of the part cut off keeps
the mean exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from simpletuner.core.errors import ConfigError
from simpletuner.core.seeds import key64

_WIDTHS = (torch.float32, torch.bfloat16)
_MOST_NUMBERS = 1 << 26
"""Updated at once: what bounds the fp32 copies a step needs, 256 MiB each."""


class AdamWBF16(torch.optim.Optimizer):  # type: ignore[misc]
    """AdamW whose moments are fp32 whatever the weights are.

    Args:
        groups: Parameter groups; each has ``names``, one for each of its parameters.
        seed: Of the rounding; each (seed, step, name) has its own stream, so that one more
            parameter changes nothing for the others.

    Raises:
        ConfigError: A weight is neither fp32 nor bf16.
    """

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups, defaults)
        self._seed = seed
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if parameter.dtype not in _WIDTHS:
                    raise ConfigError(
                        f"optimizer: adamw_bf16 trains fp32 and bf16 weights; {name} is"
                        f" {str(parameter.dtype).removeprefix('torch.')}",
                        fix="set optimizer to torch-adamw",
                    )

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every parameter that has a gradient."""
        assert closure is None, "closures are not used by the trainer"
        for group in self.param_groups:
            by_step: dict[int, list[tuple[str, Tensor]]] = {}
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if parameter.grad is not None:
                    count = self._count(parameter)
                    by_step.setdefault(count, []).append((name, parameter))
            for step, members in by_step.items():
                for portion in _portions(members):
                    self._update(group, step, portion)

    def _count(self, parameter: Tensor) -> int:
        """Count the step of one parameter; a plain number, so that no device has to be asked."""
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(
                    parameter, dtype=torch.float32, memory_format=torch.preserve_format
                )
        state["step"] += 1
        return int(state["step"])

    def _update(
        self, group: Mapping[str, Any], step: int, members: list[tuple[str, Tensor]]
    ) -> None:
        beta1, beta2 = group["betas"]
        parameters = [p for _, p in members]
        gradients = [p.grad.float() for p in parameters]
        first = [self.state[p]["exp_avg"] for p in parameters]
        second = [self.state[p]["exp_avg_sq"] for p in parameters]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        denominators = torch._foreach_sqrt(second)
        torch._foreach_div_(denominators, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(denominators, group["eps"])
        # fp32 weights are updated in place, bf16 ones as fp32 copies that are rounded back
        wide = [p if p.dtype == torch.float32 else p.float() for p in parameters]
        torch._foreach_mul_(wide, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(wide, first, denominators, -group["lr"] / (1 - beta1**step))
        for (name, parameter), value in zip(members, wide, strict=True):
            if value is not parameter:
                key = key64(self._seed, "rounding", step, name)
                parameter.copy_(round_stochastically(value, key))


def _portions(members: list[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """`members` in their order, cut where a part would pass the most that is updated at once."""
    portion: list[tuple[str, Tensor]] = []
    count = 0
    for member in members:
        size = member[1].numel()
        if portion and count + size > _MOST_NUMBERS:
            yield portion
            portion, count = [], 0
        portion.append(member)
        count += size
    if portion:
        yield portion


def round_stochastically(value: Tensor, key: int) -> Tensor:
    """Round fp32 to bf16, up or down with the probability that keeps the mean.

    A bf16 is the upper half of an fp32: random 16 bits are added to the lower half, whose carry is
    the rounding up, and the lower half is cut off. Infinities and NaN stay what they are.

    Args:
        value: fp32, any shape.
        key: Of this rounding's random bits. They are drawn on the device of `value`: a model's
            worth of them each step would take longer to draw on the CPU than the step itself.

    Returns:
        bf16, the shape of `value`.
    """
    generator = None
    if value.device.type != "meta":
        generator = torch.Generator(value.device).manual_seed(key >> 1)
    noise = torch.randint(
        1 << 16, value.shape, generator=generator, dtype=torch.int32, device=value.device
    )
    rounded = ((value.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)
