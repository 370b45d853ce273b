"""The datasets file: its entries, with inherited values, defaults and placeholders filled in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from simpletuner.cache.settings import CacheSettings
from simpletuner.config.caption_filters import read_filters
from simpletuner.config.conditioning import Read, idle_keys, paired_with
from simpletuner.config.dataset_learning import check_learning
from simpletuner.config.embeds import (
    TextRead,
    default_text_embeds,
    idle,
    misnamed,
    two_defaults,
    unkept,
)
from simpletuner.config.flat import (
    Setting,
    build_section,
    by_name,
    read_values,
    settings_of,
    waiting,
)
from simpletuner.config.json_lines import JsonObject, parse_json
from simpletuner.config.places import fill, locate
from simpletuner.config.read import SECRET, looks_secret, object_keys
from simpletuner.config.renames import DATASET_RENAMES
from simpletuner.config.source import Given, read_text, shown
from simpletuner.config.values import read_value
from simpletuner.core.errors import ConfigError, Problem
from simpletuner.core.section import inner_section
from simpletuner.data.draw_settings import DatasetDrawSettings, gaps
from simpletuner.data.idle import without_effect
from simpletuner.data.settings import (
    Datasets,
    DatasetSettings,
    DataSettings,
    EntrySettings,
    ImageEmbedsSettings,
    TextEmbedsSettings,
    contradictions,
    each_resolution,
    inherit,
    inherit_filters,
    inherit_text_embeds,
)
from simpletuner.data.table_settings import reads_table

PICTURES = settings_of(DatasetSettings)
TEXT_EMBEDS = settings_of(TextEmbedsSettings)
IMAGE_EMBEDS = settings_of(ImageEmbedsSettings)

_CACHES: Mapping[str, type[EntrySettings]] = MappingProxyType(
    {"text_embeds": TextEmbedsSettings, "image_embeds": ImageEmbedsSettings}
)
"""The dataset_types that hold no pictures."""

_DRAWN = frozenset(
    {*DatasetDrawSettings.model_fields, "is_regularisation_data"} - {"max_num_samples"}
)
"""What is said of pictures that are drawn to be trained on."""


@dataclass(frozen=True)
class Surroundings:
    """What the datasets file is read in.

    Args:
        data: What holds for every dataset.
        cache: Where caches are, unless an entry says otherwise.
        given: What the user wrote in the settings, by key.
        model_family: Of the run; empty while it is not known.
        trains: What the run trains: lora, full, or controlnet.
        trains_text: True if text encoders train.
        flow_law: The setting whose law noise levels are drawn by; None for the logit-normal.
        output_dir: Of the run.
        environ: The environment variables.
        cwd: What relative paths start from.
        seed: Of the run.
        example: The folder of the shipped example that the file belongs to.
    """

    data: DataSettings
    cache: CacheSettings
    given: Mapping[str, Given]
    model_family: str
    trains: str
    trains_text: bool
    flow_law: str | None
    output_dir: Path
    environ: Mapping[str, str]
    cwd: Path
    seed: int
    example: Path | None = None


@dataclass
class DatasetsFile:
    """What was found in a datasets file.

    Args:
        path: The file.
        name: What messages call it.
        pictures: The entries that are trained on.
        training: The same, one for each resolution of a list.
        evaluation: Those that are never trained on, likewise.
        paired: What goes with the pictures, by the id of one of both.
        indexes: The entry's own id by that of each of its resolutions.
    """

    path: Path
    name: str
    pictures: list[Read] = field(default_factory=list)
    training: list[DatasetSettings] = field(default_factory=list)
    evaluation: list[DatasetSettings] = field(default_factory=list)
    conditioning: list[Read] = field(default_factory=list)
    paired: dict[str, tuple[DatasetSettings, ...]] = field(default_factory=dict)
    indexes: dict[str, str] = field(default_factory=dict)
    text_embeds: list[TextRead] = field(default_factory=list)
    image_embeds: dict[str, ImageEmbedsSettings] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    pending: list[Problem] = field(default_factory=list)

    def problem(self, message: str, line: int | None = None, key: str = "") -> None:
        """Note `message` as a Problem of the file."""
        self.problems.append(Problem(message, key=key, file=self.name, line=line))


@dataclass(frozen=True)
class Entry:
    """One object of the file: its place in the list (from 1), its line, its keys."""

    number: int
    line: int
    given: tuple[Given, ...]


def read_datasets(path: Path, around: Surroundings) -> tuple[DatasetsFile, Datasets | None]:
    """Read `path`; None instead of the datasets if something is wrong with them."""
    found = DatasetsFile(path, shown(path, around.cwd))
    try:
        entries = list(_entries(parse_json(read_text(path, found.name), found.name), found.name))
    except ConfigError as error:
        found.problems += error.problems
        return found, None
    enabled = [entry for entry in entries if not _is_disabled(entry)]
    for entry in sorted(enabled, key=_is_primary):  # what pictures may name comes first
        _read_entry(entry, found, around)
    _check_ids(enabled, found)
    _check_sizes(enabled, found)
    if not found.problems:  # an entry that could not be read is missing for another reason
        check_learning(found, around)
    if not found.problems and not found.training:
        off = " that is not disabled" if len(enabled) < len(entries) else ""
        needs = "dataset_type image" if found.evaluation else "an instance_data_dir"
        what = "to train on, only to measure by" if found.evaluation else "of pictures"
        found.problem(f"no dataset {what}{off}; one entry needs {needs}")
    text_embeds, captions = _choose_text_embeds(found, around)
    _check_folders(found, [text_embeds, *captions.values()])
    if found.problems:
        return found, None
    training, evaluation = (
        tuple(inherit_filters(entry, captions.get(entry.id, text_embeds)) for entry in entries)
        for entries in (found.training, found.evaluation)
    )
    return found, Datasets(training, text_embeds, found.paired, evaluation, captions, found.indexes)


def _entries(tree: Any, name: str) -> Iterator[Entry]:
    """The objects of the file's list."""
    if not isinstance(tree, list) or not all(isinstance(item, JsonObject) for item in tree):
        message = "must be a list of objects, one for each dataset: [ { … }, { … } ]"
        raise ConfigError(problems=[Problem(message, file=name, line=1)])
    if not tree:
        raise ConfigError(problems=[Problem("lists no dataset", file=name, line=1)])
    problems: list[Problem] = []
    entries = []
    for number, item in enumerate(tree, start=1):
        try:
            entries.append(Entry(number, item.line, object_keys(item, name)))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems=problems)
    yield from entries


