"""The arms of `clear.py`: what each is tuned on, how, and what it reaches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import _clear_data as sets
import numpy as np
from _clear_data import Row, write
from _units import plain

import deltaloom
from deltaloom.core.base import Base
from deltaloom.core.estimate import Estimate

ARMS = {
    "LoRA": "lora",
    "CleaR": "clear",
    "drop": "clear",
    "cleanlab": "lora",
    "oracle": "lora",
    "full": "full",
}
"""Arm -> method."""
LAB: dict[str, Any] = {"epochs": 8, "batch_size": 32, "save_steps": 10**6}
MINILM: dict[str, Any] = {"epochs": 8, "batch_size": 64, "save_steps": 10**6, "max_length": 128}
LAB_RATES = {"LoRA": 2e-3, "full": 5e-4}
RATES = {"LoRA": (5e-4, 1e-3, 2e-3, 4e-3), "full": (5e-5, 1e-4, 2e-4, 4e-4)}
"""MiniLM's, to choose from."""


class Setting:
    """One set, noise and seed: its data, its runs and what they reach."""

    def __init__(
        self,
        home: Path,
        data: str,
        noise: str,
        seed: int,
        device: str,
        quick: bool,
        rates: dict[str, float],
    ) -> None:
        self.home, self.seed = home, seed
        home.mkdir(parents=True, exist_ok=True)
        self.base = sets.base(data, home, seed, device)
        self.task = sets.task(data, noise, seed, quick)
        self.shared = LAB if data == "lab" else MINILM
        self.rates = rates or LAB_RATES
        task = self.task
        self.test = write(home / "test.jsonl", task.test, [row["answer"] for row in task.test])
        self.noisy = write(home / "noisy.jsonl", task.rows, task.labels)

    def tuned(self, arm: str, data: Path | None = None, name: str | None = None) -> Path:
        """The folder of an arm's run, made now or before."""
        out = self.home / plain(name or arm)
        settings = {**self.shared, "lr": self.rates["full" if arm == "full" else "LoRA"]}
        if arm == "drop":
            settings["rule"] = "drop"
        rows = data or self.data(arm)
        deltaloom.tune(ARMS[arm], base=self.base, data=rows, out=out, seed=self.seed, **settings)
        return out

    def data(self, arm: str) -> Path:
        """What an arm is tuned on."""
        if arm == "oracle":
            return self.kept("right.jsonl", [not wrong for wrong in self.task.wrong])
        if arm == "cleanlab":
            return self.kept("found.jsonl", (~issues(*self.other_half())).tolist())
        return self.noisy

    def kept(self, name: str, which: list[bool]) -> Path:
        """A file of some of the rows."""
        every = zip(self.task.rows, self.task.labels, which, strict=True)
        some = [(r, y) for r, y, keep in every if keep]
        return write(self.home / name, [r for r, _ in some], [y for _, y in some])

    def other_half(self) -> tuple[np.ndarray, np.ndarray]:
        """Each row's class probabilities (n, C) by LoRA on the other half, and its label."""
        rows = self.task.rows
        found = np.zeros((len(rows), len(rows[0]["choices"])))
        half = np.random.default_rng(self.seed).permutation(len(rows)) % 2
        for side in range(2):
            data = self.kept(f"half-{side}.jsonl", (half != side).tolist())
            folder = self.tuned("LoRA", data, f"half-{side}")
            at = np.flatnonzero(half == side)
            found[at] = chances(folder, Base(**self.base), [rows[i] for i in at])
        return found, np.array(self.task.labels)

    def reached(self, arm: str) -> dict[str, float]:
        """Accuracy, share of wrong labels memorised, and AUC of an arm; its runs are removed."""
        out = self.tuned(arm)
        measured = self.home / f"{out.name}-measured"
        deltaloom.measure(
            "choice", base=self.base, deltas=[str(out)], tasks=[self.test, self.noisy], out=measured
        )
        files = (measured / f"{out.name}--{part}/estimate.json" for part in ("test", "noisy"))
        accuracy, given = (Estimate.from_json(json.loads(path.read_text())) for path in files)
        bad = np.array(self.task.wrong)
        wrong = [row["id"] for row, one in zip(self.task.rows, bad, strict=True) if one]
        result = {"accuracy": accuracy.value}
        if wrong:
            result["memorised"] = float(np.mean([given.items[one] for one in wrong]))
        if wrong and (out / "scores").exists():
            from deltaloom.core.features import Features

            scores = np.array(Features.open(out / "scores").index["score"])
            result["auc"] = auc(scores, bad)
        if arm == "cleanlab":
            kept = {json.loads(line)["id"] for line in (self.home / "found.jsonl").open()}
            removed = np.array([row["id"] not in kept for row in self.task.rows])
            result["removed"] = float(removed.mean())
            result["removed that were wrong"] = float(bad[removed].mean()) if removed.any() else 0.0
        shutil.rmtree(self.home)
        return result


