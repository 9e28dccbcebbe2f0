"""New tokens get a weighted mean of their pieces' mean (fvt) and the donor's mapped row (ridge).

Paper: none; ours.

e_new = (1 - s) fvt + s ridge, see these methods.

Differs: not applicable.

Not covered: a share that differs from token to token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, final

from pydantic import Field

from deltaloom.transfer._donor import DonorTransferrer

if TYPE_CHECKING:
    from torch import Tensor

    from deltaloom.core.run import Run


@final
class Blend(DonorTransferrer):
    """Between the mean of the pieces and the linear map."""

    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share s of the linear map (ours: the one value tried in a pilot, where it was best)."""
    ridge: Annotated[float, Field(gt=0)] = 0.1
    """Ridge of the map, as `transfer ridge` has it."""

    def mapped(
        self, wanted: Tensor, theirs: Tensor, ours: Tensor, pieces: Tensor, run: Run, label: str
    ) -> Tensor:
        """Rows between the two."""
        from deltaloom.transfer.ridge import linear_map

        return pieces.lerp(linear_map(wanted, theirs, ours, self.ridge), self.share)
