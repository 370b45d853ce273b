"""One module with LoRA adapters by peft: what trains of it, its file, and how that is read back."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from simpletuner.adapters.settings import STARTS
from simpletuner.adapters.start import start
from simpletuner.models.encoders import CLIP, own_begin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simpletuner.adapters.settings import AdapterSettings

TRAINED = "default"
_START = "start"
_CHECK = "verify"
_MAGNITUDE = ".lora_magnitude_vector"


@dataclass(frozen=True)
class Adapted:
    """A denoiser with adapters.

    Args:
        module: It.
        part: Its name in the pipeline, and the prefix of its keys.
    """

    module: nn.Module
    part: str

    def attach(self, targets: Sequence[str], settings: AdapterSettings) -> None:
        """Give each of `targets` an adapter in fp32; the module is frozen."""
        from peft import LoraConfig

        def config() -> LoraConfig:
            return LoraConfig(
                r=settings.lora_rank,
                lora_alpha=settings.lora_alpha or settings.lora_rank,  # type: ignore[arg-type]
                lora_dropout=settings.lora_dropout,
                init_lora_weights="gaussian" if settings.lora_init_type == "gaussian" else True,
                target_modules=list(targets),
                use_dora=settings.use_dora,
                use_rslora=settings.use_rslora,
            )

        module: Any = self.module
        module.add_adapter(config(), adapter_name=TRAINED)
        if settings.lora_init_type in STARTS:
            module.add_adapter(config(), adapter_name=_START)
            for layer in self.layers().values():
                start(layer, TRAINED, _START, settings.lora_init_type)
            self.activate()
        for layer in self.layers().values():
            for parameter in (*layer.lora_A.parameters(), *layer.lora_B.parameters()):
                parameter.data = parameter.data.float()
        for parameter in self.parameters().values():
            parameter.data = parameter.data.float()

    @property
    def config(self) -> Any:
        """Peft's own description of what trains."""
        return self.module.peft_config[TRAINED]  # type: ignore[index,union-attr]

    def activate(self) -> None:
        """Let the adapters act and train, and what they started from act against them."""
        module: Any = self.module
        module.set_adapter([name for name in (TRAINED, _START) if name in module.peft_config])
        for layer in self.layers().values():
            for held in (layer.lora_A, layer.lora_B):
                if _START in held:
                    held[_START].requires_grad_(False)

    def enable(self, *, on: bool) -> None:
        """Let the adapters act, or not."""
        module: Any = self.module
        if on:
            module.enable_adapters()
        else:
            module.disable_adapters()

    def layers(self) -> dict[str, Any]:
        """The modules that carry an adapter, by name."""
        return self._layers_of(self.module, TRAINED)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What every module's adapter is made of, by name."""
        found: dict[str, nn.Parameter] = {}
        for name, layer in self.layers().items():
            found[f"{name}.lora_A.weight"] = layer.lora_A[TRAINED].weight
            found[f"{name}.lora_B.weight"] = layer.lora_B[TRAINED].weight
            if TRAINED in layer.lora_magnitude_vector:
                found[f"{name}{_MAGNITUDE}"] = layer.lora_magnitude_vector[TRAINED].weight
        return found

    def change(self) -> dict[str, Tensor]:
        """What the file holds of every module: `parameters`, with what they started from taken off.

        fp32 on the CPU.
        """
        found = {name: p.detach().float().cpu() for name, p in self.parameters().items()}
        for name, layer in self.layers().items():
            if _START in layer.lora_A:
                down, up = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
                first = [held[_START].weight.float().cpu() for held in (layer.lora_A, layer.lora_B)]
                found[down] = torch.cat((found[down], first[0]))
                found[up] = torch.cat((found[up], -first[1]), 1)
        return found

    # --- its file ------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """`change` by the keys of the file."""
        return {self.key(name): tensor.contiguous() for name, tensor in self.change().items()}

    def told(self) -> dict[str, Any]:
        """Peft's description of what the file holds, for its header."""
        first = next(iter(self.layers().values()))
        scale, rank = first.scaling[TRAINED], first.r[TRAINED] * (1 + (_START in first.lora_A))
        config: dict[str, Any] = self.config.to_dict()
        config |= {"r": rank, "lora_alpha": scale * rank, "use_rslora": False}
        config["init_lora_weights"] = True
        return config

    def key(self, name: str) -> str:
        """The key of one of `parameters` in the file."""
        return f"{self.part}.{name}"

    @contextmanager
    def read_back(
        self, state: Mapping[str, Tensor], metadata: Any, pipeline: Any
    ) -> Iterator[dict[str, Loaded]]:
        """The modules that carry an adapter once the stock loader has read `state`, by name.

        Args:
            state: What the file holds.
            metadata: What its header says of it.
            pipeline: The class of the stock pipeline.
        """
        module: Any = self.module
        # the stock pipelines' own path for one component (load_lora_weights calls it)
        module.load_lora_adapter(
            dict(state), prefix=self.part, adapter_name=_CHECK, metadata=metadata
        )
        try:
            yield self._loaded(self.module)
        finally:
            module.delete_adapters(_CHECK)
            self.activate()

    def _loaded(self, module: nn.Module) -> dict[str, Loaded]:
        return {name: Loaded.of(layer) for name, layer in self._layers_of(module, _CHECK).items()}

    def _layers_of(self, module: nn.Module, adapter: str) -> dict[str, Any]:
        from peft.tuners.lora import LoraLayer

        return {
            self._name(name): layer
            for name, layer in module.named_modules()
            if isinstance(layer, LoraLayer) and adapter in layer.lora_A
        }

    def _name(self, own: str) -> str:
        """What a module of this one is called among all that train."""
        return own


