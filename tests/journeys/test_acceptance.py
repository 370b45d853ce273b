"""The printed datasets run whole, and what is killed while it looks or fetches loses nothing."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.apps.cli import main
from tests import seeds
from tests.faults.points import watch
from tests.runs import Run, make_pictures
from tests.unit.data.serving import served

SMALL = {"validation_disable": True, "max_train_steps": 2, "aspect_bucket_alignment": 16}
"""What this machine needs, beside smaller sizes."""


Captions = dict[str, dict[str, list[str]]]


def captions_of(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> dict[str, dict[str, list[str]]]:
    capsys.readouterr()
    assert main(["data", "captions", "--json", "--config", str(config)]) == 0
    found: Captions = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    ("printed", "family"), [(seeds.SDXL_DATASETS, "sdxl"), (seeds.SD3_DATASETS, "sd3")]
)
def test_the_quickstarts_datasets_are_trained_on_as_printed(
    printed: str,
    family: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """Nothing is changed but the user's folder and the sizes, in the units that are printed."""
    monkeypatch.chdir(tmp_path)
    pictures = make_pictures(tmp_path / "datasets" / "pseudo-camera-10k")
    entries = json.loads(printed)
    folder = entries[0]["instance_data_dir"]
    for key in ("resolution", "maximum_image_size", "target_downsample_size"):
        entries[0][key] = 0.004096 if entries[0]["resolution_type"] == "area" else 64
    entries[0]["minimum_image_size"] = 0
    text = json.dumps(entries).replace(folder, str(pictures))
    run = Run(tmp_path / "run", request.getfixturevalue(f"tiny_{family}"), pictures)
    config = run.write(**SMALL, model_family=family, data_backend_config="printed.json")
    Path("printed.json").write_text(text)

    assert main(["train", "--config", str(config)]) == 0

    name = entries[0]["id"]
    assert (tmp_path / entries[0]["cache_dir_vae"]).is_dir()
    assert (tmp_path / entries[1]["cache_dir"]).is_dir()
    found = captions_of(config, capsys)[name]
    assert found == {path.name: [path.stem.replace("_", " ")] for path in pictures.iterdir()}


@pytest.mark.parametrize("form", ["csv", "json", "jsonl"])
def test_a_folder_with_a_metadata_table_is_trained_on_as_printed(
    form: str, tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``dataset_base_path`` and ``dataset_metadata_path``, its columns ``image`` and ``prompt``."""
    base = tmp_path / "data" / "example_image_dataset"
    base.mkdir(parents=True)
    rows = [
        {"image": "image_1.jpg", "prompt": "a dog"},
        {"image": "image_2.jpg", "prompt": "a cat"},
    ]
    for number, row in enumerate(rows):
        Image.new("RGB", (80, 64), (90 * number, 60, 30)).save(base / row["image"])
    table = base / f"metadata.{form}"
    if form == "csv":
        with table.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, ["image", "prompt"])
            writer.writeheader()
            writer.writerows(rows)
    elif form == "json":
        table.write_text(json.dumps(rows))
    else:
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run(tmp_path / "run", tiny_sdxl, base)
    run.dataset = {
        "id": "example",
        "dataset_base_path": str(base),
        "dataset_metadata_path": str(table),
        "data_file_keys": "image",
        "dataset_repeat": 50,
        "resolution_type": "max_pixels",
        "resolution": 4096,
        "aspect_bucket_alignment": 16,
    }
    config = run.write(**SMALL)

    assert main(["train", "--config", str(config)]) == 0

    assert captions_of(config, capsys) == {
        "example": {"image_1.jpg": ["a dog"], "image_2.jpg": ["a cat"]}
    }
    assert main(["data", "report", "--json", "--config", str(config)]) == 0
    assert json.loads(capsys.readouterr().out)["samples_per_epoch"] == 100


# ---- kill -9


def command(*words: str, **environ: str) -> subprocess.Popen[bytes]:
    """`simpletuner` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "simpletuner", *words],
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def kill_when(process: subprocess.Popen[bytes], seen: Any) -> None:
    """`kill -9` as soon as `seen` says so."""
    until = time.monotonic() + 120
    while not seen():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_download_that_is_killed_is_fetched_again_and_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = sorted(make_pictures(tmp_path / "served", 4).iterdir())
    with served() as site:
        addresses = [site.put(f"/{p.name}", p.read_bytes()) for p in pictures]
        slow = site.answers["/a_picture_number_2.png"]
        slow.drip = 0.02
        table = tmp_path / "list.csv"
        rows = [f"{address},number {n}" for n, address in enumerate(addresses)]
        table.write_text("\n".join(["url,caption", *rows]))
        run = Run(tmp_path / "run", tmp_path / "no model")
        run.dataset = {
            "id": "web",
            "type": "csv",
            "csv_file": str(table),
            "csv_caption_column": "caption",
            "caption_strategy": "csv",
            "resolution": 64,
            "aspect_bucket_alignment": 16,
        }
        config = str(run.write())
        process = command("data", "report", "--config", config)
        kill_when(process, lambda: site.asked["/a_picture_number_2.png"] == 1)
        slow.drip = 0
        before = dict(site.asked)

        capsys.readouterr()
        assert main(["data", "report", "--json", "--config", config]) == 0
        (report,) = json.loads(capsys.readouterr().out)["datasets"]
        assert (report["found"], report["usable"]) == (4, 4)
        assert site.asked["/a_picture_number_2.png"] == before["/a_picture_number_2.png"] + 1
        assert main(["data", "verify", "--config", config]) == 0
        assert all(count <= 2 for count in site.asked.values())


