"""Run folders written by hand through `core`, as the recipe layer leaves them."""

import json
import random
from pathlib import Path

import yaml

from deltaloom.core.atomic import write_json, write_text
from deltaloom.core.estimate import Estimate, compare
from deltaloom.core.examples import Examples
from deltaloom.core.features import Features
from deltaloom.core.run import Run

BASE = {"model": "lab/tiny-12M", "dtype": "float32", "device": "auto"}
LORA = {"method": "lora", "r": 16, "alpha": 32.0, "lr": 5e-4, "epochs": 3.0, "batch_size": 16}
SKILL = {"less": 0.32, "all": 0.35, "random": 0.1, "home-only": 0.3}
STARTED = "2026-01-02T03:04:05Z"


def settle(folder: Path, **changes) -> None:
    """Take out of a record what no two machines share."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    record["started"] = STARTED
    record["versions"] = {"python": "3.12.1", "deltaloom": "0.1.0", "torch": "2.9.0"}
    record["cost"].update({key: 0.0 for key in ("wall_seconds", "cpu_seconds", "peak_rss_bytes")})
    record["cost"].update(changes)
    write_json(folder / "run.json", record)


def pool_rows(home: Path, rows: int = 900, seed: int = 0) -> Examples:
    """A pool of several sources, some rows with markup and some very long."""
    chance = random.Random(seed)
    sources = ["home", "office", "garden", "noise", "kitchen talk"]
    lines = []
    for number in range(rows):
        source = chance.choices(sources, [2, 3, 2, 5, 1])[0]
        room, thing = chance.choice(["cellar", "attic", "hall"]), chance.choice(["key", "lamp"])
        row = {"id": f"row-{number:05d}", "source": source}
        if number % 3:
            row["prompt"] = f"Mara puts the {thing} in the {room}. Where is the {thing}?"
            row["completion"] = f"In the {room}."
        else:
            told = " ".join(
                f"Then {chance.choice(['Jo', 'Ana'])} waits." for _ in range(number % 40)
            )
            row["messages"] = [
                {"role": "user", "content": f"Where did the {thing} go? {told}"},
                {"role": "assistant", "content": f"It is in the {room} & stays there."},
            ]
        if number == 3:
            row["messages"][1]["content"] = "<script>alert(1)</script> <img src=x onerror=alert(2)>"
        lines.append(json.dumps(row))
    path = home / "pool.jsonl"
    home.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Examples.read(path)


def select(folder: Path, pool: Examples, settings: dict, count: int = 60, scored: bool = True):
    """A select step: the rows, their scores and reasons."""
    chance = random.Random(7)
    step = {"select": {"name": folder.name, "base": BASE, "seed": 3, **settings}}
    inputs = {"base": "b" * 16, "pool pool.jsonl": pool.digest()}
    with Run.open(folder, {"steps": [step]}, inputs, 3) as run:
        lift = {"home": 0.5, "kitchen talk": 0.25}
        scores = [chance.gauss(lift.get(row.source, 0.0), 0.2) for row in pool]
        order = sorted(range(len(pool)), key=lambda i: -scores[i])
        chosen = pool.take(order[:count] if scored else sorted(order)[::13][:count])
        columns = {}
        if scored:
            about = {"method": settings["method"]}
            source = {"source": [row.source for row in pool]}
            Features.from_scores(folder / "scores", pool.ids, scores, about=about, columns=source)
            columns["score"] = dict(zip(pool.ids, scores, strict=True))
            columns["reason"] = {
                i: f"closest to target row t{n % 9}" for n, i in enumerate(pool.ids)
            }
        chosen.write(folder / "selected.jsonl", columns)
        run.finish(
            rows=len(chosen),
            pool_rows=len(pool),
            pool_sources=dict(pool.sources()),
            selected_sources=dict(chosen.sources()),
        )
    spent = {"forward_tokens": 9e5, "backward_tokens": 4e5, "flops": 2.1e13} if scored else {}
    wall = {"wall_seconds": 38.2 if scored else 0.3, "cpu_seconds": 71.0 if scored else 0.3}
    settle(folder, **spent, **wall, peak_rss_bytes=6.1e8)


def tune(folder: Path, data: list[str], tokens: float, steps: int = 120, **more) -> None:
    """A tune step with its log."""
    chance = random.Random(folder.name)
    step = {"tune": {"name": folder.name, "base": BASE, "seed": 3, "data": data, **LORA, **more}}
    inputs = {"base": "b" * 16, **{f"data {name}": "d" * 16 for name in data}}
    with Run.open(folder, {"steps": [step]}, inputs, 3) as run:
        for number in range(1, steps + 1):
            loss = 0.4 + 2.2 * 0.97**number + chance.gauss(0, 0.06)
            run.log(step=number, epoch=number / 40, loss=loss, lr=1e-4, grad_norm=1.0)
            if number % 40 == 0:
                run.log(step=number, evaluation_loss=0.7 + 1.5 * 0.98**number)
        run.note(rows=60, tokens=int(tokens), truncated_rows=2, max_length=256, steps=steps)
        run.note(best_evaluation={"step": steps, "value": 0.834, "merit": -0.834})
        run.finish(delta="lowrank", about={"base": BASE["model"], "sources": {"home": 60}})
    spent = {"forward_tokens": tokens, "backward_tokens": tokens, "flops": tokens * 4 * 1.1e7}
    settle(
        folder, **spent, wall_seconds=tokens / 3e4, cpu_seconds=tokens / 1.6e4, peak_rss_bytes=9e8
    )


def merge(folder: Path, deltas: list[str]) -> None:
    """A merge step."""
    step = {
        "merge": {
            "name": folder.name,
            "base": BASE,
            "seed": 3,
            "deltas": deltas,
            "method": "ties",
            "density": 0.2,
        }
    }
    with Run.open(folder, {"steps": [step]}, {"base": "b" * 16}, 3) as run:
        run.finish(delta="dense", about={"base": BASE["model"]})
    settle(folder, wall_seconds=1.4, cpu_seconds=2.2, peak_rss_bytes=3e8)


def answers(label: str, task: str, metric: str, items: int) -> Estimate:
    """Deterministic 0/1 answers (or losses) of one model on one task."""
    gain = next((value for name, value in SKILL.items() if label.endswith(name)), 0.0)
    gain = 0.28 if label == "both" else gain * (1.0 if "home" in task else 0.2)
    values = {}
    for number in range(items):
        luck = random.Random(f"{task} {number}").random()
        own = random.Random(f"{label} {task} {number}").random()
        if metric == "loss":
            values[f"q{number}"] = 1.1 - gain + 0.3 * luck + 0.2 * own
        else:
            values[f"q{number}"] = float(0.7 * luck + 0.3 * own < 0.42 + gain)
    better = "lower" if metric == "loss" else "higher"
    return Estimate.from_items(values, metric=metric, better=better, of=f"{label} on {task}")


def measure(folder: Path, labels: list[str], tasks: list[str], metric: str, **more) -> None:
    """A measure step with items, estimates and comparisons."""
    method = "loss" if metric == "loss" else "choice"
    settings = {
        "name": folder.name,
        "method": method,
        "base": BASE,
        "seed": 3,
        "deltas": labels,
        "tasks": [f"/data/{task}.jsonl" for task in tasks],
        **more,
    }
    inputs = {"base": "b" * 16, **{f"tasks /data/{task}.jsonl": f"{task:_<16}" for task in tasks}}
    with Run.open(folder, {"steps": [{"measure": settings}]}, inputs, 3) as run:
        found = {}
        for label in (Path(name).name for name in labels):
            for task in tasks:
                one = answers(label, task, metric, 60 if metric == "loss" else 240)
                write_json(run.part(f"{label}--{task}").folder / "estimate.json", one.to_json())
                found[label, task] = one
        run.finish(
            estimates={f"{a}/{task}/{metric}": brief(one) for (a, task), one in found.items()},
            comparisons={
                f"{a} - base/{task}/{metric}": brief(
                    compare(one, found["base", task], resamples=100).difference
                )
                for (a, task), one in found.items()
                if a != "base" and "base" in labels
            },
        )
    settle(
        folder,
        forward_tokens=3e5,
        flops=6.6e12,
        wall_seconds=22.0,
        cpu_seconds=41.0,
        peak_rss_bytes=5e8,
    )


def brief(estimate: Estimate) -> dict:
    """An estimate without its items."""
    full = estimate.to_json()
    return {
        key: value for key, value in full.items() if key not in ("items", "weights", "clusters")
    }


def recipe_run(home: Path, rows: int = 900, count: int = 60, metrics=("accuracy",)) -> Path:
    """A whole recipe: two selections, four tunings, a merge, measurements."""
    pool = pool_rows(home / "data", rows)
    folder = home / "quickstart"
    few = 3e5 * count / 60
    select(
        folder / "less", pool, {"method": "less", "pool": ["pool.jsonl"], "fraction": 0.07}, count
    )
    chosen = {"method": "random", "pool": ["pool.jsonl"], "fraction": 0.07}
    select(folder / "random", pool, chosen, count, scored=False)
    tune(folder / "tuned-less", ["less"], few)
    tune(folder / "tuned-random", ["random"], few)
    tune(folder / "tuned-all", ["/data/pool.jsonl"], few * 12, steps=400)
    tune(folder / "tuned-home-only", ["/data/home.jsonl"], few * 2, steps=160, r=8)
    merge(folder / "both", ["tuned-less", "tuned-home-only"])
    tuned = ["tuned-less", "tuned-random", "tuned-all", "tuned-home-only", "both"]
    for metric in metrics:
        measure(
            folder / f"measured-{metric}",
            ["base", *tuned, "org/outside-adapter"][: None if metric == "accuracy" else 6],
            ["test-home", "test-office"],
            metric,
            compare="base",
        )
    parts = ["less", "random", *tuned, *(f"measured-{metric}" for metric in metrics)]
    finish_recipe(folder, parts)
    return folder


def finish_recipe(folder: Path, names: list[str]) -> None:
    """The recipe's own record over the steps in `names`."""
    records = [Run.read(folder / name) for name in names]
    steps = [record["recipe"]["steps"][0] for record in records]
    record = {
        "schema": 1,
        "status": "done",
        "started": STARTED,
        "recipe": {"steps": steps},
        "inputs": {},
        "seed": 0,
        "versions": records[0]["versions"],
        "cost": records[0]["cost"],
        "notes": {},
        "results": {"steps": {name: {} for name in names}, "estimates": {}, "comparisons": {}},
    }
    write_json(folder / "run.json", record)
    write_text(folder / "recipe.yaml", yaml.safe_dump({"steps": steps}, sort_keys=False))
