"""Proportional mixing against the published rates, and weights through a recipe."""

import json

import pytest
import tiny

import deltaloom
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples
from deltaloom.core.source_weights import SourceWeights
from deltaloom.select.proportional import Proportional, rates


def by_seqio(amounts, maximum, temperature, scale=1.0):
    """seqio's `mixing_rate_num_examples`, as its documentation states it, normalised."""
    found = {}
    for name, count in amounts.items():
        rate = min(count * scale, maximum)
        found[name] = rate ** (1 / temperature) if temperature != 1 else rate
    return {name: rate / sum(found.values()) for name, rate in found.items()}


@pytest.mark.parametrize(("cap", "temperature"), [(10**9, 1), (40, 1), (40, 2.0), (10**9, 4.0)])
def test_rates_are_the_published_ones(cap, temperature):
    amounts = {"a": 10, "b": 100, "c": 1000}
    ours = SourceWeights(rates(amounts, cap, temperature)).weights
    assert ours == pytest.approx(by_seqio(amounts, cap, temperature))


@pytest.fixture
def pool(tmp_path):
    with open(tmp_path / "pool.jsonl", "w") as file:
        for source, count in {"large": 60, "middle": 20, "small": 6}.items():
            for i in range(count):
                row = {"source": source, "prompt": f"where lives {'tom ' * (i % 4)}?"}
                file.write(json.dumps({**row, "completion": "oslo"}) + "\n")
    return tmp_path / "pool.jsonl"


def test_without_cap_and_temperature_an_epoch_is_the_pool(pool, tmp_path):
    rows = Examples.read(pool)
    found = Proportional().select(rows, tiny.run_in(tmp_path / "run"))
    assert sorted(found.chosen.ids) == sorted(rows.ids)


def test_a_cap_is_met_without_repeats(pool, tmp_path):
    found = Proportional(cap=20).select(Examples.read(pool), tiny.run_in(tmp_path / "run"))
    assert found.chosen.sources() == {"large": 20, "middle": 20, "small": 6}
    assert found.weights.about["before"]["large"] == 60 / 86


def test_tokens_count_where_they_should(pool, tmp_path):
    from deltaloom.core.base import Base
    from deltaloom.core.encoding import encode

    base, rows = Base(model=str(tiny.base_in(tmp_path / "base"))), Examples.read(pool)
    lengths = {r.id: len(r.input_ids) for r in encode(rows, base.tokenizer(), 64)}
    method = Proportional(unit="tokens", cap=None, temperature=1e9, size=60, repeats=2)
    found = method.select(rows, tiny.run_in(tmp_path / "run"), base=base)
    spent = {name: 0 for name in ("large", "middle", "small")}
    for row in found.chosen:
        spent[row.source] += lengths[row.id.partition("-copy")[0]]
    assert all(abs(amount - 20) <= max(lengths.values()) / 2 for amount in spent.values())
    with pytest.raises(InputError, match="needs base="):
        method.select(rows, tiny.run_in(tmp_path / "other"))


def test_tuning_reads_the_weights_of_a_step_and_of_a_file(pool, tmp_path):
    base = str(tiny.base_in(tmp_path / "base"))
    tune = {"method": "lora", "data": str(pool), "epochs": 1, "lr": 1e-3}
    by_hand = tmp_path / "mine.json"
    by_hand.write_text('{"weights": {"small": 1, "middle": 1, "large": 0}, "repeats": 2}')
    recipe = {
        "base": base,
        "steps": [
            {"select": {"method": "proportional", "pool": str(pool), "cap": 6, "name": "mix"}},
            {"tune": {**tune, "weights": "mix", "name": "by-step"}},
            {"tune": {**tune, "data": "mix", "name": "by-rows"}},
            {"tune": {**tune, "weights": str(by_hand), "name": "by-file"}},
        ],
    }
    deltaloom.run(recipe, out=tmp_path / "out")
    read = {name: deltaloom.Run.read(tmp_path / "out" / name) for name in ("by-step", "by-file")}
    assert read["by-step"]["notes"]["mixed_sources"] == {"large": 6, "middle": 6, "small": 6}
    assert read["by-file"]["notes"]["mixed_sources"] == {"middle": 12, "small": 12}
    assert read["by-file"]["notes"]["repeated_sources"] == {"small": 2.0}
    # The step's folder also is the epoch, so both ways tune on the same rows in the same order.
    weights = [
        (tmp_path / "out" / name / "adapter_model.safetensors").read_bytes()
        for name in ("by-step", "by-rows")
    ]
    assert weights[0] == weights[1]
    # What is recorded replays alone.
    replay = tmp_path / "out" / "by-step" / "recipe.yaml"
    assert str(tmp_path / "out" / "mix") in replay.read_text()
    deltaloom.run(replay, out=tmp_path / "again")


def test_tuning_mixes_by_tokens(pool, tmp_path):
    from deltaloom.core.base import Base
    from deltaloom.recipe.execute import _mixed

    base, rows = Base(model=str(tiny.base_in(tmp_path / "base"))), Examples.read(pool)
    weights = SourceWeights({"large": 1, "middle": 1, "small": 0}, "tokens", 80)
    run = tiny.run_in(tmp_path / "run")
    mixed = _mixed(rows, weights, base, run)
    assert 3 <= mixed.sources()["large"] <= 20
    assert run.record["notes"]["repeated_sources"] == {}


def test_weights_that_name_no_source_end_before_any_work(pool, tmp_path):
    base = str(tiny.base_in(tmp_path / "base"))
    by_hand = tmp_path / "mine.json"
    by_hand.write_text('{"weights": {"smal": 1, "large": 1}}')
    with pytest.raises(InputError, match="no weight for the source 'middle'"):
        deltaloom.tune("lora", base=base, data=pool, weights=by_hand, out=tmp_path / "out")
