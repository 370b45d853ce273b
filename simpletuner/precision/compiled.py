"""Blocks that torch compiles: a slow first step, faster ones after."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from typing import TYPE_CHECKING

from simpletuner.precision.blocks import blocks_of

if TYPE_CHECKING:
    from torch import nn

    from simpletuner.precision.settings import PrecisionSettings


def compile_blocks(model: nn.Module, settings: PrecisionSettings) -> None:
    """Compile each block of `model` at its first call; blocks of a kind share the result.

    A block by itself, as diffusers' ``compile_repeated_blocks`` does for the classes that it knows:
    a whole model takes minutes, and is compiled anew for each shape of pictures.
    """
    for _, block in blocks_of(model):
        block.compile(backend=settings.dynamo_backend, mode=settings.dynamo_mode)


def compiles_in(backend: str, device: str) -> str | None:
    """Why `backend` cannot compile on this machine; None if it can.

    Args:
        backend: A value of ``dynamo_backend``.
        device: ``cpu``, ``cuda`` or ``mps``.
    """
    if backend != "inductor":
        return None
    if device == "mps":
        return "is not here for mps; remove it"
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        return "needs a C++ compiler: sudo apt-get install g++"
    if device == "cuda" and find_spec("triton") is None:
        return "needs triton, which torch's builds for Linux bring along; reinstall torch"
    return None
