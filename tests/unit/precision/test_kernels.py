"""Another kernel computes attention where pictures are made, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch.nn import functional

from simpletuner.core.errors import ConfigError
from simpletuner.precision.attention import ATTENTION, attends_in
from simpletuner.precision.fit import fit
from simpletuner.precision.kernels import sage
from simpletuner.precision.settings import PrecisionSettings

CPU = torch.device("cpu")
LIBRARY = """
    # as the library is called; its products are in 8 bits and on CUDA, these are plain
    import torch

    calls = []

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None):
        assert tensor_layout == "HND" and q.dtype in (torch.float16, torch.bfloat16)
        assert q.shape[-1] in (64, 96, 128) and q.is_contiguous()
        calls.append(tuple(q.shape))
        weights = q @ k.transpose(-1, -2) * (sm_scale or q.shape[-1] ** -0.5)
        return torch.softmax(weights.float(), -1).to(q.dtype) @ v
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A package of the kernel's name and signature."""
    (tmp_path / "sageattention.py").write_text(dedent(LIBRARY))
    monkeypatch.syspath_prepend(str(tmp_path))
    import sageattention

    yield sageattention
    del sys.modules["sageattention"]


def model_of(size: int) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=size,
        num_attention_heads=1,
        joint_attention_dim=32,
        caption_projection_dim=size,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )


def answer(model: SD3Transformer2DModel) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return model(
        torch.randn(1, 4, 8, 8, generator=draw),
        torch.randn(1, 5, 32, generator=draw),
        torch.randn(1, 32, generator=draw),
        torch.full((1,), 500.0),
        return_dict=False,
    )[0]


def test_pictures_are_made_by_it_and_training_is_not(library: ModuleType) -> None:
    model = model_of(64)
    plain = answer(model.eval())
    fit([model], PrecisionSettings(attention_mechanism="sageattention"), CPU)
    model.train()
    answer(model).sum().backward()
    assert library.calls == []
    with torch.no_grad():
        assert torch.equal(answer(model), plain), "a roll-out of training is training"
        found = answer(model.eval())
    assert library.calls == [(1, 1, 16 + 5, 64)] * 2
    assert not torch.equal(found, plain)
    torch.testing.assert_close(found, plain, atol=2e-2, rtol=2e-2)
    functional.scaled_dot_product_attention(*torch.randn(3, 1, 1, 4, 64))
    assert len(library.calls) == 2, "only inside of the model"


def test_what_it_has_no_kernel_for_is_computed_by_torchs_own(library: ModuleType) -> None:
    query, key, value = torch.randn(3, 2, 1, 8, 64)
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    for more in ({"attn_mask": mask}, {"enable_gqa": True}):
        plain = functional.scaled_dot_product_attention(query, key, value, **more)
        assert torch.equal(sage(query, key, value, **more), plain)
    small = torch.randn(3, 2, 1, 8, 40)
    assert torch.equal(sage(*small), functional.scaled_dot_product_attention(*small))
    assert library.calls == []


def test_a_model_of_other_heads_is_refused() -> None:
    with pytest.raises(ConfigError, match="heads of 64, 96, 128 numbers, and this model has 40"):
        fit([model_of(40)], PrecisionSettings(attention_mechanism="sageattention"), CPU)


def test_what_a_machine_lacks_is_told(library: ModuleType) -> None:
    assert attends_in("sageattention", "cuda") is None
    assert attends_in("sageattention", "cpu") == (
        "sageattention runs on cuda alone, and this is cpu; remove it"
    )
    assert all(attends_in("diffusers", device) is None for device in ("cpu", "cuda", "mps"))
    assert {name for name, row in ATTENTION.items() if not row.pending} == {
        "diffusers",
        "sageattention",
    }


def test_the_line_that_installs_it_is_told() -> None:
    assert attends_in("sageattention", "cuda") == (
        "sageattention needs a package that is not installed: pip install sageattention"
    )
