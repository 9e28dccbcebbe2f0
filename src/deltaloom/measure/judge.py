"""A model as a judge: how well it agrees with people, what moves it, and scores corrected for it.

Paper: Vu et al. 2024, "Foundational Autoraters: Taming Large Language Models for Better Automatic
Evaluation" (FLAMe, arXiv 2407.10817), its text-to-text form and task types; the bias probes are
CoBBLEr's (Koo et al. 2023, arXiv 2309.17012); position is swapped as in MT-Bench (Zheng et al.
2023, arXiv 2306.05685); the best of several responses is RewardBench 2's (Malik et al. 2025, arXiv
2506.01937, see `_ratings.py`); corrected scores are prediction-powered (Angelopoulos et al. 2023,
arXiv 2301.09633, see `core/corrected.py`).

Formula: by likelihood the verdict is `argmax_v log p("verdict: v" | prompt)`, with probabilities
the softmax over the verdicts v. A pairwise row is asked in both orders; by likelihood the two
probabilities are averaged, a written verdict must be the same in both, else it is a tie. An item is
1 where the verdict is people's, a half where one of the two is a tie, 0 otherwise; a row without a
verdict is counted in `missing`, never as 0. A sequence classifier whose `labels` are the verdicts
(`[A,B]`) is a judge too. Several responses, and two with `shown: apart`, are rated one by one, and
the highest mean rating `sum_v v p(v)` wins. Critiques are written, and an item is the F1 of
their words with people's critique (SQuAD's).

`unlabelled: correct` takes files of which only some rows, drawn at random, have a label: all are
judged, and the value is the share of first responses that win (the mean score, the share of the
first class) corrected for the judge's errors.

`judge.json` in the run's folder holds, each with its interval: agreement (kappa, PABAK, rank
correlations), accuracy by subset with RewardBench's sections, order bias and the other probes,
self-consistency, calibration, win rates by model, and the judged, gold and corrected scores.
`verdicts.jsonl` holds every row with what was said.

Differs: FLAMe decodes at temperature 0 and reads the answer (here `verdict: generated`); likelihood
is the default, as it needs no parsing. CoBBLEr compares a judge's own writing with others'; here
every probe perturbs the response that had lost and counts how often it wins then.

Not covered: RewardBench 2's prompt that shows four responses at once; models with one raw output;
names of models as a bias (compassion fade).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, final

from pydantic import Field, model_validator

from deltaloom.core.atomic import write_json, write_text
from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Estimate
from deltaloom.core.examples import Examples
from deltaloom.core.method import Measurer, Sizes, Work
from deltaloom.core.places import PLACE
from deltaloom.core.run import Run
from deltaloom.engine.chat import BaseChat, Chat, Kept, Speaker, open_chat
from deltaloom.engine.endpoint import Endpoint
from deltaloom.measure import _judge_report as reports
from deltaloom.measure._classes import classes_of
from deltaloom.measure._items import length_limit, note, require_rows
from deltaloom.measure._judge_prompts import critique_in
from deltaloom.measure._judgements import Judgement, is_number, judgements
from deltaloom.measure._ratings import SCALE, rate
from deltaloom.measure._rulings import (
    Orders,
    Probe,
    Ruling,
    Settle,
    longer_wins,
    order_bias,
    probed,
    rule,
)
from deltaloom.measure._verdicts import Classes, FirstToken, Judging, Likelihood, Written
from deltaloom.measure.answer import normalised

COSTS = ("forward_tokens", "flops", "endpoint_calls", "endpoint_tokens_in", "endpoint_tokens_out")


@final
class Judge(Measurer):
    """Agreement of a judging model with people."""

    classifiers = True

    judge: Annotated[Speaker | None, PLACE] = None
    """Who judges: `http://host/v1#model`, or a base; None is the measured base itself."""
    verdict: Literal["likelihood", "generated"] = "likelihood"
    """Whether the verdict is the likeliest one or is read from what the judge writes. An endpoint's
    likelihood is that of the first token, where it tells it."""
    orders: Orders = "both"
    """Orders in which two responses are shown: both (MT-Bench), one at random (RewardBench), or as
    they are given."""
    shown: Literal["auto", "together", "apart"] = "auto"
    """Whether two responses are in one prompt, or each is rated by itself and the higher mean
    rating wins. auto is apart for sequence classifiers whose labels are numbers, as reward models
    are; more than two are always rated apart (RewardBench 2)."""
    settle: Literal["auto", "agree", "mean"] = "auto"
    """What two orders come to: the verdict that both say, else a tie (MT-Bench), or the likeliest
    after averaging their probabilities (as AlpacaEval weighs preferences by likelihood). auto is
    mean by likelihood and agree for written verdicts."""
    ties: bool = False
    """Whether a judge of two responses may say tie (MT-Bench's C)."""
    labels: list[str] = []
    """Verdicts of pointwise and classification rows, like [1,2,3,4,5]; those that occur as labels
    when empty. Of responses rated apart, the ratings: a classifier's own when empty, else 1 to 10
    (RewardBench 2)."""
    unlabelled: Literal["refuse", "correct"] = "refuse"
    """What to do with rows that have no label: refuse the file, or judge them too and correct the
    score by the rows that have one."""
    contextual: bool = False
    """Whether to divide each probability by that of the same verdict without content, which takes
    out what a judge prefers whatever it reads (Zhao et al. 2021)."""
    probes: list[Probe] = []
    """Biases to probe beside the order, each for as much again as the judging itself: length,
    egocentric, bandwagon, attention."""
    explain: bool = False
    """Whether a judge that writes is asked for a reason before its verdict."""
    samples: Annotated[int, Field(ge=1)] = 1
    """Answers written for each question; the verdict is the majority's (self-consistency, Wang et
    al. 2022, arXiv 2203.11171)."""
    temperature: Annotated[float | None, Field(ge=0)] = None
    """Temperature of written answers; None is 0 (FLAMe), and 0.7 for several samples (Wang et
    al.)."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Tokens written at most (FLAMe: 1,024)."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens of prompt and verdict at most, when scored by likelihood; the prompt is cut from the
    left. None (ours) is the model's context."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.verdict == "likelihood" and (self.samples > 1 or self.explain):
            raise ValueError("'samples' and 'explain' need verdict: generated")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("'samples' at temperature 0 are all the same")
        if len(set(self.labels)) != len(self.labels) or len(self.labels) == 1:
            raise ValueError("'labels' must be two or more different verdicts")
        return self

    @property
    def subject(self) -> str | None:
        """The judge's name, when it is not the base."""
        if self.judge is None:
            return None
        return self.judge.model if isinstance(self.judge, Endpoint) else Path(self.judge.model).name

    @property
    def _settle(self) -> Settle:
        if self.settle == "auto":
            return "mean" if self.verdict == "likelihood" else "agree"
        return self.settle

    def work(self, sizes: Sizes) -> Work:
        """Every row in its orders, with each verdict or what is written, and once more a probe."""
        # Two responses apart are two prompts, as in both orders; of more nothing is known here.
        times = (2 if self.orders == "both" else 1) * (1 + len(self.probes))
        each = sizes.row_tokens + (0 if self.verdict == "likelihood" else self.max_new_tokens)
        tokens = 0.0 if isinstance(self.judge, Endpoint) else sizes.rows * times * each
        return Work(forward_tokens=tokens, memory_bytes=sizes.weight_bytes)

    def measure(self, model: Any, tokenizer: Any, data: Examples, run: Run) -> Estimate:
        """Judge every row of `data`; items are 1 (as people said), 0 or a half.

        Raises InputError for rows that are no judgements, for a file in which labels are missing,
        and where the judge gave no verdict at all.
        """
        require_rows(data, "judge")
        found = judgements(data, self.labels, self.ties, self.unlabelled == "correct")
        judge = self._asked(model, tokenizer, found[0], run)
        before = dict(run.record["cost"])
        rulings = self._rulings(found, judge, run)
        if found[0].format == "critique":
            estimate, report = _critiques(rulings), {}
        else:
            estimate, report = self._summary(rulings, judge, run)
        _keep(run, rulings)
        write_json(run.folder / "judge.json", report)
        note(run, failed_rows=sum(one.verdict is None for one in rulings), truncated_rows=judge.cut)
        spent = {key: run.record["cost"].get(key, 0.0) - before.get(key, 0.0) for key in COSTS}
        return replace(estimate, cost={key: value for key, value in spent.items() if value})

    def _rulings(self, found: Sequence[Judgement], judge: Judging, run: Run) -> list[Ruling]:
        """Every judgement ruled on, its responses shown together or apart."""
        contextual = self.contextual and self.verdict == "likelihood"
        scale = self._scale(found[0], judge)
        if scale:
            return rate(found, judge, run, scale, explain=self.explain, contextual=contextual)
        return rule(
            found,
            judge,
            run,
            orders=self.orders,
            settle=self._settle,
            explain=self.explain,
            contextual=contextual,
        )

    def _scale(self, first: Judgement, judge: Judging) -> Sequence[str]:
        """The ratings of responses that are shown apart; empty where they are not."""
        if first.format not in ("pairwise", "best") or self.shown == "together":
            if first.format == "best":
                raise InputError(
                    f"{first.where}: several responses are rated one by one: leave out "
                    "shown=together"
                )
            return ()
        own = judge.labels if isinstance(judge, Classes) else []
        rates = bool(own) and all(map(is_number, own))
        if first.format == "pairwise" and self.shown == "auto" and not rates:
            return ()
        scale = self.labels or own or SCALE
        word = next((label for label in scale if not is_number(label)), None)
        if word is not None:
            raise InputError(f"label {word!r}: responses are rated by numbers; set labels=")
        if self.probes:
            raise InputError(
                "'probes' turn a response shown beside another: leave them out, or set "
                "shown=together for pairs"
            )
        if self.unlabelled == "correct" and first.format == "best":
            raise InputError(
                f"{first.where}: best-of-n rows are labelled by their columns: leave out "
                "unlabelled=correct"
            )
        return scale

    def _asked(self, model: Any, tokenizer: Any, first: Judgement, run: Run) -> Judging:
        """Whoever is asked, and how."""
        written = self.verdict == "generated" or first.format == "critique"
        if isinstance(self.judge, Endpoint):
            chat = open_chat(self.judge, run.work / f"{run.folder.name}-calls.jsonl")
            return self._writing(chat, again=True) if written else FirstToken(chat)
        if self.judge is not None:
            self.judge.check()
            model, tokenizer = self.judge.load(), self.judge.tokenizer()
        labels = classes_of(model)
        if labels is not None:
            if written:
                raise InputError("a sequence classifier writes nothing: set verdict=likelihood")
            return Classes(model, tokenizer, labels, length_limit(self.max_length, model))
        if not written:
            return Likelihood(model, tokenizer, length_limit(self.max_length, model))
        own = BaseChat(model, tokenizer, str(run.folder.name))
        return self._writing(Kept(own, run.work / f"{run.folder.name}-calls.jsonl"))

    def _writing(self, chat: Chat, again: bool = False) -> Written:
        temperature = self.temperature
        if temperature is None:
            temperature = 0.0 if self.samples == 1 else 0.7
        again = again or temperature > 0
        return Written(chat, self.samples, temperature, self.max_new_tokens, again)

    def _summary(
        self, rulings: Sequence[Ruling], judge: Judging, run: Run
    ) -> tuple[Estimate, dict[str, Any]]:
        """The value, and everything in `judge.json`."""
        clusters = clusters_of_rulings(rulings)
        if all(one.verdict is None for one in rulings):
            reason = next((one.failure for one in rulings if one.failure), "it stated none")
            raise InputError(f"the judge gave no verdict on any of {len(rulings)} rows ({reason})")
        best = rulings[0].judged.format == "best"  # of which every label is "right"
        scores = {} if best else reports.corrected(rulings)
        biases = order_bias(rulings)
        for probe in self.probes if rulings[0].judged.format == "pairwise" else ():
            found = probed(
                probe,
                rulings,
                judge,
                run,
                orders=self.orders,
                settle=self._settle,
                explain=self.explain,
            )
            if found is not None:
                biases[probe] = found
        report: dict[str, Any] = {
            "format": rulings[0].judged.format,
            "verdicts": dict(Counter(one.verdict for one in rulings if one.verdict is not None)),
            "failures": dict(Counter(one.failure for one in rulings if one.failure)),
            "agreement": {} if best else _plain(reports.agreement(rulings, clusters)),
            "self_agreement": _plain(reports.self_agreement(rulings)),
            "subsets": _plain(reports.by_subset(rulings)),
            "biases": _plain(biases | longer_wins(rulings)),
            "calibration": reports.calibration(rulings),
            "win_rates": {m: _plain(w) for m, w in reports.win_rates(rulings).items()},
            "scores": _plain(scores),
        }
        if self.unlabelled == "correct":
            if "corrected" not in scores:
                raise InputError(
                    f"unlabelled=correct: {scores['gold'].n if 'gold' in scores else 0} of "
                    f"{scores['judge'].n} judged rows have a label; label {reports.LEAST} or more "
                    "of them, drawn at random, and not all"
                )
            return scores["corrected"], report
        estimate = reports.accuracy(rulings, clusters)
        report["agreement"] = {"accuracy": estimate.to_json(), **report["agreement"]}
        return estimate, report


def clusters_of_rulings(rulings: Sequence[Ruling]) -> dict[str, str] | None:
    """Clusters of the rows, when they say something (see `clusters_of`)."""
    found = {one.judged.id: one.judged.cluster for one in rulings if one.judged.cluster is not None}
    return found if len(found) == len(rulings) and 1 < len({*found.values()}) < len(found) else None


def _critiques(rulings: Sequence[Ruling]) -> Estimate:
    """F1 of the critique's words with people's, over the rows that have one."""
    items, missing = {}, 0
    for one in rulings:
        text = one.opinions[0].texts[:1]
        if one.judged.label is None:
            continue
        if text:
            items[one.judged.id] = _overlap(critique_in(text[0]), one.judged.label)
        else:
            missing += 1
    if not items:
        raise InputError("the judge wrote no critique of a row that has one to compare it with")
    return Estimate.from_items(items, metric="critique_f1", missing=missing)


def _overlap(a: str, b: str) -> float:
    """SQuAD's F1 of two texts' words."""
    ours, theirs = Counter(normalised(a).split()), Counter(normalised(b).split())
    common = sum((ours & theirs).values())
    return 2 * common / (ours.total() + theirs.total()) if common else 0.0


def _keep(run: Run, rulings: Sequence[Ruling]) -> None:
    lines = []
    for one in rulings:
        row = {
            "id": one.judged.id,
            "subset": one.judged.subset,
            "instruction": one.judged.instruction,
            "responses": list(one.judged.responses),
            "label": one.judged.label,
            "verdict": one.verdict,
            "orders": list(one.said),
            "shares": {verdict: round(share, 6) for verdict, share in one.shares.items()},
            "ratings": [round(rating, 6) for rating in one.ratings],
            "texts": [text for opinion in one.opinions for text in opinion.texts],
            "failure": one.failure,
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(run.folder / "verdicts.jsonl", "".join(lines))


def _plain(found: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: one.to_json() for name, one in found.items()}
