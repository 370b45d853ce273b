"""Two guards: the loss is finite, and everything that should learn does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from simpletuner.core.errors import RESUME, TrainingError
from simpletuner.training.stepper import gradients

if TYPE_CHECKING:
    from simpletuner.adapters.weights import Weights
    from simpletuner.core.types import Batch, PlannedBatch
    from simpletuner.training.stepper import Stepper

_STEPS = 3


class LearningGuard:
    """After the first steps every trainable tensor has had a gradient and has moved.

    LoRA's A gets its first gradient in the second step, for B starts at zero; what stands before
    two layers of zeros in a ControlNet gets it in the third. A step whose loss is 0 has nothing to
    teach and does not count: one of regularisation pictures while the adapters are as new, or of
    pictures that are masked out wholly; nor, where text encoders train, does one without captions,
    which some families replace by zeros. Where what the steps so far can have moved is below the
    last digit of a tensor's numbers, it need not have moved: a step moves by about
    ``rate · g / (g + eps)``, and behind layers that have just left zero g is far below eps.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._of_text = any(group.text for group in weights.trainable.groups())
        parameters = weights.trainable.parameters()
        self._start = {name: _some_of(p).clone() for name, p in parameters.items()}
        self._touched: dict[str, Tensor] = {}
        self._reach: dict[str, Tensor] = {}
        self._steps = 0

    def watch(self, loss: Tensor, *, captioned: bool = True) -> None:
        """Look at the gradients of the step just done; judges after the third, then lets go.

        Args:
            loss: Of that step, 0-dim.
            captioned: Some of its samples had a caption.

        Raises:
            TrainingError: Some tensors cannot learn; names them.
        """
        if self._steps >= _STEPS or not bool(loss) or (self._of_text and not captioned):
            return
        groups = self._weights.optimizer.param_groups
        rates = {  # d is Prodigy's own rate
            id(p): group["lr"] * group.get("d", 1.0) for group in groups for p in group["params"]
        }
        eps = max(each if isinstance(each := g.get("eps"), float) else 1e-8 for g in groups)
        parameters = self._weights.trainable.parameters()
        for name, gradient in gradients(self._weights):
            if gradient is not None:
                largest = gradient.detach().abs().amax().float()
                self._touched[name] = (largest > 0) | self._touched.get(name, largest > 0)
                moved = rates[id(parameters[name])] * largest / (largest + eps)
                self._reach[name] = moved + self._reach.get(name, torch.zeros_like(moved))
        self._steps += 1
        if self._steps == _STEPS:
            self._judge()
            self._start.clear()

    def _judge(self) -> None:
        parameters = self._weights.trainable.parameters()
        cold = [n for n in parameters if n not in self._touched or not bool(self._touched[n])]
        warm = [name for name in parameters if name not in cold]
        dead = sorted(cold + [name for name in warm if self._stands(name, parameters[name])])
        if dead:
            why = "got no gradient" if cold else "did not move"
            raise TrainingError(
                f"{len(dead)} of {len(parameters)} trainable tensors {why} in {_STEPS} steps:"
                f" {_some(dead)}",
                fix="leave these modules out of peft_lora_target_modules or trainable_models, or"
                " raise learning_rate",
            )

    def _stands(self, name: str, parameter: Tensor) -> bool:
        start = self._start[name]
        if not torch.equal(_some_of(parameter), start):
            return False
        digit = torch.finfo(start.dtype).eps * float(start.abs().max())
        return float(self._reach[name]) > 2 * digit


def _some_of(parameter: Tensor) -> Tensor:
    """A view of at most 65,536 numbers: a copy of all of a large model would need its memory."""
    flat = parameter.detach().flatten()
    return flat[:: -(-flat.numel() // (1 << 16))]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def explain_not_finite(
    stepper: Stepper, step: int, window: Sequence[tuple[PlannedBatch, Batch]]
) -> TrainingError:
    """Replay a window, which is pure, and name the samples and the first module that went wrong.

    By then the update has spread what is not finite over the adapters, so the replay is made
    without them: what it finds is in the data or the base, what it does not find is divergence.
    Compiled blocks are replayed as they are written, or nobody could look inside.
    """
    blamed: list[str] = []
    where = "the loss itself"
    trainable = stepper.weights.trainable
    for micro, (planned, batch) in enumerate(window):
        fault = _FirstFault(trainable.modules)
        stance = torch.compiler.set_stance("force_eager")
        with trainable.disabled(), fault, torch.no_grad(), stance:
            share = stepper.micro_loss(step, micro, planned, batch)
        if fault.name is not None:
            where = f"module {fault.name}"
        if fault.name is not None or not torch.isfinite(share):
            blamed += [f"{s.dataset}/{s.path}" for s in batch.samples]
    if blamed:
        found = f"samples {_some(blamed)}, first in {where}"
        fix = (
            "look at the base model's precision, or repair or remove these pictures and start"
            " again with --on_data_change continue"
        )
    else:
        found = "samples and base model are sound, so what was trained has diverged"
        fix = "lower learning_rate or max_grad_norm"
    return TrainingError(
        f"the loss of step {step + 1} is not finite: {found}",
        fix=f"{fix}; {RESUME}",
    )


class _FirstFault:
    """Remembers the first module whose output is not finite while it is open."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.name: str | None = None
        self._models = models
        self._hooks: list[Any] = []

    def __enter__(self) -> _FirstFault:
        for name, module in (each for model in self._models for each in model.named_modules()):
            if not list(module.children()):
                self._hooks.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Any:
        def look(_module: nn.Module, _inputs: object, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if self.name is None and isinstance(tensor, Tensor) and not tensor.isfinite().all():
                self.name = name

        return look
