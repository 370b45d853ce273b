"""A whole SDXL in one file of the original layout is the same model as its folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from simpletuner.core.errors import ModelError
from simpletuner.core.types import Batch, Draw, Geometry, Place, Sample
from simpletuner.models.checkpoint import Checkpoint
from simpletuner.models.families.sdxl import SDXL
from simpletuner.models.loading import open_family
from simpletuner.models.settings import ModelSettings
from tests.tiny.build import build_sdxl
from tests.tiny.hub import mini_hub
from tests.tiny.single_file import build_sdxl_of_two_widths, configs_of, write_single_file

CPU = Place(torch.device("cpu"), torch.float32)
BASE = "stabilityai/stable-diffusion-xl-base-1.0"

_OPEN = """
import json, sys, torch
from hashlib import sha256
from simpletuner.core.errors import SimpleTunerError
from simpletuner.core.types import Place
from simpletuner.models.loading import open_family
from simpletuner.models.settings import ModelSettings

def digest(module):
    tensors = sorted(module.state_dict().items())
    return sha256(b"".join(tensor.numpy().tobytes() for _, tensor in tensors)).hexdigest()

def watch(event, arguments):
    if event == "socket.connect" and {offline}:
        raise RuntimeError("it wants the network")
    if event == "open" and str(arguments[0]).endswith("model.safetensors"):
        opened.append(arguments[0])

opened, place = [], Place(torch.device("cpu"), torch.float32)
sys.addaudithook(watch)
try:
    family = open_family(ModelSettings(**json.loads(sys.argv[1])))
    before = len(opened)
    family.fingerprint("text"), family.fingerprint("vae")
    found = {"reads": len(opened) - before}
    pipe = family.open_text(place)
    found |= {part: digest(pipe.components[part]) for part in ("text_encoder", "text_encoder_2")}
    found |= {"vae": digest(family.open_vae(place.device, place.dtype))}
    found |= {"unet": digest(family.open_denoiser(place))}
    print(json.dumps(found))
except SimpleTunerError as error:
    print(error)
