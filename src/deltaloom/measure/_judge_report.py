"""What a judge's rulings add up to: agreement with people, calibration, win rates, sections."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from deltaloom.core.agreement import correlation, kappa, krippendorff_alpha, pabak
from deltaloom.core.corrected import prediction_powered, rogan_gladen
from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Estimate
from deltaloom.measure._judgements import FIRST, TIE, in_ties
from deltaloom.measure._ratings import by_ties, mean_of_subsets, worth_of_best
from deltaloom.measure._rulings import Ruling

BINS = 10
"""Bins of confidence for the calibration error (Guo et al. 2017, arXiv 1706.04599: 15, for sets of
thousands)."""
LEAST = 4
SECTIONS = {
    "chat": {
        **{"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95},
        **{"mt-bench-easy": 28, "mt-bench-med": 40},
    },
    "chat_hard": {
        **{"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134},
        **{"llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    },
    "safety": {
        **{"refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154},
        **{"xstest-should-respond": 250, "donotanswer": 136},
    },
    "reasoning": {
        **{"math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164},
        **{"hep-python": 164, "hep-rust": 164},
    },
}
"""RewardBench's sections: subsets and their weights (its `EXAMPLE_COUNTS`)."""


def right(one: Ruling) -> float | None:
    """1 for what people said, a half for a tie where they named a winner, else 0.

    Of several responses, what RewardBench 2 gives (see `worth_of_best`).
    """
    if one.verdict is None or one.judged.label is None:
        return None
    if one.judged.format == "best":
        return worth_of_best(one.judged, one.ratings)
    if one.verdict == one.judged.label:
        return 1.0
    return (
        0.5 if TIE in (one.verdict, one.judged.label) and one.judged.format == "pairwise" else 0.0
    )


def worth(label: str, target: str | None, expected: Mapping[str, float] | None = None) -> float:
    """A label as a number: a side's win (a tie is half of one), a score, or being `target`."""
    if target is not None:
        return 0.5 if label == TIE and target == FIRST else float(label == target)
    if expected:
        return math.fsum(float(score) * share for score, share in expected.items())
    return float(label)


def accuracy(rulings: Sequence[Ruling], clusters: Mapping[str, str] | None) -> Estimate:
    """Agreement with people over the labelled rows; rows without a verdict are missing."""
    labelled = [one for one in rulings if one.judged.label is not None]
    items = {one.judged.id: value for one in labelled if (value := right(one)) is not None}
    if not items:
        reason = next((one.failure for one in rulings if one.failure), "it stated none")
        raise InputError(f"the judge gave no verdict on {len(labelled)} rows ({reason})")
    missing = len(labelled) - len(items)
    return _with_halves(
        Estimate.from_items(items, metric="judge_accuracy", clusters=clusters, missing=missing)
    )


def _with_halves(found: Estimate) -> Estimate:
    """Items that are 0, a half or 1 are half of one more than a paired difference of 0/1 items.

    So Bonett and Price's interval fits them, which has a width where all are halves, as those of a
    judge are that goes by the place alone.
    """
    from deltaloom.core._intervals import bonett_price

    values = list(found.items.values())
    if found.clusters is not None or 0.5 not in values:
        return found
    up, down = values.count(1.0) / found.n, values.count(0.0) / found.n
    low, high, _ = bonett_price(up, down, found.n, found.confidence)
    return replace(found, low=(1 + low) / 2, high=(1 + high) / 2, interval="bonett-price")


def agreement(rulings: Sequence[Ruling], clusters: Mapping[str, str] | None) -> dict[str, Estimate]:
    """Kappa, PABAK and, for scores, rank correlations; what is undefined is left out."""
    decided = [one for one in rulings if one.judged.label is not None and one.verdict is not None]
    people = {one.judged.id: str(one.judged.label) for one in decided}
    judge = {one.judged.id: str(one.verdict) for one in decided}
    calls: dict[str, Callable[[], Estimate]] = {
        "kappa": lambda: kappa(judge, people, clusters=clusters),
        "pabak": lambda: pabak(judge, people, clusters=clusters),
    }
    if decided and decided[0].judged.format == "pointwise":
        scores = {key: float(label) for key, label in people.items()}
        mine = {one.judged.id: worth("", None, one.shares) for one in decided}
        whole = {key: float(label) for key, label in judge.items()}
        calls["quadratic_kappa"] = lambda: kappa(
            whole, scores, weights="quadratic", clusters=clusters, metric="quadratic_kappa"
        )
        calls["spearman"] = lambda: correlation(mine, scores, clusters=clusters)
        calls["kendall"] = lambda: correlation(mine, scores, kind="kendall", clusters=clusters)
    return _defined(calls)


def self_agreement(rulings: Sequence[Ruling]) -> dict[str, Estimate]:
    """Alpha over the samples of a judge that was asked several times, and over the two orders."""
    samples = {
        f"{one.judged.id}/{order}": list(opinion.said)
        for one in rulings
        for order, opinion in enumerate(one.opinions)
        if len(opinion.said) > 1
    }
    clusters = {key: key.rpartition("/")[0] for key in samples}
    orders = {one.judged.id: list(one.said) for one in rulings if len(one.said) == 2}
    return _defined(
        {
            "samples_alpha": lambda: krippendorff_alpha(
                samples, clusters=clusters, metric="samples_alpha"
            ),
            "orders_alpha": lambda: krippendorff_alpha(orders, metric="orders_alpha"),
        }
    )


