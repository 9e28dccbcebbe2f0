"""Rows of tables in another order, beside a loop over tokens, however blocks are cut."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from deltaloom.merge._compat_numbers import Numbers
from deltaloom.merge._tables import RowsPart, origins


@dataclass
class Array:
    """A table in memory that counts its reads."""

    values: np.ndarray
    reads: int = 0
    gives_change: bool = False
    held: int = 0
    path: Path = Path("array")

    def fill(self, start, out, scratch):
        self.reads += 1
        assert scratch.nbytes >= 8 * out.size
        out[:] = self.values.reshape(-1)[start : start + out.size]


def case(seed, columns, padding):
    draw = np.random.default_rng(seed)
    tokens = [f"t{i}" for i in range(60)]
    models = [
        {token: i for i, token in enumerate(draw.permutation(tokens)[: 30 + 10 * k])}
        for k in range(3)
    ]
    wanted = {token: int(i) for token, i in zip(tokens, draw.permutation(64)[:60], strict=True)}
    rows = [25, 45, 50]  # the first has no row for its last tokens, the second has some more
    parts = tuple(Array(draw.normal(size=(n, columns)).astype(np.float32)) for n in rows)
    return wanted, models, rows, parts, padding


def dense(wanted, models, rows, parts, padding, base):
    size = max(wanted.values()) + 1
    out = np.zeros((len(parts), size + padding, parts[0].values.shape[1]), np.float64)
    for token, at in wanted.items():
        has = {
            k: parts[k].values[own[token]].astype(np.float64)
            for k, own in enumerate(models)
            if own.get(token, 99) < rows[k]
        }
        fallback = has.get(base)
        if has and fallback is None:
            fallback = sum(has.values()) / len(has)
        for k in range(len(parts)):
            out[k, at] = 0.0 if not has else has.get(k, fallback)
    out[:, size:] = out[:, :size].mean(1, keepdims=True)
    return out


@pytest.mark.parametrize("columns", [1, 7])
@pytest.mark.parametrize(("base", "padding"), [(None, 0), (0, 3), (2, 0)])
@pytest.mark.parametrize("seed", range(4))
def test_every_cut(seed, columns, base, padding):
    wanted, models, rows, parts, padding = case(seed, columns, padding)
    found = origins(wanted, models, rows, base)
    found = type(found)(found.own, found.given, found.row, padding)
    expected = dense(wanted, models, rows, parts, padding, base)
    draw = np.random.default_rng(seed)
    for place in range(3):
        part = RowsPart(parts, found, place, columns, Numbers("float32"))
        whole = expected[place].reshape(-1)
        start = 0
        while start < whole.size:
            n = min(int(draw.integers(1, 40)), whole.size - start)
            out = np.empty(n, np.float32)
            part.fill(start, out, np.empty(8 * n, np.uint8))
            np.testing.assert_allclose(out, whole[start : start + n], rtol=1e-6, atol=1e-6)
            start += n


def test_neighbours_are_read_at_once():
    numbers = {f"t{i}": i for i in range(1000)}
    part = Array(np.zeros((1000, 4), np.float32))
    found = origins(numbers | {"new": 1000}, [numbers, {"new": 0}], [1000, 1], None)
    out = np.empty(1000 * 4, np.float32)
    rows = RowsPart((part, Array(np.ones((1, 4), np.float32))), found, 0, 4, Numbers("float32"))
    rows.fill(0, out, np.empty(8 * out.size, np.uint8))
    assert part.reads == 1
