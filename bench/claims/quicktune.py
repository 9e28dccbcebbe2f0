"""Quicktune against random search, Bayesian optimisation and defaults, at equal cost, on the lab.

    python bench/claims/quicktune.py [--quick] [--seeds N] [--workers N] [--work DIR]
        [--arms ARM ...]

The learning curves of 32 settings on the lab's twelve sources are made once (_quicktune_table.py);
the searches are then played on them, as the paper's benchmark does, each task in turn with the
other eleven as its history. Cost is CPU seconds, a part's share of its run's; a budget is so many
mean runs of the task. Regret is what the best value seen lacks to the table's best, over what the
untuned base lacks: 1 is the base, 0 the table's best. All searches choose among the table's
settings. Arms:

- quicktune: all of the history alike, as published, `parts` of a run at a time;
- quicktune, shuffled: as quicktune, but each past task's curves go to settings drawn by lot;
- quicktune, alone: no history;
- quicktune, trusted: as quicktune, each past task by its relevance (`search quicktune`'s default);
- proxy: whole runs, in the order of what `search proxy` predicts;
- random: whole runs of settings drawn by lot;
- GP, TPE: whole runs that Optuna's samplers propose, three random ones first, each moved to the
  nearest setting that was not tried;
- defaults: one whole run of `tune lora`'s own settings.

The seed draws what is drawn. Differences are taken within task and seed; a task's mean over seeds
is one item, intervals are Student's t over the twelve tasks.

At last `deltaloom search quicktune` is really run on one task, with the other tasks' table as
history files and without; one of the table's settings drawn by lot stands beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _quicktune_table import EPOCHS, SETTINGS, SPACE, gather, settings
from _units import Units

import deltaloom
from deltaloom.core.estimate import Estimate
from deltaloom.lab import tasks
from deltaloom.search._past import PastTrial, Point, Task
from deltaloom.search._policy import Policy, Seen, coordinates
from deltaloom.search._trust import SHARE, judge_past

ARMS = (
    "quicktune", "random", "TPE", "defaults", "GP", "quicktune, alone", "quicktune, shuffled",
    "quicktune, trusted", "proxy",
)  # fmt: skip
DRAWN = ("random", "TPE", "GP", "quicktune, alone", "quicktune, shuffled")
"""Arms of which the seed changes something."""
OURS = ("quicktune", "quicktune, trusted")
RIVALS = ("random", "TPE", "GP", "defaults")
BUDGETS = (1, 2, 4)
"""Mean whole runs."""
FIRST, REAL = 3, "drills"
"""Whole runs drawn before Optuna's samplers propose; the task on which searches are really run."""

