"""A Tiny AutoEncoder distilled from the folded VAE, for previews.

It speaks the denoiser's latents, which are the VAE's already scaled.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from scripts.emoji_base.parallel import autocast
from scripts.emoji_base.pictures import SIZE, floats
from scripts.emoji_base.vae import LATENT_CHANNELS, reconstruction_loss
from scripts.emoji_base.work import Work

CROP = 16  # latent pixels


def new_tiny_vae() -> AutoencoderTiny:
    """Random weights; factor 4 as the VAE has."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(2, 2, 1),
        latent_channels=LATENT_CHANNELS,
    )


class TinyVaeTask:
    """Decode as the VAE decodes, and encode as it encodes."""

    batch = 16
    rate = 3e-3

    def __init__(self, work: Work) -> None:
        self.module = new_tiny_vae()
        tensors = work.tensors("latents.safetensors")
        self.latents, self.made, self.spread = tensors["train"], tensors["made"], tensors["spread"]

    def loss(self, generator: torch.Generator, count: int) -> Tensor:
        """The decoder's error against the VAE's pictures, and the encoder's against its latents."""
        chosen = torch.randint(len(self.latents), (count,), generator=generator)
        corners = torch.randint(SIZE // 4 - CROP + 1, (count, 2), generator=generator).tolist()
        latents, pixels = [], []
        for row, (y, x) in zip(chosen.tolist(), corners, strict=True):
            latents.append(self.latents[row, :, y : y + CROP, x : x + CROP])
            pixels.append(self.made[row, :, 4 * y : 4 * (y + CROP), 4 * x : 4 * (x + CROP)])
        target, wanted = torch.stack(latents), floats(torch.stack(pixels))
        noise = torch.randn(target.shape, generator=generator) * self.spread.view(1, -1, 1, 1)
        with autocast():
            made = self.module.decode(target + noise).sample
            encoded = self.module.encode(wanted).latents
        error = encoded.float() - target
        return reconstruction_loss(made.float(), wanted) + 0.1 * error.square().mean()


def trained(work: Work) -> AutoencoderTiny:
    """The trained one."""
    tiny = new_tiny_vae()
    tiny.load_state_dict(work.tensors("tiny_vae.safetensors"), strict=False)
    return tiny.eval()
