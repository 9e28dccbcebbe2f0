"""What claims on seeds share: their command line, and means over seeds with their intervals."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deltaloom.core.estimate import Estimate


def run_seeds(
    name: str,
    about: str,
    one_seed: Callable[[Path, int, bool], Any],
    tables: Callable[[list[Any]], str],
    judged: Callable[[list[Any]], list[dict[str, Any]]],
) -> None:
    """Run `one_seed(folder, seed, quick)` for each seed; `about` is the script's docstring."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, little of everything")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=20, help="the lab was made on seeds below")
    parser.add_argument("--work", type=Path, help="folder to keep and resume the runs in")
    options = parser.parse_args()
    torch.set_num_threads(1)
    home = (options.work or Path(tempfile.mkdtemp(prefix=f"deltaloom-{name}-"))).resolve()
    seeds = range(options.first, options.first + (1 if options.quick else options.seeds))
    found = [one_seed(home / f"seed{seed}", seed, options.quick) for seed in seeds]
    print(tables(found))
    results = judged(found)
    if options.quick:  # one seed of small data shows that it runs, and nothing else
        results = [{**one, "bound": None, "holds": True} for one in results]
    print(json.dumps({"bench": f"claims-{name}", "results": results}))


def over_seeds(values: list[float]) -> Estimate:
    """The mean of one value a seed, with Student's t interval."""
    return Estimate.from_items({f"seed {k}": v for k, v in enumerate(values)}, metric="mean")


def shown(values: list[float], sign: str = "", places: int = 3) -> str:
    """The mean over seeds, and its interval where they differ."""
    one = over_seeds(values)
    form = f"{sign}.{places}f"
    if max(values) - min(values) < 1e-6:
        return f"{one.value:{form}}"
    return f"{one.value:{form}} [{one.low:{form}}, {one.high:{form}}]"
