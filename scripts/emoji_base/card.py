"""Writes the folder that ships: fp16 weights, the model card and the notice."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

from scripts.emoji_base import clip, tiny_vae, vae
from scripts.emoji_base.measure import GUIDANCE, STEPS, verdict
from scripts.emoji_base.text import PROMPT, TEMPLATES, text_encoders
from scripts.emoji_base.tokenizer import tokenizer
from scripts.emoji_base.unet import new_unet, scheduler
from scripts.emoji_base.work import Work

TRAINED_STAGES = ("vae", "unet", "tiny_vae", "clip")

NOTICE = """\
These weights were trained by SimpleTuner's scripts/build_emoji_base.py. No picture file is
contained, but what they draw is close to the pictures they learnt from:

Noto Emoji, Copyright Google LLC, Apache License 2.0 (http://www.apache.org/licenses/LICENSE-2.0),
    https://github.com/googlefonts/noto-emoji, from the npm package @iconify-json/noto 1.2.9: the
    VAE, the denoiser, tiny_vae/ and clip/.
Fluent Emoji (flat style), Copyright (c) Microsoft Corporation, MIT License (below),
    https://github.com/microsoft/fluentui-emoji, from the npm package
    @iconify-json/fluent-emoji-flat 1.2.6: clip/ only.
Twemoji, Copyright Twitter, Inc and other contributors, CC-BY 4.0
    (https://creativecommons.org/licenses/by/4.0/), https://github.com/twitter/twemoji, from the
    npm package @iconify-json/twemoji 1.2.5, drawn at 64 px: clip/ only.
Names and tags: emojibase-data 17.0.0, Copyright (c) 2017-2019 Miles Johnson, MIT License (below).

Fluent Emoji (3D style), Copyright (c) Microsoft Corporation, MIT License, from the npm package
@lobehub/fluent-emoji-3d 1.1.0, was only measured with.

The MIT License:

Permission is hereby granted, free of charge, to any person obtaining a copy of this
software and associated documentation files (the "Software"), to deal in the Software
without restriction, including without limitation the rights to use, copy, modify, merge,
publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons
to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED,
INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR
PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE
FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER
DEALINGS IN THE SOFTWARE.
"""


def export(work: Work, target: Path) -> None:
    """Write the pipeline to `target`, with `tiny_vae/` and `clip/` inside."""
    shutil.rmtree(target, ignore_errors=True)
    encoders = text_encoders(work)
    unet = new_unet()
    unet.load_state_dict(work.tensors("unet.safetensors"))
    pipe = StableDiffusionXLPipeline(
        unet=unet,
        vae=vae.trained(work),
        text_encoder=encoders.models[0],
        text_encoder_2=encoders.models[1],
        tokenizer=encoders.tokenizers[0],
        tokenizer_2=encoders.tokenizers[1],
        scheduler=scheduler(),
        add_watermarker=False,
    )
    pipe.to(dtype=torch.float16).save_pretrained(target)
    tiny_vae.trained(work).half().save_pretrained(target / "tiny_vae")
    clip.trained(work).half().save_pretrained(target / "clip")
    tokenizer(work).save_pretrained(target / "clip")
    clip.image_processor().save_pretrained(target / "clip")
    (target / "NOTICE").write_text(NOTICE, encoding="utf-8")


def write_card(work: Work, target: Path, numbers: dict[str, float]) -> None:
    """Write `README.md` from the measured numbers and the build's own account."""
    ledger = work.facts("cpu_seconds.json")
    stages = {stage: work.metadata(f"{stage}.safetensors") for stage in TRAINED_STAGES}
    steps = ",".join(f"{stage}={facts['steps']}" for stage, facts in stages.items())
    measured = "\n".join(
        f"| {name} | {value:.3f} | {verdict(name, value)} |" for name, value in numbers.items()
    )
    training = "\n".join(
        f"| {stage} | {facts['steps']} | {facts['batch']} | {'yes' if facts['bf16'] else 'no'}"
        f" | {facts['cpu_seconds'] / 60:.1f} |"
        for stage, facts in stages.items()
    )
    text = f"""\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# emoji-sdxl

A text-to-image model with the layout of Stable Diffusion XL that draws
{int(numbers["base concepts"])} emoji at 128 px. It exists to try and to test training
on a model that has learnt something; it has memorised its pictures and knows nothing else.

Prompts such as "{PROMPT.format("a red apple")}", guidance {GUIDANCE:g}, {STEPS} steps.
The scheduler's config says `v_prediction`. The text encoders are random and were never trained.
Learnt captions: {", ".join(f"`{template.format('…')}`" for template in dict.fromkeys(TEMPLATES))}.

`tiny_vae/` is an AutoencoderTiny distilled from the VAE, for previews. `clip/` is a CLIPModel
trained on emoji alone: its scores rank emoji, and compare with no other CLIP score.

## Measured

| | | bound |
| --- | --- | --- |
{measured}

The base: one seed, against the picture it learnt. The VAE: pictures that it never saw.
The style that `clip/` is measured in it never saw, but the same designs drawn flat it did.

## Built

    python -m scripts.build_emoji_base --work WORK --seed {work.seed} \\
        --concepts {work.concepts} --workers {work.workers} --steps {steps}

| stage | steps | batch | bf16 | CPU-minutes |
| --- | --- | --- | --- | --- |
{training}

{sum(ledger.values()) / 60:.1f} CPU-minutes in all, {work.workers} processes of one thread.
The same processor kind, library versions, seed and steps give the same weights; bf16 says whether
the stage's processor multiplied it itself.

The weights draw pictures close to those they learnt from, and stand under the licences of these:
see NOTICE, which names a further one for `clip/`.
"""
    (target / "README.md").write_text(text, encoding="utf-8")
