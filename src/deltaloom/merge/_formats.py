"""Number formats of weights on disk: to and from the floats that are merged, and compared."""

from __future__ import annotations

import numpy as np

from deltaloom.core.tensors import TensorFolder

FLOATS = ("F64", "F32", "F16", "BF16")
KINDS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def widen(raw: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """out (n,) float32 or float64 = the numbers in `raw` (bytes, uint8) of a safetensors dtype."""
    if dtype != "BF16":
        out[:] = raw.view(KINDS[dtype])
        return
    bits = out.view(np.uint32) if out.dtype == np.float32 else np.empty(out.size, np.uint32)
    bits[:] = raw.view(np.uint16)
    np.left_shift(bits, 16, out=bits)
    if out.dtype != np.float32:
        out[:] = bits.view(np.float32)


def narrow(values: np.ndarray, dtype: str, raw: np.ndarray) -> None:
    """raw (bytes, uint8) = values (n,) float32 or float64 to nearest even in a safetensors dtype"""
    if dtype != "BF16":
        with np.errstate(over="ignore"):  # too large for float16 becomes infinity, as in torch
            raw.view(KINDS[dtype])[:] = values
        return
    from deltaloom.merge import _native

    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(values, np.float32)
    _native.narrow(single, raw.view(np.uint16))


def same_bytes(a: TensorFolder, name: str, b: TensorFolder, other: str) -> bool:
    """Whether two tensors of equal shape and dtype are equal to the bit, compared piece by piece"""
    pieces = _pieces(a[name].count)
    return all(np.array_equal(a.raw(name, *cut), b.raw(other, *cut)) for cut in pieces)


def same_numbers(a: TensorFolder, name: str, b: TensorFolder, other: str) -> bool:
    """Whether two float tensors are equal as float32 in shape and numbers, whatever their dtype."""
    if a[name].shape != b[other].shape or not {a[name].dtype, b[other].dtype} <= {*FLOATS}:
        return False
    for start, stop in _pieces(a[name].count):
        left, right = np.empty((2, stop - start), np.float32)
        widen(a.raw(name, start, stop), a[name].dtype, left)
        widen(b.raw(other, start, stop), b[other].dtype, right)
        if not np.array_equal(left, right):
            return False
    return True


def _pieces(count: int, step: int = 1 << 16) -> list[tuple[int, int]]:
    return [(start, min(start + step, count)) for start in range(0, count, step)]
