"""Point 9 of the acceptance list: a change makes exactly the entries it touches missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from simpletuner.apps.cli import main
from tests.runs import Run

Captured = pytest.CaptureFixture[str]
Change = Callable[[Run], object]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tiny_sdxl: Path) -> Run:
    """Eight pictures with captions of their own, encoded; read it only."""
    root = tmp_path_factory.mktemp("changes")
    run = Run(root, shutil.copytree(tiny_sdxl, root / "model"))
    for number, path in enumerate(sorted(run.pictures.iterdir())):
        kind = "red" if number < 3 else "blue"
        path.with_suffix(".txt").write_text(f"a {kind} thing, number {number}, standing still")
    run.dataset["caption_strategy"] = "textfile"
    assert main(["cache", "build", "--config", str(run.write())]) == 0
    return run


@pytest.fixture
def run(built: Run, tmp_path: Path) -> Run:
    """A copy of it with a cache of its own."""
    root = shutil.copytree(built.root, tmp_path / "copy")
    run = Run(root, root / "model", root / "pictures")
    run.dataset["caption_strategy"] = "textfile"
    return run


def missing(run: Run, captured: Captured) -> tuple[int, int]:
    """What the next start would encode: captions, pictures."""
    captured.readouterr()
    assert main(["cache", "status", "--json", "--config", str(run.write())]) == 0
    found = {each["title"]: each for each in json.loads(captured.readouterr().out)}
    text, latents = found["text embeddings"], found["latents of pictures"]
    return text["wanted"] - text["present"], latents["wanted"] - latents["present"]


def picture(run: Run, number: int) -> Path:
    return run.pictures / f"a_picture_number_{number}.png"


def other_bytes(run: Run) -> None:
    with Image.open(picture(run, 2)) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(picture(run, 2))


def other_caption(run: Run) -> None:
    picture(run, 2).with_suffix(".txt").write_text("something else")


def other_name(run: Run) -> None:
    (run.pictures / "deeper").mkdir()
    for path in (picture(run, 2), picture(run, 2).with_suffix(".txt")):
        path.rename(run.pictures / "deeper" / f"new{path.suffix}")


def other_folder(run: Run) -> None:
    moved = run.pictures.rename(run.root / "elsewhere")
    run.dataset["instance_data_dir"] = str(moved)


def other_vae(run: Run) -> None:
    (file,) = (run.root / "model/vae").glob("*.safetensors")
    weights = load_file(file)
    name = min(weights)
    save_file(weights | {name: weights[name] + 0.01}, file)


def other_text_encoder(run: Run) -> None:
    (file,) = (run.root / "model/text_encoder").glob("*.safetensors")
    weights = load_file(file)
    name = min(weights)
    save_file(weights | {name: weights[name] + 0.01}, file)


def other_table(run: Run) -> None:
    """The same captions from a table, but for one of them."""
    rows = [
        {"image": path.with_suffix(".png").name, "prompt": path.read_text()}
        for path in sorted(run.pictures.glob("*.txt"))
    ]
    rows[4]["prompt"] += ", seen from below"
    table = run.root / "metadata.json"
    table.write_text(json.dumps(rows))
    del run.dataset["caption_strategy"]
    run.dataset["dataset_metadata_path"] = str(table)


@pytest.mark.parametrize(
    ("change", "texts", "latents"),
    [
        (lambda run: None, 0, 0),
        (other_bytes, 0, 1),
        (other_caption, 1, 0),
        (other_name, 0, 0),
        (other_folder, 0, 0),
        (other_vae, 0, 8),
        # every caption, the dropped one, the validation's and its negative one
        (other_text_encoder, 11, 0),
        (lambda run: run.dataset.update(resolution=80), 0, 8),
        (lambda run: run.dataset.update(crop=True, crop_style="center"), 0, 6),  # two are squares
        (lambda run: run.dataset.update(caption_filter_list=["red "]), 3, 0),
        (lambda run: run.dataset.update(caption_suffix="in the rain"), 8, 0),
        # of three parts, two more orders of each; the printed one is there already
        (lambda run: run.dataset.update(caption_shuffle={"enable": True, "count": 2}), None, 0),
        (other_table, 1, 0),
        (lambda run: run.dataset.update(trigger_word="zwx", prepend_trigger_word=True), 8, 0),
        (lambda run: run.dataset.update(repeats=3, probability=0.5), 0, 0),
        (lambda run: run.dataset.update(caption_dropout_probability=0.5), 0, 0),
        (lambda run: run.settings.update(train_batch_size=1, lora_rank=8), 0, 0),
        (lambda run: run.settings.update(validation_prompt="another"), 1, 0),
        (lambda run: run.settings.update(image_background="#FFFFFF"), 0, 0),  # as without it
    ],
    ids=[
        "nothing",
        "bytes",
        "caption",
        "name",
        "folder",
        "vae",
        "text encoder",
        "resolution",
        "crop",
        "filter",
        "suffix",
        "shuffle",
        "table",
        "trigger",
        "repeats",
        "dropout",
        "batch",
        "prompt",
        "spelling of a colour",
    ],
)
def test_exactly_what_a_change_touches_is_encoded_again(
    run: Run, capsys: Captured, change: Change, texts: int | None, latents: int
) -> None:
    change(run)
    found = missing(run, capsys)
    assert found[1] == latents
    assert found[0] == texts if texts is not None else 8 <= found[0] <= 16


def test_another_limit_of_tokens_encodes_the_captions_again_and_no_picture(
    tiny_sd3: Path, tmp_path: Path, capsys: Captured
) -> None:
    run = Run(tmp_path, tiny_sd3)
    run.settings["model_family"] = "sd3"
    assert main(["cache", "build", "--config", str(run.write())]) == 0
    assert missing(run, capsys) == (0, 0)
    run.settings["tokenizer_max_length"] = 77
    texts, latents = missing(run, capsys)
    assert (texts, latents) == (11, 0)


def test_another_tokenizer_encodes_the_captions_again_and_no_picture(
    run: Run, capsys: Captured
) -> None:
    vocabulary = run.root / "model" / "tokenizer" / "tokenizer.json"
    words = json.loads(vocabulary.read_text())
    vocabulary.write_text(json.dumps(words, indent=1))
    texts, latents = missing(run, capsys)
    assert texts >= 8
    assert latents == 0
