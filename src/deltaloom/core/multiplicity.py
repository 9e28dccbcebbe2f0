"""Many p-values at once: Holm for every claim to hold, Benjamini-Hochberg for most of them to.

Holm 1979 bounds the probability that even one of the claims is false, whatever the dependence of
the tests. Benjamini and Hochberg 1995 bound the expected share of false claims among those made
(independent or positively dependent tests): the choice where many tasks are screened.
"""

from __future__ import annotations

from collections.abc import Iterable

from deltaloom.core.errors import InputError


def holm(pvalues: Iterable[float]) -> list[float]:
    """Holm 1979: adjusted p-values in the given order, `max_{j <= i} min(1, (m - j + 1) p_(j))`."""
    given = _checked("holm", pvalues)
    adjusted, worst = [0.0] * len(given), 0.0
    for rank, index in enumerate(sorted(range(len(given)), key=given.__getitem__)):
        worst = max(worst, min(1.0, (len(given) - rank) * given[index]))
        adjusted[index] = worst
    return adjusted


def benjamini_hochberg(pvalues: Iterable[float]) -> list[float]:
    """Benjamini and Hochberg 1995: adjusted p-values, `min_{j >= i} min(1, m p_(j) / j)`."""
    given = _checked("benjamini_hochberg", pvalues)
    adjusted, best = [0.0] * len(given), 1.0
    order = sorted(range(len(given)), key=given.__getitem__)
    for rank in range(len(given), 0, -1):
        best = min(best, len(given) * given[order[rank - 1]] / rank)
        adjusted[order[rank - 1]] = best
    return adjusted


def _checked(name: str, pvalues: Iterable[float]) -> list[float]:
    given = list(pvalues)
    if any(not 0.0 <= p <= 1.0 for p in given):
        raise InputError(f"{name}: every p-value must lie in [0, 1]")
    return given
