"""Progress on stderr: a bar with rate and remaining time on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PLAIN_SECONDS = 10.0
"""Between two plain lines."""


def say(text: str) -> None:
    """One plain line on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield a function that moves the progress forward by a number of units."""
    if sys.stderr.isatty():
        with _bar(label, total, done) as advance:
            yield advance
    else:
        yield _plain(label, total, done)


@contextmanager
def _bar(label: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "", style="dim")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, completed=done)
        yield lambda units: bar.advance(task, units)


def _plain(label: str, total: int, done: int) -> Callable[[int], None]:
    start = last = time.monotonic()
    count = done

    def advance(units: int) -> None:
        nonlocal count, last
        count += units
        now = time.monotonic()
        if now - last >= PLAIN_SECONDS or (count >= total and now - start >= PLAIN_SECONDS):
            last = now
            rate = (count - done) / max(now - start, 1e-9)
            left = (total - count) / rate if rate else 0.0
            say(f"{label}: {count}/{total}, {rate:.1f}/s, {left:.0f} s left")

    return advance
