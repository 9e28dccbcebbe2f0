"""The units of a study: each one JSON file, made in any order by several processes at once.

A unit that is there is not made again, so an interrupted study goes on where it was. One command at
a time may work in a folder: the marks of units begun are taken away when it starts.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

Make = Callable[[str], dict[str, Any]]


class Units:
    """Named results in a folder, and what each waits for."""

    def __init__(self, folder: Path, waits: Mapping[str, Sequence[str]]) -> None:
        self.folder, self.waits = folder, dict(waits)
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str, kind: str = "json") -> Path:
        """The file of a unit."""
        return self.folder / f"{plain(name)}.{kind}"

    def get(self, name: str) -> dict[str, Any] | None:
        """A unit's result, or None."""
        path = self.path(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def ended(self, name: str) -> bool:
        """Whether it is there, or failed."""
        return self.path(name).exists() or self.path(name, "error").exists()

    def run(self, make: Make, workers: int) -> None:
        """Make what is missing; `make` must be importable by other processes.

        A unit that raises leaves its traceback in an .error file and is tried again by the next
        command; the others go on.
        """
        for stale in (*self.folder.glob("*.begun"), *self.folder.glob("*.error")):
            stale.unlink()
        if workers < 2:
            _work(self, make)
            return
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=_work, args=(self, make)) for _ in range(workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()

    def begin(self, name: str) -> bool:
        """Mark a unit as this process's; False if it is another's."""
        try:
            os.close(os.open(self.path(name, "begun"), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


def _work(units: Units, make: Make) -> None:
    """Make units until none is left that nobody has begun."""
    import torch

    torch.set_num_threads(1)
    while True:
        left = [one for one in units.waits if not units.path(one, "begun").exists()]
        left = [one for one in left if not units.ended(one)]
        if not left:
            return
        ready = [one for one in left if all(map(units.ended, units.waits[one]))]
        name = next(filter(units.begin, ready), None)
        if name is None:
            time.sleep(0.2)
            continue
        _make(units, name, partial(make, name))


def _make(units: Units, name: str, result: Callable[[], dict[str, Any]]) -> None:
    start = time.monotonic()
    try:
        found = {**result(), "wall seconds": round(time.monotonic() - start, 1)}
    except Exception:
        units.path(name, "error").write_text(traceback.format_exc(), encoding="utf-8")
        print(f"{name}: failed\n{traceback.format_exc()}", flush=True)
        return
    scratch = units.path(name, "part")
    scratch.write_text(json.dumps(found), encoding="utf-8")
    scratch.replace(units.path(name))
    print(f"{name}: {found}", flush=True)


def plain(name: str) -> str:
    """A name without what shells dislike."""
    return name.replace(" ", "-").replace("%", "percent").replace("/", "-")
