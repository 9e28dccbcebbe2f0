"""A change made smaller: model minus base as low-rank factors, few elements, or whole.

Tensors are read one at a time. Factors come from a randomized SVD (Halko, Martinsson and Tropp
2011, algorithms 4.4 and 5.1) whose cost is that of a few products with a thin matrix, and from an
exact one where the matrix is hardly larger than the rank; elements are the exact largest by
magnitude, equal ones by the lowest index.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from deltaloom.core.deltas._factors import Factors
from deltaloom.core.deltas._reading import EMBEDDINGS, HEADS
from deltaloom.core.deltas.dense import Dense, HeldChange
from deltaloom.core.deltas.lowrank import LowRank, Reduced
from deltaloom.core.deltas.sparse import Elements, Sparse
from deltaloom.core.errors import InputError
from deltaloom.core.tensors import TensorFolder

if TYPE_CHECKING:
    from torch import Tensor

    from deltaloom.core.delta import Delta

OVERSAMPLING = 8
"""Columns beyond the rank; 5 or 10 in Halko et al., section 1.3."""
ITERATIONS = 2
"""Power iterations; "one or two" in Halko et al., section 1.6, for spectra that fall slowly."""
CONV1D = {
    "gpt2": ("c_attn", "q_attn", "c_proj", "c_fc"),
    "openai-gpt": ("c_attn", "c_proj", "c_fc"),
}
"""Model type -> linear modules whose weight is stored (in, out)."""
TABLES = (*EMBEDDINGS, "wpe.weight", "embed_positions.weight", "position_embeddings.weight")
"""Endings of embeddings, whose factors PEFT names and stores in its own way."""


def extract(
    delta: Delta,
    kind: Literal["lowrank", "sparse", "dense"],
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Reduced[Delta]:
    """`delta` as another kind, with the part of each tensor's energy that this keeps.

    Of a tuned model's folder `extract(load(folder, base), ...)` takes model minus base. `lowrank`
    wants `rank`: matrices of linear layers and embeddings become factors of that rank, other
    tensors that changed (norms, biases) are kept whole; embeddings that the base also uses as its
    output layer are left out (kept 0), because an adapter on them would not reach the output.
    `sparse` wants `density`: that part of each tensor's elements stays, at least one, of which
    zeros are not stored. `dense` copies the change into memory. Deterministic given `seed`. Raises
    InputError for a rank or density that is missing, out of range or not of this kind.
    """
    _check(kind, rank, density)
    if kind == "dense":
        held = {name: delta.to_dense(name) for name in delta.names()}
        return Reduced(
            Dense(delta.base, ((1.0, HeldChange(held)),)), dict.fromkeys(delta.names(), 1.0)
        )
    if kind == "sparse":
        elements, kept = {}, {}
        for name in delta.names():
            change = delta.to_dense(name)
            keep = max(1, math.floor((density or 0.0) * change.numel()))
            elements[name] = largest(change, keep)
            kept[name] = _part(elements[name].values, change)
        return Reduced(Sparse(delta.base, elements), kept)
    return _lowrank(delta, rank or 0, seed)


def _lowrank(delta: Delta, rank: int, seed: int) -> Reduced[Delta]:
    config = delta.base.config()
    conv, tied = CONV1D.get(config.get("model_type", ""), ()), _tied(delta)
    factors, rest, kept = {}, {}, {}
    for name in delta.names():
        change = delta.to_dense(name)
        module = name.rpartition(".")[0].rpartition(".")[2]
        kept[name] = 1.0
        if not change.any():
            continue
        if name in tied:
            kept[name] = 0.0
        elif change.dim() == 2 and name.endswith(".weight"):
            table = name.endswith(TABLES)
            transposed = table or module in conv
            left, right = leading(change.T if transposed else change, rank, seed)
            factors[name] = Factors(right, left, 1.0, transposed, table)
            # The product is a projection of the change, so the energies subtract.
            energy = float(change.double().square().sum())
            kept[name] = min(factors[name].dot(factors[name]) / energy, 1.0)
        else:
            rest[name] = change
    held = Dense(delta.base, ((1.0, HeldChange(rest)),) if rest else ())
    return Reduced(LowRank(delta.base, factors, None, held), kept)


def leading(matrix: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Factors (out, k) and (k, in) of `matrix` (out, in) by its leading singular triplets.

    k is `rank`, or less where the matrix has no more. Singular values are split evenly.
    """
    import torch

    width = min(rank + OVERSAMPLING, *matrix.shape)
    if 2 * width >= min(matrix.shape):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(matrix.shape[1], width, generator=generator)
        basis = torch.linalg.qr(matrix @ start)[0]  # (out, width)
        for _ in range(ITERATIONS):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
        u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ u
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def largest(change: Tensor, keep: int) -> Elements:
    """The `keep` elements of largest magnitude, without zeros; of equal ones the first."""
    import torch

    flat = change.flatten()
    size = flat.abs()
    if keep < flat.numel():
        bar = size.kthvalue(flat.numel() - keep + 1).values
        chosen = size > bar
        level = (size == bar).nonzero().flatten()  # rising
        chosen[level[: keep - int(chosen.sum())]] = True
        chosen &= size > 0
    else:
        chosen = size > 0
    indices = chosen.nonzero().flatten()
    return Elements(indices, flat[indices].to(torch.float32), tuple(change.shape))


def _part(kept: Tensor, whole: Tensor) -> float:
    total = float(whole.double().square().sum())
    return float(kept.double().square().sum()) / total if total else 1.0


def _tied(delta: Delta) -> set[str]:
    # Without an output layer of its own in the base, the embeddings are it.
    with TensorFolder(delta.base.folder) as own:
        if any(name.endswith(HEADS) for name in own):
            return set()
    return {name for name in delta.names() if name.endswith(EMBEDDINGS)}


def _check(kind: str, rank: int | None, density: float | None) -> None:
    if (rank is not None) != (kind == "lowrank") or (density is not None) != (kind == "sparse"):
        raise InputError(
            f"extract as {kind!r}: give rank= for lowrank, density= for sparse, neither for dense"
        )
    if rank is not None and rank < 1:
        raise InputError(f"rank = {rank}: give at least 1")
    if density is not None and not 0 < density <= 1:
        raise InputError(f"density = {density}: give a part above 0 and at most 1")
