"""What a process says of the machine it stands on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simpletuner.core.errors import ConfigError
from simpletuner.core.types import Place
from simpletuner.runtime.runtime import Runtime
from tests.runs import Run

Patch = pytest.MonkeyPatch


def test_one_process_stands_alone_on_its_device_in_its_dtype(monkeypatch: Patch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    place = Runtime.start(torch.bfloat16).place
    assert (place.dtype, place.rank, place.world) == (torch.bfloat16, 0, 1)
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert place == Place(torch.device("cpu"), torch.bfloat16)


def test_several_processes_of_a_launcher_are_refused(monkeypatch: Patch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a launcher started 2 processes") as error:
        Runtime.start(torch.float32)
    assert error.value.fix == "start one process: bash train.sh, or simpletuner train"


def test_they_are_refused_before_data_or_model_are_looked_at(
    tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = Run(tmp_path, tmp_path / "no-model")
    assert run.train() == 2
    assert "a launcher started 2 processes" in capsys.readouterr().err
    assert not (run.out / "cache").exists()
    assert not run.events("stage")
    monkeypatch.delenv("WORLD_SIZE")
    assert run.train() == 5  # and only then that there is no such model
    assert (run.out / "cache").exists()
