from __future__ import annotations

from pathlib import Path

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


def test_disabled_entries_are_left_out(place: Workplace) -> None:
    off = {"id": "off", "type": "nonsense", "disable": "true"}
    place.datasets("", off, PICTURES)

    assert [entry.id for entry in place.load().datasets.training] == ["pictures"]


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
    assert (4, "resolution", 'must be a number, got "many"') in found
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
