"""Tokenizers made in code: nothing is fetched, and two runs give the same bytes.

The trainers of the `tokenizers` package number pieces in hash order, so the pieces are counted
here, in plain Python with a fixed tie-break.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import pairwise

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, T5Tokenizer

Word = tuple[str, ...]

_SUBJECTS = ("a red cube", "a blue ball", "a cat", "a dog", "a house", "a tree", "a man", "a car")
_PLACES = ("on a table", "in the snow", "under the sea", "at night", "on a white background")
_STYLES = (
    "photo",
    "oil painting",
    "watercolor",
    "3d render",
    "line drawing",
    "low quality, blurry",
)
CORPUS = (
    *(f"{style} of {what} {where}" for style in _STYLES for what in _SUBJECTS for where in _PLACES),
    "The quick brown fox jumps over the lazy dog 0123456789 !?.,:;'\"-()[]",
)
_END = "</w>"


def clip_tokenizer(*, pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's layout over a small vocabulary: lower case, ``</w>`` word ends, the specials last.

    Args:
        pad_token: SDXL's and SD3's second tokenizer pads with ``!``.
    """
    vocab, merges = _clip_pieces(900)
    vocab["<|startoftext|>"] = len(vocab)
    vocab["<|endoftext|>"] = len(vocab)  # the highest id: CLIP's pooling looks for it
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77, pad_token=pad_token)


def t5_tokenizer() -> T5Tokenizer:
    """T5's Unigram layout (pad 0, end 1, unknown 2, extra ids last) over the corpus's words."""
    counts = Counter("▁" + word for line in CORPUS for word in line.split())
    total = counts.total()
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    scores = {piece: math.log(count / total) for piece, count in ordered}
    scores |= {piece: -10.0 for piece in map(chr, range(33, 127)) if piece not in scores}
    scores.setdefault("▁", -9.0)
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    extra = [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    return T5Tokenizer(vocab=[*specials, *scores.items(), *extra], model_max_length=512)


def _clip_pieces(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """At most `size` byte-pair pieces of CORPUS, by id, and the merges that make them."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words: Counter[Word] = Counter()
    for line in CORPUS:
        for word in re.findall(r"\w+|[^\w\s]+", line.lower()):
            letters = split.pre_tokenize_str(word)[0][0]
            words[(*letters[:-1], letters[-1] + _END)] += 1
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = dict.fromkeys([*letters, *(letter + _END for letter in letters)])
    merges: list[tuple[str, str]] = []
    while len(pieces) < size:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces["".join(best)] = None
        words = Counter({_merge(word, best): count for word, count in words.items()})
    return {piece: i for i, piece in enumerate(pieces)}, merges


def _merge(word: Word, pair: tuple[str, str]) -> Word:
    merged: list[str] = []
    i = 0
    while i < len(word):
        size = 2 if word[i : i + 2] == pair else 1
        merged.append("".join(word[i : i + size]))
        i += size
    return tuple(merged)
