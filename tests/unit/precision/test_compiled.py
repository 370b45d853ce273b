"""Compiled blocks, and attention in slices, learn the same but for rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import SlicedAttnProcessor

from simpletuner.precision.blocks import blocks_of
from simpletuner.precision.compiled import compiles_in
from simpletuner.precision.fit import fit
from simpletuner.precision.settings import PrecisionSettings
from tests.unit.training.builds import build_stepper, gradients_of, make_batch, window_of

CPU = torch.device("cpu")
NET = {"model_type": "full", "controlnet": True}


def learnt(
    model: Path, family: str, adapter: dict[str, Any], **settings: Any
) -> tuple[Any, list[float], dict[str, torch.Tensor]]:
    """The stepper, two losses, and the gradients after."""
    stepper = build_stepper(model, family_name=family, adapter=adapter)
    fit(stepper.weights.trainable.modules, PrecisionSettings(**settings), CPU)
    batch = make_batch(0, 1, family_name=family, controlled=bool(adapter.get("controlnet")))
    losses = [stepper.step(step, window_of(batch)).loss.item() for step in range(2)]
    return stepper, losses, gradients_of(stepper, window_of(batch))


def assert_near(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(
    ("family", "adapter", "settings"),
    [
        ("flux", {}, {"gradient_checkpointing": False}),
        ("flux", {"use_dora": True}, {"gradient_checkpointing_backend": "unsloth"}),
        ("sd3", NET, {}),
        ("sdxl", {"model_type": "full"}, {"gradient_checkpointing_interval": 2}),
    ],
)
def test_compiled_blocks_learn_the_same(
    family: str,
    adapter: dict[str, Any],
    settings: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    model = request.getfixturevalue(f"tiny_{family}")
    plain = learnt(model, family, adapter, **settings)
    torch.compiler.reset()
    stepper, losses, gradients = learnt(
        model, family, adapter, dynamo_backend="aot_eager", **settings
    )
    compiled = [
        block._compiled_call_impl is not None
        for each in stepper.weights.trainable.modules
        for _, block in blocks_of(each)
    ]
    assert compiled
    assert all(compiled)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert losses == pytest.approx(plain[1], rel=1e-5)
    assert_near(gradients, plain[2])


@pytest.mark.parametrize("family", ["sdxl", "sd1x"])
@pytest.mark.parametrize("adapter", [{}, {"use_dora": True}, NET, {"model_type": "full"}])
def test_attention_in_slices_learns_the_same(
    family: str, adapter: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(f"tiny_{family}")
    plain = learnt(model, family, adapter)
    sliced = learnt(model, family, adapter, unet_attention_slice=True)
    for module in sliced[0].weights.trainable.modules:
        kinds = {type(each) for each in module.attn_processors.values()}
        assert kinds == {SlicedAttnProcessor}
    assert sliced[1] == pytest.approx(plain[1], rel=1e-5)
    assert_near(sliced[2], plain[2])


def test_a_compiler_is_asked_for_where_one_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert compiles_in("inductor", "mps") == "is not here for mps; remove it"
    assert "triton" in (compiles_in("inductor", "cuda") or "triton")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiles_in("aot_eager", "cpu") is None
    assert compiles_in("inductor", "cpu") == "needs a C++ compiler: sudo apt-get install g++"
