"""Stages against plain LoRA on the same rows; similarities against whole gradients; the filter."""

import json

import numpy as np
import pytest
import tiny
import torch

from deltaloom.core.base import Base
from deltaloom.core.encoding import encode
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Example, Examples
from deltaloom.core.method import Evaluation
from deltaloom.core.registry import get
from deltaloom.engine.gradients import per_example
from deltaloom.tune import _kinship
from deltaloom.tune._stages import drawn
from deltaloom.tune.lora import Lora
from deltaloom.tune.staged import Staged

SMALL = {"r": 2, "lr": 1e-2, "batch_size": 4}


def rows_of(path, **tasks):
    """Task -> (rows, answer)."""
    lines = [
        {"id": f"{task}{i}", "source": task, "completion": answer,
         "prompt": f"where lives {tiny.PEOPLE[i % 6]} ? " + "yes " * (i // 6)}
        for task, (count, answer) in tasks.items() for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Examples.read(path)


@pytest.fixture
def setting(tmp_path):
    base = Base(model=str(tiny.base_in(tmp_path / "base")))
    data = rows_of(
        tmp_path / "rows.jsonl", large=(16, "oslo"), other=(10, "oslo : oslo"), small=(4, "oslo")
    )
    return base, data


def test_without_stages_it_is_lora_on_these_rows(setting, tmp_path):
    base, data = setting
    run = tiny.run_in(tmp_path / "run", seed=3)
    method = Staged(**SMALL, filter="none", high_share=0, temperatures=(1, 1), epochs=2)
    method.tune(base, data, run)
    rows = drawn(data, 60, 1.0, 4.0, 3 + 1)
    assert rows.times == {"large": 2.0, "other": 2.0, "small": 2.0}
    again = tiny.run_in(tmp_path / "again", seed=3)
    Lora(**SMALL, epochs=1).tune(base, rows.rows, again)
    ours, theirs = (r.folder / "adapter_model.safetensors" for r in (run, again))
    assert ours.read_bytes() == theirs.read_bytes()


def test_every_task_is_measured_after_each_stage(setting, tmp_path):
    base, data = setting
    held = rows_of(tmp_path / "held.jsonl", large=(3, "oslo"), small=(5, "oslo"))
    run = tiny.run_in(tmp_path / "run", seed=3)
    measure = get("measure", "loss").make()
    method = Staged(**SMALL, filter="none", epochs=2)
    method.tune(base, data, run, evaluation=Evaluation(measure, held))
    record = json.loads((run.folder / "stages.json").read_text())
    before, first, last = record["stages"]
    assert [stage["name"] for stage in record["stages"]] == ["before", "high-resource", "all"]
    # 30 rows twice, half of them for the two tasks of at least ten rows (the mean).
    assert first["rows"] == {"large": 18, "other": 12}
    assert sum(last["rows"].values()) == 30
    assert last["rows"]["small"] > 4
    assert last["estimates"]["large"]["value"] < before["estimates"]["large"]["value"]
    change = last["estimates"]["small"]["change"]["value"]
    values = [stage["estimates"]["small"]["value"] for stage in (first, last)]
    assert change == pytest.approx(values[1] - values[0])
    # The last estimates are those of the product itself.
    from deltaloom.core.origin import Origin

    model, tokenizer = Origin(base, str(run.folder)).load()
    small = Examples(row for row in held if row.source == "small")
    again = measure.measure(model, tokenizer, small, tiny.run_in(tmp_path / "m"))
    assert again.value == pytest.approx(last["estimates"]["small"]["value"], abs=1e-5)
    with pytest.raises(InputError, match=r"leave out evaluate\.every"):
        method.tune(base, data, run, evaluation=Evaluation(measure, held, 5))


def test_the_whole_of_a_measurement_in_parts_counts(setting, tmp_path, monkeypatch):
    base, data = setting
    tiny.loss_in_parts(monkeypatch)
    held = rows_of(tmp_path / "held.jsonl", small=(2, "oslo"))
    run = tiny.run_in(tmp_path / "run")
    method = Staged(**SMALL, filter="none", high_share=0, epochs=0.2)
    method.tune(base, data, run, evaluation=Evaluation(get("measure", "loss").make(), held))
    last = json.loads((run.folder / "stages.json").read_text())["stages"][-1]
    assert last["estimates"]["small"]["value"] > 0


def test_repeats_are_capped_and_told():
    data = Examples(
        Example(f"{name}{i}", name, "x", prompt="q", completion="a")
        for name, count in {"a": 60, "b": 30, "c": 2}.items()
        for i in range(count)
    )
    free = drawn(data, 92, 1e9, 1e9, 0)
    assert sorted(free.rows.sources().values()) == [30, 31, 31]
    capped = drawn(data, 92, 1e9, 3.0, 0)
    assert capped.times["c"] == 3.0
    assert sum(capped.rows.sources().values()) == 92


def test_gradient_similarity_is_that_of_whole_gradients(setting, tmp_path):
    base, data = setting
    tokenizer = base.tokenizer()
    tasks = {
        name: encode([r for r in data if r.source == name], tokenizer, 64)
        for name in ("large", "other")
    }
    lora = Lora(**SMALL)
    run = tiny.run_in(tmp_path / "run", seed=3)
    settings = lora.train_settings(1e-2, epochs=1, trainable="adapter")
    model = lora.attach(base, 3)
    found = _kinship.by_gradient(model, tasks, tokenizer.pad_token_id, settings, 2, run)
    means = []
    for rows in tasks.values():
        parts = [g for _, g in per_example(model, rows, tokenizer.pad_token_id)]
        units = torch.nn.functional.normalize(torch.cat(parts).double(), dim=1)
        means.append(units.mean(0))
    cosine = float(torch.cosine_similarity(*means, dim=0))
    assert found["large"]["other"] == pytest.approx(cosine, abs=0.05)
    assert found["large"]["large"] == pytest.approx(1.0)


def test_transfer_is_the_part_of_the_own_gain(setting, tmp_path):
    base, data = setting
    bad = rows_of(tmp_path / "bad.jsonl", unlike=(12, "lima"))
    tokenizer = base.tokenizer()
    tasks = {
        name: encode([r for r in [*data, *bad] if r.source == name], tokenizer, 64)
        for name in ("large", "small", "unlike")
    }
    lora = Lora(**{**SMALL, "lr": 3e-2})
    run = tiny.run_in(tmp_path / "run", seed=3)
    settings = lora.train_settings(3e-2, epochs=1, trainable="adapter", save_steps=8)
    model = lora.attach(base, 3)
    found = _kinship.by_transfer(model, tasks, tokenizer.pad_token_id, settings, 8, run)
    assert all(found[name][name] == 1 for name in tasks)
    assert found["large"]["small"] > 0.5 > found["unlike"]["small"]


def test_the_filter_drops_the_least_alike_one_by_one():
    rng = np.random.default_rng(0)
    names = [f"t{k}" for k in range(6)]
    matrix = rng.uniform(-1, 1, (6, 6))
    similarity = {a: {b: matrix[i, j] for j, b in enumerate(names)} for i, a in enumerate(names)}
    left = list(range(6))
    while len(left) > 2:
        both = (matrix + matrix.T)[np.ix_(left, left)] / 2
        np.fill_diagonal(both, 1)
        means = both.mean(1)
        if means.min() >= 0.2:
            break
        left.pop(int(means.argmin()))
    assert _kinship.kept(similarity, 0.2) == [names[k] for k in left]


def test_a_task_that_the_joint_step_harms_is_the_one_below_zero():
    rng = np.random.default_rng(1)
    units = 1 + 0.5 * rng.normal(size=(5, 8))
    units[4] *= -1
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    cosines = units @ units.T
    harmed = units @ units.mean(0) < 0
    assert harmed.tolist() == [False] * 4 + [True]
    names = "abcde"
    similarity = {a: {b: cosines[i, j] for j, b in enumerate(names)} for i, a in enumerate(names)}
    assert _kinship.kept(similarity, 0.0) == list("abcd")


def test_a_task_that_pulls_away_is_left_out_and_named(setting, tmp_path):
    base, _ = setting
    data = rows_of(
        tmp_path / "rows.jsonl", a=(12, "oslo"), b=(12, "oslo"), c=(12, "oslo"), odd=(12, "lima")
    )
    run = tiny.run_in(tmp_path / "run", seed=3)
    method = Staged(**SMALL, filter="transfer", probe_steps=6, threshold=0.4, epochs=1)
    method.tune(base, data, run)
    assert run.record["notes"]["left_out"] == ["odd"]
    assert all("odd" not in stage["rows"] for stage in run.record["notes"]["stages"])


def test_bad_input_is_said(setting, tmp_path):
    base, data = setting
    run = tiny.run_in(tmp_path / "run")
    one = Examples([row for row in data if row.source == "small"], "one.jsonl")
    with pytest.raises(InputError, match="one task"):
        Staged().tune(base, one, run)
    with pytest.raises(InputError, match="largest has 16"):
        Staged(filter="none", high=17).tune(base, data, run)
