"""Counters and histograms, in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Prometheus' default bounds, and two more above."""
ROWS = (1, 2, 4, 8, 16, 32, 64)

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """What happened so far; every thread may write."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._help: dict[str, tuple[str, str]] = {}
        self._counts: dict[str, dict[Labels, float]] = {}
        self._histograms: dict[str, tuple[tuple[float, ...], dict[Labels, list[float]]]] = {}
        self._gauges: dict[str, Callable[[], float]] = {}

    def counter(self, name: str, text: str) -> None:
        """Declare a counter."""
        self._help[name] = ("counter", text)
        self._counts[name] = {}

    def histogram(self, name: str, text: str, bounds: tuple[float, ...] = SECONDS) -> None:
        """Declare a histogram."""
        self._help[name] = ("histogram", text)
        self._histograms[name] = (bounds, {})

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Declare a value that is read when it is asked for."""
        self._help[name] = ("gauge", text)
        self._gauges[name] = read

    def add(self, name: str, by: float = 1, /, **labels: str) -> None:
        """Count."""
        with self._lock:
            series = self._counts[name]
            key = tuple(sorted(labels.items()))
            series[key] = series.get(key, 0) + by

    def see(self, name: str, value: float, /, **labels: str) -> None:
        """One observation of a histogram."""
        with self._lock:
            bounds, series = self._histograms[name]
            cells = series.setdefault(tuple(sorted(labels.items())), [0.0] * (len(bounds) + 2))
            cells[bisect_left(bounds, value)] += 1
            cells[-1] += value

    def value(self, name: str, /, **labels: str) -> float:
        """A counter's value, over all series that have these labels."""
        with self._lock:
            wanted = {*labels.items()}
            return sum(v for key, v in self._counts[name].items() if wanted <= {*key})

    def text(self) -> str:
        """All of it, as Prometheus reads it."""
        lines: list[str] = []
        gauges = {name: read() for name, read in self._gauges.items()}
        with self._lock:
            for name, (kind, text) in self._help.items():
                lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
                if kind == "gauge":
                    lines.append(f"{name} {gauges[name]:.16g}")
                for key, value in sorted(self._counts.get(name, {}).items()):
                    lines.append(f"{name}{_labels(key)} {value:.16g}")
                bounds, series = self._histograms.get(name, ((), {}))
                for key, cells in sorted(series.items()):
                    lines += _histogram(name, key, bounds, cells)
        return "\n".join(lines) + "\n"


def _histogram(name: str, key: Labels, bounds: tuple[float, ...], cells: list[float]) -> list[str]:
    total, lines = 0.0, []
    for bound, count in zip((*bounds, float("inf")), cells[:-1], strict=True):
        total += count
        edge = "+Inf" if bound == float("inf") else f"{bound:g}"
        lines.append(f"{name}_bucket{_labels((*key, ('le', edge)))} {total:.16g}")
    return [
        *lines,
        f"{name}_sum{_labels(key)} {cells[-1]:.16g}",
        f"{name}_count{_labels(key)} {total:.16g}",
    ]


def _labels(key: Labels) -> str:
    if not key:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in key) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
