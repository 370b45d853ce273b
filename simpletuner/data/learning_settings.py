"""What is learned of pictures, and which sets go with them: these keys of the settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from simpletuner.core.section import Section, setting


class LearningSettings(Section):
    """What may be said of learning once for all datasets and again for each of them."""

    masked_loss_probability: float = setting(1.0, ge=0, le=1)
    """The share of visits at which a picture's mask is applied to its loss; at the others all of
    the picture is learned."""


class DatasetLearningSettings(LearningSettings):
    """What is said of learning for one dataset."""

    is_regularisation_data: bool = setting(False)
    """Train towards what the untouched base model says of these pictures, to keep what it knew;
    costs a second prediction each. It needs adapters beside the base: a full fine-tune has no
    untouched base left."""

    timestep_sampling_offset: float = setting(0.0, ge=-10, le=10)
    """Moves the noise levels that a flow model is trained at with these pictures, where they are
    drawn mostly from the middle; below 0 to less noise, above to more, 1 is a standard
    deviation."""

    alpha_as_mask: bool = setting(False)
    """Learn what is opaque: the transparency of a picture is its mask, and image_background still
    shows through it."""

    conditioning_type: (
        Literal["controlnet", "mask", "reference_strict", "reference_loose"] | None
    ) = setting(None, pending=("reference_strict", "reference_loose"))
    """What the pictures of a conditioning dataset are to those they belong to; each has the path of
    its picture, but for the ending. A mask says by its brightness how much is learned: white all,
    black nothing; a picture for a controlnet is what the net sees. These and a strict reference
    have the shape of their picture and are resized and cut as it is; a loose reference has its own
    shape."""

    conditioning_data: str | tuple[str, ...] | None = setting(None)
    """The conditioning datasets that belong to this one, by id."""

    conditioning: dict[str, Any] | tuple[dict[str, Any], ...] | None = setting(None, pending=True)
    """Conditioning pictures to be made from this dataset, such as edges or masks."""

    source_dataset_id: str | None = setting(None)
    """The dataset that a conditioning dataset belongs to, if that one does not name it in
    conditioning_data."""

    @property
    def named_conditioning(self) -> tuple[str, ...]:
        """The ids in conditioning_data."""
        named = self.conditioning_data or ()
        return (named,) if isinstance(named, str) else named


def learning_contradictions(entry: DatasetLearningSettings) -> Iterator[tuple[str, str]]:
    """What does not fit together in an entry: a key, and what to do."""
    if entry.source_dataset_id is not None:
        yield (
            "source_dataset_id",
            "is for dataset_type conditioning; the pictures name what belongs to them in"
            " conditioning_data",
        )
