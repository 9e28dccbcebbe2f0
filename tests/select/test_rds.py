"""RDS+ against the formula in float64, one row at a time, and the authors' round robin."""

import json
import os

import numpy as np
import pytest
import tiny
import torch

from deltaloom.core.base import Base
from deltaloom.core.encoding import encode
from deltaloom.core.examples import Examples
from deltaloom.core.features import Features
from deltaloom.select.rds import Rds


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rds")
    base = Base(model=str(tiny.base_in(folder / "base")))
    pool = Examples.read(tiny.rows_in(folder / "pool.jsonl", 30))
    rows = [
        {"prompt": f"who likes {who} ? ", "completion": answer}
        for who, answer in [("tom", "anna . anna ."), ("lily", "no"), ("oslo", "yes yes yes")]
    ]
    path = folder / "target.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return base, pool, Examples.read(path)


def cosines(base, pool, target, limit=64):
    model, tokenizer = base.load().double(), base.tokenizer()

    def embedded(data):
        found = []
        for row in encode(data, tokenizer, limit):
            with torch.no_grad():
                out = model(torch.tensor([row.input_ids]), output_hidden_states=True)
            states = out.hidden_states[-1][0]
            total = sum(i * state for i, state in enumerate(states, 1))
            found.append(total / (len(states) * (len(states) + 1) / 2))
        return found

    goal = embedded(target)
    return np.array(
        [[torch.cosine_similarity(a, b, dim=0).item() for b in goal] for a in embedded(pool)]
    )


def authors_turns(influence, count):
    """Each target row pops its best; a row that is there already is not added again."""
    queues = [list(np.argsort(-column, kind="stable")) for column in influence.T]
    kept = []
    while len(kept) < count:
        for queue in queues:
            row = queue.pop(0)
            if row not in kept and len(kept) < count:
                kept.append(row)
    return kept


def test_scores_equal_the_formula(setting, tmp_path):
    base, pool, target = setting
    run = tiny.run_in(tmp_path / "run")
    selection = Rds(count=7, pick="top").select(pool, run, target=target, base=base)
    wanted = cosines(base, pool, target).max(axis=1)
    scores = np.array(selection.scores.index["score"])
    assert np.abs(scores - wanted).max() < 1e-3  # float16 unit vectors
    assert selection.scores.ids == pool.ids
    best = sorted(range(len(pool)), key=lambda i: -scores[i])[:7]
    assert selection.chosen.ids == [pool.ids[i] for i in best]
    assert wanted[best].min() >= np.sort(wanted)[-7] - 2e-3


def test_round_robin_is_the_default_and_the_authors(setting, tmp_path):
    base, pool, target = setting
    run = tiny.run_in(tmp_path / "run")
    selection = Rds(count=12).select(pool, run, target=target, base=base)
    influence = cosines(base, pool, target)
    chosen = [pool.ids.index(identity) for identity in selection.chosen.ids]
    used = set()
    for turn, row in enumerate(chosen):
        left = [i for i in range(len(pool)) if i not in used]
        assert influence[row, turn % 3] >= influence[left, turn % 3].max() - 2e-3
        used.add(row)
    # Passing a turn or not changes the order, and barely the set.
    theirs = authors_turns(influence, 12)
    assert len(used & set(theirs)) >= 9
    for turn, (identity, row) in enumerate(zip(selection.chosen.ids, chosen, strict=True)):
        said, of = selection.reasons[identity].split(" with target row ")
        assert of == target.ids[turn % 3]
        assert float(said.removeprefix("cosine ")) == pytest.approx(
            influence[row, turn % 3], abs=2e-3
        )


def test_rows_are_cut_to_max_length(setting, tmp_path):
    base, pool, target = setting
    run = tiny.run_in(tmp_path / "run")
    selection = Rds(count=3, max_length=5).select(pool, run, target=target, base=base)
    wanted = cosines(base, pool, target, limit=5).max(axis=1)
    assert np.abs(np.array(selection.scores.index["score"]) - wanted).max() < 1e-3
    lengths = [len(row.input_ids) for row in encode(pool, base.tokenizer(), 64)]
    assert run.record["notes"]["pool_rows_cut"] == sum(length > 5 for length in lengths) > 0


def test_finished_shards_are_not_computed_again(setting, tmp_path, monkeypatch):
    base, pool, target = setting
    run = tiny.run_in(tmp_path / "run")
    Rds(count=3).select(pool, run, target=target, base=base)
    first = {p.name: p.stat().st_mtime_ns for p in (run.work / "embeddings").rglob("*.safetensors")}
    spent = run.record["cost"]["forward_tokens"]
    tokens = [len(row.input_ids) for d in (pool, target) for row in encode(d, base.tokenizer(), 64)]
    assert spent == sum(tokens)
    os.remove(run.work / "scores" / "header.json")
    again = Rds(count=3).select(pool, run, target=target, base=base)
    assert run.record["cost"]["forward_tokens"] == spent
    assert first == {
        p.name: p.stat().st_mtime_ns for p in (run.work / "embeddings").rglob("*.safetensors")
    }
    assert len(Features.open(again.scores.folder)) == 30
