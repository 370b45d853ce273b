"""Where captions come from and what is done to them: the caption keys of the settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator

from simpletuner.core.section import Section, setting
from simpletuner.data.caption_edits import PLACEHOLDER
from simpletuner.data.captions import CAPTION_STRATEGIES


def _one_spelling(value: object) -> object:
    return "instanceprompt" if value == "instance_prompt" else value


_WITH_TEXTS = tuple(
    name
    for name, row in CAPTION_STRATEGIES.items()
    if row.fact("reads_text") or row.fact("reads_table")
)

CaptionStrategy = Annotated[str, BeforeValidator(_one_spelling)]


class CaptionSettings(Section):
    """What may be said of captions once for all datasets and again for each of them."""

    caption_strategy: CaptionStrategy = setting("filename", table=CAPTION_STRATEGIES)
    """Where captions come from."""

    instance_prompt: str | tuple[str, ...] | None = setting(None)
    """The caption of every picture under the strategy instanceprompt, or what is put before each
    caption; of a list, each picture draws one at every visit."""

    prepend_instance_prompt: bool = setting(False)
    """Put instance_prompt and a blank before every caption."""

    only_instance_prompt: bool = setting(False)
    """Use instance_prompt alone as the caption, whatever the strategy is."""

    trigger_word: str | None = setting(None)
    """What stands in captions in the place of [trigger]: the word that will call up what is
    trained."""

    prepend_trigger_word: bool = setting(False)
    """Put trigger_word and a blank before every caption that does not hold it; not in a
    regularisation set."""

    caption_dropout_probability: float = setting(0.1, ge=0, le=1)
    """The share of visits at which the caption is empty, so that guidance has something to push
    away from; larger follows prompts less."""


class CaptionShuffleSettings(Section):
    """Other orders of the tags of a caption, drawn once and kept; each visit draws one of them."""

    enable: bool = setting(False)
    """Shuffle captions."""

    count: int = setting(1, ge=1, unit="orders")
    """How many orders of each caption are drawn; each is encoded, so more takes cache."""

    seed: int | None = setting(None, ge=0)
    """Decides the orders; without it, the seed of the run."""

    split_on: Literal["comma", "space", "period"] = setting("comma")
    """What stands between tags."""

    position_start: int = setting(0, ge=0, unit="tags")
    """So many tags at the start stay where they are."""

    include_original: bool = setting(True)
    """The caption as it was written is drawn too."""


class DatasetCaptionSettings(CaptionSettings):
    """What is said of captions for one dataset."""

    disable_multiline_split: bool = setting(False)
    """Take a text file as one caption, where otherwise each line is one and each visit draws one
    of them."""

    caption_shuffle: CaptionShuffleSettings | None = setting(None)
    """How the tags of a caption are shuffled; what is put before or after them stays there."""

    caption_filter_list: Path | tuple[str, ...] | None = setting(None, path=True)
    """What is removed from captions; without it, what the text_embeds entry says."""

    caption_prefix: str = setting("")
    """Text before every caption, with a blank between."""

    caption_suffix: str = setting("")
    """Text after every caption, with a blank between unless it begins with a punctuation mark."""

    default_caption: str | None = setting(None)
    """The text of pictures without a text file, under caption_strategy textfile, where the file
    default.txt in a picture's folder comes first; under caption_strategy parquet, csv, json and
    jsonl that of pictures for which the table has none."""


def caption_contradictions(entry: DatasetCaptionSettings) -> Iterator[tuple[str, str]]:
    """What does not fit together in an entry with inherited values: a key, and what to do."""
    wants = [
        key
        for key, wanted in (
            ("caption_strategy", entry.caption_strategy == "instanceprompt"),
            ("prepend_instance_prompt", entry.prepend_instance_prompt),
            ("only_instance_prompt", entry.only_instance_prompt),
        )
        if wanted
    ]
    if wants and not entry.instance_prompt:
        yield wants[0], "needs instance_prompt: the text to use"
    prompts = entry.instance_prompt
    if isinstance(prompts, tuple) and not all(map(str.strip, prompts)):
        yield "instance_prompt", "holds an empty text; remove it from the list"
    if entry.prepend_trigger_word and not entry.trigger_word:
        yield "prepend_trigger_word", "needs trigger_word: the word to use"
    if not entry.trigger_word:
        for key in ("instance_prompt", "caption_prefix", "caption_suffix", "default_caption"):
            if PLACEHOLDER in str(entry.__dict__[key]):
                yield key, f"holds {PLACEHOLDER}; set trigger_word to what stands for it"
    if entry.default_caption is not None and entry.caption_strategy not in _WITH_TEXTS:
        names = ", ".join(_WITH_TEXTS)
        yield "default_caption", f"is read under caption_strategy {names} only; remove it"
    shuffle = entry.caption_shuffle
    if shuffle is not None and "enable" not in shuffle.model_fields_set:
        yield "caption_shuffle", 'changes nothing by itself; write "enable": true into it'
