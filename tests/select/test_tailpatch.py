"""Tail-patch: effects by hand, ratings, bundles and the continuous weights by their formulas."""

import itertools
import json
import math
import re

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from deltaloom.core.base import Base
from deltaloom.core.encoding import encode
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples
from deltaloom.core.run import Run
from deltaloom.select._patch_cost import Prices
from deltaloom.select._ratings import Effect, bundled, exponential, rated, utilities
from deltaloom.select.tailpatch import Tailpatch, _go_on

TUNING = {"r": 2, "lr": 3e-2, "batch_size": 4}


def effect(value, stderr, steps=10):
    return Effect(value, stderr, value - 2 * stderr, value + 2 * stderr, 9, steps)


def test_ratings_follow_the_intervals():
    effects = {
        "best": {"t": effect(1.0, 0.1)},
        "some": {"t": effect(0.2, 0.05)},
        "none": {"t": effect(0.3, 0.2)},
        "harm": {"t": effect(-0.3, 0.1)},
    }
    found = rated(effects, 0.25)
    assert [found[s]["t"] for s in effects] == [2, 1, 0, -1]


def test_bundles_get_the_published_weights():
    ratings = {
        "general": {"a": 2, "b": 1, "c": 0},
        "specific": {"a": 2, "b": -1, "c": 0},
        "other": {"a": 0, "b": 0, "c": 0},
        "harmful": {"a": 1, "b": -1, "c": -1},
    }
    assert bundled(ratings) == {
        "general": 100_000, "specific": 30_000, "other": 3_000, "harmful": 0,
    }  # fmt: skip
    useless = {"x": {"a": -1}, "y": {"a": -1}}
    assert set(bundled(useless).values()) == {3_000}


def test_continuous_weights_are_shrunk_effects():
    rng = np.random.default_rng(0)
    slopes, errors = rng.normal(size=(5, 2)), rng.uniform(0.1, 0.5, size=(5, 2))
    effects = {
        f"s{i}": {f"t{j}": effect(20 * slopes[i, j], 20 * errors[i, j], 20) for j in range(2)}
        for i in range(5)
    }
    spread = np.maximum((slopes**2 - errors**2).mean(0), 0)
    wanted = (slopes * spread / (spread + errors**2) / np.sqrt(spread)).mean(1)
    assert list(utilities(effects).values()) == pytest.approx(list(wanted))
    rates = {f"s{i}": 10.0 * (i + 1) for i in range(5)}
    found = exponential(effects, rates, 1.5)
    ratio = found["s1"] / found["s0"]
    assert ratio == pytest.approx(2 * math.exp(1.5 * (wanted[1] - wanted[0])))
    noise = {f"s{i}": {"t": effect(0.01 * i, 5.0)} for i in range(3)}
    assert utilities(noise) == dict.fromkeys(noise, 0.0)


def test_settled_sources_stop_and_the_better_half_goes_on():
    found = {
        "known": {"t": effect(1, 0.1)},
        "bad": {"t": effect(-1, 0.1)},
        "hope": {"t": effect(0.1, 0.3)},
        "wide": {"t": effect(0.0, 0.5)},
        "dull": {"t": effect(-0.1, 0.1)},
    }
    assert _go_on(list(found), found) == ["hope", "wide"]


def by_hand(lengths, batch, look, rungs, each):
    """Tokens of the worst course of a design, every subset of sources tried."""

    def patch(own, rung):
        rows = itertools.islice(
            itertools.cycle(own), rung * each * batch, (rung + 1) * each * batch
        )
        return sum(rows) + look

    total, count = 0, len(lengths)
    for rung in range(rungs):
        groups = itertools.combinations(lengths, count)
        total += max(sum(patch(own, rung) for own in group) for group in groups)
        count = math.ceil(count / 2)
    return total


