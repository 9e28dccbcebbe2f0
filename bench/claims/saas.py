"""Proposing by processes with sparse axes, beside Optuna's and chance, where the truth is known.

    python bench/claims/saas.py --first 21 [--quick] [--seeds N] [--work DIR]

Nothing is trained: loss and parameters are formulas of three modules' sizes (0 to 10) and of twelve
layers' bits, the space of AutoPEFT. The loss falls with each module's size, as 1 - exp(-size / s),
and with the square root of the chosen layers' summed weights, which are uneven; a layer costs
0.0025 of it. Shares of the modules, s and the weights are drawn for each seed. Trials see the loss
with noise of 0.006 and log2(1 + parameters); the front is taken by what they saw, its hypervolume
by the true values, as a share of the true front's, which all 5,451,776 configurations give. Every
arm has `TRIALS` trials; `gp` and `saas` start with the same ten and try nothing twice.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
from _seeds import over_seeds, run_seeds, shown

from deltaloom.core.method import Trial
from deltaloom.search._front import hypervolume, pareto
from deltaloom.search._proposing import Proposer
from deltaloom.search._space import Dimension

TRIALS, LAYERS, LARGEST, NOISE = 60, 12, 10, 0.006
MODULES = ("serial", "parallel", "prefix")
BITS = [f"layer_{n}" for n in range(LAYERS)]
SPACE = {
    **{name: Dimension(low=0, high=LARGEST, integer=True) for name in MODULES},
    **{name: Dimension(low=0, high=1, integer=True) for name in BITS},
}
GOALS = {"loss": "lower", "size": "lower"}
REFERENCE = (1.0, 26.0)
"""No module's loss, and more than log2 of any configuration's parameters."""
ARMS = {"saas": "sparse axes", "gp": "Optuna's GP sampler", "random": "random search"}


class Surface:
    """Loss and log2(1 + parameters) of configurations."""

    def __init__(self, seed: int) -> None:
        chance = np.random.default_rng(seed)
        self.weights = chance.dirichlet(np.full(LAYERS, 0.5))
        self.shares = 0.35 * chance.dirichlet(np.ones(len(MODULES)))
        self.scales = chance.uniform(1, 6, len(MODULES))

    def __call__(self, sizes: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Exponents (n, 3) and bits (n, 12) or (1, 12) -> both goals (n,)."""
        gain = (self.shares * (1 - np.exp(-sizes / self.scales))).sum(1)
        gain = gain * np.sqrt((bits * self.weights).sum(1)) - 0.03 * bits.mean(1) * (gain > 0)
        rows = np.where(sizes > 0, 2.0 ** (sizes - 1), 0).sum(1)
        return 1 - gain, np.log2(1 + bits.sum(1) * 768 * 2 * rows)

    def of(self, settings: dict[str, Any]) -> tuple[float, float]:
        sizes, bits = ([[settings[name] for name in names]] for names in (MODULES, BITS))
        loss, size = self(np.array(sizes), np.array(bits))
        return float(loss[0]), float(size[0])

    def area(self) -> float:
        """Hypervolume of all configurations."""
        sizes = np.indices((LARGEST + 1,) * len(MODULES)).reshape(len(MODULES), -1).T
        front: list[tuple[float, float]] = []
        for code in range(2**LAYERS):
            loss, size = self(sizes, np.array([[code >> n & 1 for n in range(LAYERS)]]))
            order = np.lexsort((loss, size))
            least = np.minimum.accumulate(loss[order])
            kept = order[np.r_[True, least[1:] < least[:-1]]]
            front += zip(loss[kept].tolist(), size[kept].tolist(), strict=True)
        return hypervolume(front, REFERENCE)


def meaning(settings: dict[str, Any]) -> str | None:
    """As `search autopeft` has it: no module or no layer is no trial."""
    whole = any(settings[name] for name in MODULES) and any(settings[name] for name in BITS)
    return repr(settings) if whole else None


def one_arm(arm: str, surface: Surface, seed: int, trials: int) -> dict[str, float]:
    """Share of the true hypervolume, and CPU seconds of a proposal that knows results."""
    chance, noise = random.Random(seed), np.random.default_rng(seed)
    surrogate = "gp" if arm == "random" else arm
    proposer = Proposer(SPACE, GOALS, trials, seed, meaning=meaning, surrogate=surrogate)
    done: dict[int, Trial] = {}
    true, seconds = [], 0.0
    for number in range(trials):
        start = time.process_time()
        if arm == "random":
            settings = {name: one.at(chance.random()) for name, one in SPACE.items()}
        else:
            settings = proposer.propose(number, done)
            assert settings is not None
        seconds += time.process_time() - start
        true.append(surface.of(settings))
        seen = {"loss": true[-1][0] + NOISE * noise.standard_normal(), "size": true[-1][1]}
        done[number] = Trial(number, settings, seen)
    front = [true[one.number] for one in pareto(list(done.values()), ("loss", "size"))]
    return {
        "area": hypervolume(front, REFERENCE),
        "seconds": seconds / max(1, trials - proposer.evenly),
    }


def one_seed(folder: Path, seed: int, quick: bool) -> dict[str, Any]:
    """What each arm found; what was done before is read."""
    path = folder / "arms.json"
    if not path.exists():
        surface = Surface(seed)
        whole = surface.area()
        arms = {arm: one_arm(arm, surface, seed, 13 if quick else TRIALS) for arm in ARMS}
        for one in arms.values():
            one["area"] /= whole
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(arms))
    found = json.loads(path.read_text())
    return found


def of(found: list[dict[str, Any]], arm: str, key: str) -> list[float]:
    return [one[arm][key] for one in found]


def gains(found: list[dict[str, Any]], arm: str) -> list[float]:
    return [one["saas"]["area"] - one[arm]["area"] for one in found]


def tables(found: list[dict[str, Any]]) -> str:
    lines = [
        "| proposals | share of the true front | sparse axes minus it | CPU s each | by seed |",
        "|---" * 5 + "|",
    ]
    for arm, called in ARMS.items():
        area = of(found, arm, "area")
        gain = "" if arm == "saas" else shown(gains(found, arm), "+")
        seconds = np.mean(of(found, arm, "seconds"))
        each = ", ".join(f"{value:.3f}" for value in area)
        lines.append(f"| {called} | {shown(area)} | {gain} | {seconds:.2f} | {each} |")
    return "\n".join(lines) + "\n"


def judged(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    results = []
    for arm in ("gp", "random"):
        one = over_seeds(gains(found, arm))
        low = one.value if len(found) == 1 else one.low
        unit = f"share, low end of the 95 % interval, {len(found)} seeds"
        results.append({"name": f"hypervolume, sparse axes minus {ARMS[arm]}",
                        "value": round(low, 4), "bound": "> 0", "holds": low > 0,
                        "unit": unit})  # fmt: skip
    pairs = zip(of(found, "saas", "seconds"), of(found, "gp", "seconds"), strict=True)
    results.append({"name": f"CPU time of a proposal, sparse axes / {ARMS['gp']}",
                    "value": round(float(np.median([a / b for a, b in pairs])), 2),
                    "bound": None, "holds": True, "unit": "ratio"})  # fmt: skip
    return results


if __name__ == "__main__":
    run_seeds("saas", __doc__ or "", one_seed, tables, judged)
