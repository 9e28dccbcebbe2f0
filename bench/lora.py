"""LoRA: combining adapters to one rank beside PEFT, extracting one beside a full SVD.

    python bench/lora.py [--quick] [--repeats N]

CPU seconds of one thread, medians, both sides in this process on the same adapters. Combining
counts from three adapters in memory (rank 16, weights 0.5, 0.3 and 0.8) to the factors of rank 16;
PEFT does it by `add_weighted_adapter(combination_type="svd")`. The folder rows count from three
adapter folders to the combined one; PEFT's side is given its loaded model. Distances are
relative, in the Frobenius norm: to PEFT's matrix, and to the best of that rank (NumPy, float64).
Extraction counts a randomized SVD of one change whose singular values fall as i ** -0.5, the full
one being `torch.linalg.svd`; "excess" is how far its error is above the best of that rank.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.core.deltas.extraction import leading

COMBINE = 1 / 100
RANK = 16
WEIGHTS = (0.5, 0.3, 0.8)
NAMES = ("a", "b", "c")


def base_in(folder: Path, hidden: int) -> Base:
    """A random Llama of one layer whose attention matrices are all hidden x hidden."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return Base(model=str(folder), device="cpu")


def adapters_in(folder: Path, base: Base, targets: list[str]) -> list[Path]:
    """Three adapters with random factors, saved by PEFT."""
    from peft import LoraConfig, get_peft_model

    found = []
    for seed, name in enumerate(NAMES):
        config = LoraConfig(
            task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=targets
        )
        model = get_peft_model(base.load(), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.02)
        model.save_pretrained(folder / name)
        found.append(folder / name)
    return found


