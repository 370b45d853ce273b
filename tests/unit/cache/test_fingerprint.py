"""A key changes with everything that shapes a tensor, and with nothing else."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from simpletuner.cache.fingerprint import latent_keys, text_keys
from simpletuner.core.types import Geometry

GEOMETRY = Geometry((100, 80), (80, 64), (8, 0, 64, 64))
REST = {"dataset": "a", "model": "m", "dtype": "torch.float32"}
CONTENT, OTHER = "c0" * 16, "c1" * 16


def text_key(caption: str, **rest: str) -> bytes:
    (key,) = text_keys([caption], **rest)
    return key


def latent_key(content: str, geometry: Geometry, **rest: object) -> bytes:
    (key,) = latent_keys([content], [geometry], **rest)  # type: ignore[arg-type]
    return key


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
        latent_key(CONTENT, GEOMETRY, **REST),
        latent_key(OTHER, GEOMETRY, **REST),
        *(latent_key(CONTENT, GEOMETRY, **{**REST, name: "other"}) for name in REST),
        latent_key(CONTENT, GEOMETRY, **REST, pixels="#000000"),
        latent_key(CONTENT, GEOMETRY, **REST, tiling=True),
        *(
            latent_key(CONTENT, replace(GEOMETRY, **change), **REST)
            for change in (
                {"source": (100, 81)},
                {"resize": (80, 65)},
                {"crop": (9, 0, 64, 64)},
                {"flip": True},
            )
        ),
    ]
    assert len(set(variants)) == len(variants)


def test_keys_of_many_are_those_of_each():
    contents = [f"{i:032x}" for i in range(300)]
    boxes = [replace(GEOMETRY, crop=(i % 7, i % 3, 64, 64)) for i in range(300)]
    together = latent_keys(contents, boxes, **REST)
    assert together == [latent_key(c, b, **REST) for c, b in zip(contents, boxes, strict=True)]
    assert len(set(together)) == 300
    assert {len(key) for key in together} == {16}

    packed = np.frombuffer(b"".join(map(bytes.fromhex, contents)), "V16")
    numbers = np.array([box.numbers for box in boxes], np.int32)
    assert latent_keys(packed, numbers, **REST) == together
    assert latent_keys([], [], **REST) == []

    captions = [f"caption {i}" for i in range(50)]
    made = text_keys(captions, model="m", dtype="d")
    assert made == [text_key(caption, model="m", dtype="d") for caption in captions]


def test_a_key_keeps_its_zeros():
    """One of 256 digests ends in a zero byte."""
    keys = latent_keys([f"{i:032x}" for i in range(2000)], [GEOMETRY] * 2000, **REST)
    assert {len(key) for key in keys} == {16}
    assert any(key.endswith(b"\0") for key in keys)


def test_keys_are_the_same_on_every_machine_and_in_every_release():
    assert text_key("a cat", model="m", dtype="d").hex() == "65b9c965cf8e31d778edefa445b731a8"
    assert latent_key(CONTENT, GEOMETRY, **REST).hex() == "800da64506a8efd6e8c108bdfa489dd3"
