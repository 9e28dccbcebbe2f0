"""Seeds and items both as random effects: one mean that speaks of new seeds and of new items.

With deviations `D_sc = S_sc - R W_c` of seed s on unit c (an item or a cluster; S seeds, m units)
and the mean squares of the two-way layout without replication

    MS_seeds = m sum_s D_s.^2 / (S - 1),    MS_units = S sum_c D_.c^2 / (m - 1),
    MS_rest  = sum_sc (D_sc - D_s. - D_.c)^2 / ((S - 1)(m - 1))

the variance of the mean deviation is `(MS_seeds + max(0, MS_units - MS_rest)) / (S m)`: the usual
unbiased one (Cornfield and Tukey 1956) with the variance component of the units kept from being
negative, so that it never falls below the variance over seeds alone. Degrees of freedom are
Satterthwaite's 1946 of the mean squares used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import special

from deltaloom.core._intervals import Array, Summary


def crossed(rows: Sequence[Array], confidence: float) -> Summary:
    """The mean over seeds of `rows` (one (m, 2) array of `S_c`, `W_c` a seed) and its interval.

    One seed or one unit shows no spread: the error is then infinite.
    """
    sums = np.array([one[:, 0] for one in rows])  # (seeds, m)
    weights = np.asarray(rows[0][:, 1])  # (m,), the same for every seed
    seeds, units = sums.shape
    total = float(weights.sum())
    value = float(sums.sum()) / (seeds * total)
    mean_row = np.stack([sums.mean(axis=0), weights], axis=1)
    if seeds < 2 or units < 2:
        return Summary(value, math.inf, -math.inf, math.inf, "seeds-items-t", math.inf, mean_row)
    deviations = sums - value * weights
    by_seed, by_unit = deviations.mean(axis=1), deviations.mean(axis=0)
    rest = deviations - by_seed[:, None] - by_unit
    square_seeds = units * float((by_seed**2).sum()) / (seeds - 1)
    square_units = seeds * float((by_unit**2).sum()) / (units - 1)
    square_rest = float((rest**2).sum()) / ((seeds - 1) * (units - 1))
    parts = [(square_seeds, seeds - 1)]
    if square_units > square_rest:
        parts += [(square_units, units - 1), (-square_rest, (seeds - 1) * (units - 1))]
    variance = sum(square for square, _ in parts)
    stderr = math.sqrt(variance / (seeds * units)) * units / total
    spread = sum(square**2 / freedom for square, freedom in parts)
    freedom = max(1.0, variance**2 / spread) if spread else float(seeds - 1)
    reach = float(special.stdtrit(freedom, (1 + confidence) / 2)) * stderr
    return Summary(value, stderr, value - reach, value + reach, "seeds-items-t", stderr, mean_row)
