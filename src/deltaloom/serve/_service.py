"""The tasks behind one server: which there are, how they come and go, who answers a prompt."""

from __future__ import annotations

import asyncio
import copy
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltaloom.core.base import Base
from deltaloom.core.errors import InputError, suggest
from deltaloom.core.progress import say
from deltaloom.engine.embed import embeddings
from deltaloom.engine.forward import context_length, padding_token
from deltaloom.serve import _loading, router
from deltaloom.serve._cache import Prefix
from deltaloom.serve._forward import RaggedModel
from deltaloom.serve._lane import Lane, Limits
from deltaloom.serve._metrics import Metrics
from deltaloom.serve._worker import Worker
from deltaloom.serve.settings import AUTO, NAME, Serving


@dataclass(frozen=True)
class Task:
    """What a request names as its model."""

    name: str
    kind: str
    """`base`, or what its delta is."""
    source: str
    """Folder or hub id."""
    lane: Lane
    reader: Reader
    context: int
    """Tokens of prompt and answer together."""
    adapter: str | None = None
    """Its key in the lane's stack."""
    prefix: Prefix = ()
    created: int = 0


class Reader:
    """A tokenizer that turns texts into tokens for whoever asks, one at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._lock = threading.Lock()

    def __call__(self, read: Callable[[Any], Any]) -> Any:
        """What `read` makes of the tokenizer."""
        with self._lock:
            return read(self.tokenizer)


class Service:
    """Tasks, the worker behind them, and the router; made by `open`."""

    def __init__(self, settings: Serving, after_step: Callable[[], None]) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.worker = Worker(settings.queue, self.metrics, after_step)
        self.tasks: dict[str, Task] = {}
        self.router: router.Router | None = None
        self._asked: list[tuple[Any, Future[np.ndarray]]] = []
        """Prompts that wait for the router: the event loop adds, the worker takes all."""
        self._asking = threading.Lock()
        self._keys = itertools.count()
        self._changing = threading.Lock()
        self._load_base()

    @classmethod
    def open(cls, settings: Serving, after_step: Callable[[], None] = lambda: None) -> Service:
        """Load everything that the settings name and start the worker.

        Raises InputError for what cannot be loaded or served.
        """
        service = cls(settings.checked(), after_step)
        service.worker.start()
        try:
            for name, source in settings.deltas.items():
                service.add(name, source)
            if settings.router is not None:
                service.router = service._ready_router(settings.router)
        except BaseException:
            service.worker.stop()
            raise
        return service

    def task(self, name: str) -> Task:
        """The task of this name; raises InputError with the names there are."""
        try:
            return self.tasks[name]
        except KeyError:
            known = [*self.tasks, *([AUTO] if self.router else [])]
            raise InputError(f"no model {name!r}{suggest(name, known)}") from None

    def add(self, name: str, source: str) -> Task:
        """Load a task; others go on meanwhile, but for the moments that the worker needs.

        Raises InputError for a name that is taken or none, and for what is no delta of the base.
        """
        if not NAME.match(name) or name == AUTO:
            raise InputError(f"{name!r}: a name is letters, digits and . _ : -, and not {AUTO!r}")
        with self._changing:
            if name in self.tasks:
                raise InputError(f"{name!r} is taken; remove it first")
            found = _loading.find(source, self.base)
            make = self._beside if found.shares else self._alone
            task = self.worker.call(lambda: make(name, source, found)).result()
            self.tasks = {**self.tasks, name: task}
        say(f"{name}: {task.kind} ({source})")
        return task

    def remove(self, name: str) -> None:
        """Forget a task: new requests are refused, those under way are finished first.

        Raises InputError for a name that there is not and for the base.
        """
        with self._changing:
            task = self.task(name)
            if task.kind == "base":
                raise InputError(f"{name!r} is the base; it stays as long as the server")
            self.tasks = {key: one for key, one in self.tasks.items() if key != name}
        lane, adapter = task.lane, task.adapter
        if adapter is not None:
            self.worker.when(lambda: not lane.uses(adapter), lambda: lane.stack.remove(adapter))
        elif lane is not self.lane:
            self.worker.when(lambda: not lane.busy, lambda: self.worker.lanes.remove(lane))

    async def route(self, text: str) -> str:
        """The task that the router chooses for a prompt; who asks together is read together."""
        assert self.router is not None
        row = self.reader(lambda tokenizer: router.encoded(text, tokenizer))
        embedded: Future[np.ndarray] = Future()
        with self._asking:
            self._asked.append((row, embedded))
            first = len(self._asked) == 1
        if first:
            self.worker.call(self._embed_asked)
        ((name, _),) = self.router.route(await asyncio.wrap_future(embedded))
        self.metrics.add("deltaloom_routed_total", model=name)
        return name

    def weight_bytes(self) -> int:
        """Bytes of the weights held, low-rank factors too; what models share counts once."""
        lanes = [*self.worker.lanes]
        stacked = sum(lane.stack.nbytes for lane in lanes)
        return _loading.resident_bytes([lane.ragged.model for lane in lanes]) + stacked

    def _load_base(self) -> None:
        base = self.settings.base
        base.check()
        if base.labels:
            raise InputError(f"{base.model}: a classifier (labels) generates nothing to serve")
        # Tasks are over these very weights, so they are named by where they lie.
        self.base: Base = base
        tokenizer = base.tokenizer()
        ragged = RaggedModel(base.load(), base.model, self.settings.batch)
        ragged.check()
        self.lane = self._lane(ragged, tokenizer)
        self.reader = Reader(tokenizer)
        name = self.settings.base_name
        self.tasks[name] = self._named(name, "base", base.model, self.lane, self.reader)
        self.metrics.counter("deltaloom_routed_total", "Requests to `auto`, by where they went.")
        self.metrics.gauge("deltaloom_models", "Models to ask for.", lambda: len(self.tasks))
        self.metrics.gauge(
            "deltaloom_weight_bytes", "Bytes of all weights held.", self.weight_bytes
        )

    def _lane(self, ragged: RaggedModel, tokenizer: Any) -> Lane:
        chosen = self.settings
        limits = Limits(chosen.batch, chosen.cache_tokens, chosen.piece)
        # Decoding is the worker's, encoding the request's: each has a tokenizer of its own.
        lane = Lane(ragged, copy.deepcopy(tokenizer), limits)
        self.worker.lanes.append(lane)
        return lane

    def _named(
        self, name: str, kind: str, source: str, lane: Lane, reader: Reader, **own: Any
    ) -> Task:
        context = context_length(lane.ragged.model)
        created = int(time.time())
        return Task(name, kind, source, lane, reader, context, created=created, **own)

    def _beside(self, name: str, source: str, found: _loading.Found) -> Task:
        """A task in the base's batch; on the worker's thread."""
        own: dict[str, Any] = {}
        if found.kind == "prompt":
            own["prefix"] = _loading.virtual_tokens(found, self.lane.ragged)
        else:
            own["adapter"] = f"{name}#{next(self._keys)}"
            _loading.attach(found, own["adapter"], self.lane.stack, self.base)
        return self._named(name, found.kind, source, self.lane, self.reader, **own)

    def _alone(self, name: str, source: str, found: _loading.Found) -> Task:
        """A task with a model of its own; on the worker's thread."""
        ragged, tokenizer = _loading.own_model(
            found, self.base, self.lane.ragged.model, self.settings.batch
        )
        lane = self._lane(ragged, tokenizer)
        return self._named(name, found.kind, source, lane, Reader(tokenizer))

    def _embed(self, rows: Sequence[Any]) -> np.ndarray:
        self.lane.stack.use([])
        pad = padding_token(self.lane.writer)
        return embeddings(self.lane.ragged.model, rows, pad)

    def _embed_asked(self) -> None:
        """Embed all prompts that wait for the router; on the worker's thread."""
        with self._asking:
            asked, self._asked = self._asked, []
        rows, futures = zip(*asked, strict=True)
        try:
            found = self._embed(rows)
            for i, future in enumerate(futures):
                future.set_result(found[i : i + 1])
        except Exception as error:
            for future in futures:
                future.set_exception(error)

    def _ready_router(self, path: Path) -> router.Router:
        """The router in a file, trained first where the file or its rows are not there."""
        files = self.settings.examples
        rows = router.examples_digest(files) if files else None
        if path.exists():
            kept = router.Router.load(path, self.base)
            if rows in (None, kept.about.get("rows_digest")):
                return self._fitting(kept, path)
        elif not files:
            return router.Router.load(path, self.base)
        encoded, labels = router.rows_of(files, self.base.tokenizer())
        embedded = self.worker.call(lambda: self._embed(encoded)).result()
        about = {
            "base": self.base.fingerprint(),
            "model": self.base.model,
            "rows_digest": rows,
        }
        made = router.train(embedded, labels, [row.id for row in encoded], about)
        made.save(path)
        told = made.about
        say(
            f"router: {told['accuracy']:.3f} [{told['low']:.3f}, {told['high']:.3f}] of rows held "
            f"out go to their task; kept in {path}"
        )
        return self._fitting(made, path)

    def _fitting(self, made: router.Router, path: Path) -> router.Router:
        absent = [task for task in made.tasks if task not in self.tasks]
        if absent:
            raise InputError(f"{path}: routes to {absent[0]!r}, which is not served; add its delta")
        return made
