"""The embedded base, the example's pictures, and what its CLIPModel says of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from PIL import Image
from torch.nn import functional
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from scripts.measure_emoji_example import BASE as FOLDER
from scripts.measure_emoji_example import EXAMPLE, pictures_of

EMOJI = "simpletuner/emoji-sdxl"


@cache
def fluent() -> tuple[torch.Tensor, tuple[str, ...]]:
    """The example's pictures [N, 3, 128, 128] in [-1, 1] on white, and what each shows."""
    found = {
        name.replace("-", " "): pixels
        for part in ("data", "held_out")
        for name, pixels in pictures_of(EXAMPLE / part).items()
    }
    return torch.stack(list(found.values())), tuple(found)


@torch.no_grad()
def likeness(pixels: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
    """The cosines of the embedded CLIPModel, [pictures, captions]."""
    model = CLIPModel.from_pretrained(FOLDER / "clip", dtype=torch.float32)
    words = CLIPTokenizer.from_pretrained(FOLDER / "clip")
    reader = CLIPImageProcessorPil.from_pretrained(FOLDER / "clip")
    shown = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in (pixels * 127.5 + 127.5).byte()]
    ids = words(list(captions), padding=True, return_tensors="pt")
    texts = model.get_text_features(**ids).pooler_output
    images = model.get_image_features(**reader(shown, return_tensors="pt")).pooler_output
    return functional.normalize(images, dim=-1) @ functional.normalize(texts, dim=-1).T
