"""What commands print: one JSON document, or a short table for people."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def fail(message: str, code: int) -> int:
    """Print the sentence on stderr; returns the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return code


def emit(out: Path, record: dict[str, Any], as_json: bool) -> None:
    """Print the outcome of a run."""
    if as_json:
        print(json.dumps({"out": str(out), **record["results"], **_about(record)}))
        return
    results = record["results"]
    print(f"{record['status']}: {out}")
    for name, step in results.get("steps", {}).items():
        print(f"  {name}: {step['verb']} {step['method']}, {cost_line(step['cost'])}")
    if "rows" in results:
        print(f"  {results['rows']} of {results['pool_rows']} rows: {out / 'selected.jsonl'}")
    estimates_table(results)
    if "steps" not in results:
        print(f"  cost: {cost_line(record['cost'])}")


def estimates_table(results: dict[str, Any]) -> None:
    """Estimates and comparisons, a line each."""
    estimates, comparisons = results.get("estimates", {}), results.get("comparisons", {})
    width = max((len(key) for key in (*estimates, *comparisons)), default=0)
    for key, one in estimates.items():
        print(f"  {key:{width}}  {one['value']:8.4f}  {interval(one)}  n={one['n']}")
    for key, one in comparisons.items():
        verdict = f"favours {one['favours']}" if one["favours"] != "neither" else "no difference"
        p = f"p={one['p']:.2g}"
        if len(comparisons) > 1 and "p_holm" in one:  # absent from records of older runs
            p += f" p_holm={one['p_holm']:.2g}"
        print(f"  {key:{width}}  {one['value']:+8.4f}  {interval(one)}  {p}  {verdict}")


def interval(one: dict[str, Any]) -> str:
    """The interval in brackets; an unknown end is a question mark."""
    ends = ["?" if one[end] is None else f"{one[end]:.4f}" for end in ("low", "high")]
    return f"[{ends[0]}, {ends[1]}]"


def cost_line(cost: dict[str, float]) -> str:
    """Seconds, trained and forward tokens, calls of endpoints, FLOPs, memory."""
    parts = [f"{cost['wall_seconds']:.1f} s"]
    for key, name in (("backward_tokens", "trained"), ("forward_tokens", "forward")):
        if cost.get(key):
            parts.append(f"{cost[key]:,.0f} {name} tokens")
    if cost.get("endpoint_calls"):
        tokens = cost["endpoint_tokens_in"] + cost["endpoint_tokens_out"]
        parts.append(f"{cost['endpoint_calls']:,.0f} calls with {tokens:,.0f} tokens")
    if cost.get("flops"):
        parts.append(f"{cost['flops']:.2g} FLOPs")
    if cost.get("peak_rss_bytes"):
        parts.append(f"{cost['peak_rss_bytes'] / 2**20:,.0f} MiB")
    return ", ".join(parts)


def plan_table(lines: list[dict[str, Any]], as_json: bool) -> None:
    """A plan as a table or as JSON."""
    if as_json:
        print(json.dumps({"steps": lines}))
        return
    print(f"{'step':20} {'rows':>9} {'tokens':>12} {'FLOPs':>9} {'time >=':>9} {'memory':>9} disk")
    for one in lines:
        print(
            f"{one['name']:20} {one['rows']:>9,} {one['tokens']:>12,} {one['flops']:>9.2g} "
            f"{_seconds(one['seconds_at_least']):>9} {_bytes(one['memory_bytes']):>9} "
            f"{_bytes(one['disk_bytes'])}"
        )
    for one in lines:
        if "merging" in one:
            _merge_plan(one["name"], one["merging"])
    print("Times are lower bounds, at this machine's float32 matrix speed; memory is weights,")
    print("gradients and optimizer, without activations.")


def _merge_plan(name: str, merging: dict[str, Any]) -> None:
    """What headers say of a merge."""
    if "tensors" in merging:
        read, written = (_bytes(merging[key]) for key in ("read_bytes", "written_bytes"))
        print(
            f"{name}: {merging['tensors']} tensors, written as one {merging['product']}; reads "
            f"{read} in at most {merging['passes']} passes, writes {written}"
        )
    for key, title in (("absent", "not at hand"), ("problems", "problem"), ("notes", "note")):
        for text in merging.get(key, ()):
            print(f"  {title}: {text}")


def _about(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("status", "cost", "notes", "seed", "versions")}


def _seconds(value: float) -> str:
    if value < 90:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
