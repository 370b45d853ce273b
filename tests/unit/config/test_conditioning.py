"""Which conditioning entries are read, and which pictures they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.config.workplace import PICTURES, Workplace

MASKS: dict[str, Any] = {
    "id": "masks",
    "dataset_type": "conditioning",
    "conditioning_type": "mask",
    "instance_data_dir": "masks",
}
NAMING = {**PICTURES, "conditioning_data": "masks"}


def masks(place: Workplace) -> dict[str, str]:
    paired = place.load().datasets.paired
    return {
        name: each.id
        for name, entries in paired.items()
        for each in entries
        if each.conditioning_type == "mask"
    }


def test_masks_belong_to_the_pictures_that_name_them_or_that_they_name(place: Workplace) -> None:
    for entries in (
        (NAMING, MASKS),
        (MASKS, NAMING),
        (MASKS, {**NAMING, "conditioning_data": ["masks"]}),
        (PICTURES, {**MASKS, "source_dataset_id": "pictures"}),
        (NAMING, {**MASKS, "source_dataset_id": "pictures"}),
    ):
        place.datasets("", *entries, {**PICTURES, "id": "other"})
        loaded = place.load()
        assert masks(place) == {"pictures": "masks"}
        assert [each.id for each in loaded.datasets.training] == ["pictures", "other"]
        assert loaded.pending == ()


def test_every_resolution_of_a_list_has_the_masks(place: Workplace) -> None:
    place.datasets("", {**NAMING, "resolution": [256, 512]}, MASKS)
    assert masks(place) == {"pictures-256": "masks", "pictures-512": "masks"}

    place.datasets("", {**NAMING, "resolution": [256, 512]}, MASKS, {**MASKS, "id": "pictures-512"})
    assert any("2 datasets have the id 'pictures-512'" in said for said in place.messages())


def test_a_conditioning_type_makes_an_entry_conditioning(place: Workplace) -> None:
    place.datasets("", NAMING, {k: v for k, v in MASKS.items() if k != "dataset_type"})
    assert masks(place) == {"pictures": "masks"}

    place.datasets("", NAMING, {k: v for k, v in MASKS.items() if k != "conditioning_type"})
    (said,) = place.messages()
    assert "conditioning_type is missing: say mask, controlnet" in said


def test_masks_lie_in_a_folder(place: Workplace) -> None:
    place.datasets("", NAMING, {**MASKS, "type": "csv", "csv_file": "x.csv"})
    assert place.messages() == ["type: type csv is not for conditioning, which lies in a folder"]

    place.datasets("", NAMING, {k: v for k, v in MASKS.items() if k != "instance_data_dir"})
    (said,) = place.messages()
    assert said.endswith("instance_data_dir is missing: name the folder with the pictures")


def test_keys_of_masks_that_change_nothing_are_named(place: Workplace) -> None:
    place.datasets("", NAMING, {**MASKS, "resolution": 64, "crop": True, "caption_strategy": None})
    noted = [note for note in place.load().notes if "change nothing" in note]
    assert noted == [
        "dataset masks: crop, resolution change nothing, for its pictures are treated as those they"
        " belong to"
    ]


def test_what_names_nothing_is_refused(place: Workplace) -> None:
    for entries, said in (
        ((NAMING,), "conditioning_data: no conditioning dataset has the id 'masks'"),
        (
            ({**PICTURES, "conditioning_data": "mask"}, MASKS),
            "conditioning_data: no conditioning dataset has the id 'mask'; did you mean masks?",
        ),
        (
            (PICTURES, MASKS),
            "id: masks belongs to no dataset of pictures; name it in the conditioning_data of one,"
            " or set it disabled: true",
        ),
        (
            (PICTURES, {**MASKS, "source_dataset_id": "picture"}),
            "source_dataset_id: no dataset of pictures has the id 'picture'; did you mean"
            " pictures?",
        ),
        (
            (
                {**PICTURES, "source_dataset_id": "masks"},
                {**MASKS, "source_dataset_id": "pictures"},
            ),
            "source_dataset_id: is for dataset_type conditioning; the pictures name what belongs to"
            " them in conditioning_data",
        ),
        (
            ({**NAMING, "conditioning_data": ["masks", "more"]}, MASKS, {**MASKS, "id": "more"}),
            "id: masks and more are both masks of pictures; keep one",
        ),
        (
            ({**NAMING, "alpha_as_mask": True}, MASKS),
            "alpha_as_mask: masks has the masks of these pictures; remove one of the two",
        ),
    ):
        place.datasets("", *entries)
        assert said in place.messages()


def test_the_folder_of_the_pictures_is_not_that_of_their_masks(place: Workplace) -> None:
    (place.root / "link").symlink_to(place.root / "pictures")
    for folder in ("pictures", "./pictures/", "link"):
        place.datasets("", NAMING, {**MASKS, "instance_data_dir": folder})
        assert place.messages() == [
            "instance_data_dir: is the folder of pictures itself, so each picture would be its own"
            " mask; name the folder with the masks"
        ]
    place.datasets("", NAMING, {**MASKS, "instance_data_dir": "pictures/masks"})
    assert place.messages() == []


EDGES = {**MASKS, "id": "edges", "conditioning_type": "controlnet"}


def test_other_conditioning_waits_and_is_not_trained_on(place: Workplace) -> None:
    style = {**MASKS, "id": "style", "conditioning_type": "reference_strict"}
    place.datasets("", {**PICTURES, "conditioning_data": ["masks", "style"]}, MASKS, style)

    loaded = place.load()

    assert [(p.key, p.message) for p in loaded.pending] == [
        ("conditioning_type", "reference_strict is not built yet")
    ]
    assert [each.id for each in loaded.datasets.training] == ["pictures"]
    assert masks(place) == {"pictures": "masks"}
    assert [each.id for each in loaded.datasets.paired["pictures"]] == ["masks", "style"]


def test_one_set_of_control_pictures_is_enough(place: Workplace) -> None:
    place.config(controlnet=True, model_type="full")
    depth = {**EDGES, "id": "depth", "instance_data_dir": "depth"}
    place.datasets("", {**PICTURES, "conditioning_data": ["edges", "depth"]}, EDGES, depth)
    assert place.messages() == [
        "id: edges and depth are both control pictures of pictures; keep one"
    ]
    place.config()
    loose = [{**each, "conditioning_type": "reference_loose"} for each in (EDGES, depth)]
    place.datasets("", {**PICTURES, "conditioning_data": ["edges", "depth"]}, *loose)
    assert place.messages() == []


def test_a_controlnet_and_control_pictures_need_each_other(place: Workplace) -> None:
    (place.root / "edges").mkdir()
    edges = {**EDGES, "instance_data_dir": "edges", "source_dataset_id": "pictures"}
    place.datasets("", PICTURES, edges)
    assert place.messages() == [
        "conditioning_type: holds pictures for a ControlNet, and this run trains none; set"
        " controlnet true with model_type full, or set this entry disabled: true"
    ]
    place.config(controlnet="true", model_type="full")
    kept = {**PICTURES, "id": "kept", "dataset_type": "eval"}
    place.datasets("", PICTURES, edges, kept)
    assert place.messages() == []

    place.datasets("", PICTURES, {**PICTURES, "id": "more"}, edges)
    assert place.messages() == [
        "id: controlnet trains on control pictures, and more has none; add an entry with the"
        " conditioning_type controlnet and name it in the conditioning_data of this one"
    ]


def test_a_controlnet_is_refused_where_it_cannot_train(place: Workplace) -> None:
    (place.root / "edges").mkdir()
    place.datasets(
        "", {**PICTURES, "conditioning_data": "edges"}, {**EDGES, "instance_data_dir": "edges"}
    )
    place.config(controlnet=True, model_type="full", model_family="flux")
    assert place.messages() == [
        "controlnet: cannot be trained for flux, only for sd1x and sd3 and sdxl; remove it, or set"
        " model_family to one of these"
    ]
    place.config(controlnet=True)
    assert [m for m in place.messages() if "which is not here; set model_type full" in m]
    named = {"controlnet_model_name_or_path": "./nets/edges"}
    place.config(controlnet=True, model_type="full", **named)
    assert [m for m in place.messages() if "nets/edges is not a folder with a ControlNet" in m]
    place.write("nets/edges/controlnet/config.json", "{}")
    place.config(
        controlnet=True,
        model_type="full",
        controlnet_model_name_or_path=str(place.root / "nets/edges"),
        base_model_precision="int8-quanto",
        mixed_precision="no",
    )
    assert place.messages() == []
    place.datasets("", PICTURES)
    place.config(**named)
    assert place.messages() == [
        "controlnet_model_name_or_path: changes nothing without controlnet; set that, or remove"
        " this"
    ]


def test_an_eval_set_is_never_trained_on(place: Workplace) -> None:
    held_out = {**PICTURES, "id": "held out", "dataset_type": "eval", "repeats": 3}
    place.datasets("", PICTURES, held_out)

    loaded = place.load()

    assert loaded.pending == ()
    assert [each.id for each in loaded.datasets.training] == ["pictures"]
    assert [each.id for each in loaded.datasets.evaluation] == ["held out"]
    said = "dataset held out: repeats changes nothing, for it is never trained on"
    assert said in loaded.notes


def test_an_eval_set_alone_is_nothing_to_train_on(place: Workplace) -> None:
    place.datasets("", {**PICTURES, "dataset_type": "eval"})
    assert place.messages() == [
        ": no dataset to train on, only to measure by; one entry needs dataset_type image"
    ]


def test_captions_are_kept_where_a_dataset_says(place: Workplace) -> None:
    other = {"id": "other", "dataset_type": "text_embeds", "cache_dir": "/other"}
    default = {"id": "usual", "dataset_type": "text_embeds", "default": True}
    named = {**PICTURES, "id": "b", "text_embed_cache": "other"}
    place.datasets("", PICTURES, named, other, default)

    datasets = place.load().datasets

    assert datasets.text_embeds.id == "usual"
    assert {name: each.id for name, each in datasets.captions.items()} == {"b": "other"}
    assert datasets.captions["b"].cache_dir == Path("/other")
    assert not [note for note in place.load().notes if "not used" in note]

    place.datasets("", {**PICTURES, "text_embeds": "othr"}, other)
    assert place.messages() == [
        "text_embeds: no text_embeds entry has the id 'othr'; did you mean other?"
    ]


def test_encoded_pictures_are_kept_where_a_dataset_says(place: Workplace) -> None:
    kept = {"id": "kept", "dataset_type": "image_embeds", "cache_dir": "/kept"}
    place.datasets("", {**PICTURES, "image_embeds": "kept"}, kept)
    (entry,) = place.load().datasets.training
    assert entry.cache_dir_vae == Path("/kept/pictures")

    place.datasets("", {**PICTURES, "image_embeds": "kept", "cache_dir_vae": "/own"}, kept)
    assert place.messages() == [
        "image_embeds: cache_dir_vae says where the pictures are kept; remove one of the two"
    ]
    place.datasets("", {**PICTURES, "image_embeds": "keep"}, kept)
    assert place.messages() == [
        "image_embeds: no image_embeds entry has the id 'keep'; did you mean kept?"
    ]
    place.datasets("", PICTURES, kept)
    said = "image_embeds entry kept is not used; no dataset names it in image_embeds"
    assert said in place.load().notes


@pytest.mark.parametrize("value", ["", " , "])
def test_no_stage_of_a_start_is_skipped(place: Workplace, value: str) -> None:
    place.datasets("", {**PICTURES, "skip_file_discovery": value})
    assert place.messages() == []
    place.datasets("", {**PICTURES, "skip_file_discovery": "vae,metadata"})
    assert place.messages() == [
        "skip_file_discovery: is not needed: a start looks at what changed and at nothing else;"
        " remove it"
    ]


def test_regularisation_alone_teaches_nothing(place: Workplace) -> None:
    kept = {**PICTURES, "id": "kept", "is_regularization_data": True}
    place.datasets("", kept)
    assert place.messages() == [
        "is_regularisation_data: holds in every dataset of pictures with a probability above 0, so"
        " nothing would be learned; leave it out of one"
    ]
    alone = place.messages()

    place.datasets("", {**PICTURES, "probability": 0}, kept)
    assert place.messages() == alone

    place.datasets("", PICTURES, kept)
    first, second = place.load().datasets.training
    assert (first.is_regularisation_data, second.is_regularisation_data) == (False, True)


def test_noise_levels_are_moved_only_where_their_law_can_be(place: Workplace) -> None:
    moved = {**PICTURES, "timestep_sampling_offset": -0.5}
    place.datasets("", moved)
    assert place.messages() == [
        "timestep_sampling_offset: sdxl is not trained by flow matching, so it changes nothing;"
        " remove it"
    ]
    place.config(model_family="sd3")
    assert place.messages() == []
    assert place.load().datasets.training[0].timestep_sampling_offset == -0.5
    place.config(model_family="sd3", flow_use_beta_schedule=True)
    assert place.messages() == [
        "timestep_sampling_offset: flow_use_beta_schedule says which noise levels are drawn, so"
        " this changes nothing; remove it"
    ]


def test_the_share_of_masked_visits_is_inherited(place: Workplace) -> None:
    place.config(masked_loss_probability=0.25)
    place.datasets("", PICTURES, {**PICTURES, "id": "b", "masked_loss_probability": 1})
    shares = [each.masked_loss_probability for each in place.load().datasets.training]
    assert shares == [0.25, 1]
