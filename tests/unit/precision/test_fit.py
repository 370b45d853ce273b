"""What makes a model fit its device changes no gradient."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from simpletuner.adapters.method import Trainable
from simpletuner.core.errors import ConfigError
from simpletuner.precision import offload
from simpletuner.precision.blocks import blocks_of
from simpletuner.precision.fit import fit
from simpletuner.precision.quantise import quantise
from simpletuner.precision.settings import PrecisionSettings
from simpletuner.training.estimate import peak_of
from tests.unit.training.builds import build_stepper, gradients_of, make_batch, window_of

CPU = torch.device("cpu")
FAMILIES = ("flux", "sd1x", "sd3", "sdxl")
NET = {"model_type": "full", "controlnet": True}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def is_plain(value: object) -> bool:
    """True for a tensor that is not made of others, as quantised ones are."""
    return isinstance(value, Tensor) and not is_traceable_wrapper_subclass(value)


class Watch(TorchDispatchMode):
    """Which of some tensors are copied, and which are used otherwise."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.waiting = {t.untyped_storage().data_ptr() for t in tensors}
        self.copies = 0
        self.copied: set[int] = set()
        self.touched: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note what `func` is given, and run it."""
        self.copies += func is torch.ops.aten._to_copy.default
        for tensor in tree_leaves((args, kwargs)):
            if is_plain(tensor):
                found = self.waiting & {tensor.untyped_storage().data_ptr()}
                if func is torch.ops.aten._to_copy.default:
                    self.copied |= found
                elif found and func is not torch.ops.aten.detach.default:
                    self.touched.add(str(func))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Learnt:
    """What was seen in some steps."""

    trainable: Trainable
    gradients: dict[str, Tensor]
    seen: Watch
    back: bool


def learnt(model: Path, family: str, adapter: dict[str, Any], **chosen: Any) -> Learnt:
    """Two steps of two micro-batches, and the gradients of a third."""
    stepper = build_stepper(model, family_name=family, adapter=adapter)
    trainable, settings = stepper.weights.trainable, PrecisionSettings(**chosen)
    fit(trainable.modules, settings, CPU)
    groups = [g for m in trainable.modules for g in offload.groups_of(m, settings)]
    controlled = bool(adapter.get("controlnet"))
    window = window_of(
        *(make_batch(n, n + 1, family_name=family, controlled=controlled) for n in (0, 2))
    )
    away = [t for g in groups for *_, t in g.places()] if settings.offloads else []
    with Watch(away) as seen:
        for step in range(2):
            stepper.step(step, window)
    back = {t.untyped_storage().data_ptr() for g in groups for *_, t in g.places()}
    return Learnt(
        trainable, gradients_of(stepper, window), seen, bool(away) and back <= seen.waiting
    )


def adapters(family: str) -> list[dict[str, Any]]:
    return [{}, {"use_dora": True}, *([NET] if family != "flux" else [])]


OFFLOADED: dict[str, dict[str, Any]] = {
    "blocks": {"enable_group_offload": True},
    "layers": {"enable_group_offload": True, "group_offload_type": "leaf_level"},
    "swap": {"musubi_blocks_to_swap": 1},
}


def test_what_waits_is_only_copied_and_no_gradient_changes(
    family: str, request: pytest.FixtureRequest
) -> None:
    """Nothing computes with a weight that waits, which would lie on another device."""
    model = request.getfixturevalue(f"tiny_{family}")
    for adapter in adapters(family):
        plain = learnt(model, family, adapter).gradients
        assert sum(bool(gradient.any()) for gradient in plain.values()) > 4
        for way, settings in OFFLOADED.items():
            found = learnt(model, family, adapter, **settings)
            assert found.seen.copied == found.seen.waiting, way
            assert not found.seen.touched, way
            assert found.back, f"{way}: what is recomputed goes as well"
            assert found.gradients.keys() == plain.keys()
            for name, gradient in found.gradients.items():
                assert torch.equal(gradient, plain[name]), (way, name, adapter)


@pytest.mark.parametrize("way", OFFLOADED)
def test_an_8_bit_base_waits_as_well(way: str, tiny_sdxl: Path) -> None:
    for name in ("int8-quanto", "int8-torchao"):
        found = []
        for settings in ({}, OFFLOADED[way]):
            stepper = build_stepper(tiny_sdxl)
            trainable = stepper.weights.trainable
            quantise(trainable.denoiser, "unet", name, CPU, via="cpu")
            fit(trainable.modules, PrecisionSettings(**settings), CPU)
            window = window_of(make_batch(0, 1))
            stepper.step(0, window)
            found.append(gradients_of(stepper, window))
        assert all(torch.equal(found[1][key], value) for key, value in found[0].items())


def test_weights_wait_on_the_disk_in_a_folder_that_goes_with_the_model(
    tmp_path: Path, tiny_sdxl: Path
) -> None:
    plain = learnt(tiny_sdxl, "sdxl", {}).gradients
    found = learnt(
        tiny_sdxl, "sdxl", {}, enable_group_offload=True, group_offload_to_disk_path=tmp_path / "a"
    )
    assert all(torch.equal(found.gradients[name], value) for name, value in plain.items())
    blocks = blocks_of(found.trainable.denoiser)
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == len(blocks) > 1
    held = sum(v.nbytes for file in files for v in load_file(file).values())
    assert held == sum(
        p.nbytes for _, block in blocks for p in block.parameters() if not p.requires_grad
    )
    del found, blocks
    gc.collect()
    assert not list((tmp_path / "a").iterdir())


def test_blocks_that_are_not_there_cannot_be_swapped(tiny_sd3: Path) -> None:
    trainable = build_stepper(tiny_sd3, family_name="sd3").weights.trainable
    blocks = len(blocks_of(trainable.denoiser))
    with pytest.raises(ConfigError) as caught:
        fit(trainable.modules, PrecisionSettings(musubi_blocks_to_swap=blocks + 1), CPU)
    assert f"has {blocks} blocks, {blocks + 1} are asked for" in str(caught.value)
    fit(trainable.modules, PrecisionSettings(musubi_blocks_to_swap=blocks), CPU)


def test_released_weights_are_used_where_they_are(tiny_flux: Path) -> None:
    found = learnt(tiny_flux, "flux", {}, enable_group_offload=True)
    offload.release(found.trainable.modules)
    stepper = build_stepper(tiny_flux, family_name="flux")
    window = window_of(make_batch(0, family_name="flux"))
    denoiser = found.trainable.denoiser
    with Watch(denoiser.parameters()) as seen, torch.no_grad():
        ((planned, batch),) = window
        batch, draw = stepper.draw(0, 0, planned, batch)
        found.trainable.predict(stepper.family, draw, batch)
    assert seen.touched
    assert not seen.copied


@pytest.mark.parametrize("over", ["no_change", "int8-quanto"])
def test_what_is_saved_aside_is_a_copy_and_no_gradient_changes(
    family: str, over: str, request: pytest.FixtureRequest
) -> None:
    """The inputs of recomputed blocks are copied, weights are not."""
    model = request.getfixturevalue(f"tiny_{family}")
    for adapter in adapters(family) if over == "no_change" else [{}]:
        found = []
        for backend in ("torch", "unsloth"):
            stepper = build_stepper(model, family_name=family, adapter=adapter)
            trainable = stepper.weights.trainable
            quantise(trainable.denoiser, stepper.family.denoiser, over, CPU, via="cpu")
            fit(trainable.modules, PrecisionSettings(gradient_checkpointing_backend=backend), CPU)
            held = (t for m in trainable.modules for t in (*m.parameters(), *m.buffers()))
            weights = [t for t in held if is_plain(t)]
            batch = make_batch(0, 1, family_name=family, controlled=bool(adapter.get("controlnet")))
            with Watch(weights) as seen:
                stepper.step(0, window_of(batch))
            found.append((gradients_of(stepper, window_of(batch)), seen))
        (plain, before), (gradients, after) = found
        assert after.copies > before.copies
        assert after.copied == before.copied
        assert all(torch.equal(gradients[name], value) for name, value in plain.items())


def test_saved_aside_less_stays_on_the_device() -> None:
    """Counted on a device without values, as an estimate does."""
    peaks = {}
    for backend in ("torch", "unsloth"):
        model = FluxTransformer2DModel(num_layers=4, num_single_layers=8, num_attention_heads=4)
        model.requires_grad_(False).to("meta")
        fit([model], PrecisionSettings(gradient_checkpointing_backend=backend), CPU)
        with torch.device("meta"):
            given = {
                "hidden_states": torch.zeros(1, 4096, 64, requires_grad=True),
                "encoder_hidden_states": torch.zeros(1, 512, 4096),
                "pooled_projections": torch.zeros(1, 768),
                "timestep": torch.zeros(1),
                "guidance": None,
                "img_ids": torch.zeros(4096, 3),
                "txt_ids": torch.zeros(512, 3),
            }

        def loss(model: Any = model, given: Any = given) -> Tensor:
            return model(**given, return_dict=False)[0].square().mean()

        peaks[backend] = peak_of(loss)
    one = 4 * (4096 + 512) * 4 * 128  # what goes into a block
    assert peaks["torch"] - peaks["unsloth"] > 8 * one
