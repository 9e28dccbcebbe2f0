"""LESS against the published formula computed row by row in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from deltaloom.core.base import Base
from deltaloom.core.encoding import encode
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples
from deltaloom.core.run import Workers
from deltaloom.engine.projection import projection
from deltaloom.engine.taps import Rows
from deltaloom.select.less import Less

WARMUP = {"r": 2, "alpha": 4.0, "lr": 1e-2, "epochs": 2, "batch_size": 4, "dropout": 0.0}


@pytest.fixture
def setting(tmp_path):
    base = Base(model=str(tiny.base_in(tmp_path / "base")))
    pool = Examples.read(tiny.rows_in(tmp_path / "pool.jsonl", 30))
    rows = [
        {"prompt": f"where lives {who} ? ", "completion": city, "group": group}
        for who, city, group in [
            ("tom", "oslo", "a"),
            ("anna", "rome", "a"),
            ("lily", "lima", "a"),
            ("ben", "rome", "b"),
            ("sue", "oslo", "b"),
        ]
    ]
    path = tmp_path / "target.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return base, pool, Examples.read(path)


def gradient(model, names, row):
    model.eval()
    model.zero_grad(set_to_none=True)
    ids = torch.tensor([row.input_ids])
    mask = torch.tensor(row.response_mask[1:], dtype=torch.bool)
    logits = model(input_ids=ids).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits[mask], ids[0, 1:][mask]).backward()
    return torch.cat([model.get_parameter(n).grad.flatten() for n in names]).double()


def by_definition(method, base, pool, target, run):
    """sum_c w_c cos(P Gamma(z), P g(z')) (n, t), one row at a time in float64."""
    encoded = [encode(data, base.tokenizer(), 64) for data in (pool, target)]
    folders = sorted((run.work / "warmup").glob("epoch-*"))
    if method.checkpoints == "last":
        folders = folders[-1:]
    rates = [json.loads((f / "epoch.json").read_text())["lr"] for f in folders]
    total = np.zeros((len(pool), len(target)))
    for folder, rate in zip(folders, rates, strict=True):
        tensors = load_file(folder / "moments.safetensors")
        model = method.warmup.attach(base, 0)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        for name in names:
            model.get_parameter(name).data.copy_(tensors[f"w.{name}"])
        m, v = (torch.cat([tensors[f"{k}.{n}"].flatten() for n in names]).double() for k in "mv")
        matrix = whole_matrix(method, model, names, run.seed)
        train = []
        for row in encoded[0]:
            g = gradient(model, names, row)
            m1, v1 = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            train.append((m1 / (v1 + 1e-8).sqrt()) @ matrix)
        goal = [gradient(model, names, row) @ matrix for row in encoded[1]]
        cosine = [[torch.cosine_similarity(a, b, dim=0).item() for b in goal] for a in train]
        total += rate / sum(rates) * np.array(cosine)
    return total


def whole_matrix(method, model, names, seed):
    """The projection of every parameter, (D, dim)."""
    parts = []
    for name in names:
        shape = model.get_parameter(name).shape
        one = torch.eye(shape.numel()).reshape(-1, *shape)
        out = torch.zeros(len(one), method.dimension)
        sketch = projection(method.projection, method.dimension, seed)
        sketch.add(name, Rows(lambda one=one: one), out, None)
        parts.append(out)
    return torch.cat(parts).double()


def best_subtask(influence, groups):
    means = [influence[:, [g == name for g in groups]].mean(axis=1) for name in sorted(set(groups))]
    return np.max(means, axis=0)


def test_a_bfloat16_base_ranks_as_its_float32_twin(setting, tmp_path):
    base, pool, target = setting
    method = Less(count=5, warmup_fraction=0.5, warmup=WARMUP, dimension=96, dtype="float32")
    scores = []
    for dtype in ("float32", "bfloat16"):
        run = tiny.run_in(tmp_path / dtype, seed=1)
        one = base.model_copy(update={"dtype": dtype})
        selection = method.select(pool, run, target=target, base=one)
        scores.append(np.array(selection.scores.index["score"]))
    assert np.corrcoef(*scores)[0, 1] > 0.99


def test_the_gradient_pass_has_the_adapter_in_the_bases_type(setting, tmp_path):
    from deltaloom.select._influence import Sketching
    from deltaloom.select._warmup import load_epoch, warm_up
    from deltaloom.tune.lora import Lora

    base, pool, _ = setting
    half = base.model_copy(update={"dtype": "bfloat16"})
    how = Sketching(half, Lora(**WARMUP), "sparse", 96, 0, "float32")
    run = tiny.run_in(tmp_path / "run")
    model, adam = load_epoch(warm_up(how, 0.5, pool, run, run.work)[-1], how)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {m.dtype for m in adam.m.values()} == {torch.float32}


TOLERANCE = {"int8": 1e-2, "float16": 2e-3, "float32": 1e-4}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dtype": "float32", "projection": "rademacher"},
        {"dtype": "float16", "projection": "gaussian"},
        {"dtype": "float32", "checkpoints": "last"},
        {"dtype": "float32", "scores_only": True},
    ],
    ids=str,
)
def test_scores_equal_the_formula(setting, tmp_path, settings):
    base, pool, target = setting
    method = Less(count=5, warmup_fraction=0.5, warmup=WARMUP, dimension=96, **settings)
    run = tiny.run_in(tmp_path / "run", seed=1)
    selection = method.select(pool, run, target=target, base=base)
    scores = np.array(selection.scores.index["score"])
    influence = by_definition(method, base, pool, target, run)
    wanted = best_subtask(influence, [row.group for row in target])
    assert np.abs(scores - wanted).max() < TOLERANCE[method.dtype]
    assert selection.scores.ids == pool.ids
    best = np.argsort(-scores, kind="stable")[:5]
    assert selection.chosen.ids == [pool.ids[i] for i in best]
    assert wanted[best].min() >= np.sort(wanted)[-5] - 2 * TOLERANCE[method.dtype]
    first = selection.reasons[pool.ids[best[0]]]
    nearest = target.ids[influence[best[0]].argmax()]
    assert first.startswith(f"pulled in by target rows {nearest} (")
    stores = [p.name for p in (run.work / "features" / "epoch-2").iterdir()]
    assert len(stores) == 2


