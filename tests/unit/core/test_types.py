"""How tensors get to a device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from simpletuner.core.types import to_device


@dataclass
class Recorder:
    """Stands where a tensor stands and writes down what is asked of it; there is no GPU here."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    asked: list[Any] = field(default_factory=list)

    def pin_memory(self) -> Recorder:
        self.asked.append("pin")
        return self

    def to(self, device: torch.device, **more: Any) -> Recorder:
        self.asked.append((device.type, more))
        return self


def test_a_copy_to_cuda_is_pinned_and_not_waited_for() -> None:
    tensor = Recorder()

    to_device(tensor, torch.device("cuda"))  # type: ignore[arg-type]

    assert tensor.asked == ["pin", ("cuda", {"non_blocking": True})]


def test_nothing_is_pinned_for_other_devices_or_on_a_device() -> None:
    for tensor, target in (
        (Recorder(), "mps"),
        (Recorder(), "cpu"),
        (Recorder(torch.device("cuda")), "cuda"),
    ):
        to_device(tensor, torch.device(target))  # type: ignore[arg-type]

        assert tensor.asked == [(target, {})]
