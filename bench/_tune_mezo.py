"""MeZO in `tune.py`: the time of a step, and what 16-bit weights keep of one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from deltaloom.core.deltas.descent import Descent, Rule, Scalars, replay
from deltaloom.core.encoding import Encoded
from deltaloom.engine.perturb import Moved, Perturbed
from deltaloom.engine.response_loss import ResponseLoss

VOCABULARY = 16384
SHAPES = {"25M": (384, 1024, 7), "100M": (768, 2048, 10)}
"""Width, inner width, layers of a random Llama with an output layer of its own."""
TIME = 2.15
"""Bound of a step over one plain forward pass with its loss."""
KEPT, DRIFT = 0.1, 0.5
"""Bounds: how far the kept part of an update is from 1; drift over the official procedure's."""


def rows(quick: bool) -> list[dict[str, Any]]:
    """All results of this part."""
    found = []
    for size, rounds in (("25M", 3),) if quick else (("25M", 7), ("100M", 5)):
        for tokens in (128,) if quick else (128, 1024):
            found += times(size, tokens, rounds, every=size == "25M")
    return found + [one for name in ("bfloat16", "float16") for one in drifts(name, quick)]


def row(name: str, value: float, bound: float | None, unit: str) -> dict[str, Any]:
    """One result; it holds when it is at most `bound`."""
    value = float(f"{value:.4g}")
    holds = bound is None or value <= bound
    return {"name": name, "value": value, "bound": bound, "holds": holds, "unit": unit}


def model_of(size: str) -> Any:
    """A random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width, inner, layers = SHAPES[size]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def batch_of(batch: int, length: int) -> list[Encoded]:
    """Random rows, all of whose tokens but the first are learned."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (batch, length), generator=generator).tolist()
    return [Encoded(str(i), one, [1] * length) for i, one in enumerate(ids)]


class Ours:
    """Steps of `tune mezo` on all parameters."""

    def __init__(self, model: Any, data: list[Encoded], direction: Any) -> None:
        names = [name for name, _ in model.named_parameters()]
        self.rule = Rule(
            seed=0,
            direction=direction,
            rank=1,
            eps=1e-3,
            update="sgd",
            momentum=0.9,
            decay=0.999,
        )
        moved = Moved if direction == "gaussian" else Perturbed
        self.directed: Any = moved(model, names, self.rule)
        self.descent, self.count = Descent(self.rule), 0
        self.loss, self.chosen = ResponseLoss(model, data, 0), range(len(data))

    def __call__(self) -> None:
        number, self.count = self.count, self.count + 1
        with self.directed as directed:
            directed.choose(number, 0)
            plus, minus, _ = self.loss(directed, self.chosen)
            found = Scalars(1e-9, ((plus - minus) / (2 * self.rule.eps),))
            with torch.no_grad():
                for name, parameter in directed.parameters.items():
                    drawn = [directed.direction(name, 0)]
                    self.descent.step(number, name, parameter.data, found, drawn)


class Official:
    """The published loop: three passes that move every parameter, two forwards, one update."""

    def __init__(self, model: Any, data: list[Encoded]) -> None:
        self.model, self.count = model, 0
        self.named = [p for _, p in model.named_parameters()]
        self.ids = torch.tensor([one.input_ids for one in data], device=model.device)

    def perturb(self, seed: int, share: float) -> None:
        torch.manual_seed(seed)
        for parameter in self.named:
            parameter.data = parameter.data + share * normal(parameter) * 1e-3

    def loss(self) -> float:
        with torch.inference_mode():
            return self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.item()

    def __call__(self) -> None:
        seed, self.count = self.count, self.count + 1
        self.perturb(seed, 1)
        plus = self.loss()
        self.perturb(seed, -2)
        minus = self.loss()
        self.perturb(seed, 1)
        projected = (plus - minus) / 2e-3
        torch.manual_seed(seed)
        for parameter in self.named:
            parameter.data = parameter.data - 1e-9 * (projected * normal(parameter))


def normal(like: torch.Tensor) -> torch.Tensor:
    """What the published loop draws."""
    return torch.normal(mean=0, std=1, size=like.size(), dtype=like.dtype, device=like.device)


