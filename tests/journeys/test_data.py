"""`simpletuner data`: what would be trained on, told before anything heavy is loaded."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simpletuner.apps.cli import main
from simpletuner.core.events import Bus
from simpletuner.data.preview import look, sheet
from simpletuner.data.settings import DatasetSettings, DataSettings, inherit
from simpletuner.data.source import DataSource
from simpletuner.data.storage.local import LocalStorage
from tests.runs import Run

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Eight sound pictures, one too small and one whose pixels break off."""
    run = Run(tmp_path, tmp_path / "no model is needed")
    Image.new("RGB", (20, 20)).save(run.pictures / "small.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    whole = run.pictures / "torn.png"
    Image.fromarray(noise).save(whole)
    whole.write_bytes(whole.read_bytes()[:9000])
    for file in run.pictures.iterdir():  # so old that the index trusts their times
        os.utime(file, (1_700_000_000, 1_700_000_000))
    run.dataset |= {"minimum_image_size": 32, "repeats": 1}
    return run


def data(run: Run, command: str, *more: str) -> int:
    return main(["data", command, "--config", str(run.write()), *more])


def told(run: Run, command: str, captured: Captured) -> Any:
    """The JSON of a command that ends well."""
    captured.readouterr()
    assert data(run, command, "--json") == 0
    return json.loads(captured.readouterr().out)


def test_the_report_counts_what_is_found_used_and_left_out(run: Run, capsys: Captured) -> None:
    found = told(run, "report", capsys)
    (pictures,) = found["datasets"]
    assert (pictures["found"], pictures["usable"]) == (10, 9)
    small = {"reason": "minimum_image_size", "count": 1, "example": "small.png"}
    assert pictures["excluded"] == [small]
    by_size = {(b["width"], b["height"]): b["pictures"] for b in pictures["buckets"]}
    assert by_size == {(80, 48): 3, (48, 80): 2, (64, 64): 2, (96, 48): 2}
    assert all(b["samples"] == 2 * b["pictures"] for b in pictures["buckets"])
    assert found["samples_per_epoch"] == 18
    assert found["steps_per_epoch"] == 9  # units of two: 3 + 2 + 2 + 2

    assert data(run, "report") == 0
    said = capsys.readouterr().out
    assert "dataset pictures: 9 of 10 pictures are used" in said
    assert "left out       1  minimum_image_size, such as small.png" in said
    assert "80x48        3 pictures        6 samples an epoch" in said
    assert said.endswith("an epoch: 9 steps, 18 samples\n")


def test_the_report_tells_of_rare_buckets(run: Run, capsys: Captured) -> None:
    run.settings["train_batch_size"] = 5
    run.dataset["rare_buckets"] = "drop"
    (pictures,) = told(run, "report", capsys)["datasets"]
    rare = {"reason": "rare_buckets", "count": 6, "example": "a_picture_number_1.png"}
    assert rare in pictures["excluded"]
    assert pictures["usable"] == 3


def test_training_says_it_before_the_model_is_looked_for(run: Run, capsys: Captured) -> None:
    assert run.train() == 5  # there is no model
    said = capsys.readouterr().out
    assert "dataset pictures: 9 of 10 pictures are used" in said
    assert "an epoch: 9 steps, 18 samples" in said


def test_too_many_unusable_pictures_end_with_3(run: Run, capsys: Captured) -> None:
    for name in "abc":
        (run.pictures / f"{name}.png").write_bytes(b"")
    assert data(run, "report") == 3
    assert "a.png: the file is empty" in capsys.readouterr().err
    run.dataset["allow_excluded"] = True
    (pictures,) = told(run, "report", capsys)["datasets"]
    empty = {"reason": "the file is empty", "count": 3, "example": "a.png"}
    assert empty in pictures["excluded"]


def test_captions_are_listed(run: Run, capsys: Captured) -> None:
    found = told(run, "captions", capsys)["pictures"]
    assert found["a_picture_number_0.png"] == ["a picture number 0"]
    assert len(found) == 9


def test_verify_finds_what_breaks_off_and_the_report_then_knows(run: Run, capsys: Captured) -> None:
    assert data(run, "verify") == 3
    said = capsys.readouterr().out
    assert "pictures: torn.png: cannot be decoded" in said
    assert "pictures: 8 of 9 pictures can be decoded" in said

    (pictures,) = told(run, "report", capsys)["datasets"]
    assert pictures["usable"] == 8
    assert {each["example"] for each in pictures["excluded"]} == {"small.png", "torn.png"}
    capsys.readouterr()
    assert data(run, "verify") == 3  # it is still there
    assert "pictures: torn.png: cannot be decoded" in capsys.readouterr().out
    (run.pictures / "torn.png").unlink()
    assert data(run, "verify") == 0


def test_a_preview_shows_the_rest_where_a_picture_breaks_off(run: Run, capsys: Captured) -> None:
    assert data(run, "preview", "--out", str(run.root / "look.png")) == 3
    said = capsys.readouterr()
    assert "torn.png cannot be decoded" in said.err
    assert "8 pictures in" in said.out
    assert (run.root / "look.html").read_text().count("<li>a picture number") == 8

    assert data(run, "preview", "--out", str(run.root / "look.html")) == 3
    assert "look.html is not a .png" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [("preview", "--json"), ("report", "--count", "3"), ("captions", "--out", "x.png")]
)
def test_an_option_of_another_command_is_refused(
    run: Run, capsys: Captured, words: tuple[str, ...]
) -> None:
    assert data(run, *words) == 2
    assert words[1].removeprefix("--") in capsys.readouterr().err


