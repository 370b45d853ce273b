"""``simpletuner check`` and its neighbours, from outside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from simpletuner.apps.cli import main
from simpletuner.config.find import shipped_folder
from tests import seeds


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, as `simpletuner` sees it."""
    monkeypatch.chdir(tmp_path)
    for name in ("ENV", "CONFIG_BACKEND", "CONFIG_PATH", "TRAINER_EXTRA_ARGS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "config").mkdir()
    return tmp_path


def write(folder: Path, **files: str) -> None:
    """Write config/<name>.json for each."""
    for name, text in files.items():
        (folder / "config" / f"{name}.json").write_text(text, encoding="utf-8")


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What `simpletuner check --json` says; fails if it does not pass."""
    code = main(["check", "--json", *arguments])
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert code == 0, facts
    return facts


def pending(facts: Mapping[str, Any]) -> set[str]:
    return {problem["key"].lstrip("-") for problem in facts["pending"]}


def merged(*texts: str) -> str:
    return json.dumps({key: value for text in texts for key, value in json.loads(text).items()})


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environ, capture_output=True, text=True
    )


def test_the_sdxl_quickstart_passes_as_printed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, config=seeds.SDXL_CONFIG, multidatabackend=seeds.SDXL_DATASETS)

    facts = check(capsys)

    assert facts["pending"] == []
    assert facts["config"]["gradient_checkpointing"] is True
    assert facts["config"]["validation_resolution"] == [[1024, 1024], [1280, 768]]
    assert facts["config"]["validation_guidance"] == 3.4
    assert facts["config"]["output_dir"] == "/home/user/output/models"
    (entry,) = facts["datasets"]
    assert (entry["resolution"], entry["resolution_type"]) == (1.0, "area")
    assert facts["notes"] == [
        "dataset pseudo-camera-10k-sdxl: /home/user/simpletuner/datasets/pseudo-camera-10k does "
        "not exist yet"
    ]


def test_the_sdxl_datasets_may_lie_in_the_output_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, config=seeds.SDXL_CONFIG)
    (folder / "out").mkdir()
    (folder / "out/multidatabackend.json").write_text(seeds.SDXL_DATASETS, encoding="utf-8")

    facts = check(capsys, "--output_dir=out")

    assert facts["files"][1] == str(folder / "out/multidatabackend.json")


def test_the_quantised_and_preview_blocks_pass_and_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = merged(seeds.SDXL_CONFIG, seeds.SDXL_QUANTISED, seeds.PREVIEWS)
    write(folder, config=settings, multidatabackend=seeds.SDXL_DATASETS)

    facts = check(capsys, "--compress_disk_cache=true", "--vae_cache_disable", "--report_to=wandb")

    assert pending(facts) >= {"validation_preview", "report_to"}
    assert facts["config"]["optimizer"] == "optimi-lion"
    assert facts["datasets"][0]["vae_cache_disable"] is True


def test_the_sd3_quickstart_passes_as_printed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(
        shipped_folder() / "user_prompt_library.json.example",
        folder / "config/user_prompt_library.json",
    )
    write(folder, config=seeds.SD3_CONFIG, multidatabackend=seeds.SD3_DATASETS)

    facts = check(capsys)

    config = facts["config"]
    assert facts["pending"] == []
    assert config["pretrained_model_name_or_path"] == "stabilityai/stable-diffusion-3.5-large"
    assert config["user_prompt_library"] == str(folder / "config/user_prompt_library.json")
    assert facts["datasets"][0]["maximum_image_size"] == 1024


def test_the_sd3_quickstart_without_its_library_says_what_to_copy(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, config=seeds.SD3_CONFIG, multidatabackend=seeds.SD3_DATASETS)

    assert main(["check"]) == 2
    assert (
        "cp config/user_prompt_library.json.example config/user_prompt_library.json"
        in capsys.readouterr().err
    )


def test_skip_layer_guidance_keeps_its_list(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = merged('{"model_family": "sd3"}', seeds.SKIP_LAYER_GUIDANCE, seeds.SD3_QUANTISED)
    write(folder, config=settings, multidatabackend=seeds.SD3_DATASETS)

    facts = check(capsys)

    assert facts["config"]["validation_guidance_skip_layers"] == [7, 8, 9]
    assert facts["config"]["validation_guidance"] == 4.0
    assert pending(facts) == {"validation_guidance_skip_layers"}


def test_the_sd3_shell_block_keeps_both_lines_of_flags(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "config/config.env").write_text(
        "MODEL_FAMILY=sd3\nOUTPUT_DIR=out\nTRAIN_BATCH_SIZE=1\nVAE_BATCH_SIZE=2\n"
        + seeds.SD3_SHELL,
        encoding="utf-8",
    )
    write(folder, multidatabackend=seeds.SD3_DATASETS)

    facts = check(capsys)

    config = facts["config"]
    assert config["base_model_precision"] == "int8-quanto"
    assert config["text_encoder_1_precision"] == "no_change"
    assert config["text_encoder_2_precision"] == "no_change"
    assert config["optimizer"] == "adamw_bf16"
    assert config["vae_batch_size"] == 2
    assert config["mixed_precision"] == "no"
    assert "mixed_precision is no: int8-quanto computes in fp32 on a CPU" in facts["notes"]


def test_the_sd3_stable_and_smallest_values_pass(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, config='{"model_family": "sd3"}', multidatabackend=seeds.SD3_DATASETS)

    stable = check(capsys, *seeds.SD3_STABLE_VALUES, "train_batch_size=4")
    smallest = check(
        capsys,
        "--base_model_precision=nf4-bnb",
        "--optimizer=bnb-lion8bit-paged",
        "--mixed_precision=no",
        "--t5_padding=zero",
        "--tokenizer_max_length=77",
        "--resolution=512",
    )

    assert stable["config"]["max_grad_norm"] == 0.1
    assert pending(stable) == {"validation_guidance_skip_layers"}
    assert pending(smallest) == set()


@pytest.mark.parametrize("spelling", ["MODEL_TYPE", "--model-type", "Model_Type"])
def test_a_key_may_be_spelled_as_the_prose_of_the_documents_does(
    folder: Path, capsys: pytest.CaptureFixture[str], spelling: str
) -> None:
    write(
        folder,
        config=json.dumps({"model_family": "sdxl", spelling: "lora"}),
        multidatabackend=seeds.SDXL_DATASETS,
    )

    assert check(capsys)["config"]["model_type"] == "lora"


def test_problems_go_to_the_terminal_or_into_json(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, config='{\n"model_famly": "sdxl"}', multidatabackend=seeds.SDXL_DATASETS)

    assert main(["check"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "line 2    model_famly   unknown setting; did you mean model_family?" in shown.err

    assert main(["check", "--json"]) == 2
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] is False
    assert {
        "message": "is required",
        "key": "model_family",
        "file": "config/config.json",
        "line": None,
    } in facts["problems"]


def test_training_refuses_what_is_not_built_yet_and_makes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, config=seeds.SDXL_CONFIG, multidatabackend=seeds.SDXL_DATASETS)

    assert main(["train", "--compress_disk_cache", "--output_dir=out"]) == 2
    assert "--compress_disk_cache  is not built yet" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_training_refuses_a_folder_of_pictures_that_is_not_there(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, config=seeds.SDXL_CONFIG, multidatabackend=seeds.SDXL_DATASETS)

    assert main(["train", "--output_dir=out"]) == 3
    assert (
        "pseudo-camera-10k-sdxl: instance_data_dir /home/user/simpletuner/datasets/"
        "pseudo-camera-10k does not exist" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_run_that_fails_leaves_its_events_and_its_exit_code(folder: Path) -> None:
    (folder / "empty").mkdir()
    datasets = json.dumps([{"id": "a", "instance_data_dir": "empty"}])
    write(folder, config='{"model_family": "sdxl"}', multidatabackend=datasets)

    done = python("-m", "simpletuner", "train", "--output_dir=out", cwd=folder)

    assert done.returncode == 3
    assert "there are no pictures in" in done.stderr
    assert "Traceback" not in done.stderr
    last = json.loads((folder / "out/events.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["exit_code"]) == ("run.failed", 3)
    assert (folder / "out/simpletuner.log").exists()


def test_training_without_its_packages_says_how_to_install_them(folder: Path) -> None:
    (folder / "empty").mkdir()
    datasets = json.dumps([{"id": "a", "instance_data_dir": "empty"}])
    write(folder, config='{"model_family": "sdxl"}', multidatabackend=datasets)
    script = "import sys; sys.modules['torch'] = None\n" + (
        "from simpletuner.apps.cli import main\nsys.exit(main(['train', '--output_dir=out']))"
    )

    done = python("-c", script, cwd=folder)

    assert done.returncode == 6
    assert "pip install 'simpletuner[train]'" in done.stderr


def test_ctrl_c_before_training_exits_as_a_shell_expects(folder: Path) -> None:
    write(folder, config=seeds.SDXL_CONFIG, multidatabackend=seeds.SDXL_DATASETS)
    # While our own modules are imported: a signal inside pydantic's compiled core is a panic there.
    script = (
        "import os, signal, sys, simpletuner.apps.cli as cli\n"
        "def strike(event, found):\n"
        "    if event == 'import' and found[0] == 'simpletuner.config.places':\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job's may be ignored
        "sys.addaudithook(strike)\n"
        "sys.exit(cli.main(['check']))"
    )

    done = python("-c", script, cwd=folder)

    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_configure_writes_what_is_missing_and_says_what_comes_next(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, webhooks="mine")

    assert main(["configure"]) == 0

    shown = capsys.readouterr().out
    assert "wrote  config/config.json" in shown
    assert "kept   config/webhooks.json" in shown
    assert shown.endswith("then:\n  simpletuner check\n  simpletuner train\n")
    assert (folder / "config/webhooks.json").read_text() == "mine"
    assert check(capsys)["pending"] == []


def test_configure_never_changes_a_file(folder: Path) -> None:
    assert main(["configure"]) == 0
    before = {path: path.read_bytes() for path in (folder / "config").iterdir()}
    write(folder, config="{}")

    assert main(["configure"]) == 0
    assert (folder / "config/config.json").read_text() == "{}"
    assert len(before) == 4


def test_options_explain_one_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options", "--lora-rank", "compress_disk_cache"]) == 0

    shown = capsys.readouterr().out
    assert "type      a whole number\n  default   16\n  range     at least 1" in shown
    assert "not built yet" in shown


def test_options_list_every_section_and_name_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["options"]) == 0
    assert "\noptimizer: " in capsys.readouterr().out

    assert main(["options", "lora_rnak"]) == 2
    assert "unknown setting 'lora_rnak'; did you mean lora_rank?" in capsys.readouterr().err


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "unknown command 'trian'; did you mean train?" in capsys.readouterr().err


def test_an_unexpected_fault_is_one_line_and_its_traceback_is_in_a_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    write(folder, config="{}")
    (folder / "gone").mkdir()
    monkeypatch.chdir(folder / "gone")
    (folder / "gone").rmdir()  # the working directory itself is gone: nothing expects that

    assert main(["check"]) == 1

    shown = capsys.readouterr().err
    assert "its traceback is in " in shown
    assert len(shown.splitlines()) == 2
    file = Path(shown.rsplit(" ", 1)[1].strip())
    assert "Traceback" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["check"], ["options"]])
def test_nothing_heavy_is_imported(folder: Path, arguments: list[str]) -> None:
    write(folder, config=seeds.SDXL_CONFIG, multidatabackend=seeds.SDXL_DATASETS)
    script = (
        "import sys, simpletuner.apps.cli as cli\n"
        "try:\n    code = cli.main(sys.argv[1:])\nexcept SystemExit as leaving:\n"
        "    code = leaving.code or 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'numpy', 'pyarrow', 'PIL'}\n"
        "sys.exit(code or ', '.join(heavy & set(sys.modules)) or 0)"
    )

    done = python("-c", script, *arguments, cwd=folder)

    assert done.returncode == 0, done.stderr


def test_the_package_runs_as_a_module(folder: Path) -> None:
    assert python("-m", "simpletuner", "--version", cwd=folder).stdout.strip() == "0.1.0"
    assert "commands:" in python("-m", "simpletuner", cwd=folder).stdout
    assert python("-m", "simpletuner", "check", cwd=folder).returncode == 2
