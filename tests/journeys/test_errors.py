"""What goes wrong in a user's hands: the message, the exit code, and that nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import Run, make_pictures

Captured = pytest.CaptureFixture[str]


def test_a_mistyped_key_exits_2_and_names_the_right_one(
    tmp_path: Path, tiny_sdxl: Path, capsys: Captured
) -> None:
    run = Run(tmp_path, tiny_sdxl)
    assert run.train(lerning_rate=1e-4) == 2
    message = capsys.readouterr().err
    assert "lerning_rate" in message
    assert "did you mean learning_rate?" in message
    assert "line " in message
    assert not run.out.exists()


def test_a_setting_that_is_not_built_yet_exits_2_and_is_named(
    tmp_path: Path, tiny_sdxl: Path, capsys: Captured
) -> None:
    assert Run(tmp_path, tiny_sdxl).train(compress_disk_cache=True) == 2
    assert "compress_disk_cache" in capsys.readouterr().err


def test_a_missing_folder_exits_3(tmp_path: Path, tiny_sdxl: Path, capsys: Captured) -> None:
    run = Run(tmp_path, tiny_sdxl)
    run.dataset["instance_data_dir"] = str(tmp_path / "nowhere")
    assert run.train() == 3
    assert f"{tmp_path / 'nowhere'} does not exist" in capsys.readouterr().err


def test_an_empty_folder_exits_3(tmp_path: Path, tiny_sdxl: Path, capsys: Captured) -> None:
    (tmp_path / "empty").mkdir()
    assert Run(tmp_path / "run", tiny_sdxl, tmp_path / "empty").train() == 3
    assert "no pictures" in capsys.readouterr().err


def test_one_broken_picture_is_named_and_left_out(tmp_path: Path, tiny_sdxl: Path) -> None:
    run = Run(tmp_path, tiny_sdxl)
    (run.pictures / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    assert run.train(max_train_steps=1, validation_disable=True) == 0
    notices = "\n".join(event["text"] for event in run.events("notice"))
    assert "broken.png" in notices


def test_too_many_broken_pictures_exit_3_before_anything_is_loaded(
    tmp_path: Path, tiny_sdxl: Path, capsys: Captured
) -> None:
    run = Run(tmp_path, tiny_sdxl)
    for number in range(4):
        (run.pictures / f"broken_{number}.png").write_bytes(b"not a picture")
    assert run.train() == 3
    message = capsys.readouterr().err
    assert "broken_0.png" in message
    assert "allow_excluded" in message
    assert not (run.out / "cache" / "vae").exists()


def test_a_caption_in_cp1252_is_read_and_told(tmp_path: Path, tiny_sdxl: Path) -> None:
    run = Run(tmp_path, tiny_sdxl)
    for picture in run.pictures.glob("*.png"):
        picture.with_suffix(".txt").write_text("a picture", encoding="utf-8")
    (run.pictures / "a_picture_number_0.txt").write_bytes("a caf\xe9".encode("cp1252"))
    run.dataset["caption_strategy"] = "textfile"
    assert run.train(max_train_steps=1, validation_disable=True) == 0
    notices = "\n".join(event["text"] for event in run.events("notice"))
    assert "a_picture_number_0.txt" in notices


def test_an_unreachable_model_exits_5_and_keeps_what_was_indexed(
    tmp_path: Path, tiny_sdxl: Path, capsys: Captured
) -> None:
    run = Run(tmp_path, tiny_sdxl)
    assert run.train(pretrained_model_name_or_path="owner/nowhere") == 5
    assert "owner/nowhere is not on this machine" in capsys.readouterr().err
    assert list((run.out / "cache" / "index").glob("*.parquet"))


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, tiny_sdxl: Path
) -> None:
    run = Run(tmp_path, tiny_sdxl)
    assert run.train(validation_disable=True) == 0
    weights = run.out / "checkpoint-4" / "trainable.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert run.train(validation_disable=True) == 0
    notices = [event["text"] for event in run.events("notice")]
    assert any("checkpoint-4/trainable.safetensors is damaged" in text for text in notices)
    assert [event["step"] for event in run.events("step")] == [1, 2, 3, 4, 3, 4]
    assert run.losses()[2:4] == run.losses()[4:6]


def test_a_checkpoint_that_does_not_exist_exits_7(
    tmp_path: Path, tiny_sdxl: Path, capsys: Captured
) -> None:
    run = Run(tmp_path, tiny_sdxl)
    assert run.train(resume_from_checkpoint="checkpoint-99", validation_disable=True) == 7
    assert "checkpoint-99" in capsys.readouterr().err


_LEAVE_IN_AN_IMPORT = """
import os, sys
from simpletuner.apps.cli import main

class Leave:
    def find_spec(self, name, *_):
        if name == "diffusers.models.autoencoders.autoencoder_kl":
            os.kill(os.getpid(), int(sys.argv[1]))

sys.meta_path.insert(0, Leave())
sys.exit(main(["train", "--config", sys.argv[2]]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_library_is_imported_late_leaves_as_one_at_any_other_time(
    tmp_path: Path, tiny_sdxl: Path, number: signal.Signals
) -> None:
    """In a process of its own, for nothing may have been imported; diffusers renames exceptions."""
    run = Run(tmp_path, tiny_sdxl)
    ended = subprocess.run(
        [sys.executable, "-c", _LEAVE_IN_AN_IMPORT, str(int(number)), str(run.write())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert ended.returncode == 128 + number, ended.stderr
    assert f"stopped by {number.name} outside the steps" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert run.events()[-1]["exit_code"] == 128 + number


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_next_start_goes_on(
    tmp_path: Path, tiny_sdxl: Path, number: signal.Signals
) -> None:
    run = Run(tmp_path, tiny_sdxl, make_pictures(tmp_path / "pictures"))
    config = run.write(max_train_steps=3000, validation_disable=True, lr_scheduler="constant")
    child = subprocess.Popen(
        [sys.executable, "-m", "simpletuner", "train", "--config", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    deadline = time.monotonic() + 300
    while not (run.out / "events.jsonl").exists() or len(run.losses()) < 3:
        assert time.monotonic() < deadline, "no step was taken"
        time.sleep(0.1)
    child.send_signal(number)
    _, message = child.communicate(timeout=300)
    assert child.returncode == 128 + number
    assert f"stopped by {number.name} after step" in message
    steps = len(run.losses())
    assert (run.out / f"checkpoint-{steps}" / "manifest.json").is_file()
    again = {"validation_disable": True, "lr_scheduler": "constant"}
    assert run.train(max_train_steps=steps + 1, **again) == 0
    assert [event["step"] for event in run.events("step")] == list(range(1, steps + 2))
