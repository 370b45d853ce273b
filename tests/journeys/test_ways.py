"""How a run ends, what it is trained on and what it shows, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from simpletuner.adapters import export
from simpletuner.cache.latents import LatentCache
from simpletuner.core.files import RunFolder
from simpletuner.core.tensors import header
from simpletuner.models.family import Family
from simpletuner.training.stepper import Outcome, Stepper
from tests.runs import make_pictures
from tests.ways import WEIGHTS, Bench, tree

Captured = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch

# --- how a run ends ----------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused(
    bench: Bench, tmp_path: Path, capsys: Captured
) -> None:
    run = bench.copy(tmp_path)
    told = (".lock",)

    def rest() -> dict[str, bytes]:
        return {name: data for name, data in tree(run.out).items() if name not in told}

    before = rest()
    with RunFolder(run.out).locked():
        assert run.train(max_train_steps=6, resume_from_checkpoint="none") == 2
    assert f"another run is writing to {run.out}" in capsys.readouterr().err
    assert rest() == before
    assert run.train(max_train_steps=5) == 0  # the lock is let go of


def test_a_result_that_fails_verification_replaces_nothing(
    bench: Bench, tmp_path: Path, capsys: Captured, monkeypatch: Patch
) -> None:
    run, write = bench.copy(tmp_path), export.write_lora

    def damaged(path: Path, *rest: Any) -> None:
        write(path, *rest)
        tensors, facts = load_file(path), header(path)
        tensors[sorted(tensors)[0]] += 1
        save_file(tensors, path, metadata=facts)

    before = (run.out / WEIGHTS).read_bytes()
    monkeypatch.setattr(export, "write_lora", damaged)
    assert run.train(max_train_steps=5) == 7
    assert "the stock loader reads back another model: 1 modules differ" in capsys.readouterr().err
    assert (run.out / WEIGHTS).read_bytes() == before
    assert not list(run.out.glob(".staging*"))
    assert run.events()[-1]["event"] == "run.failed"
    assert json.loads((run.out / "run.json").read_text())["result"] is None
    monkeypatch.undo()
    assert run.train(max_train_steps=5) == 0
    assert (run.out / WEIGHTS).read_bytes() != before


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 7, "is full: CUDA out of memory.\n"),
        (MemoryError(), 7, "lower train_batch_size or resolution"),
        (ValueError("a fault"), 1, "ValueError: a fault"),
    ],
    ids=["device", "CPU", "fault"],
)
def test_an_end_within_a_step_is_told_and_the_last_checkpoint_resumed(
    bench: Bench,
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: Patch,
    error: Exception,
    code: int,
    words: str,
) -> None:
    run, step = bench.fresh(tmp_path), Stepper.step

    def fail(self: Stepper, number: int, window: Any) -> Outcome:
        if number == 3:
            raise error
        return step(self, number, window)

    monkeypatch.setattr(Stepper, "step", fail)
    assert run.train() == code
    message = capsys.readouterr().err
    assert words in message
    assert ("resumes from the last checkpoint" in message) == (code == 7)
    last = run.events()[-1]
    assert (last["event"], last["exit_code"]) == ("run.failed", code)
    log = (run.out / "simpletuner.log").read_text()
    assert ("Traceback" in log) == (str(run.out / "simpletuner.log") in message) == (code == 1)
    monkeypatch.undo()
    assert run.train() == 0
    assert run.events("run.started")[-1]["summary"]["resumed"] == "checkpoint-2, 2 steps done"
    assert tree(run.out / "checkpoint-4") == tree(bench.done.out / "checkpoint-4")


# --- what is trained on ------------------------------------------------------------------------


def test_two_datasets_are_drawn_by_repeats_and_probability(bench: Bench, tmp_path: Path) -> None:
    run = bench.fresh(tmp_path)
    few = {"id": "few", "instance_data_dir": str(make_pictures(tmp_path / "few", 3))}
    run.more = [{**run.dataset, **few, "repeats": 2, "probability": 0.5}]
    del run.settings["max_train_steps"]
    settings = {"num_train_epochs": 1, "train_batch_size": 3, "gradient_accumulation_steps": 2}
    assert run.train(**settings) == 0
    first = run.losses()
    assert sum(event["samples"] for event in run.events("step")) == 8 + 3 * 3
    assert run.events("run.started")[0]["summary"]["data"] == (
        "pictures: 8 pictures in 4 shapes, few: 3 pictures in 3 shapes"
    )
    assert run.train(**settings, resume_from_checkpoint="checkpoint-2") == 0
    assert run.losses()[len(first) :] == first[2:]
    run.more = [{**run.more[0], "probability": 0}]
    assert run.train(**settings, resume_from_checkpoint="none") == 0
    assert json.loads((run.out / "run.json").read_text())["result"]["samples_seen"] == 8


def test_several_resolutions_of_one_entry_are_trained_beside_each_other(
    bench: Bench, tmp_path: Path
) -> None:
    run = bench.fresh(tmp_path)
    run.dataset |= {"resolution": [32, 64], "cache_dir_vae": str(tmp_path / "vae")}
    del run.settings["max_train_steps"]
    assert run.train(num_train_epochs=1) == 0
    assert json.loads((run.out / "run.json").read_text())["result"]["samples_seen"] == 2 * 8
    assert run.events("run.started")[0]["summary"]["data"].startswith("pictures-32: 8 pictures in")
    assert {path.name for path in (tmp_path / "vae").iterdir()} == {"32", "64"}


def test_pictures_of_a_bucket_that_became_rare_are_encoded_in_their_new_size(
    bench: Bench, tmp_path: Path
) -> None:
    run = bench.fresh(tmp_path)
    run.pictures = tmp_path / "pictures"
    run.pictures.mkdir()
    noise = np.random.default_rng(0)
    for name, count, size in (("s", 6, (256, 256)), ("w", 4, (264, 248))):
        for number in range(count):
            pixels = noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(run.pictures / f"{name}{number}.png")
    torn = run.pictures / "w1.png"
    torn.write_bytes(torn.read_bytes()[:90_000])
    run.dataset |= {"instance_data_dir": str(run.pictures), "allow_excluded": True}
    run.dataset |= {"resolution": 256, "aspect_bucket_alignment": 8}
    settings = {"train_batch_size": 4, "rare_buckets": "merge", "num_train_epochs": 1}
    assert run.train(**settings, max_train_steps=0) == 0


def test_buckets_that_do_not_fill_the_batch_of_the_run_are_rare(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = bench.fresh(tmp_path)
    # Four shapes of two pictures each.
    assert run.train(rare_buckets="drop", train_batch_size=3) == 3
    assert "8 left out by rare_buckets" in capsys.readouterr().err


def test_without_a_cache_every_visit_has_a_crop_of_its_own_and_nothing_is_kept(
    bench: Bench, tmp_path: Path, monkeypatch: Patch
) -> None:
    step, crops = Stepper.step, {}

    def seen(self: Stepper, number: int, window: Any) -> Outcome:
        for planned, batch in window:
            for sample in batch.samples:
                crops[sample.id, planned.epoch] = sample.geometry.crop
        return step(self, number, window)

    def moved() -> int:
        """Pictures whose crop is another one in the second epoch."""
        return sum(
            crop != crops[content, 1] for (content, epoch), crop in crops.items() if not epoch
        )

    monkeypatch.setattr(Stepper, "step", seen)
    runs = [bench.fresh(tmp_path / name) for name in ("cached", "uncached")]
    for run, uncached in zip(runs, (False, True), strict=True):
        run.settings["cache_dir_vae"] = str(tmp_path / f"vae-{uncached}")
        run.dataset |= {"crop": True, "crop_style": "random"}
        crops.clear()
        assert run.train(max_train_steps=8, vae_cache_disable=uncached) == 0
        assert len(crops) == 2 * 8
        assert (moved() > 0) == uncached
        assert (tmp_path / f"vae-{uncached}").exists() != uncached
        assert not (run.out / "cache").exists()
    assert runs[0].losses()[:4] != runs[1].losses()[:4]


def test_pictures_encoded_on_demand_are_those_of_the_cache_and_encoded_once(
    bench: Bench, tmp_path: Path, monkeypatch: Patch
) -> None:
    run, opened, open_vae = bench.fresh(tmp_path), [], LatentCache.open_vae
    run.settings |= {"cache_dir_vae": str(tmp_path / "vae"), "vae_cache_ondemand": True}

    def counted(self: LatentCache) -> Any:
        opened.append(self)
        return open_vae(self)

    monkeypatch.setattr(LatentCache, "open_vae", counted)
    assert run.train() == 0
    assert run.losses() == bench.done.losses()
    assert run.events("stage")[-1]["stage"] != "latents"  # nothing was encoded before training
    assert len(opened) == 1
    packs = tree(tmp_path / "vae")
    assert packs
    assert run.train(resume_from_checkpoint="none") == 0
    assert run.losses() == bench.done.losses() * 2
    assert len(opened) == 1
    assert tree(tmp_path / "vae") == packs


def test_bf16_with_gradient_checkpointing_and_accumulation(
    bench: Bench, tmp_path: Path, monkeypatch: Patch
) -> None:
    run, step, checkpointing = bench.fresh(tmp_path), Stepper.step, set()

    def seen(self: Stepper, number: int, window: Any) -> Outcome:
        checkpointing.add(self.weights.trainable.denoiser.is_gradient_checkpointing)
        return step(self, number, window)

    monkeypatch.setattr(Stepper, "step", seen)
    bf16 = {"mixed_precision": "bf16", "gradient_accumulation_steps": 2}
    assert run.train(**bf16, gradient_checkpointing=True, max_train_steps=2) == 0
    assert checkpointing == {True}
    assert [event["samples"] for event in run.events("step")] == [4, 4]
    assert run.events("run.finished")[0]["verified"] == "verified: 16 of 16 modules"
    plain = bench.fresh(tmp_path / "plain")
    assert plain.train(**bf16, max_train_steps=2) == 0
    assert checkpointing == {True, False}
    assert plain.losses() == run.losses()
    assert plain.losses() != bench.done.losses()[:2]


# --- validation pictures -----------------------------------------------------------------------


def test_a_prompt_library_is_rendered_at_every_resolution(bench: Bench, tmp_path: Path) -> None:
    run = bench.fresh(tmp_path)
    library = tmp_path / "library.json"
    library.write_text(json.dumps({"cat": "a cat", "dog/1": {"prompt": "a dog"}}))
    settings = {"validation_disable": False, "validation_disable_unconditional": False}
    sizes = {"validation_resolution": "64x96,64"}
    assert run.train(**settings, **sizes, user_prompt_library=str(library), max_train_steps=1) == 0
    (event,) = run.events("validation.images")
    made = [Path(path).name for path in event["images"]]
    assert {path.name for path in (run.out / "validation_images").iterdir()} == {
        *made,
        *(name.replace(".png", ".json") for name in made),
    }
    recipes = [run.recipe(name.removesuffix(".png")) for name in made]
    assert [(r["prompt"], r["width"], r["height"]) for r in recipes] == [
        (prompt, 64, height)
        for prompt in ("", "a cat", "a dog", "a picture")
        for height in (96, 64)
    ]
    assert "step_1_cat_0_64x96.png" in made
    for name in made:
        size = name.removesuffix(".png").rsplit("_", 1)[1]
        with Image.open(run.out / "validation_images" / name) as image:
            assert "{}x{}".format(*image.size) == size


def test_a_vae_in_fp32_decodes_in_fp32_beside_a_bf16_model(
    bench: Bench, tmp_path: Path, monkeypatch: Patch
) -> None:
    run, found, decode = bench.fresh(tmp_path), [], Family.decode_latents

    def keep(self: Family, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        found.append(latents)
        return decode(self, vae, latents)

    monkeypatch.setattr(Family, "decode_latents", keep)
    settings = {"mixed_precision": "bf16", "vae_dtype": "fp32", "validation_disable": False}
    assert run.train(**settings, max_train_steps=1) == 0
    recipe = run.recipe("step_1_validation_0_64x96")
    told = (recipe["pipeline"], recipe["dtype"], recipe["vae_dtype"])
    assert told == ("StableDiffusionXLPipeline", "bfloat16", "float32")

    vae = AutoencoderKL.from_pretrained(bench.model, subfolder="vae", torch_dtype=torch.float32)
    with torch.no_grad():
        pixels = vae.decode(found[0].float() / vae.config.scaling_factor).sample[0]
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    picture = run.out / "validation_images/step_1_validation_0_64x96.png"
    assert np.array_equal(np.asarray(Image.open(picture)), expected)
