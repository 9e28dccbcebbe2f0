"""Tangent kernels: time beside one Jacobian-vector product per pair, and the kernel view itself.

    DELTALOOM_ASSETS=FOLDER python bench/ntk.py [--quick] [--repeats N] [--part speed|view]

Speed: the kernel of 64 by 64 rows of 32 tokens (a Llama of 1.3M parameters, one output a row), by
`engine.ntk` and as LM-Kernel-FT computes it: `jacrev` on one outer row at a time, then for each
batch of inner rows a Jacobian-vector product along every outer gradient, under `vmap`. Same model
and rows, one thread, alternating; medians of CPU seconds. The view: see `_kernel_view.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import _kernel_view
import numpy as np
import torch
from torch.func import functional_call, jacrev, jvp, vmap

from deltaloom.engine.ntk import gram

FULL = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "vocab_size": 1024}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
BOUND = 1 / 8
TOKENS = 32
BATCH = 64
"""Inner rows a pass of the peer: its fastest here (8, its default, takes 1.5 times as long)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model, and no view")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=("speed", "view"))
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    if options.part != "view":
        results += speed(SMALL if options.quick else FULL, 1 if options.quick else options.repeats)
    if options.part != "speed" and not options.quick:
        results += _kernel_view.results(options.seeds)
    print(json.dumps({"bench": "ntk", "results": results}))


def speed(size: dict[str, int], repeats: int) -> list[dict[str, Any]]:
    """Ours and the peer's medians, their ratio, and whether the kernels are the same."""
    model = llama(size)
    parameters = sum(p.numel() for p in model.parameters())
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randint(size["vocab_size"], (64, TOKENS), generator=draw) for _ in "ab")
    jobs: dict[str, Callable[[], np.ndarray]] = {
        "ours, 64 x 64 different rows": lambda: ours(model, left, right),
        "ours, 64 rows with themselves": lambda: ours(model, left, left),
        "one product per pair": lambda: per_pair(model, left, right),
    }
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    found = {}
    for _ in range(repeats):
        for name, job in jobs.items():
            start = time.process_time()
            found[name] = job()
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    mine, square, theirs = medians
    error = np.linalg.norm(found[mine] - found[theirs]) / np.linalg.norm(found[theirs])
    ratio = statistics.median(a / b for a, b in zip(seconds[mine], seconds[theirs], strict=True))
    print(f"{parameters:,} parameters, {TOKENS} tokens a row, {repeats} alternating repeats.\n")
    print("| job | CPU s, median | all |\n|---|---|---|")
    for name, times in seconds.items():
        print(f"| {name} | {medians[name]:.2f} | {', '.join(f'{t:.2f}' for t in times)} |")
    print(f"\nRelative difference of the two kernels: {error:.1e}.\n")
    return [
        {
            "name": "kernel of 64 x 64 rows over one product per pair",
            "value": ratio,
            "bound": f"<= {BOUND}",
            "holds": ratio <= BOUND,
            "unit": "ratio of CPU seconds, median",
        },
        {
            "name": "largest relative difference of the kernels",
            "value": float(error),
            "bound": "<= 1e-4",
            "holds": bool(error <= 1e-4),
            "unit": "Frobenius norm",
        },
        {
            "name": "kernel of 64 rows with themselves over one product per pair",
            "value": medians[square] / medians[theirs],
            "bound": None,
            "holds": True,
            "unit": "ratio of CPU seconds, medians",
        },
    ]


def llama(size: dict[str, int]) -> Any:
    """A random Llama; eager attention, the one that forward-mode derivatives pass through."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        **size,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_implementation": "eager",
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def difference(logits: torch.Tensor) -> torch.Tensor:
    """One output a row, (b, 1): the last position's logit of one word less that of another."""
    return logits[:, -1, 7:8] - logits[:, -1, 8:9]


def ours(model: Any, left: torch.Tensor, right: torch.Tensor) -> np.ndarray:
    batches = [left[i : i + 16] for i in range(0, len(left), 16)]
    others = batches if right is left else [right[i : i + 16] for i in range(0, len(right), 16)]

    def outputs(ids: torch.Tensor) -> torch.Tensor:
        return difference(model(input_ids=ids, use_cache=False).logits)

    return gram(model, batches, others, outputs)


def per_pair(model: Any, left: torch.Tensor, right: torch.Tensor) -> np.ndarray:
    """LM-Kernel-FT's order of work."""
    own = {name: p.detach() for name, p in model.named_parameters()}

    def f(parameters: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        named = {"input_ids": ids, "use_cache": False}
        return difference(functional_call(model, parameters, (), named).logits)

    lines = []
    with torch.no_grad():
        for i in range(len(left)):
            outer = jacrev(f)(own, left[i : i + 1])  # (1, 1, ...) each
            blocks = []
            for j in range(0, len(right), BATCH):
                inner = right[j : j + BATCH]

                def product(tangents: Any, inner: torch.Tensor = inner) -> torch.Tensor:
                    return jvp(lambda parameters: f(parameters, inner), (own,), (tangents,))[1]

                blocks.append(vmap(vmap(product))(outer).double())  # (1, 1, b, 1)
            lines.append(torch.cat(blocks, 2))
    return torch.cat(lines).numpy()


if __name__ == "__main__":
    main()