def test_round_robin_takes_turns_over_subtasks_or_rows(setting, tmp_path):
    base, pool, target = setting
    common = {"count": 6, "warmup_fraction": 0.5, "warmup": WARMUP, "dtype": "float32"}
    method = Less(**common, dimension=96, pick="round_robin")
    run = tiny.run_in(tmp_path / "run", seed=1)
    chosen = method.select(pool, run, target=target, base=base).chosen
    influence = by_definition(method, base, pool, target, run)
    means = np.stack([influence[:, :3].mean(1), influence[:, 3:].mean(1)], axis=1)
    assert chosen.ids == [pool.ids[i] for i in turns(means, 6)]
    one = target.take([0, 1, 2])
    run = tiny.run_in(tmp_path / "one", seed=1)
    chosen = method.select(pool, run, target=one, base=base).chosen
    influence = by_definition(method, base, pool, one, run)
    assert chosen.ids == [pool.ids[i] for i in turns(influence, 6)]


def turns(influence, count):
    left, order = list(range(len(influence))), []
    for k in range(count):
        best = max(left, key=lambda i, k=k: influence[i, k % influence.shape[1]])
        left.remove(best)
        order.append(best)
    return order


def settings_of(tmp_path, **more):
    return {"count": 4, "warmup_fraction": 0.4, "warmup": WARMUP, "dimension": 64, **more}


