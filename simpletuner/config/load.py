"""From the arguments, the environment and the settings files to what a run is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from simpletuner.adapters.settings import AdapterSettings
from simpletuner.cache.settings import CacheSettings
from simpletuner.config.checks import contradictions
from simpletuner.config.datasets import DatasetsFile, Surroundings, check_draws, read_datasets
from simpletuner.config.find import Place, Selectors, examples_folder, find_settings, shipped_folder
from simpletuner.config.flat import (
    SETTINGS,
    build_section,
    by_name,
    canonical,
    is_switch,
    read_values,
    sections,
    waiting,
)
from simpletuner.config.json_lines import parse_json
from simpletuner.config.places import fill, locate
from simpletuner.config.precision_checks import QUANTISED_PARTS
from simpletuner.config.proposal import Proposal
from simpletuner.config.read import Reader, last_of_each, object_keys
from simpletuner.config.root import Config
from simpletuner.config.source import Given, Source, read_text, shown
from simpletuner.config.unsupported import UNSUPPORTED
from simpletuner.core.errors import ConfigError, Problem
from simpletuner.core.section import Section
from simpletuner.data.settings import Datasets, DataSettings
from simpletuner.diffusion.needs import flow_law
from simpletuner.precision.quantisers import QUANTISERS, quantised_in
from simpletuner.runtime.machine import device_kind

__all__ = ["Loaded", "examples_folder", "load", "shipped_folder"]

_SELECTORS = frozenset({"config", "env", "example", "config_backend"})
_DATASETS_FILE = "multidatabackend.json"
_LYCORIS_FILE = "lycoris_config.json"
_OTHER_SELECTORS = MappingProxyType({"e": "example", "config_path": "config"})


@dataclass(frozen=True)
class Loaded:
    """A configuration that can be used.

    Args:
        config: Its settings.
        datasets: Its datasets.
        notes: What was read loosely or came from an unexpected place.
        pending: What it asks for that is not built yet; `train` refuses it.
        files: The files it was read from.
        exports: Environment variables that a shell-syntax settings file sets for other programs.
    """

    config: Config
    datasets: Datasets
    notes: tuple[str, ...]
    pending: tuple[Problem, ...]
    files: tuple[Path, ...]
    exports: Mapping[str, str] = field(default_factory=dict)


def load(arguments: Sequence[str], environ: Mapping[str, str], cwd: Path) -> Loaded:
    """Read and check everything that `arguments` and `environ` name.

    Args:
        arguments: The command line after the sub-command.
        environ: The environment variables.
        cwd: What relative paths start from.

    Raises:
        ConfigError: With every problem at once.
    """
    return _Loading(environ, cwd).run(arguments)


class _Loading:
    """One load: what was found so far, and what is wrong with it."""

    def __init__(self, environ: Mapping[str, str], cwd: Path) -> None:
        self.environ = environ
        self.cwd = cwd
        self.device = device_kind(environ)
        self.notes: list[str] = []
        self.problems: list[Problem] = []
        self.reader = Reader(_is_known, is_switch, tuple(SETTINGS))

    def run(self, arguments: Sequence[str]) -> Loaded:
        selectors, flags = _take_selectors(self.reader.flags(arguments))
        place = find_settings(Selectors.of(selectors, self.environ), self.cwd)
        self.notes += place.notes
        source = self._source(place)
        given = self._merge(source, flags)
        values = read_values(given, SETTINGS, self.notes)
        self._fill(values, given, place)
        self._read_lycoris(values, given, place)
        self._choose_the_method(values, given)
        self._fit_the_machine(values, given)
        built = self._sections(values, given, place)
        merged = _merged(built, values)
        self.problems += contradictions(Proposal(merged, given, self.device))
        found, datasets = self._datasets(place, merged, built, given)
        if self.problems or datasets is None or found is None:
            raise ConfigError(problems=list(dict.fromkeys(self.problems)))
        config = Config.model_validate(built)
        data = config.data.model_copy(update={"data_backend_config": found.path})
        return Loaded(
            config=config.model_copy(update={"data": data}),
            datasets=datasets,
            notes=tuple(dict.fromkeys((*self.notes, *found.notes))),
            pending=(*waiting(built.values(), given), *found.pending),
            files=tuple(file for file in (place.file, found.path) if file),
            exports=source.exports,
        )

    def _source(self, place: Place) -> Source:
        if place.file is None:
            return Source(self.cwd, ())
        source = self.reader.file(place.file, self.cwd, self.environ)
        self.notes += source.notes
        return source

    def _merge(self, source: Source, flags: Sequence[Given]) -> dict[str, Given]:
        """File, then environment, then flags; a later one replaces an earlier one."""
        environment = self.reader.environment(self.environ)
        self.notes += [f"{canonical(given.key)} comes from {given.origin}" for given in environment]
        layers = (
            source.given,
            last_of_each(environment, _own_name, self.notes),
            last_of_each(flags, _own_name, self.notes),
        )
        merged: dict[str, Given] = {}
        for layer in layers:
            merged |= by_name(layer, SETTINGS, self.problems)
        return merged

    def _fill(self, values: dict[str, Any], given: Mapping[str, Given], place: Place) -> None:
        """Put the environment into ``{env:NAME}``, and paths where they start from."""
        for key, value in values.items():
            if not isinstance(value, str):
                continue
            text, missing = fill(value, {}, self.environ)
            for name in missing:
                message = f"the environment variable {name} is not set"
                self.problems.append(given[key].problem(message))
            in_example = place.example if given[key].file else None
            if SETTINGS[key].hint.path:
                text = str(locate(text, self.cwd, in_example))
            elif in_example and _names_model(key) and (in_example / text).exists():
                text = str(in_example / text)
            values[key] = text

    def _read_lycoris(self, values: dict[str, Any], given: dict[str, Given], place: Place) -> None:
        """Put the object of a lycoris_config file in its place; it may lie beside the settings."""
        key, named = "lycoris_config", values.get("lycoris_config")
        if values.get("lora_type") != "lycoris" or isinstance(named, Mapping):
            return
        folders = [place.file.parent] if place.file else []
        paths = [Path(named)] if named else [folder / _LYCORIS_FILE for folder in folders]
        for path in (path for path in paths if named or path.is_file()):
            name = shown(path, self.cwd)
            try:
                found = object_keys(parse_json(read_text(path, name), name), name)
            except ConfigError as error:
                self.problems += error.problems
                values.pop(key, None)
                continue
            lines = {(item.key, *path): n for item in found for path, n in item.lines.items()}
            lines |= {(item.key,): item.line for item in found if item.line}
            values[key] = {item.key: item.value for item in found}
            given[key] = Given(key, values[key], name, lines=lines)

    def _choose_the_method(self, values: dict[str, Any], given: Mapping[str, Given]) -> None:
        """Where models are named to train, and none to get a LoRA, that is what is asked for."""
        whole, lora = values.get("trainable_models"), values.get("lora_base_model")
        if whole and not lora and "model_type" not in given:
            values["model_type"] = "full"
            self.notes.append("model_type is full: trainable_models, without lora_base_model")

    def _fit_the_machine(self, values: dict[str, Any], given: Mapping[str, Given]) -> None:
        """Where a format works on this machine in fp32 alone, that is the default there."""
        names = [values[key] for key in QUANTISED_PARTS if values.get(key) in QUANTISERS]
        exact = [
            name
            for name in names
            if quantised_in(name, self.device, "bf16")
            and not quantised_in(name, self.device, "fp32")
        ]
        if exact and "mixed_precision" not in given:
            values["mixed_precision"] = "no"
            self.notes.append(f"mixed_precision is no: {exact[0]} computes in fp32 on a CPU")
        held = "base_model_default_dtype"
        if values.get("mixed_precision") == "no" and values.get(held) not in (None, "fp32"):
            self.notes.append(f"{held} changes nothing: with mixed_precision no all of it is fp32")

    def _sections(
        self, values: Mapping[str, Any], given: Mapping[str, Given], place: Place
    ) -> dict[str, Section | None]:
        # A setting that is missing is missing in the file, if there is one.
        file = shown(place.file, self.cwd) if place.file else None
        built: dict[str, Section | None] = {}
        for name, section in sections().items():
            own = {key: value for key, value in values.items() if SETTINGS[key].section == name}
            built[name], problems = build_section(section, own, given, file)
            self.problems += problems
        return built

    def _datasets(
        self,
        place: Place,
        values: Mapping[str, Any],
        built: Mapping[str, Section | None],
        given: Mapping[str, Given],
    ) -> tuple[DatasetsFile | None, Datasets | None]:
        output_dir = Path(values["output_dir"])
        path = self._datasets_path(place, values.get("data_backend_config"), output_dir, given)
        if path is None:
            return None, None
        data, cache, adapter = built["data"], built["cache"], built["adapter"]
        diffusion = built["diffusion"]
        around = Surroundings(
            data=data if isinstance(data, DataSettings) else DataSettings(),
            cache=cache if isinstance(cache, CacheSettings) else CacheSettings(),
            given=given,
            model_family=str(values.get("model_family", "")),
            trains=adapter.trains if isinstance(adapter, AdapterSettings) else "lora",
            trains_text=isinstance(adapter, AdapterSettings) and adapter.train_text_encoder,
            flow_law=None if diffusion is None else flow_law(dict(diffusion)),
            output_dir=output_dir,
            environ=self.environ,
            cwd=self.cwd,
            seed=values["seed"],
            example=place.example,
        )
        found, datasets = read_datasets(path, around)
        if datasets is not None and built["schedule"] is not None:
            check_draws(
                found, epochs=values["num_train_epochs"], steps=values["max_train_steps"] or 0
            )
        self.problems += found.problems
        return found, datasets

    def _datasets_path(
        self, place: Place, named: Path | None, output_dir: Path, given: Mapping[str, Given]
    ) -> Path | None:
        """The datasets file: the one that is named, or the first of the usual ones."""
        beside = [place.file.parent] if place.file else []
        folders = [*beside, self.cwd / "config", output_dir]
        candidates = [named] if named else [folder / _DATASETS_FILE for folder in folders]
        for path in candidates:
            if Path(path).is_file():
                return Path(path)
        if named:
            message = f"{shown(Path(named), self.cwd)} does not exist"
        else:
            places = ", ".join(dict.fromkeys(shown(folder, self.cwd) for folder in folders))
            message = f"is not set, and {_DATASETS_FILE} is not in {places}; it lists the datasets"
        key = "data_backend_config"
        self.problems.append(given[key].problem(message) if key in given else Problem(message, key))
        return None


def _own_name(given: Given) -> str:
    return canonical(given.key)


def _is_known(key: str) -> bool:
    name = canonical(key)
    return name in SETTINGS or name in UNSUPPORTED


def _take_selectors(flags: Iterable[Given]) -> tuple[dict[str, str], list[Given]]:
    """What names the settings file, and the settings."""
    selectors: dict[str, str] = {}
    rest: list[Given] = []
    for flag in flags:
        name = canonical(flag.key, _OTHER_SELECTORS)
        if name in _SELECTORS:
            selectors[name] = str(flag.value)
        else:
            rest.append(flag)
    return selectors, rest


def _names_model(key: str) -> bool:
    """True for settings that take a hub id as well as a path."""
    return key.startswith("pretrained_") or key == "init_lora"


def _merged(built: Mapping[str, Section | None], values: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting: of sections that could be built as they are, of the others as given."""
    merged: dict[str, Any] = {
        key: setting.field.get_default(call_default_factory=True)
        for key, setting in SETTINGS.items()
        if not setting.field.is_required()
    }
    for name, section in built.items():
        if section is not None:
            merged |= dict(section)
        else:
            merged |= {k: v for k, v in values.items() if SETTINGS[k].section == name}
    return merged
