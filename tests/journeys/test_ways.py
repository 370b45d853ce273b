"""The ways a run is started, resumed, refused and ended, through the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
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
from simpletuner.models.family import Family
from simpletuner.training.stepper import Outcome, Stepper
from tests.runs import Run, make_pictures
from tests.tiny.build import build_sdxl

Captured = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
WEIGHTS = "pytorch_lora_weights.safetensors"


class Way(Run):
    """A run with few adapters and no pictures, of one dataset or of several."""

    def __init__(self, root: Path, model: Path, pictures: Path, cache: Path) -> None:
        super().__init__(root, model, pictures)
        self.settings |= {
            "cache_dir": str(cache),
            "peft_lora_target_modules": ["to_q"],
            "validation_disable": True,
        }
        self.more: list[Mapping[str, Any]] = []

    def write(self, **settings: Any) -> Path:
        path = super().write(**settings)
        entries = [self.dataset, *self.more]
        (self.root / "multidatabackend.json").write_text(json.dumps(entries))
        return path

    def steps(self) -> list[int]:
        """The number of every step that was told, in all starts."""
        return [event["step"] for event in self.events("step")]

    def notices(self) -> str:
        return "\n".join(event["text"] for event in self.events("notice"))

    def names(self) -> set[str]:
        """The checkpoints, and the folders of earlier ones."""
        folders = {path.name for path in self.out.iterdir() if path.is_dir()}
        return {name for name in folders if name.startswith(("checkpoint-", "previous-"))}

    def recipe(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            (self.out / f"validation_images/{name}.json").read_text()
        )
        return found


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class Bench:
    """Pictures, a tiny model, a filled cache, and a finished run of four steps."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model = root, model
        self.pictures = make_pictures(root / "pictures")
        self.done = self.fresh(root / "done")
        assert self.done.train() == 0

    def fresh(self, root: Path) -> Way:
        """A run that has not begun."""
        return Way(root, self.model, self.pictures, self.root / "cache")

    def copy(self, root: Path) -> Way:
        """A copy of the finished run."""
        run = self.fresh(root)
        shutil.copytree(self.done.out, run.out)
        return run


@pytest.fixture(scope="module")
def bench(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("ways"), tiny_sdxl)


# --- where a run starts ------------------------------------------------------------------------


def test_none_starts_over_and_the_next_start_goes_on_with_the_new_run(
    bench: Bench, tmp_path: Path
) -> None:
    run = bench.copy(tmp_path)
    old = {name: tree(run.out / name) for name in ("checkpoint-2", "checkpoint-4")}
    new = {"checkpoints_total_limit": 1, "seed": 7}
    assert run.train(**new, max_train_steps=3, resume_from_checkpoint="none") == 0
    assert run.steps() == [1, 2, 3, 4, 1, 2, 3]
    assert "checkpoint-2, checkpoint-4 of an earlier run moved to previous-1/" in run.notices()
    assert run.names() == {"checkpoint-3", "previous-1"}
    assert {path.name: tree(path) for path in (run.out / "previous-1").iterdir()} == old

    assert run.train(**new, max_train_steps=2, resume_from_checkpoint="none") == 0
    assert "checkpoint-3 of an earlier run moved to previous-2/" in run.notices()
    assert run.names() == {"checkpoint-2", "previous-1", "previous-2"}
    assert [path.name for path in (run.out / "previous-2").iterdir()] == ["checkpoint-3"]

    assert run.train(**new, max_train_steps=3) == 0
    assert run.events("run.started")[-1]["summary"]["resumed"] == "checkpoint-2, 2 steps done"
    assert run.steps()[7:] == [1, 2, 3]
    assert run.names() == {"checkpoint-3", "previous-1", "previous-2"}


@pytest.mark.parametrize("way", ["name", "path"])
def test_a_named_checkpoint_is_resumed_bit_for_bit_and_later_ones_are_moved_aside(
    bench: Bench, tmp_path: Path, way: str
) -> None:
    run = bench.copy(tmp_path)
    before = tree(run.out / "checkpoint-4")
    (run.out / WEIGHTS).unlink()
    wanted = "checkpoint-2" if way == "name" else str(run.out / "checkpoint-2")
    assert run.train(resume_from_checkpoint=wanted) == 0
    assert run.steps() == [1, 2, 3, 4, 3, 4]
    assert run.losses()[4:] == run.losses()[2:4]
    assert run.names() == {"checkpoint-2", "checkpoint-4", "previous-1"}
    assert tree(run.out / "previous-1") == {f"checkpoint-4/{n}": d for n, d in before.items()}
    assert tree(run.out / "checkpoint-4") == before
    assert (run.out / WEIGHTS).read_bytes() == (bench.done.out / WEIGHTS).read_bytes()
    assert "checkpoint-4 of an earlier run moved to previous-1/" in run.notices()


def test_a_checkpoint_of_another_folder_is_resumed_and_stays_as_it_is(
    bench: Bench, tmp_path: Path
) -> None:
    run, other = bench.fresh(tmp_path), bench.done.out / "checkpoint-2"
    before = tree(bench.done.out)
    assert run.train(resume_from_checkpoint=str(other)) == 0
    assert run.losses() == bench.done.losses()[2:]
    assert tree(run.out / "checkpoint-4") == tree(bench.done.out / "checkpoint-4")
    assert tree(bench.done.out) == before


