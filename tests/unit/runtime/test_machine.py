"""The device that training is going to run on, told without torch."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from simpletuner.runtime import machine

NONE = Path("/nonexistent")


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(machine, "_NVIDIA", (NONE,))
    monkeypatch.setattr(machine, "_AMD", NONE)
    return monkeypatch


def test_a_machine_without_cards_is_a_cpu(linux: pytest.MonkeyPatch) -> None:
    assert machine.device_kind({}) == "cpu"


@pytest.mark.parametrize("card", ["_NVIDIA", "_AMD"])
def test_a_card_is_cuda_unless_it_is_hidden(
    card: str, linux: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there = (tmp_path,) if card == "_NVIDIA" else tmp_path
    linux.setattr(machine, card, there)
    assert machine.device_kind({}) == "cuda"
    assert machine.device_kind({"CUDA_VISIBLE_DEVICES": "0"}) == "cuda"
    assert machine.device_kind({"CUDA_VISIBLE_DEVICES": ""}) == "cpu"
    assert machine.device_kind({"ACCELERATE_USE_CPU": "true"}) == "cpu"


def test_apple_s_own_processors_are_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    for processor, kind in (("arm64", "mps"), ("x86_64", "cpu")):
        monkeypatch.setattr(platform, "machine", lambda named=processor: named)
        assert machine.device_kind({}) == kind


def test_it_is_what_accelerate_finds_here() -> None:
    from accelerate import PartialState

    assert machine.device_kind(os.environ) == PartialState().device.type
