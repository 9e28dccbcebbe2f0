"""Gradient features: their price beside a plain forward and backward pass, fidelity, memory.

    python bench/gradients.py [--quick] [--peer-python PATH] [--repeats N] [--device cuda]

The price is that of one batch, on one thread, in CPU seconds (on a GPU, of the wall): every side in
turn, each beside a pass of the floor, the order changing; the figure is the median ratio to the
floor next to it. Sides: ours; LESS's procedure, written from its description, with traker's
projector or a dense matrix that is kept; `traker`; `bergson`. `--peer-python` is the interpreter of
an environment with this package, traker 0.3.2 and bergson 2.5.1 (installed without its
dependencies); without it those sides are left out. All sides run there, in one process.

Fidelity needs real models and text, in the folder that DELTALOOM_ASSETS names; without it that part
is left out. Memory is the peak resident set of the product's gradient pass in processes of its own,
over rows of the embedded lab and over the same rows eight times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from deltaloom.lab import write_lab

HERE = Path(__file__).parent
OVER_FLOOR = 1.15
OVER_LESS = {"float32": 1 / 4, "bfloat16": 1 / 8}
RANK_LOST, TOP_LOST = 0.02, 0.03
"""Against dense signs of equal width: about twice the standard error between ten seeds."""
SHARE_OF_LESS = 0.17
"""A sixth, and the scales and headers."""
ROWS = 512
KEPT = 1.0
"""A pass that kept its features, were it in the smallest format, would be at 1 and above."""


def row(name: str, value: float, bound: float | None, unit: str) -> dict[str, object]:
    """One result; it holds when it is at most `bound`."""
    holds = bound is None or value <= bound
    return {"name": name, "value": round(value, 4), "bound": bound, "holds": holds, "unit": unit}


def child(python: str, script: str, *words: object) -> dict:
    """The JSON object in the last line of another script's output, run on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [python, str(HERE / script), *map(str, words)]
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{script} {words} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def price(python: str, dtype: str, device: str, repeats: int) -> list[dict]:
    """Each side's time over the floor's."""
    words = ("--dtype", dtype, "--device", device, "--repeats", repeats)
    found = child(python, "_gradient_sides.py", *words)
    count, unit = found["rows"], "CPU ms" if device == "cpu" else "ms"
    floors = [floor for pairs in found["times"].values() for floor, _ in pairs]
    print(f"{dtype}: {count} rows of 128 tokens, {found['size']:,} gradient entries each")
    print(f"  {'floor':20s} {1e3 * statistics.median(floors) / count:7.1f} {unit} a row")
    results, ratios = [], {}
    for name, pairs in found["times"].items():
        each = sorted(side / floor for floor, side in pairs)
        ratios[name] = statistics.median(each)
        milliseconds = 1e3 * statistics.median(side for _, side in pairs) / count
        print(
            f"  {name:20s} {milliseconds:7.1f} {unit} a row  {ratios[name]:5.2f} of the floor "
            f"({each[len(each) // 4]:.2f} to {each[-1 - len(each) // 4]:.2f}, {len(each)} pairs)  "
            f"rms error of cosines {found['errors'][name]:.4f}"
        )
        bound = OVER_FLOOR if name == "ours" else None
        results.append(row(f"{dtype}: {name} / floor", ratios[name], bound, "ratio"))
    for less in [name for name in ratios if name.startswith("LESS as shipped")]:
        # In float32 is how LESS's procedure runs on a CPU unless it is told otherwise.
        bound = OVER_LESS[dtype] if dtype == "float32" or less.endswith("float32") else None
        ratio = ratios["ours"] / ratios[less]
        results.append(row(f"{dtype}: ours / {less}", ratio, bound, "ratio"))
    return results