def test_kept_features_answer_another_target(setting, tmp_path):
    base, pool, target = setting
    home = tmp_path / "kept"
    method = Less(**settings_of(tmp_path), features=str(home))
    first = tiny.run_in(tmp_path / "first")
    method.select(pool, first, target=target.take([0, 1]), base=base)
    spent = first.record["cost"]["backward_tokens"]
    before = {p: p.stat().st_mtime_ns for p in home.rglob("*.safetensors")}
    second = tiny.run_in(tmp_path / "second")
    got = method.select(pool, second, target=target.take([2, 3, 4]), base=base)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert 0 < second.record["cost"]["backward_tokens"] < 0.2 * spent
    alone = Less(**settings_of(tmp_path)).select(
        pool, tiny.run_in(tmp_path / "third"), target=target.take([2, 3, 4]), base=base
    )
    assert got.scores.index == alone.scores.index
    other = Less(**{**settings_of(tmp_path), "warmup_fraction": 0.5}, features=str(home))
    with pytest.raises(InputError, match=r"another warm-up \(different warm-up.fraction"):
        other.select(pool, tiny.run_in(tmp_path / "fourth"), target=target, base=base)


def test_a_small_model_selects_for_a_large_one(setting, tmp_path):
    base, pool, target = setting
    large = Base(model=str(tiny.base_in(tmp_path / "large", seed=5, hidden_size=32)))
    by_proxy = Less(**settings_of(tmp_path), proxy=base.model).select(
        pool, tiny.run_in(tmp_path / "a"), target=target, base=large
    )
    itself = Less(**settings_of(tmp_path)).select(
        pool, tiny.run_in(tmp_path / "b"), target=target, base=base
    )
    assert by_proxy.scores.index == itself.scores.index


@pytest.mark.parametrize("count", [1, 3])
def test_workers_write_the_same_bytes(setting, tmp_path, count):
    base, pool, target = setting
    homes = []
    for workers in (Workers(), Workers(count)):
        run = tiny.run_in(tmp_path / f"run-{workers.count}")
        run.workers = workers
        method = Less(**settings_of(tmp_path), features=str(tmp_path / f"kept-{workers.count}"))
        method.select(pool, run, target=target, base=base)
        homes.append(Path(method.features))
    files = [
        {p.relative_to(home): p.read_bytes() for p in home.glob("features/**/*.safetensors")}
        for home in homes
    ]
    assert files[0] == files[1]
    assert len(files[0]) == 4


def test_rows_in_both_pool_and_target_are_said(setting, tmp_path, capsys):
    base, pool, _ = setting
    run = tiny.run_in(tmp_path / "run")
    Less(**settings_of(tmp_path)).select(pool, run, target=pool.take([3, 4]), base=base)
    assert "2 target rows are in the pool too" in capsys.readouterr().err
    assert run.record["notes"]["target_rows_in_pool"] == 2


def test_weights_are_the_epochs_mean_learning_rates(setting, tmp_path):
    base, pool, target = setting
    run = tiny.run_in(tmp_path / "run")
    Less(count=3, warmup_fraction=0.4, warmup={**WARMUP, "warmup": 0.0}).select(
        pool, run, target=target, base=base
    )
    rates = [
        json.loads((run.work / "warmup" / f"epoch-{e}" / "epoch.json").read_text())["lr"]
        for e in (1, 2)
    ]
    # 12 rows in batches of 4: 3 steps an epoch, linear from 1e-2 over 6 steps
    schedule = [1e-2 * (6 - step) / 6 for step in range(6)]
    assert rates == pytest.approx([np.mean(schedule[:3]), np.mean(schedule[3:])])


def test_warm_up_settings_replace_the_authors_one_by_one():
    method = Less(warmup={"r": 4})
    assert (method.warmup.r, method.warmup.alpha, method.warmup.lr) == (4, 512.0, 2e-5)


def test_budgets(setting):
    assert Less(fraction=0.5).budget(31) == 16
    assert Less().budget(1000) == 50
    assert Less(count=7).budget(10) == 7
    with pytest.raises(InputError, match="count = 7 is more than the pool's 5 rows"):
        Less(count=7).budget(5)
    with pytest.raises(InputError, match="fraction or count, not both"):
        Less.parse({"fraction": 0.1, "count": 3}, "select less")
