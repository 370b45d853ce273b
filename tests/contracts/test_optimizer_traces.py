"""What every built optimizer does in 200 steps is what its paper, or its library alone, says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from simpletuner.core.types import ParamGroup
from simpletuner.optim.optimizers import OPTIMIZERS
from tests.contracts.test_optimizers import BUILT, CASES, optimizer_of


def adam(p: Tensor, grads: list[Tensor], lr: float, row: dict[str, Any], decoupled: bool) -> Tensor:
    """Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2. fp64."""
    (beta1, beta2), eps, decay = row["betas"], row["eps"], row["weight_decay"]
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        g = g if decoupled else g + decay * p
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        p = p * (1 - lr * decay) if decoupled else p
        p = p - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    return p


def lion(p: Tensor, grads: list[Tensor], lr: float, row: dict[str, Any]) -> Tensor:
    """Chen et al. 2023 (arXiv 2302.06675), algorithm 2. fp64."""
    (beta1, beta2), decay = row["betas"], row["weight_decay"]
    m = torch.zeros_like(p)
    for g in grads:
        p = p - lr * ((beta1 * m + (1 - beta1) * g).sign() + decay * p)
        m = beta2 * m + (1 - beta2) * g
    return p


def sgd(p: Tensor, grads: list[Tensor], lr: float, row: dict[str, Any]) -> Tensor:
    for g in grads:
        p = p - lr * g
    return p


def adafactor(p: Tensor, grads: list[Tensor], lr: float, row: dict[str, Any]) -> Tensor:
    """Shazeer & Stern 2018, algorithm 4 with relative steps, of a matrix. fp64."""
    rows, cols = torch.zeros(p.shape[0], 1).double(), torch.zeros(1, p.shape[1]).double()
    for t, g in enumerate(grads, start=1):
        share = t**-0.8
        rows = (1 - share) * rows + share * (g**2).mean(1, keepdim=True)
        cols = (1 - share) * cols + share * (g**2).mean(0, keepdim=True)
        update = g / (rows @ cols / rows.mean()).sqrt().clamp(min=2.0**-23)
        update = update / max(1.0, float(update.pow(2).mean().sqrt()))
        p = p - max(1e-3, float(p.pow(2).mean().sqrt())) * min(lr, t**-0.5) * update
    return p


def schedule_free(p: Tensor, grads: list[Tensor], lr: float, row: dict[str, Any]) -> Tensor:
    """Defazio et al. 2024 (arXiv 2405.15682), algorithm 1, at a constant rate: its x. fp64."""
    (beta1, beta2), eps, decay = row["betas"], row["eps"], row["weight_decay"]
    x, z, v = p, p, torch.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        y = (1 - beta1) * z + beta1 * x
        v = beta2 * v + (1 - beta2) * g**2
        z = z - lr * (g / ((v / (1 - beta2**t)).sqrt() + eps) + decay * y)
        x = (1 - 1 / t) * x + z / t
    return x


REFERENCES: dict[str, tuple[Any, float]] = {
    **{
        name: (lambda *args: adam(*args, decoupled=True), 1e-4)
        for name in ("adamw_bf16", "torch-adamw", "optimi-adamw", "bnb-adamw", "bnb-adamw-paged")
    },
    **{
        name: (lambda *args: adam(*args, decoupled=False), 1e-4)
        for name in ("torch-adam", "optimi-adam")
    },
    **{name: (lion, 1e-4) for name in ("optimi-lion", "bnb-lion", "bnb-lion-paged")},
    "torch-sgd": (sgd, 1e-4),
    "torch-adafactor": (adafactor, 1e-4),
    "adamw_schedulefree": (schedule_free, 1e-4),
    # what 8 bits cost
    **{
        name: (lambda *args: adam(*args, decoupled=True), 0.05)
        for name in ("bnb-adamw8bit", "bnb-adamw8bit-paged")
    },
    **{name: (lion, 0.2) for name in ("bnb-lion8bit", "bnb-lion8bit-paged")},
}
"""The reference, and how far from it, relative to the way gone, 200 steps may end."""


@pytest.mark.parametrize("name", REFERENCES)
def test_two_hundred_steps_are_those_of_the_paper(name: str) -> None:
    reference, tolerance = REFERENCES[name]
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(64, 128, generator=generator)
    drift = 0.3 * torch.randn(64, 128, generator=generator)
    grads = [drift + torch.randn(64, 128, generator=generator) for _ in range(200)]
    weight = Parameter(start.clone())
    groups = (ParamGroup("all", {"weight": weight}),)
    optimizer = optimizer_of(name, groups, learning_rate=1e-3)
    for gradient in grads:
        weight.grad = gradient.clone()
        optimizer.step()
    if hasattr(optimizer, "eval"):
        optimizer.eval()

    row = {"betas": None, "eps": None, **(OPTIMIZERS[name].facts or {})}
    wanted = reference(start.double(), [g.double() for g in grads], 1e-3, row)

    way = float((wanted - start).norm())
    assert float((weight.detach().double() - wanted).norm()) < tolerance * way


LIBRARIES = [name for name in BUILT if name not in REFERENCES]


@pytest.mark.parametrize("name", LIBRARIES)
def test_two_hundred_steps_are_those_of_the_library_alone(name: str) -> None:
    """Where a formula is long: the library's class in a bare loop, with the numbers of the row."""
    import bitsandbytes
    import optimi
    import prodigyopt
    import pytorch_optimizer

    facts = OPTIMIZERS[name].facts or {}
    given = {k: facts[k] for k in ("betas", "eps", "weight_decay") if facts.get(k) is not None}
    bare: Any = {
        "optimi-stableadamw": optimi.StableAdamW,
        "optimi-adan": optimi.Adan,
        "bnb-ademamix": bitsandbytes.optim.AdEMAMix,
        "bnb-ademamix8bit": bitsandbytes.optim.AdEMAMix8bit,
        "prodigy": prodigyopt.Prodigy,
        "soap": pytorch_optimizer.SOAP,
        "came": pytorch_optimizer.CAME,
        "muon": torch.optim.Muon,
    }[name]
    if name == "muon":
        given["adjust_lr_fn"] = "match_rms_adamw"
    lr = 1.0 if facts.get("own_rate") else 1e-3
    weights = [
        Parameter(torch.randn(64, 128, generator=torch.Generator().manual_seed(1)))
        for _ in range(2)
    ]
    groups = (ParamGroup("all", {"weight": weights[0]}),)
    both = optimizer_of(name, groups, learning_rate=lr), bare([weights[1]], lr=lr, **given)
    for step in range(200):
        gradient = torch.randn(64, 128, generator=torch.Generator().manual_seed(step))
        for weight, optimizer in zip(weights, both, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()

    assert torch.allclose(weights[0], weights[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [name for name, dtype in CASES if dtype == torch.bfloat16])
def test_a_thousand_steps_in_bf16_go_as_far_as_in_fp32(name: str) -> None:
    """With steps of a hundredth of the last digit of bf16, which rounding alone would swallow."""
    ways = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = Parameter(torch.ones(64, 64).to(dtype))
        groups = (ParamGroup("all", {"weight": weight}),)
        optimizer = optimizer_of(name, groups, learning_rate=5e-5, adam_weight_decay=0.0)
        for step in range(1000):
            noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
            weight.grad = (1 + 0.3 * noise).to(dtype)
            optimizer.step()
        ways[dtype] = float((1 - weight.detach().float()).mean())
    assert ways[torch.bfloat16] == pytest.approx(ways[torch.float32], rel=0.05)
