"""Contradictions in how weights are trained: the method, its adapters, the optimizer, the rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from simpletuner.adapters.export import lora_file
from simpletuner.adapters.lycoris_settings import LycorisConfig
from simpletuner.adapters.settings import STARTS
from simpletuner.config.flat import SETTINGS, problems_inside
from simpletuner.config.proposal import Check, Proposal
from simpletuner.core.errors import ConfigError, Problem
from simpletuner.core.table import Row
from simpletuner.models.control import net_folder
from simpletuner.models.families import FAMILIES
from simpletuner.models.loading import is_local
from simpletuner.optim.optimizers import OPTIMIZERS, numbers
from simpletuner.optim.schedules import SCHEDULES
from simpletuner.precision.quantisers import QUANTISERS

_NET = "controlnet_model_name_or_path"
_OF_LORA = (
    *("lora_dropout", "lora_init_type", "peft_lora_target_modules"),
    *("use_dora", "use_rslora", "loraplus_lr_ratio"),
)


def one_choice_of_modules(run: Proposal) -> Iterator[Problem]:
    """The modules that get an adapter are named once."""
    if run.asks("flux_lora_target") and run.says("peft_lora_target_modules"):
        yield run.problem(
            "flux_lora_target",
            "peft_lora_target_modules names the modules, so this changes nothing; remove one of "
            "the two",
        )


def first_adapter_exists(run: Proposal) -> Iterator[Problem]:
    """The LoRA to go on from is there."""
    for key in ("init_lora", "preset_lora_path"):
        path = run.says(key)
        if path and not lora_file(path).is_file():
            yield run.problem(key, f"{lora_file(path)} does not exist; correct the path")


def controlnet_can_train(run: Proposal) -> Iterator[Problem]:
    """The family has a ControlNet, all of its weights train, and what it goes on from is there."""
    family, named = run.values.get("model_family", ""), run.says(_NET)
    if not run.values["controlnet"]:
        if named:
            yield run.problem(_NET, "changes nothing without controlnet; set that, or remove this")
        return
    able = [name for name, row in FAMILIES.items() if row.fact("control", False)]
    if family in FAMILIES and not FAMILIES[family].pending and family not in able:
        yield run.problem(
            "controlnet",
            f"cannot be trained for {family}, only for {' and '.join(able)}; remove it, or set"
            " model_family to one of these",
        )
    if run.values["model_type"] == "lora":
        yield run.problem(
            "controlnet",
            "trains all weights of a ControlNet, and model_type lora would be an adapter of one,"
            " which is not here; set model_type full",
        )
    if named and is_local(named) and net_folder(named) is None:
        yield run.problem(
            _NET,
            f"{named} is not a folder with a ControlNet: it has no config.json; correct the path,"
            " or name one of the hub as owner/name",
        )


def what_is_frozen(run: Proposal) -> Iterator[Problem]:
    """Layers are kept from training where all of them would train."""
    if run.asks("layer_freeze_strategy") and (
        run.values["model_type"] != "full" or run.values["controlnet"]
    ):
        yield run.problem(
            "layer_freeze_strategy",
            "changes nothing without model_type full, or beside controlnet; remove it",
        )


def settings_of_method(run: Proposal) -> Iterator[Problem]:
    """What shapes an adapter is asked where there is such; its size may stay from another run."""
    full, lycoris = run.values["model_type"] == "full", run.values["lora_type"] == "lycoris"
    if full:
        for key in (*_OF_LORA, "lora_format", "init_lora", "lycoris_config"):
            if run.asks(key):
                yield run.problem(
                    key, "is of an adapter, and model_type full has none; remove it, or set lora"
                )
    elif lycoris:
        for key in _OF_LORA:
            if run.asks(key):
                yield run.problem(key, "is of a plain LoRA; remove it, or set lora_type standard")
        yield from _lycoris_config(run)
    elif run.says("lycoris_config") is not None:
        yield run.problem(
            "lycoris_config", "changes nothing without lora_type lycoris; set that, or remove this"
        )


def _lycoris_config(run: Proposal) -> Iterator[Problem]:
    config, key = run.values["lycoris_config"], "lycoris_config"
    if not isinstance(config, Mapping):
        yield run.problem(
            key, 'is needed by lora_type lycoris: a file, or an object such as {"algo": "lokr"}'
        )
    else:
        yield from problems_inside(LycorisConfig, config, run.given[key])


def lycoris_over_quantised(run: Proposal) -> Iterator[Problem]:
    """LyCORIS goes over weights that it can read, and whole matrices over those it can write."""
    config, name = run.values["lycoris_config"], run.values["base_model_precision"]
    if run.values["lora_type"] != "lycoris" or run.values["model_type"] == "full":
        return
    if name in QUANTISERS and (instead := QUANTISERS[name].fact("lycoris")):
        yield run.problem(
            "base_model_precision",
            f"lora_type lycoris cannot read weights in {name}; take {instead}, or set lora_type"
            " standard",
        )
    if not isinstance(config, Mapping):
        return
    preset = config.get("apply_preset") or {}
    maps = [preset.get(key) or {} for key in ("module_algo_map", "name_algo_map")]
    inner = [each for found in maps if isinstance(found, Mapping) for each in found.values()]
    algos = [each.get("algo") for each in (config, *inner) if isinstance(each, Mapping)]
    if "full" in algos and name != "no_change":
        yield run.problem(
            "lycoris_config",
            f"the algorithm full does not go over a base in {name}; take lokr, or remove"
            " base_model_precision",
        )


def starts_from_the_base(run: Proposal) -> Iterator[Problem]:
    """An adapter that begins as a part of the base's weights needs these whole, and itself new."""
    kind = run.values["lora_init_type"]
    if kind not in STARTS:
        return
    for key, why in (
        ("init_lora", "goes on from a file, so there is nothing to begin"),
        ("use_dora", "trains the length of the weights as well, which are no longer these"),
        ("lora_dropout", "would drop what is learned and not what it started from"),
        ("base_model_precision", "leaves no whole weights to begin from"),
    ):
        if run.asks(key):
            yield run.problem(key, f"{why}; remove it, or lora_init_type {kind}")


