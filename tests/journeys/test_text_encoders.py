"""Text encoders that train beside the denoiser, from the settings to the stock pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from simpletuner.adapters.formats import read_changes
from simpletuner.apps.cli import main
from simpletuner.core.tensors import header
from simpletuner.models.families import FAMILIES
from simpletuner.models.loading import open_family
from simpletuner.models.settings import ModelSettings
from tests.runs import Run, make_pictures

Captured = pytest.CaptureFixture[str]
FILE = "pytorch_lora_weights.safetensors"
PICTURE = "validation_images/step_4_validation_0_64x96"
TRAINS: dict[str, Any] = {
    "train_text_encoder": True,
    "learning_rate": 5e-3,
    "text_encoder_lr": 2e-3,
    "caption_dropout_probability": 0.3,
    "disable_benchmark": False,
}


@pytest.fixture(scope="module", params=["sdxl", "sd1x", "sd3", "flux"])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run, each family's once."""
    model = request.getfixturevalue(f"tiny_{request.param}")
    run = Run(tmp_path_factory.mktemp(request.param), model)
    run.settings |= {"model_family": request.param, **TRAINS}
    assert run.train() == 0
    return run


def trained_parts(run: Run) -> set[str]:
    return set(FAMILIES[run.settings["model_family"]].fact("trained_text"))


def test_the_file_holds_every_part_and_nothing_was_cached_of_captions(done: Run) -> None:
    keys = load_file(done.out / FILE)
    denoiser = FAMILIES[done.settings["model_family"]].load().denoiser  # type: ignore[attr-defined]
    assert {key.partition(".")[0] for key in keys} == {denoiser, *trained_parts(done)}
    assert not list((done.out / "cache/text").rglob("*.safetensors"))
    assert "each encoded in the step that trains on it" in done.notices()
    last = done.events()[-1]["lines"][-1]
    assert last == f"verified: {len(keys) // 2} of {len(keys) // 2} modules"
    facts = header(done.out / FILE)
    assert (facts["ss_learning_rate"], facts["ss_text_encoder_lr"]) == ("0.005", "0.002")
    assert str(done.settings["pretrained_model_name_or_path"]) not in json.dumps(facts)