@dataclass(frozen=True)
class AdaptedEncoder(Adapted):
    """A text encoder with adapters; its modules are called as in files, ``text_encoder.…``."""

    def told(self) -> dict[str, Any]:
        """See Adapted; by names that fit with and without ``text_model.`` before them."""
        config = super().told()
        targets = (name.removeprefix(CLIP) for name in config["target_modules"])
        return {**config, "target_modules": sorted(targets)}

    def key(self, name: str) -> str:
        """See Adapted; transformers takes a magnitude by its full name alone."""
        return f"{name}.weight" if name.endswith(_MAGNITUDE) else name

    @contextmanager
    def read_back(
        self, state: Mapping[str, Tensor], metadata: Any, pipeline: Any
    ) -> Iterator[dict[str, Loaded]]:
        """See Adapted; into a copy around the same weights, for the loader casts and freezes."""
        shared = {id(t): t for t in (*self.module.parameters(), *self.module.buffers())}
        bare: Any = copy.deepcopy(self.module, shared)
        bare.delete_adapter(list(bare.peft_config))
        pipeline.load_lora_into_text_encoder(
            *(dict(state), None, bare),
            prefix=self.part,
            adapter_name=_CHECK,
            metadata=metadata,
        )
        yield self._loaded(bare)

    def _name(self, own: str) -> str:
        begin = "" if own_begin(self.module) else CLIP
        return f"{self.part}.{begin}{own}"


@dataclass(frozen=True)
class Loaded:
    """What the stock loader made of one module's adapter; the tensors in the base's dtype."""

    parts: Mapping[str, Tensor]
    scale: float

    @classmethod
    def of(cls, layer: Any) -> Loaded:
        """That of a layer of peft."""
        held = {
            "lora_A.weight": layer.lora_A,
            "lora_B.weight": layer.lora_B,
            _MAGNITUDE[1:]: layer.lora_magnitude_vector,
        }
        parts = {name: each[_CHECK].weight.cpu() for name, each in held.items() if _CHECK in each}
        return cls(parts, layer.scaling[_CHECK])

    def difference(
        self, held: Mapping[str, Tensor], filed: Mapping[str, Tensor], scale: float
    ) -> float:
        """The largest difference of the two changes, relative to the largest entry of mine.

        Args:
            held: What training has.
            filed: What the file has.
            scale: Of mine.
        """
        if not held.keys() == filed.keys() == self.parts.keys():
            return float("inf")
        for name, mine in held.items():
            theirs = self.parts[name]
            if not torch.equal(theirs, filed[name].to(theirs.dtype)):
                return float("inf")
            if not torch.equal(mine, filed[name]):
                return float("inf")
        trained, reloaded = _delta(held, scale), _delta(filed, self.scale)
        largest = max(trained.abs().max().item(), 1e-12)
        return float((trained - reloaded).abs().max().item()) / largest


def _delta(tensors: Mapping[str, Tensor], scale: float) -> Tensor:
    a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
    return b.float().flatten(1) @ a.float().flatten(1) * scale
