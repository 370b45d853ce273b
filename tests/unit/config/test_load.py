from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner.config.load import examples_folder
from simpletuner.core.errors import ConfigError
from tests.unit.config.workplace import PICTURES, Workplace


def test_a_small_file_loads_with_the_defaults_of_the_documents(place: Workplace) -> None:
    loaded = place.load()

    assert loaded.config.model.model_family == "sdxl"
    assert loaded.config.optimizer.learning_rate == 1e-4
    assert loaded.config.schedule.num_train_epochs == 1
    assert loaded.config.data.data_backend_config == place.root / "config/multidatabackend.json"
    assert [entry.id for entry in loaded.datasets.training] == ["pictures"]
    assert loaded.files == (
        place.root / "config/config.json",
        place.root / "config/multidatabackend.json",
    )
    assert loaded.notes == loaded.pending == ()


def test_a_flag_wins_over_the_environment_and_that_over_the_file(place: Workplace) -> None:
    place.config(learning_rate=1e-3, seed=1, lora_rank=2, validation_seed=3)

    loaded = place.load(
        "--learning_rate",
        "1e-5",
        LEARNING_RATE="1e-6",
        TRAINING_SEED="5",
        TRAINER_EXTRA_ARGS="--lora_rank=4 --validation_disable",
        VALIDATION_DISABLE="false",
    )

    assert loaded.config.optimizer.learning_rate == 1e-5
    assert loaded.config.runtime.seed == 5
    assert loaded.config.adapter.lora_rank == 4
    assert loaded.config.validation.validation_seed == 3
    assert loaded.config.validation.validation_disable is True
    assert "seed comes from the environment variable TRAINING_SEED" in loaded.notes


def test_steps_alone_turn_epochs_off_and_both_are_an_error(place: Workplace) -> None:
    place.config(max_train_steps=10)
    assert place.load().config.schedule.num_train_epochs == 0

    (message,) = place.messages("--num_train_epochs=2")
    assert "max_train_steps (10) and num_train_epochs (2) both say when to stop" in message


def test_null_and_empty_text_leave_the_default(place: Workplace) -> None:
    place.config(lora_rank=None, optimizer="", validation_negative_prompt="")

    config = place.load().config

    assert config.adapter.lora_rank == 16
    assert config.optimizer.optimizer == "adamw_bf16"
    assert config.validation.validation_negative_prompt == ""


def test_numbers_and_switches_written_as_text_are_read_with_a_note(place: Workplace) -> None:
    place.config(
        '{"model_family": "sdxl",\n"learning_rate": "2e-4",\n"validation_disable": "true"}'
    )

    loaded = place.load()

    assert loaded.config.optimizer.learning_rate == 2e-4
    assert loaded.config.validation.validation_disable is True
    assert loaded.notes == (
        'config/config.json line 2: learning_rate "2e-4" was read as 0.0002',
        'config/config.json line 3: validation_disable "true" was read as true',
    )


def test_every_problem_of_both_files_comes_at_once_with_its_line(place: Workplace) -> None:
    place.config(
        '{\n"lora_rank": 0,\n"mixed_precision": "bf32",\n"model_flavour": "base1.0",\n'
        '"model_family": "sdxl",\n"lerning_rate": 1,\n"report_to": ["wandbb"]}'
    )
    place.datasets('[{"id": "a", "instance_data_dir": "pictures",\n"Resolutoin": 512}]')

    with pytest.raises(ConfigError) as caught:
        place.load()

    assert str(caught.value) == (
        "config/config.json: 5 problems, nothing was run\n"
        "  line 2    lora_rank        must be at least 1, got 0\n"
        '  line 3    mixed_precision  must be one of bf16, no, fp16, fp8, got "bf32"\n'
        "  line 4    model_flavour    sdxl has no flavour 'base1.0'; did you mean base-1.0?\n"
        "  line 6    lerning_rate     unknown setting; did you mean learning_rate?\n"
        "  line 7    report_to        must be one of wandb, tensorboard, simpletuner, "
        'swanlab, comet_ml, all (did you mean wandb?), got "wandbb"\n'
        "config/multidatabackend.json: 1 problem, nothing was run\n"
        "  line 2    Resolutoin  unknown setting; did you mean resolution?"
    )


