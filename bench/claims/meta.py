"""Few rows of a new task: from the base, from joint tuning, and from meta-learned adapters.

    python bench/claims/meta.py [--quick] [--seeds N] [--first SEED] [--work DIR]

The lab's few-shot tasks: a word that the base has never read means one of three roles, another one
in another task. 60 tasks of 32 rows are learned from by LoRA: with the closed form inside (kernel),
with the regulariser in its place (energy), by first-order MAML (gradient) and by Reptile, all of
them `tune meta` with the same outer steps, tasks and rows, or jointly (`tune lora`) for as many
rows; at the rate 1e-3, two of them also faster, at 3e-3. Four new tasks, whose words are in none of
these, have 8 rows each. Every start, and the base with fresh factors, is adapted to them in closed
form, by 5 steps of plain descent at the inner rate (what MAML and Reptile learned for), and by 1, 5
and 20 steps of AdamW at each of two rates; a cell has the better rate by its mean over seeds, so
that no start suffers from another's rate. Questions are about people who are in no other row.
The seed draws tasks, people, rows and orders; it is the random unit: differences are taken within
a seed, over the mean of its new tasks; intervals are Student's t over seeds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _seeds import over_seeds, run_seeds, shown

import deltaloom
from deltaloom.core.base import Base
from deltaloom.core.encoding import Encoded, encode, encode_prompt
from deltaloom.core.examples import Examples
from deltaloom.core.run import Run
from deltaloom.engine import adaptation
from deltaloom.engine.adaptation import moved
from deltaloom.engine.train import collate
from deltaloom.lab.few_shot import write_few_shot
from deltaloom.lab.files import write_lab
from deltaloom.tune._meta import Learner
from deltaloom.tune.lora import Lora

STEPS, ROWS = 40, 40 * 4 * 16
"""Outer steps, and the rows that they see: 4 tasks a step, 8 + 8 rows a task."""
LEARNED = {
    "kernel": {"inner": "kernel"},
    "kernel, faster": {"inner": "kernel", "lr": 3e-3},
    "energy": {"inner": "energy"},
    "gradient": {"inner": "gradient"},
    "reptile": {"inner": "reptile"},
}
"""Defaults, but for what is said."""
JOINT = {"joint": {"lr": 1e-3}, "joint, faster": {"lr": 3e-3}}
STARTS = ("base", *JOINT, *LEARNED)
SHOTS, RATES, COUNTS = 8, (3e-3, 1e-2), (1, 5, 20)
TIME, INNER_LR, INNER_STEPS = 10.0, 0.1, 5
"""The method's defaults."""
WAYS = ("none", "closed form", "5 descent", *(f"{count} AdamW" for count in COUNTS))
COMPARED = [("kernel", other) for other in ("base", "joint", "gradient", "reptile", "energy")]
COMPARED += [("kernel, faster", other) for other in ("kernel", "joint, faster", "gradient")]
COMPARED += [("gradient", "joint"), ("reptile", "joint"), ("joint", "base")]

Found = dict[str, Any]


def main() -> None:
    run_seeds("meta", str(__doc__), one_seed, tables, judged)


def one_seed(home: Path, seed: int, quick: bool) -> Found:
    """Accuracy and loss by start and way, and what each start cost; kept in a file."""
    kept = home / "found.json"
    if kept.exists():
        return json.loads(kept.read_text())
    base = Base(model=str(write_lab(home / "lab", seed, "small")["base"]), device="cpu")
    paths = write_few_shot(home / "tasks", seed, new=2 if quick else 4, shots=SHOTS, asked=40)
    starts = {"base": None}
    for start in STARTS[1:]:
        starts[start] = learned(start, base, paths["tasks"], home, seed, quick)
    found: Found = {"cost": {}}
    for start, folder in starts.items():
        if folder is not None:
            cost = Run.read(folder)["cost"]
            found["cost"][start] = [cost["cpu_seconds"], cost["forward_tokens"]]
        found[start] = adapted(base, folder, paths, seed, quick)
    kept.write_text(json.dumps(found))
    return found


def learned(start: str, base: Base, data: Path, home: Path, seed: int, quick: bool) -> Path:
    """Learn an adapter from the tasks."""
    out, steps = home / start.replace(", ", "-"), 2 if quick else STEPS
    given = {"base": base.model, "data": data, "seed": seed, "out": out, "save_steps": 100_000}
    if start in JOINT:
        epochs = ROWS / sum(1 for _ in data.open()) * steps / STEPS
        deltaloom.tune("lora", **given, **JOINT[start], epochs=epochs)
    else:
        deltaloom.tune("meta", **given, steps=steps, **LEARNED[start])
    return out


def adapted(
    base: Base, folder: Path | None, paths: dict[str, Path], seed: int, quick: bool
) -> Found:
    """Way -> mean accuracy and loss over the new tasks, and CPU seconds of a closed form and of 5
    steps of AdamW."""
    tokenizer = base.tokenizer()
    model = Lora(start=None if folder is None else str(folder)).attach(base, seed)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    learner = Learner(model, names, tokenizer.pad_token_id)
    every: dict[str, list[tuple[float, float]]] = {}
    for key in (key for key in paths if key.startswith("shots-")):
        rows = encode(Examples.read(paths[key]), tokenizer, base.max_length)
        test = Examples.read(paths[key.replace("shots-", "test-")])
        for way, parameters, seconds in ways(learner, rows, quick):
            every.setdefault(way, []).append(answered(learner, parameters, test, tokenizer))
            every.setdefault(f"seconds {way}", []).append((seconds, 0.0))
    return {way: [sum(column) / len(column) for column in zip(*own, strict=True)]
            for way, own in every.items()}  # fmt: skip


