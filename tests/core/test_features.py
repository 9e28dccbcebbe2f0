"""Feature stores: aligned to ids, resumed shard by shard, and nothing foreign or half is read."""

import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file
from safetensors.torch import load_file

from deltaloom.core import features
from deltaloom.core._shard import quantised, to_bfloat16
from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.features import DTYPES, Features, require_same_space

ABOUT = {"what": "gradients", "base": "aaaa", "seed": 0}
IDS = [f"row{i}" for i in range(7)]
ROWS = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)


def store(folder, about=ABOUT, ids=IDS, width=3, shard_rows=3, **options):
    return Features.create(folder, ids, width, about=about, shard_rows=shard_rows, **options)


def full(folder, **options):
    return filled(store(folder, **options), ROWS)


def filled(made, values):
    for number, rows in enumerate(made.shards()):
        made.write_shard(number, values[rows.start : rows.stop])
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


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
MATRICES = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=FINITE)


def written(folder, values, dtype):
    made = store(
        folder, ids=[str(i) for i in range(len(values))], width=values.shape[1], dtype=dtype
    )
    return filled(made, values)


@given(MATRICES)
def test_float32_comes_back_as_it_was(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("f")
    written(folder, values, "float32")
    assert Features.open(folder).matrix().tobytes() == values.tobytes()


@given(MATRICES)
def test_float16_is_numpys_rounding(tmp_path_factory, values):
    values = np.clip(values, -65504, 65504)
    folder = tmp_path_factory.mktemp("f")
    written(folder, values, "float16")
    wanted = values.astype(np.float16).astype(np.float32)
    assert Features.open(folder).matrix().tobytes() == wanted.tobytes()


@given(MATRICES)
def test_bfloat16_is_torchs_rounding(tmp_path_factory, values):
    wanted = torch.from_numpy(values).bfloat16()
    folder = tmp_path_factory.mktemp("f")
    if not wanted.isfinite().all():
        with pytest.raises(WorkError, match="not finite in bfloat16"):
            written(folder, values, "bfloat16")
        return
    written(folder, values, "bfloat16")
    assert Features.open(folder).matrix().tobytes() == wanted.float().numpy().tobytes()


@given(MATRICES)
def test_int8_is_absmax_by_row(tmp_path_factory, values):
    values = np.clip(values, -1.7e38, 1.7e38)
    folder = tmp_path_factory.mktemp("f")
    written(folder, values, "int8")
    got = Features.open(folder).matrix()
    whole, scale = quantised(values)
    for row, back, q, one in zip(values.astype(float), got, whole, scale, strict=True):
        absmax = np.abs(row).max()
        assert one == np.float32(absmax) / np.float32(127)
        assert back.tolist() == (q.astype(np.float32) * one).tolist()
        if absmax == 0:
            assert one == 0
            assert not back.any()
        elif one > 1e-30:  # where a scale has float32's full precision
            wanted = [round(x / float(one)) for x in row]
            assert np.abs(q - wanted).max() <= 1  # a tie may fall either way
            assert np.abs(back - row).max() <= one * 0.5001
            assert np.abs(q).max() == 127


def test_int8_by_hand(tmp_path):
    values = np.array([[254.0, -127.0, 3.1, 0.9], [0, 0, 0, 0]], np.float32)
    written(tmp_path / "f", values, "int8")
    got = load_file(shard(tmp_path / "f", 0))
    assert got["rows"].tolist() == [[127, -64, 2, 0], [0, 0, 0, 0]]
    assert got["scale"].tolist() == [2.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_are_files_of_the_safetensors_package(tmp_path, dtype):
    made = full(tmp_path / "f", dtype=dtype)
    found = load_file(shard(tmp_path / "f", 1))  # read by their package into torch
    assert found["rows"].dtype == getattr(torch, dtype)
    values = found["rows"].float()
    if dtype == "int8":
        values = values * found["scale"][:, None]
    assert values.numpy().tobytes() == made.matrix()[3:6].tobytes()
    bytes_per_row = {"float32": 12, "float16": 6, "bfloat16": 6, "int8": 3 + 4}[dtype]
    header = int.from_bytes(shard(tmp_path / "f", 1).read_bytes()[:8], "little") + 8
    assert shard(tmp_path / "f", 1).stat().st_size == header + 3 * bytes_per_row


def test_shards_that_the_safetensors_package_wrote_are_read(tmp_path):
    made = full(tmp_path / "f")
    own = {"rows": np.ascontiguousarray(ROWS[3:6] + 1)}
    save_file(own, shard(tmp_path / "f", 1), metadata=made._mark(1))
    np.testing.assert_array_equal(Features.open(tmp_path / "f").matrix()[3:6], ROWS[3:6] + 1)


def test_bfloat16_ties_go_to_the_even_neighbour():
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF818000], np.uint32)
    assert [hex(half) for half in to_bfloat16(bits.view(np.float32))] == [
        "0x3f80",
        "0x3f82",
        "0x3f81",
        "0xbf82",
    ]


