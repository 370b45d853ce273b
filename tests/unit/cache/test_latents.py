"""Latents belong to their picture, whatever else is encoded, damaged, renamed or edited."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from simpletuner.cache.latents import open_stores
from simpletuner.core.errors import CacheError, DataError, ModelError
from simpletuner.core.events import Bus, Notice, Stage
from simpletuner.core.seeds import Seeds, key64
from tests.hearing import Heard
from tests.runs import fill_the_memory
from tests.unit.cache.setting import (
    Watched,
    dataset,
    latent_cache,
    picture,
    read,
    watched,
)


def ten(root: Path, name: str = "set") -> None:
    """Ten pictures in two shapes."""
    for i in range(10):
        picture(root / name / f"{i:02}.png", i, (96, 80) if i % 3 == 0 else (80, 80))


def cut_short(path: Path) -> None:
    """Leave the head of a picture, so that only decoding finds out."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


@pytest.fixture
def family(tiny_sdxl: Path) -> Watched:
    return watched(tiny_sdxl)


def test_a_latent_is_the_posteriors_sample_of_exactly_these_pixels(
    family: Watched, tmp_path: Path
) -> None:
    ten(tmp_path)
    source = dataset(tmp_path)
    cache = latent_cache(family, source)
    assert cache.prepare([source], Bus()) == (source,)
    vae = family.open_vae(torch.device("cpu"), torch.float32)
    for row in (0, 4):
        pixels = torch.from_numpy(source.pixels(row)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
        seed = key64("posterior", bytes(source.content[row]).hex(), "set") >> 1
        noise = torch.randn(posterior.mean[0].shape, generator=torch.Generator().manual_seed(seed))
        expected = (posterior.mean[0] + posterior.std[0] * noise) * vae.config.scaling_factor
        latent = read(cache, source, row)
        assert latent.dtype == torch.float32
        torch.testing.assert_close(latent, expected, atol=1e-5, rtol=0)


def test_a_latent_depends_neither_on_its_batch_nor_on_the_order(
    family: Watched, tmp_path: Path
) -> None:
    ten(tmp_path)
    alone = dataset(tmp_path, vae_batch_size=1, cache_dir_vae=tmp_path / "one")
    together = dataset(tmp_path, vae_batch_size=4, cache_dir_vae=tmp_path / "four")
    first, second = latent_cache(family, alone), latent_cache(family, together, seed=5)
    first.prepare([alone], Bus())
    second.prepare([together], Bus())
    assert family.batches == [1] * 10 + [4, 4, 2]
    assert family.seeds[:10] == family.seeds[10:]
    assert len(set(family.seeds)) == 10
    for row in range(10):
        torch.testing.assert_close(
            read(first, alone, row), read(second, together, row), atol=1e-5, rtol=0
        )


def test_the_noise_of_a_latent_follows_from_content_and_dataset(
    family: Watched, tmp_path: Path
) -> None:
    ten(tmp_path, "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = dataset(tmp_path, "a"), dataset(tmp_path, "b")
    cache = latent_cache(family, first, second)
    cache.prepare([first, second], Bus())
    assert not torch.equal(read(cache, first, 0), read(cache, second, 0))
    assert sum(family.batches) == 20


def test_a_second_start_opens_no_vae_and_the_first_lets_it_go(
    family: Watched, tmp_path: Path
) -> None:
    ten(tmp_path)
    heard = Heard()
    bus = Bus([heard])
    for _ in range(2):
        source = dataset(tmp_path)
        latent_cache(family, source).prepare([source], bus)
    bus.close()
    assert [opened() for opened in family.opened] == [None]
    told = [(e.state, e.done, e.total, e.note) for e in heard.events if isinstance(e, Stage)]
    assert told[0] == ("running", 0, 10, "")
    assert told[-2:] == [("finished", 10, 10, ""), ("finished", 10, 10, "all 10 in the cache")]


def test_an_edited_picture_is_encoded_alone_and_a_renamed_one_not_at_all(
    family: Watched, tmp_path: Path
) -> None:
    ten(tmp_path)
    source = dataset(tmp_path)
    latent_cache(family, source).prepare([source], Bus())
    family.batches.clear()
    (tmp_path / "set" / "03.png").rename(tmp_path / "set" / "renamed.png")
    picture(tmp_path / "set" / "05.png", 99)
    source = dataset(tmp_path)
    cache = latent_cache(family, source)
    cache.prepare([source], Bus())
    assert family.batches == [1]
    assert all(read(cache, source, row).isfinite().all() for row in range(10))


def test_copies_of_one_picture_are_encoded_once(family: Watched, tmp_path: Path) -> None:
    for i in range(6):
        picture(tmp_path / "set" / f"{i}.png", number=i % 2)
    source = dataset(tmp_path, crop=True, crop_style="center")
    cache = latent_cache(family, source)
    cache.prepare([source], Bus())
    assert sum(family.batches) == 2
    assert torch.equal(read(cache, source, 0), read(cache, source, 4))


@pytest.mark.parametrize("change", [{"vae_enable_tiling": True}, {"vae_enable_slicing": True}])
def test_slicing_keeps_the_cache_and_tiling_does_not(
    family: Watched, tmp_path: Path, change: dict[str, bool]
) -> None:
    ten(tmp_path)
    source = dataset(tmp_path)
    latent_cache(family, source).prepare([source], Bus())
    family.batches.clear()
    latent_cache(family, source, **change).prepare([source], Bus())
    assert sum(family.batches) == (10 if "vae_enable_tiling" in change else 0)


def test_the_vae_is_told_to_tile_and_to_slice(family: Watched, tmp_path: Path) -> None:
    ten(tmp_path)
    source = dataset(tmp_path, vae_cache_disable=True)
    cache = latent_cache(family, source, vae_enable_tiling=True, vae_enable_slicing=True)
    read(cache, source, 0)
    vae = family.opened[0]()
    assert vae.use_tiling
    assert vae.use_slicing


@pytest.mark.parametrize("bad", [1, 4])
def test_an_undecodable_picture_is_named_and_shifts_no_other(
    family: Watched, tmp_path: Path, bad: int
) -> None:
    ten(tmp_path)
    whole = dataset(tmp_path, cache_dir_vae=tmp_path / "whole")
    right = latent_cache(family, whole)
    right.prepare([whole], Bus())
    expected = {whole.path(row): read(right, whole, row) for row in range(10)}
    cut_short(tmp_path / "set" / f"{bad:02}.png")

    heard = Heard()
    bus = Bus([heard])
    source = dataset(tmp_path, max_workers=4)
    cache = latent_cache(family, source)
    (left,) = cache.prepare([source], bus)
    bus.close()
    assert len(left) == 9
    for row in range(9):
        torch.testing.assert_close(
            read(cache, left, row), expected[left.path(row)], atol=1e-5, rtol=0
        )
    (text,) = [e.text for e in heard.events if isinstance(e, Notice)]
    start = f"dataset set: left out, repair or remove them\n  {bad:02}.png: cannot be decoded"
    assert text.startswith(start)


def test_copies_of_an_undecodable_picture_are_left_out_with_it(
    family: Watched, tmp_path: Path
) -> None:
    ten(tmp_path)
    cut_short(tmp_path / "set" / "04.png")
    shutil.copy(tmp_path / "set" / "04.png", tmp_path / "set" / "copy.png")
    source = dataset(tmp_path)
    cache = latent_cache(family, source)
    (left,) = cache.prepare([source], Bus())
    assert [left.path(row) for row in range(9)] == [f"{i:02}.png" for i in range(10) if i != 4]
    assert all(read(cache, left, row).isfinite().all() for row in range(9))


def test_too_many_undecodable_pictures_are_an_error_unless_it_is_allowed(
    family: Watched, tmp_path: Path
) -> None:
    ten(tmp_path)
    for i in (1, 4, 7):
        cut_short(tmp_path / "set" / f"{i:02}.png")
    source = dataset(tmp_path)
    with pytest.raises(DataError) as caught:
        latent_cache(family, source).prepare([source], Bus())
    assert "3 of 10 pictures cannot be used" in str(caught.value)
    assert all(f"{i:02}.png" in str(caught.value) for i in (1, 4, 7))
    assert sum(family.batches) == 7, "the others are encoded all the same"

    family.batches.clear()
    source = dataset(tmp_path, allow_excluded=True)
    (left,) = latent_cache(family, source).prepare([source], Bus())
    assert len(left) == 7
    assert family.batches == []


def test_a_picture_that_changed_after_the_scan_stops_the_run_and_keeps_the_rest(
    family: Watched, tmp_path: Path
) -> None:
    ten(tmp_path)
    source = dataset(tmp_path, vae_batch_size=1)
    picture(tmp_path / "set" / "08.png", 55)
    with pytest.raises(DataError, match=r"08\.png was changed after it was indexed"):
        latent_cache(family, source).prepare([source], Bus())
    assert len(open_stores([source])["set"]) == sum(family.batches) > 0


def test_on_demand_encodes_at_first_use_and_gives_what_was_encoded_before_training(
    family: Watched, tmp_path: Path
) -> None:
    ten(tmp_path)
    before = dataset(tmp_path, cache_dir_vae=tmp_path / "before")
    ready = latent_cache(family, before)
    ready.prepare([before], Bus())
    family.batches.clear()
    source = dataset(tmp_path, vae_cache_ondemand=True)
    cache = latent_cache(family, source)
    cache.prepare([source], Bus())
    assert family.batches == []
    square = [row for row in range(10) if row % 3]
    for rows in (square[:2], square[1:4], square[:2]):
        samples = [source.sample(row, 0, 0, Seeds(0)) for row in rows]
        torch.testing.assert_close(
            cache.latents(source, samples, 0), ready.latents(before, samples, 0), atol=1e-5, rtol=0
        )
    assert family.batches == [2, 2]
    cache.close()
    assert family.opened[-1]() is None
    again = latent_cache(family, source)
    assert read(again, source, square[0]).shape == (4, 8, 8)
    assert family.batches == [2, 2]


def test_without_a_cache_nothing_is_written_and_the_noise_is_fresh_in_each_epoch(
    family: Watched, tmp_path: Path
) -> None:
    ten(tmp_path)
    source = dataset(tmp_path, vae_cache_disable=True)
    cache = latent_cache(family, source)
    cache.prepare([source], Bus())
    zero, again, one = (read(cache, source, 1, epoch) for epoch in (0, 0, 1))
    assert torch.equal(zero, again)
    assert not torch.equal(zero, one)
    other = cache.latents(source, [source.sample(1, 0, 1, Seeds(0))], 0)[0]
    assert not torch.equal(zero, other)
    cache.close()
    assert not (tmp_path / "vae").exists()


@pytest.mark.parametrize("mode", ["vae_cache_ondemand", "vae_cache_disable"])
def test_an_undecodable_picture_met_while_training_is_named_and_left_out_from_then_on(
    family: Watched, tmp_path: Path, mode: str
) -> None:
    ten(tmp_path)
    cut_short(tmp_path / "set" / "04.png")
    source = dataset(tmp_path, **{mode: True})
    with pytest.raises(DataError, match=r"(?s)04\.png cannot be decoded.*data verify"):
        read(latent_cache(family, source), source, 4)
    again = dataset(tmp_path, **{mode: True})
    assert "04.png" not in [again.path(row) for row in range(len(again))]
    assert len(again) == 9


def test_latents_that_were_never_encoded_are_an_error_that_names_the_picture(
    family: Watched, tmp_path: Path
) -> None:
    ten(tmp_path)
    source = dataset(tmp_path)
    with pytest.raises(CacheError, match=r"the latents of 04\.png are not in the cache"):
        read(latent_cache(family, source), source, 4)


def test_values_that_are_not_finite_are_never_kept(family: Watched, tmp_path: Path) -> None:
    class Overflowing(Watched):
        def encode_pixels(self, vae, batch, generators):
            return super().encode_pixels(vae, batch, generators) / 0

    ten(tmp_path)
    source = dataset(tmp_path)
    cache = latent_cache(Overflowing(family.checkpoint, family.options), source)
    with pytest.raises(ModelError, match=r"(?s)latents: .*not finite.*set vae_dtype to bf16"):
        cache.prepare([source], Bus())
    assert len(open_stores([source])["set"]) == 0


@pytest.mark.parametrize(
    ("together", "settings", "said"),
    [
        (
            4,
            {},
            "4 pictures of 64x64\n  lower vae_batch_size (a dataset may have its own) and start"
            " again",
        ),
        (
            1,
            {},
            "1 picture of 80x64\n  set vae_enable_tiling true or lower the resolution and start"
            " again with --on_data_change continue",
        ),
        (
            1,
            {"vae_enable_tiling": True},
            "1 picture of 80x64\n  lower the resolution and start again with --on_data_change"
            " continue",
        ),
    ],
    ids=["batch", "picture", "tiles"],
)
def test_a_memory_that_is_full_while_encoding_says_what_takes_less_and_keeps_the_rest(
    family: Watched, tmp_path: Path, together: int, settings: dict[str, bool], said: str
) -> None:
    class Full(Watched):
        def encode_pixels(self, vae, batch, generators):
            if len(self.batches) == 1:
                fill_the_memory()
            return super().encode_pixels(vae, batch, generators)

    ten(tmp_path)
    source = dataset(tmp_path, vae_batch_size=together)
    cache = latent_cache(Full(family.checkpoint, family.options), source, **settings)
    with pytest.raises(CacheError) as caught:
        cache.prepare([source], Bus())
    assert str(caught.value) == f"the memory is full while encoding {said}"
    assert len(open_stores([source])["set"]) == together


def test_the_dataset_folder_may_be_read_only(family: Watched, tmp_path: Path) -> None:
    ten(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    source = dataset(tmp_path)
    latent_cache(family, source).prepare([source], Bus())
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "set").iterdir()} == before


def test_pictures_are_decoded_a_bounded_number_ahead(family: Watched, tmp_path: Path) -> None:
    for i in range(40):
        picture(tmp_path / "set" / f"{i}.png", i)
    source = dataset(tmp_path, max_workers=2, vae_batch_size=2)
    decoded: list[int] = []
    ahead: list[int] = []
    pixels = source.pixels

    def counted(drawn: int) -> np.ndarray:
        decoded.append(drawn)
        return pixels(drawn)

    source.pixels = counted
    encode = family.encode_pixels

    class Slow(Watched):
        def encode_pixels(self, vae, batch, generators):
            ahead.append(len(decoded) - 2 * len(ahead))
            return encode(vae, batch, generators)

    slow = Slow(family.checkpoint, family.options)
    latent_cache(slow, source).prepare([source], Bus())
    assert len(decoded) == 40
    assert max(ahead) <= 2 + 2 * 2 + 2 + 1