def inference(model: Any, data: list[Encoded], labels: bool) -> Callable[[], None]:
    """One plain forward pass, with or without its loss."""
    ids = torch.tensor([one.input_ids for one in data], device=model.device)
    named = {"labels": ids} if labels else {}

    def forward() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False, **named)

    return forward


def times(size: str, tokens: int, rounds: int, *, every: bool) -> list[dict[str, Any]]:
    """CPU seconds of a step over one forward pass, of every side or of the default alone."""
    data, model = batch_of(tokens // 128, 128), model_of(size)
    sides: dict[str, Callable[[], None]] = {
        "forward": inference(model, data, labels=True),
        "forward without loss": inference(model, data, labels=False),
        "low-rank": Ours(model, data, "lowrank"),
    }
    others: dict[str, Callable[[], None]] = {
        "Rademacher": Ours(model, data, "rademacher"),
        "Gaussian in place": Ours(model, data, "gaussian"),
        "official loop": Official(model, data),
    }
    sides |= others if every else {}
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            start = time.process_time()
            side()
            if turn:  # the first round warms up
                spent[name].append(time.process_time() - start)
    ratios = {
        name: statistics.median(a / b for a, b in zip(own, spent["forward"], strict=True))
        for name, own in spent.items()
    }
    what = f"{size}, {tokens} tokens a step"
    medians = ", ".join(f"{name} {statistics.median(s) * 1e3:.0f}" for name, s in spent.items())
    print(f"{what}, CPU ms: {medians}", flush=True)
    bare = statistics.median(
        a / b for a, b in zip(spent["low-rank"], spent["forward without loss"], strict=True)
    )
    return [
        row(f"{what}: low-rank step / forward", ratios["low-rank"], TIME, "ratio"),
        row(f"{what}: low-rank step / forward without loss", bare, None, "ratio"),
        *(
            row(f"{what}: {name} / forward", ratios[name], None, "ratio")
            for name in others
            if every
        ),
    ]


def drifts(dtype: str, quick: bool) -> list[dict[str, Any]]:
    """200 steps of lr g on weights N(0, 0.02^2): what stays of the intended change, and the rest.

    The intended change is the float64 sum of the steps. `kept` is its coefficient in the actual
    change, drift the root mean square of what is left.
    """
    found = []
    for size in (1e-6,) if quick else (1e-6, 1e-5):
        ours, theirs = drift(dtype, size, official=False), drift(dtype, size, official=True)
        what = f"{dtype}, steps of {size:g}"
        print(
            f"{what}: ours keeps {ours[0]:.2f}, drift {ours[1]:.1e}; "
            f"official loop keeps {theirs[0]:.2f}, drift {theirs[1]:.1e}"
        )
        found += [
            row(f"{what}: distance of the kept part from 1", abs(ours[0] - 1), KEPT, "absolute"),
            row(f"{what}: the same, official loop", abs(theirs[0] - 1), None, "absolute"),
            row(f"{what}: drift / official loop's", ours[1] / theirs[1], DRIFT, "ratio"),
        ]
    return found


def drift(dtype: str, size: float, *, official: bool) -> tuple[float, float]:
    """Kept part and drift of 200 steps."""
    torch.manual_seed(0)
    weights = (torch.randn(512, 512) * 0.02).to(getattr(torch, dtype))
    start, intended = weights.double(), torch.zeros(512, 512, dtype=torch.float64)
    rule = Rule(
        seed=0, direction="lowrank", rank=1, eps=1e-3, update="sgd", momentum=0.9, decay=0.999
    )
    steps = [Scalars(size, (1.0,))] * 200
    if official:
        for seed in range(len(steps)):
            for share in (1e-3, -2e-3, 1e-3, -size):
                torch.manual_seed(seed)
                z = torch.normal(mean=0, std=1, size=weights.size(), dtype=weights.dtype)
                weights = weights + share * z
            intended -= size * z.double()
    else:
        replay(rule, "w", weights, steps)
        for number in range(len(steps)):
            z = rule.directions.of(number, 0, "w", weights)
            intended -= size * z.dense().double()
    change = weights.double() - start
    kept = float((change * intended).sum() / (intended * intended).sum())
    return kept, float((change - kept * intended).square().mean().sqrt())