def test_other_types_are_refused(tmp_path):
    with pytest.raises(InputError, match="stored as 'int4'; use float32, float16, bfloat16, int8"):
        store(tmp_path / "f", dtype="int4")
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_rows_give_the_same_bytes(tmp_path, dtype):
    made = full(tmp_path / "f", dtype=dtype)
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


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ([1], "shard 1 of 7 missing; run the step again"),
        ([0, 6], "shards 0, 6 of 7 missing"),
        ([1, 2, 3, 5], "shards 1-3, 5 of 7 missing"),
        ([*range(7)], "shards 0-6 of 7 missing"),
    ],
)
def test_missing_shards_are_named(tmp_path, gone, said):
    full(tmp_path / "f", shard_rows=1)
    for number in gone:
        shard(tmp_path / "f", number).unlink()
    with pytest.raises(InputError, match=f"f/shards: {said}"):
        Features.open(tmp_path / "f")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left", [0, 4, 60, -2])
def test_a_truncated_shard_is_named(tmp_path, left, dtype):
    full(tmp_path / "f", dtype=dtype)
    path = shard(tmp_path / "f", 2)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(InputError, match=r"00002.safetensors is cut short .*remove it and run"):
        Features.open(tmp_path / "f")


@pytest.mark.parametrize(
    "tensors",
    [
        {"rows": np.zeros((2, 3), np.float32)},
        {"rows": np.zeros((3, 3), np.float16)},
        {"rows": np.zeros((3, 3), np.int8)},
        {"rows": np.zeros((3, 3), np.int32)},
        {"other": np.zeros((3, 3), np.float32)},
    ],
)
def test_a_shard_of_another_shape_or_type_is_named(tmp_path, tensors):
    made = full(tmp_path / "f")
    save_file(tensors, shard(tmp_path / "f", 1), metadata=made._mark(1))
    with pytest.raises(InputError, match=r"00001.safetensors is .*damaged; remove it and run"):
        Features.open(tmp_path / "f")


def test_a_shard_lost_while_it_is_read_is_named(tmp_path):
    made = full(tmp_path / "f")
    shard(tmp_path / "f", 1).unlink()
    with pytest.raises(InputError, match=r"00001.safetensors is missing; run the step again"):
        made.matrix()


