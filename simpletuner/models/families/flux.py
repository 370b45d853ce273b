"""FLUX.1."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from simpletuner.core.files import read_json
from simpletuner.models.encoders import TrainedEncoder
from simpletuner.models.family import Family, Flavour
from simpletuner.models.original import OriginalNames, Place, fused, vae_names_of
from simpletuner.models.single_file import FilePart

if TYPE_CHECKING:
    from torch import Tensor, nn

    from simpletuner.core.seeds import Seeds
    from simpletuner.core.types import Batch, Draw, Embeds, Sample

_PATCH = 2
"""Latent cells along the edge of one token: the pipeline packs them, not the transformer."""
_MASK = "prompt_embeds_mask"
_GUIDANCE = "guidance"
_GUIDANCE_SETTINGS = (
    "flux_guidance_mode",
    "flux_guidance_value",
    "flux_guidance_min",
    "flux_guidance_max",
)

_CONTEXT = ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
_ALL = ("to_k", "to_q", "to_v", "to_out.0", *_CONTEXT)
_CONTEXT_FFS = ("ff_context.net.0.proj", "ff_context.net.2")
_FFS = ("ff.net.0.proj", "ff.net.2", *_CONTEXT_FFS, "proj_mlp", "proj_out")
_NORMS = ("norm.linear", "norm1.linear", "norm1_context.linear")
_NANO = ("single_transformer_blocks.7.proj_out",)


def _original_names() -> Iterator[tuple[str, Place]]:
    """The modules of Black Forest Labs' own release.

    A single block's first matrix makes query, key, value and the inside of the feed-forward, which
    is four times as wide.
    """
    block, there = "transformer_blocks.{i}", "double_blocks.{i}"
    for whose, names, out, ff, norm in (
        ("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm1"),
        ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context", None),
    ):
        ours = [f"{block}.attn.{name}" for name in names]
        yield from fused(ours, f"{there}.{whose}_attn.qkv")
        yield f"{block}.attn.{out}", Place(f"{there}.{whose}_attn.proj")
        added = "" if whose == "img" else "added_"
        yield from _norms(f"{block}.attn.norm_{added}", f"{there}.{whose}_attn.norm")
        yield f"{block}.{ff}.net.0.proj", Place(f"{there}.{whose}_mlp.0")
        yield f"{block}.{ff}.net.2", Place(f"{there}.{whose}_mlp.2")
        yield f"{block}.{norm or 'norm1_context'}.linear", Place(f"{there}.{whose}_mod.lin")
    block, there = "single_transformer_blocks.{i}", "single_blocks.{i}"
    parts = [f"{block}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    yield from fused(parts, f"{there}.linear1", (1, 1, 1, 4))
    yield from _norms(f"{block}.attn.norm_", f"{there}.norm")
    yield f"{block}.proj_out", Place(f"{there}.linear2")
    yield f"{block}.norm.linear", Place(f"{there}.modulation.lin")
    for ours, original in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")):
        for n, name in ((1, "in_layer"), (2, "out_layer")):
            linear = f"time_text_embed.{ours}_embedder.linear_{n}"
            yield linear, Place(f"{original}_in.{name}")
    yield "x_embedder", Place("img_in")
    yield "context_embedder", Place("txt_in")
    yield "norm_out.linear", Place("final_layer.adaLN_modulation.1", swapped=True)
    yield "proj_out", Place("final_layer.linear")


def _norms(ours: str, there: str) -> Iterator[tuple[str, Place]]:
    for letter, name in (("q", "query"), ("k", "key")):
        yield f"{ours}{letter}", Place(f"{there}.{name}_norm", leaves=(("weight", "scale"),))


class Flux(Family):
    """FLUX.1: a transformer with CLIP and T5, trained by flow matching.

    Four latent cells, a square, are one token; every token has a place (0, y, x), a text token
    (0, 0, 0). T5's states are the text tokens, CLIP's pooled state goes in beside the timestep. dev
    and its kin are distilled from guided answers and are told how strong the guidance was (Meng et
    al. 2023, arXiv 2210.03142); schnell is not. The transformer rounds the timestep to its own
    dtype, in training as in the stock pipeline.
    """

    name = "flux"
    title = "FLUX.1"
    architecture = "flux-1-dev"
    kohya_version = "flux1"
    pipeline = "FluxPipeline"
    flavours = MappingProxyType(
        {
            "krea": Flavour("black-forest-labs/FLUX.1-Krea-dev", "dev with another taste"),
            "dev": Flavour("black-forest-labs/FLUX.1-dev", "12 billion, distilled guidance"),
            "schnell": Flavour("black-forest-labs/FLUX.1-schnell", "distilled to four steps"),
            "fluxbooru": Flavour("terminusresearch/fluxbooru-v0.3", "dev for drawn characters"),
        }
    )
    prediction_types = ("flow_matching",)
    own_settings = (
        "flux_fast_schedule",
        "tokenizer_max_length",
        "t5_padding",
        *_GUIDANCE_SETTINGS,
        "flux_attention_masked_training",
        "flux_lora_target",
    )
    most_tokens = 512
    alignment = 16
    denoiser = "transformer"
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    text_outputs = ("prompt_embeds", "pooled_prompt_embeds", None)
    trained_text = MappingProxyType({"text_encoder": TrainedEncoder("lora_te1", "clip_l")})
    layouts = MappingProxyType(
        {"prompt_embeds": "stack", "pooled_prompt_embeds": "stack", _MASK: "stack"}
    )
    lora_targets = _ALL
    lora_target_sets = MappingProxyType(
        {
            "all": _ALL,
            "mmdit": _ALL,
            "context": _CONTEXT,
            "context+ffs": (*_CONTEXT, *_CONTEXT_FFS),
            "all+ffs": (*_ALL, *_FFS),
            "all+ffs+embedder": (*_ALL, *_FFS, "x_embedder"),
            "ai-toolkit": (*_ALL, *_FFS, *_NORMS),
            "tiny": (*_NANO, "single_transformer_blocks.20.proj_out"),
            "nano": _NANO,
        }
    )
    original = OriginalNames(_original_names())
    single_file = MappingProxyType(
        {
            "transformer": FilePart(
                "model.diffusion_model.", lambda _: Flux.original, ("double_blocks.",)
            ),
            "vae": FilePart("vae.", vae_names_of, ("first_stage_model.",)),
            "text_encoder": FilePart("text_encoders.clip_l.transformer."),
            "text_encoder_2": FilePart("text_encoders.t5xxl.transformer."),
        }
    )
    whole_in_one_file = False

    @classmethod
    def flavour_of(cls, names: Collection[str]) -> str:
        """All but schnell are told a guidance strength."""
        return "dev" if any("guidance_in." in name for name in names) else "schnell"

    # --- the checkpoint ------------------------------------------------------------------------

    @cached_property
    def patch(self) -> int:
        """See Family; the transformer's own patch_size, 1, is counted in tokens."""
        return _PATCH

    @cached_property
    def guided(self) -> bool:
        """The transformer is told a guidance strength: dev and its kin, not schnell."""
        config = read_json(self.checkpoint.folder / self.denoiser / "config.json")
        return bool(config.get("guidance_embeds"))

    @property
    def idle_settings(self) -> tuple[str, ...]:
        """The guidance to tell, where none is told."""
        return () if self.guided else _GUIDANCE_SETTINGS

    # --- text ----------------------------------------------------------------------------------

    @property
    def text_options(self) -> Mapping[str, Any]:
        """The tokens of T5, 256 for schnell, and what stands behind a caption."""
        length = self.options.get("tokenizer_max_length")
        return MappingProxyType(
            {
                "tokenizer_max_length": length or (self.most_tokens if self.guided else 256),
                "t5_padding": self.options.get("t5_padding", "unmodified"),
            }
        )

    @property
    def prompt_arguments(self) -> Mapping[str, Any]:
        """Both encoders see one prompt, and T5 our number of tokens."""
        length = self.text_options["tokenizer_max_length"]
        return MappingProxyType({"prompt_2": None, "max_sequence_length": length})

    @property
    def encoder_arguments(self) -> Mapping[str, Any]:
        """The stock pipeline encodes one prompt at a time, guided or not."""
        return self.prompt_arguments

    def encode_text(self, pipe: Any, captions: Sequence[str]) -> list[Embeds]:
        """As the stock pipeline does, and which of T5's tokens [L] are the caption's own."""
        tokens = pipe.tokenizer_2(
            list(captions),
            padding="max_length",
            max_length=self.text_options["tokenizer_max_length"],
            truncation=True,
            return_tensors="pt",
        )
        masks = tokens.attention_mask.bool().to(pipe.device)  # [B, L]
        encoded = super().encode_text(pipe, captions)
        clears = self.text_options["t5_padding"] == "zero"
        found: list[Embeds] = []
        for each, mask in zip(encoded, masks, strict=True):
            text = each["prompt_embeds"]
            cleared = text.masked_fill(~mask[:, None], 0) if clears else text
            found.append({**each, "prompt_embeds": cleared, _MASK: mask})
        return found

    # --- the transformer -----------------------------------------------------------------------

    @property
    def step_options(self) -> Mapping[str, Any]:
        """Guidance, and who attends to whom."""
        names = ["flux_attention_masked_training"]
        if self.guided:
            mode, value, *ends = _GUIDANCE_SETTINGS
            names += [mode, *(ends if self.options.get(mode) == "random-range" else [value])]
        return {name: self.options[name] for name in names if name in self.options}

    def drawn(self, samples: Sequence[Sample], epoch: int, seeds: Seeds) -> dict[str, Tensor]:
        """The guidance strength of each draw, under random-range."""
        if not self.guided or self.options.get("flux_guidance_mode") != "random-range":
            return {}
        import torch

        low, high = self.options["flux_guidance_min"], self.options["flux_guidance_max"]
        shares = [
            seeds.uniform(_GUIDANCE, epoch, each.occurrence, each.dataset, each.id)
            for each in samples
        ]
        return {_GUIDANCE: low + (high - low) * torch.tensor(shares, dtype=torch.float32)}

    @property
    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """T5's tokens and which of them are the caption; what CLIP says of the whole."""
        length = self.text_options["tokenizer_max_length"]
        return {
            "prompt_embeds": (length, self._config["joint_attention_dim"]),
            "pooled_prompt_embeds": (self._config["pooled_projection_dim"],),
            "prompt_embeds_mask": (length,),
        }

    def predict(
        self,
        denoiser: nn.Module,
        draw: Draw,
        batch: Batch,
        residuals: Mapping[str, Any] = MappingProxyType({}),
    ) -> Tensor:
        """One transformer call on packed latents."""
        text: Tensor = batch.embeds["prompt_embeds"]  # [B, L, D]
        height, width = draw.noisy.shape[-2:]
        answer: Tensor = denoiser(
            pack(draw.noisy).to(text.dtype),
            timestep=draw.timestep / 1000,
            guidance=self._guidance(draw, batch),
            encoder_hidden_states=text,
            pooled_projections=batch.embeds["pooled_prompt_embeds"],
            txt_ids=draw.noisy.new_zeros(text.shape[1], 3),
            img_ids=_places(draw.noisy),
            joint_attention_kwargs=self._attention(draw, batch),
            return_dict=False,
            **residuals,
        )[0]
        return unpack(answer.float(), height, width)

    def _guidance(self, draw: Draw, batch: Batch) -> Tensor | None:
        """[B] the strength of guidance to tell, fp32."""
        import torch

        if not self.guided:
            return None
        value = self.options.get("flux_guidance_value", 1.0)
        return batch.controls.get(_GUIDANCE, torch.full_like(draw.timestep, value))

    def _attention(self, draw: Draw, batch: Batch) -> dict[str, Tensor] | None:
        """Who is attended to, [B, 1, 1, L + N] bool: all, or without the padding of the text."""
        import torch

        if not self.options.get("flux_attention_masked_training"):
            return None
        mask = batch.embeds[_MASK]
        assert isinstance(mask, torch.Tensor)
        picture = mask.new_ones(len(mask), self.tokens(draw.noisy))
        return {"attention_mask": torch.cat((mask, picture), dim=1)[:, None, None]}

    # --- sampling ------------------------------------------------------------------------------

    def sampler_arguments(
        self, embeds: Embeds, negative: Embeds, width: int, height: int
    ) -> dict[str, Any]:
        """The stock pipeline attends to all of the text, so the mask stays here."""
        plain, empty = (
            {name: value for name, value in each.items() if name != _MASK}
            for each in (embeds, negative)
        )
        return super().sampler_arguments(plain, empty, width, height)

    def sampled_latents(self, output: Tensor, width: int, height: int) -> Tensor:
        """See Family."""
        cells = 8 * _PATCH  # px along the edge of a token
        return unpack(output, height // cells * _PATCH, width // cells * _PATCH)


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] to tokens [B, H/2 · W/2, C · 4], row by row; a token has its cells last."""
    batch, channels, height, width = latents.shape
    cells = latents.reshape(batch, channels, height // _PATCH, _PATCH, width // _PATCH, _PATCH)
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The way back: [B, H/2 · W/2, C · 4] to [B, C, H, W]; sizes in latent cells."""
    cells = tokens.unflatten(2, (-1, _PATCH, _PATCH))
    grid = cells.unflatten(1, (height // _PATCH, width // _PATCH))
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _places(latents: Tensor) -> Tensor:
    """[N, 3] fp32: (0, y, x) of each token of latents [B, C, H, W], row by row."""
    import torch

    height, width = (edge // _PATCH for edge in latents.shape[-2:])
    rows = torch.arange(height, dtype=torch.float32, device=latents.device)
    columns = torch.arange(width, dtype=torch.float32, device=latents.device)
    grid = torch.cartesian_prod(rows, columns)
    return torch.nn.functional.pad(grid, (1, 0))


FAMILY = Flux
