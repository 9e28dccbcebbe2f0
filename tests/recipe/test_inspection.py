"""What `deltaloom check` says of a features folder, whole and stopped half-way."""

import numpy as np
import pytest

from deltaloom.core.errors import InputError
from deltaloom.core.features import Features
from deltaloom.recipe.inspection import inspect


@pytest.fixture
def store(tmp_path):
    ids = [str(number) for number in range(9)]
    return Features.create(tmp_path / "f", ids, 4, about={}, dtype="int8", shard_rows=2)


def test_a_whole_store_tells_its_shape(store):
    for number, rows in enumerate(store.shards()):
        store.write_shard(number, np.ones((len(rows), 4)))
    found = inspect(store.folder)
    assert found == {"kind": "features", "rows": 9, "width": 4, "dtype": "int8"}


def test_a_store_stopped_half_way_tells_what_is_missing(store):
    for number in (0, 3):
        store.write_shard(number, np.ones((2, 4)))
    with pytest.raises(InputError, match=r"f/shards: shards 1-2, 4 of 5 missing; run the step"):
        inspect(store.folder)
