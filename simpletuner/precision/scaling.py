"""A loss that is scaled up, so that the gradients of fp16 activations do not vanish.

fp16 ends at 6e-8, and many gradients are smaller. The loss times a large factor gives gradients
times that factor; they are divided again before anything looks at them (Micikevicius et al. 2017,
arXiv 1710.03740). Where the factor was too large they are not finite: that step is not taken, and
the factor is halved. It doubles again after 2,000 steps without that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simpletuner.core.errors import RESUME, TrainingError

if TYPE_CHECKING:
    from torch.optim import Optimizer

_FIRST = 2.0**16


class Scaler:
    """Scales the loss of one optimizer; torch's GradScaler, with a memory that can be saved.

    Args:
        device: Where the loss is.
        first: The factor to begin with.
    """

    def __init__(self, device: torch.device, first: float = _FIRST) -> None:
        self._torch = torch.amp.GradScaler(device.type, init_scale=first)

    @classmethod
    def of(cls, dtype: torch.dtype, device: torch.device) -> Scaler | None:
        """What a run in `dtype` needs: nothing, but for fp16."""
        return cls(device) if dtype == torch.float16 else None

    def scaled(self, loss: Tensor) -> Tensor:
        """`loss` times the factor."""
        scaled: Tensor = self._torch.scale(loss)
        return scaled

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the factor, in place."""
        self._torch.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> bool:
        """Let the optimizer take its step, unless a gradient is not finite; waits for the device.

        Returns:
            True if it was taken.

        Raises:
            TrainingError: There are gradients that no factor makes finite.
        """
        before = self.factor
        self._torch.step(optimizer)
        self._torch.update()
        taken = self.factor >= before
        if not taken and self.factor < 1:
            raise TrainingError(
                "gradients overflow the range of fp16 in every step, however small the loss",
                fix=f"set mixed_precision to bf16, or to no; {RESUME}",
            )
        return taken

    @property
    def factor(self) -> float:
        """What the next loss is multiplied by."""
        return self._torch.get_scale()

    def tensors(self) -> dict[str, Tensor]:
        """What it remembers, 0-dim."""
        state = self._torch.state_dict()
        return {
            "factor": torch.tensor(state["scale"], dtype=torch.float64),
            "steps since": torch.tensor(state["_growth_tracker"], dtype=torch.int64),
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        told = {"scale": tensors["factor"].item(), "_growth_tracker": tensors["steps since"].item()}
        self._torch.load_state_dict({**self._torch.state_dict(), **told})
