"""Does fine-tuning behave like regression with the tangent kernel? A small model, real data.

Few-shot classification with label words, as in the paper: k training rows a class are drawn by
seed, the 200 test rows are the same for every seed. Beside each kernel's regression stands
fine-tuning of the same parameters on the same rows: AdamW through `engine.train` (its loss is the
softmax over all tokens at the label word), and plain SGD on the softmax over the label words.
Accuracy is pooled over seeds (Student's t over seeds); differences are paired by seed and row.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltaloom.core.base import Base
from deltaloom.core.estimate import Estimate, compare_seeds, pool_seeds
from deltaloom.core.examples import Examples, parse
from deltaloom.core.run import Run
from deltaloom.engine.forward import padding_token
from deltaloom.engine.train import TrainSettings, fit
from deltaloom.measure._diagnosis import agreement, distances, holding, slopes
from deltaloom.measure._differentiable import Differentiable, differentiable
from deltaloom.measure._kernel_shards import Asking, tangent_kernels
from deltaloom.measure._kernel_study import Study
from deltaloom.measure._label_words import LabelWords, questions

MODEL = "models/stories260K"
DATA = "data/classification_sentiment"
FILE, CHOICES, TEMPLATE = "subj.all", [" feeling", " fact"], "{} This is a"
"""Subj (Pang & Lee 2004): is a sentence of film texts objective or subjective?"""
CASES = ((16, "all"), (64, "all"), (16, "lora"), (64, "lora"))
"""Rows a class, and what is tuned."""
KINDS = ("sgd", "sign", "asymmetric")
TESTED = 200
WORDS = 20
"""Words of a text that are read."""
EPOCHS, BATCH, R = 10, 16, 8
RATES = {
    ("all", "AdamW"): 1e-3,
    ("all", "SGD"): 1e-1,
    ("lora", "AdamW"): 5e-3,
    ("lora", "SGD"): 1e-1,
}
"""Learning rates, the best of two or three a factor of 3 to 10 apart on rows and a seed that are
in no table (64 rows a class, seed 100, and with the two label words exchanged)."""


def results(seeds: int) -> list[dict[str, Any]]:
    """Print the tables; figures without bounds."""
    root = os.environ.get("DELTALOOM_ASSETS")
    if root is None:
        print("DELTALOOM_ASSETS is not set: the kernel view was not measured.\n")
        return []
    print(f"{MODEL.rpartition('/')[2]}, Subj, {TESTED} test rows, {seeds} seeds.\n")
    print("| rows a class | parameters | how | accuracy | minus AdamW |\n" + "|---" * 5 + "|")
    found, facts = [], []
    for shots, parameters in CASES:
        runs = [one_seed(Path(root), shots, parameters, seed) for seed in range(seeds)]
        estimates = {how: [run[0][how] for run in runs] for how in runs[0][0]}
        for how, series in estimates.items():
            pooled = pool_seeds(series)
            gap = compare_seeds(series, estimates["AdamW"]).difference
            print(
                f"| {shots} | {parameters} | {how} | {interval(pooled)} "
                f"| {'' if how == 'AdamW' else interval(gap, '+')} |",
                flush=True,
            )
            if how.startswith("kernel"):
                name = f"{shots} a class, {parameters}: {how} minus AdamW"
                found.append(figure(name, gap.value, "accuracy, mean over seeds"))
        facts += [(shots, parameters, how, runs) for how in ("AdamW", "SGD")]
    print(
        "\n| rows a class | parameters | tuned by | linearisation R2 | feature distance "
        "| correlation with the sgd kernel's change | with the asymmetric kernel's |"
    )
    print("|---|---|---|---|---|---|---|")
    for shots, parameters, how, runs in facts:
        cells = []
        for key in ("linearisation", "feature_distance", "sgd", "asymmetric"):
            values = {f"seed {k}": run[1][how][key] for k, run in enumerate(runs)}
            cells.append(interval(Estimate.from_items(values, metric=key)))
        print(f"| {shots} | {parameters} | {how} | {' | '.join(cells)} |")
    print()
    return found


def figure(name: str, value: float, unit: str) -> dict[str, Any]:
    return {"name": name, "value": value, "bound": None, "holds": True, "unit": unit}


def interval(one: Estimate, sign: str = "") -> str:
    return f"{one.value:{sign}.3f} [{one.low:{sign}.3f}, {one.high:{sign}.3f}]"


def one_seed(
    root: Path, shots: int, parameters: str, seed: int
) -> tuple[dict[str, Estimate], dict[str, dict[str, float]]]:
    """Accuracies by row, and the tests of the kernel view for both ways of tuning."""
    base = Base(model=str(root / MODEL), device="cpu")
    tokenizer, model = base.tokenizer(), base.load()
    lessons, tested = drawn(root, shots, seed)
    asked = questions(lessons, tokenizer, "", 200) + questions(tested, tokenizer, "", 200)
    train, test = np.arange(len(lessons)), np.arange(len(lessons), len(asked))
    with differentiable(model, parameters, R, seed) as ready:
        words = LabelWords(ready.model, len(CHOICES), padding_token(tokenizer))
        study = Study(words, asked, len(lessons), ready.names)
        study.grams = kernels(study, parameters, seed)

        def scored(outputs: np.ndarray) -> Estimate:
            every = np.concatenate([study.goals[train], outputs])
            return Estimate.from_items(study.right(every), metric="accuracy")

        found = {"untuned": scored(study.start[test])}
        foreseen = {}
        for kind in KINDS:
            found[f"kernel {kind}"] = scored(study.regressed(kind, train, test))
            foreseen[kind] = study.regressed(kind, train, test, from_start=True)
        found["kernel sgd, from the start"] = scored(foreseen["sgd"])
        facts = {}
        for how in ("AdamW", "SGD"):
            outputs = tuned(study, ready, train, test, how, RATES[parameters, how], seed)
            found[how] = scored(outputs["tuned"])
            found[f"{how}, linearised"] = scored(outputs["linear"])
            facts[how] = {
                **agreement(
                    study.start[test], outputs["tuned"], outputs["linear"], foreseen["sgd"]
                ),
                "feature_distance": outputs["distance"],
            }
            for kind in ("sgd", "asymmetric"):
                seen = agreement(
                    study.start[test], outputs["tuned"], outputs["linear"], foreseen[kind]
                )
                facts[how][kind] = seen["kernel_correlation"]
    return found, facts


def drawn(root: Path, shots: int, seed: int) -> tuple[Examples, Examples]:
    """Training rows of this seed, and the test rows of all seeds."""
    rows = []
    for line in (root / DATA / FILE).read_text("latin-1").split("\n"):
        label, _, text = line.partition(" ")
        if text.strip():
            prompt = TEMPLATE.format(" ".join(text.split()[:WORDS]))
            rows.append({"prompt": prompt, "choices": CHOICES, "answer": int(label)})
    rows = list({str(row["prompt"]): row for row in rows}.values())
    random.Random(0).shuffle(rows)
    tested, rest = rows[:TESTED], rows[TESTED:]
    random.Random(seed + 1).shuffle(rest)
    chosen = [
        row for k in range(len(CHOICES)) for row in [r for r in rest if r["answer"] == k][:shots]
    ]
    return examples(chosen), examples(tested)


def examples(rows: list[dict[str, Any]]) -> Examples:
    return Examples([parse(f"row {k}", "bench", dict(row)) for k, row in enumerate(rows)])


def kernels(study: Study, parameters: str, seed: int) -> dict[str, Any]:
    """The study's kernels, (n, k, m, k) each."""
    with tempfile.TemporaryDirectory() as folder, Run.open(folder, {}, {}, seed) as run:
        return tangent_kernels(study, KINDS, Asking(None, parameters, R, seed), 2**32, run)