def ways(learner: Learner, rows: list[Encoded], quick: bool) -> Iterator[tuple[str, Any, float]]:
    """Parameters after each way of adapting to `rows`, and its CPU seconds."""
    before, clock = learner.parameters, time.process_time()
    yield "none", before, 0.0
    at = learner.tangent(rows)
    after = moved(before, adaptation.change(at, torch.zeros_like(at.values), TIME))
    yield "closed form", after, time.process_time() - clock
    loss, clock = learner.loss(rows), time.process_time()
    after = adaptation.descended(loss, before, INNER_LR, INNER_STEPS)
    yield "5 descent", after, time.process_time() - clock
    for rate in RATES:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in before.items()}
        optimizer = torch.optim.AdamW(leaves.values(), lr=rate, weight_decay=0.0)
        spent = 0.0
        for step in range(1, (1 if quick else COUNTS[-1]) + 1):
            clock = time.process_time()
            optimizer.zero_grad()
            loss(leaves).backward()
            optimizer.step()
            spent += time.process_time() - clock
            if step in COUNTS:
                after = {name: leaf.detach() for name, leaf in leaves.items()}
                yield f"{step} AdamW {rate:g}", after, spent


def answered(
    learner: Learner, parameters: Any, test: Examples, tokenizer: Any
) -> tuple[float, float]:
    """Accuracy among the choices, and mean loss of the right one, which is one token."""
    prompts = [encode_prompt(row, tokenizer) for row in test]
    batch = collate([Encoded(row.id, ids, [1] * len(ids)) for row, ids in
                     zip(test, prompts, strict=True)], tokenizer.pad_token_id)  # fmt: skip
    given = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = torch.func.functional_call(learner.model, parameters, (), given).logits
    last = logits[torch.arange(len(test)), batch["attention_mask"].sum(1) - 1].log_softmax(-1)
    right, loss = 0, 0.0
    for row, values in zip(test, last, strict=True):
        ids = [tokenizer(one, add_special_tokens=False)["input_ids"][0] for one in row.choices]
        answer = row.choices.index(row.answers[0])
        right += int(values[ids].argmax()) == answer
        loss -= float(values[ids[answer]])
    return right / len(test), loss / len(test)


def cell(found: list[Found], start: str, way: str, what: int = 0) -> list[float]:
    """One value a seed: accuracy (0) or loss (1), at the rate that is better on average."""
    if not way.endswith("AdamW"):
        return [seed[start][way][what] for seed in found]
    columns = [[seed[start][f"{way} {rate:g}"] for seed in found] for rate in RATES]
    best = max(columns, key=lambda own: sum(accuracy for accuracy, _ in own))
    return [one[what] for one in best]


def made(found: list[Found]) -> list[str]:
    """Ways that were tried in all seeds."""
    return [way for way in WAYS if way in found[0]["base"] or f"{way} 0.01" in found[0]["base"]]


def difference(found: list[Found], one: str, other: str, way: str) -> list[float]:
    """Of two starts, one value a seed."""
    return [a - b for a, b in zip(cell(found, one, way), cell(found, other, way), strict=True)]


def tables(found: list[Found]) -> str:
    """Accuracies, losses, differences, costs."""
    done = made(found)
    head = ["| start | " + " | ".join(done) + " |", "|---" * (len(done) + 1) + "|"]
    lines = ["Accuracy on new tasks, after:", "", *head]
    for start in STARTS:
        cells = " | ".join(shown(cell(found, start, way)) for way in done)
        lines.append(f"| {start} | {cells} |")
    lines += ["", "Loss of the right answer in nats, after:", "", *head]
    for start in STARTS:
        means = [sum(cell(found, start, way, 1)) / len(found) for way in done]
        lines.append(f"| {start} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
    lines += ["", "Differences in accuracy, after:", "", head[0].replace("start", "difference")]
    lines.append(head[1])
    for one, other in COMPARED:
        cells = " | ".join(shown(difference(found, one, other, way), "+") for way in done)
        lines.append(f"| {one} - {other} | {cells} |")
    lines += [
        "",
        "| start | CPU seconds to learn it | tokens, forward and backward |",
        "|---|---|---|",
    ]
    for start in STARTS[1:]:
        seconds, tokens = ([seed["cost"][start][k] for seed in found] for k in (0, 1))
        lines.append(f"| {start} | {shown(seconds)} | {sum(tokens) / len(tokens):,.0f} |")
    lines += ["", "| way of adapting | CPU milliseconds |", "|---|---|"]
    for way in done[1:]:
        own = way if way in found[0]["base"] else f"{way} {RATES[0]:g}"
        spent = [seed[start][f"seconds {own}"][0] for seed in found for start in STARTS]
        lines.append(f"| {way} | {1000 * sum(spent) / len(spent):.0f} |")
    return "\n".join(lines) + "\n"


def judged(found: list[Found]) -> list[dict]:
    """Does what was learned in closed form adapt better than the rest?"""
    results = []
    unit = f"accuracy on new tasks, low end of the 95 % interval, {len(found)} seeds"
    for way in [way for way in made(found) if way in ("closed form", "5 AdamW", "20 AdamW")]:
        for one, other in COMPARED:
            gain = over_seeds(difference(found, one, other, way))
            end = gain.value if len(found) == 1 else gain.low  # of one seed there is no interval
            results.append({"name": f"{one} - {other}, {way}", "value": round(end, 4),
                            "bound": "> 0", "holds": end > 0, "unit": unit})  # fmt: skip
    return results


if __name__ == "__main__":
    main()
