from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.data.size_settings import shapes_of
from tests.unit.config.workplace import PICTURES, Workplace


def test_an_entry_inherits_what_it_does_not_say(place: Workplace) -> None:
    place.config(resolution=512, caption_strategy="textfile", vae_batch_size=2)
    place.datasets("", PICTURES, {**PICTURES, "id": "b", "resolution": 256})

    first, second = place.load().datasets.training

    assert (first.resolution, second.resolution) == (512, 256)
    assert first.caption_strategy == second.caption_strategy == "textfile"
    assert first.vae_batch_size == 2


def test_caches_lie_in_the_output_folder_unless_said_otherwise(place: Workplace) -> None:
    place.config(output_dir="/out")
    place.datasets("", PICTURES, {**PICTURES, "id": "b", "cache_dir_vae": "{output_dir}/x/{id}"})

    datasets = place.load().datasets

    assert [entry.cache_dir_vae for entry in datasets.training] == [
        Path("/out/cache/vae/sdxl/pictures"),
        Path("/out/x/b"),
    ]
    assert datasets.text_embeds.id == "text-embeds"
    assert datasets.text_embeds.cache_dir == Path("/out/cache/text/sdxl")


def test_placeholders_are_filled_in_and_other_braces_stay(place: Workplace) -> None:
    prompt = "{model_family} {env:WHO} {other}"
    place.datasets("", {**PICTURES, "instance_prompt": prompt})

    assert place.load(WHO="me").datasets.training[0].instance_prompt == "sdxl me {other}"
    assert place.messages() == ["instance_prompt: the environment variable WHO is not set"]


def test_placeholders_inside_a_list_are_filled_in_too(place: Workplace) -> None:
    place.datasets("", {**PICTURES, "instance_prompt": ["a {id}", "{env:WHO}"]})

    assert place.load(WHO="me").datasets.training[0].instance_prompt == ("a pictures", "me")
    assert place.messages() == ["instance_prompt: the environment variable WHO is not set"]


@pytest.mark.parametrize("value", [["image"], {"x": 1}])
@pytest.mark.parametrize("key", ["id", "dataset_type"])
def test_a_list_or_an_object_where_a_word_belongs_is_told(
    place: Workplace, key: str, value: object
) -> None:
    place.datasets("", {**PICTURES, key: value})

    assert any(message.startswith(f"{key}: ") for message in place.messages())


@pytest.mark.parametrize(
    ("output", "refused"),
    [("pictures/out", True), ("pictures", True), ("pictures/.out", False), ("out", False)],
)
def test_an_output_folder_inside_a_dataset_is_refused(
    place: Workplace, output: str, refused: bool
) -> None:
    place.config(output_dir=output)
    place.datasets("", PICTURES)

    said = [message for message in place.messages() if "would be trained on" in message]

    assert bool(said) is refused


def test_disabled_entries_are_left_out(place: Workplace) -> None:
    off = {"id": "off", "type": "nonsense", "disable": "true"}
    place.datasets("", off, PICTURES)

    assert [entry.id for entry in place.load().datasets.training] == ["pictures"]


def test_a_key_that_changes_nothing_beside_the_others_is_told(place: Workplace) -> None:
    def noted(**rest: object) -> list[str]:
        place.datasets("", {**PICTURES, **rest})
        begin = "dataset pictures: "
        notes = [note.removeprefix(begin) for note in place.load().notes if note.startswith(begin)]
        return [note.split()[0] for note in notes if "changes nothing" in note]

    assert noted(instance_prompt="sks") == ["instance_prompt"]
    assert noted(instance_prompt="sks", prepend_instance_prompt=True) == []
    sizes = {"maximum_image_size": 900, "target_downsample_size": 800}
    assert noted(crop=False, **sizes) == list(sizes)
    assert noted(crop=True, **sizes) == []
    assert noted(target_downsample_size=800) == ["target_downsample_size"]
    assert noted(csv_cache_dir="kept") == ["csv_cache_dir"]


def test_one_dataset_of_pictures_is_needed(place: Workplace) -> None:
    place.datasets("", {**PICTURES, "disabled": True})
    assert place.messages() == [
        ": no dataset of pictures that is not disabled; one entry needs an instance_data_dir"
    ]

    place.datasets("[]")
    assert place.messages() == [": lists no dataset"]

    place.datasets("{}")
    assert place.messages() == [
        ": must be a list of objects, one for each dataset: [ { … }, { … } ]"
    ]


