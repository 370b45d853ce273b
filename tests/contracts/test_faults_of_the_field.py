"""What trainers of this field were measured to get wrong: each has a test here or by its name."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from simpletuner.models.families import FAMILIES
from simpletuner.optim.settings import OptimizerSettings
from tests.unit.adapters.test_lora import exported, forward, lora_on, trained

TESTS: MappingProxyType[str, tuple[str, ...]] = MappingProxyType(
    {
        "an average of bf16 weights stands still": ("test_it_follows_bf16_weights_that_drift",),
        "a cosine is none, restarts are constant": (
            "test_cosine_is_half_way_down_in_the_middle_of_the_run",
            "test_the_curves_are_their_formulas_at_every_step",
        ),
        "an optimizer's second moment stands still, weights decay without a rate": (
            "test_bf16_rounding_has_no_bias_over_10000_steps",
            "test_two_hundred_steps_are_those_of_the_paper",
            "test_two_hundred_steps_are_those_of_the_library_alone",
            "test_a_thousand_steps_in_bf16_go_as_far_as_in_fp32",
        ),
        "stratified draws cancel a bias of timesteps": (
            "test_a_bias_has_its_density_for_every_batch_size",
            "test_an_expert_is_trained_at_its_share_of_the_schedule_alone",
        ),
        "min-SNR follows the repository's prediction type, and is 0 / 0 at zero SNR": (
            "test_min_snr_is_the_vectors_of_sdxl_by_what_is_predicted",
            "test_min_snr_has_a_limit_where_there_is_no_signal",
            "test_a_prediction_type_the_user_sets_reaches_loss_and_sampler",
        ),
        "a second prediction of a batch sees what the first changed": (
            "test_predict_leaves_its_inputs_as_they_were",
            "test_regularisation_holds_the_prediction_near_that_of_the_base",
        ),
        "DoRA does not start": (
            "test_every_way_an_adapter_begins_starts_and_is_read_back",
            "test_every_algorithm_learns_and_is_read_back",
        ),
        "a family's LoRA is not saved": (
            "test_the_exported_lora_is_the_trained_model_in_the_stock_pipeline",
        ),
        "the last validation never runs": (
            "test_the_stock_pipeline_with_the_lora_paints_the_validation_picture",
        ),
        "what was seen is lost at a resume": (
            "test_twelve_steps_are_five_a_kill_and_seven_to_the_bit",
        ),
        "sizes and timesteps are rounded to bf16": (
            "test_size_conditioning_is_that_of_the_file_the_crop_and_the_target",
            "test_the_timestep_reaches_the_model_unrounded_in_a_bf16_run",
        ),
        "a masked loss is not normalised, its probability not heeded": (
            "test_a_normalised_mask_weighs_as_much_whatever_its_size",
            "test_masks_are_applied_at_a_share_of_visits_that_the_seed_decides",
        ),
        "clipping never clips": (
            "test_gradients_are_clipped_by_their_global_norm",
            "test_gradients_are_bounded_unless_told_otherwise",
        ),
        "a flavour is a checkpoint of another family": (
            "test_a_flavour_is_named_in_one_family_alone",
        ),
    }
)
"""Of the sixteen, eval loss and stale benchmark pictures belong to validation."""


def test_the_tests_that_are_named_are_there() -> None:
    root = Path(__file__).parents[1]
    written = "\n".join(path.read_text(encoding="utf-8") for path in root.rglob("test_*.py"))
    names = set(re.findall(r"def (test_\w+)\(", written))
    assert {name for named in TESTS.values() for name in named} <= names


WAYS = [
    (init, dora, rank_stable)
    for init, dora, rank_stable in product(
        ("default", "gaussian", "pissa", "olora"), (False, True), (False, True)
    )
    if not (dora and init in ("pissa", "olora"))  # refused at check
]


@pytest.mark.parametrize(("init", "dora", "rank_stable"), WAYS)
def test_every_way_an_adapter_begins_starts_and_is_read_back(
    tiny_sdxl: Path, tmp_path: Path, init: str, dora: bool, rank_stable: bool
) -> None:
    lora = lora_on(tiny_sdxl, lora_init_type=init, use_dora=dora, use_rslora=rank_stable)
    with lora.disabled():
        base = forward(lora.denoiser)
    torch.testing.assert_close(forward(lora.denoiser), base, atol=1e-5, rtol=1e-5)
    trained(lora)
    assert (forward(lora.denoiser) - base).abs().max() > 1e-3
    assert lora.verify(exported(lora, tmp_path)).largest_error <= 1e-6


def test_gradients_are_bounded_unless_told_otherwise() -> None:
    settings = OptimizerSettings()
    assert (settings.max_grad_norm, settings.grad_clip_method) == (1.0, "norm")


def test_a_flavour_is_named_in_one_family_alone() -> None:
    """Its architecture is checked when it is opened; here no repository stands in two families."""
    owners: dict[str, set[str]] = {}
    for name, row in FAMILIES.items():
        if not row.pending:
            for flavour in row.load().flavours.values():
                owners.setdefault(flavour.repo, set()).add(name)
    assert owners
    assert {repo: names for repo, names in owners.items() if len(names) > 1} == {}
