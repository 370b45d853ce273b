"""What computes on this machine, told without torch: for settings that only some devices honour."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

_NVIDIA = (Path("/dev/nvidia0"), Path("/dev/dxg"))  # Linux, and Windows' own Linux
_AMD = Path("/dev/kfd")


def device_kind(environ: Mapping[str, str]) -> str:
    """``cuda``, ``mps`` or ``cpu``: what training is going to run on, as torch names it.

    Args:
        environ: The environment variables; accelerate's and CUDA's own can hide a device.
    """
    if environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on"):
        return "cpu"
    if platform.system() == "Darwin":
        return "mps" if platform.machine() == "arm64" else "cpu"
    hidden = environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if any(path.exists() for path in _NVIDIA):
        return "cpu" if hidden else "cuda"
    hidden = environ.get("HIP_VISIBLE_DEVICES", environ.get("CUDA_VISIBLE_DEVICES")) in ("", "-1")
    return "cuda" if _AMD.exists() and not hidden else "cpu"