def fidelity(assets: Path, work: Path, quick: bool) -> list[dict]:
    """Agreement with exact scores, by projection and by number format."""
    words = ["--quick"] if quick else []
    found = child(sys.executable, "_gradient_fidelity.py", assets, work, *words)
    pool, goals = found["rows"]
    print(
        f"fidelity: {pool} pool rows, {goals} target rows in 6 targets, {found['size']:,} entries, "
        f"after {found['warmup_steps']} warm-up steps; mean over targets and seeds (standard error)"
    )
    means = {}
    for case, runs in found["found"].items():
        ranks, tops = zip(*runs, strict=True)
        means[case] = statistics.mean(ranks), statistics.mean(tops)
        print(
            f"  {case:24s} Spearman {means[case][0]:.3f} {error(ranks)}  "
            f"top 5 % shared {means[case][1]:.3f} {error(tops)}  seeds: {len(runs)}"
        )
    results = []
    for width, formats in found["stored"].items():
        (rank, top), (their_rank, their_top) = (
            means[f"steps {width} {kind}"] for kind in ("sparse", "rademacher")
        )
        title = f"{width} wide, rademacher - sparse"
        rank_lost, top_lost = (None, None) if quick else (RANK_LOST, TOP_LOST)  # one seed is noise
        results.append(row(f"{title}: Spearman", their_rank - rank, rank_lost, ""))
        results.append(row(f"{title}: top 5 % shared", their_top - top, top_lost, ""))
        for dtype, one in formats.items():
            print(
                f"  stored {width} wide as {dtype:8s} Spearman {one['rank']:.4f}  top 5 % shared "
                f"{one['top']:.3f}  {one['share']:.3f} of LESS's three float16 copies"
            )
        lost = formats["float32"]["rank"] - formats["int8"]["rank"]
        results.append(row(f"{width} wide, float32 - int8: Spearman", lost, 0.005, ""))
        share = formats["int8"]["share"]
        name = f"{width} wide, int8 store / LESS's files"
        results.append(row(name, share, SHARE_OF_LESS, "bytes"))
    return results


def error(values: tuple[float, ...]) -> str:
    """Standard error of the mean, in brackets."""
    return f"({statistics.stdev(values) / len(values) ** 0.5:.3f})" if len(values) > 1 else ""


def memory(work: Path) -> list[dict]:
    """Peak memory of the pass over n rows and over eight times as many; two workers.

    Fewer rows would measure how long the allocator takes to reach its level: some 1,000 rows.
    """
    lines = write_lab(work)["pool"].read_text().splitlines()
    (work / "few.jsonl").write_text("\n".join(lines[:32]) + "\n")
    for times in (1, 8):  # the same rows again, so that no batch is larger than before
        rows = [
            {**json.loads(line), "id": f"{again}-{i}"}
            for again in range(4 * times)
            for i, line in enumerate(lines[:ROWS])
        ]
        text = "".join(json.dumps(one) + "\n" for one in rows)
        (work / f"pool{times}.jsonl").write_text(text)
    script = (sys.executable, "_gradient_pass.py", work)
    child(*script, work / "pool1.jsonl")  # makes the warm-up
    one, eight = (child(*script, work / f"pool{times}.jsonl") for times in (1, 8))
    whole = eight["rows"] * 4096 * 4 / 1e6
    print(
        f"memory: {one['mb']:.0f} MB for {one['rows']} rows, {eight['mb']:.0f} MB for "
        f"{eight['rows']}, whose features would be {whole:.0f} MB in float32"
    )
    added = (eight["rows"] - one["rows"]) * 4096 / 1e6  # MB, int8
    share = (eight["mb"] - one["mb"]) / added
    results = [row("peak memory, growth / int8 features of the rows added", share, KEPT, "ratio")]
    words = (*script, work / "pool1.jsonl", "--workers")
    walls = [[child(*words, count)["wall"] for count in (1, 2)] for _ in range(2)]
    text = ", ".join(f"{one:.1f} and {two:.1f} s" for one, two in walls)
    print(f"wall seconds of one worker and of two, their start included: {text}")
    ratio = statistics.median(two / one for one, two in walls)
    return [*results, row("two workers / one worker, wall", ratio, None, "ratio")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less of it, under 45 s")
    parser.add_argument("--peer-python", help="interpreter with this package, traker and bergson")
    parser.add_argument("--repeats", type=int, help="visits of each side (7, quick 1); ours four")
    parser.add_argument("--device", default="cpu", help="where the price is measured")
    options = parser.parse_args()
    python, repeats = options.peer_python, options.repeats or (1 if options.quick else 7)
    if not python or not Path(python).exists():
        print("no interpreter for the peers: LESS as shipped, traker and bergson are left out")
        python = sys.executable
    results = []
    for dtype in ("float32",) if options.quick else ("float32", "bfloat16"):
        results += price(python, dtype, options.device, repeats)
    with tempfile.TemporaryDirectory(prefix="bench-gradients-") as folder:
        work = Path(folder)
        assets = os.environ.get("DELTALOOM_ASSETS")
        if assets:
            results += fidelity(Path(assets), work, options.quick)
        else:
            print("DELTALOOM_ASSETS names no folder: fidelity is left out")
        if not options.quick:
            results += memory(work / "lab")
    print(json.dumps({"bench": "gradients", "results": results}))


if __name__ == "__main__":
    main()
