"""Posterior over sources from a proxy, on a synthetic regression: mass, and error on the target.

    python bench/claims/proxy.py [--quick] [--seeds N] [--tables N]

The setting of proxy-informed transfer, as far as the paper's is known to us: 60 points of sources
without labels, y = theta x + psi w + noise with correlated x and w (0.6); half of the points have
the target's psi, the others one 2 away; of the target only a proxy z ~ N(psi, R) is seen, an
accurate one (R = 0.05) or a poor one (0.5). Every point is a source of its own: nobody says which
belong together. Arms: the proxy alone, all points pooled, all pooled with the proxy as prior,
points weighted by their relevance, and the oracle, which is told the relevant points.

A seed is 40 data sets; one value a seed, intervals are Student's t over seeds.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from _seeds import over_seeds, shown

from deltaloom.search._relevance import Evidence, Model, Source, relevance

POINTS, NOISE, CORRELATION, AWAY = 60, 0.3, 0.6, 2.0
PROXIES = {"accurate": 0.05, "poor": 0.5}
ARMS = ("proxy alone", "pooled", "pooled with proxy", "weighted", "oracle")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, two data sets")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tables", type=int, default=40, help="data sets of a seed")
    options = parser.parse_args()
    seeds, count = (1, 2) if options.quick else (options.seeds, options.tables)
    found = {
        proxy: [one_seed(seed, count, spread) for seed in range(seeds)]
        for proxy, spread in PROXIES.items()
    }
    print(tables(found))
    results = judged(found)
    if options.quick:  # two data sets show that it runs, and nothing else
        results = [{**one, "bound": None, "holds": True} for one in results]
    print(json.dumps({"bench": "claims-proxy", "results": results}))


def one_seed(seed: int, count: int, spread: float) -> dict[str, float]:
    """Means over data sets: squared errors on the target, and the masses."""
    draw = np.random.default_rng([seed, round(1000 * spread)])
    rows = [one_table(draw, spread) for _ in range(count)]
    found = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    for arm in ARMS[1:4]:
        harm = [row[arm] > row["proxy alone"] for row in rows]
        found[f"{arm}: worse than the proxy alone"] = float(np.mean(harm))
    return found


def one_table(draw: np.random.Generator, spread: float) -> dict[str, float]:
    theta, psi = draw.normal(size=2) * [2.0, 2.0]
    like = draw.permutation(POINTS) < POINTS // 2
    cross = np.array([[1.0, CORRELATION], [CORRELATION, 1.0]])
    inputs = draw.multivariate_normal(np.zeros(2), cross, POINTS)
    other = psi + AWAY * draw.choice([-1, 1])
    values = inputs[:, 0] * theta + inputs[:, 1] * np.where(like, psi, other)
    values = values + NOISE * draw.normal(size=POINTS)
    proxy = psi + np.sqrt(spread) * draw.normal()
    model = Model(4.0, np.eye(1) * 8.0, np.array([proxy]), np.eye(1) * spread, NOISE**2)
    flat = Model(4.0, np.eye(1) * 8.0, np.zeros(1), np.eye(1) * 1e6, NOISE**2)
    sources = [
        Source(x[None, :1], x[None, 1:], y[None]) for x, y in zip(inputs, values, strict=True)
    ]
    evidence = Evidence(model, sources)
    weights = relevance(evidence, int(draw.integers(2**31)), sweeps=60)
    every = np.ones(POINTS)
    means = {
        "proxy alone": evidence.weighted(0 * every)[0],
        "pooled": Evidence(flat, sources).weighted(every)[0],
        "pooled with proxy": evidence.weighted(every)[0],
        "weighted": evidence.weighted(weights)[0],
        "oracle": evidence.weighted(like.astype(float))[0],
    }
    found = {}
    for arm, mean in means.items():
        off = mean - [theta, psi]
        found[arm] = float(off @ cross @ off)
    found["mass on relevant"] = float(weights[like].sum() / weights.sum())
    found["relevance, relevant"] = float(weights[like].mean())
    found["relevance, others"] = float(weights[~like].mean())
    return found


def tables(found: dict[str, list[dict[str, float]]]) -> str:
    lines = ["| mean | " + " | ".join(f"{name} proxy" for name in found) + " |"]
    lines += ["|---" * (len(found) + 1) + "|"]
    for name in next(iter(found.values()))[0]:
        cells = " | ".join(shown([one[name] for one in seeds]) for seeds in found.values())
        said = f"error on the target, {name}" if name in ARMS else name
        lines.append(f"| {said} | {cells} |")
    return "\n".join(lines) + "\n"


def judged(found: dict[str, list[dict[str, float]]]) -> list[dict]:
    results = []
    for proxy, seeds in found.items():
        mass = over_seeds([one["mass on relevant"] for one in seeds])
        low = mass.value if len(seeds) == 1 else mass.low
        unit = f"share of the mass, low end of the 95 % interval, {len(seeds)} seeds"
        results.append({"name": f"{proxy} proxy: mass on the relevant half", "unit": unit,
                        "value": round(low, 4), "bound": "> 0.5", "holds": low > 0.5})  # fmt: skip
        for arm in ARMS[:3]:
            gain = over_seeds([one[arm] - one["weighted"] for one in seeds])
            low = gain.value if len(seeds) == 1 else gain.low
            unit = f"squared error, low end of the 95 % interval, {len(seeds)} seeds"
            results.append({"name": f"{proxy} proxy: {arm} - weighted", "value": round(low, 4),
                            "bound": "> 0", "holds": low > 0, "unit": unit})  # fmt: skip
    return results


if __name__ == "__main__":
    main()
