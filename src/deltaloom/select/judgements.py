"""Judgement data sets as one mixture that a judge is tuned on.

Paper: Vu et al. 2024, "Foundational Autoraters: Taming Large Language Models for Better Automatic
Evaluation" (FLAMe, arXiv 2407.10817), sections 3.2 and 4.1: every task as text to text, mixed in
proportion to its examples, with at most 2^16 of each task.

Formula: task s of n_s judgements gets `rows * min(n_s, cap) / sum_t min(n_t, cap)` of them (largest
remainders, never more than it has), drawn by the seed; its prompt is the one `measure judge` asks
and its completion `verdict: V`. Pairwise judgements are written in both orders, so that the place
of a response says nothing. A task is a row's `source`.

Differs: FLAMe writes explanations where a data set has them; here there is the verdict alone, as
`measure judge` scores it by likelihood.

Not covered: weights per task other than by size (write files of the sizes you want).
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Annotated, Literal, final

from pydantic import Field

from deltaloom.core.base import Base
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Example, Examples
from deltaloom.core.method import Selection, Selector, Sizes, Work
from deltaloom.core.run import Run
from deltaloom.measure._judge_prompts import FIELD, reply, request, seen_swapped
from deltaloom.measure._judgements import Judgement, columns, read_judgement, with_seen


@final
class Judgements(Selector):
    """A mixture of judgement data sets in text-to-text form."""

    classifiers = True

    rows: Annotated[int, Field(ge=1)] | None = None
    """Judgements to keep; None keeps all that the cap leaves (FLAMe trains on a stream)."""
    cap: Annotated[int, Field(ge=1)] = 65_536
    """Judgements that a task counts for at most (FLAMe: 2^16)."""
    orders: Literal["both", "random", "given"] = "both"
    """Orders in which two responses are written: both (ours; FLAMe does not say), one at random, or
    as they are given."""
    ties: bool = False
    """Whether the prompts of pairwise judgements allow a tie; must be as in `measure judge`."""
    labels: list[str] = []
    """Verdicts of pointwise and classification rows; those that occur in a task when empty."""
    form: Literal["auto", "prompt", "messages", "classes"] = "auto"
    """prompt and completion; messages, for bases with a chat template; or the bare verdict as
    completion, for a sequence classifier whose `labels` are the verdicts. auto is what `base` is
    asked in when it is judged, and prompt where no base is given."""

    def work(self, sizes: Sizes) -> Work:
        """No model is run."""
        return Work()

    def keeps(self, sizes: Sizes) -> int:
        """Each judgement in its orders."""
        kept = min(self.rows or sizes.rows, sizes.rows)
        return kept * (2 if self.orders == "both" else 1)

    def select(
        self, pool: Examples, run: Run, *, target: Examples | None, base: Base | None
    ) -> Selection:
        """Rows to tune on, task by task.

        Tasks of rows with a prompt and a completion about which nobody has said anything are kept
        as they are, so that instructions may be mixed in. Raises InputError naming file and line
        for a judgement without a label.
        """
        form = _form(self.form, base)
        tasks: dict[str, list[tuple[Example, Judgement]]] = {}
        for example in pool:
            one = read_judgement(example, self.labels, self.ties)
            tasks.setdefault(example.source, []).append((example, one))
        sizes = {name: min(len(found), self.cap) for name, found in tasks.items()}
        shares = _shares(sizes, self.rows)
        chosen: list[Example] = []
        for name, found in tasks.items():
            rng = random.Random(f"{run.seed} {name}")
            picked = sorted(rng.sample(range(len(found)), shares[name]))
            if all(_is_plain(example, one) for example, one in found):
                chosen += [found[i][0] for i in picked]
                continue
            judged = with_seen([one for _, one in found])
            for i in picked:
                chosen += self._written(judged[i], name, rng, form)
        run.note(judgements={name: shares[name] for name in sorted(shares)})
        return Selection(Examples(chosen, "judgements"))

    def _written(self, one: Judgement, source: str, rng: random.Random, form: str) -> list[Example]:
        """The rows of one judgement."""
        if one.format == "best":
            raise InputError(
                f"{one.where}: several responses are for measuring; give each as a row with its "
                "'score', or pairs"
            )
        if one.label is None:
            raise InputError(f"{one.where}: has no label ({columns(one.format)}); add it")
        if one.verdicts and one.label not in one.verdicts:
            if one.label == "tie":
                return []  # people saw no difference, and the judge may not say so
            raise InputError(
                f"{one.where}: label {one.label!r} is none of the verdicts "
                f"({', '.join(one.verdicts)}); set labels="
            )
        swaps = [False]
        if one.format == "pairwise" and self.orders != "given":
            swaps = [False, True] if self.orders == "both" else [rng.random() < 0.5]
        field = "critique" if one.format == "critique" else FIELD
        rows = []
        for swap in swaps:
            label = seen_swapped(one.label) if swap else one.label
            answer = label if form == "classes" else reply(label, field)
            row = Example(
                id=f"{one.id}-{'ba' if swap else 'ab'}" if one.format == "pairwise" else one.id,
                source=source,
                where=one.where,
                prompt=request(one, swapped=swap),
                completion=answer,
                cluster=one.id,
            )
            if form == "messages":
                turns = (
                    {"role": "user", "content": str(row.prompt)},
                    {"role": "assistant", "content": answer},
                )
                row = replace(row, messages=turns, prompt=None, completion=None)
            rows.append(row)
        return rows


def _form(form: str, base: Base | None) -> str:
    """How `measure judge` asks this base."""
    if form != "auto":
        return form
    if base is None:
        return "prompt"
    if base.labels:
        return "classes"
    return "messages" if base.tokenizer().chat_template else "prompt"


def _is_plain(example: Example, one: Judgement) -> bool:
    """Whether a row is an instruction with its answer, or a text, and no judgement."""
    learned = one.format == "pointwise" and example.response is not None
    return one.label is None and (learned or example.text is not None)


def _shares(sizes: dict[str, int], rows: int | None) -> dict[str, int]:
    """Judgements of each task: in proportion to its size, by largest remainders."""
    total = sum(sizes.values())
    if rows is None or rows >= total:
        return sizes
    exact = {name: rows * size / total for name, size in sizes.items()}
    shares = {name: int(value) for name, value in exact.items()}
    left = sorted(exact, key=lambda name: (shares[name] - exact[name], name))
    for name in left[: rows - sum(shares.values())]:
        shares[name] += 1
    return shares
