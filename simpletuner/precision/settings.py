"""In which numbers the model is held and computed, and how it is made to fit its device."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from simpletuner.core.section import Section, setting
from simpletuner.precision.attention import ATTENTION
from simpletuner.precision.quantisers import QUANTISERS


class PrecisionSettings(Section):
    """Dtypes, quantisation, attention and memory."""

    mixed_precision: Literal["bf16", "no", "fp16", "fp8"] = setting("bf16", pending=("fp8",))
    """What the model computes in; no is fp32 throughout: twice the memory, and slower. fp16 is for
    cards without bf16: its range is small, so the loss is scaled, and a step may be skipped."""

    base_model_default_dtype: Literal["bf16", "fp16", "fp32"] | None = setting(None)
    """What the frozen weights are held in where they are not quantised; fp32 takes twice the
    memory. Without it, what mixed_precision computes in."""

    gradient_checkpointing: bool = setting(True)
    """Compute activations twice instead of keeping them: much less memory, about a quarter
    slower."""

    attention_mechanism: str = setting("diffusers", table=ATTENTION)
    """The kernel that computes attention; those that give no gradients do so in validation."""

    sageattention_usage: Literal["inference"] = setting("inference")
    """When sageattention is used: it trains no gradient through attention."""

    base_model_precision: str = setting("no_change", table=QUANTISERS)
    """What the frozen base is quantised to; fewer bits take less memory and lose detail."""

    text_encoder_1_precision: str = setting("no_change", table=QUANTISERS)
    """What the first text encoder is quantised to while captions are encoded."""

    text_encoder_2_precision: str = setting("no_change", table=QUANTISERS)
    """What the second text encoder is quantised to while captions are encoded."""

    text_encoder_3_precision: str = setting("no_change", table=QUANTISERS)
    """What the third text encoder is quantised to while captions are encoded."""

    quantize_via: Literal["accelerator", "cpu"] = setting("accelerator")
    """Where the weights are converted, layer by layer: accelerator is faster, the CPU spares the
    device's memory."""

    disable_tf32: bool = setting(False)
    """Compute fp32 products exactly on NVIDIA cards, whose tensor cores round the factors to 10
    bits (TF32) otherwise; slower. It matters with mixed_precision no, and elsewhere hardly."""

    gradient_checkpointing_interval: int | None = setting(None, ge=1, unit="blocks")
    """Apply gradient_checkpointing only to every so many blocks; larger is faster and takes more
    memory; without it, to all."""

    gradient_checkpointing_backend: Literal["torch", "unsloth"] = setting("torch")
    """Where gradient_checkpointing keeps what goes into a block: torch on the device, unsloth in
    the computer's memory: less memory, slower."""

    unet_attention_slice: bool = setting(False)
    """Compute a UNet's attention in two steps, half of the heads each: less memory where there is
    no fused kernel, slower."""

    accelerator_cache_clear_interval: int | None = setting(
        None, pending=True, ge=1, unit="optimizer steps"
    )
    """How often the device's memory cache is emptied; smaller is slower."""

    enable_group_offload: bool = setting(False)
    """Keep the model's frozen blocks in the computer's memory and bring each to the device when its
    turn comes: far less memory, slower. What trains stays on the device."""

    group_offload_type: Literal["block_level", "leaf_level"] = setting("block_level")
    """What is brought at a time: blocks, or single layers, those outside of blocks as well (least
    memory, slowest)."""

    group_offload_blocks_per_group: int = setting(1, pending=True, ge=1, unit="blocks")
    """How many blocks are brought together; larger is faster and takes more memory."""

    group_offload_use_stream: bool = setting(False, pending=True)
    """Bring the next blocks while the present ones compute (CUDA only)."""

    group_offload_to_disk_path: Path | None = setting(None, path=True)
    """A folder on a fast disk where enable_group_offload keeps the blocks, in place of the
    computer's memory; emptied when the run ends."""

    musubi_blocks_to_swap: int = setting(0, ge=0, unit="blocks")
    """How many of the last frozen blocks stay in the computer's memory until their turn; larger
    takes less of the device's memory and is slower."""

    dynamo_backend: Literal["no", "inductor", "eager", "aot_eager", "cudagraphs"] = setting(
        "no", pending=("cudagraphs",)
    )
    """Compile the model's blocks with torch.compile: a slow first step, faster ones after. The two
    of the eager kind go only a part of that road, to look for a fault."""

    dynamo_mode: Literal[
        "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"
    ] = setting("default", pending=("reduce-overhead", "max-autotune"))
    """How hard inductor tries."""

    @property
    def offloads(self) -> bool:
        """True if frozen weights wait in the computer's memory until their turn."""
        return self.enable_group_offload or self.musubi_blocks_to_swap > 0