def test_what_is_not_built_yet_is_named_and_still_loads(place: Workplace) -> None:
    place.config(mixed_precision="fp8", attention_mechanism="xformers")
    place.datasets("", PICTURES, {**PICTURES, "id": "b", "revision": "main"})

    pending = place.load("--report_to=wandb").pending

    assert {(p.key, p.message) for p in pending} == {
        ("mixed_precision", "fp8 is not built yet"),
        ("attention_mechanism", "xformers is not built yet"),
        ("--report_to", "wandb is not built yet"),
        ("revision", "is not built yet"),
    }


def test_toml_is_read(place: Workplace) -> None:
    (place.root / "config/config.json").unlink()
    place.write(
        "config/config.toml",
        'model_family = "sdxl"\nvalidation_resolution = ["512x512", 768]\n'
        "[optimizer_config]\nweight_decay = 0.5\n",
    )

    config = place.load().config

    assert config.validation.validation_resolution == ((512, 512), (768, 768))
    assert config.optimizer.optimizer_config == {"weight_decay": 0.5}


def test_shell_syntax_is_read(place: Workplace) -> None:
    (place.root / "config/config.json").unlink()
    place.write(
        "config/config.env",
        "BASE=/data\nexport MODEL_FAMILY=sdxl\nTRAINING_SEED=7\nMAX_NUM_STEPS=12\n"
        "export MODEL_NAME='owner/name'\nOUTPUT_DIR=${BASE}/out\nVAE_BATCH_SIZE=2\n"
        "USE_GRADIENT_CHECKPOINTING=false\nexport HF_HUB_ENABLE_HF_TRANSFER=1\n"
        'TRAINER_EXTRA_ARGS="--lora_rank=8"\nTRAINER_EXTRA_ARGS+=" --lora_alpha 4"\n',
    )

    loaded = place.load()

    assert loaded.config.runtime.seed == 7
    assert loaded.config.schedule.max_train_steps == 12
    assert loaded.config.model.pretrained_model_name_or_path == "owner/name"
    assert loaded.config.runtime.output_dir == Path("/data/out")
    assert loaded.config.cache.vae_batch_size == 2
    assert loaded.config.precision.gradient_checkpointing is False
    assert loaded.config.adapter.lora_rank == 8
    assert loaded.config.adapter.lora_alpha == 4
    assert loaded.exports == {"HF_HUB_ENABLE_HF_TRANSFER": "1"}
    assert loaded.notes == ()


def test_slips_in_shell_syntax_have_their_line(place: Workplace) -> None:
    place.write(
        "config/config.env",
        "MODEL_FAMILY=sdxl\nLERNING_RATE=1\nSEED=1\nSEED=2\n"
        'TRAINER_EXTRA_ARGS="--seed 3"\nTRAINER_EXTRA_ARGS+=" --lora_rnk=4"\n',
    )

    first = place.problems(CONFIG_BACKEND="env")
    place.write(
        "config/config.env", "MODEL_FAMILY=sdxl\nSEED=1\nSEED=2\nTRAINER_EXTRA_ARGS=--lora_rnk=4"
    )
    second = place.problems(CONFIG_BACKEND="env")

    assert [(p.line, p.message) for p in first] == [
        (2, "unknown setting; did you mean LEARNING_RATE?")
    ]
    assert [(p.line, p.message) for p in second] == [
        (3, "is already set on line 2 as SEED; keep one of the two"),
        (4, "unknown setting; did you mean lora_rank?"),
    ]


def test_the_first_settings_file_is_read_and_the_others_are_named(place: Workplace) -> None:
    place.write("config/config.env", "MODEL_FAMILY=sdxl\nSEED=7\n")

    assert place.load().notes == (
        "config/config.env is not read, because config/config.json is there; CONFIG_BACKEND=env "
        "reads it instead",
    )
    assert place.load(CONFIG_BACKEND="env").config.runtime.seed == 7


def test_a_name_picks_a_folder_in_config(place: Workplace) -> None:
    place.write("config/other/config.json", '{"model_family": "sdxl", "seed": 8}')

    assert place.load(ENV="other").config.runtime.seed == 8
    assert place.load("--env", "other").config.runtime.seed == 8
    assert place.load("env=other").config.runtime.seed == 8
    assert place.load(ENV="default").config.runtime.seed == 42


def test_a_path_names_the_file_its_folder_or_its_stem(place: Workplace) -> None:
    place.write("elsewhere/config.json", '{"model_family": "sdxl", "seed": 9}')

    assert place.load("--config", "elsewhere/config.json").config.runtime.seed == 9
    assert place.load("--config=elsewhere").config.runtime.seed == 9
    assert place.load(CONFIG_PATH="elsewhere/config").config.runtime.seed == 9
    assert place.load("--config", "config", CONFIG_PATH="elsewhere").config.runtime.seed == 42


