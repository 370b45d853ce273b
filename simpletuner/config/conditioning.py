"""The conditioning entries of the datasets file, and which pictures each of them belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from simpletuner.config.source import Given
from simpletuner.core.errors import Problem, did_you_mean
from simpletuner.data.settings import DatasetSettings, EntrySettings

_READ = {
    *EntrySettings.model_fields,
    "conditioning_type",
    "dataset_type",
    "image_background",
    "instance_data_dir",
    "metadata_backend",
    "source_dataset_id",
}
"""The keys that say something of a conditioning entry; the rest it has from its pictures."""


@dataclass(frozen=True)
class Read:
    """An entry of pictures or of conditioning, as it was read.

    Args:
        settings: What it says.
        given: Where it says so, by key.
    """

    settings: DatasetSettings
    given: Mapping[str, Given]

    @property
    def id(self) -> str:
        """Its name."""
        return self.settings.id


def idle_keys(given: Iterable[str]) -> list[str]:
    """Those of the keys of a conditioning entry that change nothing."""
    return sorted(set(given) - _READ)


def paired_with(
    pictures: DatasetSettings, conditioning: Iterable[Read]
) -> tuple[DatasetSettings, ...]:
    """What goes with a dataset of pictures."""
    return tuple(each.settings for each in conditioning if _together(pictures, each.settings))


def unfit(pictures: Sequence[Read], conditioning: Sequence[Read]) -> Iterator[Problem]:
    """What is wrong with how the two belong together."""
    for each in pictures:
        yield from _misnamed(each, [other.id for other in conditioning])
        found = [other for other in conditioning if _together(each.settings, other.settings)]
        yield from _own_pictures(each.settings, found)
        masks, controls = (
            [other.id for other in found if other.settings.conditioning_type == kind]
            for kind in ("mask", "controlnet")
        )
        for several, what in ((masks, "masks"), (controls, "control pictures")):
            if len(several) > 1:
                message = f"{' and '.join(several)} are both {what} of {each.id}; keep one"
                yield each.given["id"].problem(message)
        if masks and each.settings.alpha_as_mask:
            message = f"{masks[0]} has the masks of these pictures; remove one of the two"
            yield each.given["alpha_as_mask"].problem(message)
    for each in conditioning:
        yield from _astray(each, [other.settings for other in pictures])


def uncontrolled(
    pictures: Sequence[Read], conditioning: Sequence[Read], *, trains: str
) -> Iterator[Problem]:
    """Pictures without the control pictures that a ControlNet trains on, or these without a net.

    Args:
        pictures: Those that are trained on.
        conditioning: All there is.
        trains: lora, full, or controlnet.
    """
    controls = [o for o in conditioning if o.settings.conditioning_type == "controlnet"]
    if trains != "controlnet":
        for each in controls:
            yield each.given["conditioning_type"].problem(
                "holds pictures for a ControlNet, and this run trains none; set controlnet true"
                " with model_type full, or set this entry disabled: true"
            )
        return
    for each in pictures:
        if not any(_together(each.settings, other.settings) for other in controls):
            yield each.given["id"].problem(
                f"controlnet trains on control pictures, and {each.id} has none; add an entry with"
                " the conditioning_type controlnet and name it in the conditioning_data of this one"
            )


def _together(pictures: DatasetSettings, other: DatasetSettings) -> bool:
    """True if one of the two names the other."""
    return other.id in pictures.named_conditioning or other.source_dataset_id == pictures.id


def _own_pictures(pictures: DatasetSettings, found: Iterable[Read]) -> Iterator[Problem]:
    """Conditioning that lies where its pictures do, so that each would go with itself."""
    for each in found:
        folders = (pictures.instance_data_dir, each.settings.instance_data_dir)
        if len({folder and folder.resolve() for folder in folders}) == 1:
            what = "mask" if each.settings.conditioning_type == "mask" else "condition"
            yield each.given["instance_data_dir"].problem(
                f"is the folder of {pictures.id} itself, so each picture would be its own {what};"
                f" name the folder with the {what}s"
            )


def _misnamed(pictures: Read, known: Sequence[str]) -> Iterator[Problem]:
    for name in pictures.settings.named_conditioning:
        if name not in known:
            message = f"no conditioning dataset has the id {name!r}{did_you_mean(name, known)}"
            yield pictures.given["conditioning_data"].problem(message)


def _astray(conditioning: Read, pictures: Sequence[DatasetSettings]) -> Iterator[Problem]:
    """Conditioning that belongs to no pictures."""
    ids = [each.id for each in pictures]
    source = conditioning.settings.source_dataset_id
    if source is not None and source not in ids:
        yield conditioning.given["source_dataset_id"].problem(
            f"no dataset of pictures has the id {source!r}{did_you_mean(source, ids)}"
        )
    elif not any(_together(each, conditioning.settings) for each in pictures):
        yield conditioning.given["id"].problem(
            f"{conditioning.id} belongs to no dataset of pictures; name it in the conditioning_data"
            " of one, or set it disabled: true"
        )