def dora_over_quantised(run: Proposal) -> Iterator[Problem]:
    """DoRA reads the weights it is attached to, which quanto gives out in fp32 alone."""
    name, values = str(run.values["base_model_precision"]), run.values
    needs = QUANTISERS[name].fact("dora_in") if name in QUANTISERS else None
    if values["use_dora"] and needs == "fp32" and values["mixed_precision"] != "no":
        yield run.problem(
            "use_dora",
            f"cannot read weights in {name} beside {values['mixed_precision']}; take int8-torchao"
            " or nf4-bnb, or set mixed_precision to no",
        )


def learning_rate_uses(run: Proposal) -> Iterator[Problem]:
    """What shapes a schedule is asked of one that has such a shape."""
    schedule = run.values["lr_scheduler"]
    row = SCHEDULES.get(schedule) if schedule in SCHEDULES else None
    if row is None or row.pending:
        return
    for key in ("lr_end", "lr_power", "lr_num_cycles"):
        asked = run.says(key) not in (None, SETTINGS[key].field.default)
        if asked and key not in row.fact("takes", ()):
            yield run.problem(key, f"lr_scheduler {schedule} has no use for it; remove it")


def rate_falls(run: Proposal) -> Iterator[Problem]:
    """A schedule that falls ends below where it starts."""
    schedule, start, end = (run.values[key] for key in ("lr_scheduler", "learning_rate", "lr_end"))
    falls = schedule in SCHEDULES and SCHEDULES[schedule].fact("falls", False)
    if falls and end >= start:
        key = "lr_end" if "lr_end" in run.given else "learning_rate"
        yield run.problem(
            key,
            f"lr_scheduler {schedule} falls from learning_rate ({start:g}) to lr_end ({end:g}), so "
            "lr_end must be the smaller one",
        )


def warmup_is_taken(run: Proposal) -> Iterator[Problem]:
    """Warm-up steps are asked of a schedule that has some."""
    schedule, steps = run.values["lr_scheduler"], run.says("lr_warmup_steps")
    if steps and schedule in SCHEDULES and not SCHEDULES[schedule].fact("warmup", True):
        yield run.problem(
            "lr_warmup_steps",
            f"lr_scheduler {schedule} has no warm-up; set lr_scheduler to {schedule}_with_warmup, "
            "or remove lr_warmup_steps",
        )


