"""Maps in fixed shards: in this process, over local processes, or over a Ray cluster.

A job says how to get ready (load a model) and how to do one shard, which writes one file, whole or
not at all. What is there is not done again, so a kill loses at most the shards in flight, and the
bytes do not depend on who did which: every worker process computes with one thread, so any number
of workers gives the same bytes. With `workers = 0` the shards are done here, with this process's
threads, which may round differently.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import socket
import subprocess
import sys
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.features import Features
from deltaloom.core.progress import progress
from deltaloom.core.run import Run, Workers

TRIES = 3
"""Deaths of a worker over one shard before the work is given up (ours)."""

Done = Callable[[Any, Any], None]
"""Called in the parent with each finished shard's item and what the job gave back for it."""
Draw = Callable[[], Hashable | None]
"""Gives the next item that can be done now; None when there is none, for good or until another one
is done."""
Lost = Callable[[Any, str], None]
"""Called in the parent with an item that keeps killing its worker, and how the last one ended."""


class Job(ABC):
    """Work cut into shards; must pickle, and runs where the files it names are reachable."""

    @abstractmethod
    def open(self) -> Callable[[Any], Any]:
        """Get ready once per worker; returns the function that does one item's shard."""


def run_shards(job: Job, items: Sequence[Hashable], workers: Workers, done: Done) -> None:
    """Do every item; an error in one stops all.

    Raises InputError or WorkError as the job does, WorkError when a shard keeps killing its worker.
    """
    if items:
        run_drawn(job, partial(next, iter(items), None), len(items), workers, done)


def run_drawn(
    job: Job, draw: Draw, most: int, workers: Workers, done: Done, lost: Lost | None = None
) -> None:
    """As `run_shards`, for items that are decided while others are done, `most` in all.

    With `lost` the work goes on without an item that keeps killing its worker.
    """
    if workers.cluster is not None:
        _drive(_Ray(job, workers, most), draw, done, lost or _given_up)
    elif workers.count:
        _drive(_Local(job, workers, most), draw, done, lost or _given_up)
    else:
        do = job.open()
        while (item := draw()) is not None:
            done(item, do(item))


def fill(store: Features, job: Job, run: Run, workers: Workers | None = None) -> Features:
    """Do the missing shards of a store; the job gives back what each one cost. Returns the store.

    `workers` are `run`'s if no others are named. Costs go to the run's ledger, and with each shard
    to the disk, as a shard that is there is not paid for again; the progress is named by the
    store's `about["what"]`.
    """
    total, missing = len(store.shards()), store.missing()
    with progress(store.header["about"]["what"], total, total - len(missing)) as advance:

        def done(_: Any, cost: dict[str, float]) -> None:
            run.spend(**cost)
            run.save()
            advance(1)

        run_shards(job, missing, workers or run.workers, done)
    return store


class _Dead(Exception):
    """A worker that is gone."""


class _Crew(ABC):
    """Some workers, each doing one shard at a time."""

    size: int

    @abstractmethod
    def start(self) -> Any:
        """A new worker."""

    @abstractmethod
    def give(self, worker: Any, item: Any) -> None:
        """Hand it a shard."""

    @abstractmethod
    def finished(self, busy: Iterable[Any]) -> Any:
        """Wait for one of these workers to have something to say, and return it."""

    @abstractmethod
    def result(self, worker: Any) -> Any:
        """What it gave back. Raises _Dead, or the error that the job raised."""

    @abstractmethod
    def close(self) -> None:
        """Stop all workers."""


def _drive(crew: _Crew, draw: Draw, done: Done, lost: Lost) -> None:
    again: deque[Hashable] = deque()
    idle: list[Any] = []
    busy: dict[Any, Hashable] = {}
    deaths: dict[Hashable, int] = {}
    try:
        while True:
            while len(busy) < crew.size:
                item = again.popleft() if again else draw()
                if item is None:
                    break
                worker = idle.pop() if idle else crew.start()
                busy[worker] = item
                crew.give(worker, item)
            if not busy:
                return
            worker = crew.finished(busy)
            item = busy.pop(worker)
            try:
                result = crew.result(worker)
            except _Dead as death:
                deaths[item] = deaths.get(item, 0) + 1
                if deaths[item] == TRIES:
                    lost(item, f"{TRIES} workers died over it ({death})")
                else:
                    again.append(item)
                continue
            idle.append(worker)
            done(item, result)
    finally:
        crew.close()


