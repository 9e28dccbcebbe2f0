"""Loops kept as machine code: their sums beside numpy's and torch's, and where they are kept."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from deltaloom.merge import _native

SIZES = (1, 7, 1024, 1025, 5000)


def bits(values):
    return torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()


def floats(words):
    return torch.from_numpy(words).view(torch.bfloat16).float().numpy()


@pytest.fixture(params=SIZES)
def arrays(request):
    draw = np.random.default_rng(request.param)
    base = draw.standard_normal(request.param).astype(np.float32)
    models = base + 0.1 * draw.standard_normal((3, request.param)).astype(np.float32)
    return base, models


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("added", [True, False])
def test_sums_are_those_of_numpy(arrays, dtype, added):
    base, models = (array.astype(dtype) for array in arrays)
    factors, common, changes = [1.0, 0.3, -2.0], 0.7, [False, True, False]
    out = np.empty_like(base)
    _native.add_models(base if added else None, base, models, changes, factors, common, out)
    parts = [m if given else m - base for m, given in zip(models, changes, strict=True)]
    total = dtype(factors[0]) * parts[0] + dtype(factors[1]) * parts[1]
    total = dtype(common) * (total + dtype(factors[2]) * parts[2])
    np.testing.assert_array_equal(out, base + total if added else total)


@pytest.mark.parametrize("added", [True, False])
def test_sums_of_stored_numbers_are_rounded_once(arrays, added):
    base, models = bits(arrays[0]), bits(arrays[1])
    factors, common = [1.0, 0.3, -2.0], 0.7
    out = np.empty_like(base)
    _native.add_bfloat16(base if added else None, models, factors, common, out)
    wide, whole = floats(base), np.empty(len(base), np.float32)
    plus = wide if added else None
    changes = [not added] * 3
    _native.add_models(plus, wide, floats(models), changes, factors, common, whole)
    np.testing.assert_array_equal(out, bits(whole))


def test_counts_of_changes_are_those_of_a_sort(arrays):
    base, models = bits(arrays[0]), bits(arrays[1])
    sizes = np.abs(floats(models[1]) - floats(base)).view(np.uint32)
    high = np.zeros(1 << 16, np.int64)
    _native.count_bfloat16(base, models[1], None, high)
    np.testing.assert_array_equal(high, np.bincount(sizes >> 15, minlength=1 << 16))
    low, wanted = np.zeros(1 << 15, np.int64), int(high.argmax())
    _native.count_bfloat16(base, models[1], wanted, low)
    inside = sizes[sizes >> 15 == wanted] & 0x7FFF
    np.testing.assert_array_equal(low, np.bincount(inside, minlength=1 << 15))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("equal", [0, 1, 3, 10**6])
def test_votes_on_stored_numbers_are_those_of_the_general_loops(arrays, normalize, equal):
    from deltaloom.merge import _kernels

    base, models = bits(arrays[0]), bits(arrays[1])
    models[2] = models[1]  # equal magnitudes
    changes = floats(models) - floats(base)
    limits = [int(np.median(np.abs(one)).view(np.uint32)) for one in changes]
    weights, out = np.array([1.0, 0.3, -0.5], np.float32), np.empty_like(base)
    left = np.full(3, equal)
    found = _native.elect_bfloat16(
        base, models, np.array(limits), left, weights, 0.7, normalize, out
    )
    assert not found
    for i, one in enumerate(changes):
        assert left[i] == _kernels.trim(one.view(np.uint32), limits[i], equal)
    wanted = np.empty(len(base), np.float32)
    _kernels.elect(floats(base), changes, weights, np.float32(0.7), normalize, wanted)
    np.testing.assert_array_equal(out, bits(wanted))
    models[0, -1] = 0x7FC0
    assert _native.elect_bfloat16(base, models, *np.zeros((2, 3), int), weights, 1.0, False, out)


def test_the_scratch_is_as_long_as_the_loops_take_it_to_be():
    from deltaloom.merge import _loops, _order

    assert _native.TILE == _loops.TILE
    for name in ("HIGH_BINS", "LOW_BITS", "LOW_BINS"):
        assert getattr(_order, name) == getattr(_loops, name)


def test_a_nan_stays_one_and_infinity_comes_through():
    models = np.array([[0x7F80, 0xFF80, 0x7FFF, 0x3F80]], np.uint16)
    out = np.empty(4, np.uint16)
    assert _native.add_bfloat16(None, models, [1.0], 1.0, out)
    assert not _native.add_bfloat16(None, models[:, :2].copy(), [1.0], 1.0, out[:2].copy())
    assert out.tolist() == [0x7F80, 0xFF80, 0x7FFF, 0x3F80]


def run(code, folder):
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_code_is_kept_checked_and_made_again(tmp_path):
    code = (
        "import sys, numpy as np; from deltaloom.merge import _native\n"
        "raw = np.empty(2, np.uint16); _native.narrow(np.array([1, -2], np.float32), raw)\n"
        "assert raw.tolist() == [0x3F80, 0xC000]; print('numba' in sys.modules)"
    )
    assert run(code, tmp_path) == "True"
    (kept,) = tmp_path.glob("*.o")
    assert run(code, tmp_path) == "False"
    kept.write_bytes(kept.read_bytes()[:-1])
    assert run(code, tmp_path) == "True"
    whole = kept.read_bytes()
    assert hashlib.sha256(whole[_native.HASH :]).digest() == whole[: _native.HASH]
    missing = tmp_path / "file"
    missing.write_text("")  # no folder can be made here, so nothing is kept
    assert run(code, missing / "inside") == "True"
