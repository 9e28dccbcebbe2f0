"""RegMean: linear layers whose outputs are nearest to each model's on that model's own inputs.

Paper: Dataless Knowledge Fusion by Merging Weights of Language Models (Jin et al., ICLR 2023);
arXiv 2212.09849.

Formula: per linear layer y = x W, with X_i its inputs in model i on data i and G_i = X_i' X_i,
W = (sum_i G_i')^-1 sum_i G_i' W_i, where G_i' is G_i with everything off its diagonal multiplied by
alpha; at alpha = 1 this minimises sum_i |X_i W - X_i W_i|^2. All else is averaged.

Differs: solved as W = mean W_i + Z for the change from the average, in float64, each input measured
by its root mean square. Where the inputs leave W undetermined (fewer tokens than inputs, inputs
that are always zero) Z is the smallest solution, so what the data say nothing about is the average.
Every token of a row counts alike, prompt and response, and so a model with more tokens weighs more;
the paper takes as many batches of each. The output layer is a linear layer like the others where it
has weights of its own; tied to the embeddings it is averaged with them.

Not covered: Fisher weights for what is averaged; experts behind a router (averaged); matrices kept
from an earlier merge. Statistics take n^2 numbers for every group of layers with the same n inputs,
about as many as the model has parameters, for one model at a time in memory and for all on disk.
`memory` bounds the merge that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, final

from pydantic import Field

from deltaloom.core.method import Sizes, Work
from deltaloom.merge._rule import Block, Rule, TensorRule
from deltaloom.merge._with_data import Specialist, Statistics, WithData

if TYPE_CHECKING:
    import numpy as np

    from deltaloom.core.run import Run
    from deltaloom.core.tensors import TensorEntry


@final
class Regmean(WithData):
    """Merges linear layers by least squares over their inputs."""

    alpha: float = Field(0.9, ge=0, le=1)
    """Factor of what is off the diagonal of the inputs' products (0.9 in most of the paper's
    experiments, where 1 can let a merged model degenerate; the authors' published configurations
    of T5, DeBERTa and RoBERTa have 0.1)."""

    def work(self, sizes: Sizes) -> Work:
        """A forward pass of every row; one model and its statistics are held at a time."""
        grams = 4.0 * sizes.matmul_parameters
        return Work(
            forward_tokens=sizes.rows * sizes.row_tokens,
            memory_bytes=sizes.weight_bytes + grams,
            disk_bytes=sizes.weight_bytes + sizes.deltas * grams,
        )

    def statistics(self, specialist: Specialist, seed: int, run: Run) -> Statistics:
        """Gram matrices by the tensor that first has their input."""
        from deltaloom.engine.grams import input_grams, linear_modules
        from deltaloom.engine.meter import count_forward

        model = specialist.model
        linear = linear_modules(model)
        stored = {known: name for name, known in specialist.names.items()}
        modules = {k: m for k, m in linear.items() if f"{k}.weight" in stored}
        grams = input_grams(model, specialist.rows, specialist.pad_id, modules, specialist.advance)
        count_forward(run, model, grams.tokens)
        tensors = {stored[f"{name}.weight"]: gram for name, gram in grams.sums.items()}
        gram_of = {
            stored[f"{name}.weight"]: stored[f"{leader}.weight"]
            for name, leader in grams.leader.items()
        }
        transposed = [
            stored[f"{name}.weight"]
            for name in grams.leader
            if not hasattr(modules[name], "out_features")  # Conv1D holds (in, out)
        ]
        return Statistics(tensors, {"gram_of": gram_of, "transposed": transposed})

    def rule(self, files: Sequence[Path]) -> Regression:
        """See WithData."""
        return Regression(files, self.alpha)


class Regression(Rule):
    """base + the change that least squares find for linear layers, the mean change for the rest."""

    def __init__(self, files: Sequence[Path], alpha: float):
        import json

        from deltaloom.core.tensors import TensorFolder

        self.grams = [TensorFolder(file) for file in files]
        self.about = [json.loads(folder.metadata["about"]) for folder in self.grams]
        self.alpha = alpha

    def begin(self, tensor: TensorEntry, models: int) -> RegressionTensor:
        """See Rule."""
        return RegressionTensor(self, tensor)

    def gram(self, model: int, name: str) -> np.ndarray:
        """G' of one model for the linear layer `name`, (in, in), float64."""
        import numpy as np

        folder, key = self.grams[model], self.about[model]["gram_of"][name]
        entry = folder[key]
        kind = np.float64 if entry.dtype == "F64" else np.float32
        stored = folder.raw(key).view(kind).reshape(entry.shape)
        found = stored.astype(np.float64)
        diagonal = found.diagonal().copy()
        found *= self.alpha
        np.fill_diagonal(found, diagonal)
        return found


