"""Which of a folder's weights are read, and which are told apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from simpletuner.core.errors import ModelError, is_out_of_memory
from simpletuner.core.types import Place
from simpletuner.models.family import Family
from simpletuner.models.loading import open_family
from simpletuner.models.settings import ModelSettings
from tests.runs import fill_the_memory

CPU = Place(torch.device("cpu"), torch.float32)


def opened(folder: Path, **more: object) -> Family:
    return open_family(
        ModelSettings(model_family="sdxl", pretrained_model_name_or_path=str(folder), **more)
    )


def with_fp16(folder: Path, target: Path, *, plain: bool = False) -> Path:
    """A copy of `folder` with every weight in half precision in ``*.fp16.safetensors``."""
    shutil.copytree(folder, target)
    for path in target.glob("*/*.safetensors"):
        halves = {name: value.half() for name, value in load_file(path).items()}
        save_file(halves, path.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        if not plain:
            path.unlink()
    return target


def test_a_folder_that_has_only_fp16_weights_opens_with_that_variant(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    family, whole = opened(with_fp16(tiny_sdxl, tmp_path / "x"), variant="fp16"), opened(tiny_sdxl)
    pairs = [(family.open_denoiser(CPU), whole.open_denoiser(CPU))]
    pairs.append(tuple(f.open_vae(CPU.device, CPU.dtype) for f in (family, whole)))
    pairs.append(tuple(f.open_text(CPU).text_encoder_2 for f in (family, whole)))
    for ours, theirs in pairs:
        expected = theirs.state_dict()
        for name, value in ours.state_dict().items():
            assert torch.equal(value, expected[name].half().float())


def test_a_variant_that_is_not_there_or_not_asked_for_is_an_error_that_says_which_is(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    halves = with_fp16(tiny_sdxl, tmp_path / "halves")
    with pytest.raises(ModelError, match=r"halves has no plain .* only fp16\n  set variant to fp1"):
        opened(halves)
    with pytest.raises(ModelError, match=r"has no bf16 .*, only fp16\n  set variant to fp16"):
        opened(halves, variant="bf16")
    with pytest.raises(ModelError, match=r"has no fp16 .*, only plain ones\n  remove variant"):
        opened(tiny_sdxl, variant="fp16")


def test_a_part_without_the_variant_comes_plain(tiny_sdxl: Path, tmp_path: Path) -> None:
    mixed = with_fp16(tiny_sdxl, tmp_path / "x")
    shutil.copytree(tiny_sdxl / "vae", mixed / "vae", dirs_exist_ok=True)
    next((mixed / "vae").glob("*.fp16.*")).unlink()
    vae = opened(mixed, variant="fp16").open_vae(CPU.device, CPU.dtype)
    expected = opened(tiny_sdxl).open_vae(CPU.device, CPU.dtype).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in vae.state_dict().items())


def test_the_fingerprint_is_that_of_the_variant_that_is_read(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    both = with_fp16(tiny_sdxl, tmp_path / "both", plain=True)
    halves = with_fp16(tiny_sdxl, tmp_path / "halves")
    plain = opened(tiny_sdxl).fingerprint("vae")
    assert opened(both).fingerprint("vae") == plain
    half = opened(halves, variant="fp16").fingerprint("vae")
    assert opened(both, variant="fp16").fingerprint("vae") == half != plain


def test_pickled_weights_in_a_folder_are_not_read(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sdxl, tmp_path / "x")
    for path in folder.glob("*/*.safetensors"):
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    with pytest.raises(ModelError, match=r"x has no \.safetensors weights\n  take a release"):
        opened(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder_2"])
def test_a_truncated_part_is_an_error_that_names_it(
    tiny_sdxl: Path, tmp_path: Path, part: str
) -> None:
    folder = shutil.copytree(tiny_sdxl, tmp_path / "x")
    (weights,) = (folder / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    checkpoint = opened(folder).checkpoint
    others = {name: None for name in ("unet", "vae", "text_encoder") if name != part}
    with pytest.raises(ModelError, match=r"x: cannot open its StableDiffusionXLPipeline"):
        checkpoint.open_pipeline("StableDiffusionXLPipeline", options=others, dtype=torch.float32)


def test_a_memory_that_is_full_while_opening_is_no_fault_of_the_checkpoint(
    tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", fill_the_memory)
    with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        opened(tiny_sdxl).open_vae(CPU.device, CPU.dtype)
    assert is_out_of_memory(caught.value)