"""


@dataclass(frozen=True)
class One:
    """A tiny SDXL three times: its folder, the folder without weights, one file."""

    folder: Path
    configs: Path
    file: Path

    def family(self, **more: object) -> SDXL:
        return SDXL(Checkpoint(self.file.name, self.configs, file=self.file, **more))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> One:
    root = tmp_path_factory.mktemp("one")
    folder = build_sdxl_of_two_widths(root / "folder")
    file = write_single_file(folder, root / "model.safetensors")
    return One(folder, configs_of(folder, root / "configs"), file)


def settings(path: Path, **more: object) -> ModelSettings:
    return ModelSettings(model_family="sdxl", pretrained_model_name_or_path=str(path), **more)


def parts(family: SDXL) -> dict[str, torch.nn.Module]:
    pipe = family.open_text(CPU)
    text = {part: pipe.components[part] for part in ("text_encoder", "text_encoder_2")}
    vae = family.open_vae(CPU.device, CPU.dtype)
    opened = text | {"unet": family.open_denoiser(CPU), "vae": vae}
    return {name: module for name, module in opened.items() if module is not None}


def assert_same_weights(
    ours: Mapping[str, torch.nn.Module], theirs: Mapping[str, torch.nn.Module]
) -> None:
    assert ours.keys() == theirs.keys()
    for name, module in theirs.items():
        expected, found = module.state_dict(), ours[name].state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_every_weight_is_that_of_the_folder(one: One) -> None:
    ours = parts(one.family())
    assert_same_weights(ours, parts(SDXL(Checkpoint("folder", one.folder))))
    assert ours["unet"].training
    assert not any(p.requires_grad for module in ours.values() for p in module.parameters())


def test_the_setting_variant_says_nothing_about_a_file(one: One) -> None:
    assert_same_weights(parts(one.family(variant="fp16")), parts(one.family()))


def test_a_refiner_in_one_file_has_the_second_text_encoder_alone(tmp_path: Path) -> None:
    folder = build_sdxl(tmp_path / "folder", refiner=True)
    file = write_single_file(folder, tmp_path / "model.safetensors")
    ours = parts(One(folder, configs_of(folder, tmp_path / "configs"), file).family())
    assert_same_weights(ours, parts(SDXL(Checkpoint("folder", folder))))
    assert "text_encoder" not in ours


def test_captions_and_predictions_are_those_of_the_folder(one: One) -> None:
    answers = []
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    draw = Draw(latents, latents, latents, torch.zeros(1), torch.full((1,), 500.0), torch.ones(1))
    whole = Geometry((64, 64), (64, 64), (0, 0, 64, 64))
    for family in (one.family(), SDXL(Checkpoint("folder", one.folder))):
        (embeds,) = family.encode_text(family.open_text(CPU), ["a photo of a cat"])
        stacked = {name: value[None] for name, value in embeds.items()}
        batch = Batch(latents, stacked, (Sample("", "", "", "", whole),))
        with torch.no_grad():
            answers.append(family.predict(family.open_denoiser(CPU), draw, batch))
    assert torch.allclose(*answers, atol=1e-6)  # the weights are equal, their addresses are not


@pytest.mark.slow
def test_configs_come_from_the_flavours_repository_once_and_then_offline(
    one: One, tmp_path: Path
) -> None:
    shutil.copytree(one.folder, tmp_path / "hub" / BASE)
    environ = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}

    def run(endpoint: str, *, offline: bool) -> str:
        code = _OPEN.replace("{offline}", str(offline))
        done = subprocess.run(
            [sys.executable, "-c", code, settings(one.file).model_dump_json(exclude_unset=True)],
            env={**environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": str(int(offline))},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    with mini_hub(tmp_path / "hub") as endpoint:
        assert f"model.safetensors needs the configs and tokenizers of {BASE}: " in run(
            endpoint, offline=True
        )
        first = run(endpoint, offline=False)
    again = run(endpoint, offline=True)
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    modules = parts(SDXL(Checkpoint("folder", one.folder)))
    assert json.loads(first) == {"reads": 1, **{k: digest(m) for k, m in modules.items()}}
    assert again == first


def digest(module: torch.nn.Module) -> str:
    tensors = sorted(module.state_dict().items())
    return sha256(b"".join(tensor.numpy().tobytes() for _, tensor in tensors)).hexdigest()


def test_the_fingerprint_follows_the_file_and_not_its_name_nor_other_weights(
    one: One, tmp_path: Path
) -> None:
    def prints(family: SDXL) -> list[str]:
        return [family.fingerprint(part) for part in ("text", "vae")]

    moved = Path(shutil.copy(one.file, tmp_path / "a.safetensors"))
    assert prints(One(one.folder, one.folder, moved).family()) == prints(one.family())
    data = bytearray(moved.read_bytes())
    data[-1] ^= 1
    moved.write_bytes(data)
    changed = prints(One(one.folder, one.configs, moved).family())
    assert not set(changed) & set(prints(one.family()))


Weights = dict[str, Tensor]


def only(*begins: str) -> Callable[[Weights], Weights]:
    return lambda whole: {k: v for k, v in whole.items() if k.startswith(begins)}


def without(*begins: str) -> Callable[[Weights], Weights]:
    return lambda whole: {k: v for k, v in whole.items() if not k.startswith(begins)}


def a_lora(_: Weights) -> Weights:
    return {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 16)}


def bare(whole: Weights) -> Weights:
    unet = only("model.diffusion_model.")(whole)
    return {name.removeprefix("model.diffusion_model."): value for name, value in unet.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (a_lora, r"x\.safetensors is a LoRA, not a model\n  .* the LoRA in init_lora"),
        (only("first_stage_model."), r"x\.safetensors is not .*: it has no denoiser, no text enc"),
        (bare, r"x\.safetensors is not .*: it has no denoiser, no VAE, no text encoder"),
        (without("first_stage_model."), r"(?s)has no VAE\n.*pretrained_vae_model_name_or_path"),
        (without("conditioner."), r"has no text encoder\n  name a checkpoint that has them all"),
    ],
)
def test_a_file_that_is_no_whole_model_is_named_before_anything_is_fetched(
    one: One, tmp_path: Path, change: Callable[[Weights], Weights], message: str
) -> None:
    save_file(change(load_file(one.file)), tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=message):
        open_family(settings(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("length", [0, 100, -100])
def test_a_truncated_file_is_to_be_downloaded_again(one: One, tmp_path: Path, length: int) -> None:
    (tmp_path / "x.safetensors").write_bytes(one.file.read_bytes()[:length])
    with pytest.raises(ModelError, match=r"(?s)x\.safetensors cannot be read.*download it again"):
        open_family(settings(tmp_path / "x.safetensors"))


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"model\.gguf is not a \.safetensors file"):
        open_family(settings(tmp_path / "model.gguf"))


def test_a_vae_from_a_file_is_refused_by_its_setting(one: One) -> None:
    with pytest.raises(ModelError, match=r"pretrained_vae_.*: model\.safetensors is a file"):
        open_family(settings(one.folder, pretrained_vae_model_name_or_path=str(one.file)))


@pytest.mark.parametrize(
    "lost",
    [
        "model.diffusion_model.out.2",
        "model.diffusion_model.label_emb",
        "first_stage_model.decoder.conv_out",
        "conditioner.embedders.0",
        "conditioner.embedders.1",
        "conditioner.embedders.1.model.transformer.resblocks.2",
    ],
)
def test_lost_weights_are_an_error_and_never_random(one: One, tmp_path: Path, lost: str) -> None:
    save_file(without(lost)(load_file(one.file)), tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"x\.safetensors: cannot open its "):
        parts(One(one.folder, one.configs, tmp_path / "x.safetensors").family())


def test_the_file_of_an_older_family_is_refused(one: One, tmp_path: Path) -> None:
    older = {
        name.replace("conditioner.embedders.0.", "cond_stage_model."): value
        for name, value in without("conditioner.embedders.1")(load_file(one.file)).items()
        if ".label_emb." not in name
    }
    save_file(older, tmp_path / "x.safetensors")
    family = One(one.folder, one.configs, tmp_path / "x.safetensors").family()
    for opening in (family.open_text, family.open_denoiser):
        with pytest.raises(ModelError, match=r"x\.safetensors: .*\n  check .* the model_family"):
            opening(CPU)
