"""The router of `model=auto`: which task a prompt is of, by the base's hidden states.

Logistic regression over tasks on the base's mean last hidden state, each dimension standardised:
minimises `mean_i c_i * -log softmax(W z_i + b)[y_i] + |W|^2 / (2 C n)`, with `c_i` such that all
tasks weigh the same (scikit-learn's `LogisticRegression` with `class_weight="balanced"` and C = 1,
its default). One forward pass of the base a request; the prompt is read again by the task that is
chosen. A construction of our own: an attached classifier is common, no paper is followed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaloom.core.atomic import new_file
from deltaloom.core.base import Base
from deltaloom.core.encoding import Encoded
from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Estimate
from deltaloom.core.examples import Example, Examples
from deltaloom.core.spec import digest

INVERSE_STRENGTH = 1.0
"""C. scikit-learn's default."""
FOLDS = 5
"""Parts of the rows, each routed once by a router that has not seen it. scikit-learn's default."""
LONGEST = 512
"""Tokens that are looked at, the last ones. Ours."""


@dataclass(frozen=True)
class Router:
    """A trained router."""

    tasks: tuple[str, ...]
    weight: NDArray[np.float32]
    """(tasks, h), over standardised dimensions"""
    bias: NDArray[np.float32]
    """(tasks,)"""
    mean: NDArray[np.float32]
    scale: NDArray[np.float32]
    """(h,) of the training rows."""
    about: dict[str, Any]
    """Base, rows and the accuracy on rows held out."""

    def route(self, embedded: NDArray[np.float32]) -> list[tuple[str, float]]:
        """For each embedding `(n, h)`: the most probable task and its probability."""
        share = _softmax((embedded - self.mean) / self.scale @ self.weight.T + self.bias)
        best = share.argmax(1)
        return [(self.tasks[k], float(share[i, k])) for i, k in enumerate(best)]

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        from safetensors.numpy import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: np.ascontiguousarray(getattr(self, name))
            for name in ("weight", "bias", "mean", "scale")
        }
        about = {"tasks": list(self.tasks), **self.about}
        with new_file(path) as temporary:
            save_file(tensors, temporary, metadata={"router": json.dumps(about)})

    @classmethod
    def load(cls, path: Path, base: Base) -> Router:
        """Read what `save` wrote; raises InputError for another file or another base's router."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "np") as file:
                about = json.loads((file.metadata() or {})["router"])
                weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
                mean, scale = file.get_tensor("mean"), file.get_tensor("scale")
                tasks = tuple(about.pop("tasks"))
        except FileNotFoundError:
            raise InputError(
                f"{path}: no such router; give examples.TASK=ROWS and it is trained"
            ) from None
        except (SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path}: is no router ({error}); remove it") from None
        if about.get("base") != base.fingerprint():
            raise InputError(
                f"{path}: was trained on {about.get('model')} ({about.get('base')}), not on "
                f"{base.model} ({base.fingerprint()}); give another file or examples.TASK=ROWS"
            )
        return cls(tasks, weight, bias, mean, scale, about)


def train(
    embedded: NDArray[np.float32], labels: Sequence[str], ids: Sequence[str], about: dict[str, Any]
) -> Router:
    """A router from embeddings `(n, h)` and their tasks, with its held-out accuracy in `about`.

    Raises InputError for fewer than two tasks or for a task with fewer than two rows.
    """
    tasks = tuple(sorted({*labels}))
    counts = {task: [*labels].count(task) for task in tasks}
    if len(tasks) < 2:
        raise InputError("a router needs examples of at least two tasks")
    few = [task for task in tasks if counts[task] < 2]
    if few:
        raise InputError(f"examples.{few[0]}: a router needs at least two rows of a task")
    classes = np.array([tasks.index(label) for label in labels])
    fold = np.zeros(len(labels), int)
    for k in range(len(tasks)):
        own = np.flatnonzero(classes == k)
        fold[own] = np.arange(len(own)) % FOLDS
    right: dict[str, float] = {}
    for part in range(fold.max() + 1):
        test = np.flatnonzero(fold == part)
        router = _fit(tasks, embedded[fold != part], classes[fold != part], {})
        for i, (task, _) in zip(test.tolist(), router.route(embedded[test]), strict=True):
            right[f"{labels[i]}/{ids[i]}"] = float(task == labels[i])
    held_out = Estimate.from_items(right, metric="accuracy", of="router")
    told = {"rows": counts, "accuracy": held_out.value, "low": held_out.low, "high": held_out.high}
    return _fit(tasks, embedded, classes, {**about, **told})


def question(turns: Sequence[Mapping[str, str]]) -> str:
    """What is looked at of a conversation: what the user said, without the template."""
    return "\n".join(turn["content"] for turn in turns if turn["role"] == "user")


def rows_of(files: Mapping[str, str], tokenizer: Any) -> tuple[list[Encoded], list[str]]:
    """Every example row as the router sees it, and its task; InputError for one without prompt."""
    rows, labels = [], []
    for task, file in files.items():
        for example in Examples.read(file):
            rows.append(encoded(_asked(example), tokenizer, example.id))
            labels.append(task)
    return rows, labels


def encoded(text: str, tokenizer: Any, name: str = "request") -> Encoded:
    """A prompt's text as tokens to embed."""
    ids = list(tokenizer(text)["input_ids"])[-LONGEST:]
    return Encoded(name, ids or [0], [0] * len(ids or [0]))


def examples_digest(files: Mapping[str, str]) -> str:
    """Sixteen hex digits of what the files hold."""
    return digest({task: [row.id for row in Examples.read(file)] for task, file in files.items()})


def _asked(example: Example) -> str:
    text = question(example.messages) if example.messages else example.prompt or example.text
    if not text:
        raise InputError(f"{example.where}: has no prompt to route by; add one")
    return text


def _fit(tasks: tuple[str, ...], x: NDArray[Any], y: NDArray[Any], about: dict[str, Any]) -> Router:
    """The minimum, for rows `(n, h)` of the tasks numbered `(n,)`."""
    from scipy.optimize import minimize

    mean, scale = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    scale[scale < 1e-8] = 1.0
    z = (x - mean) / scale  # (n, h)
    n, h = z.shape
    k = len(tasks)
    hot = np.eye(k)[y]  # (n, k)
    counts = hot.sum(0)
    balance = (n / (np.count_nonzero(counts) * counts.clip(1)))[y]  # (n,)

    def loss(flat: NDArray[Any]) -> tuple[float, NDArray[Any]]:
        weight, bias = flat[: k * h].reshape(k, h), flat[k * h :]
        share = _softmax(z @ weight.T + bias)
        nats = -np.log(share[np.arange(n), y].clip(1e-300)) @ balance / n
        back = (share - hot) * balance[:, None] / n  # (n, k)
        penalty = 1 / (INVERSE_STRENGTH * n)
        gradient = np.concatenate([(back.T @ z + penalty * weight).ravel(), back.sum(0)])
        return nats + penalty / 2 * (weight**2).sum(), gradient

    found = minimize(
        loss,
        np.zeros(k * h + k),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 1000, "gtol": 1e-8},
    )
    weight, bias = found.x[: k * h].reshape(k, h), found.x[k * h :]
    weight, bias, mean, scale = (p.astype(np.float32) for p in (weight, bias, mean, scale))
    return Router(tasks, weight, bias, mean, scale, about)


def _softmax(scores: NDArray[Any]) -> NDArray[Any]:
    raised = np.exp(scores - scores.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)
