"""The nasty dataset: nothing of it stops a run unnamed, and every picture keeps its own caption."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simpletuner.apps.cli import main
from tests.nasty import CAPTIONS, LONG, TORN, UNUSABLE, make_nasty
from tests.runs import Run

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path, tiny_sdxl: Path) -> Run:
    folder = make_nasty(tmp_path / "Тест ñ 空 😀")
    run = Run(tmp_path / "run", tiny_sdxl, folder)
    run.dataset |= {"caption_strategy": "textfile"}
    return run


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def told(run: Run, command: str, captured: Captured) -> Any:
    captured.readouterr()
    assert main(["data", command, "--json", "--config", str(run.write())]) == 0
    return json.loads(captured.readouterr().out)


def test_too_much_is_wrong_so_it_is_refused_before_anything_is_loaded_and_all_is_named(
    run: Run, capsys: Captured
) -> None:
    run.settings["pretrained_model_name_or_path"] = "not/there"
    assert run.train() == 3
    said = capsys.readouterr().err
    for name, reason in UNUSABLE.items():
        assert f"{name}: {reason}" in said
    assert "allow_excluded" in said


def test_the_rest_is_trained_and_the_folder_stays_as_it_is(run: Run, capsys: Captured) -> None:
    run.dataset["allow_excluded"] = True
    before = digests(run.pictures)

    assert run.train(max_train_steps=2) == 0

    said = capsys.readouterr().out
    for name in (*UNUSABLE, *TORN):
        assert name in said
    assert "read as cp1252: western.txt" in said
    assert digests(run.pictures) == before
    assert run.encoded() > 0
    once = run.encoded()
    assert run.train(max_train_steps=3) == 0
    assert run.encoded() == once  # the second start finds everything


def test_every_picture_has_its_own_caption(run: Run, capsys: Captured) -> None:
    run.dataset["allow_excluded"] = True
    (found,) = told(run, "captions", capsys).values()
    torn = {name: ["a caption"] for name in TORN}
    assert found == CAPTIONS | torn


def test_the_report_names_an_example_of_every_reason(run: Run, capsys: Captured) -> None:
    run.dataset["allow_excluded"] = True
    (pictures,) = told(run, "report", capsys)["datasets"]
    named = {each["example"]: each["reason"] for each in pictures["excluded"]}
    assert named == UNUSABLE
    assert pictures["usable"] == len(CAPTIONS) + len(TORN)


def test_captions_longer_than_the_encoders_see_are_told(run: Run, capsys: Captured) -> None:
    run.dataset["allow_excluded"] = True
    assert run.train(max_train_steps=1) == 0
    assert LONG[:20] in capsys.readouterr().out


def test_latents_belong_to_their_pictures_in_every_way_of_caching(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Point 2 of the acceptance list: pairing, with pictures in the middle that cannot be read."""
    from simpletuner.cache.caches import Caches

    run.dataset["allow_excluded"] = True
    seen: dict[str, dict[str, torch.Tensor]] = {}
    real = Caches.batch

    def batch(self: Caches, planned: Any) -> Any:
        made = real(self, planned)
        for sample, latent in zip(made.samples, made.latents, strict=True):
            assert sample.caption in (*CAPTIONS.get(sample.path, ["a caption"]), "")
            seen[way].setdefault(sample.path, latent.clone())
        return made

    monkeypatch.setattr(Caches, "batch", batch)
    for way in ("cached", "ondemand", "disable"):
        seen[way] = {}
        settings = {
            "output_dir": str(run.root / way),
            "vae_cache_ondemand": way == "ondemand",
            "vae_cache_disable": way == "disable",
            "train_batch_size": 4,
            "max_train_steps": 0,
            "num_train_epochs": 1,
            "validation_disable": True,
        }
        # What breaks off ends the run that meets it, and is left out by the next.
        codes = [run.train(**settings)]
        while codes[-1] == 3 and len(codes) <= len(TORN):
            codes.append(run.train(**settings, resume_from_checkpoint="none"))
        assert codes[-1] == 0
        assert len(codes) == 1 if way == "cached" else len(codes) > 1
    assert seen["cached"].keys() == seen["ondemand"].keys() == seen["disable"].keys()
    assert seen["cached"].keys() == CAPTIONS.keys()
    for path, latent in seen["cached"].items():
        assert torch.allclose(latent, seen["ondemand"][path], atol=1e-5), path
    values = [latent.flatten() for latent in seen["cached"].values()]
    assert len({np.asarray(each[:8]).tobytes() for each in values}) == len(values)