def test_designs_cost_what_their_worst_course_takes():
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = [list(map(int, rng.integers(1, 30, rng.integers(1, 9)))) for _ in range(5)]
        batch, look = int(rng.integers(1, 5)), int(rng.integers(0, 90))
        prices = Prices(lengths, batch, look)
        every = {
            (r, e): by_hand(lengths, batch, look, r, e)
            for r in (1, 2, 3)
            for e in range(1, 6 // r + 1)
        }
        assert all(prices.most(*design) == tokens for design, tokens in every.items())
        budget = int(rng.integers(50, 3000))
        fit = [(-r * e, tokens) for (r, e), tokens in every.items() if tokens <= budget]
        found = prices.best((1, 2, 3), 6, budget)
        assert (found and (-found.steps, found.tokens)) == (min(fit) if fit else None)


@pytest.fixture
def setting(tmp_path):
    """`right` teaches what the target asks, `wrong` what is never right, `noise` another thing."""
    base = Base(model=str(tiny.base_in(tmp_path / "base")))
    answers = dict(zip(tiny.PEOPLE, ["oslo", "rome"] * 3, strict=True))
    with open(tmp_path / "pool.jsonl", "w") as pool, open(tmp_path / "target.jsonl", "w") as goal:
        for i in range(12):
            who = tiny.PEOPLE[i % 6]
            prompt = f"where lives {who} ? " + "yes " * (i // 6)
            row = {"prompt": prompt, "completion": answers[who]}
            pool.write(json.dumps({**row, "source": "right"}) + "\n")
            wrong = {"source": "wrong", "prompt": prompt, "completion": "lima"}
            pool.write(json.dumps(wrong) + "\n")
            other = {"source": "noise", "prompt": f"who likes {who} ?", "completion": "max : max"}
            pool.write(json.dumps(other) + "\n")
            goal.write(json.dumps({**row, "group": "lives"}) + "\n")
    return base, Examples.read(tmp_path / "pool.jsonl"), Examples.read(tmp_path / "target.jsonl")


def test_effects_are_the_changes_of_the_loss_and_signs_are_right(setting, tmp_path):
    base, pool, target = setting
    run = tiny.run_in(tmp_path / "run", seed=1)
    method = Tailpatch(warmup_fraction=0.5, tuning=TUNING, steps=12, rungs=2, cost=20)
    found = method.select(pool, run, target=target, base=base)
    about = found.weights.about
    assert about["ratings"]["right"]["lives"] > 0
    assert about["ratings"]["wrong"]["lives"] == -1
    assert found.weights.weights["wrong"] == 0
    assert "wrong" not in found.chosen.sources()
    # By hand: the kept adapters put into a model of our own.
    rows = encode(target, base.tokenizer(), 64)
    steps = about["effects"]["right"]["lives"]["steps"]
    number = sorted(pool.sources()).index("right")
    kept = run.work / f"patch-{number}-{steps // 6 - 1}" / "adapter.safetensors"
    change = loss(method, base, run.work / "checkpoint.safetensors", rows) - loss(
        method, base, kept, rows
    )
    assert about["effects"]["right"]["lives"]["value"] == pytest.approx(change, abs=1e-5)
    # Every token that was trained on is in the ledger.
    patches = [Run.read(path) for path in run.work.glob("patch-*")]
    spent = sum(one["cost"]["backward_tokens"] for one in patches)
    assert run.record["notes"]["patch_tokens"] == spent
    assert run.record["cost"]["backward_tokens"] > spent


def test_the_whole_of_a_measurement_in_parts_counts(setting, tmp_path, monkeypatch):
    base, pool, target = setting
    tiny.loss_in_parts(monkeypatch)
    method = Tailpatch(warmup_fraction=0.5, tuning=TUNING, steps=2, rungs=1, cost=20)
    found = method.select(pool, tiny.run_in(tmp_path / "run"), target=target, base=base)
    assert set(found.weights.about["ratings"]) == {"right", "wrong", "noise"}


def loss(method, base, path, rows):
    model = method.tuning.attach(base, 0).eval()
    tensors = load_file(path)
    total = tokens = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in tensors:
                parameter.copy_(tensors[name])
        for row in rows:
            ids = torch.tensor([row.input_ids])
            mask = torch.tensor(row.response_mask[1:], dtype=torch.bool)
            logits = model(input_ids=ids).logits[0, :-1].double()
            total += torch.nn.functional.cross_entropy(
                logits[mask], ids[0, 1:][mask], reduction="sum"
            )
            tokens += int(mask.sum())
    return float(total / tokens)


def test_patches_go_on_from_a_given_checkpoint(setting, tmp_path):
    from deltaloom.tune.lora import Lora

    base, pool, target = setting
    tuned = tiny.run_in(tmp_path / "tuned")
    Lora(**TUNING, epochs=1).tune(base, pool, tuned)
    run = tiny.run_in(tmp_path / "run")
    method = Tailpatch(checkpoint=str(tuned.folder), tuning=TUNING, steps=2, rungs=1, cost=20)
    found = method.select(pool, run, target=target, base=base)
    kept = load_file(run.work / "checkpoint.safetensors")
    theirs = load_file(tuned.folder / "adapter_model.safetensors")
    assert {n.replace(".default", "") for n in kept} == {*theirs}
    assert all(torch.equal(v, theirs[n.replace(".default", "")]) for n, v in kept.items())
    assert run.record["notes"]["patch_steps"] == dict.fromkeys(["noise", "right", "wrong"], 2)
    assert found.weights.about["weighing"] == "bundles"


def test_no_more_than_the_share_of_the_run_is_spent(setting, tmp_path):
    base, pool, target = setting
    how = {"warmup_fraction": 0.5, "tuning": TUNING, "steps": 50}
    run = tiny.run_in(tmp_path / "run")
    found = Tailpatch(**how, cost=0.5, passes=6).select(pool, run, target=target, base=base)
    told = found.weights.about["cost"]
    tokens = sum(len(row.input_ids) for row in encode(pool, base.tokenizer(), 64))
    assert told["run_tokens"] == 6 * tokens
    spent = run.record["cost"]["forward_tokens"]
    assert spent <= told["most_tokens"] <= 0.5 * told["run_tokens"]
    assert 1 <= max(run.record["notes"]["patch_steps"].values()) < 50
    # Too little is refused with a cost that does.
    with pytest.raises(InputError, match="allow cost = ") as caught:
        Tailpatch(**how, cost=0.01).select(
            pool, tiny.run_in(tmp_path / "poor"), target=target, base=base
        )
    enough = float(re.search(r"allow cost = ([\d.]+)", str(caught.value))[1])
    again = tiny.run_in(tmp_path / "enough")
    found = Tailpatch(**how, cost=enough).select(pool, again, target=target, base=base)
    assert again.record["notes"]["patch_steps"] == dict.fromkeys(["noise", "right", "wrong"], 1)


def test_bad_input_is_said(setting, tmp_path):
    base, pool, target = setting
    one = Examples([row for row in pool if row.source == "right"], "one.jsonl")
    with pytest.raises(InputError, match="one source only"):
        Tailpatch().select(one, tiny.run_in(tmp_path / "a"), target=target, base=base)
    few = tiny.run_in(tmp_path / "b")
    with pytest.raises(InputError, match=r"line 1: is the only row of the target 'lives'"):
        Tailpatch().select(pool, few, target=target[:1], base=base)
    with pytest.raises(InputError, match=r"rungs = 30 is more than steps = 20"):
        Tailpatch.parse({"rungs": 30}, "select tailpatch")
    with pytest.raises(InputError, match="no measure method"):
        Tailpatch.parse({"measure": "los"}, "select tailpatch")
