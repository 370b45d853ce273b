"""Tables: the named choices of the product, one row each, built on use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from simpletuner.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from simpletuner.core.section import Section


@dataclass(frozen=True)
class Row:
    """One named choice.

    Args:
        name: What the user writes.
        make: The builder, or ``"package.module:attribute"`` imported on use; None while the
            choice is declared but not built (`check` names it, `train` refuses it).
        summary: One sentence for the documentation.
        needs: The extra that installs what it imports, if any.
        options: The settings under ``<table>_config``, validated by this Section.
        facts: Plain facts a caller may ask for (``dtype="bf16"``), never behaviour.
    """

    name: str
    make: Callable[..., Any] | str | None
    summary: str
    needs: str | None = None
    options: type[Section] | None = None
    facts: Mapping[str, Any] | None = None

    @property
    def pending(self) -> bool:
        """True while the choice is declared but not built."""
        return self.make is None

    def fact(self, name: str, default: Any = None) -> Any:
        """The fact called `name`, or `default`."""
        return (self.facts or {}).get(name, default)

    def load(self) -> Callable[..., Any]:
        """The builder itself.

        Raises:
            ConfigError: The row is pending.
        """
        if self.make is None:
            raise ConfigError(f"{self.name} is not built yet", fix="choose another value")
        if callable(self.make):
            return self.make
        module, _, attribute = self.make.partition(":")
        target: Callable[..., Any] = getattr(import_module(module), attribute)
        return target


class Table(Mapping[str, Row]):
    """An immutable mapping of rows by name.

    Args:
        title: What the rows are, in the user's words (``"optimizer"``).
        rows: In the order the documentation lists them.
        elsewhere: Names that other trainers have and this one has not, and the row to take instead.
    """

    def __init__(
        self, title: str, rows: tuple[Row, ...], elsewhere: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.title = title
        self.elsewhere = elsewhere
        self._rows = {row.name: row for row in rows}
        if len(self._rows) != len(rows):
            raise ValueError(f"two rows of one name in the {title} table")

    def __getitem__(self, name: str) -> Row:
        try:
            return self._rows[name]
        except KeyError:
            raise ConfigError(self.unknown(name)) from None

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def unknown(self, name: str) -> str:
        """The sentence for a name that is not in the table."""
        if name in self.elsewhere:
            return f"{name} is not offered here; take {self.elsewhere[name]}"
        near = did_you_mean(name, self._rows)
        return f"unknown {self.title} {name!r}{near or '; one of ' + ', '.join(self._rows)}"


def discover(package: str, attribute: str) -> dict[str, Any]:
    """`attribute` of every module in `package`, by module name, sorted."""
    root = import_module(package)
    return {
        info.name: getattr(import_module(f"{package}.{info.name}"), attribute)
        for info in sorted(iter_modules(root.__path__), key=lambda info: info.name)
        if not info.name.startswith("_") and info.name != "base"
    }
