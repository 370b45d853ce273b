"""Captions that are encoded when training meets them: the same run, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.runs import Run, make_pictures


@pytest.fixture(scope="module", params=["sdxl", "sd3"])
def cached(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with everything encoded before its first step."""
    root = tmp_path_factory.mktemp("live")
    run = Run(root / "cached", request.getfixturevalue(f"tiny_{request.param}"))
    run.settings |= {"model_family": request.param, "caption_dropout_probability": 0.3}
    assert run.train() == 0
    return run


def like(run: Run, root: Path) -> Run:
    made = Run(root, Path(run.settings["pretrained_model_name_or_path"]), run.pictures)
    made.settings |= {**run.settings, "output_dir": str(root / "out")}
    return made


@pytest.mark.parametrize("switch", ["text_cache_ondemand", "text_cache_disable"])
def test_a_run_is_the_same_whenever_captions_are_encoded(
    cached: Run, switch: str, tmp_path: Path
) -> None:
    live = like(cached, tmp_path / "live")
    assert live.train(**{switch: True}) == 0

    assert live.losses() == cached.losses()
    ours, theirs = (load_file(r.out / "pytorch_lora_weights.safetensors") for r in (live, cached))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    for path in (cached.out / "validation_images").glob("*.png"):
        assert (live.out / "validation_images" / path.name).read_bytes() == path.read_bytes()
    assert "the text encoders stay loaded" in live.notices()


def test_what_is_encoded_on_demand_is_kept_and_what_is_not_is_not(
    cached: Run, tmp_path: Path
) -> None:
    kept, never = like(cached, tmp_path / "kept"), like(cached, tmp_path / "never")
    assert kept.train(text_cache_ondemand=True) == 0
    assert never.train(text_cache_disable=True) == 0
    packs = [list((run.out / "cache" / "text").rglob("*.safetensors")) for run in (kept, never)]
    assert packs[0]
    assert not packs[1]

    before = kept.encoded()
    kept.settings["resume_from_checkpoint"] = "none"
    assert kept.train() == 0
    seen = kept.encoded() - before
    assert 0 <= seen < 9  # only captions that four steps did not meet


def test_an_entry_of_the_datasets_file_says_it_too(tiny_sdxl: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", tiny_sdxl, make_pictures(tmp_path / "pictures"))
    run.more = [{"id": "t", "dataset_type": "text_embeds", "text_cache_disable": True}]
    assert run.train(validation_disable=True, max_train_steps=1) == 0
    assert not list((run.out / "cache" / "text").rglob("*.safetensors"))
