"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from simpletuner.core.errors import ModelError
from simpletuner.models.control import PICTURE, ControlNet
from simpletuner.models.encoders import TrainedEncoder
from simpletuner.models.family import Family, Flavour
from simpletuner.models.original import OriginalNames, Place, fused, vae_names_of
from simpletuner.models.single_file import FilePart

if TYPE_CHECKING:
    from torch import Tensor, nn

    from simpletuner.core.types import Batch, Draw, Embeds, Place
    from simpletuner.models.family import Shrink


def _original_names() -> Iterator[tuple[str, Place]]:
    """The modules of Stability's own release.

    The last block's norm1_context makes scale and shift alone, in the other order.
    """
    block, streams = "transformer_blocks.{i}", "joint_blocks.{i}"
    for attention, whose, names in (
        ("attn", "x_block", ("to_q", "to_k", "to_v", "to_out.0")),
        ("attn2", "x_block", ("to_q", "to_k", "to_v", "to_out.0")),
        ("attn", "context_block", ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    ):
        there = f"{streams}.{whose}.{attention}"
        yield from fused([f"{block}.{attention}.{name}" for name in names[:3]], f"{there}.qkv")
        yield f"{block}.{attention}.{names[3]}", Place(f"{there}.proj")
        added = "added_" if whose == "context_block" else ""
        for letter in "qk":
            yield f"{block}.{attention}.norm_{added}{letter}", Place(f"{there}.ln_{letter}")
    for ours, whose in (("ff", "x_block"), ("ff_context", "context_block")):
        yield f"{block}.{ours}.net.0.proj", Place(f"{streams}.{whose}.mlp.fc1")
        yield f"{block}.{ours}.net.2", Place(f"{streams}.{whose}.mlp.fc2")
    yield f"{block}.norm1.linear", Place(f"{streams}.x_block.adaLN_modulation.1")
    there = f"{streams}.context_block.adaLN_modulation.1"
    yield f"{block}.norm1_context.linear", Place(there, swapped=True)
    yield "pos_embed", Place("pos_embed", leaves=(("pos_embed", ""),))
    for ours, original in (("timestep", "t_embedder"), ("text", "y_embedder")):
        for n, place in ((1, 0), (2, 2)):
            name = f"time_text_embed.{ours}_embedder.linear_{n}"
            yield name, Place(f"{original}.mlp.{place}")
    yield "pos_embed.proj", Place("x_embedder.proj")
    yield "context_embedder", Place("context_embedder")
    yield "norm_out.linear", Place("final_layer.adaLN_modulation.1", swapped=True)
    yield "proj_out", Place("final_layer.linear")


def _first_half(transformer: nn.Module, halvings: int) -> nn.Module:
    """A net with a copy of half of the blocks, as those of the original release have it."""
    from diffusers import SD3ControlNetModel

    layers = int(transformer.config.num_layers)  # type: ignore[union-attr,arg-type]
    net: nn.Module = SD3ControlNetModel.from_transformer(
        transformer, num_layers=layers // 2, num_extra_conditioning_channels=0
    )
    return net


def _without_pooled(module: nn.Module) -> bool:
    """True for a ControlNet that is given zeros for the pooled text, and latents without a shift.

    The denoiser's config knows no such thing.
    """
    config: Any = module.config
    return bool(config.get("force_zeros_for_pooled_projection"))


class SD3(Family):
    """SD3: a transformer with two CLIP text encoders and T5, trained by flow matching.

    A prompt is the states of both CLIPs side by side (77 tokens), then along the sequence those of
    T5 (N tokens); the CLIPs' pooled states go in beside the timestep (Esser et al. 2024, arXiv
    2403.03206, section 4).
    """

    name = "sd3"
    title = "Stable Diffusion 3 and 3.5"
    architecture = "stable-diffusion-3"
    kohya_version = "sd3"
    pipeline = "StableDiffusion3Pipeline"
    flavours = MappingProxyType(
        {
            "medium": Flavour("stabilityai/stable-diffusion-3.5-medium", "3.5, 2.5 billion"),
            "large": Flavour("stabilityai/stable-diffusion-3.5-large", "3.5, 8 billion"),
            "medium-3.0": Flavour(
                "stabilityai/stable-diffusion-3-medium-diffusers", "3.0, 2 billion"
            ),
        }
    )
    prediction_types = ("flow_matching",)
    own_settings = (
        "tokenizer_max_length",
        "t5_padding",
        "sd3_clip_uncond_behaviour",
        "sd3_t5_uncond_behaviour",
    )
    most_tokens = 154
    alignment = 16
    denoiser = "transformer"
    text_parts = (
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "text_encoder_3",
        "tokenizer_3",
    )
    text_outputs = ("prompt_embeds", None, "pooled_prompt_embeds", None)
    trained_text = MappingProxyType(
        {
            "text_encoder": TrainedEncoder("lora_te1", "clip_l"),
            "text_encoder_2": TrainedEncoder("lora_te2", "clip_g"),
        }
    )
    layouts = MappingProxyType({"prompt_embeds": "stack", "pooled_prompt_embeds": "stack"})
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")
    original = OriginalNames(_original_names())
    control = ControlNet(
        net="SD3ControlNetModel",
        pipeline="StableDiffusion3ControlNetPipeline",
        argument="control_image",
        picture="latents",
        begin=_first_half,
        shared=(
            "in_channels",
            "patch_size",
            "num_attention_heads",
            "attention_head_dim",
            "joint_attention_dim",
            "pooled_projection_dim",
        ),
        fixed=MappingProxyType({"extra_conditioning_channels": 0, "use_pos_embed": True}),
    )
    single_file = MappingProxyType(
        {
            "transformer": FilePart(
                "model.diffusion_model.", lambda _: SD3.original, ("joint_blocks.",)
            ),
            "vae": FilePart("first_stage_model.", vae_names_of, ("vae.",)),
            "text_encoder": FilePart("text_encoders.clip_l.transformer."),
            "text_encoder_2": FilePart("text_encoders.clip_g.transformer."),
            "text_encoder_3": FilePart("text_encoders.t5xxl.transformer."),
        }
    )
    whole_in_one_file = False

    @classmethod
    def flavour_of(cls, names: Collection[str]) -> str:
        """3.5 large has 38 blocks, 3.5 medium attends twice in some."""
        told = [name.removeprefix("model.diffusion_model.") for name in names]
        if any(name.startswith("joint_blocks.37.") for name in told):
            return "large"
        return "medium" if any(".attn2." in name for name in told) else "medium-3.0"

    @property
    def text_options(self) -> Mapping[str, Any]:
        """The length of T5's part, what stands behind a caption, and what an empty one becomes."""
        clip = self.options.get("sd3_clip_uncond_behaviour", "empty_string")
        return MappingProxyType(
            {
                "tokenizer_max_length": self.options.get("tokenizer_max_length")
                or self.most_tokens,
                "t5_padding": self.options.get("t5_padding", "unmodified"),
                "sd3_clip_uncond_behaviour": clip,
                "sd3_t5_uncond_behaviour": self.options.get("sd3_t5_uncond_behaviour") or clip,
            }
        )

    @property
    def prompt_arguments(self) -> Mapping[str, Any]:
        """All encoders see one prompt, and T5 our number of tokens: the stock default is 256."""
        length = self.text_options["tokenizer_max_length"]
        return MappingProxyType({"prompt_2": None, "prompt_3": None, "max_sequence_length": length})

    def unused(self, module: nn.Module) -> frozenset[str]:
        """The last block asks nothing on behalf of the text: what it would say goes nowhere.

        A denoiser's has a part of it, a ControlNet's has all; and a net that is given zeros for the
        pooled text learns nothing of that.
        """
        config: Any = module.config
        idle = [
            f"transformer_blocks.{config.num_layers - 1}.{name}."
            for name in ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "ff_context")
        ]
        if _without_pooled(module):
            idle.append("time_text_embed.text_embedder.linear_1.weight")
        names = [name for name, _ in module.named_parameters()]
        return frozenset(name for name in names if name.startswith(tuple(idle)))

    def open_text(self, place: Place, shrink: Shrink | None = None) -> Any:
        """See Family.

        Raises:
            ModelError: A checkpoint without T5.
        """
        if not self.checkpoint.has("text_encoder_3"):
            raise ModelError(
                f"{self.checkpoint.label} has no T5 (text_encoder_3)",
                fix="name a checkpoint with all three text encoders",
            )
        return super().open_text(place, shrink)

    def encode_text(self, pipe: Any, captions: Sequence[str]) -> list[Embeds]:
        """As the stock pipeline does, then what `text_options` ask for."""
        tokens = pipe.tokenizer_3(
            list(captions),
            padding="max_length",
            max_length=self.text_options["tokenizer_max_length"],
            truncation=True,
            return_tensors="pt",
        )
        masks = tokens.attention_mask.bool().to(pipe.device)  # [B, N]
        encoded = super().encode_text(pipe, captions)
        return [
            self._arranged(each, mask, empty=caption == "")
            for each, mask, caption in zip(encoded, masks, captions, strict=True)
        ]

    def _arranged(self, embeds: Embeds, mask: Tensor, *, empty: bool) -> Embeds:
        """One caption's conditioning; `mask` [N] is true where T5 saw a token of it."""
        import torch

        options, text = self.text_options, embeds["prompt_embeds"]  # [77 + N, D]
        clip, t5 = text[: -len(mask)], text[-len(mask) :]
        pooled = embeds["pooled_prompt_embeds"]
        if options["t5_padding"] == "zero":
            t5 = t5.masked_fill(~mask[:, None], 0)
        if empty and options["sd3_t5_uncond_behaviour"] == "zero":
            t5 = torch.zeros_like(t5)
        if empty and options["sd3_clip_uncond_behaviour"] == "zero":
            clip, pooled = torch.zeros_like(clip), torch.zeros_like(pooled)
        return {"prompt_embeds": torch.cat([clip, t5]), "pooled_prompt_embeds": pooled}

    @property
    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """CLIP's 77 tokens and behind them T5's; what both CLIPs say of the whole caption."""
        length = 77 + self.text_options["tokenizer_max_length"]
        tokens = (length, self._config["joint_attention_dim"])
        return {
            "prompt_embeds": tokens,
            "pooled_prompt_embeds": (self._config["pooled_projection_dim"],),
        }

    def predict(
        self,
        denoiser: nn.Module,
        draw: Draw,
        batch: Batch,
        residuals: Mapping[str, Any] = MappingProxyType({}),
    ) -> Tensor:
        """One transformer call; the timestep stays fp32 until the model embeds it."""
        answer: Tensor = denoiser(**self._inputs(draw, batch), **residuals)[0]
        return answer.float()

    def residuals(self, net: nn.Module, draw: Draw, batch: Batch) -> Mapping[str, Any]:
        """One call of the net, as the stock pipeline makes it."""
        inputs, picture = self._inputs(draw, batch), batch.controls[PICTURE]  # [B, C, h, w]
        if _without_pooled(net):
            vae, pooled = self.checkpoint.config("vae"), inputs["pooled_projections"]
            inputs["pooled_projections"] = pooled.new_zeros(pooled.shape)
            picture = picture + vae["shift_factor"] * vae["scaling_factor"]
        blocks = net(**inputs, **{PICTURE: picture.to(inputs["hidden_states"].dtype)})[0]
        return {"block_controlnet_hidden_states": blocks}

    def _inputs(self, draw: Draw, batch: Batch) -> dict[str, Any]:
        """What transformer and ControlNet are both called with."""
        text: Tensor = batch.embeds["prompt_embeds"]  # [B, L, D]
        return {
            "hidden_states": draw.noisy.to(text.dtype),
            "timestep": draw.timestep,
            "encoder_hidden_states": text,
            "pooled_projections": batch.embeds["pooled_prompt_embeds"],
            "return_dict": False,
        }


FAMILY = SD3
