"""The builders behind the rows of OPTIMIZERS.

Each takes torch's parameter groups, the class its row names, a seed, and the optimizer's keywords.
"""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch.optim import Optimizer

from simpletuner.core.extras import require
from simpletuner.optim.adamw_bf16 import AdamWBF16

Groups = list[dict[str, Any]]


def adamw_bf16(groups: Groups, *, cls: None, seed: int, **options: Any) -> Optimizer:
    """Ours."""
    return AdamWBF16(groups, seed=seed, **options)


def torchs(groups: Groups, *, cls: str, seed: int, **options: Any) -> Optimizer:
    """PyTorch's own; nothing in them is random."""
    optimizer: Optimizer = getattr(torch.optim, cls)(groups, **options)
    return optimizer


def optimis(groups: Groups, *, cls: str, seed: int, **options: Any) -> Optimizer:
    """Those of torch-optimi; nothing in them is random."""
    return _of_package("optimi", cls, groups, options, extra="train")


def bitsandbytes(groups: Groups, *, cls: str, seed: int, **options: Any) -> Optimizer:
    """Those of bitsandbytes; nothing in them is random."""
    if "betas" in options and len(options["betas"]) == 3:  # what it calls so has no schedule here
        options |= {"t_alpha": None, "t_beta3": None}
    return _of_package("bitsandbytes.optim", cls, groups, options, extra="bnb")


def came(groups: Groups, *, cls: None, seed: int, **options: Any) -> Optimizer:
    """CAME of pytorch-optimizer; nothing in it is random."""
    return _of_package("pytorch_optimizer", "CAME", groups, options, extra="optimizers")


def soap(groups: Groups, *, cls: None, seed: int, **options: Any) -> Optimizer:
    """SOAP of pytorch-optimizer; nothing in it is random.

    Its bases come out of LAPACK in one layout and out of a checkpoint in another, and a product
    rounds by the layout; after each step all of them lie the same way.

    Raises:
        ExtraMissing: Its package is not installed.
    """
    package = require("pytorch_optimizer", extra="optimizers", why="optimizer soap")

    class SOAP(package.SOAP):  # type: ignore[misc,name-defined]
        """The package's, with its memory in one layout and its options in the groups alone."""

        def step(self, closure: Any = None) -> Any:
            """One step."""
            # It keeps them with each tensor too, where a resume would bring the old ones back.
            for group in self.param_groups:
                for state in (self.state[p] for p in group["params"] if p in self.state):
                    state["precondition_frequency"] = group["precondition_frequency"]
                    state["shampoo_beta"] = group["betas"][1]
            loss = super().step(closure)
            for state in self.state.values():
                state["exp_avg_sq"] = state["exp_avg_sq"].contiguous()
                state["Q"] = [q.contiguous() if len(q) else q for q in state["Q"]]
            return loss

    optimizer: Optimizer = SOAP(groups, **options)
    return optimizer


def schedule_free(groups: Groups, *, cls: None, seed: int, **options: Any) -> Optimizer:
    """Schedule-free AdamW; what trains are its y, and x is what it is judged by."""
    name = "AdamWScheduleFree"
    made = _of_package("schedulefree", name, groups, options, extra="optimizers")
    made.train()  # type: ignore[attr-defined]
    return made


def prodigy(
    groups: Groups, *, cls: None, seed: int, steps: int | None = None, **options: Any
) -> Optimizer:
    """Prodigy; after `steps` optimizer steps the rate it has found stays.

    Raises:
        ExtraMissing: Its package is not installed.
    """
    package = require("prodigyopt", extra="optimizers", why="optimizer prodigy")

    class Prodigy(package.Prodigy):  # type: ignore[misc,name-defined]
        """The package's, with an end of the search and a memory of one shape."""

        def step(self, closure: Any = None) -> Any:
            """One step."""
            if steps is not None and self.param_groups[0]["k"] >= steps:
                for group in self.param_groups:
                    group["growth_rate"] = 1.0
            loss = super().step(closure)
            # Of what began at 0 it keeps a single 0, where a resumed run would keep a tensor.
            for state in self.state.values():
                if state["p0"].ndim == 0:
                    state["p0"] = torch.zeros_like(state["s"])
            return loss

    with redirect_stdout(StringIO()):  # it prints that weight decay is decoupled
        optimizer: Optimizer = Prodigy(groups, **options)
    return optimizer


def muon(groups: Groups, *, cls: None, seed: int, **options: Any) -> Optimizer:
    """Muon for matrices and AdamW for the rest, as one."""
    split: tuple[Groups, Groups] = ([], [])
    for group in groups:
        pairs = list(zip(group["names"], group["params"], strict=True))
        for part, title, wanted in zip(split, ("", " (AdamW)"), (True, False), strict=True):
            chosen = [(name, p) for name, p in pairs if (p.ndim == 2) is wanted]
            if chosen:
                names, params = (list(each) for each in zip(*chosen, strict=True))
                name = f"{group['name']}{title}"
                part.append({**group, "name": name, "names": names, "params": params})
    return _Muon(split[0], split[1], **options)


class _Muon(Optimizer):
    """Two optimizers that share what they remember; updates are of AdamW's size.

    Source: Jordan et al. 2024; the size is that of Liu et al. 2025 (arXiv 2502.16982).
    """

    def __init__(self, matrices: Groups, others: Groups, *, lr: float, **options: Any) -> None:
        super().__init__([*matrices, *others], {"lr": lr})
        self.parts: list[Optimizer] = []
        if matrices:
            rule = "match_rms_adamw"
            self.parts.append(torch.optim.Muon(matrices, lr=lr, adjust_lr_fn=rule, **options))
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr))
        for part in self.parts:
            part.state = self.state
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both."""
        for part in self.parts:
            part.step()


def _of_package(
    package: str, cls: str, groups: Groups, options: dict[str, Any], *, extra: str
) -> Optimizer:
    module = require(package, extra=extra, why=f"optimizer {groups[0]['optimizer']}")
    optimizer: Optimizer = getattr(module, cls)(groups, **options)
    return optimizer
