"""LESS against the published formula computed row by row in float64."""

import json

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from deltaloom.core.base import Base
from deltaloom.core.encoding import encode
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples
from deltaloom.engine.gradients import parameter_names
from deltaloom.engine.projection import Rademacher, Sparse
from deltaloom.select.less import Less, subtask_scores

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
    """sum_c w_c mean_{z' in S} cos(P Gamma(z), P g(z')), max over S, one row at a time."""
    encoded = [encode(data, base.tokenizer(), 64) for data in (pool, target)]
    groups = [row.group for row in target]
    folders = sorted((run.work / "warmup").glob("epoch-*"))
    rates = [json.loads((f / "epoch.json").read_text())["lr"] for f in folders]
    total = np.zeros((len(pool), len(target)))
    for folder, rate in zip(folders, rates, strict=True):
        tensors = load_file(folder / "moments.safetensors")
        model = method.warmup.attach(base, 0)
        names = parameter_names(model)
        for name in names:
            model.get_parameter(name).data.copy_(tensors[f"w.{name}"])
        m, v = (torch.cat([tensors[f"{k}.{n}"].flatten() for n in names]).double() for k in "mv")
        kind = Sparse if method.projection == "sparse" else Rademacher
        matrix = kind(len(m), method.dimension, run.seed)(torch.eye(len(m))).double()
        train = []
        for row in encoded[0]:
            g = gradient(model, names, row)
            m1, v1 = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            train.append((m1 / (v1 + 1e-8).sqrt()) @ matrix)
        goal = [gradient(model, names, row) @ matrix for row in encoded[1]]
        cosine = [[torch.cosine_similarity(a, b, dim=0).item() for b in goal] for a in train]
        total += rate / sum(rates) * np.array(cosine)
    means = [total[:, [g == name for g in groups]].mean(axis=1) for name in sorted(set(groups))]
    return np.max(means, axis=0)


@pytest.mark.parametrize("projection", ["sparse", "rademacher"])
def test_scores_equal_the_formula(setting, tmp_path, projection):
    base, pool, target = setting
    method = Less(count=5, warmup_fraction=0.5, warmup=WARMUP, projection=projection, dimension=96)
    run = tiny.run_in(tmp_path / "run", seed=1)
    selection = method.select(pool, run, target=target, base=base)
    scores = np.array(selection.scores.index["score"])
    wanted = by_definition(method, base, pool, target, run)
    # features are stored in float16: about 5e-4 of a unit vector
    assert np.abs(scores - wanted).max() < 2e-3
    assert selection.scores.ids == pool.ids
    best = np.argsort(-scores, kind="stable")[:5]
    assert selection.chosen.ids == [pool.ids[i] for i in best]
    assert wanted[best].min() >= np.sort(wanted)[-5] - 4e-3


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


def test_ragged_subtasks_mean_then_max():
    influence = np.array([[1.0, 3.0, 5.0], [6.0, 0.0, 1.0]])
    assert subtask_scores(influence, ["a", "a", "b"]).tolist() == [5.0, 3.0]
    assert subtask_scores(influence, ["a", "a", "a"]).tolist() == pytest.approx([3.0, 7 / 3])


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