Regrets = dict[tuple[str, int, str, int], float]
"""By arm, budget, task and seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three tasks, four settings, one seed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder to keep and resume the runs in")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS, help="only these")
    options = parser.parse_args()
    torch.set_num_threads(1)
    home = (options.work or Path(tempfile.mkdtemp(prefix="deltaloom-quicktune-"))).resolve()
    names = list(tasks.SOURCES)[: 3 if options.quick else None]
    count, seeds = (4, 1) if options.quick else (SETTINGS, options.seeds)
    table = Table(gather(home, count, names, options.workers), settings(count))
    found = play(home / "played", table, options.arms, names, seeds)
    print(tables(found, options.arms, names, seeds))
    print(really(home, table, names))
    results = judged(found, options.arms, names, seeds)
    if options.quick:  # a few runs show that it works, and nothing else
        results = [{**one, "bound": None, "holds": True} for one in results]
    print(json.dumps({"bench": "claims-quicktune", "results": results}))


def play(home: Path, table: Table, arms: Sequence[str], names: list[str], seeds: int) -> Regrets:
    """Regrets of all searches, each (arm, task) done once."""
    units = Units(home, {f"{arm} / {name}": () for arm in arms for name in names})
    units.run(lambda unit: {"regrets": table.all_seeds(*unit.split(" / "), seeds)}, 1)
    found: Regrets = {}
    for arm in arms:
        for name in names:
            one = units.get(f"{arm} / {name}")
            assert one is not None, f"{arm} on {name} failed"
            for seed, regrets in enumerate(one["regrets"]):
                found |= {(arm, b, name, seed): r for b, r in zip(BUDGETS, regrets, strict=True)}
    return found


class Table:
    """Curves of all settings on all tasks."""

    def __init__(self, gathered: dict[str, dict[str, Any]], all_settings: list[dict]) -> None:
        self.units = {
            name: {k: unit for k, unit in found.items() if k != "about"}
            for name, found in gathered.items()
        }
        self.about = {
            name: Task.parse(one["about"]["task"], name) for name, one in gathered.items()
        }
        self.settings = all_settings
        self.past = {name: self._task(name) for name in gathered}
        self.places = np.array([coordinates(SPACE, one) for one in all_settings])

    def _task(self, name: str) -> Task:
        trials = []
        for k, own in enumerate(self.settings):
            unit = self.units[name][str(k)]
            seconds, flops = unit["seconds"] / EPOCHS, unit["flops"] / EPOCHS
            curve = [
                Point(share=(n + 1) / EPOCHS, value=value, flops=flops, seconds=seconds)
                for n, value in enumerate(unit["curve"])
            ]
            trials.append(PastTrial(settings=own, curve=curve, failed=unit["failed"]))
        return self.about[name].model_copy(update={"trials": trials, "name": name})

    def part(self, name: str, setting: int, part: int) -> tuple[float, float | None]:
        """Cost and value of a part; no value where the run had failed."""
        unit = self.units[name][str(setting)]
        value = unit["curve"][part] if part < len(unit["curve"]) else None
        return unit["seconds"] / EPOCHS, value

    def all_seeds(self, arm: str, name: str, seeds: int) -> list[list[float]]:
        """Regrets by seed and budget; the seed changes nothing where nothing is drawn."""
        if arm not in DRAWN:
            return [[*self.played(arm, name, 0).values()]] * seeds
        return [[*self.played(arm, name, seed).values()] for seed in range(seeds)]

    def played(self, arm: str, name: str, seed: int) -> dict[int, float]:
        """Budget -> regret."""
        task = self.past[name]
        values = [point.value for trial in task.trials for point in trial.curve]
        assert task.untuned is not None
        lowest, worst = min(values), task.untuned
        run = float(np.mean([unit["seconds"] for unit in self.units[name].values()]))
        spent, best = 0.0, worst
        seen = [(0.0, worst)]
        for cost, value in self.walk(arm, name, seed):
            spent += cost
            best = best if value is None else min(best, value)
            seen.append((spent, best))
            if spent > max(BUDGETS) * run:
                break
        return {
            budget: (min(b for s, b in seen if s <= budget * run * (1 + 1e-9)) - lowest)
            / (worst - lowest)
            for budget in BUDGETS
        }

    def walk(self, arm: str, name: str, seed: int) -> Iterator[tuple[float, float | None]]:
        """Costs and values of the parts that an arm does, in order."""
        if arm.startswith("quicktune"):
            return self._quicktune(arm, name, seed)
        order: Iterator[int]
        rng = random.Random(f"{arm} {name} {seed}")
        if arm == "defaults":
            order = iter([0])
        elif arm == "random":
            order = iter(rng.sample(range(len(self.settings)), len(self.settings)))
        elif arm == "proxy":
            order = iter(np.argsort(self._proxy(name)[1], kind="stable").tolist())
        else:
            order = self._optuna(arm, name, seed)
        return (self.part(name, k, part) for k in order for part in range(EPOCHS))

    def _quicktune(self, arm: str, name: str, seed: int) -> Iterator[tuple[float, float | None]]:
        rng = random.Random(f"history {name} {seed}")
        past = [task for other, task in self.past.items() if other != name]
        if arm.endswith("alone"):
            past = []
        if arm.endswith("shuffled"):
            past = [shuffled(task, rng) for task in past]
        target = self.past[name].model_copy(update={"trials": []})
        order = list(range(len(self.settings)))
        if arm.endswith("alone"):  # whose first three are drawn
            rng.shuffle(order)
        offered = [self.settings[k] for k in order]
        weights = self._proxy(name)[0].tolist() if arm.endswith("trusted") else None
        policy = Policy(SPACE, offered, EPOCHS, target, past, weights, "seconds")
        while (asked := policy.ask()) is not None:
            candidate, part = asked
            cost, value = self.part(name, order[candidate], part)
            policy.tell(Seen(candidate, part, value, cost))
            yield cost, value

    def _proxy(self, name: str) -> tuple[Any, Any]:
        """What `search proxy` finds of the others: their relevances, and what settings promise."""
        past = [task for other, task in self.past.items() if other != name]
        target = self.past[name].model_copy(update={"trials": []})
        return judge_past(SPACE, self.settings, target, past, SHARE, 0)

    def _optuna(self, arm: str, name: str, seed: int) -> Iterator[int]:
        """Settings in the order that a sampler of Optuna wants them."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        kinds = {key: one.distribution() for key, one in SPACE.items()}
        make: dict[str, Callable[..., Any]] = {
            "GP": optuna.samplers.GPSampler, "TPE": optuna.samplers.TPESampler,
        }  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = random.Random(f"{arm} {name} {seed}").randrange(2**31)
            study = optuna.create_study(sampler=make[arm](seed=own, n_startup_trials=FIRST))
            left = list(range(len(self.settings)))
            while left:
                params = study.ask(kinds).params
                place = np.array(coordinates(SPACE, params))
                far = ((self.places[left] - place) ** 2).sum(1)
                k = left.pop(int(np.argmin(far)))
                yield k
                values = [self.part(name, k, part)[1] for part in range(EPOCHS)]
                known = [value for value in values if value is not None]
                worst = self.past[name].untuned
                study.add_trial(
                    optuna.trial.create_trial(
                        params=self.settings[k], distributions=kinds, value=min([*known, worst])
                    )
                )


