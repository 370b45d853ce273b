"""What a run says of itself in its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.flat import SETTINGS
from simpletuner.core.tensors import header
from tests.runs import Run, make_pictures


class Two(Run):
    """A run of two datasets, each with its own words in front of its captions."""

    def write(self, **settings: Any) -> Path:
        path = super().write(**settings)
        one = {**self.dataset, "prepend_instance_prompt": True, "instance_prompt": "sks person"}
        other = {**one, "id": "other", "instance_prompt": ["b dog", "a cat"]}
        other["instance_data_dir"] = str(make_pictures(self.root / "other", 2))
        other |= {"start_step": 2, "train_batch_size": 1}
        (self.root / "multidatabackend.json").write_text(json.dumps([one, other]))
        return path


@pytest.fixture(scope="module")
def done(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of one step; read it only."""
    run = Two(tmp_path_factory.mktemp("report"), tiny_sdxl)
    run.settings |= {"peft_lora_target_modules": ["to_q"], "validation_disable": True}
    assert run.train(max_train_steps=1, seed=7, data_backend_sampling="mix") == 0
    return run


def resolved(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.out / "resolved_config.json").read_text())
    return found


@pytest.mark.parametrize("file", ["", "checkpoint-1/"])
def test_the_weights_name_their_trigger_phrases_and_what_they_are_for(
    done: Run, tiny_sdxl: Path, file: str
) -> None:
    facts = header(done.out / f"{file}pytorch_lora_weights.safetensors")
    assert facts["modelspec.trigger_phrase"] == "a cat, b dog, sks person"
    told = {name: facts[name] for name in ("lora_rank", "lora_alpha", "steps", "base_model")}
    assert told == {
        "lora_rank": "4",
        "lora_alpha": "4",
        "steps": "1",
        "base_model": tiny_sdxl.name,
    }
    assert facts["modelspec.architecture"].endswith("/lora")
    assert facts["modelspec.prediction_type"] == "epsilon"
    assert str(done.root) not in json.dumps(facts)


def test_a_run_without_an_instance_prompt_has_no_trigger_phrase(
    tmp_path: Path, tiny_sdxl: Path
) -> None:
    run = Run(tmp_path, tiny_sdxl)
    run.settings |= {"peft_lora_target_modules": ["to_q"], "validation_disable": True}
    assert run.train(max_train_steps=1, validation_seed=0, lora_alpha=6) == 0
    facts = header(run.out / "pytorch_lora_weights.safetensors")
    assert "modelspec.trigger_phrase" not in facts
    assert "modelspec.comment" not in facts
    settings = resolved(run)["settings"]
    assert (settings["validation_seed"], settings["lora_alpha"]) == (0, 6)


def test_the_header_has_what_other_programs_show(done: Run) -> None:
    facts = header(done.out / "pytorch_lora_weights.safetensors")
    assert facts["modelspec.title"] == facts["ss_output_name"] == "out"
    assert facts["ss_base_model_version"] == "sdxl_base_v1-0"
    assert (facts["ss_network_dim"], facts["ss_network_alpha"]) == ("4", "4")
    assert (facts["ss_steps"], facts["ss_epoch"], facts["ss_seed"]) == ("1", "1", "7")
    assert facts["ss_learning_rate"] == "0.001"
    buckets = json.loads(facts["ss_bucket_info"])["buckets"].values()
    assert sum(each["count"] for each in buckets) == int(facts["ss_num_train_images"]) == 10
    width, height = map(int, facts["modelspec.resolution"].split("x"))
    assert [width, height] in [each["resolution"] for each in buckets]


def test_words_of_the_captions_stay_out_where_they_are_unwanted(
    tmp_path: Path, tiny_sdxl: Path
) -> None:
    run = Run(tmp_path, tiny_sdxl)
    tags = ["kitten, red", "kitten, blue", "kitten, red, a sentence of one picture"]
    for number, picture in enumerate(sorted(run.pictures.glob("*.png"))):
        picture.with_suffix(".txt").write_text(tags[number % 3] if number < 3 else "kitten")
    run.dataset["caption_strategy"] = "textfile"
    run.settings |= {"peft_lora_target_modules": ["to_q"], "validation_disable": True}
    told = {"modelspec_comment": "a note", "max_train_steps": 1}
    file = run.out / "pytorch_lora_weights.safetensors"

    assert run.train(**told) == 0
    facts = header(file)
    assert json.loads(facts["ss_tag_frequency"]) == {"pictures": {"kitten": 8, "red": 2}}
    assert facts["modelspec.comment"] == facts["ss_training_comment"] == "a note"

    again = {**told, "resume_from_checkpoint": "none", "ss_tag_frequency": False}
    assert run.train(**again) == 0
    assert "ss_tag_frequency" not in header(file)
    assert "kitten" not in json.dumps(header(file))


def test_resolved_settings_are_complete_and_filled_in(done: Run, tiny_sdxl: Path) -> None:
    settings = resolved(done)["settings"]
    pending = {key for key, setting in SETTINGS.items() if setting.hint.pending is True}
    assert pending
    assert settings.keys() == SETTINGS.keys() - pending
    for key, value in {
        "lora_alpha": 4,
        "validation_seed": 7,
        "prediction_type": "epsilon",
        "pretrained_model_name_or_path": str(tiny_sdxl),
        "max_train_steps": 1,
        "output_dir": str(done.out),
        "lr_warmup_steps": 0,
    }.items():
        assert settings[key] == value, key


def test_resolved_datasets_stand_there_with_what_they_inherit(done: Run) -> None:
    first, second = resolved(done)["datasets"]
    assert (first["id"], second["id"]) == ("pictures", "other")
    assert (first["instance_prompt"], second["instance_prompt"]) == (
        "sks person",
        ["b dog", "a cat"],
    )
    assert first["caption_dropout_probability"] == 0.1
    assert first["cache_dir_vae"].startswith(str(done.out))
    assert not {"conditioning", "dataset_name", "aws_bucket_name"} & first.keys()
    assert resolved(done)["text_embeds"]["cache_dir"].startswith(str(done.out))


def test_a_dataset_that_begins_after_the_run_is_named_and_so_is_a_change_of_pace(
    done: Run,
) -> None:
    told = [event["text"] for event in done.events("notice")]
    assert [text for text in told if "not drawn" in text] == [
        "dataset other is not drawn from in this run"
    ]
    schedule = json.loads((done.out / "run.json").read_text())["summary"]["schedule"]
    assert schedule == "1 steps of 2 x 1, 4 steps an epoch, 6 from step 2 on"


def test_a_checkpoint_knows_how_its_batches_were_drawn(done: Run) -> None:
    data = json.loads((done.out / "checkpoint-1" / "state.json").read_text())["data"]
    found = {name: data[name] for name in ("data_backend_sampling", "dataset other: start_step")}
    assert found == {"data_backend_sampling": "mix", "dataset other: start_step": "2"}
    assert data["dataset other: train_batch_size"] == "1"
    assert data["dataset pictures: train_batch_size"] == "default: 2"


def test_run_json_has_versions_summary_and_result(done: Run) -> None:
    facts = json.loads((done.out / "run.json").read_text())
    assert facts["versions"].keys() >= {"simpletuner", "torch", "diffusers", "peft"}
    assert facts["summary"]["data"] == (
        "pictures: 8 pictures in 4 shapes, other: 2 pictures in 2 shapes"
    )
    assert facts["result"]["weights"] == "pytorch_lora_weights.safetensors"
    assert facts["result"]["verified"] == "verified: 16 of 16 modules"
    assert facts["result"]["largest_relative_error"] <= 1e-6
