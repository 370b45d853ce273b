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
from simpletuner.runtime.allocator import keep_freed_memory

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


@dataclass(frozen=True)
class _Team:
    """How the processes share the work of Muon.

    Args:
        updates: In shared memory, as long as all matrices; each process writes those of its own.
        meet: Waits for the other processes.
    """

    rank: int
    workers: int
    updates: Tensor
    meet: Callable[[], object]


@dataclass
class _Vectors:
    """A module's parameters as views into one vector, and vectors of the same length beside it.

    Args:
        matrices: Where in the vector the weights of the inner layers lie, with their shapes
            (out, in) once flattened: those that Muon trains. They are at its start.
    """

    weights: Tensor
    average: Tensor
    first: Tensor
    second: Tensor
    gradients: Tensor
    matrices: tuple[tuple[slice, tuple[int, int]], ...] = ()

    @classmethod
    def of(cls, module: nn.Module) -> _Vectors:
        inner = _inner_weights(module)
        parameters = [p for p in module.parameters() if p.requires_grad]
        parameters.sort(key=lambda p: id(p) not in inner)  # stable
        weights = torch.cat([p.detach().flatten().float() for p in parameters])
        gradients = torch.zeros_like(weights)
        offset, matrices = 0, []
        for p in parameters:
            place = slice(offset, offset + p.numel())
            if id(p) in inner:
                matrices.append((place, (p.shape[0], p.numel() // p.shape[0])))
            p.data = weights[place].view_as(p)
            p.grad = gradients[place].view_as(p)
            offset += p.numel()
        zeros = torch.zeros_like
        moments = zeros(weights), zeros(weights)
        return cls(weights, weights.clone(), *moments, gradients, tuple(matrices))

    def saved(self) -> dict[str, Tensor]:
        return {
            "weights": self.weights,
            "average": self.average,
            "first": self.first,
            "second": self.second,
        }

    def step(self, step: int, rate: float, decay: float, team: _Team) -> None:
        """One step of Muon and AdamW, then of the moving average."""
        norm = self.gradients.norm()
        self.gradients.mul_(torch.clamp(1.0 / (norm + 1e-6), max=1.0))
        self.weights.mul_(1 - rate * 0.01)
        split = self.matrices[-1][0].stop if self.matrices else 0
        self._muon(slice(0, split), rate, team)
        self._adam(slice(split, None), step, rate)
        self.average.lerp_(self.weights, 1 - min(decay, (1 + step) / (10 + step)))

    def _adam(self, place: slice, step: int, rate: float) -> None:
        """AdamW (Loshchilov and Hutter, arXiv:1711.05101)."""
        gradients, first, second = self.gradients[place], self.first[place], self.second[place]
        first.lerp_(gradients, 0.1)
        second.mul_(0.99).addcmul_(gradients, gradients, value=0.01)
        scale = (second / (1 - 0.99 ** (step + 1))).sqrt_().add_(1e-8)
        self.weights[place].addcdiv_(first, scale, value=-rate / (1 - 0.9 ** (step + 1)))

    def _muon(self, place: slice, rate: float, team: _Team) -> None:
        """Muon (Jordan et al., kellerjordan.github.io/posts/muon), as large as AdamW's steps.

        The factor .2 √max(out, in) is that of Liu et al., arXiv:2502.16982, section 2.2. A
        convolution is a matrix [out, in × kh × kw].
        """
        momentum = self.first[place].lerp_(self.gradients[place], 0.05)
        ahead = self.gradients[place].lerp(momentum, 0.95)
        for number, (inside, shape) in enumerate(self.matrices):
            if number % team.workers == team.rank:
                straight = _orthogonal(ahead[inside].view(shape)).mul_(0.2 * math.sqrt(max(shape)))
                team.updates[inside].copy_(straight.reshape(-1))
        team.meet()
        self.weights[place].sub_(team.updates, alpha=rate)


def _inner_weights(module: nn.Module) -> set[int]:
    """Identities of the weights that Muon trains: not embeddings, nor what meets few channels."""
    layers = (m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    return {id(m.weight) for m in layers if min(m.weight.shape[:2]) >= 16}


def _orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest semi-orthogonal matrix [M, N], by five Newton-Schulz steps."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


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
    vectors = _Vectors.of(make(work).module)
    shared = torch.zeros(work.workers, len(vectors.weights) + 2).share_memory_()
    updates = torch.zeros(sum(math.prod(shape) for _, shape in vectors.matrices)).share_memory_()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the processes stop by themselves
    processes = [
        context.Process(
            target=_work, args=(stage, work, make, budget, rank, shared, updates, barrier)
        )
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
    updates: Tensor,
    barrier: Any,
) -> None:
    """One process of `train`."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(work.seed)  # the same weights in every process
    task = make(work)
    team = _Team(rank, work.workers, updates, barrier.wait)
    run = _Run(stage, work, task, budget, team, shared)
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
        team: _Team,
        shared: Tensor,
    ) -> None:
        self.stage, self.work, self.task, self.budget = stage, work, task, budget
        self.team, self.rank, self.shared = team, team.rank, shared
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
            facts["bf16"] = has_fast_bf16()
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
        self.team.meet()
        torch.mean(self.shared[:, :-2], 0, out=vectors.gradients)
        stop = bool(self.shared[:, -2].any())
        self.cpu = self.before + float(self.shared[:, -1].sum())
        self.team.meet()
        decaying = self.total is not None and self.step >= DECAY_FROM * self.total
        rate = rate_at(self.step, self.total, self.task.rate)
        vectors.step(self.step, rate, 0.998 if decaying else 0.99, self.team)
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
