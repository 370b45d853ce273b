"""The builders behind the rows of QUANTISERS.

Each takes a linear layer, on the device where it is to be converted, and gives one that holds its
weights in another format; the bias stays as it is.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from simpletuner.core.extras import require


def unchanged(layer: nn.Linear) -> nn.Module:
    """The layer as it is."""
    return layer


def int8_quanto(layer: nn.Linear) -> nn.Module:
    """Eight bits, a scale for each output."""
    return _quanto(layer, "qint8")


def int4_quanto(layer: nn.Linear) -> nn.Module:
    """Four bits, a scale for each group of 128 inputs."""
    return _quanto(layer, "qint4")


def int2_quanto(layer: nn.Linear) -> nn.Module:
    """Two bits, a scale for each group of 128 inputs."""
    return _quanto(layer, "qint2")


def fp8_quanto(layer: nn.Linear) -> nn.Module:
    """Floats of eight bits (e4m3), a scale for each output."""
    return _quanto(layer, "qfloat8")


def nf4_bnb(layer: nn.Linear) -> nn.Module:
    """Normal floats of four bits (Dettmers et al. 2023, arXiv 2305.14314), scales in 8 bits."""
    bnb = require("bitsandbytes", extra="bnb", why="nf4-bnb")
    device, dtype = layer.weight.device, layer.weight.dtype
    made: Any = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    made.weight = bnb.nn.Params4bit(
        layer.weight.detach().cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    made.bias = layer.bias
    return made.to(device)  # the conversion itself


def int8_torchao(layer: nn.Linear) -> nn.Module:
    """Eight bits, a scale for each output."""
    return _torchao(layer, "Int8WeightOnlyConfig")


def fp8_torchao(layer: nn.Linear) -> nn.Module:
    """Floats of eight bits (e4m3), a scale for each output."""
    return _torchao(layer, "Float8WeightOnlyConfig")


def _quanto(layer: nn.Linear, dtype: str) -> nn.Module:
    quanto = require("optimum.quanto", extra="train", why=f"{dtype} by quanto")
    made: Any = quanto.QLinear.from_module(layer, weights=getattr(quanto, dtype))
    made.freeze()
    return made


def _torchao(layer: nn.Linear, config: str) -> nn.Module:
    torchao = require("torchao.quantization", extra="torchao", why=config)
    torchao.quantize_(layer, getattr(torchao, config)(), filter_fn=lambda *_: True)
    return layer
