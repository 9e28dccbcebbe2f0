"""The weights file, and that an epoch by it is exact."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.core.errors import InputError
from deltaloom.core.examples import Example, Examples
from deltaloom.core.source_weights import SourceWeights, epoch


def pool(**counts):
    return Examples(
        Example(f"{name}{i}", name, f"pool line {i}", prompt="q", completion="a")
        for name, count in counts.items()
        for i in range(count)
    )


def test_a_file_as_a_person_writes_it_is_read(tmp_path):
    (tmp_path / "weights.json").write_text('{"weights": {"b": 1, "a": 3}}')
    found = SourceWeights.read(tmp_path)
    assert (found.weights, found.unit, found.size, found.repeats) == (
        {"a": 0.75, "b": 0.25}, "examples", None, 1,
    )  # fmt: skip


def test_what_is_written_is_read_back(tmp_path):
    ours = SourceWeights({"a": 0.1, "b": 0.7}, "tokens", 900, 2.5, {"before": {"a": 0.5}})
    ours.write(tmp_path)
    assert SourceWeights.read(tmp_path / "weights.json").record() == ours.record()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"weights": {"a": -1}}', "weight of 'a' is -1"),
        ('{"weights": {"a": "x"}}', "weight of 'a' is 'x'"),
        ('{"weights": {"a": 0}}', "no source has a weight above 0"),
        ('{"weights": {"a": 1}, "unti": "tokens"}', "did you mean 'unit'"),
        ('{"weights": {"a": 1}, "unit": "rows"}', "must be examples or tokens"),
        ('{"weights": {"a": 1}, "size": 0}', "size = 0"),
        ('{"weights": {"a": 1}, "repeats": 0.5}', "repeats = 0.5"),
        ('{"weights": {"a": 1}, "repeats": "2"}', "repeats = '2'"),
        ('{"weights": {"a": 1}, "schema": 7}', "reads schema 1"),
        ('{"weights": [1]}', "maps sources to numbers"),
        ('{"weights": {\n"a": }}', "line 2: not JSON"),
    ],
)
def test_a_bad_file_is_refused_with_its_name(tmp_path, content, says):
    path = tmp_path / "weights.json"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        SourceWeights.read(path)
    assert str(path) in str(error.value)
    assert says in str(error.value)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 5)), min_size=1, max_size=6),
    st.floats(1, 3),
)
def test_an_epoch_as_large_as_can_be_is_exact_and_repeats_nothing_too_often(sources, repeats):
    names = [f"s{k}" for k in range(len(sources))]
    rows = pool(**{name: count for name, (count, _) in zip(names, sources, strict=True)})
    wanted = {name: weight for name, (_, weight) in zip(names, sources, strict=True)}
    weights = SourceWeights(wanted, repeats=repeats)
    try:
        found = epoch(rows, weights, 3)
    except InputError:
        # One row rounded up to is more than a tiny epoch allows.
        return
    for name, share in weights.weights.items():
        assert abs(found.sources()[name] - share * len(found)) < 1
    assert len(set(found.ids)) == len(found)
    times = Counter(one.id.partition("-copy")[0] for one in found)
    for name, (count, _) in zip(names, sources, strict=True):
        own = [times[f"{name}{i}"] for i in range(count)]
        assert max(own) - min(own) <= 1
        assert max(own) <= -(-sum(own) // count)
        assert sum(own) <= -(-repeats * count // 1)


def test_same_seed_same_rows_another_seed_others():
    rows, weights = pool(a=50, b=50), SourceWeights({"a": 1, "b": 3}, size=40)
    assert epoch(rows, weights, 1).ids == epoch(rows, weights, 1).ids
    assert epoch(rows, weights, 1).ids != epoch(rows, weights, 2).ids


def test_oversampling_is_refused_with_what_would_do():
    weights = SourceWeights({"a": 1, "b": 1}, size=100, where="w.json")
    with pytest.raises(InputError, match=r"wants 50 of 'a', which has 20.*at most 40.*2\.5"):
        epoch(pool(a=20, b=90), weights, 0)
    twice = SourceWeights({"a": 1, "b": 1}, size=100, repeats=2.5)
    assert epoch(pool(a=20, b=90), twice, 0).sources() == {"a": 50, "b": 50}


def test_tokens_are_met_to_half_a_row():
    rows = pool(a=40, b=40)
    lengths = [3 if one.source == "a" else 10 for one in rows]
    weights = SourceWeights({"a": 1, "b": 1}, "tokens", 200)
    counts = epoch(rows, weights, 0, lengths).sources()
    assert abs(3 * counts["a"] - 100) <= 1.5
    assert abs(10 * counts["b"] - 100) <= 5
    with pytest.raises(InputError, match="needs base="):
        epoch(rows, weights, 0)


def test_sources_must_match():
    with pytest.raises(InputError, match="no weight for the source 'b'"):
        epoch(pool(a=2, b=2), SourceWeights({"a": 1}), 0)
    with pytest.raises(InputError, match="has no source 'cc'"):
        epoch(pool(a=2), SourceWeights({"a": 1, "cc": 1}), 0)
    assert epoch(pool(a=2, b=2), SourceWeights({"a": 1, "b": 0}), 0).sources() == {"a": 2}


def test_within_moves_only_what_a_source_lacks():
    weights = SourceWeights({"a": 2, "b": 1, "c": 1}, size=100)
    found = weights.within({"a": 20, "b": 90, "c": 90})
    assert found.weights == pytest.approx({"a": 0.2, "b": 0.4, "c": 0.4})
    assert epoch(pool(a=20, b=90, c=90), found, 0).sources() == {"a": 20, "b": 40, "c": 40}
    with pytest.raises(InputError, match="size smaller or repeats larger"):
        weights.within({"a": 20, "b": 30, "c": 30})


def test_copies_have_ids_that_a_reader_takes(tmp_path):
    rows = Examples([*pool(a=2), Example("a0-copy1", "a", "x", prompt="q", completion="a")])
    found = epoch(rows, SourceWeights({"a": 1}, size=9, repeats=3), 0)
    found.write(tmp_path / "rows.jsonl")
    assert len(Examples.read(tmp_path / "rows.jsonl")) == 9
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])["source"] == "a"
