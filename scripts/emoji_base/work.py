"""The work folder of a build: tensors as safetensors, facts as JSON, each written whole or not."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Work:
    """What every stage knows.

    Args:
        concepts: Pictures that the base learns to draw.
        held_out: Pictures that the VAE never trains on.
        limit: Pictures in all; None for every emoji.
    """

    folder: Path
    seed: int = 11
    workers: int = 2
    concepts: int = 64
    held_out: int = 128
    limit: int | None = None

    def has(self, name: str) -> bool:
        """Whether a stage has written `name`."""
        return (self.folder / name).exists()

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a file."""
        return load_file(self.folder / name)

    def metadata(self, name: str) -> dict[str, Any]:
        """What `save_tensors` was given beside the tensors of a file."""
        with safe_open(self.folder / name, framework="pt") as file:
            return dict(json.loads((file.metadata() or {}).get("facts", "{}")))

    def save_tensors(self, name: str, tensors: Mapping[str, torch.Tensor], **facts: object) -> None:
        """Write a file of tensors and the facts that belong to them."""
        part = self.folder / f"{name}.part"
        whole = {key: value.detach().contiguous() for key, value in tensors.items()}
        save_file(whole, part, metadata={"facts": json.dumps(facts)})
        os.replace(part, self.folder / name)

    def facts(self, name: str) -> Any:
        """The content of a JSON file; an empty dict before it is written."""
        if not self.has(name):
            return {}
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def save_facts(self, name: str, facts: object) -> None:
        """Write a JSON file."""
        part = self.folder / f"{name}.part"
        part.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, self.folder / name)

    def spend(self, stage: str, seconds: float) -> None:
        """Add CPU-seconds to a stage's account."""
        ledger = self.facts("cpu_seconds.json")
        ledger[stage] = ledger.get(stage, 0.0) + seconds
        self.save_facts("cpu_seconds.json", ledger)

    def spent(self) -> float:
        """CPU-seconds of all stages, those that were stopped included."""
        ledger = self.facts("cpu_seconds.json")
        return float(sum(ledger.values()))
