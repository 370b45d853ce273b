"""The base's two text encoders, random and never trained, and the captions it learns from.

N captions, L tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from scripts.emoji_base.tokenizer import tokenizer
from scripts.emoji_base.work import Work

WIDTHS = (32, 64)
POOLED = 64
PROMPT = "an emoji of {}"
# A concept is learnt in several places of the sentence and beside words that mean nothing here,
# so that a fine-tune can give meaning to a word such as "3D".
TEMPLATES = (
    PROMPT,
    PROMPT,
    PROMPT,
    "{}",
    "a picture of {}",
    "a flat emoji of {}",
    "a small emoji of {}",
    "a cute sticker of {}",
)


@dataclass(frozen=True)
class TextEncoders:
    """Both encoders with their tokenizers, as SDXL has them."""

    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    models: tuple[CLIPTextModel, CLIPTextModelWithProjection]

    @torch.no_grad()
    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Hidden states [N, L, D] of both before their last layer, and the pooled text [N, D']."""
        states = []
        pooled = torch.empty(0)
        for words, model in zip(self.tokenizers, self.models, strict=True):
            options = {"padding": "max_length", "truncation": True, "max_length": 77}
            ids = words(captions, return_tensors="pt", **options).input_ids
            out = model(ids, output_hidden_states=True)
            states.append(out.hidden_states[-2])
            pooled = out[0]
        return torch.cat(states, -1), pooled


def text_encoders(work: Work) -> TextEncoders:
    """The encoders: a function of the seed and the vocabulary alone, rounded to fp16."""
    first, second = tokenizer(work), tokenizer(work, pad_token="!")
    with torch.random.fork_rng():
        torch.manual_seed(work.seed)
        one = CLIPTextModel(_config(first, WIDTHS[0], "quick_gelu"))
        two = CLIPTextModelWithProjection(_config(second, WIDTHS[1], "gelu"))
        for model in (one, two):
            for name, parameter in model.named_parameters():
                if "embedding" in name:
                    parameter.data.normal_(0, 0.3 if "token" in name else 0.1)
                parameter.data = parameter.data.half().float()
    models = (one.eval().requires_grad_(False), two.eval().requires_grad_(False))
    return TextEncoders((first, second), models)


def _config(words: CLIPTokenizer, width: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=POOLED,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act=act,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
