"""The main job on real input: does 5 % of a real pool, chosen by LESS, beat a random 5 %?

    DELTALOOM_ASSETS=DIR python bench/main_job.py [--quick] [--seeds N] [--work DIR] [--jobs N]
    DELTALOOM_ASSETS=DIR python bench/main_job.py --choose

Everything goes through the public command line: for each seed a pool of ten real sources and 24
target rows are drawn (`_data.py`), a recipe is written, and `deltaloom run` selects, tunes, merges
and measures; a run that is interrupted takes up where it stopped. Two targets: fables (loss per
token) and TREC question types (accuracy among six choices). Seeds are pooled as pairs: the
interval is Student's t over the per-seed differences on the test items.

Every arm has the settings of `TUNE`. They and the merge were chosen by `--choose`: one other
seed, validation rows only. The test rows are the same for all seeds; no
choice was made on them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from _data import TARGETS, build, lines, read_sources

from deltaloom.core.estimate import Comparison, Estimate, compare_seeds, pool_seeds

MODEL = "models/TinyStories-656K"
FULL = {"pool": 2400, "target": 24, "validation": 200, "test": 300}
SMALL = {"pool": 160, "target": 4, "validation": 4, "test": 24}
FRACTION = 0.05
CHOOSING_SEED = 100
"""Seed of `--choose`; no seed of the final run."""

TUNE = {"method": "lora", "lr": 1e-2, "epochs": 3, "batch_size": 8, "max_length": 192}
"""Settings of every tuned arm."""
WARMUP = {"r": 8, "alpha": 16, "lr": 3e-3, "epochs": 2, "batch_size": 8, "max_length": 192}
"""LESS's warm-up on 5 % of the pool: rank, rate and batch for this scale, set once and not tuned;
two epochs, so two gradient passes (the authors' four cost as much as the full run)."""
MERGE = {"method": "average"}
CANDIDATES = [{"method": "lora", "lr": lr} for lr in (3e-3, 1e-2, 3e-2)]
ARMS = {
    "base": "base, untuned",
    "random": "random 5 %",
    "less_fables": "LESS 5 % for fables",
    "less_trec": "LESS 5 % for TREC",
    "merged": "the two LESS deltas merged",
    "full": "full pool",
}
MEASURES = {
    "loss--fables": "fables loss",
    "loss--trec": "TREC loss",
    "choice--trec": "TREC accuracy",
}


def selections(data: Path, seed: int, warmup: dict) -> list[dict]:
    """The random 5 % and one LESS 5 % per target, as steps."""
    pool = str(data / "pool.jsonl")
    # A seed of its own: LESS's warm-up draws its part of the pool by the recipe's seed.
    steps = [{"select": {"method": "random", "name": "random_rows", "pool": pool,
                         "fraction": FRACTION, "seed": 1000 + seed}}]  # fmt: skip
    for name in TARGETS:
        less = {"method": "less", "name": f"less_{name}_rows", "pool": pool, "warmup": warmup}
        target = str(data / f"target_{name}.jsonl")
        steps.append({"select": {**less, "target": target, "fraction": FRACTION}})
    return steps


def measurements(data: Path, part: str, deltas: list[str], **more: str) -> list[dict]:
    """Loss on both targets and accuracy on TREC, as steps."""
    files = {name: str(data / f"{part}_{name}.jsonl") for name in TARGETS}
    shared = {"deltas": deltas, **more}
    return [
        {"measure": {"method": "loss", "name": "loss", "tasks": [*files.values()], **shared}},
        {"measure": {"method": "choice", "name": "choice", "tasks": [files["trec"]], **shared}},
    ]


def recipe(model: Path, data: Path, seed: int, tune: dict, warmup: dict) -> dict:
    """Select, tune four arms, merge two of them, measure all on the test part."""
    steps = selections(data, seed, warmup)
    rows = {arm: f"{arm}_rows" for arm in ("random", "less_fables", "less_trec")}
    rows["full"] = str(data / "pool.jsonl")
    steps += [{"tune": {**tune, "name": arm, "data": name}} for arm, name in rows.items()]
    steps.append({"merge": {**MERGE, "name": "merged", "deltas": ["less_fables", "less_trec"]}})
    steps += measurements(data, "test", [*ARMS], compare="random")
    return {"base": str(model), "seed": seed, "steps": steps}


def choosing(model: Path, data: Path, seed: int) -> dict:
    """Every candidate on the three small arms, measured on the validation part."""
    steps = selections(data, seed, WARMUP)
    names = []
    for arm in ("random", "less_fables", "less_trec"):
        for one in CANDIDATES:
            names.append(f"{arm}-{one['method']}-{one['lr']:g}")
            steps.append({"tune": {**TUNE, **one, "name": names[-1], "data": f"{arm}_rows"}})
    pair = [f"{arm}-{TUNE['method']}-{TUNE['lr']:g}" for arm in ("less_fables", "less_trec")]
    for method in ("average", "task_arithmetic", "ties"):
        names.append(f"merged-{method}")
        steps.append({"merge": {"method": method, "name": names[-1], "deltas": pair}})
    steps += measurements(data, "valid", ["base", *names])
    return {"base": str(model), "seed": seed, "steps": steps}


def run(content: dict, folder: Path) -> Path:
    """`deltaloom run` in a process of its own; returns the recipe's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "deltaloom", "run", str(file), f"out={folder / 'run'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
    if code:
        tail = (folder / "log.txt").read_text(encoding="utf-8")[-2000:]
        raise SystemExit(f"{' '.join(command)} ended with {code}:\n{tail}")
    return folder / "run"


def estimate(folder: Path, arm: str, measure: str, part: str = "test") -> Estimate:
    """What one arm of one run measured; `measure` is `loss--fables`, say."""
    method, _, target = measure.partition("--")
    path = folder / method / f"{arm}--{part}_{target}" / "estimate.json"
    return Estimate.from_json(path.read_text(encoding="utf-8"))


def cost(folder: Path, step: str) -> dict[str, float]:
    """The cost ledger of one step."""
    return json.loads((folder / step / "run.json").read_text(encoding="utf-8"))["cost"]


def spent(folders: list[Path], steps: list[str]) -> tuple[float, ...]:
    """Trained tokens, CPU and wall seconds of some steps together, mean over seeds."""
    return tuple(
        mean(sum(cost(folder, step)[key] for step in steps) for folder in folders)
        for key in ("backward_tokens", "cpu_seconds", "wall_seconds")
    )


def paired(folders: list[Path], a: str, b: str, measure: str) -> Comparison | None:
    """Arm `a` minus arm `b` over seeds; None of one seed."""
    if len(folders) < 2:
        return None
    sides = [[estimate(folder, arm, measure) for folder in folders] for arm in (a, b)]
    return compare_seeds(*sides)


def sources(file: Path) -> Counter[str]:
    """Rows by source."""
    return Counter(json.loads(line)["source"] for line in lines(file))


def print_arms(folders: list[Path]) -> None:
    """Arms x measures, with intervals over seeds, and what tuning each arm took."""
    print("| arm |", " | ".join(MEASURES.values()), end=" | ")
    print("trained tokens | of full | tune CPU s | wall s |")
    print("|---|" + "---|" * (len(MEASURES) + 4))
    whole = spent(folders, ["full"])[0]
    for arm, title in ARMS.items():
        cells = []
        for measure in MEASURES:
            pooled = pool_seeds([estimate(folder, arm, measure) for folder in folders])
            alone = arm == "base" or len(folders) < 2
            half = "" if alone else f" ± {pooled.high - pooled.value:.3f}"
            cells.append(f"{pooled.value:.3f}{half}")
        steps = {"base": [], "merged": ["less_fables", "less_trec", "merged"]}.get(arm, [arm])
        tokens, cpu, wall = spent(folders, steps)
        print(f"| {title} |", " | ".join(cells), f"| {tokens:,.0f} | {tokens / whole:.3f} |",
              f"{cpu:.0f} | {wall:.0f} |")  # fmt: skip
    print("\n± is half of the 95 % interval over seeds (Student's t; new seeds, these test rows).")
    tokens, cpu, wall = spent(folders, ["."])
    print(f"One seed's recipe took {cpu:.0f} CPU s and {wall:.0f} s wall, all steps.")
    for step in (f"less_{name}_rows" for name in TARGETS):
        tokens, cpu, wall = spent(folders, [step])
        print(
            f"Choosing {step} took {tokens:,.0f} tokens forward and backward ({tokens / whole:.2f} "
            f"of the full run's), {cpu:.0f} CPU s, {wall:.0f} s wall."
        )


def print_sources(folders: list[Path]) -> None:
    """Which sources the rows of each arm come from, in percent, mean over seeds."""
    arms = {arm: f"{arm}_rows/selected.jsonl" for arm in ("random", "less_fables", "less_trec")}
    counts = {arm: sum((sources(folder / file) for folder in folders), Counter())
              for arm, file in arms.items()}  # fmt: skip
    pool = sum((sources(folder.parent / "data/pool.jsonl") for folder in folders), Counter())
    print("\n| source, % of rows | pool |", " | ".join(ARMS[arm] for arm in arms), "|")
    print("|---|" + "---|" * (len(arms) + 1))
    for name, count in pool.most_common():
        shares = [count / pool.total()] + [counts[arm][name] / counts[arm].total() for arm in arms]
        print(f"| {name} |", " | ".join(f"{100 * share:.1f}" for share in shares), "|")


def row(name: str, value: float, bound: str | None, unit: str) -> dict[str, object]:
    """One result; `bound` is a comparison such as `< 0`, or None for a figure only reported."""
    sign, _, limit = (bound or "").partition(" ")
    holds = {"<": lambda: value < float(limit), ">": lambda: value > float(limit),
             "<=": lambda: value <= float(limit), "": lambda: True}[sign]()  # fmt: skip
    return {"name": name, "value": round(value, 5), "bound": bound, "holds": holds, "unit": unit}


def judged(folders: list[Path], quick: bool) -> list[dict]:
    """The claims and the reference figures; the small case is too small to judge the claims."""
    results = []
    claims = [  # arm, against, measure, is it a claim
        ("less_fables", "random", "loss--fables", True),
        ("less_trec", "random", "choice--trec", True),
        ("less_trec", "random", "loss--trec", False),
        ("less_fables", "full", "loss--fables", False),
        ("less_trec", "full", "choice--trec", False),
        ("merged", "less_trec", "loss--fables", True),
        ("merged", "less_fables", "choice--trec", True),
        ("merged", "less_fables", "loss--fables", False),
        ("merged", "less_trec", "choice--trec", False),
    ]
    print("\n| difference over seeds | value | 95 % interval | per seed | p | favours |")
    print("|---|---|---|---|---|---|")
    for a, b, measure, claim in claims:
        found = paired(folders, a, b, measure)
        if found is None:
            continue
        gap = found.difference
        seeds = " ".join(f"{value:+.3f}" for value in gap.seed_values)
        favoured = {"a": a, "b": b}.get(found.favours, "neither")
        title = f"{ARMS[a]} minus {ARMS[b]}, {MEASURES[measure]}"
        print(f"| {title} | {gap.value:+.4f} | [{gap.low:+.4f}, {gap.high:+.4f}] | {seeds} |",
              f"{found.p_value:.3f} | {favoured} |")  # fmt: skip
        lower = gap.better == "lower"
        end, value = ("upper", gap.high) if lower else ("lower", gap.low)
        label = f"{title}: {end} end of the 95% interval over {len(folders)} seeds"
        bound = ("< 0" if lower else "> 0") if claim and not quick else None
        unit = "nats per token" if measure.startswith("loss") else "share of questions"
        results.append(row(label, value, bound, unit))
    for arm in ("less_fables", "less_trec"):
        share = max(cost(folder, arm)["backward_tokens"] / cost(folder, "full")["backward_tokens"]
                    for folder in folders)  # fmt: skip
        results.append(row(f"{ARMS[arm]}: trained tokens / full run's, largest of the seeds",
                           share, "<= 0.2", "ratio"))  # fmt: skip
    return results


def choose(model: Path, assets: Path, work: Path) -> None:
    """Print what every candidate reaches on the validation part."""
    data = work / "choose/data"
    build(assets, read_sources(assets), data, CHOOSING_SEED, FULL)
    folder = run(choosing(model, data, CHOOSING_SEED), work / "choose")
    print("| candidate |", " | ".join(MEASURES.values()), "|\n|---|---|---|---|")
    for path in sorted((folder / "loss").glob("*--valid_fables")):
        name = path.name.removesuffix("--valid_fables")
        found = [estimate(folder, name, measure, "valid").value for measure in MEASURES]
        print(f"| {name} |", " | ".join(f"{value:.4f}" for value in found), "|")


def main() -> None:
    """Parse, run every seed, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small case, under 45 s")
    parser.add_argument("--choose", action="store_true", help="settings, on the validation part")
    parser.add_argument("--seeds", type=int, help="number of seeds (5, quick 2)")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at the same time (2)")
    parser.add_argument("--work", type=Path, help="where to work (runs/main_job, quick a new one)")
    options = parser.parse_args()
    if not os.environ.get("DELTALOOM_ASSETS"):
        print("DELTALOOM_ASSETS is not set: this bench needs real models and data")
        print(json.dumps({"bench": "main_job", "results": [], "skipped": "no DELTALOOM_ASSETS"}))
        return
    assets = Path(os.environ["DELTALOOM_ASSETS"]).resolve()
    model = assets / MODEL
    with tempfile.TemporaryDirectory(prefix="main-job-") as scratch:
        usual = Path(scratch) if options.quick else Path("runs/main_job")
        work = (options.work or usual).resolve()
        if options.choose:
            choose(model, assets, work)
        else:
            bench(options, model, assets, work)


def bench(options: argparse.Namespace, model: Path, assets: Path, work: Path) -> None:
    """Every seed, then the tables and the line of results."""
    size, tune, warmup = FULL, TUNE, WARMUP
    if options.quick:
        size, tune, warmup = SMALL, {**TUNE, "epochs": 1}, {**WARMUP, "epochs": 1}
    seeds = range(options.seeds or (2 if options.quick else 5))
    found = read_sources(assets)
    for seed in seeds:
        build(assets, found, work / f"seed{seed}/data", seed, size)

    def one(seed: int) -> Path:
        folder = work / f"seed{seed}"
        return run(recipe(model, folder / "data", seed, tune, warmup), folder)

    with ThreadPoolExecutor(options.jobs) as executor:
        folders = list(executor.map(one, seeds))
    print(f"{MODEL}, pool of {size['pool']} rows, {len(folders)} seeds, {tune}, merge {MERGE}; "
          f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {platform.machine()}, "
          f"Python {platform.python_version()}\n")  # fmt: skip
    print_arms(folders)
    print_sources(folders)
    results = judged(folders, options.quick)
    print(json.dumps({"bench": "main_job", "results": results}))


if __name__ == "__main__":
    main()