def test_two_entries_of_one_id_name_each_other(place: Workplace) -> None:
    place.datasets(
        '[{"id": "a", "instance_data_dir": "x"},\n{"id": "a", "instance_data_dir": "y"}]'
    )

    problem = place.problems()[0]

    assert (problem.line, problem.message) == (2, "'a' is the id of the entry on line 1 too")


def test_two_default_text_embeds_are_refused(place: Workplace) -> None:
    text = {"dataset_type": "text_embeds", "default": True}
    place.datasets("", PICTURES, {"id": "a", **text}, {"id": "b", **text})

    (message,) = place.messages()

    assert message.startswith("default: is true on line ")


def test_the_default_text_embeds_are_taken_and_others_named(place: Workplace) -> None:
    first = {"id": "a", "dataset_type": "text_embeds", "cache_dir": "a"}
    place.datasets("", PICTURES, first, {**first, "id": "b", "default": True, "cache_dir": "b"})

    loaded = place.load()

    assert loaded.datasets.text_embeds.cache_dir == place.root / "b"
    assert loaded.notes == ("text_embeds entry a is not used; b keeps all captions",)


def test_slips_in_an_entry_have_their_line(place: Workplace) -> None:
    place.datasets(
        '[{"id": "a",\n"instance_data_dir": "pictures",\n"crop_aspct": "square",\n'
        '"resolution": "many",\n"type": "locl", "aws_secret_access_key": "x"},\n'
        '{"dataset_type": "text_embeds"}]'
    )

    found = {(p.line, p.key, p.message) for p in place.problems()}

    assert (3, "crop_aspct", "unknown setting; did you mean crop_aspect?") in found
    assert (4, "resolution", 'must be a number or a list of numbers, got "many"') in found
    assert (
        5,
        "type",
        'must be one of local, aws, csv, huggingface, webshart (did you mean local?), got "locl"',
    ) in found
    assert any(line == 5 and "secret" in message for line, _, message in found)
    assert (6, "id", "(entry 2) is required") in found


def test_what_does_not_fit_together_names_the_file_it_stands_in(place: Workplace) -> None:
    place.config('{"model_family": "sdxl",\n"maximum_image_size": 2048}')
    place.datasets("", {**PICTURES, "target_downsample_size": None}, {**PICTURES, "id": "b"})

    (problem,) = place.problems()

    assert (problem.file, problem.line, problem.key) == (
        "config/config.json",
        2,
        "maximum_image_size",
    )
    assert "needs target_downsample_size" in problem.message


def test_sizes_in_the_wrong_unit_are_refused(place: Workplace) -> None:
    place.datasets("", {**PICTURES, "resolution": 1024, "resolution_type": "area"})

    assert "counts megapixels under resolution_type area, got 1024" in place.messages()[0]


def test_two_sets_in_one_cache_folder_are_refused(place: Workplace) -> None:
    place.datasets(
        "", {**PICTURES, "cache_dir_vae": "c"}, {**PICTURES, "id": "b", "cache_dir_vae": "c"}
    )

    assert "datasets pictures and b share the folder" in place.messages()[0]


def test_a_list_of_resolutions_is_a_dataset_for_each(place: Workplace) -> None:
    own = {**PICTURES, "id": "cats", "resolution": [512, 768.5], "cache_dir_vae": "/vae/{id}"}
    one = {**PICTURES, "id": "dogs", "resolution": 256, "repeats": 2}
    place.config(resolution=[1024], output_dir="/out")
    place.datasets("", own, one, {**PICTURES, "id": "all", "repeats": 3})

    training = place.load().datasets.training

    assert [(each.id, each.resolution, each.repeats) for each in training] == [
        ("cats-512", 512, 0),
        ("cats-768.5", 768.5, 0),
        ("dogs", 256, 2),
        ("all-1024", 1024, 3),
    ]
    assert [each.cache_dir_vae for each in training] == [
        Path("/vae/cats/512"),
        Path("/vae/cats/768.5"),
        Path("/out/cache/vae/sdxl/dogs"),
        Path("/out/cache/vae/sdxl/all/1024"),
    ]
    assert len({each.instance_data_dir for each in training}) == 1


