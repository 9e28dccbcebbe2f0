"""The thread that owns the models: it steps every model that has something to do, and nothing else
does. What others want of a model is asked of it as a call, done between two steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from deltaloom.core.errors import WorkError
from deltaloom.core.progress import say
from deltaloom.serve._continuation import Continuation
from deltaloom.serve._lane import Done, Lane
from deltaloom.serve._metrics import ROWS, Metrics

CLOSING = "the server is shutting down"


class Overloaded(Exception):
    """The queue is full."""


class Worker:
    """Steps lanes. `after_step` is called on its thread when news may have been told."""

    def __init__(self, queue: int, metrics: Metrics, after_step: Callable[[], None]) -> None:
        self.queue, self.metrics, self.after_step = queue, metrics, after_step
        self.lanes: list[Lane] = []
        self._inbox: list[tuple[Lane, Continuation]] = []
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._leaving: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        self._cancelled = False
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="models", daemon=True)
        _declare(metrics, self)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Continuations that no step has taken up yet."""
        return len(self._inbox) + sum(len(lane.waiting) for lane in self.lanes)

    @property
    def active(self) -> int:
        """Continuations under way."""
        return sum(len(lane.rows) for lane in self.lanes)

    def submit(self, lane: Lane, continuations: Sequence[Continuation]) -> None:
        """Hand continuations in, all or none; raises Overloaded when the queue has no room."""
        with self._changed:
            if self.waiting + len(continuations) > self.queue:
                raise Overloaded
            self._inbox += [(lane, one) for one in continuations]
            self._changed.notify()

    def cancel(self, continuations: Sequence[Continuation]) -> None:
        """End continuations that nobody waits for any more."""
        with self._changed:
            for one in continuations:
                one.cancelled = True
            self._cancelled = True
            self._changed.notify()

    def call(self, work: Callable[[], Any]) -> Future[Any]:
        """Have something done between two steps."""
        future: Future[Any] = Future()
        with self._changed:
            if self._closing:
                future.set_exception(WorkError(CLOSING))
            else:
                self._calls.append((work, future))
                self._changed.notify()
        return future

    def when(self, free: Callable[[], bool], work: Callable[[], None]) -> None:
        """Have `work` done between two steps once `free` says so; ask both on this thread."""
        self.call(lambda: self._leaving.append((free, work)))

    def stop(self) -> None:
        """End what is left and join the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _idle(self) -> bool:
        return not (
            self._closing
            or self._cancelled
            or self._calls
            or self._inbox
            or any(lane.busy for lane in self.lanes)
        )

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                with self._changed:
                    while self._idle():
                        self._changed.wait()
                    if self._closing:
                        break
                    inbox, self._inbox = self._inbox, []
                    calls, self._calls = self._calls, []
                    swept, self._cancelled = self._cancelled, False
                    # Still counted as waiting while they move.
                    for lane, one in inbox:
                        lane.waiting.append(one)
                for work, future in calls:
                    _answer(work, future)
                for lane in [*self.lanes] if swept else ():
                    self._count(Done(ended=lane.sweep()))
                for lane in [*self.lanes]:
                    if lane.busy:
                        self._step(lane)
                self._leaving = [
                    (free, work) for free, work in self._leaving if not _left(free, work)
                ]
                self.after_step()
        waiting = [one for lane in self.lanes for one in lane.waiting]
        for one in (*waiting, *(one for _, one in self._inbox)):
            one.drop("error", CLOSING)
        for lane in self.lanes:
            lane.fail(CLOSING)
        for _, future in self._calls:
            future.set_exception(WorkError(CLOSING))
        self.after_step()

    def _step(self, lane: Lane) -> None:
        begun = time.monotonic()
        try:
            done = lane.step()
        except Exception as error:
            # Out of memory, most likely; what else waits may well fit.
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            say(f"a step of {lane.ragged.name} failed: {first}")
            self.metrics.add("deltaloom_step_failures_total")
            done = Done(ended=lane.fail(f"generation failed: {first}"))
        self._count(done)
        if done.rows:
            self.metrics.see("deltaloom_step_seconds", time.monotonic() - begun)
            self.metrics.see("deltaloom_batch_rows", done.rows)

    def _count(self, done: Done) -> None:
        for one in done.ended:
            self.metrics.add("deltaloom_prompt_tokens_total", one.read, model=one.task)
            self.metrics.add("deltaloom_generated_tokens_total", len(one.tokens), model=one.task)
            if one.cancelled:
                self.metrics.add("deltaloom_cancelled_total", model=one.task)
            if one.first_at is not None:
                waited = one.first_at - one.arrived
                self.metrics.see("deltaloom_first_token_seconds", waited, model=one.task)


def _answer(work: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def _left(free: Callable[[], bool], work: Callable[[], None]) -> bool:
    if not free():
        return False
    work()
    return True


def _declare(metrics: Metrics, worker: Worker) -> None:
    metrics.counter("deltaloom_prompt_tokens_total", "Prompt tokens read, by model.")
    metrics.counter("deltaloom_generated_tokens_total", "Tokens generated, by model.")
    metrics.counter("deltaloom_cancelled_total", "Continuations whose client went away, by model.")
    metrics.counter("deltaloom_step_failures_total", "Steps that failed.")
    metrics.histogram("deltaloom_first_token_seconds", "From arrival to the first token, by model.")
    metrics.histogram("deltaloom_step_seconds", "Duration of a step that generated.")
    metrics.histogram("deltaloom_batch_rows", "Continuations that a step went on with.", ROWS)
    metrics.gauge("deltaloom_waiting", "Continuations that wait.", lambda: worker.waiting)
    metrics.gauge("deltaloom_active", "Continuations under way.", lambda: worker.active)