def rate(home: Path, arm: str, lr: float, seed: int, device: str) -> dict[str, float]:
    """Accuracy of MiniLM on rows of TREC that are kept for it, tuned without noise."""
    place = home / plain(f"rate {arm} {lr:g} {seed}")
    setting = Setting(place, "trec", "none", seed, device, False, {arm: lr, "LoRA": lr})
    rows = sets.trec_validation(seed)
    data = write(place / "validation.jsonl", rows, [row["answer"] for row in rows])
    out = setting.tuned(arm)
    found = deltaloom.measure(
        "choice", base=setting.base, deltas=[str(out)], tasks=[data], out=place / "measured"
    )
    shutil.rmtree(place)
    return {"accuracy": next(iter(found.values())).value}


def issues(found: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rows that cleanlab finds mislabelled, as it comes, (n,)."""
    from cleanlab.filter import find_label_issues

    return np.asarray(find_label_issues(labels, found, n_jobs=1), dtype=bool)


def chances(folder: Path, base: Base, rows: list[Row]) -> np.ndarray:
    """Softmax over a classifier's outputs, or over the choices' log-likelihoods, (n, C)."""
    from deltaloom.core.origin import Origin

    model, tokenizer = Origin(base, str(folder)).load()
    logs = (outputs if base.labels else likelihoods)(model, tokenizer, rows)
    shares = np.exp(logs - logs.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def outputs(model: Any, tokenizer: Any, rows: list[Row]) -> np.ndarray:
    """What a classifier puts out, (n, C)."""
    import torch

    found = []
    for start in range(0, len(rows), 64):
        texts = [row["prompt"] for row in rows[start : start + 64]]
        inputs = tokenizer(
            texts, padding=True, truncation=True, max_length=128, return_tensors="pt"
        ).to(model.device)
        with torch.inference_mode():
            found.append(model(**inputs).logits.double().cpu().numpy())
    return np.concatenate(found)


def likelihoods(model: Any, tokenizer: Any, rows: list[Row]) -> np.ndarray:
    """Log-likelihoods of the choices, (n, C)."""
    from deltaloom.core.encoding import encode_continuation, encode_prompt
    from deltaloom.core.examples import parse
    from deltaloom.engine.forward import padding_token, token_logprobs

    sequences = []
    for row in rows:
        example = parse("row", "lab", {k: row[k] for k in ("id", "prompt", "choices", "answer")})
        prompt = encode_prompt(example, tokenizer)
        for choice in example.choices or ():
            ids = encode_continuation(example, prompt, choice, tokenizer)
            sequences.append(([*prompt, *ids], [0] * len(prompt) + [1] * len(ids)))
    sums = [one.sum() for one in token_logprobs(model, sequences, padding_token(tokenizer))]
    return np.array(sums, dtype=np.float64).reshape(len(rows), -1)


def auc(scores: np.ndarray, wrong: np.ndarray) -> float:
    """Chance that a wrong row scores below a right one, ties counted half."""
    below = scores[wrong][:, None] - scores[~wrong][None, :]
    return float((below < 0).mean() + 0.5 * (below == 0).mean())
