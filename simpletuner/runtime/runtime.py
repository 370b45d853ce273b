"""The machine a run stands on; the only file that imports accelerate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from simpletuner.core.errors import ConfigError
from simpletuner.core.types import Place
from simpletuner.runtime.allocator import keep_freed_memory

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Runtime:
    """One process of a run and where it stands."""

    place: Place

    @classmethod
    def start(cls, dtype: torch.dtype, *, tf32: bool) -> Runtime:
        """Pick the device and quieten the libraries.

        Args:
            dtype: What the model runs in.
            tf32: Whether a CUDA device may round the factors of fp32 products; see `use_tf32`.

        Raises:
            ConfigError: A launcher started several processes.
        """
        import os

        from accelerate import PartialState

        started = int(os.environ.get("WORLD_SIZE") or 1)
        if started > 1:
            raise ConfigError(
                f"a launcher started {started} processes, but training by several is not built",
                fix="start one process: bash train.sh, or simpletuner train",
            )
        quieten_libraries()
        state = PartialState()
        if state.device.type == "cpu":
            keep_freed_memory()
        if state.device.type == "cuda":
            use_tf32(tf32)
        return cls(Place(state.device, dtype, state.process_index, state.num_processes))


def use_tf32(allowed: bool) -> None:
    """Let CUDA round the factors of fp32 products and convolutions to 10 bits, or not.

    The sums stay fp32, and tensor cores do them several times faster. torch holds the switch for
    the whole process; beside it the libraries read `torch.get_float32_matmul_precision`, which only
    the older of its two interfaces keeps in step.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def quieten_libraries() -> None:
    """Progress and notices are the console's business: the libraries' own bars would tear it."""
    import os
    import warnings

    import diffusers
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"peft\.tuners")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(diffusers|transformers)\.")
