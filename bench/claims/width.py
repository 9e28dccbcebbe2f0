"""Where the best learning rate is over 8 times the width and 8 times the depth.

    python bench/claims/width.py [--quick] [--seeds N] [--workers N] [--work DIR] [--ends]
        [--axis width|depth ...] [--rows N] [--steps N] [--width N]

Llamas of growing width (two layers) and of growing depth (hidden size 32) are trained from scratch
on the lab's text, over a grid of learning rates a factor of two apart, once with the architecture's
own initialisation and one learning rate for all (`standard`) and once with our rules, anchored at
the largest model, at which both are the same. A run's loss is the mean of its last fifth of steps,
on text not seen before. The best learning rate of a size is the vertex of the parabola through the
best grid point and its neighbours; a best point at the grid's end is taken as it is and counted.
The shift is that of its log2 from the smallest to the largest size, one value a seed; intervals are
Student's t over seeds. Regret is what the largest model loses with the smallest one's grid point.

A unit is one (rule, axis, size, learning rate, seed): a file in --work, done once; --workers runs
them in processes of one thread. --ends leaves out the sizes between the smallest and the largest,
which decide nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from _seeds import over_seeds

from deltaloom.core.atomic import write_json

RULES = {"width": ("completep", "standard"), "depth": ("completep", "depth-mup", "standard")}
"""For width alone the first is muP: both models have two layers."""
GROWTH = (1, 2, 4, 8)
RATES = tuple(range(-10, -2))
"""log2 of the learning rates."""
HEAD, HIDDEN, LAYERS = 16, 32, 2
"""Size of a head (at every width), hidden size of the deep models, layers of the wide ones."""


@dataclass(frozen=True)
class Unit:
    rule: str
    axis: str
    growth: int
    rate: int
    seed: int

    @property
    def name(self) -> str:
        # Both rules are the same at the largest size: one run serves both.
        rule = "both" if self.growth == GROWTH[-1] else self.rule
        return f"{self.axis}-{self.growth}-{rule}-{self.rate}-seed{self.seed}"


@dataclass(frozen=True)
class Size:
    rows: int
    steps: int
    width: int
    """Hidden size of the narrowest model."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few steps")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder to keep and resume the runs in")
    parser.add_argument("--ends", action="store_true", help="the smallest and largest size alone")
    parser.add_argument("--axis", nargs="*", choices=RULES, default=list(RULES))
    parser.add_argument("--rows", type=int, default=4, help="rows of 64 tokens in a step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--width", type=int, default=16, help="hidden size of the narrowest")
    options = parser.parse_args()
    home = (options.work or Path(tempfile.mkdtemp(prefix="deltaloom-width-"))).resolve()
    home.mkdir(parents=True, exist_ok=True)
    seeds = range(1 if options.quick else options.seeds)
    size = Size(1, 5, 16) if options.quick else Size(options.rows, options.steps, options.width)
    rates = RATES[1::3] if options.quick else RATES
    sizes = (GROWTH[0], GROWTH[-1]) if options.ends else GROWTH
    units = [
        Unit(rule, axis, growth, rate, seed)
        for seed in seeds
        for axis in options.axis
        for rule in RULES[axis]
        for growth in sizes
        for rate in rates
    ]
    check_size(home, size)
    left = {unit.name: unit for unit in units if not (home / f"{unit.name}.json").exists()}
    if options.workers > 1:
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
            list(pool.map(one_unit, left.values(), [home] * len(left), [size] * len(left)))
    else:
        for unit in left.values():
            one_unit(unit, home, size)
    loss = {
        unit: json.loads((home / f"{unit.name}.json").read_text(encoding="utf-8"))["loss"]
        for unit in units
    }
    print(tables(loss, options.axis, sizes, seeds, rates))
    results = judged(loss, options.axis, seeds, rates)
    if options.quick:  # a few steps show that it runs, and nothing else
        results = [{**one, "bound": None, "holds": True} for one in results]
    print(json.dumps({"bench": "claims-width", "results": results}))


def check_size(home: Path, size: Size) -> None:
    """Runs of another size in the same folder would be mixed with these."""
    path = home / "size.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != asdict(size):
        raise SystemExit(f"{home} holds runs of another size; choose another --work")
    write_json(path, asdict(size))


def config(axis: str, growth: int, size: Size):
    from deltaloom.lab.pretrain import model_config

    hidden = size.width * growth if axis == "width" else HIDDEN
    made = model_config(hidden, growth if axis == "depth" else LAYERS)
    made.num_attention_heads = made.num_key_value_heads = hidden // HEAD
    made.head_dim = HEAD
    return made


