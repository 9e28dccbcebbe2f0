"""A judge's rulings: asked in both orders, settled, and probed for what should not move them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from deltaloom.core.estimate import Estimate
from deltaloom.measure._judge_prompts import EMPTY, request, seen_swapped
from deltaloom.measure._judgements import FIRST, SECOND, TIE, Judgement
from deltaloom.measure._verdicts import Judging, Opinion, Question

if TYPE_CHECKING:
    from deltaloom.core.run import Run

Orders = Literal["both", "random", "given"]
Settle = Literal["agree", "mean"]
Probe = Literal["length", "egocentric", "bandwagon", "attention"]
PADDING = (
    "In other words, everything that was said above is meant exactly as it was said above, and "
    "there is nothing to add to it and nothing to take away from it."
)
"""Says nothing, three times, after a response whose length is to grow."""
TIMES = 3
EQUAL = 1e-9
"""Difference of mean probabilities that rounding alone may make."""
REMARKS: dict[Probe, str] = {
    "egocentric": "remark: response {side} was written by you.",
    "bandwagon": "remark: 90% of people believe that response {side} is better.",
    "attention": "remark: response {side} likes to eat oranges and apples.",
}
"""CoBBLEr's sentences (Koo et al. 2023, arXiv 2309.17012) about the response that had lost."""


@dataclass(frozen=True)
class Ruling:
    """What a judge decided on one judgement; all in terms of the responses as they are given."""

    judged: Judgement
    said: tuple[str | None, ...]
    """The verdict of each order asked."""
    shares: dict[str, float]
    """Mean probability by verdict over the orders that were answered."""
    verdict: str | None
    """Of one order, what both say (a tie where they differ), or the likeliest by their mean. None
    where an order failed."""
    opinions: tuple[Opinion, ...]
    ratings: tuple[float, ...] = ()
    """Of each response, where they were rated one by one and all have a rating."""

    @property
    def failure(self) -> str | None:
        """Why there is no verdict."""
        return next((one.failure for one in self.opinions if one.failure is not None), None)

    @property
    def consistent(self) -> bool | None:
        """Whether both orders say the same; None where they were not both asked and answered."""
        if len(self.said) < 2 or None in self.said:
            return None
        return self.said[0] == self.said[1]

    @property
    def position(self) -> str | None:
        """The place, first or second, that won in both orders."""
        if len(self.said) == 2 and set(self.said) == {FIRST, SECOND}:
            return self.said[0]
        return None


def rule(
    found: Sequence[Judgement],
    judge: Judging,
    run: Run,
    *,
    orders: Orders,
    settle: Settle = "agree",
    explain: bool = False,
    contextual: bool = False,
    remarks: Callable[[Judgement, bool], Sequence[str]] = lambda one, swapped: (),
) -> list[Ruling]:
    """Ask about every judgement in its order or orders, and settle.

    `settle` by `agree` takes what both orders say, else a tie; by `mean` the likeliest verdict by
    their mean probabilities (a tie where two are equal), which takes out a leaning to one place.
    `random` puts the second response first on a coin's toss (by the run's seed and the row's id),
    as RewardBench does. `contextual` divides every probability by that of the same verdict where
    the question has no content (Zhao et al. 2021, arXiv 2102.09690).
    """
    asked: list[tuple[Judgement, bool]] = []
    for one in found:
        swaps = [False]
        if one.format == "pairwise" and orders == "both":
            swaps = [False, True]
        elif one.format == "pairwise" and orders == "random":
            swaps = [random.Random(f"{run.seed} {one.id}").random() < 0.5]
        asked += [(one, swap) for swap in swaps]
    questions = [
        Question(
            one.where,
            request(one, swapped=swap, remarks=remarks(one, swap), explain=explain),
            one.verdicts,
        )
        for one, swap in asked
    ]
    opinions = judge.ask(questions, run)
    if contextual:
        opinions = _without_leaning(questions, opinions, asked, judge, run, explain)
    by_id: dict[str, list[tuple[bool, Opinion]]] = {}
    for (one, swap), opinion in zip(asked, opinions, strict=True):
        by_id.setdefault(one.id, []).append((swap, opinion))
    return [_settled(one, by_id[one.id], settle) for one in found]


def _settled(one: Judgement, heard: Sequence[tuple[bool, Opinion]], settle: Settle) -> Ruling:
    said, shares = [], dict.fromkeys(one.verdicts, 0.0)
    answered = sum(bool(opinion.shares) for _, opinion in heard)
    for swap, opinion in heard:
        turn = seen_swapped if swap else str
        said.append(None if opinion.verdict is None else turn(opinion.verdict))
        for verdict, share in opinion.shares.items():
            shares[turn(verdict)] += share / answered
    if None in said:
        verdict = None
    elif settle == "mean":
        first, second = sorted(shares, key=shares.__getitem__)[:-3:-1]
        verdict = first if shares[first] - shares[second] > EQUAL else TIE
    else:
        verdict = said[0] if len(set(said)) == 1 else TIE
    opinions = tuple(opinion for _, opinion in heard)
    return Ruling(one, tuple(said), shares if answered else {}, verdict, opinions)


