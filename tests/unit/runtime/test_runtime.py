"""What a process says of the machine it stands on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from simpletuner.core.errors import ConfigError
from simpletuner.core.types import Place
from simpletuner.runtime.runtime import Runtime, use_tf32
from tests.runs import Run

Patch = pytest.MonkeyPatch


@pytest.fixture
def switches() -> Iterator[None]:
    """Torch's switches, put back afterwards."""
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("allowed", [True, False])
def test_one_switch_for_products_and_convolutions(allowed: bool) -> None:
    use_tf32(allowed)
    assert torch.backends.cuda.matmul.allow_tf32 is allowed
    assert torch.backends.cudnn.allow_tf32 is allowed
    # what libraries ask; the newer interface of torch would make them raise
    assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")


@pytest.mark.usefixtures("switches")
def test_a_cpu_stays_exact() -> None:
    use_tf32(allowed=False)
    if Runtime.start(torch.float32, tf32=True).place.device.type != "cuda":
        assert torch.get_float32_matmul_precision() == "highest"


def test_one_process_stands_alone_on_its_device_in_its_dtype(monkeypatch: Patch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    place = Runtime.start(torch.bfloat16, tf32=True).place
    assert (place.dtype, place.rank, place.world) == (torch.bfloat16, 0, 1)
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert place == Place(torch.device("cpu"), torch.bfloat16)


def test_several_processes_of_a_launcher_are_refused(monkeypatch: Patch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a launcher started 2 processes") as error:
        Runtime.start(torch.float32, tf32=True)
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
