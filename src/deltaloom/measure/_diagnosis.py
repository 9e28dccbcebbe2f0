"""Does fine-tuning stay where the tangent kernel at the start describes it?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from deltaloom.core.run import Run
    from deltaloom.engine.train import TrainSettings
    from deltaloom.measure._differentiable import Differentiable
    from deltaloom.measure._kernel_study import Study

FEATURES = 32
"""Held-out rows whose gradients are compared: each takes two passes and two copies of them."""


def diagnosis(
    study: Study,
    split: tuple[NDArray[np.int64], NDArray[np.int64]],
    ready: Differentiable,
    settings: TrainSettings,
    predicted: NDArray[np.float64],
    run: Run,
) -> dict[str, float]:
    """Tune on the split's first rows, compare on its second; the weights are put back.

    `predicted` are the outputs (m, k) that kernel regression from the start foresees there.
    """
    import numpy as np

    from deltaloom.engine.train import fit

    train, test = split
    parameters = {name: ready.model.get_parameter(name) for name in ready.trained}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    lessons = [study.asked[i].lesson() for i in train]
    try:
        fit(
            ready.model,
            lessons,
            study.words.pad_id,
            settings,
            run,
            folder=f"kernel-{run.folder.name}",
        )
        ready.model.eval()
        after = {name: p.detach().clone() for name, p in parameters.items()}
        tuned = study.outputs(test.tolist())  # (m, k)
        with holding(parameters, before):
            linear = study.start[test] + slopes(study, test, before, after)
        return {
            **agreement(study.start[test], tuned, linear, predicted),
            "accuracy_before": _accuracy(study, study.start[test], test),
            "accuracy_after": _accuracy(study, tuned, test),
            "accuracy_linearised": _accuracy(study, linear, test),
            "feature_distance": float(
                np.mean(distances(study, test[:FEATURES], parameters, before, after))
            ),
        }
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


def agreement(
    start: NDArray[np.float64],
    tuned: NDArray[np.float64],
    linear: NDArray[np.float64],
    predicted: NDArray[np.float64],
) -> dict[str, float]:
    """R2 of the linearisation and the correlation of the change with the foreseen one."""
    import numpy as np

    real = np.isfinite(predicted)
    change, gap = (tuned - start)[real], (tuned - linear)[real]
    foreseen = (predicted - start)[real]
    norm = np.linalg.norm(change) * np.linalg.norm(foreseen)
    moved = float((change**2).sum())
    return {
        "linearisation": 1 - float((gap**2).sum()) / moved if moved else 0.0,
        "kernel_correlation": float(change @ foreseen) / float(norm) if norm else 0.0,
        "mean_change": float(np.abs(change).mean()),
    }


def _accuracy(study: Study, outputs: NDArray[np.float64], numbers: Any) -> float:
    right = study.words.right(outputs, [study.asked[i] for i in numbers])
    return sum(right.values()) / len(right)


def slopes(
    study: Study, numbers: Any, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> NDArray[np.float64]:
    """<grad f0, dtheta>, (m, k)."""
    import numpy as np

    from deltaloom.engine.ntk import along

    batches = study.words.batches([study.asked[i] for i in numbers], study.most)
    direction = {name: after[name].float() - before[name].float() for name in before}
    found = along(study.words.model, [batch for _, batch in batches], study.words, direction)
    return found[np.argsort([i for own, _ in batches for i in own])]


def distances(
    study: Study,
    numbers: Any,
    parameters: Mapping[str, Any],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
) -> list[float]:
    """|grad f - grad f0| / |grad f0| of each row, over all its outputs."""
    from deltaloom.engine.ntk import gradients

    found = []
    for _, batch in study.words.batches([study.asked[i] for i in numbers], most=1):
        sides = []
        for weights in (before, after):
            with holding(parameters, weights):
                sides.append(gradients(study.words.model, batch, study.words, [*parameters]))
        first, second = sides
        gap = sum(float((second[name] - g).square().sum()) for name, g in first.items())
        size = sum(float(g.square().sum()) for g in first.values())
        found.append((gap / size) ** 0.5 if size else 0.0)
    return found


@contextmanager
def holding(parameters: Mapping[str, Any], values: Mapping[str, Tensor]) -> Iterator[None]:
    """The parameters with other values; nothing is copied."""
    own = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = values[name]
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]
