"""Sparse tuning beside LoRA at equal parameters: fit, forgetting, and composition by addition.

    DELTALOOM_ASSETS=DIR python bench/claims/sparse.py [--quick] [--seeds N] [--work DIR]

A real story model of 260 thousand parameters is tuned on fables, which it does not know, by every
method with the number of parameters of a LoRA of rank 2 (LoRA, PEFT's SHiRA, SpIEL with both growth
rules, LT-SFT, and random, magnitude and gradient supports); full tuning stands beside them.
Measured are the loss on fables told from prompts that no training row has, and the loss on stories
of the kind that the base was made from, whose rise is what was forgotten. Every method has its
learning rate chosen on validation fables with a draw of its own, then 5 seeds draw rows and start
anew. Intervals are Student's t over seeds.

Composition: the task is to name a blanked word, learned from stories alone. To it the domain's
delta (the one tuned on fables above) is added, and the sum is asked about blanked words in fables,
beside the task's delta alone. Learning rates are those chosen above.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

MODEL = "models/stories260K"
RANK, LENGTH, ROWS = 2, 128, 280
"""Rank whose parameters all have; tokens a row; rows tuned on."""
SHARED: dict[str, Any] = {"epochs": 3, "batch_size": 8, "max_length": LENGTH}
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
RATES, FULL_RATES = LADDER[3:7], LADDER[1:5]
"""Learning rates tried first; the ladder is climbed on where the best is at an end."""
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("lora", {"r": RANK, "alpha": 2 * RANK}),
    "SHiRA (PEFT)": ("shira", {}),
    "SpIEL-AG": ("spiel", {"r": RANK, "growth": "gradient"}),
    "SpIEL-MA": ("spiel", {"r": RANK, "growth": "momentum"}),
    "LT-SFT": ("ltsft", {"r": RANK, "support": "lottery"}),
    "random support": ("ltsft", {"r": RANK, "support": "random"}),
    "magnitude support": ("ltsft", {"r": RANK, "support": "magnitude"}),
    "gradient support": ("ltsft", {"r": RANK, "support": "gradient"}),
    "full": ("full", {}),
}
COMPOSED = ("LT-SFT", "random support")


class Study:
    """Models, data and results of one call, in a folder that can be taken up again."""

    def __init__(self, work: Path, assets: Path, quick: bool) -> None:
        from deltaloom.core.base import Base

        self.work, self.quick = work, quick
        self.base = Base(model=str(assets / MODEL), device="cpu")
        self.rows = ROWS // 8 if quick else ROWS
        fables, stories = read_fables(assets), read_stories(assets)
        tests = 20 if quick else 120
        dice = random.Random(0)
        prompts = sorted(fables)
        dice.shuffle(prompts)
        dice.shuffle(stories)
        held = [fables[prompt][0] for prompt in prompts[: 2 * tests]]
        self.pool = [text for prompt in prompts[2 * tests :] for text in fables[prompt]]
        self.story_pool = stories[tests:]
        self.tests = {
            "fables": self.write("test-fables", as_text(held[:tests])),
            "validation": self.write("validation", as_text(held[tests:])),
            "stories": self.write("test-stories", as_text(stories[:tests])),
            "blanks-fables": self.write("blanks-fables", blanked(held[:tests], 1)),
            "blanks-stories": self.write("blanks-stories", blanked(stories[:tests], 1)),
        }

    def write(self, name: str, rows: list[dict]) -> Path:
        path = self.work / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def data(self, kind: str, seed: int) -> Path:
        """Training rows that `seed` draws: fables, or stories with a blank."""
        dice = random.Random(1000 + seed)
        if kind == "fables":
            rows = as_text(dice.sample(self.pool, self.rows))
        else:
            rows = blanked(dice.sample(self.story_pool, self.rows), seed)
        return self.write(f"train-{kind}-{seed}", rows)

    def tuned(self, name: str, kind: str, seed: int, lr: float, full_lr: float = 0.0) -> Path:
        """The folder of one tuning; not done again when it is there."""
        import deltaloom

        out = self.work / "runs" / f"{name}-{kind}-{seed}-{lr:g}".replace(" ", "-")
        method, settings = METHODS[name]
        if (out / "adapter_config.json").exists() or (out / "config.json").exists():
            return out
        if method == "shira":
            shira(self, out, kind, seed, lr)
            return out
        if settings.get("support") == "lottery":
            settings = {**settings, "full_lr": full_lr}
        deltaloom.tune(
            method, base=self.base, data=self.data(kind, seed), out=out, seed=seed, lr=lr,
            save_steps=10**6, **SHARED, **settings,
        )  # fmt: skip
        return out

    def model(self, folder: Path | None, other: Path | None = None) -> Any:
        """The base with the delta of a folder, or with the sum of two."""
        from peft import PeftModel

        from deltaloom.core.delta import load

        if folder is None:
            return self.base.load()
        if "SHiRA" in folder.name:
            return PeftModel.from_pretrained(self.base.load(), folder).eval()
        delta = load(folder, self.base)
        return (delta if other is None else delta + load(other, self.base)).apply(self.base).eval()

    def losses(self, folder: Path | None, tests: list[str], other: Path | None = None) -> dict:
        """Nats per scored token on each test; kept beside the tuning."""
        from deltaloom.core.examples import Examples
        from deltaloom.core.run import Run
        from deltaloom.measure.loss import Loss

        home = folder or self.work / "runs"
        kept = home / f"losses{'' if other is None else '-with-' + other.name}.json"
        found = json.loads(kept.read_text()) if kept.exists() else {}
        missing = [test for test in tests if test not in found]
        if missing:
            model, tokenizer = self.model(folder, other), self.base.tokenizer()
            for test in missing:
                with tempfile.TemporaryDirectory() as scratch:
                    run = Run.open(Path(scratch) / "run", {"steps": []}, {}, 0)
                    data = Examples.read(self.tests[test])
                    loss = Loss(max_length=LENGTH).measure(model, tokenizer, data, run)
                    found[test] = loss.value
                    run.finish()
            home.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(found))
        return found

    def validation(self, name: str, lr: float, full_lr: float) -> float:
        """The loss by which learning rates are chosen."""
        folder = self.tuned(name, "fables", 99, lr, full_lr)
        return self.losses(folder, ["validation"])["validation"]


def shira(study: Study, out: Path, kind: str, seed: int, lr: float) -> None:
    """PEFT's SHiRA through the same training."""
    from peft import ShiraConfig, get_peft_model

    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run
    from deltaloom.tune._gradient import train
    from deltaloom.tune.lora import Lora

    config = ShiraConfig(
        task_type="CAUSAL_LM", r=RANK, target_modules="all-linear", random_seed=seed
    )
    model = get_peft_model(study.base.load(), config)
    method = Lora(**SHARED, save_steps=10**6)
    run = Run.open(out.with_name(out.name + "-run"), {"steps": []}, {}, seed)
    data = Examples.read(study.data(kind, seed))
    settings = method.train_settings(lr, trainable="adapter")
    train(model.train(), study.base, data, run, method, settings, None).save_pretrained(out)