def test_several_resolutions_may_also_be_a_flag(place: Workplace) -> None:
    training = place.load("--resolution=512,768").datasets.training

    assert [each.id for each in training] == ["pictures-512", "pictures-768"]


def test_two_datasets_of_one_id_by_their_resolutions_are_refused(place: Workplace) -> None:
    place.datasets("", {**PICTURES, "resolution": [512, 768]}, {**PICTURES, "id": "pictures-512"})
    assert place.messages()[0].startswith("id: 2 datasets have the id 'pictures-512'")

    place.datasets("", {**PICTURES, "resolution": [512, 512]})
    assert place.messages()[0].startswith("id: 2 datasets have the id 'pictures-512'")


def test_what_is_wrong_with_each_resolution_is_said_once(place: Workplace) -> None:
    place.datasets("", {**PICTURES, "resolution": [512, 768], "maximum_image_size": 1024})
    (message,) = place.messages()
    assert message.startswith("maximum_image_size: needs target_downsample_size")

    place.datasets("", {**PICTURES, "resolution": [512, 0.5]})
    (message,) = place.messages()
    assert message.startswith("resolution: counts px under resolution_type pixel_area, got 0.5")

    for wrong in ([], [512, -1]):
        place.datasets("", {**PICTURES, "resolution": wrong})
        (message,) = place.messages()
        assert "lists no size" in message or "must be more than 0, got -1" in message


def test_shapes_are_read_as_numbers_and_as_objects(place: Workplace) -> None:
    shapes = {"crop": True, "crop_aspect": "random"}
    listed = [1, {"aspect": 1.5, "weight": 2}, {"aspect": 2}]
    place.datasets("", {**PICTURES, **shapes, "crop_aspect_buckets": listed})
    assert shapes_of(place.load().datasets.training[0]) == [(1, 1), (1.5, 2), (2, 1)]

    for wrong in ([{"ratio": 1}], [0], [{"aspect": 1, "weight": 0}], [{"aspect": 1, "of": 2}]):
        place.datasets("", {**PICTURES, **shapes, "crop_aspect_buckets": wrong})
        (message,) = place.messages()
        assert message.startswith("crop_aspect_buckets: takes numbers above 0, width over height")


def test_bucket_pruning_drops_rare_buckets_unless_said_otherwise(place: Workplace) -> None:
    def policies() -> list[str]:
        return [each.rare_buckets for each in place.load().datasets.training]

    place.datasets("", PICTURES, {**PICTURES, "id": "b", "rare_buckets": "merge"})
    assert policies() == ["keep", "merge"]
    place.config(disable_bucket_pruning=False)
    assert policies() == ["drop", "merge"]
    place.config(disable_bucket_pruning=False, rare_buckets="keep")
    assert policies() == ["keep", "merge"]


def test_a_folder_of_pictures_that_is_not_there_is_only_noted(place: Workplace) -> None:
    place.datasets("", {**PICTURES, "instance_data_dir": "later"})

    assert place.load().notes == ("dataset pictures: later does not exist yet",)


def test_the_file_is_found_beside_the_settings_in_config_and_in_the_output_folder(
    place: Workplace,
) -> None:
    listed = (place.root / "config/multidatabackend.json").rename(place.root / "listed.json")
    place.write("config/mine/config.json", '{"model_family": "sdxl", "output_dir": "out"}')
    assert place.messages("--env=mine") == [
        "data_backend_config: is not set, and multidatabackend.json is not in config/mine, config, "
        "out; it lists the datasets"
    ]

    for folder in ("out", "config", "config/mine"):
        place.write(f"{folder}/multidatabackend.json", listed.read_text())
        assert place.load("--env=mine").files[1].parent == place.root / folder

    assert place.load("--data_backend_config=listed.json").files[1] == listed
    assert place.messages("--data_backend_config=lost.json") == [
        "--data_backend_config: lost.json does not exist"
    ]


