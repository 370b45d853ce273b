"""Optional packages, imported on use, with the line that installs them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from simpletuner.core.errors import ExtraMissing


def require(module: str, *, extra: str, why: str) -> ModuleType:
    """Import `module`.

    Args:
        extra: The extra of this package that installs it.
        why: What the user asked for that needs it: ``"optimizer optimi-lion"``.

    Raises:
        ExtraMissing: It is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise ExtraMissing(
            f"{why} needs the package {module!r}, which is not installed",
            fix=f"pip install 'simpletuner[{extra}]'",
        ) from None
