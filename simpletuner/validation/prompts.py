"""What validation renders: named prompts, the negative prompt, every text to be cached."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.core.errors import ConfigError
from simpletuner.core.files import safe_name

if TYPE_CHECKING:
    from simpletuner.validation.settings import ValidationSettings


@dataclass(frozen=True)
class Prompt:
    """A prompt and the name its pictures carry.

    Args:
        reference: A picture of what it should look like, shown beside it at the end.
        control: What a ControlNet sees; without it, one of the training data's.
    """

    name: str
    text: str
    reference: Path | None = None
    control: Path | None = None


@dataclass(frozen=True)
class Prompts:
    """All prompts of a run, in the order they are rendered."""

    entries: tuple[Prompt, ...]
    negative: str

    @classmethod
    def of(cls, settings: ValidationSettings) -> Prompts:
        """The unconditional one (unless disabled), the user's library, then validation_prompt.

        Raises:
            ConfigError: The library cannot be read, or two prompts would share their files.
        """
        if settings.validation_disable:
            return cls((), settings.validation_negative_prompt)
        entries = []
        if not settings.validation_disable_unconditional:
            entries.append(Prompt("unconditional", ""))
        if settings.user_prompt_library:
            entries += read_library(Path(settings.user_prompt_library))
        if settings.validation_prompt:
            entries.append(Prompt("validation", settings.validation_prompt))
        _check_names(entries)
        return cls(tuple(entries), settings.validation_negative_prompt)

    def captions(self) -> list[str]:
        """Every text to encode, once each."""
        if not self.entries:
            return []
        return sorted({self.negative, *(entry.text for entry in self.entries)})


def _check_names(entries: list[Prompt]) -> None:
    seen: set[str] = set()
    for entry in entries:
        file = safe_name(entry.name).lower()  # some file systems know no case
        if file in seen:
            raise ConfigError(
                f"user_prompt_library: two prompts are called {entry.name!r}, so their pictures"
                " would overwrite each other",
                fix="rename it; unconditional and validation are taken by the run's own prompts",
            )
        seen.add(file)


def read_library(path: Path) -> list[Prompt]:
    """The prompts of a library: ``{"name": "text"}`` or ``{"name": {"prompt": "text"}}``.

    An object may name pictures beside the library as its `reference` and its `control`.

    Raises:
        ConfigError: Not there, not JSON, an entry without a text, or a reference or control that is
            no picture; names it.
    """
    try:
        library: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"user_prompt_library: {path} cannot be read: {error.strerror}",
            fix="cp config/user_prompt_library.json.example config/user_prompt_library.json",
        ) from error
    except ValueError as error:
        raise ConfigError(f"user_prompt_library: {path} is not JSON: {error}") from error
    if not isinstance(library, dict):
        raise ConfigError(f"user_prompt_library: {path} must hold one object of name: prompt")
    return [_prompt(path, name, entry) for name, entry in library.items()]


def _prompt(path: Path, name: str, entry: object) -> Prompt:
    facts = entry if isinstance(entry, dict) else {"prompt": entry}
    text = facts.get("prompt") or facts.get("caption")
    if not isinstance(text, str):
        raise ConfigError(f'user_prompt_library: {path}: {name!r} needs a text or {{"prompt": …}}')
    pictures = {key: _picture(path, name, key, facts.get(key)) for key in ("reference", "control")}
    return Prompt(name, text, **pictures)


def _picture(path: Path, name: str, key: str, given: object) -> Path | None:
    """The picture of an entry under `key`, opened once to see that it is whole."""
    if given is None:
        return None
    from PIL import Image  # late: most libraries name no picture

    picture = path.parent / str(given)
    try:
        with Image.open(picture) as image:
            image.load()  # verify() takes a JPEG that breaks off
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(
            f"user_prompt_library: {path}: the {key} of {name!r} cannot be shown: {error}",
            fix=f"name a picture by its path from the library's folder, or remove {key}",
        ) from error
    return picture