# --- what a checkpoint is not resumed with -----------------------------------------------------


def another(part: str, model: Path, folder: Path) -> Path:
    """A copy of `model` with other weights in one of its parts."""
    build_sdxl(folder / "donor", seed=1)
    shutil.copytree(model, folder / "model")
    shutil.rmtree(folder / "model" / part)
    shutil.copytree(folder / "donor" / part, folder / "model" / part)
    return folder / "model"


@pytest.mark.parametrize(
    "change", ["lora_alpha", "base model", "prediction_type", "VAE", "optimizer"]
)
def test_another_model_is_refused_by_name(
    bench: Bench, tmp_path: Path, capsys: Captured, change: str
) -> None:
    run = bench.copy(tmp_path / "run")
    settings: dict[str, Any] = {}
    if change == "lora_alpha":
        settings["lora_alpha"] = 10
    elif change == "base model":
        settings["pretrained_model_name_or_path"] = str(another("unet", bench.model, tmp_path))
    elif change == "prediction_type":
        settings["prediction_type"] = "v_prediction"
    elif change == "optimizer":
        settings["optimizer"] = "torch-adamw"
    else:
        model = another("vae", bench.model, tmp_path)
        settings["pretrained_vae_model_name_or_path"] = str(model / "vae")
    before = tree(run.out / "checkpoint-4")
    assert run.train(max_train_steps=5, on_data_change="continue", **settings) == 7
    message = capsys.readouterr().err
    assert f"this run cannot go on from the checkpoint: {change} changed" in message
    assert "resume_from_checkpoint=none" in message
    assert run.names() == {"checkpoint-2", "checkpoint-4"}
    assert tree(run.out / "checkpoint-4") == before
    assert run.steps() == [1, 2, 3, 4]


@pytest.mark.parametrize("change", ["a caption", "caption_dropout_probability"])
def test_other_captions_are_refused_by_name_unless_told_to_go_on(
    bench: Bench, tmp_path: Path, capsys: Captured, change: str
) -> None:
    run = bench.copy(tmp_path)
    if change == "a caption":
        shutil.copytree(bench.pictures, tmp_path / "pictures")
        run.dataset["instance_data_dir"] = str(tmp_path / "pictures")
        picture = tmp_path / "pictures" / "a_picture_number_0.png"
        assert run.train() == 0  # another folder alone changes nothing
        picture.rename(picture.with_name("another_caption.png"))
    else:
        run.dataset["caption_dropout_probability"] = 0.5
    assert run.train(max_train_steps=5) == 3
    message = capsys.readouterr().err
    assert "trained on other data: dataset pictures: captions changed" in message
    assert "--on_data_change continue" in message
    assert run.train(max_train_steps=5, on_data_change="continue") == 0
    assert "pictures: captions changed since the checkpoint; going on" in run.notices()
    assert run.steps() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("dataset", "settings", "told"),
    [
        ({"crop_style": "corner"}, {}, "dataset pictures: crop_style changed (was random, now"),
        ({}, {"vae_enable_tiling": True}, "vae_enable_tiling changed (was false, now true)"),
        ({}, {"train_batch_size": 1}, "train_batch_size changed (was 2, now 1)"),
    ],
)
def test_pictures_that_would_be_others_are_refused_by_name(
    bench: Bench,
    tmp_path: Path,
    capsys: Captured,
    dataset: Mapping[str, Any],
    settings: Mapping[str, Any],
    told: str,
) -> None:
    run = bench.copy(tmp_path)
    run.dataset |= dataset
    assert run.train(max_train_steps=5, **settings) == 3
    message = capsys.readouterr().err
    assert told in message
    assert ("on other data" in message) == bool(dataset)
    assert run.steps() == [1, 2, 3, 4]


def test_another_learning_rate_and_schedule_are_resumed_with_and_told_once(
    bench: Bench, tmp_path: Path
) -> None:
    run = bench.copy(tmp_path)
    before = len(run.events("notice"))
    assert run.train(max_train_steps=6, learning_rate=1e-4, lr_scheduler="constant") == 0
    assert [event["lr"] for event in run.events("step")[4:]] == [1e-4, 1e-4]
    told = [e["text"] for e in run.events("notice")[before:] if "since the checkpoint" in e["text"]]
    assert told == [
        "changed since the checkpoint: learning_rate: was 0.001, now 0.0001; lr_end: was 4e-07, now"
        " unused; lr_num_cycles: was 1, now unused; lr_scheduler: was cosine, now constant;"
        " lr_warmup_steps: was 0, now unused; total steps: was 4, now unused"
    ]


def test_more_steps_under_a_schedule_that_falls_say_that_the_rate_jumps(
    bench: Bench, tmp_path: Path
) -> None:
    run = bench.copy(tmp_path)
    assert run.train(max_train_steps=6) == 0
    assert "total steps: was 4, now 6; cosine depends on the total steps:" in run.notices()


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
        tensors, facts = load_file(path), export.header(path)
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