def tuned(
    study: Study,
    ready: Differentiable,
    train: np.ndarray,
    test: np.ndarray,
    how: str,
    lr: float,
    seed: int,
) -> dict[str, Any]:
    """Outputs (m, k) on the test rows after tuning, and linearised; the weights are put back."""
    parameters = {name: ready.model.get_parameter(name) for name in ready.trained}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        if how == "AdamW":
            with tempfile.TemporaryDirectory() as folder, Run.open(folder, {}, {}, seed) as run:
                settings = TrainSettings(
                    epochs=EPOCHS, lr=lr, batch_size=BATCH, warmup=0.0, save_steps=10**6
                )
                lessons = [study.asked[i].lesson() for i in train]
                fit(ready.model, lessons, study.words.pad_id, settings, run)
        else:
            descend(study, [*parameters.values()], train, lr, seed)
        ready.model.eval()
        after = {name: p.detach().clone() for name, p in parameters.items()}
        outputs = study.outputs(test.tolist())
        with holding(parameters, before):
            linear = study.start[test] + slopes(study, test, before, after)
        apart = distances(study, test[:16], parameters, before, after)
        return {"tuned": outputs, "linear": linear, "distance": float(np.mean(apart))}
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


def descend(study: Study, parameters: list[Any], train: np.ndarray, lr: float, seed: int) -> None:
    """SGD on the cross-entropy over the label words, linear schedule as above."""
    order = random.Random(seed)
    steps = EPOCHS * -(-len(train) // BATCH)
    descent = torch.optim.SGD(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(descent, 1.0, 0.0, steps)
    for numbers in batches(list(train), order):
        asked = [study.asked[i] for i in numbers]
        descent.zero_grad()
        for own, batch in study.words.batches(asked):
            outputs = study.words(batch)
            scores = torch.cat([-outputs, outputs], 1) if outputs.shape[1] == 1 else outputs
            answers = torch.tensor([asked[i].answer for i in own])
            losses = torch.nn.functional.cross_entropy(scores, answers, reduction="sum")
            (losses / len(asked)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        descent.step()
        schedule.step()
    descent.zero_grad(set_to_none=True)


def batches(numbers: list[int], order: random.Random) -> Iterator[list[int]]:
    for _ in range(EPOCHS):
        order.shuffle(numbers)
        for start in range(0, len(numbers), BATCH):
            yield numbers[start : start + BATCH]
