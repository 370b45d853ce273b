"""Frozen weights in fewer bits: how far they are off, what stays exact, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from simpletuner.core.errors import ConfigError, ExtraMissing
from simpletuner.precision.quantise import Quantiser, quantise, weight_bytes
from simpletuner.precision.quantisers import QUANTISERS, quantised_in
from simpletuner.precision.settings import PrecisionSettings
from tests.unit.training.builds import build_stepper, make_batch, window_of

CPU = torch.device("cpu")
FORMATS = [name for name in QUANTISERS if name != "no_change"]

WORST = {
    "int8-quanto": 0.01,
    "int4-quanto": 0.2,
    "int2-quanto": 0.8,
    "fp8-quanto": 0.05,
    "nf4-bnb": 0.15,
    "int8-torchao": 0.01,
    "fp8-torchao": 0.05,
}
"""The largest relative error of a product with Gaussian weights: about the format's step."""


def unet(folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").requires_grad_(False)


class Block(nn.Module):
    """A block with two layers, one of which no kernel could take."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.wide = nn.Linear(width, 2 * width)
        self.odd = nn.Linear(2 * width, 24)


class Model(nn.Module):
    """One block between layers that are outside of it."""

    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(32, 64)
        self.block = Block()
        self.after = nn.Linear(24, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.block.odd(self.block.wide(self.before(x))))


def model() -> Model:
    torch.manual_seed(0)
    return Model().requires_grad_(False)


@pytest.mark.parametrize("name", FORMATS)
def test_a_product_is_off_by_no_more_than_the_format_s_step(name: str) -> None:
    quantised = model()
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    exact = quantised.block.wide(x)

    quantise(quantised, "model", name, CPU, via="cpu")

    error = (quantised.block.wide(x) - exact).norm() / exact.norm()
    assert 1e-4 < error < WORST[name]


@pytest.mark.parametrize("name", FORMATS)
def test_only_layers_of_blocks_whose_sides_fit_are_converted(name: str) -> None:
    quantised, exact = model(), model()

    told = quantise(quantised, "model", name, CPU, via="accelerator")

    assert told.layers == 1
    assert told.kept == {"for a side that is no multiple of 16": 1}
    for path in ("before", "block.odd", "after"):
        kept, was = quantised.get_submodule(path), exact.get_submodule(path)
        assert type(kept) is nn.Linear
        assert torch.equal(kept.weight, was.weight)
    assert not any(p.requires_grad for p in quantised.parameters())


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_flow_through_to_what_comes_before(name: str) -> None:
    quantised = model()
    quantise(quantised, "model", name, CPU, via="cpu")
    x = torch.randn(2, 32, requires_grad=True)

    quantised(x).square().sum().backward()

    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", FORMATS)
def test_what_it_says_it_saves_is_what_the_format_takes(name: str) -> None:
    torch.manual_seed(0)
    block = nn.ModuleList([Block(1024)])
    block._repeated_blocks = ("Block",)
    told = quantise(block.requires_grad_(False), "model", name, CPU, via="cpu")

    elements = 1024 * 2048
    saved = 4 * elements - (told.before - told.after)
    bits = QUANTISERS[name].fact("bits")
    # Scales and codes come on top: a 32-bit one for each 64 weights at most.
    assert elements * bits / 8 <= saved <= elements * (bits + 1) / 8 + 4096


def test_the_blocks_are_what_each_model_s_class_calls_so(tiny_sdxl: Path, tiny_sd3: Path) -> None:
    for opened, inside, outside in (
        (unet(tiny_sdxl), "attn1.to_q", "time_embedding.linear_1"),
        (
            SD3Transformer2DModel.from_pretrained(tiny_sd3, subfolder="transformer"),
            "transformer_blocks.0.attn.to_q",
            "context_embedder",
        ),
        (
            CLIPTextModel.from_pretrained(tiny_sdxl, subfolder="text_encoder"),
            "layers.0.self_attn.q_proj",
            "",
        ),
        (
            T5EncoderModel.from_pretrained(tiny_sd3, subfolder="text_encoder_3"),
            "SelfAttention.q",
            "DenseReluDense.wo",
        ),
    ):
        opened.requires_grad_(False)
        told = quantise(opened, "part", "int8-quanto", CPU, via="cpu")
        kinds = {name: type(module).__name__ for name, module in opened.named_modules()}
        assert told.layers > 0
        assert "QLinear" in {kind for name, kind in kinds.items() if name.endswith(inside)}
        if outside:
            assert {kind for name, kind in kinds.items() if name.endswith(outside)} == {"Linear"}


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="no layers that int8-quanto could hold"):
        quantise(nn.Linear(64, 64), "model", "int8-quanto", CPU, via="cpu")


def test_no_change_changes_nothing(tiny_sdxl: Path) -> None:
    opened = unet(tiny_sdxl)
    told = quantise(opened, "unet", "no_change", CPU, via="cpu")
    assert told.layers == 0
    assert told.before == told.after == weight_bytes(opened)
    assert told.before == sum(p.numel() * 4 for p in opened.parameters())


def test_int8_in_bf16_on_a_cpu_is_refused() -> None:
    half = model().to(torch.bfloat16)
    with pytest.raises(ConfigError, match="set mixed_precision to no"):
        quantise(half, "model", "int8-quanto", CPU, via="cpu")


def test_what_does_not_work_on_a_device_names_what_does() -> None:
    for name in FORMATS:
        for device in ("cpu", "cuda", "mps"):
            why = quantised_in(name, device, "fp32")
            instead = QUANTISERS[name].fact("not_on", {}).get(device)
            assert (why is None) == (instead is None)
            if instead is not None:
                assert instead in str(why)
                assert quantised_in(instead, device, "fp32") is None


def test_a_missing_package_is_told_before_anything_is_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    Quantiser(PrecisionSettings(base_model_precision="int8-torchao"))
    for part in ("base_model_precision", "text_encoder_2_precision"):
        with pytest.raises(ExtraMissing, match=r"nf4-bnb needs the package 'bitsandbytes'") as told:
            Quantiser(PrecisionSettings(**{part: "nf4-bnb"}))
        assert "pip install 'simpletuner[bnb]'" in str(told.value)


def test_weights_mapped_from_a_file_at_any_place_give_the_same_products(tmp_path: Path) -> None:
    """Files are mapped at 8 bytes; kernels that want 16 read past such tensors, or crash."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    for name in FORMATS:
        found = []
        for shift in (0, 8):
            shrunk = model()
            weight = shrunk.block.wide.weight
            memory = torch.empty(weight.nbytes + 64, dtype=torch.uint8)
            start = -memory.data_ptr() % 16 + shift
            place = memory[start : start + weight.nbytes].view(torch.float32).view(weight.shape)
            shrunk.block.wide.weight = nn.Parameter(place.copy_(weight), requires_grad=False)
            assert shrunk.block.wide.weight.data_ptr() % 16 == shift
            quantise(shrunk, "model", name, CPU, via="cpu")
            found.append(shrunk.block.wide(x))
        assert torch.equal(*found), name


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_computes_in_each_half_that_it_does_not_refuse(name: str, dtype: torch.dtype) -> None:
    short = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    shrunk = model().to(dtype)
    if quantised_in(name, "cpu", short):
        with pytest.raises(ConfigError, match="set mixed_precision to no"):
            quantise(shrunk, "model", name, CPU, via="cpu")
        return
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = shrunk.block.wide(x)

    quantise(shrunk, "model", name, CPU, via="cpu")

    found = shrunk.block.wide(x)
    assert found.dtype == dtype
    assert (found - exact).float().norm() / exact.float().norm() < WORST[name]


@pytest.mark.parametrize(("family", "part"), [("sd3", "transformer"), ("flux", "transformer")])
def test_what_stands_around_the_blocks_stays_exact(
    family: str, part: str, request: pytest.FixtureRequest
) -> None:
    """The layers that are left out in the field too: embedders, the time's, the last ones."""
    cls = SD3Transformer2DModel if family == "sd3" else FluxTransformer2DModel
    opened = cls.from_pretrained(request.getfixturevalue(f"tiny_{family}"), subfolder=part)
    opened.requires_grad_(False)

    quantise(opened, part, "int8-quanto", CPU, via="cpu")

    around = ("time_text_embed", "context_embedder", "x_embedder", "pos_embed", "norm_out")
    for name, module in opened.named_modules():
        if isinstance(module, nn.Linear) and name.startswith((*around, "proj_out")):
            assert type(module) is nn.Linear, name
    kinds = {type(m).__name__ for n, m in opened.named_modules() if "blocks.0." in n}
    assert "QLinear" in kinds


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", ["flux", "sd1x", "sd3", "sdxl"])
def test_every_family_learns_over_every_format(
    family: str, name: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    stepper = build_stepper(folder, family_name=family, learning_rate=1e-2, base_format=name)
    window = window_of(make_batch(1, 2, family_name=family))
    losses = [stepper.step(0, window).loss.item() for _ in range(8)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("int4-torchao", "int4-quanto"),
        ("fp8uz-quanto", "fp8-quanto"),
        ("int8-sdnq", "int8-torchao"),
    ],
)
def test_a_format_of_the_field_that_is_not_here_names_one_that_is(name: str, instead: str) -> None:
    told = f"{name} is not offered here; take {instead}"
    with pytest.raises(ConfigError, match=told):
        QUANTISERS[name]
    with pytest.raises(ValidationError, match=told):
        PrecisionSettings(base_model_precision=name)


def test_what_is_named_instead_is_there() -> None:
    assert set(QUANTISERS.elsewhere.values()) <= set(QUANTISERS)
    assert not set(QUANTISERS.elsewhere) & set(QUANTISERS)
