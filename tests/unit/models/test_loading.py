"""What the user names becomes a checkpoint, or a message that says why not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from simpletuner.core.errors import ConfigError, ModelError
from simpletuner.models.loading import open_family
from simpletuner.models.settings import ModelSettings
from tests.tiny.hub import mini_hub

_OPEN = """
import sys
from simpletuner.core.errors import SimpleTunerError
from simpletuner.models.loading import open_family
from simpletuner.models.settings import ModelSettings
try:
    settings = {"model_family": "sdxl", **eval_free(sys.argv[1])}
    family = open_family(ModelSettings(**settings))
    found = sorted(p.name for p in family.checkpoint.folder.iterdir())
    print("opened", family.checkpoint.label, found)
except SimpleTunerError as error:
    print("refused", error.exit_code, error)
""".replace("eval_free(sys.argv[1])", "__import__('json').loads(sys.argv[1])")


def in_fresh_process(tmp_path: Path, endpoint: str, settings: str, **more: str) -> str:
    environ = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        **more,
    }
    done = subprocess.run(
        [sys.executable, "-c", _OPEN, settings], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _local(folder: Path, **more: object) -> ModelSettings:
    return ModelSettings(model_family="sdxl", pretrained_model_name_or_path=str(folder), **more)


@pytest.mark.slow
def test_a_hub_id_is_fetched_once_and_then_works_offline(tiny_sdxl: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sdxl, tmp_path / "hub" / "owner" / "tiny")
    settings = '{"pretrained_model_name_or_path": "owner/tiny"}'
    with mini_hub(tmp_path / "hub") as endpoint:
        first = in_fresh_process(tmp_path, endpoint, settings)
    again = in_fresh_process(tmp_path, endpoint, settings, HF_HUB_OFFLINE="1")
    assert first.startswith("opened owner/tiny")
    assert "unet" in first
    assert again == first


def test_gated_missing_and_unreachable_models_have_three_messages(tmp_path: Path) -> None:
    (tmp_path / "hub" / "owner" / "gated").mkdir(parents=True)
    answers = []
    with mini_hub(tmp_path / "hub", frozenset({"owner/gated"})) as endpoint:
        for name in ("owner/gated", "owner/nothing"):
            settings = f'{{"pretrained_model_name_or_path": "{name}"}}'
            answers.append(in_fresh_process(tmp_path, endpoint, settings))
    settings = '{"pretrained_model_name_or_path": "owner/gated"}'
    answers.append(in_fresh_process(tmp_path, endpoint, settings))
    gated, missing, unreachable = answers
    assert all(answer.startswith("refused 5 owner/") for answer in answers)
    assert "is gated" in gated
    assert "accept its terms" in gated
    assert "does not exist at" in missing
    assert "cannot be reached" in unreachable


def test_a_flavour_names_a_repository(tmp_path: Path) -> None:
    with mini_hub(tmp_path) as endpoint:
        answer = in_fresh_process(tmp_path, endpoint, '{"model_flavour": "refiner-1.0"}')
    assert "stabilityai/stable-diffusion-xl-refiner-1.0 does not exist at" in answer


def test_an_unknown_flavour_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"no flavour 'base1.0'; it has base-1.0, refiner-1.0"):
        open_family(ModelSettings(model_family="sdxl", model_flavour="base1.0"))


def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist on this machine"):
        open_family(_local(tmp_path / "nowhere"))


def test_a_folder_of_another_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"without model_index\.json"):
        open_family(_local(tmp_path))


def test_a_checkpoint_of_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ModelError, match="is a FluxPipeline, not a model of the family sdxl"):
        open_family(_local(tmp_path))


@pytest.mark.parametrize(
    ("family", "pipeline"),
    [
        ("sd1x", "StableDiffusionXLPipeline"),
        ("sd1x", "StableDiffusion3Pipeline"),
        ("flux", "FluxKontextPipeline"),
        ("flux", "Flux2Pipeline"),
    ],
)
def test_a_family_whose_name_begins_alike_is_another_one(
    family: str, pipeline: str, tmp_path: Path
) -> None:
    (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{pipeline}"}}')
    settings = ModelSettings(model_family=family, pretrained_model_name_or_path=str(tmp_path))
    with pytest.raises(ModelError, match=f"is a {pipeline}, not a model of the family {family}"):
        open_family(settings)


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(ModelError, match=r"model\.ckpt is a pickle"):
        open_family(_local(tmp_path / "model.ckpt"))


def test_the_fingerprint_follows_the_weights_and_not_the_place(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny_sdxl, tmp_path / "moved")
    here, there = open_family(_local(tiny_sdxl)), open_family(_local(moved))
    assert there.fingerprint("vae") == here.fingerprint("vae")
    assert there.fingerprint("text") != there.fingerprint("vae")
    weights = moved / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = open_family(_local(moved))
    assert changed.fingerprint("vae") != here.fingerprint("vae")
    assert changed.fingerprint("text") == here.fingerprint("text")


def test_digests_are_remembered_by_path_size_and_time(tiny_sdxl: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny_sdxl, tmp_path / "moved")
    big = moved / "vae" / "diffusion_pytorch_model.safetensors"
    big.write_bytes(big.read_bytes() + bytes(1 << 20))
    memory = tmp_path / "digests.json"
    first = open_family(_local(moved), digests=memory).fingerprint("vae")
    assert str(big) in memory.read_text()
    assert open_family(_local(moved), digests=memory).fingerprint("vae") == first
    big.write_bytes(big.read_bytes() + b"x")
    assert open_family(_local(moved), digests=memory).fingerprint("vae") != first


def test_the_vae_can_come_from_elsewhere(tiny_sdxl: Path, tiny_sdxl_v: Path) -> None:
    other = open_family(
        _local(tiny_sdxl, pretrained_vae_model_name_or_path=str(tiny_sdxl_v / "vae"))
    )
    assert other.fingerprint("vae") == open_family(_local(tiny_sdxl_v)).fingerprint("vae")


def test_the_scheduler_says_what_is_predicted_unless_the_user_does(
    tiny_sdxl: Path, tiny_sdxl_v: Path
) -> None:
    assert open_family(_local(tiny_sdxl)).prediction_type == "epsilon"
    assert open_family(_local(tiny_sdxl_v)).prediction_type == "v_prediction"
    chosen = open_family(_local(tiny_sdxl, prediction_type="v_prediction"))
    assert chosen.prediction_type == "v_prediction"
