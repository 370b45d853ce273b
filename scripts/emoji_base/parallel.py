"""Trains one stage with data-parallel processes of one thread; stopped anywhere, it continues.

Weights, gradients and Adam's moments are one vector each. The processes meet in shared memory once
a step, so all hold the same weights, and a checkpoint is four tensors.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scripts.emoji_base.work import Work

DECAY_FROM = 0.6  # of a stage's steps; before it the learning rate does not know the total
WARMUP_STEPS = 50
CHECKPOINT_CPU_SECONDS = 120.0


class Task(Protocol):
    """What a stage trains: `module`, with `batch` pictures a step over all processes."""

    module: nn.Module
    batch: int
    rate: float

    def loss(self, generator: torch.Generator, count: int) -> Tensor:
        """The mean loss of `count` samples drawn by `generator`."""


@dataclass(frozen=True)
class Budget:
    """How long a stage trains.

    Args:
        seconds: CPU-seconds of each process. The total of steps follows from the speed seen.
        steps: The total of steps, which makes the stage repeatable; None: from `seconds`.
        cap: CPU-seconds of all processes together at which training stops unfinished.
    """

    seconds: float
    steps: int | None
    cap: float


@dataclass
class _Vectors:
    """A module's parameters as views into one vector, and vectors of the same length beside it."""

    weights: Tensor
    average: Tensor
    first: Tensor
    second: Tensor
    gradients: Tensor

    @classmethod
    def of(cls, module: nn.Module) -> _Vectors:
        parameters = [p for p in module.parameters() if p.requires_grad]
        weights = torch.cat([p.detach().flatten().float() for p in parameters])
        gradients = torch.zeros_like(weights)
        offset = 0
        for p in parameters:
            place = slice(offset, offset + p.numel())
            p.data = weights[place].view_as(p)
            p.grad = gradients[place].view_as(p)
            offset += p.numel()
        zeros = torch.zeros_like
        return cls(weights, weights.clone(), zeros(weights), zeros(weights), gradients)

    def saved(self) -> dict[str, Tensor]:
        return {
            "weights": self.weights,
            "average": self.average,
            "first": self.first,
            "second": self.second,
        }

    def step(self, step: int, rate: float, decay: float) -> None:
        """AdamW (Loshchilov and Hutter, arXiv:1711.05101), then the moving average."""
        norm = self.gradients.norm()
        self.gradients.mul_(torch.clamp(1.0 / (norm + 1e-6), max=1.0))
        self.first.lerp_(self.gradients, 0.1)
        self.second.mul_(0.99).addcmul_(self.gradients, self.gradients, value=0.01)
        scale = (self.second / (1 - 0.99 ** (step + 1))).sqrt_().add_(1e-8)
        self.weights.mul_(1 - rate * 0.01)
        self.weights.addcdiv_(self.first, scale, value=-rate / (1 - 0.9 ** (step + 1)))
        self.average.lerp_(self.weights, 1 - min(decay, (1 + step) / (10 + step)))


def has_fast_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself; where it does not, bf16 is slower than fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def autocast() -> torch.autocast:
    """Bf16 for the forward pass where that is faster. To be entered anew for each forward."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bf16())


def rate_at(step: int, total: int | None, rate: float) -> float:
    """Constant after a short warm-up; falls to a hundredth over the last part of `total` steps."""
    warm = rate * min(1.0, (step + 1) / WARMUP_STEPS)
    if total is None or step < DECAY_FROM * total:
        return warm
    left = (total - step) / (total - DECAY_FROM * total)
    return warm * (0.01 + 0.99 * left)


def train(stage: str, work: Work, make: Callable[[Work], Task], budget: Budget) -> bool:
    """Train a stage to its end and write its averaged weights to ``<stage>.safetensors``.

    Returns:
        False if it was stopped: by Ctrl-C, SIGTERM or the cap. It then continues where it was.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(work.workers)
    numbers = sum(p.numel() for p in make(work).module.parameters() if p.requires_grad)
    shared = torch.zeros(work.workers, numbers + 2).share_memory_()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the processes stop by themselves
    processes = [
        context.Process(target=_work, args=(stage, work, make, budget, rank, shared, barrier))
        for rank in range(work.workers)
    ]
    for process in processes:
        process.start()
    signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in processes])
    while any(process.is_alive() for process in processes):
        connection.wait([process.sentinel for process in processes if process.is_alive()])
        if any(process.exitcode for process in processes):
            barrier.abort()
    for process in processes:
        process.join()
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if any(process.exitcode for process in processes):
        raise SystemExit(f"{stage}: a process ended with {[p.exitcode for p in processes]}")
    checkpoint = f"{stage}.checkpoint.safetensors"
    if work.has(checkpoint):
        ledger = work.facts("cpu_seconds.json")
        ledger[stage] = work.metadata(checkpoint)["cpu_seconds"]
        work.save_facts("cpu_seconds.json", ledger)
    return work.has(f"{stage}.safetensors")


