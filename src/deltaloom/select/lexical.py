"""Keep the rows that share their rarer words with the target (BM25).

Paper: Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond"
(doi 10.1561/1500000019).

A target row q is a query, a pool row z a document of |z| words:
score(z, q) = sum over words w of q of c_q(w) idf(w) c_z(w) (k1 + 1) / (c_z(w) + k1 L_z), with
L_z = 1 - b + b |z| / mean |z|, c the word's count, idf(w) = log(1 + (n - n_w + 0.5) /
(n_w + 0.5)) and n_w the pool's rows that have w. Scores are divided by their bound for q,
sum c_q(w) idf(w) (k1 + 1), so that they lie in 0 to 1 and long target rows do not win by length.
Words are runs of letters, digits and underscores, without letter case; prompt and response count
alike. No model is run.

Differs: 1 + inside the logarithm, as in Lucene, where the paper's weight is negative for words in
more than half of the rows; the division.

Not covered: word pairs, stop words and stems; writing without spaces, where a run of letters
counts as one word.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, final

from pydantic import Field

from deltaloom.core.method import Selection, Sizes, Work
from deltaloom.select._budget import BudgetSelector
from deltaloom.select._picking import Pick, by_pick, chosen_for
from deltaloom.select._text import normalised

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse import csr_array

    from deltaloom.core.base import Base
    from deltaloom.core.examples import Example, Examples
    from deltaloom.core.run import Run

WORD = re.compile(r"\w+")
SHOWN = 3
"""Shared words told in a reason."""
ROWS = 4096
"""Pool rows scored at once."""


@final
class Lexical(BudgetSelector):
    """Words shared with the target: a baseline that needs no model."""

    needs: ClassVar[frozenset[str]] = frozenset({"target"})

    pick: Pick = "round_robin"
    """How scores become a choice: round_robin lets each target row in turn take its best unused
    row (ours, as in rds), top takes the rows with the largest score for any target row."""
    k1: Annotated[float, Field(ge=0)] = 1.2
    """How slowly repeats of a word stop counting (Lucene's default; the paper: 1.2 to 2 is
    reasonable in many settings)."""
    b: Annotated[float, Field(ge=0, le=1)] = 0.75
    """How much long rows are discounted (Lucene's default; the paper: 0.5 to 0.8)."""

    def work(self, sizes: Sizes) -> Work:
        """No model is run."""
        return Work()

    def select(
        self, pool: Examples, run: Run, *, target: Examples | None, base: Base | None = None
    ) -> Selection:
        """Rows in order of choice; the scores cover the whole pool."""
        import numpy as np

        from deltaloom.core.features import Features

        assert target is not None
        reach = self.reach(len(pool))
        asked = [Counter(words(row)) for row in target]
        names = sorted(set().union(*asked))
        weights, idf = bm25(map(words, pool), names, self.k1, self.b)
        wishes = counted(asked, names)  # (t, w)
        influence = shares(weights, wishes, idf * (self.k1 + 1))  # (n, t)
        order, wanted = by_pick(self.pick, influence, reach)
        chosen = self.take(pool, order, run, base)
        scores = Features.from_scores(
            run.work / "scores",
            pool.ids,
            influence.max(axis=1),
            about={"method": "lexical", "target": target.digest(), "k1": self.k1, "b": self.b},
            columns={"source": [row.source for row in pool]},
        )
        number = {identity: row for row, identity in enumerate(pool.ids)}
        reasons = {}
        for identity, query in chosen_for(chosen, pool, order, wanted).items():
            shared = weights[[number[identity]]].multiply(wishes[[query]]).tocsr()
            best = shared.indices[np.argsort(-shared.data, kind="stable")[:SHOWN]]
            told = ", ".join(repr(names[word]) for word in best) or "no word"
            reasons[identity] = f"shares {told} with target row {target[query].id}"
        return Selection(chosen, scores, reasons)


def words(row: Example) -> list[str]:
    """The words of all the row says, in order."""
    return WORD.findall(normalised(row))


def counted(texts: Iterable[Mapping[str, int]], names: Sequence[str]) -> csr_array:
    """How often each text has each of `names`: float64 (texts, names), sparse."""
    import numpy as np
    from scipy.sparse import csr_array

    place = {name: number for number, name in enumerate(names)}
    columns, values, ends = array("q"), array("d"), array("q", [0])
    for text in texts:
        found = sorted((place[name], count) for name, count in text.items() if name in place)
        columns.extend(column for column, _ in found)
        values.extend(count for _, count in found)
        ends.append(len(columns))
    parts = (np.frombuffer(values, np.float64), *(np.array(x, np.int64) for x in (columns, ends)))
    return csr_array(parts, shape=(len(ends) - 1, len(names)))


def bm25(
    texts: Iterable[Sequence[str]], names: Sequence[str], k1: float, b: float
) -> tuple[csr_array, np.ndarray]:
    """What each word adds to a text's score, (n, w) sparse, and the words' idf (w,).

    `texts` are the pool's rows as words, read once; only `names` are weighted.
    """
    import numpy as np

    lengths = array("q")

    def measured() -> Iterator[Counter[str]]:
        for text in texts:
            lengths.append(len(text))
            yield Counter(text)

    weights = counted(measured(), names)
    n, length = len(lengths), np.array(lengths, np.float64)
    having = np.bincount(weights.indices, minlength=len(names))  # (w,)
    idf = np.log1p((n - having + 0.5) / (having + 0.5))
    scale = k1 * (1 - b + b * length / (length.mean() or 1.0))  # (n,)
    scale = np.repeat(scale, np.diff(weights.indptr))
    weights.data *= (k1 + 1) * idf[weights.indices] / (weights.data + scale)
    return weights, idf


def shares(weights: csr_array, wishes: csr_array, most: np.ndarray) -> np.ndarray:
    """Scores float32 (n, t) of texts for queries, as shares of each query's bound.

    `weights` (n, w) is what a word adds, `wishes` (t, w) how often a query has it and `most` (w,)
    the bound of a weight. A query without words scores 0 everywhere.
    """
    import numpy as np

    bound = wishes @ most  # (t,)
    asked = wishes.T.tocsr() / np.where(bound > 0, bound, 1.0)  # (w, t)
    found = np.empty((len(weights.indptr) - 1, len(wishes.indptr) - 1), np.float32)
    for start in range(0, len(found), ROWS):
        found[start : start + ROWS] = (weights[start : start + ROWS] @ asked).toarray()
    return found