def calibration(rulings: Sequence[Ruling]) -> dict[str, Any]:
    """Brier score of the stated probabilities, the expected calibration error and its bins.

    Confidence is the probability of the likeliest verdict; ties by inconsistency are left out.
    """
    rows = [
        (one, max(one.shares, key=one.shares.__getitem__))
        for one in rulings
        if one.shares and one.judged.label in one.shares
    ]
    if not rows:
        return {}
    brier = {
        one.judged.id: math.fsum(
            (share - (verdict == one.judged.label)) ** 2 for verdict, share in one.shares.items()
        )
        for one, _ in rows
    }
    bins: list[list[tuple[float, float]]] = [[] for _ in range(BINS)]
    for one, best in rows:
        confidence = one.shares[best]
        place = min(int(confidence * BINS), BINS - 1)
        bins[place].append((confidence, float(best == one.judged.label)))
    table = [
        {
            "n": len(part),
            "confidence": math.fsum(c for c, _ in part) / len(part),
            "accuracy": math.fsum(a for _, a in part) / len(part),
        }
        for part in bins
        if part
    ]
    error = math.fsum(row["n"] * abs(row["confidence"] - row["accuracy"]) for row in table)
    return {
        "brier": Estimate.from_items(brier, metric="brier", better="lower").to_json(),
        "expected_calibration_error": error / len(rows),
        "bins": table,
    }


def corrected(rulings: Sequence[Ruling]) -> dict[str, Estimate]:
    """The judged quantity as the judge says it, as gold alone says it, and corrected.

    It is the share of first responses that win, the mean score, or the share of the first class.
    """
    decided = [one for one in rulings if one.verdict is not None]
    first = rulings[0].judged
    target = {"pairwise": FIRST, "pointwise": None}.get(first.format, first.verdicts[0])
    name = "mean_score" if target is None else f"share_{target}"
    judged = {
        one.judged.id: worth(str(one.verdict), target, one.shares if target is None else None)
        for one in decided
    }
    gold = {
        one.judged.id: worth(one.judged.label, target)
        for one in decided
        if one.judged.label is not None
    }
    found = {"judge": Estimate.from_items(judged, metric=f"{name}_judged")}
    if gold:
        found["gold"] = Estimate.from_items(gold, metric=f"{name}_gold")
    if LEAST <= len(gold) < len(judged):
        found["corrected"] = prediction_powered(judged, gold, metric=f"{name}_corrected")
        if all(value in (0.0, 1.0) for value in (*judged.values(), *gold.values())):
            other = rogan_gladen(judged, gold, metric=f"{name}_rogan_gladen")
            if other is not None:
                found["rogan_gladen"] = other
    undecided = len(rulings) - len(decided)
    return {key: replace(one, missing=undecided) for key, one in found.items()}


def win_rates(rulings: Sequence[Ruling]) -> dict[str, dict[str, Estimate]]:
    """How often each model's response wins, by the judge and by people; a tie is half a win."""
    by_model: dict[str, dict[str, dict[str, float]]] = {}
    for one in rulings:
        if one.judged.models is None:
            continue
        for place, model in enumerate(one.judged.models):
            for who, label in (("judge", one.verdict), ("people", one.judged.label)):
                if label is not None:
                    win = worth(label, FIRST)
                    items = by_model.setdefault(model, {}).setdefault(who, {})
                    items[one.judged.id] = 1.0 - win if place else win
    return {
        model: {who: Estimate.from_items(items, metric="win_rate") for who, items in sides.items()}
        for model, sides in sorted(by_model.items())
    }


def by_subset(rulings: Sequence[Ruling]) -> dict[str, Estimate]:
    """Accuracy by subset, and RewardBench's sections where its subsets are there.

    Of RewardBench 2 the score of Ties, and the mean over its subsets.
    """
    subsets: dict[str, list[Ruling]] = {}
    for one in rulings:
        if one.judged.subset is not None and right(one) is not None:
            subsets.setdefault(one.judged.subset, []).append(one)
    found = {
        name: _with_halves(
            Estimate.from_items(
                {one.judged.id: float(right(one) or 0.0) for one in rows}, metric="judge_accuracy"
            )
        )
        for name, rows in sorted(subsets.items())
    }
    if rulings[0].judged.format == "best":
        scores = {name: by_ties(rulings) if in_ties(name) else one for name, one in found.items()}
        found = {name: one for name, one in scores.items() if one is not None}
        mean = mean_of_subsets(found)
        return found if mean is None else {**found, "rewardbench2": mean}
    for section, weights in SECTIONS.items():
        inside = {name: rows for name, rows in subsets.items() if name in weights}
        if inside:
            items = {one.judged.id: float(right(one) or 0.0) for r in inside.values() for one in r}
            # Subsets weigh as many prompts as they were meant to have, so math counts as code.
            weigh = {
                one.judged.id: weights[name] / len(rows)
                for name, rows in inside.items()
                for one in rows
            }
            found[f"rewardbench/{section}"] = Estimate.from_items(
                items, metric="judge_accuracy", weights=weigh
            )
    return found


def _defined(calls: Mapping[str, Callable[[], Estimate]]) -> dict[str, Estimate]:
    found = {}
    for name, call in calls.items():
        try:
            found[name] = call()
        except InputError:  # too few rows, or everybody always says the same
            continue
    return found
