"""A key changes with everything that shapes a tensor, and with nothing else."""

from __future__ import annotations

import itertools
from dataclasses import replace

from simpletuner.cache.fingerprint import latent_key, text_key
from simpletuner.core.types import Geometry

GEOMETRY = Geometry((100, 80), (80, 64), (8, 0, 64, 64))
REST = {"dataset": "a", "model": "m", "dtype": "torch.float32"}


def test_a_text_key_follows_caption_model_and_dtype():
    keys = [
        text_key(caption, model=model, dtype=dtype)
        for caption, model, dtype in itertools.product(
            ["", "a cat", "a cat ", "a Cat", "\u00e9", "e\u0301", '","'],
            ["m", "n"],
            ["torch.float32", "torch.bfloat16"],
        )
    ]
    assert len(set(keys)) == len(keys)
    assert {len(key) for key in keys} == {16}


def test_a_latent_key_follows_everything_that_shaped_the_latent():
    variants = [
        latent_key("c0", GEOMETRY, **REST),
        latent_key("c1", GEOMETRY, **REST),
        *(latent_key("c0", GEOMETRY, **{**REST, name: "other"}) for name in REST),
        latent_key("c0", GEOMETRY, **REST, pixels="#000000"),
        latent_key("c0", GEOMETRY, **REST, tiling=True),
        *(
            latent_key("c0", replace(GEOMETRY, **change), **REST)
            for change in (
                {"source": (100, 81)},
                {"resize": (80, 65)},
                {"crop": (9, 0, 64, 64)},
                {"flip": True},
            )
        ),
    ]
    assert len(set(variants)) == len(variants)


def test_keys_are_the_same_on_every_machine_and_in_every_release():
    assert text_key("a cat", model="m", dtype="d").hex() == "93eb125a1743945180ff44b5bb1e4ed1"
    assert latent_key("c0", GEOMETRY, **REST).hex() == "7f5171719a0d075c949ae4c64500ebc0"