def seconds(do: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median CPU seconds, and what the last call gave."""
    spent, given = [], None
    for _ in range(repeats):
        start = time.process_time()
        given = do()
        spent.append(time.process_time() - start)
    return statistics.median(spent), given


def row(name: str, value: float, bound: float | None, unit: str) -> dict[str, Any]:
    """One result; it holds when it is at most `bound`."""
    holds = bound is None or value <= bound
    return {
        "name": name,
        "value": float(f"{value:.4g}"),
        "bound": bound,
        "holds": holds,
        "unit": unit,
    }


def combination(folder: Path, hidden: int, targets: list[str], repeats: int) -> list[dict]:
    """One shape beside PEFT."""
    from peft import PeftModel

    base = base_in(folder / "base", hidden)
    paths = adapters_in(folder, base, targets)
    deltas = [load(path, base) for path in paths]

    def ours() -> Any:
        a, b, c = (weight * delta for weight, delta in zip(WEIGHTS, deltas, strict=True))
        return (a + b + c).truncate(RANK).delta

    def ours_on_disk() -> None:
        a, b, c = (weight * load(path, base) for weight, path in zip(WEIGHTS, paths, strict=True))
        (a + b + c).truncate(RANK).delta.save(folder / "ours")

    model = PeftModel.from_pretrained(base.load(), paths[0], adapter_name="a")
    for name, path in zip(NAMES[1:], paths[1:], strict=True):
        model.load_adapter(path, adapter_name=name)

    def theirs() -> None:
        if "svd" in model.peft_config:
            model.delete_adapter("svd")
        model.add_weighted_adapter(
            list(NAMES), list(WEIGHTS), "svd", combination_type="svd", svd_rank=RANK
        )

    ours()
    mine, delta = seconds(ours, 7)
    disk, _ = seconds(ours_on_disk, 5)
    peft, _ = seconds(theirs, repeats)
    saved, _ = seconds(lambda: model.save_pretrained(folder / "theirs", ["svd"]), 1)
    far, lost = distances(model, delta, deltas)
    what = f"3 x r{RANK} to r{RANK}, {len(targets)} modules of {hidden}-wide {'/'.join(targets)}"
    print(
        f"{what}: ours {mine * 1e3:.2f} ms, PEFT {peft:.2f} s ({peft / mine:.0f}x); "
        f"from folders to folder {disk * 1e3:.1f} ms, PEFT without loading {peft + saved:.2f} s; "
        f"distance to PEFT's {far:.1e}, to the best {lost:.1e}",
        flush=True,
    )
    return [
        row(f"{what}: time / PEFT", mine / peft, COMBINE, "ratio"),
        row(f"{what}: folders to folder / PEFT", disk / (peft + saved), None, "ratio"),
        row(f"{what}: distance to PEFT's", far, 1e-4, "relative"),
        row(f"{what}: distance to the best", lost, 1e-5, "relative"),
    ]


def distances(model: Any, delta: Any, deltas: list[Any]) -> tuple[float, float]:
    """Largest relative distance of any module to PEFT's matrix and to the best of the rank."""
    far, lost = 0.0, 0.0
    for name, module in model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        tensor = f"{name.removeprefix('base_model.model.')}.weight"
        mine = delta.to_dense(tensor)
        other = module.get_delta_weight("svd").detach()
        far = max(far, float((mine - other).norm() / other.norm()))
        pairs = zip(WEIGHTS, deltas, strict=True)
        total = sum(weight * own.to_dense(tensor).double() for weight, own in pairs).numpy()
        # All of the sum lies in 3 * RANK directions, so a thin basis of its columns is exact.
        thin = np.linalg.qr(total @ np.random.default_rng(0).standard_normal((total.shape[1], 64)))[
            0
        ]
        u, s, v = np.linalg.svd(thin.T @ total, full_matrices=False)
        best = (thin @ u[:, :RANK] * s[:RANK]) @ v[:RANK]
        lost = max(lost, float(np.linalg.norm(mine.numpy() - best) / np.linalg.norm(best)))
    return far, lost


def extraction(out: int, into: int, repeats: int) -> list[dict]:
    """One matrix beside a full SVD."""
    random = np.random.default_rng(0)
    small = min(out, into)
    u, v = (np.linalg.qr(random.standard_normal((side, small)))[0] for side in (out, into))
    s = np.arange(1, small + 1.0) ** -0.5
    matrix = torch.tensor((u * s) @ v.T, dtype=torch.float32)
    mine, (left, right) = seconds(lambda: leading(matrix, RANK), repeats)
    theirs, _ = seconds(lambda: torch.linalg.svd(matrix, full_matrices=False), 1)
    error = float((matrix.double() - left.double() @ right.double()).norm())
    excess = max(error / float(np.sqrt((s[RANK:] ** 2).sum())) - 1, 0.0)
    what = f"extract r{RANK} of {out} x {into}"
    print(f"{what}: ours {mine:.3f} s, full {theirs:.2f} s, excess error {excess:.2%}", flush=True)
    return [
        row(f"{what}: time / full SVD", mine / theirs, None, "ratio"),
        row(f"{what}: excess error", excess, 0.01, "relative"),
    ]


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small cases, under 45 s")
    parser.add_argument("--repeats", type=int, default=3, help="runs of PEFT, of which the median")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import peft

    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {platform.machine()}, "
        f"PEFT {peft.__version__}, torch {torch.__version__}, one thread"
    )
    with tempfile.TemporaryDirectory(prefix="bench-lora-") as home:
        folder = Path(home)
        if options.quick:
            results = combination(folder / "1", 1024, ["q_proj", "o_proj"], 1)
            results += extraction(1024, 1024, 1)
        else:
            squares = ["q_proj", "k_proj", "v_proj", "o_proj"]
            results = combination(folder / "1", 1024, squares, options.repeats)
            results += combination(folder / "2", 2048, squares, options.repeats)
            results += combination(folder / "3", 2048, ["up_proj"], 1)
            results += extraction(2048, 2048, options.repeats)
            results += extraction(2048, 5632, options.repeats)
    print(json.dumps({"bench": "lora", "results": results}))


if __name__ == "__main__":
    main()
