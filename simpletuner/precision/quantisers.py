"""The number formats that frozen weights can be held in."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from simpletuner.core.table import Row, Table


def _facts(module: str, bits: int, weight_bytes: float, **more: Any) -> dict[str, Any]:
    """What a row is known by.

    Args:
        module: The package that holds and multiplies the weights.
        bits: Of a number.
        weight_bytes: For each weight of a large fp32 matrix, scales included.
        more: ``not_on``: kinds of device it does not work on, and the row to take there instead.
            ``whole_numbers_on_cpu``: the one dtype it computes in on a CPU. ``dora_in``: the dtype
            of the model that DoRA needs over it, where not any will do. ``one_dtype``: the weights
            are opened in what the model computes in, or the way back fails. ``lycoris``: the row to
            take instead for an adapter of LyCORIS, which cannot read these weights.
    """
    return {"module": module, "bits": bits, "weight_bytes": weight_bytes, **more}


_ELSEWHERE = MappingProxyType(
    {
        # torchao 0.18 packs four bits for CUDA alone, and in bf16 or with another package
        **dict.fromkeys(("int4-torchao", "int8dq-int4-torchao", "fp8-int4-torchao"), "int4-quanto"),
        # rounds activations to eight bits as well, in training too
        "int8dq-torchao": "int8-torchao",
        **dict.fromkeys(("fp8wo-torchao", "fp8-native", "fp8-transformerengine"), "fp8-torchao"),
        "fp8uz-quanto": "fp8-quanto",
        "fp8-sdnq": "fp8-torchao",
        **dict.fromkeys((f"{name}-sdnq" for name in ("int8", "uint8")), "int8-torchao"),
        **dict.fromkeys(
            (f"{name}-sdnq" for name in ("int6", "int5", "uint5", "uint4", "int4")), "int4-quanto"
        ),
        **dict.fromkeys((f"{name}-sdnq" for name in ("uint3", "uint2")), "int2-quanto"),
        **dict.fromkeys((f"{name}-sdnq" for name in ("int16", "uint16", "fp16")), "no_change"),
    }
)

QUANTISERS = Table(
    "precision",
    (
        Row(
            "no_change",
            "simpletuner.precision.formats:unchanged",
            "As the checkpoint is opened: base_model_default_dtype.",
            facts=_facts("", 0, 4),
        ),
        Row(
            "int8-quanto",
            "simpletuner.precision.formats:int8_quanto",
            "8 bits by optimum-quanto: half the memory of bf16 and hardly another model.",
            needs="train",
            # torch's int8 kernel for bf16 on a CPU reads past tensors that are not aligned.
            facts=_facts(
                "optimum.quanto",
                8,
                1.002,
                dora_in="fp32",
                one_dtype=True,
                whole_numbers_on_cpu="fp32",
            ),
        ),
        Row(
            "int4-quanto",
            "simpletuner.precision.formats:int4_quanto",
            "4 bits by optimum-quanto: a quarter of bf16, with some loss. The first use compiles"
            " its kernels for a minute or so.",
            needs="train",
            facts=_facts("optimum.quanto", 4, 0.5625, dora_in="fp32", one_dtype=True),
        ),
        Row(
            "int2-quanto",
            "simpletuner.precision.formats:int2_quanto",
            "2 bits by optimum-quanto: an eighth of bf16, and another model.",
            needs="train",
            facts=_facts("optimum.quanto", 2, 0.3125, dora_in="fp32", one_dtype=True),
        ),
        Row(
            "fp8-quanto",
            "simpletuner.precision.formats:fp8_quanto",
            "8-bit floats (e4m3) by optimum-quanto: half of bf16; coarser than int8-quanto.",
            needs="train",
            facts=_facts(
                "optimum.quanto",
                8,
                1.002,
                dora_in="fp32",
                one_dtype=True,
                not_on={"mps": "int8-quanto"},
            ),
        ),
        Row(
            "nf4-bnb",
            "simpletuner.precision.formats:nf4_bnb",
            "4 bits by bitsandbytes, spaced for normally distributed weights (NF4, with doubly"
            " quantised scales): a quarter of bf16.",
            needs="bnb",
            facts=_facts(
                "bitsandbytes", 4, 0.5164, lycoris="int4-quanto", not_on={"mps": "int4-quanto"}
            ),
        ),
        Row(
            "int8-torchao",
            "simpletuner.precision.formats:int8_torchao",
            "8 bits by torchao: half the memory of bf16.",
            needs="torchao",
            facts=_facts("torchao.quantization", 8, 1.0024, lycoris="int8-quanto"),
        ),
        Row(
            "fp8-torchao",
            "simpletuner.precision.formats:fp8_torchao",
            "8-bit floats (e4m3) by torchao: half the memory of bf16.",
            needs="torchao",
            facts=_facts(
                "torchao.quantization",
                8,
                1.002,
                lycoris="fp8-quanto",
                not_on={"mps": "int8-torchao"},
            ),
        ),
    ),
    _ELSEWHERE,
)


def quantised_in(name: str, device: str, dtype: str) -> str | None:
    """Why weights cannot be held in this format there; None if they can.

    Args:
        name: A row of QUANTISERS.
        device: ``cpu``, ``cuda`` or ``mps``.
        dtype: What the model computes in: ``fp32``, ``bf16`` or ``fp16``.
    """
    row = QUANTISERS[name]
    instead = row.fact("not_on", {}).get(device)
    if instead is not None:
        return f"{name} does not work on this machine ({device}); take {instead}"
    only = row.fact("whole_numbers_on_cpu")
    if device == "cpu" and only and dtype != only:
        return (
            f"{name} on a CPU computes wrong numbers, or crashes, in {dtype}; set mixed_precision"
            " to no, or take int8-torchao"
        )
    return None