def _value_of(entry: Entry, key: str) -> Any:
    """The value of `key` in an entry under any of its names, None without it."""
    named = by_name(entry.given, EVERY_KEY, [], DATASET_RENAMES)
    if key not in named:
        return None
    return read_value(named[key], EVERY_KEY[key].kind)[0]


EVERY_KEY: Mapping[str, Setting] = {**TEXT_EMBEDS, **IMAGE_EMBEDS, **PICTURES}
"""The keys of any entry."""


def _is_disabled(entry: Entry) -> bool:
    return _value_of(entry, "disabled") is True


def _is_primary(entry: Entry) -> bool:
    keeps = str(_value_of(entry, "dataset_type")) in _CACHES
    return not keeps and not _value_of(entry, "conditioning_type")


def _read_entry(entry: Entry, found: DatasetsFile, around: Surroundings) -> None:
    """Add what one entry says to `found`."""
    section = _CACHES.get(str(_value_of(entry, "dataset_type")), DatasetSettings)
    known = settings_of(section)
    given = by_name(entry.given, known, found.problems, DATASET_RENAMES)
    found.problems += [
        item.problem(f"looks like an access token; {SECRET}")
        for item in given.values()
        if looks_secret(item.value)
    ]
    values = read_values(given, known, found.notes)
    names = {"output_dir": str(around.output_dir), "id": str(values.get("id", ""))}
    if around.model_family:
        names["model_family"] = around.model_family
    before = len(found.problems)
    _fill(values, given, known, names, found, around)
    unset = {problem.key for problem in found.problems[before:]}
    built, problems = build_section(section, values, given)
    found.problems += [_placed(problem, entry, found.name) for problem in problems]
    found.pending += waiting([built], given)
    if isinstance(built, TextEmbedsSettings | DatasetSettings) and built.caption_filter_list:
        subject = given["caption_filter_list"]
        lines, wrong = read_filters(built.caption_filter_list, subject, around.cwd)
        built = built.model_copy(update={"caption_filter_list": lines})
        found.problems += wrong
    if isinstance(built, TextEmbedsSettings):
        found.text_embeds.append((built, given))
    elif isinstance(built, ImageEmbedsSettings):
        found.image_embeds[built.id] = built
    elif isinstance(built, DatasetSettings) and built.role == "conditioning":
        _add_conditioning(built, given, values, found, around)
    elif isinstance(built, DatasetSettings):
        _add_pictures(built, entry, given, found, around, unset)


def _placed(problem: Problem, entry: Entry, name: str) -> Problem:
    """`problem` with the entry's line where it has none: a key that is missing."""
    if problem.line:
        return problem
    return Problem(f"(entry {entry.number}) {problem.message}", problem.key, name, entry.line)


