"""The loop: one window, one optimizer step, then what is due."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from simpletuner.core.errors import RESUME, CacheError, DataError, Interrupted, TrainingError
from simpletuner.core.events import Bus, StepDone
from simpletuner.training.guards import LearningGuard, explain_not_finite

if TYPE_CHECKING:
    from simpletuner.data.plan import BatchPlan
    from simpletuner.training.control import Control
    from simpletuner.training.prefetch import Prefetcher, Window
    from simpletuner.training.state import TrainState
    from simpletuner.training.stepper import Outcome, Stepper
    from simpletuner.training.timetable import Timetable

Duty = Callable[["TrainState"], object]


class _Reading:
    """A step's numbers on their way to the CPU; reading them later costs no wait on a GPU."""

    def __init__(self, outcome: Outcome) -> None:
        numbers = torch.stack([outcome.loss.float(), outcome.grad_norm.float()])
        self._done: torch.cuda.Event | None = None
        if numbers.is_cuda:
            pinned = torch.empty(2, pin_memory=True)
            numbers = pinned.copy_(numbers, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        self._numbers = numbers

    def read(self) -> tuple[float, float]:
        """(loss, gradient norm)."""
        if self._done is not None:
            self._done.synchronize()
        loss, norm = self._numbers.tolist()
        return loss, norm


@dataclass(frozen=True)
class _Taken:
    """A step that was taken and not told yet."""

    step: int
    lr: float
    reading: _Reading
    window: Window
    seconds: float
    epoch: int
    skipped: bool


class Trainer:
    """Runs a plan through a stepper; duties are called with the state after a step."""

    def __init__(
        self,
        stepper: Stepper,
        plan: BatchPlan,
        prefetcher: Prefetcher,
        timetable: Timetable,
        duties: Mapping[str, Duty],
        control: Control,
        bus: Bus,
    ) -> None:
        self._stepper, self._plan, self._prefetcher = stepper, plan, prefetcher
        self._timetable, self._duties = timetable, duties
        self._control, self._bus = control, bus
        self._first = self._saved = 0

    def run(self, state: TrainState) -> None:
        """Train from `state.step` to the timetable's end.

        Raises:
            Interrupted: Asked to leave; a checkpoint of the last step is on disk.
            TrainingError: A guard spoke.
            CacheError, DataError: A window cannot be read; the steps before it are saved.
        """
        self._first = self._saved = state.step
        guard = LearningGuard(self._stepper.weights)
        told: _Taken | None = None
        if self._timetable.ends(state.step):  # finished: what a kill after the last step left out
            self._do(self._timetable.due(state.step), state)
        while state.step < self._timetable.total_steps:
            # 1. the window, read ahead by the prefetcher
            began = time.perf_counter()
            window = self._window(state, told)
            # 2. one optimizer step
            outcome = self._stepper.step(state.step, window)
            if not outcome.skipped:
                captions = (sample.caption for _, batch in window for sample in batch.samples)
                guard.watch(outcome.loss, captioned=any(captions))
            epoch, reading = self._plan.epoch(state.step), _Reading(outcome)
            taken = _Taken(state.step, outcome.lr, reading, window, 0.0, epoch, outcome.skipped)
            # 3. tell the step before, whose numbers have arrived by now
            self._tell(told)
            told = self._timed(taken, began)
            # 4. count
            self._count(state, window, outcome)
            # 5. what is due, and leaving cleanly; nothing is saved on top of an unread loss
            due = self._timetable.due(state.step)
            if due or self._control.leaving():
                self._tell(told)
                told = None
                self._do(due, state)
        self._tell(told)

    def _window(self, state: TrainState, told: _Taken | None) -> Window:
        """The next window; where it cannot be read, the steps done are told and saved first."""
        try:
            return self._prefetcher.window(state.step)
        except (CacheError, DataError) as error:
            self._tell(told)
            if state.step == 0:
                raise
            raise self._rescue(error, state) from error

    def _timed(self, taken: _Taken, began: float) -> _Taken:
        return replace(taken, seconds=time.perf_counter() - began)

    def _count(self, state: TrainState, window: Window, outcome: Outcome) -> None:
        state.epoch = self._plan.epoch(state.step)
        state.samples_seen += window[0][0].window_samples
        state.step += 1
        state.skipped += outcome.skipped

    def _tell(self, taken: _Taken | None) -> None:
        if taken is None:
            return
        loss, norm = taken.reading.read()
        if not math.isfinite(loss) or not (math.isfinite(norm) or taken.skipped):
            raise explain_not_finite(self._stepper, taken.step, taken.window)
        if taken.skipped:
            self._bus.notice(
                f"step {taken.step + 1} moved no weight: its gradients overflowed fp16; the next"
                " loss is scaled by half as much"
            )
        self._bus.emit(
            StepDone(
                step=taken.step + 1,
                total_steps=self._timetable.total_steps,
                epoch=taken.epoch + 1,
                loss=loss,
                lr=taken.lr,
                grad_norm=None if taken.skipped else norm,
                seconds=taken.seconds,
                samples=taken.window[0][0].window_samples,
            )
        )

    def _do(self, due: tuple[str, ...], state: TrainState) -> None:
        """What is due, in its order; the duties themselves heed an order to leave.

        Raises:
            Interrupted: Such an order has come, and steps are left to do.
        """
        for duty in due:
            if duty == "checkpoint":
                self._save(state)
            else:
                self._duties[duty](state)
        if self._control.leaving():
            self._save(state)
            if not self._timetable.ends(state.step):
                raise Interrupted(
                    self._control.leave or signal.SIGINT,
                    f"stopped by {self._signal} after {self._place(state)}; it is saved",
                    fix="start it again with resume_from_checkpoint=latest, the default: it goes on"
                    " there",
                )

    def _save(self, state: TrainState) -> None:
        if state.step != self._saved:
            self._duties["checkpoint"](state)
            self._saved = state.step

    def _rescue(self, error: CacheError | DataError, state: TrainState) -> CacheError | DataError:
        """Save the steps of this start; the error of the window after them, which says so."""
        kind = CacheError if isinstance(error, CacheError) else DataError
        message, advice = error.message, [error.fix] if error.fix else []
        if state.step > self._first:
            try:
                self._save(state)
                message += f"; {self._place(state)} is saved"
                advice.append(RESUME)
            except TrainingError as refused:
                message += f"; {refused.message}"
        if kind is DataError:
            advice.append("add --on_data_change continue if pictures or captions were changed")
        return kind(message, fix="; ".join(advice) or None)

    def _place(self, state: TrainState) -> str:
        return f"step {state.step} of {self._timetable.total_steps}"

    @property
    def _signal(self) -> str:
        return signal.Signals(self._control.leave or signal.SIGINT).name
