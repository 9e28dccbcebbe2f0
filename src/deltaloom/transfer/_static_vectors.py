"""Static vectors of tokens from text: positive pointwise mutual information, factorised.

Levy, Goldberg & Dagan 2015 ("Improving Distributional Similarity with Lessons Learned from Word
Embeddings", TACL): contexts within a window, their counts to the power 0.75, rows of U sqrt(S).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

SMOOTHING = 0.75


def static_vectors(
    texts: Iterable[Sequence[int]], tokens: int, *, window: int, least: int, width: int
) -> np.ndarray:
    """Unit vectors (tokens, width) of tokens, 0 where one is seen less than `least` times.

    `texts` are token ids. The width is less where fewer tokens are seen. Same input, same bytes.
    """
    from scipy.sparse import coo_matrix, diags
    from scipy.sparse.linalg import svds

    ids = [np.asarray(one, np.int64) for one in texts]
    seen = np.bincount(np.concatenate([*ids, np.zeros(0, np.int64)]), minlength=tokens)
    rows, columns = [], []
    for one in ids:
        for gap in range(1, window + 1):
            rows += [one[:-gap], one[gap:]]
            columns += [one[gap:], one[:-gap]]
    kept = np.flatnonzero(seen >= least)
    found = np.zeros((tokens, width), np.float32)
    if len(kept) < 3 or not rows:
        return found
    places = np.full(tokens, -1)
    places[kept] = np.arange(len(kept))
    row, column = places[np.concatenate(rows)], places[np.concatenate(columns)]
    known = (row >= 0) & (column >= 0)
    shape = (len(kept), len(kept))
    counts = coo_matrix((np.ones(known.sum()), (row[known], column[known])), shape).tocsr()
    total = np.asarray(counts.sum(1)).ravel()
    smooth = total**SMOOTHING / max((total**SMOOTHING).sum(), 1.0)
    inverse = diags(1 / np.maximum(total, 1)) @ counts @ diags(1 / np.maximum(smooth, 1e-12))
    inverse.data = np.maximum(np.log(np.maximum(inverse.data, 1e-12)), 0)
    inverse.eliminate_zeros()
    size = min(width, len(kept) - 1)
    if inverse.nnz == 0:
        return found
    start = np.random.default_rng(0).standard_normal(len(kept))
    left, values, _ = svds(inverse, k=size, v0=start)
    made = left * np.sqrt(np.maximum(values, 0))
    lengths = np.linalg.norm(made, axis=1, keepdims=True)
    found[kept, :size] = made / np.where(lengths == 0, 1, lengths)
    return found