def _fill(
    values: dict[str, Any],
    given: Mapping[str, Given],
    known: Mapping[str, Setting],
    names: Mapping[str, str],
    found: DatasetsFile,
    around: Surroundings,
) -> None:
    """Fill placeholders in, and put paths where they start from; in sections inside too."""
    for key, value in values.items():
        inner = inner_section(known[key].field) if key in known else None
        if inner and isinstance(value, Mapping):
            inside = values[key] = dict(value)
            parts = {name: given[key].part(name) for name in inside}
            _fill(inside, parts, settings_of(inner), names, found, around)
        if key not in known or not isinstance(value, str | list):
            continue
        is_path, allowed = known[key].hint.path, names if key != "id" else {}
        if is_path and isinstance(value, list):  # it is what else the file would hold
            continue
        filled: list[object] = []
        unset: list[str] = []
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                text, missing = fill(text, allowed, around.environ)
                text = str(locate(text, around.cwd, around.example)) if is_path else text
                unset += missing
            filled.append(text)
        values[key] = filled if isinstance(value, list) else filled[0]
        for name in dict.fromkeys(unset):
            message = f"the environment variable {name} is not set"
            found.problems.append(given[key].problem(message))


def _add_pictures(
    built: DatasetSettings,
    entry: Entry,
    given: Mapping[str, Given],
    found: DatasetsFile,
    around: Surroundings,
    unset: Container[str],
) -> None:
    """Add one set of pictures, with what it inherits; of keys in `unset` nothing more is said."""
    cache = around.cache
    kept = found.image_embeds.get(built.image_embeds or "")
    root = kept.cache_dir if kept else None
    dataset = inherit(
        built,
        around.data,
        vae_root=root or cache.vae_root(around.output_dir, around.model_family),
        vae_cache_ondemand=cache.vae_cache_ondemand,
        vae_cache_disable=cache.vae_cache_disable,
        vae_batch_size=cache.vae_batch_size,
        write_batch_size=cache.write_batch_size,
        seed=around.seed,
    )
    sizes = each_resolution(dataset)
    # What is wrong with several of them alike is said once.
    for key, message in dict.fromkeys(said for each in sizes for said in contradictions(each)):
        subject = given.get(key) or around.given.get(key)
        if subject and subject.key in unset:  # it is empty for another reason
            continue
        if subject:
            found.problems.append(subject.problem(message))
        else:
            found.problem(f"(entry {entry.number}) {message}", entry.line, key)
    _refuse_own_pictures(dataset, given, found, around)
    _note_missing_folder(dataset, found, around)
    _note_other_captions(built, dataset, found, around)
    found.notes += [
        f"dataset {built.id}: {key} changes nothing, for {why}"
        for key, why in without_effect(dataset)
        if key in given
    ]
    found.pictures.append(Read(dataset, given))
    if built.role == "eval":
        found.evaluation += sizes
        if drawn := sorted(_DRAWN & given.keys()):
            what = "changes" if len(drawn) == 1 else "change"
            found.notes.append(
                f"dataset {built.id}: {', '.join(drawn)} {what} nothing, for it is never trained on"
            )
    else:
        found.training += sizes
    found.indexes |= {each.id: dataset.id for each in sizes if each.id != dataset.id}
    if paired := paired_with(built, found.conditioning):
        found.paired |= {each.id: paired for each in sizes}


def _add_conditioning(
    built: DatasetSettings,
    given: Mapping[str, Given],
    values: Mapping[str, Any],
    found: DatasetsFile,
    around: Surroundings,
) -> None:
    """Add a set that goes with the pictures of another."""
    _refuse_own_pictures(built, given, found, around)
    _note_missing_folder(built, found, around)
    if idle := idle_keys(values):
        found.notes.append(
            f"dataset {built.id}: {', '.join(idle)} change nothing, for its pictures are treated"
            " as those they belong to"
        )
    found.conditioning.append(Read(built, given))


def _refuse_own_pictures(
    dataset: DatasetSettings,
    given: Mapping[str, Given],
    found: DatasetsFile,
    around: Surroundings,
) -> None:
    """A run must not be trained on the pictures that it writes."""
    folder, subject = dataset.instance_data_dir, given.get("instance_data_dir")
    if folder is None or subject is None or dataset.table_path is not None:
        return
    root, output = folder.resolve(), (around.cwd / around.output_dir).resolve()
    if not output.is_relative_to(root):
        return
    inside = output.relative_to(root).parts
    if not any(part.startswith(".") for part in inside):  # hidden folders are no part of a dataset
        found.problems.append(
            subject.problem(
                f"output_dir {shown(around.output_dir, around.cwd)} lies in this folder, and the"
                " pictures a run writes there would be trained on; move one of the two"
            )
        )


