"""Captions are encoded once, as the stock pipeline does, by encoders that are gone afterwards."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from simpletuner.cache.store import TensorStore
from simpletuner.cache.text import TextCache
from simpletuner.core.errors import CacheError
from simpletuner.core.events import Bus, Notice, Stage
from simpletuner.core.seeds import Seeds
from simpletuner.core.types import Place
from tests.hearing import Heard
from tests.runs import fill_the_memory
from tests.unit.cache.setting import PLACE, Watched, dataset, picture, watched

CAPTIONS = ["a red cat", "", "a blue dog", "a red cat", "two birds"]


def test_what_is_read_is_what_the_stock_pipeline_gives(tiny_sdxl: Path, tmp_path: Path) -> None:
    family = watched(tiny_sdxl)
    cache = TextCache(family, TensorStore.open(tmp_path), PLACE, batch_size=3)
    cache.prepare({"set": CAPTIONS}, Bus())
    embeds = cache.embeds(["two birds", "", "two birds"])
    pipe = family.open_text(PLACE)
    with torch.no_grad():
        prompt, _, pooled, _ = pipe.encode_prompt(
            ["two birds", "", "two birds"], device="cpu", do_classifier_free_guidance=False
        )
    assert embeds.keys() == {"prompt_embeds", "pooled_prompt_embeds"}
    torch.testing.assert_close(embeds["prompt_embeds"], prompt, atol=1e-5, rtol=0)
    torch.testing.assert_close(embeds["pooled_prompt_embeds"], pooled, atol=1e-5, rtol=0)


def test_only_missing_captions_are_encoded_and_the_encoders_are_freed(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    family = watched(tiny_sdxl)
    TextCache(family, TensorStore.open(tmp_path), PLACE, batch_size=3).prepare(
        {"set": CAPTIONS}, Bus()
    )
    assert family.batches == [3, 1]
    assert [opened() for opened in family.opened] == [None]

    again = TextCache(family, TensorStore.open(tmp_path), PLACE, batch_size=3)
    again.prepare({"set": CAPTIONS}, Bus())
    assert len(family.opened) == 1, "nothing is missing, so no encoder is opened"
    again.prepare({"set": [*CAPTIONS, "a new one"]}, Bus())
    assert family.batches == [3, 1, 1]


def test_progress_counts_what_is_encoded(tiny_sdxl: Path, tmp_path: Path) -> None:
    heard = Heard()
    bus = Bus([heard])
    cache = TextCache(watched(tiny_sdxl), TensorStore.open(tmp_path), PLACE, batch_size=3)
    cache.prepare({"set": CAPTIONS}, bus)
    cache.prepare({"set": CAPTIONS}, bus)
    bus.close()
    told = [(e.state, e.done, e.total, e.note) for e in heard.events if isinstance(e, Stage)]
    assert told == [
        ("running", 0, 4, ""),
        ("running", 3, 4, ""),
        ("running", 4, 4, ""),
        ("finished", 4, 4, ""),
        ("finished", 4, 4, "all 4 in the cache"),
    ]


def test_embeddings_keep_the_encoders_dtype_and_each_dtype_has_its_own(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    family = watched(tiny_sdxl)
    TextCache(family, TensorStore.open(tmp_path), PLACE).prepare({"set": ["a cat"]}, Bus())
    half = TextCache(family, TensorStore.open(tmp_path), Place(torch.device("cpu"), torch.bfloat16))
    with pytest.raises(CacheError, match="'a cat' is not in the cache"):
        half.embeds(["a cat"])
    half.prepare({"set": ["a cat"]}, Bus())
    assert half.embeds(["a cat"])["prompt_embeds"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("together", "dtype", "said"),
    [
        (
            2,
            torch.float32,
            "2 captions\n  lower text_encoder_batch_size (a text_embeds entry may have its own) and"
            " start again",
        ),
        (1, torch.float32, "1 caption\n  set mixed_precision bf16 and start again"),
        (
            1,
            torch.bfloat16,
            "1 caption\n  end what else uses this memory, or take a device that has more, and start"
            " again",
        ),
    ],
    ids=["batch", "caption", "half"],
)
def test_a_memory_that_is_full_while_encoding_says_what_takes_less_and_keeps_the_rest(
    tiny_sdxl: Path, tmp_path: Path, together: int, dtype: torch.dtype, said: str
) -> None:
    class Full(Watched):
        def encode_text(self, pipe, captions):
            if len(self.batches) == 1:
                fill_the_memory()
            return super().encode_text(pipe, captions)

    family = watched(tiny_sdxl)
    cache = TextCache(
        Full(family.checkpoint, family.options),
        TensorStore.open(tmp_path),
        Place(torch.device("cpu"), dtype),
        batch_size=together,
    )
    with pytest.raises(CacheError) as caught:
        cache.prepare({"set": CAPTIONS}, Bus())
    assert str(caught.value) == f"the memory is full while encoding {said}"
    assert len(TensorStore.open(tmp_path)) == together


def test_the_trainers_own_layouts_are_all_it_takes(tiny_sdxl: Path, tmp_path: Path) -> None:
    family = watched(tiny_sdxl)

    class Ragged(type(family)):
        layouts = {"prompt_embeds": "ragged"}  # noqa: RUF012

    with pytest.raises(NotImplementedError, match="'prompt_embeds': 'ragged'"):
        TextCache(Ragged(family.checkpoint), TensorStore.open(tmp_path), PLACE)


def test_edited_captions_are_cached_and_a_change_encodes_only_what_it_changes(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    for number, name in enumerate(("a_red,_big_cat", "dog", "ox")):
        picture(tmp_path / "set" / f"{name}.png", number)
    family = watched(tiny_sdxl)
    cache = TextCache(family, TensorStore.open(tmp_path / "text"), PLACE, batch_size=9)

    def encoded(**settings: Any) -> int:
        source, before = dataset(tmp_path, **settings), sum(family.batches)
        cache.prepare({"set": source.all_captions()}, Bus())
        for epoch in range(20):
            samples = [source.sample(row, epoch, 0, Seeds(1)) for row in range(len(source))]
            cache.embeds([sample.caption for sample in samples])
        return sum(family.batches) - before

    assert encoded() == 4, "three names and the empty caption"
    assert encoded(caption_filter_list=("dog",)) == 0, "nothing is left of it: the empty caption"
    assert encoded(caption_filter_list=("s/dog/hound/",)) == 1
    assert encoded(caption_shuffle={"enable": True, "count": 20}) == 1, "of two tags, one order"
    assert encoded(caption_prefix="photo of") == 3


def test_captions_the_encoders_see_in_part_are_told_once_for_their_dataset(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    heard = Heard()
    bus = Bus([heard])
    cache = TextCache(watched(tiny_sdxl), TensorStore.open(tmp_path), PLACE, batch_size=9)
    captions = {"dataset cats": ["a " * 90, "cat"], "dataset dogs": ["dog"]}
    cache.prepare(captions, bus)
    cache.prepare(captions, bus)
    bus.close()
    (told,) = [event for event in heard.events if isinstance(event, Notice)]
    assert told.level == "warning"
    assert told.text.startswith(
        "dataset cats: 1 of 2 captions are longer than the 77 tokens text_encoder and"
        " text_encoder_2 see; what comes after is not learned; the longest has 92: a a a"
    )


@pytest.mark.parametrize("keeps", [True, False])
def test_live_captions_are_those_of_the_cache_for_threads_that_ask_at_once(
    tiny_sdxl: Path, tmp_path: Path, keeps: bool
) -> None:
    captions = [f"caption {number}" for number in range(6)]
    kept = TextCache(watched(tiny_sdxl), TensorStore.open(tmp_path / "a"), PLACE, batch_size=1)
    kept.prepare({"set": captions}, Bus())
    family = watched(tiny_sdxl)
    live = TextCache(
        family, TensorStore.open(tmp_path / "b"), PLACE, batch_size=1, keeps=keeps, waits=True
    )
    live.prepare({"set": captions}, Bus())
    assert len(family.opened) == 1

    def asked(number: int) -> bool:
        chosen = [captions[(number + i) % 6] for i in range(2)]
        ours, theirs = live.embeds(chosen), kept.embeds(chosen)
        return all(torch.equal(ours[name], theirs[name]) for name in theirs)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(asked, range(12)))
    assert len(family.opened) == 1
    live.close()
    assert family.opened[0]() is None
    again = TextCache(family, TensorStore.open(tmp_path / "b"), PLACE, keeps=keeps, waits=True)
    again.prepare({"set": captions}, Bus())
    assert len(family.opened) == (1 if keeps else 2)  # all is kept: no encoder is needed
    again.close()


def test_a_caption_that_a_batch_has_several_times_is_encoded_and_kept_once(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    family = watched(tiny_sdxl)
    cache = TextCache(family, TensorStore.open(tmp_path), PLACE, waits=True)
    cache.prepare({"set": ["a cat"]}, Bus())

    embeds = cache.embeds(["a cat", "", "a cat", "a cat"])
    cache.close()

    assert family.batches == [1, 1]
    assert torch.equal(embeds["prompt_embeds"][0], embeds["prompt_embeds"][3])
    (pack,) = tmp_path.glob("*.safetensors")
    with safe_open(pack, "pt") as handle:  # which refuses a name that stands twice
        names = [name for name in handle.keys() if not name.startswith("~")]
    assert len({name.split(".")[0] for name in names}) == 2
