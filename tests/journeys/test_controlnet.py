"""ControlNets through the command line: trained, resumed, gone on from, loaded in pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file

from simpletuner.apps.cli import main
from tests.runs import Run

Captured = pytest.CaptureFixture[str]

NETS = {
    "sdxl": ("StableDiffusionXLControlNetPipeline", "ControlNetModel", "image"),
    "sd1x": ("StableDiffusionControlNetPipeline", "ControlNetModel", "image"),
    "sd3": ("StableDiffusion3ControlNetPipeline", "SD3ControlNetModel", "control_image"),
}


def controlled(root: Path, model: Path, family: str = "sdxl", **settings: Any) -> Run:
    """A run with the negative of each picture as its control picture."""
    run = Run(root, model)
    run.settings |= {"model_type": "full", "controlnet": True, "model_family": family}
    run.settings |= {"validation_disable": True, "lr_scheduler": "constant", **settings}
    edges = root / "edges"
    edges.mkdir()
    for path in run.pictures.iterdir():
        with Image.open(path) as image:
            ImageOps.invert(image).save(edges / f"{path.stem}.webp", lossless=True)
    run.dataset["conditioning_data"] = "edges"
    run.more = [{"id": "edges", "conditioning_type": "controlnet", "instance_data_dir": str(edges)}]
    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "controlnet/diffusion_pytorch_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("family", NETS)
def test_the_net_makes_in_the_stock_pipeline_the_picture_that_validation_made(
    tmp_path: Path, request: pytest.FixtureRequest, capsys: Captured, family: str
) -> None:
    model: Path = request.getfixturevalue(f"tiny_{family}")
    run = controlled(tmp_path, model, family, validation_disable=False, disable_benchmark=False)
    assert run.train() == 0
    said = capsys.readouterr().out
    pipeline, cls, argument = NETS[family]
    assert f"method: controlnet, a whole {cls}," in said
    assert f'pipe = {pipeline}.from_pretrained("{model}", controlnet=controlnet' in said
    assert run.events()[-1]["verified"].startswith("verified: ")
    assert str(tmp_path) not in (run.out / "controlnet/config.json").read_text()

    net = getattr(diffusers, cls).from_pretrained(run.out / "controlnet")
    assert same(weights(run.out), weights(run.out / "checkpoint-4"))
    pipe = getattr(diffusers, pipeline).from_pretrained(model, controlnet=net)
    (path,) = (run.out / "validation_images").glob("step_4_*.png")
    recipe = json.loads(path.with_suffix(".json").read_text())
    assert recipe["control"] == "edges of pictures: a_picture_number_0.webp"
    size = (recipe["width"], recipe["height"])
    with Image.open(run.root / "edges/a_picture_number_0.webp") as image:
        control = ImageOps.fit(image.convert("RGB"), size)
    names = ("prompt", "negative_prompt", "guidance_scale", "num_inference_steps")
    more = {"max_sequence_length": 154} if family == "sd3" else {}

    def picture(**scale: float) -> np.ndarray[Any, Any]:
        torch.manual_seed(recipe["seed"])
        made = pipe(
            **{name: recipe[name] for name in names},
            **{argument: control},
            **more,
            **scale,
            width=size[0],
            height=size[1],
            generator=torch.Generator().manual_seed(recipe["seed"]),
        )
        return np.asarray(made.images[0]).astype(int)

    ours = np.asarray(Image.open(path)).astype(int)
    base = np.asarray(Image.open(next((run.out / "benchmarks").rglob("*.png")))).astype(int)
    assert np.abs(picture() - ours).max() <= 1
    assert np.abs(ours - base).max() > 1
    assert np.abs(picture(controlnet_conditioning_scale=0.0) - base).max() <= 1
    assert (run.out / "before_after.png").is_file()
    with safe_open(run.out / "controlnet/diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.metadata()["modelspec.architecture"].endswith("/controlnet")


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"family": "sd3", "use_ema": True},
        {"mixed_precision": "bf16", "gradient_checkpointing": True},
    ],
    ids=["fp32", "sd3-ema", "bf16-checkpointing"],
)
def test_a_resumed_run_ends_with_the_same_bits_and_encodes_nothing_again(
    tmp_path: Path, request: pytest.FixtureRequest, more: dict[str, Any]
) -> None:
    model: Path = request.getfixturevalue(f"tiny_{more.get('family', 'sdxl')}")
    straight = controlled(tmp_path / "one", model, **more)
    broken = controlled(tmp_path / "two", model, **more)
    assert straight.train() == 0
    assert broken.train(max_train_steps=2) == 0
    encoded = broken.encoded()
    assert broken.train() == 0
    assert broken.encoded() == encoded
    for name in ("trainable.safetensors", "optimizer.safetensors"):
        one, other = (load_file(run.out / "checkpoint-4" / name) for run in (straight, broken))
        assert same(one, other)
    assert same(weights(straight.out), weights(broken.out))
    assert {tensor.dtype for tensor in weights(straight.out).values()} == {torch.float32}
    if more.get("use_ema"):
        shadow = load_file(straight.out / "checkpoint-4/ema.safetensors")
        assert all(torch.equal(weights(straight.out)[name], shadow[name]) for name in shadow)


def test_a_run_goes_on_from_a_net_and_refuses_one_that_does_not_fit(
    tmp_path: Path, tiny_sdxl: Path, tiny_sd1x: Path, capsys: Captured
) -> None:
    first = controlled(tmp_path / "first", tiny_sdxl)
    assert first.train(max_train_steps=2) == 0
    capsys.readouterr()
    second = controlled(tmp_path / "second", tiny_sdxl, learning_rate=1e-30, max_train_steps=1)
    assert second.train(controlnet_model_name_or_path=str(first.out)) == 0
    assert same(weights(second.out), weights(first.out))
    assert second.losses()[0] != first.losses()[0]

    other = controlled(tmp_path / "other", tiny_sd1x, "sd1x")
    assert other.train(controlnet_model_name_or_path=str(first.out)) == 2
    said = capsys.readouterr().err
    assert "controlnet_model_name_or_path: " in said
    assert "has cross_attention_dim 64, the model needs 32" in said
    assert other.encoded() == 0


def test_control_pictures_are_told_when_they_change_and_kept_by_gc(
    tmp_path: Path, tiny_sd3: Path, capsys: Captured
) -> None:
    run = controlled(tmp_path, tiny_sd3, "sd3", max_train_steps=2)
    assert run.train() == 0
    config = str(run.write())
    capsys.readouterr()
    assert main(["cache", "gc", "--json", "--yes", "--config", config]) == 0
    assert sum(each["entries"] for each in json.loads(capsys.readouterr().out)) == 0
    (run.root / "edges/a_picture_number_0.webp").unlink()
    Image.new("RGB", (96, 64), "red").save(run.root / "edges/a_picture_number_0.png")
    encoded = run.encoded()
    assert run.train(max_train_steps=4) == 3
    assert "dataset pictures: controlnet edges: pictures changed" in capsys.readouterr().err
    assert run.train(max_train_steps=4, on_data_change="continue") == 0
    assert run.encoded() == encoded + 1


def test_an_int8_base_and_pictures_that_regularise(tmp_path: Path, tiny_sdxl: Path) -> None:
    run = controlled(tmp_path, tiny_sdxl, base_model_precision="int8-quanto", max_train_steps=6)
    kept = {**run.dataset, "id": "kept", "is_regularisation_data": True}
    run.more.append({**kept, "conditioning_data": "edges"})
    assert run.train() == 0
    # a new net adds nothing, so what regularises is fulfilled until the net says something
    assert min(run.losses()) < 1e-3 < max(run.losses())