def _note_missing_folder(
    dataset: DatasetSettings, found: DatasetsFile, around: Surroundings
) -> None:
    folder = dataset.instance_data_dir
    if folder is not None and not folder.is_dir():
        found.notes.append(f"dataset {dataset.id}: {shown(folder, around.cwd)} does not exist yet")
    table = dataset.table_path
    if table is not None and not table.is_file():
        found.notes.append(f"dataset {dataset.id}: {shown(table, around.cwd)} does not exist yet")


def _note_other_captions(
    built: DatasetSettings, dataset: DatasetSettings, found: DatasetsFile, around: Surroundings
) -> None:
    """Say where a table's captions come before the strategy that the settings ask for."""
    asked = around.data.caption_strategy
    own = "caption_strategy" in built.model_fields_set
    if "caption_strategy" not in around.given or own or reads_table(asked):
        return
    if dataset.caption_strategy != asked and dataset.table_path is not None:
        found.notes.append(
            f"dataset {dataset.id}: captions come from {shown(dataset.table_path, around.cwd)}, not"
            f" by the settings' caption_strategy {asked}; give the entry its own to change that"
        )


def _check_ids(entries: Iterable[Entry], found: DatasetsFile) -> None:
    """Every id stands once."""
    seen: dict[str, Given] = {}
    for entry in entries:
        for item in entry.given:
            if item.key.lstrip("-").lower() != "id" or not isinstance(item.value, str):
                continue
            first = seen.setdefault(item.value, item)
            if first is not item:
                found.problems.append(
                    item.problem(f"{item.value!r} is the id of the entry on line {first.line} too")
                )


def _check_sizes(entries: Iterable[Entry], found: DatasetsFile) -> None:
    """No dataset that stands for one of several resolutions has the id of another."""
    given = Counter(str(_value_of(entry, "id")) for entry in entries)
    made = Counter(dataset.id for dataset in (*found.training, *found.evaluation))
    made.update(text.id for text, _ in found.text_embeds)
    made.update([*found.image_embeds, *(each.id for each in found.conditioning)])
    for name, count in made.items():
        if count > max(given[name], 1):
            found.problem(
                f"{count} datasets have the id {name!r}, for a list of resolutions makes one of"
                " each with its value at the end; rename an entry, or list each value once",
                key="id",
            )


def check_draws(found: DatasetsFile, *, epochs: int, steps: int) -> None:
    """Some dataset is drawn from all through a run of so many epochs, or else steps."""
    for key, message in gaps(found.training, epochs=epochs, steps=steps):
        found.problem(message, key=key)


def _choose_text_embeds(
    found: DatasetsFile, around: Surroundings
) -> tuple[TextEmbedsSettings, dict[str, TextEmbedsSettings]]:
    """Where captions are kept, and where those of datasets that name an entry, by their ids."""
    entries = (found.pictures, found.text_embeds, found.image_embeds)
    found.problems += [*two_defaults(found.text_embeds), *misnamed(*entries)]
    found.notes += idle(*entries, trains_text=around.trains_text)
    if around.trains_text:
        found.problems += unkept(found.text_embeds)

    def inherited(entry: TextEmbedsSettings) -> TextEmbedsSettings:
        return inherit_text_embeds(
            entry,
            text_root=around.cache.text_root(around.output_dir, around.model_family),
            text_encoder_batch_size=around.cache.text_encoder_batch_size,
            write_batch_size=around.cache.write_batch_size,
            text_cache_ondemand=around.cache.text_cache_ondemand,
            text_cache_disable=around.cache.text_cache_disable,
        )

    known = {entry.id: inherited(entry) for entry, _ in found.text_embeds}
    sets = (*found.training, *found.evaluation)
    own = {each.id: known[each.text_embeds] for each in sets if each.text_embeds in known}
    return inherited(default_text_embeds(found.text_embeds)), own


def _check_folders(found: DatasetsFile, text_embeds: Sequence[TextEmbedsSettings]) -> None:
    """No two caches share a folder, but for those of captions."""
    owners = {each.cache_dir: each.id for each in text_embeds if each.cache_dir is not None}
    for dataset in (*found.training, *found.evaluation):
        if dataset.cache_dir_vae is None:
            continue
        owner = owners.setdefault(dataset.cache_dir_vae, dataset.id)
        if owner != dataset.id:
            found.problem(
                f"datasets {owner} and {dataset.id} share the folder {dataset.cache_dir_vae}; give "
                "each its own",
                key="cache_dir_vae",
            )
