"""A byte-pair vocabulary of our own in CLIP's layout, counted from the emoji's names and tags."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from scripts.emoji_base.work import Work

Word = tuple[str, ...]
Pair = tuple[str, str]

PIECES = 3000
_COMMON = """
an emoji of a the and in on at with without under over style picture photo drawing painting icon
sticker flat 3d render shiny glossy plastic clay glass soft light dark small big large tiny red
orange yellow green blue purple pink brown black white grey gray background colorful cute happy
sad old new wooden golden silver low high quality blurry simple bright winter summer night day
0 1 2 3 4 5 6 7 8 9 . , : ; ! ? ' " - ( ) [ ] / & + * # % @ _
"""


def make_vocabulary(work: Work) -> None:
    """Count the pieces and write them to ``vocabulary.json``."""
    concepts = work.facts("concepts.json")
    lines = [_COMMON] * 20
    for concept in concepts:
        lines += [concept["label"]] * 3 + concept["tags"]
    vocab, merges = byte_pairs(lines, PIECES - 2)
    vocab["<|startoftext|>"] = len(vocab)
    vocab["<|endoftext|>"] = len(vocab)  # the highest id: CLIP's pooling looks for it
    work.save_facts("vocabulary.json", {"vocab": vocab, "merges": merges})
    print(f"tokenizer: {len(vocab)} pieces")


def tokenizer(work: Work, *, pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """The tokenizer; SDXL's second one pads with ``!``."""
    facts: dict[str, Any] = work.facts("vocabulary.json")
    merges = [tuple(pair) for pair in facts["merges"]]
    return CLIPTokenizer(
        vocab=facts["vocab"], merges=merges, model_max_length=77, pad_token=pad_token
    )


def byte_pairs(lines: list[str], size: int) -> tuple[dict[str, int], list[Pair]]:
    """At most `size` byte-pair pieces of `lines`, by id, and the merges that make them.

    Equal counts are ordered by the pieces, so two runs give the same.
    """
    words = _words(lines)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters)])
    spelled = [list(word) for word in words]
    counts = list(words.values())
    pairs: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    for i, word in enumerate(spelled):
        for pair in pairwise(word):
            pairs[pair] += counts[i]
            where[pair].add(i)
    merges: list[Pair] = []
    while len(pieces) < size and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        merges.append(best)
        pieces["".join(best)] = None
        for i in sorted(where[best]):
            for pair in pairwise(spelled[i]):
                pairs[pair] -= counts[i]
                where[pair].discard(i)
            spelled[i] = _merged(spelled[i], best)
            for pair in pairwise(spelled[i]):
                pairs[pair] += counts[i]
                where[pair].add(i)
        pairs = +pairs
    return {piece: i for i, piece in enumerate(pieces)}, merges


def _words(lines: list[str]) -> Counter[Word]:
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words: Counter[Word] = Counter()
    for line in lines:
        for word in re.findall(r"[^\W\d_]+|\d|[^\w\s]+|_", line.lower()):
            letters = split.pre_tokenize_str(word)[0][0]
            words[(*letters[:-1], f"{letters[-1]}</w>")] += 1
    return words


def _merged(word: list[str], pair: Pair) -> list[str]:
    merged: list[str] = []
    i = 0
    while i < len(word):
        size = 2 if tuple(word[i : i + 2]) == pair else 1
        merged.append("".join(word[i : i + size]))
        i += size
    return merged
