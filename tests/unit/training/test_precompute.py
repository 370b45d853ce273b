"""What is encoded before training, and what is refused before that."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from simpletuner.config.load import load
from simpletuner.core.events import Bus
from simpletuner.core.seeds import Seeds
from simpletuner.core.types import Place, PlannedBatch
from simpletuner.data.source import DataSource
from simpletuner.models.loading import open_family
from simpletuner.precision.quantise import Quantiser
from simpletuner.training.precompute import precompute
from simpletuner.validation.prompts import Prompts
from tests.runs import Run


def test_what_takes_the_place_of_an_undecodable_picture_is_encoded_too(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path, tiny_sdxl)
    run.dataset["max_num_samples"] = 4
    loaded = load(["--config", str(run.write())], {}, tmp_path)
    config, (entry,) = loaded.config, loaded.datasets.training

    def opened() -> DataSource:
        return DataSource.open(entry, index_folder=tmp_path / "index", bus=Bus())

    chosen = opened()
    broken = run.pictures / chosen.path(2)
    broken.write_bytes(broken.read_bytes()[:-60])
    os.utime(broken, (1, 1))
    source = opened()
    assert not source.rejects
    assert broken.name in [source.path(row) for row in range(4)]

    caches = precompute(
        open_family(config.model, digests=tmp_path / "digests.json"),
        [source],
        Prompts.of(config.validation),
        loaded.datasets,
        config.cache,
        Quantiser(config.precision),
        Seeds(0),
        Place(torch.device("cpu"), torch.float32),
        Bus(),
    )

    (sound,) = caches.sources
    assert len(sound) == 4
    assert list(sound.rejects) == [broken.name]
    for row in range(4):
        planned = PlannedBatch(0, (row,), (0,), (1.0,), (0,), 1, epoch=0)
        assert caches.batch(planned).samples[0].path == sound.path(row)
    caches.close()


def test_a_step_without_a_dataset_is_refused_before_anything_is_encoded(
    tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, tiny_sdxl)
    run.dataset["end_step"] = 3  # of 4 in an epoch: `check` does not know how many there are
    assert run.train(max_train_steps=0, num_train_epochs=1) == 3
    assert "no dataset is drawn from in step 4 (epoch 1), and the run has 4 steps" in (
        capsys.readouterr().err
    )
    assert run.encoded() == 0
    run.dataset["end_step"] = 4
    assert run.train(max_train_steps=0, num_train_epochs=1, validation_disable=True) == 0
