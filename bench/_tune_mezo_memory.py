"""MeZO's memory over sequence length in `tune.py`, beside tuning by gradient.

Every method is a process of its own, which takes two steps at each length, shortest first; the peak
is forgotten before each. Blocks from 64 KiB on are mapped, so that what is freed leaves the
process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _tune_mezo import Official, Ours, batch_of, inference, model_of, row

MEMORY = 1.1
"""Bound of the peak over that of inference."""
LENGTHS, BATCH = (128, 512, 1024), 2
METHODS = {
    "inference": "forward, logits only",
    "mezo": "MeZO low-rank",
    "official": "MeZO official loop",
    "lora_checkpointed": "LoRA + checkpointing",
    "lora": "LoRA",
    "adam": "Adam, all parameters",
}


def rows(quick: bool) -> list[dict[str, Any]]:
    """All results of this part."""
    if quick:
        return compared("25M", LENGTHS[:1], ("inference", "mezo"))
    return compared("25M", LENGTHS, tuple(METHODS)) + compared(
        "100M", (LENGTHS[0], LENGTHS[-1]), ("inference", "mezo")
    )


def compared(size: str, lengths: tuple[int, ...], methods: tuple[str, ...]) -> list[dict[str, Any]]:
    """Peaks of some methods at some lengths."""
    peaks = {method: peaks_of(size, method, lengths) for method in methods}
    print(f"peak MB, {size} fp32 (weights included), batch {BATCH}, by length {lengths}")
    for method, own in peaks.items():
        print(
            f"  {METHODS[method]:22s} " + " ".join(f"{one / 1e6:7.0f}" for one in own), flush=True
        )
    found = []
    for at, length in enumerate(lengths):
        what = f"{size}, {BATCH} x {length}: peak memory of low-rank MeZO /"
        for method, own in peaks.items():
            if method != "mezo":
                ratio = peaks["mezo"][at] / own[at]
                bound = MEMORY if method == "inference" else None
                found.append(row(f"{what} {METHODS[method]}", ratio, bound, "ratio"))
    return found


def peaks_of(size: str, method: str, lengths: tuple[int, ...]) -> list[float]:
    """Bytes above what the process held before the model, by length."""
    command = [sys.executable, __file__, size, method, *map(str, lengths)]
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=settings)
    return json.loads(out.stdout.splitlines()[-1])


def alone(size: str, method: str, lengths: list[int]) -> None:
    """One method in this process; prints its peaks."""
    import peft  # noqa: F401  (its memory is no method's)
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # transformers renames its checkpointing
    before = resident("VmRSS")
    model, peaks = model_of(size), []
    take = stepper(model, method)
    for length in lengths:
        step = take(batch_of(BATCH, length))
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        for _ in range(2):  # with the second, Adam has its state
            step()
        peaks.append(resident("VmHWM") - before)
    print(json.dumps(peaks))


def resident(key: str) -> float:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def stepper(model: Any, method: str) -> Callable[[Any], Callable[[], None]]:
    """Data -> a call that makes one step of a method on it."""
    if method == "inference":
        return lambda data: inference(model, data, labels=False)
    if method == "mezo":
        return lambda data: Ours(model, data, "lowrank")
    if method == "official":
        return lambda data: Official(model, data)
    if method.startswith("lora"):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
        model = get_peft_model(model, config)
        if method == "lora_checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-9)

    def on(data: Any) -> Callable[[], None]:
        ids = torch.tensor([one.input_ids for one in data], device=model.device)

        def step() -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return on


if __name__ == "__main__":
    alone(sys.argv[1], sys.argv[2], [int(one) for one in sys.argv[3:]])
