"""What a model family is: a diffusers pipeline plus a few facts.

Letters: B batch, C channels, H W height width, L tokens, D width; *S = H,W.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, cast

from simpletuner.core.errors import ConfigError
from simpletuner.core.files import content_digest
from simpletuner.models import control
from simpletuner.models.original import OriginalNames
from simpletuner.models.single_file import FilePart

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from simpletuner.core.seeds import Seeds
    from simpletuner.core.types import Batch, Draw, Embeds, Place, Sample
    from simpletuner.models.checkpoint import Checkpoint
    from simpletuner.models.control import ControlNet
    from simpletuner.models.encoders import TrainedEncoder

    Shrink = Callable[[str, nn.Module, torch.device], None]
    """Given a part's name, the part, frozen and on the CPU, and the device it goes to next."""


@dataclass(frozen=True)
class Flavour:
    """A named checkpoint of a family.

    Args:
        repo: Its id on the hub.
        summary: One sentence for the documentation.
    """

    repo: str
    summary: str


@dataclass(frozen=True)
class Family(ABC):
    """A family with one of its checkpoints; holds options, never tensors.

    A family file declares the class variables and `predict`; loading, text encoding, sampling and
    LoRA files are written once, here and in ``adapters``, against the stock pipeline.

    Args:
        checkpoint: Where the weights are.
        options: The settings of ``model``, by their names.
    """

    name: ClassVar[str]
    """What the user writes as model_family."""
    title: ClassVar[str]
    """The name people use."""
    architecture: ClassVar[str]
    """Its name in the modelspec header that other tools read."""
    kohya_version: ClassVar[str]
    """Its name in the header of kohya's scripts, ss_base_model_version."""
    pipeline: ClassVar[str]
    """The stock pipeline's class in diffusers."""
    pipeline_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """What its constructor is told besides; parts that are None are not opened and not fetched."""
    flavours: ClassVar[Mapping[str, Flavour]]
    """Named checkpoints; the first is the default."""
    prediction_types: ClassVar[tuple[str, ...]]
    """What it can be trained to predict; the first where the scheduler's config does not say."""
    own_settings: ClassVar[tuple[str, ...]] = ()
    """The settings that not every family reads, but this one does."""
    alignment: ClassVar[int] = 8
    """Both edges of every picture are a multiple of this many px."""
    most_tokens: ClassVar[int | None] = None
    """The longest prompt where ``tokenizer_max_length`` may choose, and what it is without it."""
    denoiser: ClassVar[str] = "unet"
    """The denoiser's component name in the pipeline, and the prefix of its LoRA keys."""
    text_parts: ClassVar[tuple[str, ...]]
    """The components that turn captions into conditioning."""
    text_outputs: ClassVar[tuple[str | None, ...]]
    """Names for what the pipeline's ``encode_prompt`` returns; None for what is not kept."""
    trained_text: ClassVar[Mapping[str, TrainedEncoder]] = MappingProxyType({})
    """Those of `text_parts` that can train beside the denoiser; the stock loader reads these."""
    layouts: ClassVar[Mapping[str, str]]
    """How each kept output is batched: ``stack``."""
    lora_targets: ClassVar[tuple[str, ...]]
    """Module names that carry an adapter unless the user names others."""
    lora_target_sets: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})
    """Such lists by the names that a setting of the family gives them."""
    original: ClassVar[OriginalNames]
    """The denoiser's modules in the model's original release."""
    single_file: ClassVar[Mapping[str, FilePart]]
    """Where each part is in a whole model of one file, by its component's name."""
    whole_in_one_file: ClassVar[bool] = True
    """Such a file has all parts; else those that it lacks are the flavour's own."""
    kohya_names: ClassVar[str] = "original"
    """Whose names kohya's layout makes flat: ``original`` or ``diffusers``."""
    control: ClassVar[ControlNet | None] = None
    """Its ControlNet, if diffusers has one and it can be trained here."""

    checkpoint: Checkpoint
    options: Mapping[str, Any] = field(default_factory=dict)

    # --- one file ----------------------------------------------------------------------------

    @classmethod
    def flavour_of(cls, names: Collection[str]) -> str:
        """The flavour whose configs fit a single file with tensors of these names."""
        return next(iter(cls.flavours))

    @classmethod
    def names_of(cls, denoiser: nn.Module) -> OriginalNames:
        """The original names of the modules of this denoiser, which may be of an unusual shape."""
        found, config = cls.single_file[cls.denoiser].names, cast("Any", denoiser.config)
        return found(config) if found else cls.original

    @property
    def file_parts(self) -> Mapping[str, FilePart]:
        """`single_file` as a model such as this one is written."""
        return self.single_file

    @property
    def file_marks(self) -> dict[str, Tensor]:
        """What else stands in the file, to tell other programs what the model is."""
        return {}

    # --- opening -----------------------------------------------------------------------------

    @property
    def idle_settings(self) -> tuple[str, ...]:
        """Those of `own_settings` that this checkpoint has no use for."""
        return ()

    def open_text(self, place: Place, shrink: Shrink | None = None) -> Any:
        """The stock pipeline with its text encoders and tokenizers only, on `place`.

        Args:
            shrink: Given each encoder, frozen and still on the CPU.
        """
        pipe = self.checkpoint.open_pipeline(
            self.pipeline,
            options={self.denoiser: None, "vae": None, **self.pipeline_options},
            dtype=place.dtype,
        )
        for part in self.text_parts:
            module = pipe.components.get(part)
            if module is not None and hasattr(module, "requires_grad_"):  # tokenizers have none
                module.requires_grad_(False).eval()
                if shrink is not None:
                    shrink(part, module, place.device)
        return pipe.to(place.device)

    def open_vae(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The VAE, frozen, in eval mode."""
        vae = self.checkpoint.open_part("vae", dtype)
        return vae.requires_grad_(False).eval().to(device)

    def open_denoiser(self, place: Place, shrink: Shrink | None = None) -> nn.Module:
        """The denoiser, frozen, in training mode, on `place`.

        Args:
            shrink: Given the denoiser while it is still on the CPU.
        """
        denoiser: nn.Module = self.checkpoint.open_part(self.denoiser, place.dtype)
        denoiser.requires_grad_(False).train()
        if shrink is not None:
            shrink(self.denoiser, denoiser, place.device)
        return denoiser.to(place.device)

    def blueprint(self, dtype: torch.dtype) -> nn.Module:
        """The denoiser's architecture on the ``meta`` device: shapes and no weights."""
        import diffusers
        import torch

        cls = getattr(diffusers, self.checkpoint.index[self.denoiser][1])
        with torch.device("meta"):
            model: nn.Module = cls.from_config(self._config)
        # the bare method: a model's own warns of layers it would keep in fp32 on loading
        return torch.nn.Module.to(model, dtype).requires_grad_(False).train()

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        """The denoiser's ``config.json``."""
        return self.checkpoint.config(self.denoiser)

    @property
    def halvings(self) -> int:
        """How often the VAE halves a picture's edges."""
        return len(self.checkpoint.config("vae")["block_out_channels"]) - 1

    @property
    def latent_shape(self) -> tuple[int, int]:
        """The channels of a latent, and how many px along an edge one of its cells stands for."""
        return int(self.checkpoint.config("vae")["latent_channels"]), 2**self.halvings

    @property
    @abstractmethod
    def text_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each text output of one caption, by its name."""

    def check_control(self, folder: Path | None = None, label: str = "") -> ControlNet:
        """What the ControlNet of this model is; reads no weights.

        Args:
            folder: With a net in diffusers' layout to go on from.
            label: What the user calls it.

        Raises:
            ConfigError: This model takes none, or not this one.
        """
        if self.control is None:
            raise ConfigError(
                f"controlnet: {self.checkpoint.label} takes no ControlNet",
                fix="remove controlnet, or name another model",
            )
        if folder is not None:
            base = self.checkpoint.config(self.denoiser)
            control.check_fits(self.control, folder, base, self.halvings, label)
        return self.control

    def open_sampler(
        self, denoiser: nn.Module, vae: nn.Module, net: nn.Module | None = None
    ) -> Any:
        """The stock pipeline around the live denoiser, with the checkpoint's own scheduler.

        Args:
            net: The live ControlNet, for the pipeline that takes one.
        """
        import diffusers
        import torch

        name, parts = self.pipeline, {self.denoiser: denoiser}
        if net is not None:
            assert self.control is not None, "a net was opened for this family"
            name, parts = self.control.pipeline, {**parts, control.PART: net}
            if self.control.picture == "latents" and denoiser.dtype == torch.float32:
                vae = vae.float()  # it is given the control picture in the denoiser's dtype
        options = {**dict.fromkeys(self.text_parts), **self.pipeline_options}
        cls = getattr(diffusers, name)
        return cls(**options, **parts, vae=vae, scheduler=self.scheduler())

    def scheduler(self) -> Any:
        """A fresh scheduler of the checkpoint's own kind, for what the denoiser really predicts."""
        return self.checkpoint.scheduler(**self._scheduler_changes)

    def fingerprint(self, part: str) -> str:
        """A digest of the weights and configuration that shape what is cached.

        Args:
            part: ``"text"`` or ``"vae"``.
        """
        if part == "vae":
            return self.checkpoint.digest(("vae",))
        digest = self.checkpoint.digest(self.text_parts)
        if not self.text_options:
            return digest
        options = json.dumps(dict(self.text_options), sort_keys=True)
        return content_digest(f"{digest};{options}".encode())

    @property
    def prediction_type(self) -> str:
        """The objective: what the user, else the scheduler, else the family says."""
        chosen = self.options.get("prediction_type")
        found: str = chosen or self.checkpoint.scheduler_config.get(
            "prediction_type", self.prediction_types[0]
        )
        return found

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """The noise schedule that is trained: the checkpoint's with what the user changes of it."""
        return MappingProxyType({**self.checkpoint.scheduler_config, **self._scheduler_changes})

    def sampler_usage(self) -> list[str]:
        """Lines of Python that give a stock pipeline ``pipe`` the schedule that was trained."""
        has = {"prediction_type": self.prediction_types[0], **self.checkpoint.scheduler_config}
        changes = [
            f", {key}={value!r}"
            for key, value in self._scheduler_changes.items()
            if has.get(key) != value
        ]
        if not changes:
            return []
        cls = type(self.scheduler()).__name__
        return [
            f"from diffusers import {cls}",
            f"pipe.scheduler = {cls}.from_config(pipe.scheduler.config{''.join(changes)})",
        ]

    @property
    def _scheduler_changes(self) -> Mapping[str, Any]:
        changes: dict[str, Any] = {"prediction_type": self.prediction_type}
        if self.options.get("rescale_betas_zero_snr"):
            # A sampler has to begin at the last step, or the model never sees what it learned.
            changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return changes

    @cached_property
    def patch(self) -> int:
        """Latent cells along the edge of one token of the denoiser; a UNet's tokens are cells."""
        return int(self._config.get("patch_size") or 1)

    def unused(self, module: nn.Module) -> frozenset[str]:
        """Names of weights that the answer of a denoiser or a ControlNet does not depend on."""
        return frozenset()

    def tokens(self, latents: Tensor) -> int:
        """How many tokens the denoiser makes of each of `latents` [B, C, H, W]."""
        height, width = latents.shape[-2:]
        tokens: int = (height // self.patch) * (width // self.patch)
        return tokens

    # --- text and pixels -----------------------------------------------------------------------

    @property
    def text_options(self) -> Mapping[str, Any]:
        """What besides weights and captions shapes the conditioning, and so names cache entries."""
        return MappingProxyType({})

    @property
    def prompt_arguments(self) -> Mapping[str, Any]:
        """What the stock pipeline is told beside a prompt, to encode it as we do."""
        return MappingProxyType({})

    @property
    def encoder_arguments(self) -> Mapping[str, Any]:
        """What the stock pipeline's ``encode_prompt`` is told beside captions and device."""
        return {"do_classifier_free_guidance": False, **self.prompt_arguments}

    def encode_text(self, pipe: Any, captions: Sequence[str]) -> list[Embeds]:
        """One mapping per caption, tensors without the batch dimension, in the encoder's dtype.

        With a graph where an encoder trains.
        """
        outputs = pipe.encode_prompt(
            list(captions),
            device=pipe.device,
            num_images_per_prompt=1,
            **self.encoder_arguments,
        )
        named = zip(self.text_outputs, outputs, strict=True)
        kept = {name: output for name, output in named if name is not None}
        return [{name: output[i] for name, output in kept.items()} for i in range(len(captions))]

    def open_tokenizers(self) -> dict[str, Any]:
        """The tokenizer of each text encoder, by the encoder's name; reads no weights."""
        return {
            part.replace("tokenizer", "text_encoder"): self.checkpoint.open_tokenizer(part)
            for part in self.text_parts
            if part.startswith("tokenizer") and self.checkpoint.has(part)
        }

    def windows(self, tokenizers: Mapping[str, Any]) -> dict[str, int]:
        """How many tokens of a caption each text encoder sees, by its name.

        Args:
            tokenizers: As `open_tokenizers` gives them; the last one's window may be chosen.
        """
        found = {name: int(tokenizer.model_max_length) for name, tokenizer in tokenizers.items()}
        if chosen := self.text_options.get("tokenizer_max_length"):
            found[next(reversed(found))] = chosen
        return found

    def encode_pixels(
        self, vae: Any, pixels: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """A sample of the VAE's posterior, shifted and scaled as the denoiser expects.

        Args:
            pixels: [B, 3, H, W] in [-1, 1].
            generators: A CPU generator per picture: a latent does not depend on its batch.

        Returns:
            [B, C, H / factor, W / factor], fp32.
        """
        import torch

        with torch.no_grad():
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        noise = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators])
        latents = mean + std * noise.to(mean.device)
        shift, scale = _normalisation(vae, latents)
        return (latents - shift) * scale

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] fp32, about [-1, 1], of latents as the denoiser sees them."""
        import torch

        shift, scale = _normalisation(vae, latents)
        raw = latents.float() / scale + shift
        with torch.no_grad():
            decoded: Tensor = vae.decode(raw.to(vae.device, vae.dtype)).sample.float()
        return decoded

    # --- the denoiser --------------------------------------------------------------------------

    @property
    def step_options(self) -> Mapping[str, Any]:
        """Those of the options that shape a step and may be others after a resume."""
        return MappingProxyType({})

    def drawn(self, samples: Sequence[Sample], epoch: int, seeds: Seeds) -> dict[str, Tensor]:
        """What else is drawn for each of B samples, for ``batch.controls``; nothing for most.

        Returns:
            By the denoiser's own argument names, [B, …] fp32 on the CPU; a function of (seed,
            epoch, sample, occurrence) alone.
        """
        return {}

    @abstractmethod
    def predict(
        self,
        denoiser: nn.Module,
        draw: Draw,
        batch: Batch,
        residuals: Mapping[str, Any] = {},
    ) -> Tensor:
        """The denoiser's answer with the meaning and sign of ``draw.target``.

        Must not change its inputs.

        Args:
            denoiser: The bare module or one that adapters are attached to.
            draw: What to denoise; fp32, cast here to the conditioning's dtype.
            batch: Conditioning and geometry, on the denoiser's device.
            residuals: Extra inputs by the denoiser's own argument names.

        Returns:
            [B, C, *S], fp32.
        """

    def residuals(self, net: nn.Module, draw: Draw, batch: Batch) -> Mapping[str, Any]:
        """What a ControlNet adds inside the denoiser, by the denoiser's own argument names.

        Must not change its inputs.

        Args:
            net: Of `open_control`.
            draw: As `predict` sees it.
            batch: The same, with ``controls["controlnet_cond"]``: [B, 3, H, W] in [0, 1], or
                [B, C, *S] where the family's net sees latents.
        """
        raise NotImplementedError(f"{self.name} declares no control")

    def sampler_arguments(
        self, embeds: Embeds, negative: Embeds, width: int, height: int
    ) -> dict[str, Any]:
        """Arguments of the stock pipeline's ``__call__``; sizes in px."""
        negatives = {f"negative_{name}": value for name, value in negative.items()}
        return {**embeds, **negatives, "width": width, "height": height}

    def sampled_latents(self, output: Tensor, width: int, height: int) -> Tensor:
        """What the stock pipeline gives as latents, as [B, C, *S]; sizes in px."""
        return output


def _normalisation(vae: Any, like: Tensor) -> tuple[Any, Any]:
    """(shift, scale) of ``latent = (raw - shift) * scale``: numbers or [1, C, 1, 1]."""
    import torch

    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return config.get("shift_factor") or 0.0, config["scaling_factor"]
    shift, spread = (torch.tensor(v, device=like.device).view(1, -1, 1, 1) for v in (mean, std))
    return shift, config["scaling_factor"] / spread
