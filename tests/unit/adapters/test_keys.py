"""The names and the strength of every adapter, for the real shape of each family's model.

The models are built without memory, as their releases configure them; what ComfyUI takes of each is
in tests/golden/comfyui_keys.json.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from simpletuner.adapters.formats import FORMATS, Change, read_changes, write_changes
from simpletuner.adapters.lycoris_names import to_layout, to_library
from simpletuner.models.families import FAMILIES
from simpletuner.models.family import Family
from simpletuner.models.single_file import from_original, to_original

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/comfyui_keys.json").read_text())
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"


def sd1x() -> nn.Module:
    return UNet2DConditionModel(
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=(CROSS, CROSS, CROSS, PLAIN),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        attention_head_dim=8,
        cross_attention_dim=768,
    )


def sdxl() -> nn.Module:
    return UNet2DConditionModel(
        block_out_channels=(320, 640, 1280),
        down_block_types=(PLAIN, CROSS, CROSS),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2, 10),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        cross_attention_dim=2048,
    )


def sd3() -> nn.Module:
    """3.5 medium."""
    return SD3Transformer2DModel(
        num_layers=24,
        num_attention_heads=24,
        attention_head_dim=64,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        out_channels=16,
        qk_norm="rms_norm",
        dual_attention_layers=tuple(range(13)),
    )


def flux() -> nn.Module:
    """Dev."""
    return FluxTransformer2DModel(guidance_embeds=True)


REAL = {"sd1x": sd1x, "sdxl": sdxl, "sd3": sd3, "flux": flux}


@pytest.fixture(scope="module", params=REAL)
def real(request: pytest.FixtureRequest) -> tuple[type[Family], nn.Module]:
    with torch.device("meta"):
        return FAMILIES[request.param].load(), REAL[request.param]()  # type: ignore[return-value]


def matrices(model: nn.Module) -> dict[str, Tensor]:
    kinds = (nn.Linear, nn.Conv2d)
    return {name: m.weight for name, m in model.named_modules() if isinstance(m, kinds)}


def expanded(pattern: str) -> Iterator[str]:
    """``a{0-2}`` and ``a{b,c}`` written out."""
    pieces = re.split(r"\{([^}]*)\}", pattern)
    choices = []
    for number, piece in enumerate(pieces):
        if number % 2 == 0:
            choices.append([piece])
        elif found := re.fullmatch(r"(\d+)-(\d+)", piece):
            choices.append([str(n) for n in range(int(found[1]), int(found[2]) + 1)])
        else:
            choices.append(piece.split(","))
    for each in itertools.product(*choices):
        yield "".join(each)


def golden(name: str) -> set[str]:
    return {key for pattern in GOLDEN[name] for key in expanded(pattern)}


def test_every_matrix_has_the_name_that_comfyui_takes_and_none_is_left_out(
    real: tuple[type[Family], nn.Module],
) -> None:
    family, model = real
    names = family.names_of(model)
    places = {module: names.place(module) for module in matrices(model)}
    assert [module for module, place in places.items() if place is None] == []
    assert {place.module for place in places.values() if place} == golden(family.name)


def test_every_tensor_goes_to_the_original_and_back(
    real: tuple[type[Family], nn.Module],
) -> None:
    family, model = real
    weights, names = model.state_dict(), family.names_of(model)
    whole = to_original(weights, names)
    back = from_original(whole, names)
    assert {name: t.shape for name, t in back.items()} == {n: t.shape for n, t in weights.items()}
    assert {key.removesuffix(".weight") for key in whole} >= golden(family.name)


def few(model: nn.Module, count: int = 24) -> dict[str, Tensor]:
    """About so many of the matrices, from all over the model."""
    found = matrices(model)
    return {name: found[name] for name in list(found)[:: max(1, len(found) // count)]}


def sized(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    out, into, *kernel = weight.shape
    down = torch.randn(rank, into, *kernel, generator=generator)
    return down, torch.randn(out, rank, *[1] * len(kernel), generator=generator)


@pytest.mark.parametrize("share", ["one", 0.5, 1.0, 2.0])
@pytest.mark.parametrize("layout", FORMATS)
def test_alphas_and_mixed_ranks_are_the_same_change_in_every_layout(
    real: tuple[type[Family], nn.Module], layout: str, share: Any, tmp_path: Path
) -> None:
    """Alpha 1, half the rank, the rank and twice the rank; ranks 1, 2 and 3 by turns."""
    family, model = real
    generator = torch.Generator().manual_seed(3)
    changes = {}
    for number, (name, weight) in enumerate(few(model, 12).items()):
        rank = 1 + number % 3
        down, up = sized(weight, rank, generator)
        changes[name] = Change(down, up, 1.0 if share == "one" else share * rank)
    file = tmp_path / "lora.safetensors"
    write_changes(file, changes, layout, family, {})
    found = read_changes(file, family)
    assert found.keys() == changes.keys()
    probe = torch.Generator().manual_seed(4)
    for name, change in changes.items():
        x = torch.randn(change.down[0].numel(), generator=probe)
        torch.testing.assert_close(
            _answer(found[name], x), _answer(change, x), rtol=1e-4, atol=1e-4
        )


def _answer(change: Change, x: Tensor) -> Tensor:
    """The change of the module's weight times x, without making it whole."""
    return change.alpha / change.rank * (change.up.flatten(1) @ (change.down.flatten(1) @ x))


@pytest.mark.parametrize("layout", FORMATS)
def test_a_lokr_keeps_its_numbers_and_gets_the_names_of_the_layout(
    real: tuple[type[Family], nn.Module], layout: str
) -> None:
    family, model = real
    leaves = ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha", "dora_scale")
    modules = list(matrices(model))
    if layout == "kohya":  # which has no name for a part of a matrix
        places = {name: family.original.place(name) for name in modules}
        modules = [n for n, at in places.items() if at and at.shares == (1,) and not at.swapped]
    ours = {
        f"lycoris_{name.replace('.', '_')}.{leaf}": torch.tensor(float(number))
        for number, (name, leaf) in enumerate(itertools.product(modules, leaves))
    }
    there = to_layout(ours, layout, family)
    assert to_library(there, family) == ours
    begins = {"diffusers": "lycoris_", "kohya": "lora_unet_", "comfyui": "diffusion_model."}[layout]
    named = {key.rsplit(".", 1)[0].removeprefix(begins) for key in there if key.startswith(begins)}
    if layout == "comfyui":
        parts = {f"{family.denoiser}.{name}" for name in modules}
        assert named <= golden(family.name)
        assert {key.rsplit(".", 1)[0] for key in there if not key.startswith(begins)} <= parts
    if layout == "kohya":
        assert named <= {name.replace(".", "_") for name in golden(family.name)}


def test_what_is_written_holds_an_alpha_for_every_matrix(
    real: tuple[type[Family], nn.Module], tmp_path: Path
) -> None:
    """A reader without one takes alpha for the rank."""
    family, model = real
    generator = torch.Generator().manual_seed(5)
    changes = {n: Change(*sized(w, 2, generator), 1.0) for n, w in few(model, 6).items()}
    for layout, end in (("kohya", "lora_up.weight"), ("comfyui", "lora_B.weight")):
        write_changes(tmp_path / "x.safetensors", changes, layout, family, {})
        found = load_file(tmp_path / "x.safetensors")
        modules = [key.removesuffix(f".{end}") for key in found if key.endswith(end)]
        assert len(found) == 3 * len(modules)
        assert all(f"{module}.alpha" in found for module in modules)
