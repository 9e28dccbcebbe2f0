"""From measured effects of sources to ratings, and from ratings or effects to weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

HELPFUL, SOMEWHAT, UNCLEAR, HARMFUL = 2, 1, 0, -1
"""FLAMe's ratings: helpful, somewhat helpful, no clear effect, harmful."""
GENERAL, SPECIFIC, OTHER = 100_000, 30_000, 3_000
"""Weight of each source in FLAMe's bundles: generally helpful, helpful for some target, other."""


@dataclass(frozen=True)
class Effect:
    """What steps on one source alone changed on one target; more is better."""

    value: float
    stderr: float
    low: float
    high: float
    n: int
    steps: int

    @property
    def settled(self) -> bool:
        """Whether its sign is known."""
        return self.low > 0 or self.high < 0

    def record(self) -> dict[str, Any]:
        """For files: what is infinite is null."""
        return {k: v if math.isfinite(v) else None for k, v in asdict(self).items()}


Effects = Mapping[str, Mapping[str, Effect]]
"""Source -> target -> effect."""


def rated(effects: Effects, half: float) -> dict[str, dict[str, int]]:
    """Ratings by source and target.

    Helpful is an interval above zero and at least `half` of the best source's effect on that
    target; somewhat helpful an interval above zero; harmful one below; else no clear effect.
    """
    targets = list(next(iter(effects.values())))
    best = {t: max(own[t].value for own in effects.values()) for t in targets}

    def rating(one: Effect, most: float) -> int:
        if one.high < 0:
            return HARMFUL
        if one.low > 0:
            return HELPFUL if one.value >= half * most else SOMEWHAT
        return UNCLEAR

    return {s: {t: rating(own[t], best[t]) for t in targets} for s, own in effects.items()}


def bundled(ratings: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """Unscaled weights by bundle: general, specific, other; 0 where more harm than help was seen.

    General helps at least half of the targets and harms none; specific helps one of them. Nothing
    is left out when nothing is of use.
    """
    found: dict[str, float] = {}
    for source, own in ratings.items():
        helped = sum(one > 0 for one in own.values())
        if sum(own.values()) < 0:
            found[source] = 0
        elif 2 * helped >= len(own) and min(own.values()) >= 0:
            found[source] = GENERAL
        elif helped:
            found[source] = SPECIFIC
        else:
            found[source] = OTHER
    return found if any(found.values()) else dict.fromkeys(ratings, float(OTHER))


def utilities(effects: Effects) -> dict[str, float]:
    """Mean over targets of each source's effect per step, shrunk to zero, in units of their spread.

    With d_s the effects per step on a target, e_s their errors and t^2 = max(0, mean(d^2 - e^2)),
    the spread of true effects by moments: the mean of d_s t^2 / (t^2 + e_s^2) / t.
    """
    sources = list(effects)
    targets = list(effects[sources[0]])
    found = dict.fromkeys(sources, 0.0)
    for target in targets:
        own = {s: effects[s][target] for s in sources}
        slope = {s: one.value / one.steps for s, one in own.items()}
        error = {s: one.stderr / one.steps for s, one in own.items()}
        known = [s for s in sources if math.isfinite(error[s])]
        spread = sum(slope[s] ** 2 - error[s] ** 2 for s in known) / max(len(known), 1)
        if spread > 0:
            for s in known:
                shrunk = slope[s] * spread / (spread + error[s] ** 2)
                found[s] += shrunk / math.sqrt(spread) / len(targets)
    return found


def exponential(effects: Effects, rates: Mapping[str, float], sharpness: float) -> dict[str, float]:
    """Unscaled weights `rate_s exp(sharpness u_s)`, with the utilities u."""
    found = utilities(effects)
    most = max(found.values())
    return {s: rates[s] * math.exp(sharpness * (found[s] - most)) for s in found}
