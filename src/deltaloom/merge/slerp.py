"""Spherical interpolation of two models: a point on the arc between them, tensor by tensor.

Paper: Animating Rotation with Quaternion Curves (Shoemake, SIGGRAPH 1985).

Formula: theta = [sin((1 - t) w) a + sin(t w) b] / sin w, with w the angle between the flattened
tensors a and b; (1 - t) a + t b where |cos w| > 0.9995.

Differs: the angle is in float64 from one scan of inner products, the sum in float64, rounded once;
at t = 0 and 1 the ends come back to the bit. A tensor of length zero is at a right angle to any
other, as in mergekit. One delta is merged with the base, which is then the end at t = 0.

Not covered: a `t` that differs by layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, final

from pydantic import Field

from deltaloom.merge._streaming import Streaming, two_ends

if TYPE_CHECKING:
    from deltaloom.merge._span import Span


@final
class Slerp(Streaming):
    """Interpolates two models, or the base and one, on the sphere."""

    t: float = Field(0.5, ge=0, le=1)
    """Place on the arc: 0 is the first model (the base when there is one delta), 1 the second
    (the middle is ours; mergekit has no default)."""
    straight: float = Field(0.9995, gt=0, le=1)
    """Absolute cosine above which the arc is replaced by a line (mergekit's constant)."""

    def sources(self, base: Path, deltas: list[Path]) -> list[Path]:
        """The two ends."""
        return two_ends(base, deltas, "slerp")

    def rule(self, models: int, seed: int = 0) -> Span:
        """See Streaming."""
        from deltaloom.merge._span import Span, between

        return Span(lambda gram, _: between(gram, self.t, self.straight))
