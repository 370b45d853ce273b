"""The denoiser: SDXL's added conditions at small widths, learnt as v-prediction.

B batch, C channels, H W, L tokens, D width.
"""

from __future__ import annotations

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn

from scripts.emoji_base.parallel import autocast
from scripts.emoji_base.pictures import SIZE, rows
from scripts.emoji_base.text import POOLED, TEMPLATES, WIDTHS, text_encoders
from scripts.emoji_base.vae import LATENT_CHANNELS
from scripts.emoji_base.work import Work

TIME_WIDTH = 16
TIME_IDS = (SIZE, SIZE, 0, 0, SIZE, SIZE)  # original size, corner, target size
EMPTY_SHARE = 0.05  # captions replaced by the empty prompt …
ZERO_SHARE = 0.05  # … and by zeros, which the stock pipeline takes for no negative prompt


def new_unet() -> UNet2DConditionModel:
    """Each residual branch starts at zero. The 4×4 grid has no attention but in the middle."""
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=(
            "DownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 8, 8),  # by its old name; it is the number of heads
        use_linear_projection=True,
        transformer_layers_per_block=1,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=len(TIME_IDS) * TIME_WIDTH + POOLED,
        cross_attention_dim=sum(WIDTHS),
    )
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out")) or name == "conv_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return unet


def scheduler() -> EulerDiscreteScheduler:
    """SDXL's noise, with the prediction type in its config."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )


def make_captions(work: Work) -> None:
    """Write ``captions.safetensors``: every caption of the base's concepts, encoded once.

    `states` [1 + concepts × templates, L, D] and `pooled`; the first row is the empty prompt.
    """
    concepts = work.facts("concepts.json")
    captions = [""]
    for row in rows(work, "base"):
        captions += [template.format(concepts[row]["phrase"]) for template in TEMPLATES]
    encoders = text_encoders(work)
    states, pooled = encoders.encode(captions)
    work.save_tensors("captions.safetensors", {"states": states, "pooled": pooled})


class UnetTask:
    """Predict v (Salimans and Ho, arXiv:2202.00512) at uniform timesteps, unweighted."""

    batch = 16
    rate = 4e-3

    def __init__(self, work: Work) -> None:
        self.module = new_unet()
        latents, captions = (
            work.tensors("latents.safetensors"),
            work.tensors("captions.safetensors"),
        )
        self.latents, self.spread = latents["base"], latents["spread"].view(1, -1, 1, 1)
        self.states, self.pooled = captions["states"], captions["pooled"]
        self.alphas = scheduler().alphas_cumprod

    def loss(self, generator: torch.Generator, count: int) -> Tensor:
        """The mean squared error of v."""
        chosen = torch.randint(len(self.latents), (count,), generator=generator)
        clean = self.latents[chosen]
        clean = clean + self.spread * torch.randn(clean.shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randint(len(self.alphas), (count,), generator=generator)
        signal = self.alphas[t].sqrt().view(-1, 1, 1, 1)
        sigma = (1 - self.alphas[t]).sqrt().view(-1, 1, 1, 1)
        states, pooled = self._captions(chosen, generator)
        conditions = {
            "text_embeds": pooled,
            "time_ids": torch.tensor([TIME_IDS]).float().expand(count, -1),
        }
        with autocast():
            made = self.module(
                signal * clean + sigma * noise, t, states, added_cond_kwargs=conditions
            ).sample
        return (made.float() - (signal * noise - sigma * clean)).square().mean()

    def _captions(self, chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """States [B, L, D] and pooled [B, D'] of one caption for each concept."""
        templates = torch.randint(len(TEMPLATES), chosen.shape, generator=generator)
        captions = 1 + chosen * len(TEMPLATES) + templates
        lot = torch.rand(chosen.shape, generator=generator)
        captions = torch.where(lot < EMPTY_SHARE, 0, captions)
        kept = ((lot < EMPTY_SHARE) | (lot >= EMPTY_SHARE + ZERO_SHARE)).float()
        states = self.states[captions] * kept.view(-1, 1, 1)
        return states, self.pooled[captions] * kept.view(-1, 1)