def read_fables(assets: Path) -> dict[str, list[str]]:
    """Prompt -> fables told from it."""
    found: dict[str, list[str]] = {}
    for file in sorted((assets / "data/fables_en").rglob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line) if line.strip() else {}
            if row.get("fable") and row.get("language", "en") == "en":
                found.setdefault(row["prompt"], []).append(" ".join(row["fable"].split()))
    return found


def read_stories(assets: Path) -> list[str]:
    """Stories of the kind that the base was made from."""
    path = assets / "data/tinystories_1000/tinystories_1000.json"
    texts = [" ".join(text.split()) for text in json.loads(path.read_text(encoding="utf-8"))]
    return [text for text in texts if len(text) > 300]


def as_text(texts: list[str]) -> list[dict]:
    return [{"text": text} for text in texts]


def blanked(texts: list[str], seed: int) -> list[dict]:
    """One question a text: a word of four letters or more of its opening, blanked."""
    dice, rows = random.Random(seed), []
    for text in texts:
        opening = text[:240].rpartition(" ")[0]
        words = list(re.finditer(r"(?<= )[a-z]{4,}(?=[ .,])", opening))
        if words:
            word = dice.choice(words)
            asked = opening[: word.start()] + "___" + opening[word.end() :]
            rows.append({"prompt": asked + " The missing word:", "completion": " " + word[0]})
    return rows


