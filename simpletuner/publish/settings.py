"""Where the result is uploaded."""

from __future__ import annotations

from simpletuner.core.section import Section, setting


class PublishSettings(Section):
    """What the files say of themselves; nothing leaves the machine unless push_to_hub says so."""

    push_to_hub: bool = setting(False, pending=True)
    """Upload the result when the run ends."""

    push_checkpoints_to_hub: bool = setting(False, pending=True)
    """Upload every checkpoint as well."""

    push_to_hub_background: bool = setting(False, pending=True)
    """Go on training while a checkpoint is uploaded."""

    hub_model_id: str | None = setting(None, pending=True)
    """The repository that is uploaded to, as owner/name; without it, named after the run."""

    model_card_private: bool = setting(True, pending=True)
    """Make a new repository private."""

    model_card_safe_for_work: bool = setting(False, pending=True)
    """State in the model card that the model is safe for work."""

    model_card_note: str | None = setting(None, pending=True)
    """A note for the model card."""

    modelspec_comment: str | None = setting(None)
    """A note in the header of the weights that are written, where other programs show it."""

    ss_tag_frequency: bool = setting(True)
    """Write into the header of the weights how many pictures have each tag, a piece between commas
    of a caption that at least two pictures have; false keeps all words of the captions out."""

    post_checkpoint_script: str | None = setting(None, pending=True)
    """A command that runs after every checkpoint."""
