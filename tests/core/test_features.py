"""Feature stores: aligned to ids, resumed shard by shard, and nothing foreign or half is read."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.features import Features

ABOUT = {"what": "gradients", "base": "aaaa", "seed": 0}
IDS = [f"row{i}" for i in range(7)]
ROWS = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)


def store(folder, about=ABOUT, ids=IDS, width=3, shard_rows=3, **options):
    return Features.create(folder, ids, width, about=about, shard_rows=shard_rows, **options)


def full(folder, **options):
    made = store(folder, **options)
    for number, rows in enumerate(made.shards()):
        made.write_shard(number, ROWS[rows.start : rows.stop])
    return made


def shard(folder, number):
    return folder / "shards" / f"{number:05d}.safetensors"


def test_what_was_written_is_read(tmp_path):
    full(tmp_path / "f", columns={"source": list("abcabca")})
    found = Features.open(tmp_path / "f")
    assert (found.ids, found.width, len(found)) == (IDS, 3, 7)
    assert found.index["source"] == list("abcabca")
    assert found.header["about"] == ABOUT
    np.testing.assert_array_equal(found.matrix(), ROWS)
    assert found.matrix().dtype == np.float32
    assert [(r.start, r.stop) for r, _ in found.blocks()] == [(0, 3), (3, 6), (6, 7)]


@given(st.integers(0, 9), st.integers(1, 4), st.integers(1, 12))
def test_any_number_of_rows_in_any_shards(tmp_path_factory, rows, width, shard_rows):
    folder = tmp_path_factory.mktemp("f")
    values = np.arange(rows * width, dtype=np.float32).reshape(rows, width)
    made = store(folder, ids=[str(i) for i in range(rows)], width=width, shard_rows=shard_rows)
    assert [i for block in made.shards() for i in block] == [*range(rows)]
    for number, block in enumerate(made.shards()):
        made.write_shard(number, values[block.start : block.stop])
    np.testing.assert_array_equal(Features.open(folder).matrix(), values)


def test_float16_is_stored_as_such_and_read_as_float32(tmp_path):
    full(tmp_path / "f", dtype="float16")
    found = Features.open(tmp_path / "f").matrix()
    np.testing.assert_array_equal(found, ROWS.astype(np.float16).astype(np.float32))
    assert found.dtype == np.float32
    assert not np.array_equal(found, ROWS)


def test_other_types_are_refused(tmp_path):
    with pytest.raises(InputError, match="stored as 'int8'; use float32 or float16"):
        store(tmp_path / "f", dtype="int8")
    assert not (tmp_path / "f").exists()


def test_the_same_rows_give_the_same_bytes(tmp_path):
    made = full(tmp_path / "f")
    first = shard(tmp_path / "f", 1).read_bytes()
    for _ in range(12):
        made.write_shard(1, ROWS[3:6])
        assert shard(tmp_path / "f", 1).read_bytes() == first


# Resumption.


def test_only_the_missing_shards_are_left_to_do(tmp_path):
    first = store(tmp_path / "f")
    first.write_shard(1, ROWS[3:6])
    again = store(tmp_path / "f")
    assert again.missing() == [0, 2]
    again.write_shard(0, ROWS[:3])
    again.write_shard(2, ROWS[6:])
    assert again.missing() == []
    np.testing.assert_array_equal(Features.open(tmp_path / "f").matrix(), ROWS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"about": {**ABOUT, "seed": 1}}, "header.about.seed: 0 there, 1 here"),
        ({"ids": IDS[::-1]}, "header.ids"),
        ({"width": 4}, "header.width: 3 there, 4 here"),
        ({"dtype": "float16"}, "header.dtype: 'float32' there, 'float16' here"),
        ({"shard_rows": 4}, "header.shard_rows"),
    ],
)
def test_another_store_is_refused_by_what_differs(tmp_path, change, said):
    full(tmp_path / "f")
    with pytest.raises(InputError, match=f"something else .different {said}.*remove that folder"):
        store(tmp_path / "f", **change)
    np.testing.assert_array_equal(Features.open(tmp_path / "f").matrix(), ROWS)


def test_a_store_stopped_before_its_header_is_started_again(tmp_path):
    (tmp_path / "f" / "shards").mkdir(parents=True)
    (tmp_path / "f" / ".index.parquet.part").write_text("half")
    full(tmp_path / "f")
    np.testing.assert_array_equal(Features.open(tmp_path / "f").matrix(), ROWS)


# Damage.


def test_a_missing_shard_is_named(tmp_path):
    full(tmp_path / "f")
    shard(tmp_path / "f", 1).unlink()
    with pytest.raises(InputError, match=r"00001.safetensors is missing; run the step again"):
        Features.open(tmp_path / "f")


@pytest.mark.parametrize("left", [0, 4, 60, -2])
def test_a_truncated_shard_is_named(tmp_path, left):
    full(tmp_path / "f")
    path = shard(tmp_path / "f", 2)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(InputError, match=r"00002.safetensors is damaged .*remove it and run"):
        Features.open(tmp_path / "f")


def test_a_shard_of_other_features_is_named(tmp_path):
    full(tmp_path / "f")
    full(tmp_path / "g", about={"what": "losses"})
    shard(tmp_path / "f", 0).write_bytes(shard(tmp_path / "g", 0).read_bytes())
    with pytest.raises(InputError, match=r"f/shards/00000.safetensors belongs to other features"):
        Features.open(tmp_path / "f")


def test_a_shard_in_anothers_place_is_named(tmp_path):
    full(tmp_path / "f")
    shard(tmp_path / "f", 0).write_bytes(shard(tmp_path / "f", 1).read_bytes())
    with pytest.raises(InputError, match=r"00000.safetensors belongs to other features"):
        Features.open(tmp_path / "f")


def test_an_index_of_other_rows_is_named(tmp_path):
    full(tmp_path / "f")
    full(tmp_path / "g", ids=IDS[::-1])
    index = tmp_path / "g" / "index.parquet"
    (tmp_path / "f" / "index.parquet").write_bytes(index.read_bytes())
    with pytest.raises(InputError, match=r"f/index.parquet belongs to other features"):
        Features.open(tmp_path / "f")


def test_a_folder_without_features_is_named(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path} holds no features"):
        Features.open(tmp_path)


def test_a_store_without_its_index_is_named(tmp_path):
    full(tmp_path)
    (tmp_path / "index.parquet").unlink()
    with pytest.raises(InputError, match=f"{tmp_path}: no features there"):
        Features.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{\n"schema"', "header.json line 2: not JSON"),
        ("[]", "schema None, this version reads 1"),
        ('{"schema": 9}', "header.json: schema 9, this version reads 1"),
    ],
)
def test_a_broken_header_is_named(tmp_path, text, said):
    full(tmp_path)
    (tmp_path / "header.json").write_text(text)
    with pytest.raises(InputError, match=said):
        Features.open(tmp_path)
    with pytest.raises(InputError, match=said):
        store(tmp_path)


# Values.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_name_the_row_and_write_nothing(tmp_path, bad):
    made = store(tmp_path / "f")
    rows = ROWS[3:6].copy()
    rows[1, 2] = bad
    with pytest.raises(WorkError, match="f: row 'row4' has values that are not finite"):
        made.write_shard(1, rows)
    assert made.missing() == [0, 1, 2]
    assert [*(tmp_path / "f" / "shards").iterdir()] == []


def test_what_float16_cannot_hold_is_refused(tmp_path):
    made = store(tmp_path / "f", dtype="float16")
    with pytest.raises(WorkError, match="'row0' has values that are not finite in float16"):
        made.write_shard(0, np.full((3, 3), 1e5))


def test_rows_of_another_shape_are_refused(tmp_path):
    made = store(tmp_path / "f")
    with pytest.raises(ValueError, match=r"shape \(3, 3\), not \(2, 3\)"):
        made.write_shard(0, ROWS[:2])
    assert made.missing() == [0, 1, 2]


# Scores.


def test_scores_are_features_of_width_one(tmp_path):
    made = Features.from_scores(
        tmp_path / "s", IDS, ROWS[:, 0], about=ABOUT, columns={"length": range(7)}
    )
    found = Features.open(tmp_path / "s")
    assert (found.width, found.ids, made.ids) == (1, IDS, IDS)
    np.testing.assert_array_equal(found.matrix(), ROWS[:, :1])
    table = pq.read_table(tmp_path / "s" / "index.parquet").to_pydict()
    assert table["score"] == ROWS[:, 0].tolist()
    assert table["length"] == [*range(7)]


def test_scores_written_again_agree_in_shard_and_index(tmp_path):
    for scores in (ROWS[:, 0], ROWS[:, 1]):
        Features.from_scores(tmp_path / "s", IDS, scores, about=ABOUT)
        found = Features.open(tmp_path / "s")
        assert found.index["score"] == found.matrix()[:, 0].tolist() == scores.tolist()


def test_bad_scores_leave_nothing(tmp_path):
    with pytest.raises(WorkError, match="row 'row2' has values that are not finite"):
        Features.from_scores(tmp_path / "s", IDS, [0, 1, np.nan, 3, 4, 5, 6], about=ABOUT)
    with pytest.raises(ValueError, match="2 scores for 7 ids"):
        Features.from_scores(tmp_path / "s", IDS, [0, 1], about=ABOUT)
    assert not (tmp_path / "s").exists()


def test_the_header_on_disk_is_what_the_store_says(tmp_path):
    made = full(tmp_path / "f")
    assert json.loads((tmp_path / "f" / "header.json").read_text()) == made.header
