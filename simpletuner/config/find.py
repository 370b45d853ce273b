"""Which settings file is meant: a path, a name, a shipped example, or the usual places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from simpletuner.config.source import shown
from simpletuner.core.errors import ConfigError, did_you_mean

BACKENDS = ("json", "toml", "env")
_FLAGS_ONLY = "cmd"
_EXAMPLES = "examples/"


@dataclass(frozen=True)
class Place:
    """Where the settings stand.

    Args:
        file: The settings file; None if all settings are flags.
        example: The folder of a shipped example, which its relative paths are looked up in first.
        notes: What the reader of the result should know.
    """

    file: Path | None
    example: Path | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Selectors:
    """What the command line and the environment say about the settings file."""

    config: str = ""
    env: str = ""
    example: str = ""
    backend: str = ""

    @classmethod
    def of(cls, flags: Mapping[str, str], environ: Mapping[str, str]) -> Selectors:
        """Flags win over ``CONFIG_PATH``, ``ENV`` and ``CONFIG_BACKEND``.

        Raises:
            ConfigError: Two flags name a file each.
        """
        config, env = flags.get("config", ""), flags.get("env", "")
        example = flags.get("example", "")
        if sum(map(bool, (config, env, example))) > 1:
            raise ConfigError("--config, --env and --example each name a settings file; keep one")
        if not (config or env or example):
            config, env = environ.get("CONFIG_PATH", ""), environ.get("ENV", "")
            env = "" if config else env
        if env.startswith(_EXAMPLES):
            env, example = "", env.removeprefix(_EXAMPLES)
        backend = flags.get("config_backend", "") or environ.get("CONFIG_BACKEND", "")
        return cls(config, env.strip("/"), example.strip("/"), backend.lower())


def shipped_folder() -> Path:
    """The folder that the product ships: ``*.example`` files and ``examples/``.

    In an installed wheel it is package data, in a checkout ``config/``.
    """
    packaged = Path(str(resources.files("simpletuner"))) / "shipped"
    return packaged if packaged.is_dir() else packaged.parent.parent / "config"


def examples_folder() -> Path:
    """The folder of the shipped examples, one folder each."""
    return shipped_folder() / "examples"


def find_settings(selectors: Selectors, cwd: Path) -> Place:
    """The settings file that `selectors` name, or the first of the usual places.

    Raises:
        ConfigError: There is none; the message says where was looked and what there is.
    """
    backend = selectors.backend
    if backend and backend not in (*BACKENDS, _FLAGS_ONLY):
        raise ConfigError(
            f"CONFIG_BACKEND is {backend!r}; it takes {', '.join((*BACKENDS, _FLAGS_ONLY))}"
        )
    if backend == _FLAGS_ONLY:
        return Place(None)
    if selectors.config:
        return Place(_named_file(cwd / Path(selectors.config).expanduser(), backend, cwd))
    if selectors.example:
        return _example(selectors.example, backend, cwd)
    if selectors.env:
        return _environment(selectors.env, backend, cwd)
    folders = [cwd / "config", cwd]
    if place := _first(folders, backend, cwd):
        return place
    raise ConfigError(
        f"no settings file: looked for {_names(backend)} in {' and '.join(map(str, folders))}",
        fix="`simpletuner configure` writes one; `--config PATH` names one; `--example NAME` runs "
        f"a shipped example ({', '.join(_configurations(examples_folder())) or 'none here'})",
    )


def _files(folder: Path, backend: str) -> list[Path]:
    """The settings files that `folder` holds, in the order they are taken."""
    kinds = (backend,) if backend else BACKENDS
    return [file for kind in kinds if (file := folder / f"config.{kind}").is_file()]


def _first(folders: list[Path], backend: str, cwd: Path) -> Place | None:
    """The first settings file of `folders`; a note names the ones beside it that are not read."""
    found = [file for folder in folders for file in _files(folder, backend)]
    if not found:
        return None
    file, beside = found[0], [other for other in found[1:] if other.parent == found[0].parent]
    notes = tuple(
        f"{shown(other, cwd)} is not read, because {shown(file, cwd)} is there; "
        f"CONFIG_BACKEND={other.suffix[1:]} reads it instead"
        for other in beside
    )
    return Place(file, notes=notes)


def _names(backend: str) -> str:
    return ", ".join(f"config.{kind}" for kind in ((backend,) if backend else BACKENDS))


def _named_file(path: Path, backend: str, cwd: Path) -> Path:
    """The file `path` means: itself, one inside it, or itself with a suffix added."""
    if path.is_file():
        return path
    inside = _files(path, backend) if path.is_dir() else []
    suffixes = (backend,) if backend else BACKENDS
    added = [path.with_name(f"{path.name}.{kind}") for kind in suffixes]
    found = [*inside, *(file for file in added if file.is_file())]
    if found:
        return found[0]
    raise ConfigError(
        f"there is no settings file {shown(path, cwd)}", fix="--config takes the path of a file"
    )


def _configurations(folder: Path) -> list[str]:
    """Names of the folders in `folder` that hold a settings file."""
    if not folder.is_dir():
        return []
    return sorted(child.name for child in folder.iterdir() if child.is_dir() and _files(child, ""))


def _example(name: str, backend: str, cwd: Path) -> Place:
    folder = examples_folder() / name
    files = _files(folder, backend)
    if files:
        return Place(files[0], example=folder)
    names = _configurations(examples_folder())
    raise ConfigError(
        f"there is no shipped example {name!r}{did_you_mean(name, names)}",
        fix=f"shipped examples: {', '.join(names) or 'none in this installation'}",
    )


def _environment(name: str, backend: str, cwd: Path) -> Place:
    """``config/<name>/``; ``default`` without a folder of its own means the usual places."""
    folders = [cwd / "config" / name]
    if name == "default":
        folders += [cwd / "config", cwd]
    if place := _first(folders, backend, cwd):
        return place
    names = _configurations(cwd / "config")
    shipped = ", ".join(_EXAMPLES + child for child in _configurations(examples_folder()))
    raise ConfigError(
        f"ENV={name}: there is no {_names(backend)} in {shown(folders[0], cwd)}"
        f"{did_you_mean(name, names)}",
        fix=f"in config/ there is: {', '.join(names) or 'no folder with a settings file'}; "
        f"shipped: {shipped or 'none'}; unset ENV to read config/config.json",
    )