def one_unit(unit: Unit, home: Path, size: Size) -> None:
    """Train one model and write its loss."""
    from transformers import LlamaForCausalLM

    from deltaloom.engine.parametrization import Parametrization
    from deltaloom.engine.scaled_adam import ScaledAdamW

    path = home / f"{unit.name}.json"
    if path.exists():
        return
    torch.set_num_threads(1)
    target, own = (config(unit.axis, growth, size) for growth in (GROWTH[-1], unit.growth))
    rules = Parametrization(target, own, unit.rule)
    torch.manual_seed(unit.seed)
    model = LlamaForCausalLM(own)
    rules.initialize(model)
    optimizer = ScaledAdamW(rules.groups(model, 2.0**unit.rate), clip=1.0)
    peaks = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step, ids in enumerate(text(unit.seed, size)):
        share = schedule(step, size.steps)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = share * peak
        labels = ids.masked_fill(ids == own.pad_token_id, -100)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    kept = losses[-max(1, size.steps // 5) :]
    mean = sum(kept) / len(kept)
    write_json(path, {"loss": mean if math.isfinite(mean) else None})


def schedule(step: int, steps: int) -> float:
    """A tenth of the steps up, the others down."""
    rise = max(1, steps // 10)
    return (step + 1) / rise if step < rise else (steps - step) / (steps - rise)


def text(seed: int, size: Size) -> torch.Tensor:
    """Fresh rows for every step, (steps, rows, 64)."""
    from deltaloom.lab.corpus import documents
    from deltaloom.lab.pretrain import pack
    from deltaloom.lab.world import build_world

    wanted = size.steps * size.rows
    packed = pack(list(documents(build_world(), 4 * wanted, seed)))
    return packed[:wanted].reshape(size.steps, size.rows, -1)


Losses = dict[Unit, float | None]


def curve(loss: Losses, rule: str, axis: str, growth: int, seed: int, rates) -> list[float]:
    """Losses over the grid; a diverged run is worse than all."""
    found = [loss[Unit(rule, axis, growth, rate, seed)] for rate in rates]
    return [math.inf if one is None else one for one in found]


def optimum(values: list[float], rates) -> tuple[float, bool]:
    """log2 of the best learning rate, and whether it is at the grid's end."""
    k = values.index(min(values))
    if k in (0, len(values) - 1) or not math.isfinite(values[k - 1] + values[k + 1]):
        return float(rates[k]), k in (0, len(values) - 1)
    left, middle, right = values[k - 1 : k + 2]
    shift = (left - right) / (2 * (left - 2 * middle + right))
    return rates[k] + shift * (rates[1] - rates[0]), False


def regret(loss: Losses, rule: str, axis: str, seed: int, rates) -> float:
    """Loss of the largest model at the smallest one's best grid point, over its own best."""
    small = curve(loss, rule, axis, GROWTH[0], seed, rates)
    large = curve(loss, rule, axis, GROWTH[-1], seed, rates)
    return large[small.index(min(small))] - min(large)


def shown(values: list[float]) -> str:
    one = over_seeds(values)
    return (
        f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]"
        if len(values) > 1
        else f"{values[0]:.2f}"
    )


def tables(loss: Losses, axes, sizes, seeds, rates) -> str:
    """Best learning rates, and mean losses over the grid."""
    lines = []
    for axis in axes:
        rules = RULES[axis]
        lines += ["", f"log2 of the best learning rate, {axis} times", ""]
        lines += ["| rule | " + " | ".join(map(str, sizes)) + " | regret | at the grid's end |"]
        lines += ["|---" * (len(sizes) + 3) + "|"]
        for rule in rules:
            found = {
                growth: [optimum(curve(loss, rule, axis, growth, s, rates), rates) for s in seeds]
                for growth in sizes
            }
            cells = [shown([best for best, _ in found[growth]]) for growth in sizes]
            lost = shown([regret(loss, rule, axis, seed, rates) for seed in seeds])
            ends = sum(end for growth in sizes for _, end in found[growth])
            lines.append(f"| {rule} | {' | '.join(cells)} | {lost} | {ends} |")
        lines += [
            "",
            f"mean loss, {axis}",
            "",
            "| rule | times | " + " | ".join(map(str, rates)) + " |",
        ]
        lines += ["|---" * (len(rates) + 2) + "|"]
        for rule in rules:
            for growth in sizes:
                curves = [curve(loss, rule, axis, growth, seed, rates) for seed in seeds]
                means = [sum(one) / len(one) for one in zip(*curves, strict=True)]
                cells = " | ".join(f"{mean:.2f}" for mean in means)
                lines.append(f"| {rule} | {growth} | {cells} |")
    return "\n".join(lines) + "\n"


def judged(loss: Losses, axes, seeds, rates) -> list[dict]:
    """Is the shift within a factor of two with our rules, and outside without?"""
    results = []
    for axis in axes:
        for rule in RULES[axis]:
            shifts = []
            for seed in seeds:
                ends = [
                    optimum(curve(loss, rule, axis, growth, seed, rates), rates)[0]
                    for growth in (GROWTH[0], GROWTH[-1])
                ]
                shifts.append(ends[1] - ends[0])
            one = over_seeds(shifts)
            low, high = (one.value, one.value) if len(shifts) == 1 else (one.low, one.high)
            name, unit = f"{axis} x {GROWTH[-1]}, {rule}", f"log2 shift, {len(shifts)} seeds"
            if rule == "standard":
                # the end of the interval that is nearest to no shift
                value = min(abs(low), abs(high)) if low * high > 0 else 0.0
                holds, bound = value > 1, "> 1: drifts by more than a factor of two"
            else:
                value = max(abs(low), abs(high))
                holds, bound = value <= 1, "<= 1: within a factor of two"
            results.append({"name": name, "value": round(value, 3), "bound": bound,
                            "holds": holds, "unit": f"{unit}, end of 95 % interval"})  # fmt: skip
    return results


if __name__ == "__main__":
    main()
