"""Packed rows are the rows, in few bytes."""

import pickle

import pytest

from deltaloom.core.encoding import Encoded, encode
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples, parse
from deltaloom.core.packed import PackedRows, encode_packed

ROWS = [
    Encoded("a", [3, 70_000, 5], [0, 1, 1]),
    Encoded("b", [], [], truncated=True),
    Encoded("c", [9], [0], False, 2),
    Encoded("d", [1, 2], [0, 0], True, 0),
]


def test_rows_come_back_as_they_were():
    packed = PackedRows(ROWS)
    assert list(packed) == ROWS
    assert packed[-1] == ROWS[-1]
    assert packed[1:3] == ROWS[1:3]
    assert list(pickle.loads(pickle.dumps(packed))) == ROWS
    assert packed.cut == 2
    with pytest.raises(IndexError):
        packed[4]
    assert list(PackedRows([])) == []


def test_a_token_takes_five_bytes():
    rows = [Encoded(str(i), list(range(1000, 2000)), [1] * 1000) for i in range(50)]
    assert len(pickle.dumps(PackedRows(rows))) < 50 * 1000 * 5 * 1.05


def test_packing_is_encoding(llama):
    tokenizer = llama.tokenizer()
    data = Examples(
        parse(f"f:{i}", "f", {"prompt": "one two " * i, "completion": "three"}) for i in range(1, 6)
    )
    assert list(encode_packed(data, tokenizer, 8)) == encode(data, tokenizer, 8)
    empty = Examples([parse("f:7", "f", {"prompt": "one", "completion": ""})])
    with pytest.raises(InputError, match="f:7"):
        encode_packed(empty, tokenizer, 8)
