"""Keys of cache entries: everything that shaped a tensor, so that nobody deletes a cache by hand.

A version number counts up when our code begins to encode differently; entries of the old one are
then simply not asked for any more.
"""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import Any

from simpletuner.core.types import Geometry

TEXT_VERSION = 1
LATENT_VERSION = 1


def text_key(caption: str, *, model: str, dtype: str) -> bytes:
    """16 bytes for the conditioning of one caption.

    Args:
        caption: Exactly as it is sent to the encoder.
        model: Digest of the text encoders and tokenizers.
        dtype: What they compute in.
    """
    return _key("text", TEXT_VERSION, model, dtype, caption)


def latent_key(
    content: str,
    geometry: Geometry,
    *,
    dataset: str,
    model: str,
    dtype: str,
    pixels: str = "",
    tiling: bool = False,
) -> bytes:
    """16 bytes for the latents of one picture.

    Args:
        content: Digest of the file's bytes.
        geometry: What was done to the picture; where it was cut out of counts, as a flip does.
        dataset: Its id: the posterior's noise depends on it.
        model: Digest of the VAE.
        dtype: What it computes in.
        pixels: Whatever else shaped the pixels: the colour that shows through alpha.
        tiling: Whether large pictures are encoded in overlapping tiles.
    """
    box = (geometry.source, geometry.resize, geometry.crop, geometry.flip)
    return _key("latents", LATENT_VERSION, model, dtype, dataset, content, box, pixels, tiling)


def _key(*parts: Any) -> bytes:
    canonical = json.dumps(parts, ensure_ascii=True, separators=(",", ":"))
    return blake2b(canonical.encode(), digest_size=16).digest()
