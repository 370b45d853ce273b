"""Which weights train, and how they are attached to the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from simpletuner.core.section import Section, setting

FluxTarget = Literal[
    "all",
    "all+ffs",
    "all+ffs+embedder",
    "all+ffs+embedder+controlnet",
    "context",
    "context+ffs",
    "mmdit",
    "ai-toolkit",
    "tiny",
    "nano",
    "controlnet",
]

STARTS = ("pissa", "olora")
"""The values of lora_init_type that begin from the base's weights."""

ANY_DENOISER = "dit"
"""DiffSynth-Studio's name for a denoiser, whatever the pipeline calls it."""


class AdapterSettings(Section):
    """What is trained."""

    model_type: Literal["lora", "full"] = setting("lora")
    """Train a small adapter (lora), or all weights of the denoiser (full), which needs several
    times the memory and a far smaller learning_rate, such as 1e-5."""

    lora_type: Literal["standard", "lycoris"] = setting("standard")
    """The kind of adapter: plain LoRA, or one of the LyCORIS family."""

    lora_rank: int = setting(16, ge=1)
    """The width of the adapter; larger can learn more, makes a larger file and overfits sooner."""

    lora_alpha: float | None = setting(None, gt=0)
    """The adapter's strength is lora_alpha / lora_rank; without it, equal to lora_rank."""

    lora_dropout: float = setting(0.0, ge=0, lt=1)
    """The share of the adapter's inputs that is dropped in each step; larger overfits less."""

    lora_init_type: Literal["default", "gaussian", "olora", "pissa", "loftq"] = setting(
        "default", pending=("loftq",)
    )
    """How a new adapter begins: from nothing (default, gaussian), or from the largest directions of
    the weight it goes with (pissa) or an orthogonal part of it (olora), which learn faster and make
    a file of twice the rank. All begin as the untouched model."""

    peft_lora_target_modules: tuple[str, ...] | None = setting(None, min_length=1)
    """The modules that get an adapter, by the end of their names; without it, the family's
    choice."""

    lora_base_model: str | None = setting(None)
    """The model that gets the LoRA: unet or transformer, as the pipeline calls it, or dit for
    either. Beside trainable_models it says that there is a LoRA; train_text_encoder gives text
    encoders one too."""

    trainable_models: tuple[str, ...] | None = setting(None, min_length=1)
    """What trains with its own weights instead of an adapter: modules of the denoiser by the end of
    their path (norm1), from its name on by the whole path (unet.*.norm1), * being anything, or the
    whole of it (unet, transformer or dit). Beside a LoRA, with model_type lora or lora_base_model;
    else alone, and model_type is full unless it is set."""

    init_lora: str | None = setting(None)
    """A LoRA file or folder to go on from, instead of a new one."""

    preset_lora_path: str | None = setting(None)
    """A LoRA file or folder to fuse into the base first: what is trained then is what it does not
    know. The result is used on the base with that LoRA."""

    use_dora: bool = setting(False)
    """Train magnitude and direction apart (DoRA): often closer to full training, and slower."""

    use_rslora: bool = setting(False)
    """Scale the adapter by lora_alpha / sqrt(lora_rank), so that a larger rank is not a weaker one;
    the file that is written says the same in the plain way, with a larger alpha."""

    loraplus_lr_ratio: float | None = setting(None, gt=0)
    """How many times faster the adapter's output matrix (lora_B) learns than all else (LoRA+): 16
    is usual, with a learning_rate a little smaller; without it, as fast."""

    lora_format: Literal["diffusers", "comfyui", "kohya"] = setting("diffusers")
    """The layout of the adapter; in another than diffusers, a second file with the layout in its
    name is written beside the first, with the same change of every weight."""

    lycoris_config: Path | dict[str, Any] | None = setting(None, path=True)
    """The LyCORIS algorithm and its options: a JSON file, or the object itself; without it,
    lycoris_config.json beside the settings file."""

    flux_lora_target: FluxTarget = setting(
        "all", pending=("all+ffs+embedder+controlnet", "controlnet")
    )
    """Which layers of FLUX get an adapter: all attention (all, mmdit), that of the text alone
    (context), these with the feed-forward layers (+ffs) and the entrance (+embedder), ai-toolkit's
    choice, or one layer of two blocks (tiny) or of one (nano)."""

    assistant_lora_path: str | None = setting(None, pending=True)
    """A frozen helper adapter that undoes a model's distillation while it trains: a hub id or a
    file."""

    assistant_lora_strength: float = setting(1.0, pending=True)
    """How strongly the helper adapter acts in training."""

    disable_assistant_lora: bool = setting(False, pending=True)
    """Train without the helper adapter that a flavour brings."""

    layer_freeze_strategy: Literal["none", "bitfit"] = setting("none")
    """What of the model stays as it is under model_type full: nothing, or all but the biases
    (bitfit), which takes far less memory and learns less."""

    train_text_encoder: bool = setting(False)
    """Give the CLIP text encoders a LoRA too, of the same rank and in the same file: new words are
    learned better, and others forgotten sooner. Only beside a plain LoRA; captions are then encoded
    anew in each step, without a cache, and all text encoders stay loaded."""

    controlnet: bool = setting(False)
    """Train a ControlNet beside the model, which stays as it is: a net that sees a control picture.
    With model_type full; each dataset of pictures needs one of control pictures."""

    controlnet_model_name_or_path: str | None = setting(None)
    """A ControlNet to go on from: a hub id or a folder; without it, a copy of the model's own
    first half that adds nothing yet."""

    use_ema: bool = setting(False)
    """Keep a running average of the trained weights beside them, in fp32: it is what is validated,
    saved and written at the end."""

    ema_decay: float = setting(0.995, ge=0, lt=1)
    """How slowly the average follows, at most: in the first steps it follows faster, unless there
    is an ema_warmup_steps; larger averages over more steps."""

    ema_device: Literal["cpu", "accelerator"] = setting("cpu")
    """Where the average is held: cpu saves the device's memory, accelerator saves time."""

    ema_update_interval: int = setting(1, ge=1, unit="optimizer steps")
    """How often the average is updated, with the decay of so many steps; larger is cheaper."""

    ema_warmup_steps: int = setting(0, ge=0, unit="optimizer steps")
    """Until this step the average is a copy of the weights."""

    @property
    def trains(self) -> str:
        """What trains: lora, full, or controlnet."""
        return "controlnet" if self.controlnet else self.model_type
