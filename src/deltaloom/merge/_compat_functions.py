"""Functions whose last bits are torch's own, and so are taken from torch.

Its sine, cosine, arccosine, logarithm and softmax come from vector libraries that are a unit in the
last place off where the nearest number is another, its inner product from a BLAS: which of them,
and in what order it adds, the machine decides. But for the inner product, which sees whole vectors,
an element's result depends on nothing but the element (softmax: its row), so blocks may be cut
anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from deltaloom.merge._compat_numbers import Numbers


def as_torch(name: str, values: Any, numbers: Numbers, *others: Any, **more: Any) -> np.ndarray:
    """torch's function `name` of numbers of the format, in a new array."""
    import torch

    # copied into torch's own memory: how numbers lie in it decides how its BLAS adds
    kind = getattr(torch, numbers.name)
    tensors = [torch.tensor(np.asarray(one, numbers.work), dtype=kind) for one in (values, *others)]
    wide = torch.float64 if numbers.name == "float64" else torch.float32
    return getattr(torch, name)(*tensors, **more).to(wide).numpy()


@contextmanager
def one_thread() -> Iterator[None]:
    """torch's functions on one thread each, as they run beside each other here."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
