"""Submodular maximisation: time and picks beside submodlib-py and apricot, memory for large pools.

    python bench/submodular.py [--quick] [--peer-python PATH] [--repeats N]

Every figure is of a process of its own, with one thread. CPU seconds count from a kernel in memory
to the picks (checks and constructors included, imports and compilation not); the peers get the same
features, make the same kernel (cosines, negative ones set to 0) and run LazyGreedy. Memory is the
highest resident set of a whole process that reads features and picks. `--peer-python` is the
interpreter of an environment with submodlib-py 0.0.3 and apricot-select 0.6.1; without it the
ratios are left out. `clustered` are 50 Gaussian clusters, `isotropic` has no structure at all: the
lazy form's worst case.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from deltaloom.engine.submodular import Picks

PEER = Path(__file__).with_name("_submodular_peer.py")
RATIO = 1 / 20
MEMORY_GB = 4.0
DATA = {"clustered": (64, 50), "isotropic": (64, 0), "isotropic wide": (1024, 0)}
"""Features and clusters of each kind."""
WEIGHTS = {"facility": 0.0, "flmi": 1.5, "flcg": 0.8, "graphcut": 0.4, "logdet": 0.5}
"""eta, nu, redundancy and ridge where picks are compared."""
LARGE = {"lazy, 64 neighbours": 64, "stochastic": 0, "lazy": 0}
"""Neighbours kept of a large pool; 0 makes rows when needed."""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def features(count: int, width: int, clusters: int, seed: int = 0) -> np.ndarray:
    """Unit rows (count, width)."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((count, width), dtype=np.float32)
    if clusters:
        centres = random.standard_normal((clusters, width)).astype(np.float32)
        rows = centres[random.integers(0, clusters, count)] + np.float32(0.5) * rows
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def our_job(name: str, rows: Path, others: Path, budget: int, weight: float) -> dict[str, Any]:
    """One maximisation of a dense kernel, in this process."""
    from deltaloom.engine.similarity import Dense
    from deltaloom.engine.submodular import FUNCTIONS

    def do(kernel: np.ndarray, more: np.ndarray, count: int) -> Picks:
        dense = Dense.of(kernel)
        if name == "facility":
            return FUNCTIONS[name](dense, count)
        if name in ("flmi", "flcg"):
            return FUNCTIONS[name](dense, count, Dense.of(more), weight)
        return FUNCTIONS[name](dense, count, weight)

    x, q = np.load(rows), np.load(others)
    kernel = np.maximum(x @ x.T, 0)
    small = kernel[:64, :64].copy()
    do(small, small[:4], 4)
    start = time.process_time()
    picks = do(kernel, np.maximum(q @ x.T, 0), budget)
    cpu = time.process_time() - start
    return {"cpu": cpu, "picks": picks.indices.tolist(), "gains": picks.gains.tolist()}


def large_job(form: str, rows: Path, budget: int) -> dict[str, Any]:
    """A large pool, from features to picks, in this process."""
    from deltaloom.engine.similarity import Blockwise, nearest
    from deltaloom.engine.submodular import How, facility_location

    x = np.load(rows)
    facility_location(Blockwise.of(x[:64]), 4)
    facility_location(nearest(x[:64], 8), 4)
    start = time.process_time()
    kernel = nearest(x, LARGE[form]) if LARGE[form] else Blockwise.of(x)
    how = How("stochastic" if form == "stochastic" else "lazy")
    picks = facility_location(kernel, budget, how)
    cpu = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"cpu": cpu, "memory": peak, "picks": picks.indices.tolist()}


def run(command: list[str]) -> dict[str, Any]:
    """The JSON object that a process of its own prints last."""
    out = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(out.stdout.rstrip().split("\n")[-1])


def value(x: np.ndarray, picks: list[int]) -> float:
    """Facility location of the picks, by definition, a block of points at a time."""
    chosen = x[picks]
    parts = (x[start : start + 4096] @ chosen.T for start in range(0, len(x), 4096))
    return sum(float(np.maximum(part.max(axis=1), 0).astype(float).sum()) for part in parts)


def row(name: str, value: float, bound: float | None, unit: str) -> dict[str, Any]:
    """One result; it holds when it is at most `bound`."""
    holds = bound is None or value <= bound
    return {"name": name, "value": round(value, 5), "bound": bound, "holds": holds, "unit": unit}