def optimizer_takes_its_numbers(run: Proposal) -> Iterator[Problem]:
    """The optimizer has what adam_* and optimizer_beta* set, and optimizer_config agrees."""
    values = run.values
    name, config = values["optimizer"], values["optimizer_config"]
    row = OPTIMIZERS.get(name) if name in OPTIMIZERS else None
    if row is None or row.pending or any(True for _ in options_of_row(run)):
        return
    betas = (values["optimizer_beta1"], values["optimizer_beta2"])
    try:
        numbers(
            name,
            betas=None if None in betas else betas,
            weight_decay=values["adam_weight_decay"],
            eps=values["adam_epsilon"],
            config=config,
        )
    except ConfigError as error:
        for problem in error.problems:
            yield run.problem(problem.key, problem.message)


def optimizer_fits(run: Proposal) -> Iterator[Problem]:
    """What an optimizer decides itself is not asked of something else, and it runs here."""
    values, name = run.values, run.values["optimizer"]
    row = OPTIMIZERS.get(name) if name in OPTIMIZERS else None
    if row is None or row.pending:
        return
    if run.device not in row.fact("on", (run.device,)):
        yield run.problem(
            "optimizer",
            f"{name} does not run on {run.device}; take one of another package, such as adamw_bf16",
        )
    if row.fact("no_schedule"):
        if values["lr_scheduler"] not in ("constant", "constant_with_warmup"):
            yield run.problem(
                "lr_scheduler", f"{name} takes its place; set constant or constant_with_warmup"
            )
        if values["use_ema"]:
            yield run.problem("use_ema", f"{name} averages the weights itself; remove it")
    if row.fact("own_rate") and values["learning_rate"] < 0.1:
        yield run.problem(
            "learning_rate", f"is a factor on the rate that {name} finds; set it to 1"
        )
    if row.fact("own_rate") and values["loraplus_lr_ratio"] is not None:
        yield run.problem(
            "loraplus_lr_ratio",
            f"{name} finds one rate for all that trains; remove it, or take another",
        )
    if values["prodigy_steps"] is not None and not row.fact("own_rate"):
        yield run.problem(
            "prodigy_steps", "changes nothing without optimizer prodigy; set that, or remove this"
        )


def gradients_are_taken(run: Proposal) -> Iterator[Problem]:
    """Weights in bf16 have gradients in fp32 where the optimizer takes such."""
    name, values = run.values["optimizer"], run.values
    row = OPTIMIZERS.get(name) if name in OPTIMIZERS else None
    whole = values["model_type"] == "full" and not values["controlnet"]
    in_bf16 = values["mixed_precision"] == "bf16" and run.says("base_model_default_dtype") != "fp32"
    if row is None or values.get("gradient_precision") != "fp32" or not (whole and in_bf16):
        return
    if row.fact("bf16_weights", False) and not row.fact("fp32_gradients", False):
        yield run.problem(
            "gradient_precision",
            f"{name} takes gradients in the dtype of the weights, here bf16; take adamw_bf16, or"
            " remove this",
        )


def options_of_row(run: Proposal) -> Iterator[Problem]:
    """``optimizer_config`` and its kin hold what the chosen row takes."""
    for key, setting in SETTINGS.items():
        table, options = setting.hint.table, f"{key}_config"
        chosen = str(run.values.get(key))
        if table is None or not run.says(options) or chosen not in table:
            continue
        row = table[chosen]
        if row.options is not None:
            yield from _wrong_options(run, options, row)
        elif not row.pending:
            yield run.problem(options, f"{chosen} has no options of its own; remove it")


def _wrong_options(run: Proposal, key: str, row: Row) -> Iterator[Problem]:
    assert row.options is not None
    yield from problems_inside(row.options, run.values[key], run.given[key], row.name)


LEARNING_CHECKS: tuple[Check, ...] = (
    one_choice_of_modules,
    first_adapter_exists,
    controlnet_can_train,
    settings_of_method,
    starts_from_the_base,
    what_is_frozen,
    dora_over_quantised,
    lycoris_over_quantised,
    learning_rate_uses,
    rate_falls,
    warmup_is_taken,
    optimizer_takes_its_numbers,
    optimizer_fits,
    gradients_are_taken,
    options_of_row,
)
