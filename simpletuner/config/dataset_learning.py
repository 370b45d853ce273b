"""What the datasets together may not ask of learning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simpletuner.config.conditioning import uncontrolled, unfit
from simpletuner.models.families import predicted_by

if TYPE_CHECKING:
    from simpletuner.config.datasets import DatasetsFile, Surroundings


def check_learning(found: DatasetsFile, around: Surroundings) -> None:
    """Every conditioning set belongs to pictures, and some pictures teach something."""
    found.problems += unfit(found.pictures, found.conditioning)
    trained = [each for each in found.pictures if each.settings.dataset_type != "eval"]
    found.problems += uncontrolled(trained, found.conditioning, trains=around.trains)
    _check_offsets(found, around)
    if around.trains == "full":
        found.problems += [
            each.given["is_regularisation_data"].problem(
                "compares with the untouched base, which model_type full does not keep; set"
                " model_type lora, or leave it out"
            )
            for each in found.pictures
            if each.settings.is_regularisation_data and "is_regularisation_data" in each.given
        ]
    drawn = [each for each in found.training if each.probability > 0]
    only_kept = all(each.is_regularisation_data for each in drawn)
    if drawn and only_kept and "init_lora" not in around.given:
        found.problem(
            "holds in every dataset of pictures with a probability above 0, so nothing would be"
            " learned; leave it out of one",
            key="is_regularisation_data",
        )


def _check_offsets(found: DatasetsFile, around: Surroundings) -> None:
    """Noise levels are moved only where they are drawn by the law that can be moved."""
    family, known = around.model_family, predicted_by(around.model_family)
    if known and "flow_matching" not in known:
        why = f"{family} is not trained by flow matching, so it changes nothing; remove it"
    elif (law := around.flow_law) is not None:
        why = f"{law} says which noise levels are drawn, so this changes nothing; remove it"
    else:
        return
    found.problems += [
        each.given["timestep_sampling_offset"].problem(why)
        for each in found.pictures
        if each.settings.timestep_sampling_offset and "timestep_sampling_offset" in each.given
    ]