def test_a_name_that_is_not_there_lists_what_is(place: Workplace) -> None:
    place.write("config/portraits/config.json", "{}")

    (problem,) = place.problems(ENV="portrait")

    assert "ENV=portrait: there is no config.json, config.toml, config.env in config/portrait" in (
        problem.message
    )
    assert "did you mean portraits?" in problem.message
    assert "examples/emoji" in problem.message


def test_no_settings_file_says_where_was_looked_and_what_to_do(tmp_path: Path) -> None:
    workplace = Workplace(tmp_path)

    (problem,) = workplace.problems()

    assert (
        f"looked for config.json, config.toml, config.env in {tmp_path}/config" in problem.message
    )
    assert "`simpletuner configure` writes one" in problem.message


def test_an_unknown_backend_and_two_files_at_once_are_refused(place: Workplace) -> None:
    assert "CONFIG_BACKEND is 'yaml'; it takes json" in place.messages(CONFIG_BACKEND="yaml")[0]
    assert "each name a settings file" in place.messages("--config", "a", "--env", "b")[0]


def test_settings_may_all_be_flags(place: Workplace) -> None:
    (place.root / "config/config.json").unlink()

    assert place.load("--model_family=sdxl", CONFIG_BACKEND="cmd").config.runtime.seed == 42


def test_the_last_of_two_flags_counts_and_that_is_noted(place: Workplace) -> None:
    loaded = place.load("--seed=1", "seed=2")

    assert loaded.config.runtime.seed == 2
    assert loaded.notes == ("seed stands twice on the command line; 2 counts",)


def test_relative_paths_start_from_the_working_directory(place: Workplace) -> None:
    place.config(output_dir="out", cache_dir="~/cache")

    loaded = place.load()

    assert loaded.config.runtime.output_dir == place.root / "out"
    assert loaded.config.cache.cache_dir == Path.home() / "cache"
    assert loaded.datasets.training[0].instance_data_dir == place.root / "pictures"


def test_the_shipped_example_reads_from_its_own_folder_and_writes_into_ours(tmp_path: Path) -> None:
    workplace = Workplace(tmp_path)

    by_name = workplace.load("--example", "emoji")
    by_variable = workplace.load(ENV="examples/emoji")

    assert by_name.config == by_variable.config
    assert by_name.datasets.training[0].instance_data_dir == examples_folder() / "emoji/data"
    assert by_name.config.runtime.output_dir.is_relative_to(tmp_path)
    assert "there is no shipped example 'emojis'; did you mean emoji?" in (
        workplace.problems("--example=emojis")[0].message
    )


def test_the_environment_is_filled_into_texts(place: Workplace) -> None:
    place.config(output_dir="{env:BASE}/out")

    assert place.load(BASE="/data").config.runtime.output_dir == Path("/data/out")
    assert place.messages() == ["output_dir: the environment variable BASE is not set"]


def test_a_missing_family_is_named_beside_the_other_problems(place: Workplace) -> None:
    place.config("{}")

    assert place.messages("--lora_rank=x") == [
        "model_family: is required",
        '--lora_rank: must be a whole number, got "x"',
    ]


def test_an_object_with_a_key_twice_is_refused(place: Workplace) -> None:
    place.config('{"model_family": "sdxl", "optimizer_config": {"eps": 1,\n"eps": 2}}')

    (problem,) = place.problems()

    assert (problem.line, problem.key) == (2, "optimizer_config.eps")
    assert problem.message == "is already set on line 1; keep one of the two"


@pytest.mark.parametrize("text", ["[]", "3", '"x"'])
def test_a_settings_file_is_an_object(place: Workplace, text: str) -> None:
    place.config(text)

    assert place.messages() == [': must be an object: { "key": value, … }']


def test_a_file_that_is_not_utf_8_is_named(place: Workplace) -> None:
    (place.root / "config/config.json").write_bytes('{"a":\n"é"}'.encode("cp1252"))

    (problem,) = place.problems()

    assert (problem.file, problem.line) == ("config/config.json", 2)
    assert problem.message == "is not UTF-8 text; save the file as UTF-8"


def test_a_byte_order_mark_does_no_harm(place: Workplace) -> None:
    text = json.dumps({"model_family": "sdxl", "seed": 3})
    (place.root / "config/config.json").write_bytes(b"\xef\xbb\xbf" + text.encode())

    assert place.load().config.runtime.seed == 3
