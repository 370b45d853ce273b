"""What no single setting can tell: contradictions, and files that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from simpletuner.config.flat import SETTINGS
from simpletuner.config.learning_checks import LEARNING_CHECKS
from simpletuner.config.memory_checks import MEMORY_CHECKS
from simpletuner.config.named_checks import NAMED_CHECKS
from simpletuner.config.objective_checks import OF_THE_OBJECTIVE
from simpletuner.config.precision_checks import PRECISION_CHECKS
from simpletuner.config.proposal import Check, Proposal
from simpletuner.config.read import SECRET, looks_secret
from simpletuner.config.text_encoder_checks import TEXT_ENCODER_CHECKS
from simpletuner.core.errors import ConfigError, Problem, did_you_mean
from simpletuner.models.families import FAMILIES, predicted_by
from simpletuner.validation.prompts import Prompts
from simpletuner.validation.settings import ValidationSettings

LEAST_PX, MOST_PX = 32, 8192


def flavour_of_family(run: Proposal) -> Iterator[Problem]:
    """A flavour is one of the family's."""
    family, flavour = run.values.get("model_family", ""), run.says("model_flavour")
    if family not in FAMILIES or not flavour:
        return
    flavours = FAMILIES[family].fact("flavours", ())
    if flavours and flavour not in flavours:
        near = did_you_mean(flavour, flavours)
        yield run.problem(
            "model_flavour",
            f"{family} has no flavour {flavour!r}{near or '; it has ' + ', '.join(flavours)}",
        )


def prediction_of_family(run: Proposal) -> Iterator[Problem]:
    """A family is trained to predict what it can."""
    family, chosen = run.values.get("model_family", ""), run.says("prediction_type")
    known = predicted_by(family)
    if chosen and known and chosen not in known:
        yield run.problem(
            "prediction_type",
            f"{family} cannot predict {chosen}, only {' or '.join(known)}; remove it to take what "
            "the checkpoint says",
        )


def prediction_of_zero_snr(run: Proposal) -> Iterator[Problem]:
    """A model that predicts the noise has nothing to say where there is nothing but noise."""
    if run.values["rescale_betas_zero_snr"] and run.says("prediction_type") == "epsilon":
        yield run.problem(
            "rescale_betas_zero_snr",
            "does not go with prediction_type epsilon: in nothing but noise the noise says nothing"
            " of the picture; set prediction_type v_prediction, or remove this",
        )


def settings_of_family(run: Proposal) -> Iterator[Problem]:
    """What only some families read is asked of one of them."""
    family = run.values.get("model_family", "")
    if family not in FAMILIES or FAMILIES[family].pending:
        return
    readers: dict[str, list[str]] = {}
    for name, row in FAMILIES.items():
        for key in row.fact("own_settings", ()):
            readers.setdefault(key, []).append(name)
    for key, names in readers.items():
        default = SETTINGS[key].field.default
        if family not in names and run.says(key) not in (None, default):
            verb = "has" if len(names) == 1 else "have"
            yield run.problem(
                key, f"{family} has no use for it, {' and '.join(names)} {verb}; remove it"
            )


def alignment_of_family(run: Proposal) -> Iterator[Problem]:
    """Edges fit the grid that the family's denoiser cuts pictures into."""
    family, chosen = run.values.get("model_family", ""), run.values["aspect_bucket_alignment"]
    grid = FAMILIES[family].fact("alignment", 8) if family in FAMILIES else 8
    if chosen % grid:
        yield run.problem(
            "aspect_bucket_alignment", f"{family} needs a multiple of {grid} px, got {chosen}"
        )


def prompt_length_of_family(run: Proposal) -> Iterator[Problem]:
    """Prompts are no longer than the family was trained with."""
    family, chosen = run.values.get("model_family", ""), run.says("tokenizer_max_length")
    most = FAMILIES[family].fact("most_tokens") if family in FAMILIES else None
    if chosen and most and chosen > most:
        yield run.problem(
            "tokenizer_max_length", f"{family} takes at most {most} tokens, got {chosen}"
        )


def one_base_model(run: Proposal) -> Iterator[Problem]:
    """A flavour and a path both name the base weights; a single file's flavour, its configs."""
    flavour, path = run.says("model_flavour"), run.says("pretrained_model_name_or_path")
    if flavour and path and not path.endswith(".safetensors"):
        yield run.problem(
            "model_flavour",
            f"{flavour} and pretrained_model_name_or_path {path} both name the base model; "
            f"remove pretrained_model_name_or_path to train {flavour}, or model_flavour to train "
            f"{path}",
        )


def prompt_library_exists(run: Proposal) -> Iterator[Problem]:
    """The file of more prompts is there."""
    path = run.says("user_prompt_library")
    if path is not None and not Path(path).is_file():
        written = run.given["user_prompt_library"].value
        yield run.problem(
            "user_prompt_library",
            f"{written} does not exist; an example to start from: "
            "cp config/user_prompt_library.json.example config/user_prompt_library.json",
        )
        return
    names = ("validation_disable", "validation_disable_unconditional", "validation_prompt")
    settings = ValidationSettings(
        user_prompt_library=path, **{name: run.values[name] for name in names}
    )
    try:
        Prompts.of(settings)
    except ConfigError as error:
        key = "user_prompt_library"
        sentence = str(error).removeprefix(f"{key}: ").replace("\n  ", "; ")
        yield run.problem(key, sentence)


def validation_sizes_fit(run: Proposal) -> Iterator[Problem]:
    """Validation pictures have a size that can be rendered, on the family's grid."""
    family = run.values.get("model_family", "")
    grid = FAMILIES[family].fact("alignment", 8) if family in FAMILIES else 8
    for width, height in run.values["validation_resolution"]:
        if width % grid or height % grid:
            yield run.problem(
                "validation_resolution",
                f"{family} renders multiples of {grid} px, not {width}x{height}; "
                f"{_near(width, grid)}x{_near(height, grid)} is near",
            )
        if min(width, height) < LEAST_PX or max(width, height) > MOST_PX:
            yield run.problem(
                "validation_resolution",
                f"{width}x{height} cannot be rendered; edges of {LEAST_PX} to {MOST_PX} px can",
            )


def _near(edge: int, grid: int) -> int:
    return max(round(edge / grid), 1) * grid


def no_secrets(run: Proposal) -> Iterator[Problem]:
    """Access tokens do not stand in settings."""
    for given in run.given.values():
        if looks_secret(given.value):
            yield given.problem(f"looks like an access token; {SECRET}")


CHECKS: tuple[Check, ...] = (
    *OF_THE_OBJECTIVE,
    *LEARNING_CHECKS,
    *PRECISION_CHECKS,
    *TEXT_ENCODER_CHECKS,
    *NAMED_CHECKS,
    *MEMORY_CHECKS,
    flavour_of_family,
    prediction_of_family,
    prediction_of_zero_snr,
    settings_of_family,
    alignment_of_family,
    prompt_length_of_family,
    one_base_model,
    prompt_library_exists,
    validation_sizes_fit,
    no_secrets,
)


def contradictions(run: Proposal) -> Iterator[Problem]:
    """Everything the checks find."""
    for check in CHECKS:
        yield from check(run)