def test_pictures_that_nothing_here_reads_are_counted_as_such(run: Run, capsys: Captured) -> None:
    (run.pictures / "torn.png").unlink()
    for name in ("phone.HEIC", "a.jxl", "a_picture_number_0.psd"):  # the last has a .png beside it
        (run.pictures / name).write_bytes(b"unknown")
    (pictures,) = told(run, "report", capsys)["datasets"]
    assert (pictures["found"], pictures["usable"]) == (11, 8)
    reasons = {each["example"]: each["reason"] for each in pictures["excluded"]}
    assert reasons["phone.HEIC"] == ".heic files are not read; save it as PNG or JPEG"
    assert reasons["a.jxl"] == ".jxl files are not read; save it as PNG or JPEG"


def test_several_frames_and_transparency_are_told(run: Run, capsys: Captured) -> None:
    frames = [Image.new("L", (64, 64), shade) for shade in (10, 200)]
    frames[0].save(run.pictures / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("RGBA", (64, 64), (9, 9, 9, 99)).save(run.pictures / "glass.png")
    assert data(run, "report") == 0
    said = capsys.readouterr().err
    assert "1 picture with several frames or pages, of which the first is used" in said
    assert "1 picture with an alpha channel, laid on image_background #" in said
    run.dataset["alpha_as_mask"] = True
    assert data(run, "report") == 0
    assert "alpha channel" not in capsys.readouterr().err


def test_names_are_shown_without_what_moves_a_terminals_cursor(run: Run, capsys: Captured) -> None:
    (run.pictures / "red \x1b[31m.png").write_bytes(b"")
    assert data(run, "verify") == 3
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert "red \\x1b[31m.png" in said.out


def test_the_preview_is_a_picture_and_the_dataset_is_only_read(run: Run) -> None:
    (run.pictures / "torn.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in run.pictures.rglob("*")}
    assert data(run, "preview", "--count", "4", "--out", str(run.root / "look.png")) == 0
    with Image.open(run.root / "look.png") as made:
        assert made.width > made.height > 300  # three beside each other, one below
    page = (run.root / "look.html").read_text()
    assert page.count("<li>a picture number") == 4
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    shapes = {Image.open(io.BytesIO(b64decode(each))).size for each in found}
    assert len(found) == 4
    assert shapes <= {(80, 48), (48, 80), (64, 64), (96, 48)}
    assert {path: path.stat().st_mtime_ns for path in run.pictures.rglob("*")} == before


def test_a_preview_that_cannot_be_made_says_why(run: Run, capsys: Captured) -> None:
    (run.pictures / "torn.png").unlink()
    with pytest.raises(SystemExit) as ended:
        data(run, "preview", "--count", "0")
    assert ended.value.code == 2
    assert "must be a number of pictures, 1 or more" in capsys.readouterr().err
    (run.root / "file").write_text("")
    for name, says in (("pictures", "is not a .png"), ("file/look.png", "is a file: move it")):
        assert data(run, "preview", "--count", "1", "--out", str(run.root / name)) == 3
        assert says in capsys.readouterr().err


def test_a_storage_that_is_not_built_is_refused(run: Run, capsys: Captured) -> None:
    run.dataset = {"id": "hub", "type": "huggingface", "dataset_name": "a/b"}
    assert data(run, "report") == 2
    assert "huggingface" in capsys.readouterr().err


def test_a_picture_that_could_not_be_read_is_tried_again(
    run: Run, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.pictures / "torn.png").unlink()
    assert data(run, "report") == 0
    real = LocalStorage.read

    def read(self: LocalStorage, key: str) -> bytes:
        if key.endswith("number_3.png"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "read", read)
        assert data(run, "verify") == 3
    assert told(run, "report", capsys)["datasets"][0]["usable"] == 8


def test_a_preview_shows_the_exact_pixels_the_box_and_the_caption(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    ramp = np.tile(np.arange(0, 200, dtype=np.uint8)[None, :, None], (100, 1, 3))
    Image.fromarray(ramp).save(folder / "a_ramp.png")
    entry = DatasetSettings(
        id="d", instance_data_dir=folder, crop=True, crop_aspect="square", crop_style="center"
    )
    around = DataSettings(resolution=96, aspect_bucket_alignment=16)
    settings = inherit(entry, around, vae_root=tmp_path / "vae")
    source = DataSource.open(settings, index_folder=tmp_path / "index", bus=Bus())

    shown = look(source, 0)

    assert np.array_equal(np.asarray(shown.trained), source.pixels(0))
    assert shown.whole.size == (200, 100)
    assert shown.geometry.resize == (192, 96)
    assert shown.lines() == [
        "d: a_ramp.png",
        "200x100 px, scaled by 0.96, cut to 96x96",
        "a ramp",
    ]
    made = np.asarray(sheet([shown])).astype(int)
    red = (made == (228, 0, 43)).all(-1)
    columns = np.flatnonzero(red.any(0))
    # the middle half of 200 px, shown 240 px wide behind a margin of 8
    assert abs(columns.min() - (8 + 60)) <= 2
    assert abs(columns.max() - (8 + 180)) <= 2


def test_a_preview_keeps_no_more_of_a_large_picture_than_it_shows(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Image.new("RGB", (4000, 2000), "white").save(tmp_path / "data" / "large.png")
    entry = DatasetSettings(
        id="d", instance_data_dir=tmp_path / "data", crop=True, crop_style="center"
    )
    settings = inherit(entry, DataSettings(resolution=64), vae_root=tmp_path / "vae")
    source = DataSource.open(settings, index_folder=tmp_path / "index", bus=Bus())

    shown = look(source, 0)

    assert shown.whole.size == (960, 480)
    off = np.abs(np.asarray(sheet([shown])).astype(int) - (228, 0, 43)).max(-1)
    columns = np.flatnonzero((off < 60).any(0))
    assert abs(columns.min() - (8 + 60)) <= 2
    assert abs(columns.max() - (8 + 180)) <= 2


def test_no_torch_is_loaded(run: Run) -> None:
    (run.pictures / "torn.png").unlink()
    code = (
        "import sys; from simpletuner.apps.cli import main\n"
        "for command in ('report', 'captions', 'verify', 'preview'):\n"
        f"    assert main(['data', command, '--config', {str(run.write())!r}]) == 0\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
