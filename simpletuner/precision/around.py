"""A context around each call of a module."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def around(module: nn.Module, make: Callable[[], AbstractContextManager[Any]]) -> None:
    """Open what `make` gives before each call of `module`, and close it after, also if it fails."""
    opened: list[AbstractContextManager[Any]] = []

    def begin(*_: Any) -> None:
        context = make()
        context.__enter__()
        opened.append(context)

    def end(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end, always_call=True)
