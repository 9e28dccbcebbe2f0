"""Representative rows against plain greedy on cosines made by hand."""

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from deltaloom.core.base import Base
from deltaloom.core.encoding import encode
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples
from deltaloom.core.features import Features
from deltaloom.select import facility
from deltaloom.select.facility import Facility


@pytest.fixture
def setting(tmp_path):
    """Pool, target and known rows, with features stored in two folders."""
    pool = Examples.read(tiny.rows_in(tmp_path / "pool.jsonl", 30))
    target = Examples.read(tiny.rows_in(tmp_path / "target.jsonl", 5, offset=100))
    known = Examples.read(tiny.rows_in(tmp_path / "known.jsonl", 4, offset=200))
    random = np.random.default_rng(0)
    vectors = {name: random.standard_normal((len(rows), 6)) for name, rows in
               (("pool", pool), ("target", target), ("known", known))}  # fmt: skip
    store(tmp_path / "first", pool.ids, vectors["pool"])
    ids, rest = [*known.ids, *target.ids], np.concatenate([vectors["known"], vectors["target"]])
    store(tmp_path / "second", ids, rest)
    units = {
        name: each / np.linalg.norm(each, axis=1, keepdims=True) for name, each in vectors.items()
    }
    return pool, target, units, [str(tmp_path / "first"), str(tmp_path / "second")]


def store(folder, ids, rows):
    made = Features.create(folder, ids, rows.shape[1], about={"what": "test"}, shard_rows=7)
    for number, own in enumerate(made.shards()):
        made.write_shard(number, rows[own.start : own.stop])


def plain(gain, n, count):
    """Greedy from a function's values of sets, without any laziness."""
    chosen = []
    for _ in range(count):
        values = [-np.inf if j in chosen else gain([*chosen, j]) for j in range(n)]
        chosen.append(int(np.argmax(values)))
    return chosen


def choose(method, pool, tmp_path, target=None, base=None, seed=0):
    run = tiny.run_in(tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}", seed)
    return method.select(pool, run, target=target, base=base), run


def test_every_function(setting, tmp_path):
    pool, target, units, folders = setting
    s = np.maximum(units["pool"] @ units["pool"].T, 0)
    cap = 0.7 * np.maximum(units["pool"] @ units["target"].T, 0).max(axis=1)
    low = 0.7 * np.maximum(units["pool"] @ units["known"].T, 0).max(axis=1)
    raw = units["pool"] @ units["pool"].T

    def volume(a):
        return np.linalg.slogdet(np.eye(len(a)) + raw[np.ix_(a, a)] / 0.3)[1]

    cases = [
        ({}, None, lambda a: s[:, a].max(axis=1).sum(), "facility"),
        ({"eta": 0.7}, target, lambda a: np.minimum(s[:, a].max(axis=1), cap).sum(), "flmi"),
        (
            {"nu": 0.7, "given": str(tmp_path / "known.jsonl")},
            None,
            lambda a: np.maximum(s[:, a].max(axis=1) - low, 0).sum(),
            "flcg",
        ),
        (
            {"function": "graphcut", "redundancy": 0.4},
            None,
            lambda a: s[:, a].sum() - 0.4 * s[np.ix_(a, a)].sum(),
            "graphcut",
        ),
        ({"function": "logdet", "ridge": 0.3}, None, volume, "logdet"),
    ]
    for settings, goal, value, name in cases:
        method = Facility(count=8, features=folders, **settings)
        selection, run = choose(method, pool, tmp_path, goal)
        wanted = plain(value, 30, 8)
        assert selection.chosen.ids == [pool.ids[i] for i in wanted], name
        assert run.record["notes"]["function"] == name
        assert run.record["notes"]["value"] == pytest.approx(value(wanted), abs=1e-4)
        alone = [value([j]) for j in range(30)]
        assert selection.scores.index["score"] == pytest.approx(alone, abs=1e-5), name
        assert set(selection.reasons) == set(selection.chosen.ids)


