"""The kernels that compute attention, and what each needs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from simpletuner.core.table import Row, Table


def _facts(
    package: str, dtypes: str, on: tuple[str, ...] = ("cuda",), *, trains: bool = True
) -> dict[str, Any]:
    return {"package": package, "dtypes": dtypes, "on": on, "trains": trains}


ATTENTION = Table(
    "attention kernel",
    (
        Row(
            "diffusers",
            "torch.nn.functional:scaled_dot_product_attention",
            "torch's own, the fastest of them that fits: flash, memory-efficient, cuDNN or plain.",
            facts=_facts("torch", "all", ("cpu", "cuda", "mps")),
        ),
        Row(
            "sageattention",
            "simpletuner.precision.kernels:sage",
            "Products in 8 bits, for validation alone: it gives no gradients. Faster pictures, and"
            " slightly other ones.",
            facts=_facts("sageattention", "bf16, fp16; fp32 is rounded to bf16", trains=False),
        ),
        Row(
            "xformers",
            None,
            "Memory-efficient attention of xformers, which torch has taken over.",
            facts=_facts("xformers", "all"),
        ),
        Row(
            "flash-attn",
            None,
            "FlashAttention 2, which torch has taken over.",
            facts=_facts("flash-attn", "bf16, fp16"),
        ),
        Row(
            "flash-attn-2",
            None,
            "The same.",
            facts=_facts("flash-attn", "bf16, fp16"),
        ),
        Row(
            "flash-attn-3",
            None,
            "FlashAttention 3, for Hopper cards.",
            facts=_facts("flash-attn-3, from its source", "bf16, fp16"),
        ),
        Row(
            "flash-attn-3-varlen",
            None,
            "The same for captions of different lengths.",
            facts=_facts("flash-attn-3, from its source", "bf16, fp16"),
        ),
    ),
)


def attends_in(name: str, device: str) -> str | None:
    """Why a kernel does not run on this machine; None if it does.

    Args:
        name: A row of ATTENTION.
        device: ``cpu``, ``cuda`` or ``mps``.
    """
    row = ATTENTION[name]
    on, package = row.fact("on"), row.fact("package")
    if row.pending or package == "torch":  # whose absence is told where it is imported
        return None
    if device not in on:
        return f"{name} runs on {' and '.join(on)} alone, and this is {device}; remove it"
    if find_spec(package) is None:
        return f"{name} needs a package that is not installed: pip install {package}"
    return None