class RegressionTensor(TensorRule):
    """One tensor under `Regression`."""

    def __init__(self, rule: Regression, tensor: TensorEntry):
        self.rule, self.name, self.shape = rule, tensor.name, tensor.shape
        self.linear = all(tensor.name in about["gram_of"] for about in rule.about)
        self.unit = tensor.count if self.linear else 1
        if self.linear:
            self.spare = 64  # of float64: changes, right sides, what is found
            side = rule.grams[0][rule.about[0]["gram_of"][tensor.name]].shape[0]
            self.held = 10 * 8 * side**2  # products and their factors, or eigenvectors

    def write(self, block: Block) -> None:
        """Solve for the whole matrix, or average the block."""
        import numpy as np

        change = block.models.mean(axis=0)
        if self.linear:
            change = change + self._beyond(block.models, change)
        np.copyto(block.out, block.base)
        np.add(block.base, change, out=block.out, where=change != 0)

    def _beyond(self, changes: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """What least squares add to the mean change, flat."""
        import numpy as np

        turned = self.name not in self.rule.about[0]["transposed"]
        total, right = 0.0, 0.0
        for i, change in enumerate(changes):
            gram = self.rule.gram(i, self.name)
            apart = (change - mean).astype(np.float64).reshape(self.shape)
            right = right + gram @ (apart.T if turned else apart)  # (in, out)
            total = total + gram
        found = least_change(np.asarray(total), np.asarray(right), self._precision())
        return np.ascontiguousarray(found.T if turned else found, changes.dtype).ravel()

    def _precision(self) -> float:
        import numpy as np

        key = self.rule.about[0]["gram_of"][self.name]
        double = self.rule.grams[0][key].dtype == "F64"
        return float(np.finfo(np.float64 if double else np.float32).eps)


def least_change(gram: np.ndarray, right: np.ndarray, precision: float) -> np.ndarray:
    """x (n, m) with gram (n, n) x = right (n, m), the smallest where that leaves it open.

    `gram` is symmetric and positive semidefinite up to relative errors of `precision`; size is
    that of x with every row times the root of gram's diagonal there. A matrix that Cholesky finds
    well conditioned is solved by it, any other through its eigenvectors.
    """
    import numpy as np
    from scipy.linalg import eigh, get_lapack_funcs

    diagonal = gram.diagonal()
    seen = diagonal > 0
    scale = np.where(seen, 1 / np.sqrt(np.where(seen, diagonal, 1)), 0.0)
    gram = gram * scale[:, None] * scale
    right = right * scale[:, None]
    gram[~seen, ~seen] = 1.0  # an input that is never there: its right side is zero
    norm = float(np.abs(gram).sum(axis=0).max())
    potrf, pocon, potrs = get_lapack_funcs(("potrf", "pocon", "potrs"), dtype=np.float64)
    factor, failed = potrf(gram, lower=1)
    condition = 0.0 if failed else pocon(factor, norm, uplo="L")[0]
    if condition > precision:
        return potrs(factor, right, lower=1)[0] * scale[:, None]
    values, vectors = eigh(gram)
    kept = values > values[-1] * len(values) * precision
    own = vectors[:, kept]
    return own @ ((own.T @ right) / values[kept][:, None]) * scale[:, None]