def shuffled(task: Task, rng: random.Random) -> Task:
    """Its curves, at settings that they do not belong to."""
    own = [trial.settings for trial in task.trials]
    rng.shuffle(own)
    trials = [t.model_copy(update={"settings": s}) for t, s in zip(task.trials, own, strict=True)]
    return task.model_copy(update={"trials": trials})


def really(home: Path, table: Table, names: list[str]) -> str:
    """Searches that train, on the last tasks: values, and what the table's best is."""
    lines = ["Searches really run, five parts each (one whole run):", "",
             "| task | untuned | quicktune, trusted | quicktune, alone | random | table's best |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name in [one for one in names if one == REAL] or names[-1:]:
        files = []
        for other in names:
            if other != name:
                files.append(home / f"past-{other}.json")
                table.past[other].write(files[-1])
        given = {
            "base": home / "lab" / "base",
            "data": home / f"{name}-rows.jsonl",
            "evaluate": str(home / f"{name}-held.jsonl"),
        }
        space = {key: one.model_dump() for key, one in SPACE.items()}
        fixed = {"epochs": EPOCHS, "save_steps": 10**6}
        values = []
        for arm, past in (("quicktune", [str(path) for path in files]), ("alone", [])):
            found = deltaloom.search("quicktune", **given, out=home / f"real-{name}-{arm}",
                                     history=past, space=space, fixed=fixed, parts=EPOCHS,
                                     steps=EPOCHS, finish=False)  # fmt: skip
            values.append(found["objective"])
        rng = random.Random(f"really {name}")
        drawn = [table.units[name][str(k)] for k in rng.sample(range(len(table.settings)), 1)]
        values.append(min(min(unit["curve"]) for unit in drawn))
        lowest = min(point.value for t in table.past[name].trials for point in t.curve)
        cells = " | ".join(f"{v:.3f}" for v in (table.past[name].untuned, *values, lowest))
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"


def per_task(found: Regrets, arm: str, budget: int, names: list[str], seeds: int) -> list[float]:
    """Mean over seeds, one value a task."""
    return [float(np.mean([found[arm, budget, n, s] for s in range(seeds)])) for n in names]


def over_tasks(values: list[float]) -> Estimate:
    return Estimate.from_items({f"task {k}": v for k, v in enumerate(values)}, metric="mean")


def tables(found: Regrets, arms: Sequence[str], names: list[str], seeds: int) -> str:
    """Regrets, and differences of quicktune to every other arm."""
    heads = [f"{b} run{'s' if b > 1 else ''}" for b in BUDGETS]
    lines = ["Regret, mean over tasks and seeds", "", "| arm | " + " | ".join(heads) + " |"]
    lines += ["|---" * (len(BUDGETS) + 1) + "|"]
    for arm in arms:
        cells = [f"{np.mean(per_task(found, arm, b, names, seeds)):.3f}" for b in BUDGETS]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    for ours in [one for one in OURS if one in arms]:
        lines += ["", f"Other arm - {ours}, with 95 % intervals over tasks", ""]
        lines += ["| arm | " + " | ".join(heads) + " |", "|---" * (len(BUDGETS) + 1) + "|"]
        for arm in [one for one in arms if one != ours]:
            cells = []
            for budget in BUDGETS:
                one = over_tasks(differences(found, arm, ours, budget, names, seeds))
                cells.append(f"{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}]")
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    lines += ["", "Regret after one run, by task", "", "| task | " + " | ".join(arms) + " |"]
    lines += ["|---" * (len(arms) + 1) + "|"]
    for name in names:
        cells = [f"{per_task(found, arm, 1, [name], seeds)[0]:.3f}" for arm in arms]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def differences(
    found: Regrets, arm: str, ours: str, budget: int, names: list[str], seeds: int
) -> list[float]:
    """What an arm lacks more than `ours`, one value a task."""
    pairs = zip(
        per_task(found, arm, budget, names, seeds),
        per_task(found, ours, budget, names, seeds),
        strict=True,
    )
    return [other - own for other, own in pairs]


def judged(found: Regrets, arms: Sequence[str], names: list[str], seeds: int) -> list[dict]:
    """Is quicktune's regret below that of its rivals at equal cost, also with the proxy's trust?"""
    results = []
    unit = f"regret, low end of the 95 % interval over {len(names)} tasks, {seeds} seeds"
    for ours in [one for one in OURS if one in arms]:
        for arm in [one for one in RIVALS if one in arms]:
            for budget in BUDGETS:
                one = over_tasks(differences(found, arm, ours, budget, names, seeds))
                results.append({"name": f"{arm} - {ours}, budget {budget}",
                                "value": round(one.low, 4), "bound": "> 0", "holds": one.low > 0,
                                "unit": unit})  # fmt: skip
    return results


if __name__ == "__main__":
    main()