def test_a_cleaning_that_is_killed_anywhere_takes_nothing_that_is_in_use(
    tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each time one operation later, until a cleaning gets through."""
    run = Run(tmp_path / "run", tiny_sdxl)
    run.settings["validation_disable"] = True
    config = str(run.write())
    assert main(["cache", "build", "--config", config]) == 0
    run.dataset["resolution"] = 80
    config = str(run.write())
    assert main(["cache", "build", "--config", config]) == 0  # the latents of 64 are of no use now

    codes = []
    for at in range(1, 60):
        child = os.fork()
        if not child:
            code = 1
            try:
                watch({"plan": {"at": at}, "root": str(run.out), "record": str(tmp_path / "r")})
                code = main(["cache", "gc", "--yes", "--config", config])
            finally:
                os._exit(code)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        assert codes[-1] in (0, -signal.SIGKILL)
        capsys.readouterr()
        assert main(["cache", "status", "--json", "--config", config]) == 0
        for each in json.loads(capsys.readouterr().out):
            assert each["present"] == each["wanted"], (at, each)
        if codes[-1] == 0:
            break
    assert codes[-1] == 0
    assert len(codes) > 1
    assert main(["cache", "verify", "--config", config]) == 0
    capsys.readouterr()
    assert main(["cache", "status", "--json", "--config", config]) == 0
    assert sum(each["unused"] for each in json.loads(capsys.readouterr().out)) == 0


def test_what_is_told_of_the_data_in_a_checkpoint_is_small(tiny_sdxl: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", tiny_sdxl)
    assert run.train(validation_disable=True, max_train_steps=1) == 0
    (state,) = run.out.glob("checkpoint-*/state.json")
    assert len(json.dumps(json.loads(state.read_text())["data"])) < 1024


# ---- secrets


@pytest.mark.parametrize("mode", ["cached", "vae_cache_ondemand"])
def test_the_signature_of_an_address_is_shown_nowhere(
    tiny_sdxl: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    mode: str,
) -> None:
    """Point 18: in what is printed, in the event log, the run's other files and the preview."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)
    pictures = [path.read_bytes() for path in make_pictures(tmp_path / "served", 6).iterdir()]
    noise = Image.effect_noise((96, 64), 90).convert("RGB")
    noise.save(tmp_path / "noise.png")
    pictures += [(tmp_path / "noise.png").read_bytes()[:3000], b"<html>403</html>"]
    with served() as site:
        addresses = [
            site.put(f"/{number}.png?sig=SECRET{number}", data)
            for number, data in enumerate(pictures)
        ]
        rows = "\n".join(f"{address},caption {i}" for i, address in enumerate(addresses))
        (tmp_path / "list.csv").write_text(f"url,caption\n{rows}\n")
        run = Run(tmp_path / "run", tiny_sdxl, tmp_path / "served")
        run.dataset = {
            "id": "web",
            "type": "csv",
            "csv_file": str(tmp_path / "list.csv"),
            "csv_url_column": "url",
            "csv_caption_column": "caption",
            "resolution": 64,
            "resolution_type": "pixel_area",
            "aspect_bucket_alignment": 16,
            "allow_excluded": True,
        }
        config = str(run.write(**SMALL, **({} if mode == "cached" else {mode: True})))
        codes = [
            main([*words, "--config", config])
            for words in (
                ("data", "report"),
                ("data", "captions", "--json"),
                ("data", "captions"),
                ("data", "preview"),
                ("train", "--max_train_steps", "9"),
                ("train", "--max_train_steps", "9", "--on_data_change", "continue"),
                ("data", "verify"),
                ("data", "verify", "--json"),
            )
        ]
    met = 0 if mode == "cached" else 3
    assert codes == [0, 0, 0, 3, met, 0, 3, 3]
    said = capfd.readouterr()
    assert "6.png?…" in said.out + said.err
    shown = {"standard output": said.out, "standard error": said.err}
    for file in run.out.rglob("*"):
        kept = file.parts[len(run.out.parts)] == "cache"  # the index needs the address
        if file.is_file() and not kept:
            shown[file.name] = file.read_text("latin-1")
    assert {"events.jsonl", "preview.html"} <= shown.keys()
    assert [name for name, text in shown.items() if "SECRET" in text] == []
