"""The tangent kernels of a set of questions, and regression with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from deltaloom.engine.ntk import Kernels, Kind
    from deltaloom.measure._label_words import LabelWords, Question


FLOATS = 2**26
"""Gradient entries of one parameter in a batch at most: 256 MiB in float32. Ours."""


class Study:
    """Questions, the first `lessons` of them only to learn from, with their kernels.

    Kernels are (n, k, m, k): rows to learn from by all rows. Without lessons both are all.
    """

    def __init__(
        self, words: LabelWords, asked: Sequence[Question], lessons: int, names: list[str]
    ) -> None:
        self.words, self.asked, self.lessons, self.names = words, asked, lessons, names
        self.goals = words.goals(asked)  # (n, k)
        self.start: NDArray[np.float64] = self.outputs()
        """f0: the outputs (n, k) of the model as it is."""
        self.grams: Kernels = {}
        """To be filled in by `measure._kernel_shards`."""

    def outputs(self, numbers: Sequence[int] | None = None) -> NDArray[np.float64]:
        """The outputs (n, k) of the model with its present weights; of the questions `numbers`."""
        import numpy as np
        import torch

        chosen = range(len(self.asked)) if numbers is None else numbers
        asked = [self.asked[i] for i in chosen]
        found = np.zeros((len(asked), self.words.outputs))
        with torch.no_grad():
            for own, batch in self.words.batches(asked):
                found[own] = self.words(batch).double().cpu().numpy()
        return found

    @property
    def most(self) -> int:
        """Rows of a batch that is differentiated."""
        return max(1, FLOATS // max(self.sizes.values()))

    @property
    def sizes(self) -> dict[str, int]:
        """Entries of each parameter that is differentiated by."""
        return {name: self.words.model.get_parameter(name).numel() for name in self.names}

    def regressed(
        self,
        kind: Kind,
        train: NDArray[np.int64],
        test: NDArray[np.int64],
        ridge: float = 0.0,
        from_start: bool = False,
        solver: str = "least_squares",
    ) -> NDArray[np.float64]:
        """Outputs (m, k) predicted for the questions `test` from the goals of `train`."""
        import numpy as np

        from deltaloom.engine import kernel_regression as closed

        goals, start = self.goals[train], self.start
        real, other = ~np.isnan(goals), ~np.isnan(self.goals[test])  # choices that rows have
        gram = self.grams[kind][train]  # (n, k, m, k)
        own = gram[:, :, train][real][:, real]
        across = gram[:, :, test][real][:, other]
        solvers = {"svm": closed.regress_asymmetric, "least_squares": closed.regress_one_sided}
        solve = solvers[solver] if kind == "asymmetric" else closed.regress
        before = (start[train][real], start[test][other]) if from_start else None
        found = np.full(self.goals[test].shape, -np.inf)
        found[other] = solve(own, across, goals[real], ridge=ridge, start=before)
        return found

    def right(self, outputs: NDArray[np.float64]) -> dict[str, float]:
        """1 by row id where the answer is predicted, of the questions that are measured."""
        return self.words.right(outputs[self.lessons :], self.asked[self.lessons :])
