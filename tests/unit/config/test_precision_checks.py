"""Which settings of precision go together."""

from __future__ import annotations

import pytest

from tests.unit.config.workplace import Workplace


@pytest.mark.parametrize(
    ("mixed", "held"),
    [("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32"), ("fp16", "fp32"), ("no", "fp32")],
)
def test_frozen_weights_are_exact_or_in_what_computes(
    place: Workplace, mixed: str, held: str
) -> None:
    place.config(mixed_precision=mixed, base_model_default_dtype=held)
    assert place.load().notes == ()


@pytest.mark.parametrize(("mixed", "held"), [("bf16", "fp16"), ("fp16", "bf16")])
def test_another_half_is_refused(place: Workplace, mixed: str, held: str) -> None:
    place.config(mixed_precision=mixed, base_model_default_dtype=held)
    assert place.messages() == [
        f"base_model_default_dtype: {held} does not go with mixed_precision {mixed}: remove it, or"
        f" set mixed_precision to {held}"
    ]


def test_what_changes_nothing_in_fp32_is_told(place: Workplace) -> None:
    place.config(mixed_precision="no", base_model_default_dtype="bf16")
    assert place.load().notes == (
        "base_model_default_dtype changes nothing: with mixed_precision no all of it is fp32",
    )


def test_dora_needs_a_base_that_gives_its_weights_out(place: Workplace) -> None:
    quanto = {"base_model_precision": "int4-quanto", "use_dora": True}
    place.config(mixed_precision="fp16", **quanto)
    assert place.messages() == [
        "use_dora: cannot read weights in int4-quanto beside fp16; take int8-torchao or nf4-bnb, or"
        " set mixed_precision to no"
    ]
    place.config(mixed_precision="no", **quanto)
    assert place.messages() == []
    place.config(base_model_precision="nf4-bnb", use_dora=True)
    assert place.messages() == []


def test_a_format_of_another_trainer_names_one_that_is_here(place: Workplace) -> None:
    place.config(base_model_precision="int4-torchao")
    (message,) = place.messages()
    assert message.startswith("base_model_precision: int4-torchao is not offered here")
    assert message.endswith("take int4-quanto")


def test_quanto_s_weights_are_opened_in_what_computes(place: Workplace) -> None:
    """In another dtype its step back fails; those of other packages do not mind."""
    place.config(base_model_precision="int4-quanto", base_model_default_dtype="fp32")
    assert place.messages() == [
        "base_model_default_dtype: int4-quanto computes in the dtype of its base, and fp32 is not"
        " mixed_precision bf16; remove it, or set mixed_precision to no"
    ]
    place.config(base_model_precision="nf4-bnb", base_model_default_dtype="fp32")
    assert place.messages() == []
