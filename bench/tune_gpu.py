"""Tuning under constraints on a GPU: peak memory and time of a step over sequence length.

    python bench/tune_gpu.py [--quick] [--device cuda] [--seconds N]

A random Llama of 100M parameters (`_tune_mezo.py`); every method takes steps at each length in turn
on a model of its own. Memory is the peak of what torch allocated on the device, weights included;
time is the median of synchronised steps of the wall. Sparse tuning has 1 % of the adapted elements,
its LoRA the rank nearest to as many parameters; the other LoRA has rank 8. Methods that run out of
memory at a length are left out from there on. Without a GPU nothing is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _tune_mezo import Ours, batch_of, inference, model_of, row
from _tune_mezo_memory import METHODS, stepper

BATCH = 8
LENGTHS = (128, 512, 1024, 2048, 4096)
MEMORY = 1.1
"""Bound of MeZO's peak over that of inference. Times have none: their bounds are the CPU's."""
DENSITY = 0.01
SIDES = {
    **METHODS,
    "forward": "forward with its loss",
    "gaussian": "MeZO Gaussian",
    "rademacher": "MeZO Rademacher",
    "sparse": "sparse, 1 % (as SpIEL between its selections)",
    "lora_equal": "LoRA of as many parameters",
}
Figure = tuple[float, float]
"""Peak bytes and milliseconds a step."""


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the small model and one length")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=600, help="begin no method after this")
    options = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: nothing is measured")
        print(json.dumps({"bench": "tune_gpu", "results": [], "skipped": "no GPU"}))
        return
    size, lengths = ("25M", LENGTHS[:1]) if options.quick else ("100M", LENGTHS)
    name = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    print(f"{name}, torch {torch.__version__}")
    results, start = [], time.monotonic()
    for dtype in ("float32",) if options.quick else ("float32", "bfloat16"):
        found: dict[str, list[Figure | None]] = {}
        for method in SIDES:
            if dtype == "bfloat16" and method == "gaussian":
                continue  # refuses 16-bit weights
            if time.monotonic() - start < options.seconds:
                found[method] = figures(size, method, dtype, lengths, options.device)
        table(found, f"{size}, {dtype}, batch {BATCH}", lengths)
        results += compared(found, f"{size} {dtype}", lengths)
    print(json.dumps({"bench": "tune_gpu", "results": results}))


def figures(
    size: str, method: str, dtype: str, lengths: tuple[int, ...], device: str
) -> list[Figure | None]:
    """Peak and time of a method by length; None where it does not fit or does not run."""
    gc.collect()
    model = model_of(size).to(device=device, dtype=getattr(torch, dtype))
    model.config.max_position_embeddings = max(lengths)
    found: list[Figure] = []
    try:
        take = side(model, method)
        for length in lengths:
            found.append(one(take(batch_of(BATCH, length)), device))
    except Exception as error:
        print(f"{method}, {dtype}: {type(error).__name__}: {str(error).splitlines()[0]}")
    shown = ", ".join(f"{peak / 1e6:.0f} MB {spent:.1f} ms" for peak, spent in found)
    print(f"{method}, {dtype}: {shown}", flush=True)
    return [*found, *[None] * (len(lengths) - len(found))]


def one(step: Callable[[], None], device: str) -> Figure:
    """Peak and time of steps that have warmed up."""
    for _ in range(3):
        step()
    cuda = device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    spent: list[float] = []
    while len(spent) < 5 or (len(spent) < 20 and sum(spent) < 1):
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if cuda else 0.0
    return float(peak), statistics.median(spent) * 1e3


def side(model: Any, method: str) -> Callable[[Any], Callable[[], None]]:
    """Data -> a call that makes one step of a method on it."""
    if method == "forward":
        return lambda data: inference(model, data, labels=True)
    if method in ("gaussian", "rademacher"):
        return lambda data: Ours(model, data, method)
    if method in ("sparse", "lora_equal"):
        return by_gradient(model, method)
    return stepper(model, method)


def by_gradient(model: Any, method: str) -> Callable[[Any], Callable[[], None]]:
    """Steps on the sparse adapter, or on LoRA of as many parameters."""
    from peft import LoraConfig, get_peft_model

    from deltaloom.core.adapters.sparse import SparseConfig

    linear = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    ]
    elements = sum(module.weight.numel() for module in linear)
    sides = sum(sum(module.weight.shape) for module in linear)
    config: Any = SparseConfig(density=DENSITY, target_modules="all-linear")
    if method == "lora_equal":
        rank = max(1, round(DENSITY * elements / sides))
        config = LoraConfig(r=rank, target_modules="all-linear")
    config.task_type = "CAUSAL_LM"
    return stepper(get_peft_model(model, config), "adam")


def table(found: dict[str, list[Figure | None]], what: str, lengths: tuple[int, ...]) -> None:
    """Print peaks and times."""
    for at, unit in enumerate(("peak MB, weights included", "ms a step")):
        print(f"\n| {what}: {unit} | {' | '.join(map(str, lengths))} |")
        print("|---|" + "---|" * len(lengths))
        for method, own in found.items():
            scale = 1e6 if at == 0 else 1.0
            cells = [f"{figure[at] / scale:.4g}" if figure else "" for figure in own]
            print(f"| {SIDES[method]} | {' | '.join(cells)} |", flush=True)


def compared(
    found: dict[str, list[Figure | None]], what: str, lengths: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Ratios with and without a bound."""
    wanted: list[tuple[int, str, str, float | None]] = [
        (0, "mezo", "inference", MEMORY),
        (0, "mezo", "adam", None),
        (0, "mezo", "lora", None),
        (0, "mezo", "lora_checkpointed", None),
        (1, "mezo", "forward", None),
        (1, "official", "forward", None),
        (1, "gaussian", "forward", None),
        (1, "rademacher", "forward", None),
        (1, "sparse", "lora_equal", None),
        (0, "sparse", "lora_equal", None),
    ]
    results = []
    for kind, first, other, bound in wanted:
        both = zip(lengths, found.get(first, ()), found.get(other, ()), strict=False)
        for length, a, b in both:
            if a and b and b[kind]:
                name = f"{what}, {BATCH} x {length}: {SIDES[first]} / {SIDES[other]}"
                unit = "peak memory, ratio" if kind == 0 else "time of a step, ratio"
                results.append(row(name, a[kind] / b[kind], bound, unit))
    return results


if __name__ == "__main__":
    main()
