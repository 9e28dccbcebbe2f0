"""Mix sources in proportion to their sizes, capped and tempered: the baseline of every mixture.

Paper: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer" (arXiv 1910.10683), section 3.5.2; the rates of `seqio` (Apache-2.0). FLAMe (Vu et al.
2024, arXiv 2407.10817) mixes so, with a cap of 2^16 and no temperature.

Weight of source s with e_s rows: w_s = min(e_s, K)^(1/T) / sum_j min(e_j, K)^(1/T). T = 1 is
examples-proportional, T -> infinity equal mixing.

Differs: an epoch has the weights' shares exactly, where the paper draws each batch at random; with
unit = tokens e_s and K are tokens.

Not covered: an artificial limit that grows while training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, final

from pydantic import Field

from deltaloom.core.method import Selection, Sizes, Work
from deltaloom.select._mixing import MixtureSelector, amounts_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run


@final
class Proportional(MixtureSelector):
    """Examples-proportional mixing."""

    cap: Annotated[int | None, Field(ge=1)] = 65_536
    """Rows (or tokens) that a source counts for at most (FLAMe: 2^16 rows; T5 tries 2^16 to 2^21);
    None for no cap."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """T: above 1 small sources get more than their size (FLAMe: 1; T5 finds 2 best of those it
    tries, with a cap of 2^21)."""

    def work(self, sizes: Sizes) -> Work:
        """No model is run."""
        return Work()

    def select(
        self, pool: Examples, run: Run, *, target: Examples | None = None, base: Base | None = None
    ) -> Selection:
        """One epoch of the pool, and its weights.

        Raises InputError for an epoch that `size` and `repeats` do not allow.
        """
        amounts = amounts_of(pool, self.lengths(pool, base))
        about = {"method": "proportional"}
        return self.drawn(pool, rates(amounts, self.cap, self.temperature), run, base, about)


def rates(
    amounts: Mapping[str, float], cap: float | None = None, temperature: float = 1.0
) -> dict[str, float]:
    """Unscaled weights `min(e_s, cap)^(1 / temperature)`."""
    most = float("inf") if cap is None else cap
    return {name: min(amount, most) ** (1 / temperature) for name, amount in amounts.items()}
