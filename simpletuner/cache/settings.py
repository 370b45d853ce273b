"""Where encoded captions and pictures are kept, and how they are made."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from simpletuner.core.section import Section, setting


class CacheSettings(Section):
    """The caches on disk."""

    cache_dir: Path | None = setting(None, path=True)
    """The folder of all caches; without it, cache/ in output_dir. Runs may share one."""

    cache_dir_text: Path | None = setting(None, path=True)
    """The folder of encoded captions; without it, text/FAMILY in cache_dir."""

    cache_dir_vae: Path | None = setting(None, path=True)
    """The folder of encoded pictures, with one folder for each dataset inside; without it,
    vae/FAMILY in cache_dir."""

    vae_cache_ondemand: bool = setting(False)
    """Encode each picture when training first meets it, then keep it, instead of all of them
    before the first step."""

    vae_cache_disable: bool = setting(False)
    """Encode each picture at every visit and keep nothing; saves disk, makes every step slower,
    and draws random crops anew in each epoch."""

    vae_batch_size: int = setting(4, ge=1, unit="pictures")
    """Pictures encoded at once; larger is faster up to a point and takes more memory."""

    vae_dtype: Literal["default", "fp32", "bf16", "fp16"] = setting("default")
    """What the VAE computes in; default is the run's own dtype, and fp32 beside fp16, whose range
    is too small for it."""

    vae_enable_slicing: bool = setting(False)
    """Let the VAE handle one picture of a batch after the other: less memory, slower."""

    vae_enable_tiling: bool = setting(False)
    """Let the VAE handle large pictures in overlapping tiles: less memory, slower, and a little
    different from the whole picture."""

    text_encoder_batch_size: int = setting(1, ge=1, unit="captions")
    """Captions encoded at once; larger is faster up to a point and takes more memory, and what one
    caption becomes then depends on its neighbours in the last digits."""

    write_batch_size: int = setting(128, ge=1, unit="entries")
    """Entries handed to the disk at once; larger is faster, and loses more work when killed."""

    text_cache_ondemand: bool = setting(False)
    """Encode each caption when training first meets it, then keep it; the text encoders stay
    loaded."""

    text_cache_disable: bool = setting(False)
    """Encode each caption at every visit and keep nothing; the text encoders stay loaded, and every
    step is slower."""

    compress_disk_cache: bool = setting(False, pending=True)
    """Compress cached tensors; they hardly shrink, and every read gets slower."""

    keep_vae_loaded: bool = setting(False, pending=True)
    """Leave the VAE in memory after the pictures are encoded."""

    offload_during_startup: bool = setting(False, pending=True)
    """Move the text encoders off the device while pictures are encoded."""

    def root(self, output_dir: Path) -> Path:
        """The folder of all caches."""
        return self.cache_dir or output_dir / "cache"

    def vae_root(self, output_dir: Path, model_family: str) -> Path:
        """The folder that holds one folder of encoded pictures for each dataset."""
        return self.cache_dir_vae or self.root(output_dir) / "vae" / model_family

    def text_root(self, output_dir: Path, model_family: str) -> Path:
        """The folder of encoded captions."""
        return self.cache_dir_text or self.root(output_dir) / "text" / model_family
