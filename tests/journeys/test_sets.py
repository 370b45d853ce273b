"""Sets of pictures that are not trained on, and captions kept apart, through the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from simpletuner.apps.cli import main
from tests.runs import Run, make_pictures


def write_sets(run: Run, *more: dict[str, Any]) -> str:
    """The settings, and a datasets file with more entries; the arguments that name them."""
    run.more = list(more)
    return str(run.write(validation_disable=True, max_train_steps=3))


def held_out(run: Run) -> dict[str, Any]:
    folder = make_pictures(run.root / "held out", 3)
    return {
        **run.dataset,
        "id": "held out",
        "dataset_type": "eval",
        "instance_data_dir": str(folder),
    }


def test_an_eval_set_is_encoded_told_and_changes_nothing_that_is_trained(
    tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, measured = Run(tmp_path / "plain", tiny_sdxl), Run(tmp_path / "measured", tiny_sdxl)
    assert main(["train", "--config", write_sets(plain)]) == 0
    capsys.readouterr()
    assert main(["train", "--config", write_sets(measured, held_out(measured))]) == 0
    said = "".join(capsys.readouterr())

    assert "dataset held out: 3 of 3 pictures are kept to measure by" in said
    assert "an epoch: 4 steps, 8 samples" in said
    weights = [load_file(run.out / "pytorch_lora_weights.safetensors") for run in (plain, measured)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert plain.losses() == measured.losses()
    assert measured.encoded() - plain.encoded() == 3  # its captions are those of the others

    # It may come and go without a change of the run.
    assert main(["train", "--config", write_sets(measured), "--max_train_steps=4"]) == 0


def test_the_commands_of_data_and_cache_know_an_eval_set(
    tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run", tiny_sdxl)
    config = write_sets(run, held_out(run))
    assert main(["data", "report", "--config", config, "--json"]) == 0
    reports = {each["id"]: each for each in json.loads(capsys.readouterr().out)["datasets"]}
    assert [reports[name]["trained"] for name in ("pictures", "held out")] == [True, False]
    assert sum(bucket["samples"] for bucket in reports["held out"]["buckets"]) == 0

    assert main(["cache", "build", "--config", config]) == 0
    capsys.readouterr()
    assert main(["cache", "status", "--config", config, "--json"]) == 0
    found = {each["title"]: each for each in json.loads(capsys.readouterr().out)}
    assert found["latents of held out"]["present"] == 3


def test_captions_and_latents_lie_where_entries_say(
    tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run", tiny_sdxl)
    run.dataset |= {"text_embeds": "own", "image_embeds": "kept"}
    entries = (
        {"id": "usual", "dataset_type": "text_embeds", "default": True},
        {"id": "own", "dataset_type": "text_embeds", "cache_dir": str(tmp_path / "own")},
        {"id": "kept", "dataset_type": "image_embeds", "cache_dir": str(tmp_path / "kept")},
    )
    config = write_sets(run, *entries)
    assert main(["train", "--config", config]) == 0
    capsys.readouterr()

    assert main(["cache", "status", "--config", config, "--json"]) == 0
    found = {each["folder"]: each for each in json.loads(capsys.readouterr().out)}
    assert found[str(tmp_path / "own")]["present"] == 9  # and the empty one
    assert found[str(tmp_path / "kept" / "pictures")]["present"] == 8
    (usual,) = (each for folder, each in found.items() if "cache/text" in folder)
    assert usual["wanted"] == usual["present"] == 0  # no prompt is validated


def test_one_index_serves_all_resolutions_of_an_entry(tiny_sdxl: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", tiny_sdxl)
    run.dataset |= {"resolution": [48, 64], "allow_excluded": True}
    broken = run.pictures / "a_picture_number_3.png"
    broken.write_bytes(broken.read_bytes()[:90])  # its header is whole
    for path in run.pictures.iterdir():
        os.utime(path, (1, 1))  # none so young that it is looked at again
    assert main(["train", "--config", write_sets(run)]) == 0

    index = run.out / "cache" / "index"
    assert [path.name for path in index.glob("*.parquet")] == ["pictures.parquet"]
    looked = [e for e in run.events("stage") if e["stage"].startswith("index") and e["total"]]
    assert sum(e["total"] for e in looked if e["state"] == "finished") == 8
    assert {path.name for path in (run.out / "cache" / "vae" / "sdxl" / "pictures").iterdir()} == {
        "48",
        "64",
    }

    encoded = run.encoded()
    assert main(["train", "--config", write_sets(run), "--max_train_steps=4"]) == 0
    assert run.encoded() == encoded  # what one of them found of the broken one, both know


def test_odd_ids_are_safe_names_that_do_not_clash(
    tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = ["train", "state", "a/b", "a_b", "..", "../up", "猫", "a b", "CON", "x" * 90]
    run = Run(tmp_path / "run", tiny_sdxl, make_pictures(tmp_path / "pictures", 2))
    run.settings["validation_disable"] = True
    run.more = [{**run.dataset, "id": name} for name in ids]
    config = str(run.write())
    assert main(["cache", "build", "--config", config]) == 0
    capsys.readouterr()

    assert main(["cache", "status", "--json", "--config", config]) == 0
    found = [e for e in json.loads(capsys.readouterr().out) if e["title"].startswith("latents")]
    root = (run.out / "cache" / "vae" / "sdxl").resolve()
    folders = [Path(each["folder"]) for each in found]
    assert len({str(folder).lower() for folder in folders}) == len(ids) + 1
    assert all(folder.parent == root for folder in folders)
    assert all(each["present"] == each["wanted"] == 2 for each in found)
    indexes = list((run.out / "cache" / "index").glob("*.parquet"))
    assert len({path.name.lower() for path in indexes}) == len(ids) + 1
