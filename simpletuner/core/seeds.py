"""Randomness as a pure function of (seed, purpose, …): nothing to save, nothing that can shift."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Part = str | int | bytes


def key64(*parts: Part) -> int:
    """64 bits that depend on every part and on their order, the same on every machine."""
    digest = blake2b(digest_size=8)
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return int.from_bytes(digest.digest(), "little")


class Seeds:
    """Every random draw of a run, keyed by the run's seed and what the draw is for."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def key(self, purpose: str, *parts: Part) -> int:
        """64 bits for (purpose, parts)."""
        return key64(self.seed, purpose, *parts)

    def uniform(self, purpose: str, *parts: Part) -> float:
        """One number in [0, 1) for (purpose, parts)."""
        return (self.key(purpose, *parts) >> 11) * 2.0**-53

    def generator(self, purpose: str, *parts: Part) -> torch.Generator:
        """A CPU generator for (purpose, parts); draws are made on the CPU and copied."""
        import torch

        return torch.Generator("cpu").manual_seed(self.key(purpose, *parts) >> 1)

    def reseed_torch(self, purpose: str, *parts: Part) -> None:
        """Reseed torch's global generators; the only place that does so.

        For libraries that draw from nothing else: dropout in adapters, their initialisation.
        """
        import torch

        torch.manual_seed(self.key(purpose, *parts) >> 1)