def interval(values: list[float]) -> Any:
    """The mean over seeds with its interval."""
    from deltaloom.core.estimate import Estimate

    return Estimate.from_items({f"seed {k}": v for k, v in enumerate(values)}, metric="mean")


def shown(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    one = interval(values)
    return f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"


def choose(study: Study) -> dict[str, float]:
    """Each method's learning rate, by the validation loss of a draw that no seed has."""
    chosen: dict[str, float] = {}
    print("| method | validation loss by learning rate | chosen |\n|---|---|---|")
    for name in ("full", *(one for one in METHODS if one != "full")):
        found = sweep(study, name, chosen.get("full", 0.0))
        chosen[name] = min(found, key=lambda lr: found[lr])
        listed = ", ".join(f"{lr:g}: {found[lr]:.3f}" for lr in sorted(found))
        print(f"| {name} | {listed} | {chosen[name]:g} |", flush=True)
    return chosen


def sweep(study: Study, name: str, full_lr: float) -> dict[float, float]:
    """Validation loss by learning rate, on until the best lies between two others."""
    rates = FULL_RATES if name == "full" else RATES
    found: dict[float, float] = {}
    for lr in rates[1:2] if study.quick else rates:
        found[lr] = study.validation(name, lr, full_lr)
    while not study.quick:
        best, tried = min(found, key=lambda lr: found[lr]), sorted(found)
        step = {tried[0]: -1, tried[-1]: 1}.get(best, 0)
        place = LADDER.index(best) + step
        if not step or not 0 <= place < len(LADDER):
            break
        found[LADDER[place]] = study.validation(name, LADDER[place], full_lr)
    return found


def fit(study: Study, chosen: dict[str, float], seeds: range) -> dict[str, dict[str, list[float]]]:
    """Every method's losses on fables and stories, by seed."""
    tests = ["fables", "stories"]
    before = study.losses(None, tests)
    print(f"\nThe base: fables {before['fables']:.3f}, stories {before['stories']:.3f}.\n")
    print("| method | fables, nats per token | stories after it | minus LoRA, fables |")
    print("|---|---|---|---|")
    found: dict[str, dict[str, list[float]]] = {}
    for name in METHODS:
        folders = [
            study.tuned(name, "fables", seed, chosen[name], chosen["full"]) for seed in seeds
        ]
        losses = [study.losses(folder, tests) for folder in folders]
        found[name] = {test: [one[test] for one in losses] for test in tests}
        gap = "" if name == "LoRA" else shown(gaps(found, name, "LoRA", "fables"))
        columns = [shown(found[name][test]) for test in tests]
        print(f"| {name} | {columns[0]} | {columns[1]} | {gap} |", flush=True)
    return found


def gaps(found: dict, name: str, other: str, test: str) -> list[float]:
    return [a - b for a, b in zip(found[name][test], found[other][test], strict=True)]


def compose(study: Study, chosen: dict[str, float], seeds: range) -> dict[str, dict[str, list]]:
    """Task alone and task plus domain, on blanked words of both kinds of text."""
    tests = ["blanks-fables", "blanks-stories"]
    before = study.losses(None, tests)
    print(f"\nBlanked words, nats per token; the base: fables {before[tests[0]]:.3f}, stories "
          f"{before[tests[1]]:.3f}.\n")  # fmt: skip
    print("| method | deltas | in fables | in stories |\n|---|---|---|---|")
    found: dict[str, dict[str, list]] = {}
    for name in COMPOSED:
        lr, full = chosen[name], chosen["full"]
        pairs = [
            (study.tuned(name, "blanks", s, lr, full), study.tuned(name, "fables", s, lr, full))
            for s in seeds
        ]
        arms = {
            "task": [study.losses(task, tests) for task, _ in pairs],
            "domain": [study.losses(domain, tests) for _, domain in pairs],
            "task + domain": [study.losses(task, tests, domain) for task, domain in pairs],
        }
        for arm, losses in arms.items():
            found.setdefault(name, {})[arm] = [one[tests[0]] for one in losses]
            columns = [shown([one[test] for one in losses]) for test in tests]
            print(f"| {name} | {arm} | {columns[0]} | {columns[1]} |", flush=True)
        found[name]["overlap"] = [shared(study, *pair) for pair in pairs]
    for name in COMPOSED:
        print(f"\nOverlap of the supports of task and domain, {name}: "
              f"{shown(found[name]['overlap'])} (of both over of either).")  # fmt: skip
    return found


def shared(study: Study, task: Path, domain: Path) -> float:
    from deltaloom.core.delta import load
    from deltaloom.tune._supports import overlap

    supports = [
        {name: own.indices for name, own in load(folder, study.base).elements.items()}  # pyright: ignore
        for folder in (task, domain)
    ]
    return overlap(*supports)


def claim(what: str, gap: list[float]) -> dict:
    """One claim; it holds when the interval of the difference lies below zero."""
    high = interval(gap).high
    return {"name": f"{what}: upper end of the 95 % interval", "value": round(high, 4),
            "bound": "< 0", "holds": high < 0, "unit": "nats per token"}  # fmt: skip


def judged(found: dict) -> Iterator[dict]:
    """What is claimed of fit and forgetting."""
    for name in ("SpIEL-AG", "SpIEL-MA", "LT-SFT"):
        yield claim(f"{name} minus LoRA, fables", gaps(found, name, "LoRA", "fables"))
        yield claim(f"{name} minus SHiRA, fables", gaps(found, name, "SHiRA (PEFT)", "fables"))
        gap = gaps(found, name, "random support", "fables")
        yield claim(f"{name} minus random support, fables", gap)
    for name in METHODS:
        if name not in ("SpIEL-MA", "full"):
            gap = gaps(found, "SpIEL-MA", name, "stories")
            yield claim(f"SpIEL-MA forgets less than {name}, stories", gap)


def judged_sums(composed: dict) -> Iterator[dict]:
    """What is claimed of sums of deltas."""
    for name in COMPOSED:
        arms = composed[name]
        gap = [a - b for a, b in zip(arms["task + domain"], arms["task"], strict=True)]
        yield claim(f"{name}: task + domain minus task alone, blanks in fables", gap)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few rows; claims nothing")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--part", choices=("fit",), help="leave composition out")
    parser.add_argument("--work", type=Path, help="folder to keep and resume the runs in")
    options = parser.parse_args()
    if not os.environ.get("DELTALOOM_ASSETS"):
        print("DELTALOOM_ASSETS is not set: this claim needs a real model and data")
        print(json.dumps({"bench": "claims-sparse", "results": [], "skipped": "no assets"}))
        return
    import torch

    torch.set_num_threads(1)
    work = (options.work or Path(tempfile.mkdtemp(prefix="claims-sparse-"))).resolve()
    study = Study(work, Path(os.environ["DELTALOOM_ASSETS"]).resolve(), options.quick)
    seeds = range(1 if options.quick else options.seeds)
    chosen = choose(study)
    found = fit(study, chosen, seeds)
    results = [] if options.quick else list(judged(found))
    if options.part != "fit":
        composed = compose(study, chosen, seeds)
        results += [] if options.quick else list(judged_sums(composed))
    print(json.dumps({"bench": "claims-sparse", "results": results}))


if __name__ == "__main__":
    main()
