"""The VAE: trained on crops, then whitened and scaled by folding both into its 1×1 convolutions.

B batch, C channels, H W.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from scripts.emoji_base.parallel import autocast
from scripts.emoji_base.pictures import SIZE, floats, rows
from scripts.emoji_base.work import Work

SCALING = 0.13025  # SDXL's: a program that forgets it fails visibly
CROP = 64
KL_WEIGHT = 1e-3
COLOUR_WEIGHT = 4.0
LATENT_CHANNELS = 4


def new_vae() -> AutoencoderKL:
    """Random weights; 128 px become latents of [4, 32, 32]."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        mid_block_add_attention=False,
        sample_size=SIZE,
        scaling_factor=SCALING,
        force_upcast=False,
    )


class VaeTask:
    """Reconstruct random crops."""

    batch = 8
    rate = 3e-3

    def __init__(self, work: Work) -> None:
        self.module = new_vae()
        self.pictures = work.tensors("pictures.safetensors")["noto"]
        self.rows = torch.tensor(rows(work, "train"))

    def loss(self, generator: torch.Generator, count: int) -> Tensor:
        """Absolute and squared error, the error of 8×8 means, and the KL of the posterior."""
        pixels = self._crops(generator, count)
        with autocast():
            posterior = self.module.encode(pixels).latent_dist
            latents = posterior.mean.float()
            noise = torch.randn(latents.shape, generator=generator)
            made = self.module.decode(latents + posterior.std.float() * noise).sample
        return reconstruction_loss(made.float(), pixels) + KL_WEIGHT * _kl(posterior)

    def _crops(self, generator: torch.Generator, count: int) -> Tensor:
        """[count, 3, 64, 64] in [-1, 1]."""
        chosen = torch.randint(len(self.rows), (count,), generator=generator)
        corners = torch.randint(SIZE - CROP + 1, (count, 2), generator=generator).tolist()
        flips = torch.rand(count, generator=generator) < 0.5
        crops = []
        for row, (y, x), flip in zip(self.rows[chosen], corners, flips, strict=True):
            crop = self.pictures[row][:, y : y + CROP, x : x + CROP]
            crops.append(crop.flip(2) if flip else crop)
        return floats(torch.stack(crops))


def reconstruction_loss(made: Tensor, pixels: Tensor) -> Tensor:
    """Means over [B, 3, H, W]. The error of 8×8 means sees lost hue, which the others hardly do."""
    error = made - pixels
    colour = functional.avg_pool2d(error, 8).square().mean()
    return 0.3 * error.abs().mean() + error.square().mean() + COLOUR_WEIGHT * colour


def _kl(posterior: object) -> Tensor:
    mean, logvar = posterior.mean.float(), posterior.logvar.float()  # type: ignore[attr-defined]
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def fold(vae: AutoencoderKL, mean: Tensor, covariance: Tensor, variance: Tensor) -> None:
    """Whiten the latents and divide them by the scaling factor, inside the VAE.

    Afterwards `latents * SCALING` have mean 0 and covariance 1 where they had `mean` and
    `covariance`, and the reconstruction of the posterior's mean is what it was. The posterior's
    spread becomes one constant per channel: a rotated diagonal is no diagonal.

    Args:
        mean: Of the posterior means: [C].
        covariance: Of the posterior means: [C, C].
        variance: The mean variance of the posterior: [C].
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    values = values.clamp(min=1e-6)
    whiten = vectors @ torch.diag(values.rsqrt()) @ vectors.T / SCALING
    restore = vectors @ torch.diag(values.sqrt()) @ vectors.T * SCALING
    mean = mean.double()
    channels = len(mean)
    inner, outer = vae.quant_conv, vae.post_quant_conv
    with torch.no_grad():
        weight = inner.weight[:channels, :, 0, 0].double()
        inner.weight[:channels, :, 0, 0] = (whiten @ weight).float()
        bias = inner.bias[:channels].double() - mean
        inner.bias[:channels] = (whiten @ bias).float()
        inner.weight[channels:] = 0
        inner.bias[channels:] = (whiten.square() @ variance.double()).log().float()
        weight = outer.weight[:, :, 0, 0].double()
        outer.weight[:, :, 0, 0] = (weight @ restore).float()
        outer.bias += (weight @ mean).float()


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior means and variances, each [N, C, H/4, W/4], of uint8 pictures."""
    means, variances = [], []
    for part in pictures.split(16):
        posterior = vae.encode(floats(part)).latent_dist
        means.append(posterior.mean)
        variances.append(posterior.var)
    return torch.cat(means), torch.cat(variances)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] of latents that are not scaled."""
    return torch.cat([vae.decode(part).sample.clamp(-1, 1) for part in latents.split(16)])


def moments(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [C] and covariance [C, C] over all places of [N, C, H, W], in double."""
    flat = latents.double().transpose(0, 1).flatten(1)
    return flat.mean(1), torch.cov(flat)


def make_latents(work: Work) -> None:
    """Fold the trained VAE, and write what the later stages learn from.

    ``vae_folded.safetensors``; ``latents.safetensors`` with scaled latents (`base`: the base's
    pictures, `spread` [C]: their posterior's standard deviation; `train` with its reconstructions
    `made`, uint8, for the Tiny AutoEncoder).
    """
    vae = trained(work, "vae.safetensors")
    pictures = work.tensors("pictures.safetensors")["noto"]
    chosen = rows(work, "train")
    some = pictures[chosen[:: max(1, len(chosen) // 512)]]
    means, variances = encode(vae, some)
    fold(vae, *moments(means), variances.mean((0, 2, 3)))
    work.save_tensors("vae_folded.safetensors", vae.state_dict())
    means, _ = encode(vae, some)
    made = decode(vae, means).add(1).mul(127.5).round().to(torch.uint8)
    base, variances = encode(vae, pictures[rows(work, "base")])
    spread = variances.mean((0, 2, 3)).sqrt() * SCALING
    scaled = {"base": base * SCALING, "train": means * SCALING}
    work.save_tensors("latents.safetensors", {**scaled, "made": made, "spread": spread})


def trained(work: Work, name: str = "vae_folded.safetensors") -> AutoencoderKL:
    """The VAE of a file in the work folder."""
    vae = new_vae()
    vae.load_state_dict(work.tensors(name))
    return vae.eval()
