"""Keys of cache entries: everything that shaped a tensor, so that nobody deletes a cache by hand.

A version number counts up when our code begins to encode differently; entries of the old one are
then simply not asked for any more. A million keys are made at every start, so nothing is done for
each of them that can be done once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from simpletuner.core.types import Geometry

TEXT_VERSION = 2
LATENT_VERSION = 2
MASK_VERSION = 1
KEY_BYTES = 16


def text_keys(captions: Iterable[str], *, model: str, dtype: str) -> list[bytes]:
    """16 bytes for the conditioning of each caption.

    Args:
        captions: Exactly as they are sent to the encoder.
        model: Digest of the text encoders and tokenizers.
        dtype: What they compute in.
    """
    begin, keys = _begun("text", TEXT_VERSION, model, dtype), []
    for caption in captions:
        digest = begin.copy()
        digest.update(caption.encode(errors="surrogatepass"))
        keys.append(digest.digest())
    return keys


def latent_keys(
    contents: Sequence[str] | NDArray[np.void],
    boxes: Sequence[Geometry] | NDArray[np.int32],
    *,
    dataset: str,
    model: str,
    dtype: str,
    pixels: str = "",
    tiling: bool = False,
) -> list[bytes]:
    """16 bytes for the latents of each of n pictures.

    A content is a digest already: it is combined, by exclusive or, with a digest of the rest, which
    is made once for all pictures that are treated alike.

    Args:
        contents: [n] digests of the files' bytes, in hex or as 16 bytes each.
        boxes: [n] what was done to them, or [n, 9] its numbers; where a picture was cut out of
            counts, as a flip does.
        dataset: Its id: the posterior's noise depends on it.
        model: Digest of the VAE.
        dtype: What it computes in.
        pixels: Whatever else shaped the pixels: the colour that shows through alpha.
        tiling: Whether large pictures are encoded in overlapping tiles.
    """
    begin = _begun("latents", LATENT_VERSION, model, dtype, dataset, pixels, tiling)
    if not isinstance(contents, np.ndarray):
        contents = np.frombuffer(b"".join(map(bytes.fromhex, contents)), "V16")
    if not isinstance(boxes, np.ndarray):
        boxes = np.array([each.numbers for each in boxes], np.int32).reshape(-1, 9)
    return _combined(begin, contents, boxes)


def mask_keys(
    contents: NDArray[np.void], boxes: NDArray[np.int32], *, kind: str, cells: tuple[int, int]
) -> list[bytes]:
    """16 bytes for each of n masks in latent cells.

    Args:
        contents: [n] digests of the files that hold the masks, 16 bytes each.
        boxes: [n, 9] what is done to the pictures and to their masks.
        kind: Of what in the file the mask is made.
        cells: Their height and width.
    """
    return _combined(_begun("mask", MASK_VERSION, kind, cells), contents, boxes)


def _combined(begin: Any, contents: NDArray[np.void], boxes: NDArray[np.int32]) -> list[bytes]:
    """Each content combined with the digest of its box, which is made once for all alike."""
    rows = np.ascontiguousarray(boxes.astype("<i4"))
    flat = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(rows.shape[1] * 4), len(rows), [None, pa.py_buffer(rows)]
    ).dictionary_encode()
    digests = []
    for box in flat.dictionary.to_pylist():
        digest = begin.copy()
        digest.update(box)
        digests.append(digest.digest())
    rest = np.frombuffer(b"".join(digests), "V16")[flat.indices.to_numpy()]
    ours, theirs = (np.ascontiguousarray(each).view(np.uint64) for each in (contents, rest))
    keys: list[bytes] = (ours ^ theirs).view("S16").tolist() if len(rows) else []
    return [key.ljust(KEY_BYTES, b"\0") for key in keys]  # numpy drops zeros at the end


def _begun(*parts: Any) -> Any:
    """A hash that has taken in `parts`."""
    canonical = json.dumps(parts, ensure_ascii=True, separators=(",", ":"))
    return blake2b(canonical.encode() + b"\0", digest_size=KEY_BYTES)