def test_embeddings_of_the_base(setting, tmp_path):
    pool, target, _, _ = setting
    base = Base(model=str(tiny.base_in(tmp_path / "base", initializer_range=0.5)))
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float64).eval()

    def states(rows):
        found = []
        for row in encode(rows, base.tokenizer(), 64):
            with torch.no_grad():
                out = model(input_ids=torch.tensor([row.input_ids]), output_hidden_states=True)
            found.append(out.hidden_states[-1][0].mean(0).numpy())
        return np.array(found)

    ours, theirs = states(pool), states(target)
    ours, theirs = (
        each / np.linalg.norm(each, axis=1, keepdims=True)
        for each in (ours - ours.mean(axis=0), theirs - ours.mean(axis=0))
    )
    s = np.maximum(ours @ ours.T, 0)
    cap = np.maximum(ours @ theirs.T, 0).max(axis=1)
    for goal, top in ((None, np.inf), (target, cap)):
        selection, run = choose(Facility(count=6), pool, tmp_path, goal, base)
        have, numbers = np.zeros(30), [pool.ids.index(i) for i in selection.chosen.ids]
        for pick in numbers:  # rows may be alike, so each pick must only be among the best
            gains = (np.maximum(have[:, None], np.minimum(s.T, top).T) - have[:, None]).sum(axis=0)
            assert gains[pick] >= gains.max() - 1e-4
            have = np.maximum(have, np.minimum(s[:, pick], top))
        assert run.record["cost"]["forward_tokens"] > 0


def test_large_pools_and_neighbours(setting, tmp_path, monkeypatch):
    pool, _, units, folders = setting
    dense, _ = choose(Facility(count=9, features=folders), pool, tmp_path)
    monkeypatch.setattr(facility, "DENSE_ROWS", 10)
    made, _ = choose(Facility(count=9, features=folders), pool, tmp_path)
    whole, _ = choose(Facility(count=9, features=folders, neighbours=500), pool, tmp_path)
    assert made.chosen.ids == dense.chosen.ids == whole.chosen.ids
    few, _ = choose(Facility(count=9, features=folders, neighbours=4), pool, tmp_path)
    cosines = units["pool"] @ units["pool"].T
    kept = np.where(cosines >= -np.sort(-cosines, axis=1)[:, [3]], np.maximum(cosines, 0), 0)
    wanted = plain(lambda a: kept[:, a].max(axis=1).sum(), 30, 9)
    assert few.chosen.ids == [pool.ids[i] for i in wanted]


def test_stochastic_greedy_follows_the_seed(setting, tmp_path):
    pool, _, _, folders = setting
    method = Facility(count=6, features=folders, greedy="stochastic", eps=0.5)
    first, again, other = (
        choose(method, pool, tmp_path, seed=seed)[0].chosen.ids for seed in (1, 1, 2)
    )
    assert first == again != other


def test_duplicates_make_room_for_the_next(setting, tmp_path):
    pool, _, _, folders = setting
    every, _ = choose(Facility(count=30, features=folders), pool, tmp_path)
    seen, kept = set(), []
    for row in every.chosen:
        if (text := (row.prompt.strip(), row.completion)) not in seen and len(kept) < 5:
            seen.add(text)
            kept.append(row.id)
    few, _ = choose(Facility(count=5, features=folders, deduplicate=True), pool, tmp_path)
    assert few.chosen.ids == kept


def test_bad_input(setting, tmp_path):
    pool, target, _, folders = setting
    known = str(tmp_path / "known.jsonl")
    for settings, goal, message in [
        ({}, None, "needs base= to embed the rows with, or features="),
        ({"function": "flmi", "features": folders}, None, "function=flmi needs target="),
        ({"function": "flcg", "features": folders}, None, "function=flcg needs given="),
        (
            {"function": "graphcut", "features": folders},
            target,
            "target= has no use with graphcut; leave it out, or choose function=flmi",
        ),
        ({"given": known, "features": folders}, target, "given= has no use with flmi"),
        (
            {"features": folders[:1]},
            target,
            "features= has no row for 'r100' of target \\(5 of 5 missing\\)",
        ),
        ({"features": folders, "count": 31}, None, "count = 31 is more than the pool's 30 rows"),
        ({"features": [str(tmp_path / "none")]}, None, "none holds no features"),
    ]:
        with pytest.raises(InputError, match=message):
            choose(Facility(**settings), pool, tmp_path, goal)
    for settings, message in [
        ({"function": "logdet", "neighbours": 3}, "logdet needs all similarities"),
        ({"function": "graphcut", "greedy": "stochastic"}, "stochastic is not for graphcut"),
        ({"function": "coverage"}, "function = 'coverage'"),
    ]:
        with pytest.raises(InputError, match=message):
            Facility.parse(settings, "select facility")


def test_features_of_two_spaces_do_not_mix(setting, tmp_path):
    pool, _, _, folders = setting
    store(tmp_path / "wide", ["other"], np.ones((1, 8)))
    with pytest.raises(InputError, match="cannot be compared"):
        choose(Facility(features=[*folders, str(tmp_path / "wide")]), pool, tmp_path)
