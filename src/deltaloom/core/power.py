"""How many items are needed to find a difference: the power of paired comparisons.

Miller 2024 (arXiv 2411.00640, section 5): with per-item differences of standard deviation `s` a
true difference `d` is found with probability `power` by

    n = (t_{1 - alpha / 2} + t_power)^2 s^2 / d^2    (t on n - 1 degrees of freedom; Bloom 1995)

items, which is the inverse of `Comparison.mde`. Miller's variance `omega^2 + sigma_A^2 / K_A +
sigma_B^2 / K_B` (items, and K answers sampled an item) is `spread` squared. For 0/1 items that
differ on a share `q` of the items, `s^2 = q - d^2`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from deltaloom.core.errors import InputError

if TYPE_CHECKING:
    from deltaloom.core.estimate import Comparison

POWER = 0.8
"""The usual probability of finding the effect (Cohen 1988; Miller 2024)."""
MOST = 10**12
"""Items above which a difference cannot be looked for."""


def items_needed(
    difference: float,
    *,
    pilot: Comparison | None = None,
    spread: float | None = None,
    discordance: float | None = None,
    confidence: float = 0.95,
    power: float = POWER,
) -> int:
    """Items on which two models must be compared to find a true `difference` with this `power`.

    Give one of three: a `pilot` comparison, whose error per item (of clusters, too: as many items
    a cluster as it had) is what the new items are expected to have; the `spread`, the standard
    deviation of per-item differences (of the items themselves to find that one mean differs from a
    known number); the `discordance`, the share of 0/1 items on which the two differ. Raises
    InputError for none or several of them, a zero difference, and numbers out of range.
    """
    ways = {"pilot": pilot, "spread": spread, "discordance": discordance}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        raise InputError(
            f"items_needed: give one of pilot, spread and discordance, not {given or 'none'}"
        )
    if not (math.isfinite(difference) and difference):
        raise InputError(f"items_needed: difference = {difference}: must be a number but zero")
    for name, share in (("confidence", confidence), ("power", power)):
        if not 0.0 < share < 1.0:
            raise InputError(f"items_needed: {name} = {share}: must lie between 0 and 1")
    if discordance is not None:
        if not abs(difference) <= discordance <= 1.0:
            raise InputError(
                f"items_needed: discordance = {discordance}: must lie between the difference and 1"
            )
        # When all discordant items go one way the difference is the discordance: s^2 = q - q^2.
        return _items(math.sqrt(discordance - difference**2) / abs(difference), confidence, power)
    if spread is not None:
        if not 0.0 <= spread < math.inf:
            raise InputError(f"items_needed: spread = {spread}: must be a number of at least 0")
        return _items(spread / abs(difference), confidence, power)
    assert pilot is not None
    return _items_like(pilot, difference, confidence, power)


def _items_like(pilot: Comparison, difference: float, confidence: float, power: float) -> int:
    """Items of the pilot's kind, in clusters of its mean size."""
    found = pilot.difference
    if pilot.unit == "seeds":
        raise InputError("items_needed: a pilot over seeds says how many seeds, not items, to add")
    units = len(set(found.clusters.values())) if found.clusters else found.n
    # The adjusted error of a comparison without discordant items is behind its mde.
    error = pilot.mde / detectable(1.0, units, found.confidence, POWER)
    if not math.isfinite(error):
        raise InputError("items_needed: the pilot has one unit, whose spread is unknown")
    needed = _items(error * math.sqrt(units) / abs(difference), confidence, power)
    return math.ceil(needed * found.n / units)


def _items(ratio: float, confidence: float, power: float) -> int:
    """The least n >= 2 with `detectable(1, n) * ratio <= sqrt(n)`; the left side falls with n."""

    def enough(n: int) -> bool:
        # A hair of room, so that the items of a pilot are enough for what it detects.
        return detectable(1.0, n, confidence, power) * ratio <= math.sqrt(n) * (1 + 1e-9)

    low, high = 1, 2
    while not enough(high):
        low, high = high, high * 2
        if high > MOST:
            raise InputError("items_needed: more than 1e12 items; look for a larger difference")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def detectable(error: float, units: int, confidence: float, power: float) -> float:
    """The smallest true effect found with probability `power`: `(t_{1-alpha/2} + t_power) * se`.

    Bloom 1995 with t on `units - 1` degrees of freedom; infinite for one unit.
    """
    from scipy.special import stdtrit

    if units < 2:
        return math.inf
    return float(stdtrit(units - 1, (1 + confidence) / 2) + stdtrit(units - 1, power)) * error
