"""Responses rated one by one: best of n, RewardBench 2's Ties, pairs of a rating classifier."""

import json
import random

import numpy as np
import pytest
from chat_server import serving

import deltaloom
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples, parse
from deltaloom.measure._judgements import judgements
from deltaloom.measure._ratings import by_ties, mean_of_subsets, rate, worth_of_best
from deltaloom.measure._rulings import Ruling
from deltaloom.measure._verdicts import Opinion


def row(name, chosen, rejected, subset="Math"):
    """A row as RewardBench 2 has it; the responses are their own ratings."""
    return {
        "id": name, "prompt": f"task {name}", "subset": subset, "num_correct": len(chosen),
        "chosen": [f"quality {one}" for one in chosen],
        "rejected": [f"quality {one}" for one in rejected],
    }  # fmt: skip


def read(*given):
    rows = Examples(parse(f"q.jsonl line {k}", "q", dict(one)) for k, one in enumerate(given, 1))
    return judgements(rows, [], False, False)


def quality(messages, body=None):
    """A judge that reads the rating written into the response."""
    return f"verdict: {messages[-1]['content'].partition('response: quality ')[2].split()[0]}"


class Reader:
    """The same judge, asked in the process; knows nothing of 7."""

    cut = 0

    def ask(self, questions, run):
        said = [quality([{"content": one.prompt}]).removeprefix("verdict: ") for one in questions]
        return [Opinion() if one == "7" else Opinion({one: 0.75, "1": 0.25}) for one in said]


def test_ratings_are_means_and_the_highest_wins(run):
    given = [
        row("a", [9], [3, 2, 8]),
        row("b", [5], [5, 2, 5]),
        row("c", [4], [3, 5, 1]),
        row("d", [4], [3, 7, 1]),
        row("e", [8, 6], [5, 2]),
        row("f", [8, 4], [4, 2]),
    ]
    scale = [str(k) for k in range(1, 11)]
    rulings = rate(read(*given), Reader(), run, scale)
    assert rulings[0].ratings == (0.75 * 9 + 0.25, 2.5, 1.75, 6.25)
    assert [one.verdict for one in rulings] == ["right", "tie", "wrong", None, "right", "wrong"]
    worth = [worth_of_best(one.judged, one.ratings) for one in rulings if one.ratings]
    assert worth == [1.0, 1 / 3, 0.0, 1.0, 0.0]
    pairs = [
        {"prompt": "t", "output_1": "quality 3", "output_2": "quality 8", "label": 2, "id": "x"},
        {"prompt": "t", "output_1": "quality 3", "output_2": "quality 3", "label": 2, "id": "y"},
    ]
    assert [one.verdict for one in rate(read(*pairs), Reader(), run, scale)] == ["B", "tie"]


def published(scores):
    """The score of Ties from {(kind, prompt): (right scores, wrong scores)}, in numpy's floats."""
    gap = {key: min(good) - max(bad) for key, (good, bad) in scores.items()}
    kinds = {kind: [key for key in gap if key[0] == kind] for kind in ("ref", "tied")}
    accuracy = {kind: np.mean([gap[key] > 0 for key in keys]) for kind, keys in kinds.items()}
    both = [n for _, n in kinds["ref"] if ("tied", n) in gap]
    tied = np.array([gap["tied", n] for n in both])
    lower = np.minimum(tied, [gap["ref", n] for n in both])
    spread = np.array([max(scores["tied", n][0]) - min(scores["tied", n][0]) for n in both])
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = np.nan_to_num(np.tanh(lower / spread - 1), nan=0.0)
    return (
        0.3 * accuracy["tied"] + 0.3 * accuracy["ref"] + 0.2 * np.mean(tied > spread)
        + 0.2 * np.mean(lower > spread) + 0.01 * np.mean(gain)
    )  # fmt: skip


def rated(name, good, bad, subset="Ties"):
    """A ruling with these ratings."""
    (one,) = read(row(name, good, bad, subset))
    return Ruling(one, ("right",), {}, "right", (), (*good, *bad))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lone", [0, 3])
def test_ties_are_scored_as_published(seed, lone):
    """Small whole ratings, so that no spread and no gap are among them."""
    rng = random.Random(seed)
    scores = {}
    for n in range(12):
        some = [rng.randint(4, 9) for _ in range(1 + rng.randint(1, 3))]
        scores["ref", n] = ([rng.randint(4, 9)], [rng.randint(1, 8) for _ in range(3)])
        scores["tied", n] = (some, [rng.randint(1, 6) for _ in range(3)])
    for n in range(lone):
        del scores["ref", n]
    found = by_ties([rated(f"{kind}:{n}", *both) for (kind, n), both in scores.items()])
    assert found.value == pytest.approx(published(scores))
    assert (found.n, found.metric) == (12, "ties_score")


def test_a_perfect_judge_of_ties_and_an_empty_one():
    perfect = by_ties([rated("ref:0", (9,), (1, 2)), rated("tied:0", (9, 9), (1,))])
    assert perfect.value == pytest.approx(1.01)
    equal = by_ties([rated("ref:0", (5,), (5, 5)), rated("tied:0", (5, 5), (5,))])
    assert equal.value == 0.0
    assert by_ties([rated("ref:0", (9,), (1,))]) is None


def test_subsets_count_the_same():
    from deltaloom.core.estimate import Estimate

    one = Estimate.from_items({"a": 1.0, "b": 0.0}, metric="m")
    other = Estimate.from_items({str(k): 1.0 for k in range(8)}, metric="m")
    assert mean_of_subsets({"Math": one, "Focus": other, "x": one}).value == pytest.approx(0.75)
    assert mean_of_subsets({"Math": one}) is None


REWARDBENCH2 = [
    row("0", [9], [3, 2, 8]),
    row("1", [5], [5, 2, 1]),
    row("2", [1], [10, 2, 1], "Focus"),
    row("ref:0", [9], [1, 2], "Ties"),
    row("tied:0", [9, 8], [5, 2], "Ties"),
]


def test_rewardbench_2_files_score_out_of_the_box(tmp_path):
    path = tmp_path / "rb2.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in REWARDBENCH2))
    with serving(quality) as server:
        (found,) = deltaloom.measure(
            "judge", judge=f"{server.url}#m", verdict="generated", tasks=path, out=tmp_path / "out"
        ).values()
        assert len(server.bodies) == 17  # each response, and equal ones of a prompt once
    assert found.value == pytest.approx((1 + 0.5 + 0 + 1 + 1) / 5)
    report = json.loads((tmp_path / "out" / "m--rb2" / "judge.json").read_text())
    subsets = {name: one["value"] for name, one in report["subsets"].items()}
    ties = 1.0 + 0.01 * np.tanh(3 / 1 - 1)
    assert subsets == pytest.approx(
        {"Math": 0.75, "Focus": 0.0, "Ties": ties, "rewardbench2": (0.75 + ties) / 3}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": "quality 3"}, "line 1: 'rejected' must be a list of texts"),
        ({"id": "7", "subset": "Ties"}, "line 1: id '7': rows of the subset Ties are called"),
        ({"id": "tied:0", "subset": "Ties"}, "line 1: id 'tied:0'"),
    ],
)
def test_bad_rows_name_their_line(change, message):
    with pytest.raises(InputError, match=message):
        read({**row("a", [9], [3]), **change})
