"""Accuracy of kernel regression with the model's own tangent kernel: would fine-tuning learn this?

Paper: Malladi et al. 2023, "A Kernel-Based View of Language Model Fine-Tuning" (arXiv 2210.05643);
their code LM-Kernel-FT. The asymmetric solver is AsK-LS (He et al. 2022, arXiv 2202.01397).

Formula: f_c(x) is the logit of choice c's first token that tells the choices apart, after the
prompt and what all choices begin with, less the mean over the choices (two choices: half the
difference of their logits). K[(x, c), (z, d)] = <grad f_c(x), grad f_d(z)> (`sgd`), of both
gradients' signs (`sign`), or of the training row's signs alone (`asymmetric`: what SignGD, and
early Adam, follow). Prediction: argmax_c of f0(x) + K(x, X) (K(X, X) + ridge |K| I)^-1 (y - f0(X))
with y one-hot and centred, f0 = 0 unless `from_start`. An item is 1 where the held-out prediction
is the answer: every row is predicted once, from the other folds (answers are spread over them, a
cluster is never divided), or all from `train`. The interval takes the items as they come; that the
folds share training rows, and the choice of folds, are not in it.

`diagnose` asks whether fine-tuning stays in the kernel's reach. It tunes the same parameters for a
few AdamW steps on the first split's training rows and compares on its held-out rows:
`linearisation` R2 = 1 - sum (df - <grad f0, dtheta>)^2 / sum df^2 with df = f - f0 (1: linear);
`feature_distance` = mean |grad f - grad f0| / |grad f0| (0: fixed features); `kernel_correlation`
of df with the change that the first kernel's regression predicts; and accuracies before, after,
and of the linearised model. The weights are then put back.

Differs: a causal model's next token for the paper's masked one; logits are centred per row, so
that what the softmax ignores is not regressed on; eigenvalues below 1e-6 of the largest count as
rounding of float32 gradients; the asymmetric kernel's solver is least squares, with AsK-LS beside
it, which takes centred one-hot targets where there are more than two choices. Tuning for
`diagnose` is on the softmax over all tokens, not only the choices'.

Not covered: choices that begin with the same token; kernel logistic regression and SVMs;
promptless classification heads; prompt adapters.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

from pydantic import Field, field_validator

from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Estimate, compare
from deltaloom.core.examples import Examples
from deltaloom.core.method import Measurer, Sizes, Work
from deltaloom.core.places import PLACE
from deltaloom.core.run import Run
from deltaloom.measure._differentiable import differentiable
from deltaloom.measure._items import clusters_of, length_limit, note, require_rows
from deltaloom.measure._kernel_study import Study
from deltaloom.measure._label_words import LabelWords, Question, questions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from deltaloom.engine.ntk import Kind

    Split = tuple[NDArray[np.int64], NDArray[np.int64]]
    """Numbers of the training rows and of those to be predicted."""

CHOICES = 4
"""Choices a row that `plan` expects."""


@final
class Kernel(Measurer):
    """Held-out accuracy of regression with the empirical tangent kernel."""

    kernels: Annotated[list[Literal["sgd", "sign", "asymmetric"]], Field(min_length=1)] = ["sgd"]
    """Kernels to regress with, all from the same gradients: sgd, sign, asymmetric. The first is the
    value that is measured, the others are compared with it in the run's notes. SGD's is the
    paper's main one."""
    parameters: str = "all"
    """What to differentiate by: all; lora (the B of a fresh adapter on every linear module, A
    random and B zero); bias; or a regular expression searched in the parameters' names, such as
    `layers\\.[0-3]\\.`. All is the paper's."""
    r: Annotated[int, Field(ge=1)] = 8
    """Rank of the fresh adapter (PEFT's default: 8)."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Parts of the rows; each is predicted from the others (ours)."""
    train: Annotated[str | None, PLACE] = None
    """File of rows to train on instead of folds; the measured rows are then only predicted."""
    ridge: Annotated[float, Field(ge=0)] = 0.0
    """Added to the kernel's diagonal, in units of its largest eigenvalue or singular value; 0 is
    interpolation of least norm (LM-Kernel-FT's `kernel_regularization`: 0). What all rows'
    gradients share makes one eigenvalue large, so that 0.001 can already be much."""
    solver: Literal["least_squares", "svm"] = "least_squares"
    """Regression with the asymmetric kernel: penalised least squares, or LM-Kernel-FT's AsK-LS with
    1 / gamma in place of the ridge, near singular where the kernel has a singular value of that
    size. They agree where the ridge is 0 (least_squares is ours)."""
    from_start: bool = False
    """Whether to learn the difference to the untuned model's outputs and add them back
    (LM-Kernel-FT's `adjust_for_init`, off there too)."""
    diagnose: bool = False
    """Whether to tune for a few steps and test linearisation and fixed features."""
    steps: Annotated[int, Field(ge=1)] = 20
    """Optimizer steps of `diagnose` (ours)."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Constant learning rate of `diagnose` (ours; judge it by the accuracy after tuning)."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Rows per step of `diagnose` (ours)."""
    delimiter: str = ""
    """Put between prompt and choice. Ours; lm-eval's `target_delimiter` is one space."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens of a prompt at most; it is cut from the left. None (ours) is the model's context."""
    memory_gib: Annotated[float, Field(gt=0)] = 1.0
    """GiB of gradients that each process holds at once; the run's scratch takes up to four times
    that. Less makes more passes, and changes rounding only (ours)."""

    @field_validator("kernels")
    @classmethod
    def _once(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("name each kernel once")
        return value

    def work(self, sizes: Sizes) -> Work:
        """A forward pass and one backward pass per choice of every row, if gradients fit."""
        width = min(sizes.row_tokens, self.max_length or sizes.row_tokens)
        tokens = sizes.rows * CHOICES * width
        adapter = self.parameters == "lora"
        return Work(
            adapter_tokens=tokens if adapter else 0.0,
            full_tokens=0.0 if adapter else tokens,
            memory_bytes=sizes.weight_bytes + self.memory_gib * 2**30,
        )

    def measure(self, model: Any, tokenizer: Any, data: Examples, run: Run) -> Estimate:
        """Predict every row of `data` by kernel regression; items are 1 (right) or 0.

        Raises InputError for no rows, rows that are no questions with choices told apart by one
        token, parameters that the model does not have, or one unit that cannot be divided.
        """
        from deltaloom.engine.forward import padding_token
        from deltaloom.measure._kernel_shards import Asking, tangent_kernels

        require_rows(data, "kernel")
        limit = length_limit(self.max_length, model)
        asked = questions(data, tokenizer, self.delimiter, limit)
        lessons = [] if self.train is None else self._lessons(tokenizer, limit)
        splits = _across(len(lessons), len(asked)) if lessons else self._folds(data, run.seed)
        every = [*lessons, *asked]
        width = max(len(one.words) for one in every)
        with differentiable(model, self.parameters, self.r, run.seed) as ready:
            words = LabelWords(ready.model, width, padding_token(tokenizer))
            study = Study(words, every, len(lessons), ready.names)
            how = Asking(run.origin, self.parameters, self.r, run.seed)
            memory = int(self.memory_gib * 2**30)
            study.grams = tangent_kernels(study, self.kernels, how, memory, run)
            found = {kind: self._predicted(study, splits, kind) for kind in self.kernels}
            facts = _compared(study, found, clusters_of(data))
            facts |= {
                "truncated_rows": sum(one.truncated for one in every),
                "parameters": sum(ready.model.get_parameter(n).numel() for n in ready.names),
            }
            if self.diagnose:
                facts["diagnosis"] = self._diagnosed(study, splits[0], ready, run)
            cost = _account(run, words, adapter=self.parameters == "lora")
        note(run, **facts)
        first = self.kernels[0]
        return Estimate.from_items(
            study.right(found[first]),
            metric=f"kernel_accuracy_{first}",
            clusters=clusters_of(data),
            cost=cost,
        )

    def _lessons(self, tokenizer: Any, limit: int) -> list[Question]:
        return questions(Examples.read(str(self.train)), tokenizer, self.delimiter, limit)

    def _folds(self, data: Examples, seed: int) -> list[Split]:
        """Whole clusters dealt to the folds, answer by answer, in an order that `seed` decides."""
        import numpy as np

        clusters = clusters_of(data) or {}
        units = [clusters.get(row.id, row.id) for row in data]
        answer_of = {unit: row.response or "" for unit, row in zip(units, data, strict=True)}
        order = sorted(answer_of)
        if len(order) < 2:
            raise InputError(
                f"measure kernel: {data.name} holds one row; give `train` or more rows"
            )
        random.Random(seed).shuffle(order)
        # Else an answer is rarer in the training rows of those that have it: worse than guessing.
        order.sort(key=answer_of.__getitem__)
        folds = min(self.folds, len(order))
        fold_of = {unit: k % folds for k, unit in enumerate(order)}
        own = np.array([fold_of[unit] for unit in units])
        return [(np.flatnonzero(own != k), np.flatnonzero(own == k)) for k in range(folds)]

    def _predicted(self, study: Study, splits: Sequence[Split], kind: Kind) -> NDArray[np.float64]:
        """Outputs (n, k) of every row by regression, NaN where it is in no part to predict."""
        import numpy as np

        found = np.full(study.goals.shape, np.nan)
        for train, test in splits:
            found[test] = study.regressed(
                kind, train, test, self.ridge, self.from_start, self.solver
            )
        return found

    def _diagnosed(self, study: Study, split: Split, ready: Any, run: Run) -> dict[str, float]:
        from deltaloom.engine.train import TrainSettings
        from deltaloom.measure._diagnosis import diagnosis

        predicted = study.regressed(self.kernels[0], *split, self.ridge, True, self.solver)
        rows = len(split[0])
        settings = TrainSettings(
            epochs=self.steps / -(-rows // self.batch_size),
            lr=self.lr,
            batch_size=self.batch_size,
            schedule="constant",
            warmup=0.0,
            save_steps=self.steps + 1,  # never: so few steps are rather begun again
            trainable="adapter" if self.parameters == "lora" else "all",
        )
        return diagnosis(study, split, ready, settings, predicted, run)


def _across(lessons: int, asked: int) -> list[Split]:
    import numpy as np

    return [(np.arange(lessons), np.arange(lessons, lessons + asked))]


def _compared(
    study: Study, found: dict[str, NDArray[np.float64]], clusters: dict[str, str] | None
) -> dict[str, Any]:
    """Accuracy of every kernel, and of the untuned model, with the difference to the first's."""
    outputs = {**found, "untuned": study.start}
    estimates = {
        kind: Estimate.from_items(study.right(values), metric="accuracy", clusters=clusters)
        for kind, values in outputs.items()
    }
    first, *others = estimates
    facts: dict[str, Any] = {
        f"accuracy_{kind}": [one.value, one.low, one.high] for kind, one in estimates.items()
    }
    for kind in others:
        if len(study.asked) - study.lessons > 1:
            gap = compare(estimates[kind], estimates[first]).difference
            facts[f"{kind}_minus_{first}"] = [gap.value, gap.low, gap.high]
    return facts


def _account(run: Run, words: LabelWords, *, adapter: bool) -> dict[str, float]:
    """Enter the passes in the ledger: 2 N a token forward, 4 N backward (2 N by an adapter)."""
    from deltaloom.engine.meter import matmul_parameters

    backward = 2.0 if adapter else 4.0
    spent = {
        "forward_tokens": float(words.forward_tokens),
        "backward_tokens": float(words.backward_tokens),
        "flops": matmul_parameters(words.model)
        * (2.0 * words.forward_tokens + backward * words.backward_tokens),
    }
    run.spend(**spent)
    return spent