def speed(folder: Path, n: int, repeats: int, peer: str | None, kinds: list[str]) -> list[dict]:
    """Facility location, a tenth of n, beside the peers."""
    results = []
    for kind in kinds:
        width, clusters = DATA[kind]
        x = features(n, width, clusters)
        paths = [str(folder / f"{name}.npy") for name in ("rows", "others")]
        np.save(paths[0], x)
        np.save(paths[1], x[:4])
        job = ["facility", *paths, str(n // 10), "0"]
        mine = [run([sys.executable, __file__, "--job", *job]) for _ in range(repeats)]
        cpu = statistics.median(one["cpu"] for one in mine)
        reached = value(x, mine[0]["picks"])
        print(f"{kind} {n}: ours {cpu:.2f} CPU s, objective {reached:.3f}", flush=True)
        results.append(row(f"{n // 10} of {n} {kind}: ours", cpu, None, "CPU s"))
        for who in ("submodlib", "apricot") if peer else ():
            theirs = run([str(peer), str(PEER), who, *job])
            other = value(x, theirs["picks"])
            same = sum(a == b for a, b in zip(mine[0]["picks"], theirs["picks"], strict=True))
            print(
                f"  {who} {theirs['cpu']:.2f} CPU s, objective {other:.3f}, "
                f"{same} of {n // 10} picks the same in order",
                flush=True,
            )
            bound = RATIO if who == "submodlib" and n >= 10000 else None
            ratio = cpu / theirs["cpu"]
            results.append(row(f"{n // 10} of {n} {kind}: time / {who}", ratio, bound, "ratio"))
            lost = other / reached - 1
            name = f"{n // 10} of {n} {kind}: objective below {who}"
            results.append(row(name, max(lost, 0.0), 1e-6, "share"))
    return results


def agreement(folder: Path, n: int, peer: str) -> list[dict]:
    """Picks of every function beside submodlib's."""
    # no entry below zero and no equal lengths: a positive semidefinite kernel without ties, and
    # queries that no candidate stands for wholly
    random = np.random.default_rng(1)
    x, others = ((random.random((rows, 24)) ** 4).astype(np.float32) for rows in (n, n // 3))
    paths = [str(folder / f"{name}.npy") for name in ("rows", "others")]
    np.save(paths[0], x)
    np.save(paths[1], others)
    results = []
    for name, weight in WEIGHTS.items():
        job = [name, *paths, str(n // 10), str(weight)]
        mine = run([sys.executable, __file__, "--job", *job])
        theirs = run([peer, str(PEER), "submodlib", *job])["picks"]
        # once everything is covered all candidates are equal
        useful = sum(gain > 1e-5 * mine["gains"][0] for gain in mine["gains"])
        pairs = list(zip(mine["picks"], theirs, strict=True))[:useful]
        differ = sum(a != b for a, b in pairs)
        print(
            f"{name}, {n // 10} of {n}: {useful} picks add something, "
            f"{differ} of them differ from submodlib's",
            flush=True,
        )
        what = f"{name} {n // 10} of {n}: picks unlike submodlib"
        results.append(row(what, differ, 0, "picks"))
    return results


def large(folder: Path, n: int, forms: list[str]) -> list[dict]:
    """A pool whose dense kernel would not fit: memory, time and what is lost."""
    x = features(n, *DATA["clustered"])
    path = str(folder / "large.npy")
    np.save(path, x)
    results = []
    for form in forms:
        found = run([sys.executable, __file__, "--large-job", form, path, str(n // 10)])
        reached = value(x, found["picks"])
        print(
            f"{n // 10} of {n} clustered, {form}: {found['cpu']:.1f} CPU s, "
            f"{found['memory']:.2f} GB, objective {reached:.2f}",
            flush=True,
        )
        what = f"{n // 10} of {n}, {form}"
        results.append(row(f"{what}: memory", found["memory"], MEMORY_GB, "GB"))
        results.append(row(f"{what}: time", found["cpu"], None, "CPU s"))
    return results


def main() -> None:
    """Parse, make the data, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small cases, under 45 s")
    parser.add_argument("--peer-python", help="interpreter with submodlib-py and apricot-select")
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours, of which the median")
    parser.add_argument("--job", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--large-job", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        name, rows, others, budget, weight = options.job
        print(json.dumps(our_job(name, Path(rows), Path(others), int(budget), float(weight))))
        return
    if options.large_job:
        form, rows, budget = options.large_job
        print(json.dumps(large_job(form, Path(rows), int(budget))))
        return
    peer = options.peer_python
    if peer and not Path(peer).exists():
        print(f"no interpreter at {peer}: the peers are left out")
        peer = None
    elif not peer:
        print("no --peer-python: the peers are left out")
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {platform.machine()}, "
        f"Python {platform.python_version()}, one thread"
    )
    with tempfile.TemporaryDirectory(prefix="bench-submodular-") as home:
        folder = Path(home)
        if options.quick:
            results = speed(folder, 3000, 1, peer, ["clustered"])
            results += agreement(folder, 300, peer) if peer else []
            results += large(folder, 12000, list(LARGE))
        else:
            results = speed(folder, 10000, options.repeats, peer, list(DATA))
            results += agreement(folder, 1000, peer) if peer else []
            results += large(folder, 100000, list(LARGE))
    print(json.dumps({"bench": "submodular", "results": results}))


if __name__ == "__main__":
    main()