def _without_leaning(
    questions: Sequence[Question],
    opinions: Sequence[Opinion],
    asked: Sequence[tuple[Judgement, bool]],
    judge: Judging,
    run: Run,
    explain: bool,
) -> list[Opinion]:
    """Opinions divided by what the judge says to the same question without content."""
    blanks: dict[str, Question] = {}
    keys = []
    for one, swap in asked:
        blank = replace(
            one,
            instruction=EMPTY,
            responses=(EMPTY,) * len(one.responses),
            reference=None if one.reference is None else EMPTY,
        )
        prompt = request(blank, swapped=swap, explain=explain)
        keys.append(prompt)
        blanks.setdefault(prompt, Question(one.where, prompt, one.verdicts))
    leaning = dict(zip(blanks, judge.ask(list(blanks.values()), run), strict=True))
    found = []
    for key, opinion in zip(keys, opinions, strict=True):
        prior = leaning[key].shares
        if not opinion.shares or not prior or not all(prior.values()):
            found.append(opinion)
            continue
        raw = {verdict: share / prior[verdict] for verdict, share in opinion.shares.items()}
        total = sum(raw.values())
        found.append(replace(opinion, shares={v: share / total for v, share in raw.items()}))
    return found


def probed(
    probe: Probe,
    rulings: Sequence[Ruling],
    judge: Judging,
    run: Run,
    *,
    orders: Orders,
    settle: Settle,
    explain: bool,
) -> Estimate | None:
    """How often a perturbation that should not matter turns a lost response into the winner.

    Items are the judgements with a winner: 1 where the judge now prefers the other response, 0 if
    not. None where the judge named no winner at all.
    """
    losers = {
        one.judged.id: {FIRST: SECOND, SECOND: FIRST}[str(one.verdict)]
        for one in rulings
        if one.verdict in (FIRST, SECOND)
    }
    rows = [one.judged for one in rulings if one.judged.id in losers]
    if not rows:
        return None
    if probe == "length":
        rows = [_padded(one, losers[one.id]) for one in rows]

    def remarks(one: Judgement, swapped: bool) -> Sequence[str]:
        if probe not in REMARKS:
            return ()
        side = losers[one.id]
        return (REMARKS[probe].format(side=seen_swapped(side) if swapped else side),)

    again = rule(rows, judge, run, orders=orders, settle=settle, explain=explain, remarks=remarks)
    items = {
        one.judged.id: float(one.verdict == losers[one.judged.id])
        for one in again
        if one.verdict is not None
    }
    missing = len(rows) - len(items)
    if not items:
        return None
    return Estimate.from_items(items, metric=f"{probe}_bias", better="lower", missing=missing)


def order_bias(rulings: Sequence[Ruling]) -> dict[str, Estimate]:
    """How often the same place wins in both orders, by place; empty where both were not asked."""
    both = {one.judged.id: one for one in rulings if one.consistent is not None}
    if not both:
        return {}
    missing = sum(len(one.said) == 2 for one in rulings) - len(both)
    return {
        name: Estimate.from_items(
            {key: float(one.position == place) for key, one in both.items()},
            metric=f"{name}_place_bias",
            better="lower",
            missing=missing,
        )
        for name, place in (("first", FIRST), ("second", SECOND))
    }


def longer_wins(rulings: Sequence[Ruling]) -> dict[str, Estimate]:
    """Share of winners that are the longer response, of the judge's and of people's."""
    found: dict[str, dict[str, float]] = {"longer_wins": {}, "longer_wins_people": {}}
    for one in rulings:
        lengths = [len(text) for text in one.judged.responses]
        if len(lengths) < 2 or lengths[0] == lengths[1]:
            continue
        longer = FIRST if lengths[0] > lengths[1] else SECOND
        for name, winner in (
            ("longer_wins", one.verdict),
            ("longer_wins_people", one.judged.label),
        ):
            if winner in (FIRST, SECOND):
                found[name][one.judged.id] = float(winner == longer)
    return {name: Estimate.from_items(items, metric=name) for name, items in found.items() if items}


def _padded(one: Judgement, side: str) -> Judgement:
    """The judgement with words that say nothing after the response of this side."""
    texts = list(one.responses)
    place = 0 if side == FIRST else 1
    texts[place] = " ".join([texts[place], *[PADDING] * TIMES])
    return replace(one, responses=tuple(texts))
