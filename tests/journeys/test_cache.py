"""`simpletuner cache`: what a run would encode, done, counted, checked and cleared by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simpletuner.apps.cli import main
from tests.runs import Run

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path, tiny_sdxl: Path) -> Run:
    """Eight pictures whose cache is built."""
    run = Run(tmp_path, tiny_sdxl)
    assert cache(run, "build") == 0
    return run


def cache(run: Run, command: str, *more: str) -> int:
    return main(["cache", command, "--config", str(run.write()), *more])


def told(run: Run, captured: Captured, *words: str) -> dict[str, dict[str, Any]]:
    """The JSON of a command, by the title of each cache."""
    captured.readouterr()
    assert cache(run, *words, "--json") == 0
    return {each["title"]: each for each in json.loads(captured.readouterr().out)}


def test_what_was_built_is_all_that_training_needs(run: Run, capsys: Captured) -> None:
    found = told(run, capsys, "status")
    assert found["latents of pictures"]["present"] == found["latents of pictures"]["wanted"] == 8
    # a caption for each picture, the dropped one, the validation's and its negative one
    assert found["text embeddings"]["present"] == found["text embeddings"]["wanted"] == 11
    assert all(each["unused"] == 0 for each in found.values())
    assert not (run.out / "run.json").exists()  # nothing was trained

    assert run.train() == 0
    assert run.encoded() == 0


def test_entries_that_are_not_used_any_more_are_counted_and_removed(
    run: Run, capsys: Captured
) -> None:
    renamed = run.pictures / "a_picture_number_0.png"
    renamed.rename(run.pictures / "something_else.png")
    (run.pictures / "a_picture_number_1.png").unlink()
    assert cache(run, "build") == 0
    found = told(run, capsys, "status")
    assert found["latents of pictures"]["unused"] == 1
    assert found["text embeddings"]["unused"] == 2

    would = told(run, capsys, "gc")
    assert would["latents of pictures"]["entries"] == 0  # most of its pack is used
    assert told(run, capsys, "status") == found

    for path in sorted(run.pictures.iterdir())[:5]:
        path.unlink()
    done = told(run, capsys, "gc", "--yes")
    assert done["latents of pictures"]["entries"] == 6
    after = told(run, capsys, "status")
    assert all(each["unused"] == 0 for each in after.values())
    assert after["latents of pictures"]["present"] == 2
    assert run.train() == 0
    assert run.encoded() == 0


def test_what_another_run_uses_is_kept_if_it_is_named(
    run: Run, tmp_path: Path, tiny_sdxl: Path, capsys: Captured
) -> None:
    other = Run(tmp_path / "other", tiny_sdxl, run.pictures)
    shared = {"cache_dir": str(run.out / "cache"), "output_dir": str(tmp_path / "other/out")}
    other.settings |= shared
    other.dataset["resolution"] = 96
    assert cache(other, "build") == 0
    kept = told(other, capsys, "status")["latents of pictures"]["present"]
    assert kept == 8

    run.dataset["resolution"] = 80
    named = str(other.write())
    assert told(run, capsys, "gc", "--yes", "--also", named)["latents of pictures"]["entries"] == 8
    assert told(other, capsys, "status")["latents of pictures"]["present"] == 8

    assert told(run, capsys, "gc", "--yes")["latents of pictures"]["entries"] == 8
    assert told(other, capsys, "status")["latents of pictures"]["present"] == 0


def test_a_damaged_entry_is_found_and_encoded_again(run: Run, capsys: Captured) -> None:
    assert cache(run, "verify") == 0
    (pack,) = (run.out / "cache/vae").rglob("*.safetensors")
    data = bytearray(pack.read_bytes())
    data[-3] ^= 1
    pack.write_bytes(data)

    capsys.readouterr()
    assert cache(run, "verify") == 4
    assert (
        "latents of pictures: 1 damaged, encoded again by the next start" in capsys.readouterr().out
    )

    assert run.train() == 0
    assert run.encoded() == 1
    assert cache(run, "verify") == 0


def test_scan_for_errors_reads_all_latents_when_a_run_starts(run: Run, capsys: Captured) -> None:
    (pack,) = (run.out / "cache/vae").rglob("*.safetensors")
    data = bytearray(pack.read_bytes())
    data[-3] ^= 1
    pack.write_bytes(data)

    run.dataset["scan_for_errors"] = True
    assert run.train() == 0
    assert run.encoded() == 1
    assert "1 of its encoded pictures are damaged and encoded again" in capsys.readouterr().out
    assert run.train(max_train_steps=5) == 0
    assert "its encoded pictures are whole" in capsys.readouterr().out


@pytest.mark.parametrize("words", [("build", "--json"), ("status", "--yes"), ("verify", "--yes")])
def test_an_option_of_another_command_is_refused(
    run: Run, capsys: Captured, words: tuple[str, ...]
) -> None:
    assert cache(run, *words) == 2
    assert words[1].removeprefix("--") in capsys.readouterr().err


def test_the_folder_of_a_run_at_work_is_left_alone(run: Run, capsys: Captured) -> None:
    from simpletuner.core.files import RunFolder

    with RunFolder(run.out).locked():
        assert cache(run, "gc", "--yes") == 2
        assert cache(run, "build") == 2
        assert told(run, capsys, "status")["latents of pictures"]["present"] == 8
