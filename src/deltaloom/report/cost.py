"""What it cost: each step's ledger, and each model's, with the selection and merges it rests on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deltaloom.core.run import COUNTERS, PEAKS
from deltaloom.report import numbers
from deltaloom.report.quality import Group, Row
from deltaloom.report.reading import Report, Step

Show = Callable[[float], str]

COLUMNS: tuple[tuple[str, str, Show], ...] = (
    ("wall_seconds", "Wall", numbers.seconds),
    ("cpu_seconds", "CPU", numbers.seconds),
    ("forward_tokens", "Forward tokens", numbers.short),
    ("backward_tokens", "Trained tokens", numbers.short),
    ("flops", "FLOPs", numbers.flops),
    ("endpoint_calls", "Calls", numbers.short),
    ("endpoint_tokens_in", "Endpoint tokens in", numbers.short),
    ("endpoint_tokens_out", "Endpoint tokens out", numbers.short),
    ("peak_rss_bytes", "Peak memory", numbers.size),
    ("peak_device_bytes", "Peak device", numbers.size),
)


@dataclass(frozen=True)
class Ledger:
    """The cost table: headings, one line a step, the total."""

    headings: tuple[str, ...]
    lines: tuple[tuple[Step, str, tuple[str, ...], float], ...]
    """Step, label, cells, and its share of the compute (of the CPU time where no FLOP is known)."""
    total: tuple[str, ...]
    share_of: str


def ledger(report: Report) -> Ledger:
    """One line a step and their total; columns that are zero everywhere are left out."""
    every = total(report.steps)
    columns = [column for column in COLUMNS if every[column[0]] > 0]
    decisive = "flops" if every["flops"] > 0 else "cpu_seconds"
    lines = tuple(
        (
            step,
            report.label(step),
            tuple(_cell(step.cost[key], show) for key, _, show in columns),
            step.cost[decisive] / (every[decisive] or 1.0),
        )
        for step in report.steps
    )
    return Ledger(
        tuple(name for _, name, _ in columns),
        lines,
        tuple(_cell(every[key], show) for key, _, show in columns),
        "FLOPs" if decisive == "flops" else "CPU time",
    )


def total(steps: list[Step]) -> dict[str, float]:
    """Counters summed, peaks at their largest."""
    costs = [step.cost for step in steps]
    summed = {key: sum(cost[key] for cost in costs) for key in COUNTERS}
    return summed | {key: max((cost[key] for cost in costs), default=0.0) for key in PEAKS}


def product_cost(report: Report, product: Step | None) -> dict[str, float] | None:
    """What a model cost with all it rests on; None when no step of these runs made it."""
    return None if product is None else total(report.lineage(product))


def axis(report: Report) -> tuple[str, str, Show]:
    """The cost that the models are charted against: FLOPs, else trained tokens, else CPU time."""
    spent = total(report.of_verb("select", "tune", "merge", "transfer"))
    if spent["flops"] > 0:
        return "flops", "FLOPs to make it, selection included", numbers.flops
    if spent["backward_tokens"] > 0:
        return "backward_tokens", "trained tokens, selection included", numbers.short
    return "cpu_seconds", "CPU seconds to make it, selection included", numbers.seconds


def priced(report: Report, group: Group, key: str) -> tuple[list[tuple[Row, float]], list[Row]]:
    """Models with their cost, and those that cost nothing here (the base)."""
    with_cost, free = [], []
    for row in group.rows:
        spent = product_cost(report, row.product)
        if spent is not None and spent[key] > 0:
            with_cost.append((row, spent[key]))
        elif spent is None and row.is_base:
            free.append(row)
    return with_cost, free


def _cell(value: float, show: Show) -> str:
    return show(value) if value > 0 else "–"