def test_removing_a_damaged_shard_makes_it_missing_again(tmp_path):
    full(tmp_path / "f")
    path = shard(tmp_path / "f", 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    path.unlink()
    again = store(tmp_path / "f")
    assert again.missing() == [1]
    again.write_shard(1, ROWS[3:6])
    assert path.read_bytes() == whole


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


@pytest.mark.parametrize(
    ("dtype", "over", "under"),  # 1e39 is beyond float32
    [
        ("float16", 65520.0, 65519.0),
        ("bfloat16", 3.4e38, 3.39e38),
        ("float32", 1e39, 3.4e38),
        ("int8", 1.8e38, 1.7e38),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_what_a_format_cannot_hold_is_refused(tmp_path, dtype, over, under, sign):
    made = store(tmp_path / "f", dtype=dtype)
    rows = np.zeros((3, 3))
    rows[1, 2] = sign * over
    known = f" in {dtype}" if over < 3.41e38 else ""
    with pytest.raises(WorkError, match=f"'row1' has values that are not finite{known};"):
        made.write_shard(0, rows)
    assert made.missing() == [0, 1, 2]
    made.write_shard(0, rows / over * under)
    assert np.isfinite(next(made.blocks())[1]).all()


def test_rows_of_another_shape_are_refused(tmp_path):
    made = store(tmp_path / "f")
    with pytest.raises(ValueError, match=r"shape \(3, 3\), not \(2, 3\)"):
        made.write_shard(0, ROWS[:2])
    assert made.missing() == [0, 1, 2]


# Inner products with queries.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 7, 2**22])
@pytest.mark.parametrize("shard_rows", [1, 3, 50])
def test_scores_are_the_inner_products(tmp_path, monkeypatch, dtype, block, shard_rows):
    monkeypatch.setattr(features, "BLOCK", block)
    rng = np.random.default_rng(1)
    values, queries = rng.normal(size=(11, 5)), rng.normal(size=(4, 5))
    made = store(
        tmp_path / "f",
        ids=[str(i) for i in range(11)],
        width=5,
        dtype=dtype,
        shard_rows=shard_rows,
    )
    got = filled(made, values).scores(queries)
    assert got.shape == (11, 4)
    assert got.dtype == np.float32
    stored = made.matrix().astype(float)
    wanted = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in queries] for a in stored]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
    error = {"float32": 1e-6, "float16": 5e-3, "bfloat16": 4e-2, "int8": 6e-2}[dtype]
    np.testing.assert_allclose(got, values @ queries.T, rtol=0, atol=error * 3)


def test_queries_of_another_width_are_refused(tmp_path):
    made = full(tmp_path / "f")
    for queries in (np.zeros((2, 4)), np.zeros(3)):
        with pytest.raises(ValueError, match=r"queries must have shape \(t, 3\)"):
            made.scores(queries)


PEAK = """
import resource, sys
import numpy as np
from deltaloom.core.features import Features
store = Features.open(sys.argv[1])
queries = np.ones((2, store.width), np.float32)
store.scores(queries[:, :] * 0)  # everything that is loaded once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store.scores(queries)
print(len(store), before)
"""


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_does_not_grow_with_the_store(tmp_path, dtype):
    peaks = []
    for rows in (512, 8192):  # 4 and 64 MiB of float32
        folder = tmp_path / str(rows)
        ids = [str(i) for i in range(rows)]
        made = store(folder, ids=ids, width=2048, dtype=dtype, shard_rows=256)
        block = np.ones((256, 2048), np.float32)
        for number in range(len(made.shards())):
            made.write_shard(number, block)
        told = subprocess.run(
            [sys.executable, "-c", PEAK, str(folder)], capture_output=True, text=True, check=True
        )
        peaks.append(int(told.stdout.split()[1]) / 1024)
    assert peaks[1] - peaks[0] < 8


# Two stores.

GRADIENTS = {
    "base": "aaaa",
    "checkpoint": "epoch-1",
    "projection": {"kind": "sparse", "dimension": 3, "seed": 0},
    "data": "pool",
}


def test_stores_of_one_space_may_be_compared(tmp_path):
    a = full(tmp_path / "a", about=GRADIENTS, dtype="int8")
    b = full(tmp_path / "b", about={**GRADIENTS, "data": "target", "what": "queries"})
    require_same_space(a, b)
    require_same_space(full(tmp_path / "c", about={}), full(tmp_path / "d", about={"x": 1}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": "bbbb"}, "base: 'aaaa' there, 'bbbb' here.; compute both with the same base"),
        ({"checkpoint": "epoch-2"}, "checkpoint: 'epoch-1' there, 'epoch-2' here"),
        (
            {"projection": {"kind": "sparse", "dimension": 3, "seed": 1}},
            "projection.seed: 0 there, 1 here.; compute both with the same projection",
        ),
        (
            {"projection": {"kind": "sparse", "dimension": 4, "seed": 0}},
            "projection.dimension: 3 there, 4 here",
        ),
        ({"projection": None}, "projection: "),
        ({"pooling": "weighted"}, "pooling: None there, 'weighted' here"),
    ],
)
def test_stores_of_two_spaces_may_not(tmp_path, change, said):
    a = full(tmp_path / "a", about=GRADIENTS)
    b = full(tmp_path / "b", about={**GRADIENTS, **change})
    with pytest.raises(InputError, match=f"b cannot be compared with {a.folder} .different {said}"):
        require_same_space(a, b)


def test_stores_of_two_widths_may_not_be_compared(tmp_path):
    a, b = full(tmp_path / "a"), store(tmp_path / "b", width=4)
    with pytest.raises(InputError, match="different width: 3 there, 4 here"):
        require_same_space(a, b)


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