def _given_up(item: Hashable, how: str) -> None:
    raise WorkError(
        f"shard {item}: {how}; most likely they had too little memory: use fewer workers"
    )


class _Process:
    """One local worker: a Python of its own, and the socket to it."""

    def __init__(self, job: bytes) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                # Not multiprocessing's spawn, which would run the user's script a second time.
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                stdout=subprocess.DEVNULL,
            )
        self.connection = Connection(ours.detach())
        self.connection.send_bytes(job)


class _Local(_Crew):
    """Processes on this machine."""

    def __init__(self, job: Job, workers: Workers, most: int) -> None:
        self.size = min(workers.count, most)
        self.job = pickle.dumps(job)
        self.started: list[_Process] = []

    def start(self) -> _Process:
        worker = _Process(self.job)
        self.started.append(worker)
        return worker

    def give(self, worker: _Process, item: Any) -> None:
        with contextlib.suppress(OSError):  # it died: reading its answer says so
            worker.connection.send(item)

    def finished(self, busy: Iterable[_Process]) -> _Process:
        by_connection = {worker.connection: worker for worker in busy}
        return by_connection[wait(list(by_connection))[0]]  # pyright: ignore[reportArgumentType]

    def result(self, worker: _Process) -> Any:
        try:
            good, value = worker.connection.recv()
        except (EOFError, OSError):
            worker.connection.close()
            raise _Dead(f"exit status {worker.process.wait()}") from None
        if good:
            return value
        raise value

    def close(self) -> None:
        for worker in self.started:
            worker.connection.close()
            worker.process.terminate()
        for worker in self.started:
            worker.process.wait()


class _Ray(_Crew):
    """Actors of a Ray cluster; its machines must see the same files."""

    def __init__(self, job: Job, workers: Workers, most: int) -> None:
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError:
            raise InputError('cluster= needs Ray: pip install "deltaloom[ray]"') from None
        self.ray = ray
        self.mine = not ray.is_initialized()
        if self.mine:
            address = None if workers.cluster == "local" else workers.cluster
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        self.size = min(workers.count or int(ray.cluster_resources()["CPU"]), most)
        self.actor = ray.remote(num_cpus=1, max_restarts=0)(_Actor)
        self.job = pickle.dumps(job)
        self.pending: dict[Any, Any] = {}

    def start(self) -> Any:
        return self.actor.remote(self.job)

    def give(self, worker: Any, item: Any) -> None:
        self.pending[worker.do.remote(item)] = worker

    def finished(self, busy: Iterable[Any]) -> Any:
        (self.answer,), _ = self.ray.wait(list(self.pending), num_returns=1)
        return self.pending.pop(self.answer)

    def result(self, worker: Any) -> Any:
        try:
            good, value = self.ray.get(self.answer)
        except self.ray.exceptions.RayActorError as error:
            raise _Dead(str(error).partition("\n")[0]) from None
        if good:
            return value
        raise value

    def close(self) -> None:
        if self.mine:
            self.ray.shutdown()


class _Actor:
    """The far side of `_Ray`."""

    def __init__(self, job: bytes) -> None:
        _one_thread()
        self.work = _guarded(pickle.loads(job).open)
        self.ready: Any = None

    def do(self, item: Any) -> tuple[bool, Any]:
        if self.ready is None:
            good, self.ready = self.work()
            if not good:
                return False, self.ready
        return _guarded(self.ready)(item)


def _guarded(do: Callable[..., Any]) -> Callable[..., tuple[bool, Any]]:
    def call(*arguments: Any) -> tuple[bool, Any]:
        try:
            return True, do(*arguments)
        except (InputError, WorkError) as error:
            return False, error
        except Exception as error:
            # The parent cannot see this process's stack, so it is sent as text.
            text = "".join(traceback.format_exception(error))
            return False, RuntimeError(f"a worker failed:\n{text}")

    return call


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _serve(handle: int) -> None:
    """A local worker's life: get ready, then one answer per item until the parent hangs up."""
    _one_thread()
    with Connection(handle) as connection:
        try:
            actor = _Actor(connection.recv_bytes())
            while True:
                connection.send(actor.do(connection.recv()))
        except (EOFError, OSError):
            return  # the parent has closed the connection, or is gone


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