def test_the_stock_pipeline_with_the_file_paints_the_validation_picture(done: Run) -> None:
    recipe = json.loads((done.out / f"{PICTURE}.json").read_text())
    family = open_family(
        ModelSettings(
            **{key: done.settings[key] for key in ("model_family", "pretrained_model_name_or_path")}
        )
    )
    pipe = getattr(diffusers, family.pipeline).from_pretrained(family.checkpoint.folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(done.out / recipe["weights"])
    negative = {} if family.name == "flux" else {"negative_prompt": recipe["negative_prompt"]}

    def paint() -> np.ndarray:
        return pipe(
            prompt=recipe["prompt"],
            **negative,
            **{k: v for k, v in family.prompt_arguments.items() if v is not None},
            width=recipe["width"],
            height=recipe["height"],
            guidance_scale=recipe["guidance_scale"],
            num_inference_steps=recipe["num_inference_steps"],
            generator=torch.Generator("cpu").manual_seed(recipe["seed"]),
            output_type="np",
        ).images[0]

    def differs(picture: np.ndarray, name: str) -> int:
        ours = np.asarray(Image.open(done.out / f"{name}.png")).astype(int)
        return int(np.abs((picture * 255).round().astype(int) - ours).max())

    stock = paint()
    assert differs(stock, PICTURE) == 0
    for part in trained_parts(done):
        pipe.components[part].disable_adapters()
    assert np.abs(paint() - stock).max() > 1e-5  # their part does something
    pipe.unload_lora_weights()
    assert differs(paint(), "benchmarks/base_model/validation_0_64x96") == 0


def test_it_goes_through_kohya_and_comfyui_and_back_with_the_same_change(
    done: Run, tmp_path: Path, capsys: Captured
) -> None:
    source, family = done.out / FILE, FAMILIES[done.settings["model_family"]].load()
    if done.settings["model_family"] in ("sdxl", "sd1x"):
        # the tiny UNet's two blocks are called otherwise than those that the command knows
        keys = {k: t for k, t in load_file(source).items() if k.startswith("text_encoder")}
        source = tmp_path / "text.safetensors"
        save_file(keys, source, metadata=header(done.out / FILE))
    first = read_changes(source, family)  # type: ignore[arg-type]
    for layout in ("kohya", "comfyui", "diffusers"):
        target = tmp_path / f"{layout}.safetensors"
        asked = ["convert-lora", str(source), "--to", layout, "--output", str(target)]
        assert main([*asked, "--model_family", done.settings["model_family"]]) == 0
        assert "verified" in capsys.readouterr().out
        source = target
    last = read_changes(source, family)  # type: ignore[arg-type]
    assert first.keys() == last.keys()
    for name, change in first.items():
        torch.testing.assert_close(change.delta(), last[name].delta(), atol=1e-7, rtol=1e-5)


def test_a_run_goes_on_from_such_a_file_and_a_plain_run_refuses_it(
    tiny_sdxl: Path, tmp_path: Path, capsys: Captured
) -> None:
    run = Run(tmp_path / "first", tiny_sdxl)
    run.settings |= {**TRAINS, "validation_disable": True, "lora_format": "kohya"}
    assert run.train() == 0
    for name in (FILE, FILE.replace("weights.", "weights.kohya.")):
        again = Run(tmp_path / f"on {name}", tiny_sdxl, run.pictures)
        again.settings |= {**TRAINS, "validation_disable": True, "init_lora": str(run.out / name)}
        still = {"learning_rate": 1e-12, "text_encoder_lr": 1e-12, "lr_scheduler": "constant"}
        assert again.train(**still, max_train_steps=2) == 0
        there, here = load_file(run.out / FILE), load_file(again.out / FILE)
        assert there.keys() == here.keys()
        assert all(torch.allclose(there[k], here[k], atol=1e-6) for k in there)
    plain = Run(tmp_path / "plain", tiny_sdxl, run.pictures)
    assert plain.train(init_lora=str(run.out / FILE), validation_disable=True) == 2
    message = capsys.readouterr().err
    assert "modules differ, for example text_encoder.text_model.encoder" in message
    assert "train_text_encoder" in message
    assert plain.train(preset_lora_path=str(run.out / FILE), validation_disable=True) == 2
    assert "changes the text encoders too" in capsys.readouterr().err


def test_steps_without_a_caption_are_no_sign_that_encoders_are_dead(
    tiny_sd3: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", tiny_sd3)
    run.settings |= {"model_family": "sd3", "validation_disable": True, "train_batch_size": 1}
    dropped = {"caption_dropout_probability": 0.8, "sd3_clip_uncond_behaviour": "zero"}
    assert run.train(train_text_encoder=True, **dropped, max_train_steps=8) == 0


def test_captions_are_drawn_as_with_a_cache(tiny_sdxl: Path, tmp_path: Path) -> None:
    """Encoders that stand still give the losses of the run whose captions were encoded before."""
    pictures = make_pictures(tmp_path / "pictures")
    shared: dict[str, Any] = {
        "caption_dropout_probability": 0.3,
        "validation_disable": True,
        "lora_dropout": 0.0,
        "max_train_steps": 8,
    }
    losses = []
    for name, more in (
        ("cached", {}),
        ("live", {"train_text_encoder": True, "text_encoder_lr": 1e-12}),
    ):
        run = Run(tmp_path / name, tiny_sdxl, pictures)
        run.dataset |= {
            "caption_strategy": "filename",
            "caption_shuffle": {"enable": True, "count": 2, "seed": 3},
            "prepend_instance_prompt": True,
            "instance_prompt": "red, green, blue",
        }
        assert run.train(**shared, **more) == 0
        losses.append(run.losses())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    learned = Run(tmp_path / "learned", tiny_sdxl, pictures)
    learned.dataset = run.dataset
    assert learned.train(**shared, train_text_encoder=True, learning_rate=1e-3) == 0
    assert learned.losses() != pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ({"model_type": "full", "lora_rank": None}, "train_text_encoder", "set model_type lora"),
        (
            {"model_type": "full", "controlnet": True, "lora_rank": None},
            "train_text_encoder",
            "a ControlNet is trained with the text encoders as they are",
        ),
        (
            {"lora_type": "lycoris", "lycoris_config": {"algo": "lokr"}},
            "train_text_encoder",
            "set lora_type standard",
        ),
        ({"text_encoder_2_precision": "int8-quanto"}, "text_encoder_2_precision", "remove one"),
        ({"text_cache_ondemand": True}, "text_cache_ondemand", "changes that with every step"),
        (
            {"train_text_encoder": False, "text_encoder_lr": 1e-5},
            "text_encoder_lr",
            "changes nothing without train_text_encoder",
        ),
        (
            {"optimizer": "prodigy", "learning_rate": 1.0, "text_encoder_lr": 0.5},
            "text_encoder_lr",
            "prodigy finds one rate for all that trains",
        ),
        ({"text_encoder_lr": 0}, "text_encoder_lr", "0"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_anything_is_loaded(
    settings: dict[str, Any],
    key: str,
    words: str,
    tiny_sdxl: Path,
    tmp_path: Path,
    capsys: Captured,
) -> None:
    run = Run(tmp_path / "run", tiny_sdxl)
    run.settings |= {"train_text_encoder": True, "validation_disable": True, **settings}
    run.settings = {k: v for k, v in run.settings.items() if v is not None}
    assert main(["check", "--config", str(run.write())]) == 2
    message = capsys.readouterr().err
    assert f" {key} " in message
    assert words in message
    assert not run.out.exists()


def test_an_entry_that_would_keep_captions_is_refused_and_an_idle_one_named(
    tiny_sdxl: Path, tmp_path: Path, capsys: Captured
) -> None:
    run = Run(tmp_path / "run", tiny_sdxl)
    run.more = [{"id": "t", "dataset_type": "text_embeds", "text_cache_ondemand": True}]
    config = str(run.write(train_text_encoder=True))
    assert main(["check", "--config", config]) == 2
    assert "keeps what a caption was encoded to" in capsys.readouterr().err
    run.more = [{"id": "t", "dataset_type": "text_embeds"}]
    assert main(["check", "--config", str(run.write(train_text_encoder=True))]) == 0
    assert "text_embeds entry t is not used: under train_text_encoder" in capsys.readouterr().out
    assert main(["cache", "status", "--config", config]) == 0
    assert "text embeddings" not in capsys.readouterr().out


def test_a_checkpoint_with_text_encoders_is_not_gone_on_with_without_them(
    tiny_sdxl: Path, tmp_path: Path, capsys: Captured
) -> None:
    run = Run(tmp_path / "run", tiny_sdxl)
    run.settings |= {"validation_disable": True}
    assert run.train(train_text_encoder=True, max_train_steps=2) == 0
    assert run.train() == 7
    assert "train_text_encoder is gone" in capsys.readouterr().err
    assert run.train(train_text_encoder=True, text_encoder_lr=1e-5) == 0
    assert "text_encoder_lr: was 0.001, now 1e-05" in run.notices()