def _work(
    stage: str,
    work: Work,
    make: Callable[[Work], Task],
    budget: Budget,
    rank: int,
    shared: Tensor,
    barrier: Any,
) -> None:
    """One process of `train`."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(work.seed)  # the same weights in every process
    task = make(work)
    run = _Run(stage, work, task, budget, rank, shared, barrier)
    try:
        run.go(stopped)
    except threading.BrokenBarrierError as error:
        raise SystemExit(f"{stage}: the other process ended") from error


class _Run:
    """The loop of one process."""

    def __init__(
        self,
        stage: str,
        work: Work,
        task: Task,
        budget: Budget,
        rank: int,
        shared: Tensor,
        barrier: Any,
    ) -> None:
        self.stage, self.work, self.task, self.budget = stage, work, task, budget
        self.rank, self.shared, self.barrier = rank, shared, barrier
        self.vectors = _Vectors.of(task.module)
        self.step, self.total, self.before = 0, budget.steps, 0.0
        self.checkpoint = f"{stage}.checkpoint.safetensors"
        if work.has(self.checkpoint):
            facts = work.metadata(self.checkpoint)
            self.step, self.before = facts["step"], facts["cpu_seconds"]
            self.total = facts["total"] or self.total
            for name, tensor in work.tensors(self.checkpoint).items():
                self.vectors.saved()[name].copy_(tensor)
        self.cpu = self.saved_at = self.before
        self.losses: list[float] = []

    def go(self, stopped: threading.Event) -> None:
        """Steps until the total, the cap or a signal."""
        parent = multiprocessing.parent_process()
        while self.total is None or self.step < self.total:
            orphan = parent is not None and not parent.is_alive()
            stop = self._take_step(stopped.is_set() or orphan)
            done = self.step == self.total
            if self.rank == 0 and (self.step % 50 == 0 or done or stop):
                self._report()
            if done or stop or self.cpu - self.saved_at > CHECKPOINT_CPU_SECONDS:
                self.saved_at = self.cpu
                if self.rank == 0:
                    facts = {"step": self.step, "total": self.total, "cpu_seconds": self.cpu}
                    self.work.save_tensors(self.checkpoint, self.vectors.saved(), **facts)
            if stop:
                return
        if self.rank == 0:
            self.vectors.weights.copy_(self.vectors.average)
            named = {n: p for n, p in self.task.module.named_parameters() if p.requires_grad}
            facts = {"steps": self.step, "cpu_seconds": self.cpu, "batch": self.task.batch}
            self.work.save_tensors(f"{self.stage}.safetensors", named, **facts)

    def _take_step(self, stop: bool) -> bool:
        workers, vectors = self.work.workers, self.vectors
        generator = torch.Generator()
        generator.manual_seed((self.work.seed * 1_000_003 + self.step) * 64 + self.rank)
        vectors.gradients.zero_()
        loss = self.task.loss(generator, self.task.batch // workers)
        loss.backward()
        self.losses.append(float(loss.detach()))
        mine = self.shared[self.rank]
        mine[:-2].copy_(vectors.gradients)
        mine[-2], mine[-1] = float(stop), time.process_time()
        self.barrier.wait()
        torch.mean(self.shared[:, :-2], 0, out=vectors.gradients)
        stop = bool(self.shared[:, -2].any())
        self.cpu = self.before + float(self.shared[:, -1].sum())
        self.barrier.wait()
        decaying = self.total is not None and self.step >= DECAY_FROM * self.total
        rate = rate_at(self.step, self.total, self.task.rate)
        vectors.step(self.step, rate, 0.998 if decaying else 0.99)
        self.step += 1
        if self.total is None and self.cpu >= DECAY_FROM * self.budget.seconds * workers:
            self.total = math.ceil(self.step / DECAY_FROM)
        return stop or self.cpu >= self.budget.cap

    def _report(self) -> None:
        recent = self.losses[-50:]
        share = f"/{self.total}" if self.total else ""
        speed = (self.cpu - self.before) / max(1, len(self.losses))
        print(
            f"{self.stage}: step {self.step}{share}, loss {sum(recent) / len(recent):.4f}, "
            f"{speed:.2f} CPU-seconds a step, {self.cpu / 60:.1f} CPU-minutes",
            flush=True,
        )