def test_a_run_with_nothing_to_draw_is_refused_as_far_as_it_shows_without_pictures(
    place: Workplace,
) -> None:
    place.config(max_train_steps=100)
    place.datasets("", {**PICTURES, "start_step": 2}, {**PICTURES, "id": "b", "start_step": 9})
    assert place.messages() == [
        "start_step: no dataset is drawn from in step 1; let one begin with it"
    ]

    place.datasets("", {**PICTURES, "end_step": 50}, {**PICTURES, "id": "b", "start_step": 52})
    assert place.messages() == [
        "end_step: no dataset is drawn from in step 51; let one last longer, or end the run with"
        " step 50"
    ]

    place.datasets("", {**PICTURES, "end_step": 50}, {**PICTURES, "id": "b", "start_step": 51})
    assert place.messages() == []

    place.config(num_train_epochs=3)
    place.datasets("", {**PICTURES, "end_epoch": 2})
    assert place.messages()[0].startswith("end_epoch: no dataset is drawn from in epoch 3;")

    place.datasets("", {**PICTURES, "end_epoch": 0, "end_step": -1})
    assert place.messages() == []


def test_a_table_in_the_words_of_another_trainer_is_read(place: Workplace) -> None:
    place.datasets(
        "",
        {
            "id": "a",
            "dataset_base_path": "data",
            "dataset_metadata_path": "data/{id}.csv",
            "data_file_keys": "image,video",
            "dataset_repeat": 50,
        },
        {"id": "b", "instance_data_dir": "data", "parquet": {"path": "{id}/t.parquet"}}
        | {"caption_strategy": "parquet"},
    )

    first, second = place.load().datasets.training

    assert first.instance_data_dir == place.root / "data"
    assert first.dataset_metadata_path == place.root / "data/a.csv"
    assert (first.data_file_keys, first.repeats) == (("image", "video"), 49)
    assert (first.metadata_backend, first.caption_strategy) == ("parquet", "csv")
    assert second.parquet is not None
    assert second.parquet.path == place.root / "b/t.parquet"
    assert place.load().pending == ()


def test_masks_take_no_table(place: Workplace) -> None:
    masks = {**PICTURES, "dataset_type": "conditioning", "conditioning_type": "mask"}
    place.datasets("", PICTURES, {**masks, "id": "m", "dataset_metadata_path": "t.csv"})

    assert "a table is for pictures that are trained on" in place.messages()[0]


@pytest.mark.parametrize(
    "key",
    [
        "repeats",
        "dataset_repeat",
        "probability",
        "max_num_samples",
        "train_batch_size",
        "start_epoch",
        "end_epoch",
        "start_step",
        "end_step",
    ],
)
def test_numbers_that_nothing_can_count_to_are_refused(place: Workplace, key: str) -> None:
    table = {"dataset_metadata_path": "t.csv"} if key == "dataset_repeat" else {}
    place.datasets("", {**PICTURES, **table, key: 10**20})
    [message] = place.messages()
    assert message.startswith(f"{key}: must be at most 1000000")
    assert message.endswith(f"got {10**20}")


def test_captions_of_a_table_come_before_the_settings_strategy_and_that_is_told(
    place: Workplace,
) -> None:
    tabled = {**PICTURES, "dataset_metadata_path": "t.csv"}
    told = "not by the settings' caption_strategy textfile; give the entry its own to change that"

    def notes(strategy: str | None, entry: dict[str, object]) -> str:
        place.config(**({} if strategy is None else {"caption_strategy": strategy}))
        place.datasets("", entry)
        return "\n".join(place.load().notes)

    place.write("t.csv", "image,prompt\n")
    assert f"dataset pictures: captions come from t.csv, {told}" in notes("textfile", tabled)
    assert place.load().datasets.training[0].caption_strategy == "csv"
    for quiet in (
        notes(None, tabled),
        notes("csv", tabled),
        notes("parquet", tabled),
        notes("textfile", PICTURES),
        notes("textfile", {**tabled, "caption_strategy": "csv"}),
    ):
        assert "captions come from" not in quiet


def test_a_key_that_a_section_inside_lacks_is_named_with_the_section(place: Workplace) -> None:
    place.datasets('[{"id": "a", "instance_data_dir": "pictures",\n"parquet": {}}]')
    [problem] = place.problems()
    assert (problem.key, problem.message, problem.line) == ("parquet.path", "is required", 2)


def test_a_crop_by_faces_is_refused_with_what_to_do(place: Workplace) -> None:
    place.datasets("", {**PICTURES, "crop_style": "face"})
    (said,) = place.messages()
    assert said.startswith("crop_style: face needs a face detector")
    assert "set center" in said
