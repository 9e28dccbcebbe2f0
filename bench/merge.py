"""Merging, whole command: CPU seconds and peak memory, beside mergekit on the same files.

    python bench/merge.py [--quick] [--peer-python PATH] [--repeats N]

Makes random bfloat16 checkpoints of Llama's shape in a temporary folder (full: four of 309M
parameters in four shards each), then runs every job as a subprocess, ours and the peer's in turn,
and compares medians. CPU seconds are user + system of the whole process, imports included; memory
is the highest resident set (mapped file pages included) that the kernel or a 20 ms poll of
/proc/PID/status saw. Beside each job stands reading its inputs and writing its output once, with
the files in the page cache and after the kernel was told to forget them ("from disk").
`--peer-python` is the interpreter of an environment with mergekit 0.1.5; without it the ratios are
left out. The first run compiles the loops and Python's bytecode where no cache on disk has them and
is reported by itself, not in the medians; a variable that forbids Python to keep its bytecode is
taken away, since an installed package always has it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deltaloom.core.tensors import TensorWriter

FULL = {"hidden": 1024, "layers": 16, "ffn": 3584, "vocab": 32000, "shard": 170_000_000}
SMALL = {"hidden": 512, "layers": 6, "ffn": 1536, "vocab": 16000, "shard": 20_000_000}

# job -> our preset and settings, the peer's method and parameters, places of the models (0 = base)
JOBS = {
    "linear": ("average", {}, "linear", {}, [1, 2, 3], 1 / 4),
    "task_arithmetic": (
        "task_arithmetic", {"scale": 0.8}, "task_arithmetic", {"lambda": 0.8}, [1, 2], 1 / 8
    ),
    "ties": ("ties", {"density": 0.5}, "ties", {"density": 0.5}, [1, 2], 1 / 8),
    "dare_ties": ("dare_ties", {"density": 0.5}, "dare_ties", {"density": 0.5}, [1, 2], 1 / 8),
    "slerp": ("slerp", {"t": 0.4}, "slerp", {"t": 0.4}, [1, 2], 1 / 8),
}  # fmt: skip
COPIES = 4.0
"""Wall seconds, over those of reading the inputs and writing the output once."""
BOTH_CORES = 0.8
"""Wall seconds over CPU seconds at most, where the work is large beside the start."""
MEMORY_RATIO = 1 / 3
MEMORY_MB = 600.0

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
# Our whole command, followed by preset, base=, deltas=, settings and out=.
OURS = [sys.executable, "-m", "deltaloom", "merge"]
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
}


@dataclass(frozen=True)
class Cost:
    """What one process took."""

    cpu: float
    wall: float
    rss: float
    anonymous: float


def shapes(size: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensor names and shapes of an untied Llama."""
    h, f, v = size["hidden"], size["ffn"], size["vocab"]
    yield "model.embed_tokens.weight", (v, h)
    yield "lm_head.weight", (v, h)
    yield "model.norm.weight", (h,)
    for i in range(size["layers"]):
        layer = f"model.layers.{i}"
        for part in "qkvo":
            yield f"{layer}.self_attn.{part}_proj.weight", (h, h)
        for part, shape in (("gate", (f, h)), ("up", (f, h)), ("down", (h, f))):
            yield f"{layer}.mlp.{part}_proj.weight", shape
        for part in ("input", "post_attention"):
            yield f"{layer}.{part}_layernorm.weight", (h,)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 (n,) -> bit patterns uint16 (n,), to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def make_models(folder: Path, size: dict[str, int], count: int = 4) -> list[Path]:
    """`count` checkpoints: a base and models a small step away from it."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": size["hidden"], "intermediate_size": size["ffn"],
        "num_hidden_layers": size["layers"], "num_attention_heads": size["hidden"] // 64,
        "num_key_value_heads": size["hidden"] // 64, "vocab_size": size["vocab"],
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    random = np.random.default_rng(0)
    layout = [(name, "BF16", shape) for name, shape in shapes(size)]
    folders = [folder / f"model{i}" for i in range(count)]
    writers = []
    for path in folders:
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config, indent=2))
        (path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        writers.append(TensorWriter(path, layout, shard_bytes=size["shard"]))
    for name, shape in shapes(size):
        count = int(np.prod(shape))
        base = random.standard_normal(count, np.float32) * np.float32(0.02)
        writers[0].write(name, 0, bfloat16(base))
        for writer in writers[1:]:
            step = random.standard_normal(count, np.float32) * np.float32(0.004)
            writer.write(name, 0, bfloat16(base + step))
    for writer in writers:
        writer.finish()
    return folders


def cost(command: list[str]) -> Cost:
    """Run a command to its end and measure it; raises when it fails."""
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT)
        peaks = {"VmHWM": 0.0, "RssAnon": 0.0}
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            for line in status_lines(process.pid):
                key, _, value = line.partition(":")
                if key in peaks:
                    peaks[key] = max(peaks[key], int(value.split()[0]) / 1024)
            time.sleep(0.02)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{command[:3]} failed:\n{log.read().decode()[-3000:]}")
    # ru_maxrss starts from what the parent had when it forked, so the kernel's VmHWM is used
    return Cost(usage.ru_utime + usage.ru_stime, wall, peaks["VmHWM"], peaks["RssAnon"])


def status_lines(pid: int) -> list[str]:
    """The lines of /proc/PID/status, none when the process has just gone."""
    try:
        return Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return []


def ours(job: str, models: list[Path], out: Path) -> Cost:
    """Our whole command."""
    preset, values, _, _, places, _ = JOBS[job]
    deltas = ",".join(str(models[i]) for i in places)
    settings = [f"{key}={value}" for key, value in values.items()]
    shutil.rmtree(out, ignore_errors=True)
    inputs = [f"base={models[0]}", f"deltas=[{deltas}]", f"out={out}"]
    return cost([*OURS, preset, *inputs, *settings])


def peer(job: str, models: list[Path], out: Path, python: str) -> Cost:
    """mergekit's whole command."""
    _, _, method, parameters, places, _ = JOBS[job]
    own = {key: value for key, value in parameters.items() if key == "density"}
    config = {
        "merge_method": method,
        "dtype": "bfloat16",
        "models": [{"model": str(models[i]), "parameters": {"weight": 1.0, **own}} for i in places],
        "parameters": {key: value for key, value in parameters.items() if key != "density"},
    }
    if method != "linear":  # of slerp's two models one is the base
        config["base_model"] = str(models[places[0] if method == "slerp" else 0])
    file = out.with_suffix(".yml")
    file.write_text(json.dumps(config))  # JSON is YAML
    shutil.rmtree(out, ignore_errors=True)
    script = str(Path(python).with_name("mergekit-yaml"))
    return cost([python, script, str(file), str(out), "--num-threads", "2", "--no-copy-tokenizer"])


def copying(models: list[Path], out: Path) -> Cost:
    """Reading the files of `models` and writing those of one, in a process of its own."""
    files = [[str(file) for file in sorted(model.glob("*.safetensors"))] for model in models]
    code = (
        "import os, sys, json\n"
        "models, out, room = *json.loads(sys.argv[1]), bytearray(1 << 20)\n"
        "target = open(out, 'wb', 0)\n"
        "for number, files in enumerate(models):\n"
        "    for file in files:\n"
        "        source = open(file, 'rb', 0)\n"
        "        while got := source.readinto(room):\n"
        "            number or target.write(memoryview(room)[:got])\n"
        "os.fsync(target.fileno())\n"
    )
    out.unlink(missing_ok=True)
    return cost([sys.executable, "-c", code, json.dumps([files, str(out)])])


def evict(models: list[Path]) -> None:
    """Let the kernel forget what it holds of the models' files."""
    for file in (file for model in models for file in model.glob("*.safetensors")):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def median(costs: list[Cost], field: str) -> float:
    """Median of one measure."""
    return statistics.median(getattr(each, field) for each in costs)


def row(name: str, value: float, bound: float | None, unit: str) -> dict[str, object]:
    """One result; it holds when it is at most `bound`."""
    holds = bound is None or value <= bound
    return {"name": name, "value": round(value, 4), "bound": bound, "holds": holds, "unit": unit}


def show(job: str, who: str, costs: list[Cost]) -> None:
    """One line for the reader."""
    cpu, wall, rss, anonymous = (median(costs, f) for f in ("cpu", "wall", "rss", "anonymous"))
    print(
        f"{job:16s} {who:9s} cpu {cpu:7.2f} s  wall {wall:6.2f} s  rss {rss:6.0f} MB  "
        f"anonymous {anonymous:6.0f} MB  (median of {len(costs)})",
        flush=True,
    )


def bench(
    models: list[Path], work: Path, python: str | None, repeats: int, quick: bool, jobs: list[str]
) -> list[dict]:
    """Every job, ours and the peer's in turn."""
    results = []
    interpreter = cost([sys.executable, "-c", "import numpy, torch"]).rss
    print(f"interpreter with torch loaded: {interpreter:.0f} MB")
    limit = None if quick else COPIES  # of a small case the start is all
    for job in jobs:
        *_, places, bound = JOBS[job]
        show(job, "first run", [ours(job, models, work / "ours")])
        mine, theirs, copies = [], [], []
        fresh, fresh_copies = [], []
        read = [models[0], *(models[i] for i in places)] if job != "linear" else models[1:]
        for _ in range(repeats):
            copies.append(copying(read, work / "copy"))
            mine.append(ours(job, models, work / "ours"))
            for side, costs in ((copying, fresh_copies), (ours, fresh)):
                evict(models)
                one = (read, work / "copy") if side is copying else (job, models, work / "ours")
                costs.append(side(*one))
            if python:
                theirs.append(peer(job, models, work / "peer", python))
        show(job, "ours", mine)
        rss = median(mine, "rss")
        if theirs:
            show(job, "mergekit", theirs)
            ratio = median(mine, "cpu") / median(theirs, "cpu")
            results.append(row(f"{job}: cpu / mergekit", ratio, bound, "ratio"))
            ratio = rss / median(theirs, "rss")
            results.append(row(f"{job}: memory / mergekit", ratio, MEMORY_RATIO, "ratio"))
        else:
            results.append(row(f"{job}: cpu", median(mine, "cpu"), None, "s"))
        show(job, "copying", copies)
        show(job, "from disk", fresh)
        show(job, "copy, disk", fresh_copies)
        ratio = median(fresh, "wall") / median(fresh_copies, "wall")
        title = f"{job}: wall / reading and writing once"
        results.append(row(f"{title}, from disk", ratio, limit, "ratio"))
        ratio = median(mine, "wall") / median(copies, "wall")
        results.append(row(f"{title}, from memory", ratio, None, "ratio"))
        ratio = median(mine, "wall") / median(mine, "cpu")
        both = BOTH_CORES if job in ("ties", "dare_ties") and not quick else None
        results.append(row(f"{job}: wall / cpu", ratio, both, "ratio"))
        above = f"{job}: memory above interpreter with torch"
        results.append(row(above, rss - interpreter, MEMORY_MB, "MB"))
    return results


def main() -> None:
    """Parse, make the models, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small case, under 45 s")
    parser.add_argument("--peer-python", help="interpreter with mergekit 0.1.5")
    parser.add_argument("--jobs", nargs="*", default=[*JOBS], choices=JOBS, help="all")
    parser.add_argument("--repeats", type=int, help="runs per job (3, quick 1)")
    options = parser.parse_args()
    python = options.peer_python
    if python and not Path(python).exists():
        print(f"no interpreter at {python}: the ratios to mergekit are left out")
        python = None
    elif not python:
        print("no --peer-python: the ratios to mergekit are left out")
    with tempfile.TemporaryDirectory(prefix="bench-merge-") as folder:
        work = Path(folder)
        models = make_models(work, SMALL if options.quick else FULL)
        size = sum(file.stat().st_size for file in models[0].glob("*.safetensors"))
        print(
            f"models of {size / 1e6:.0f} MB bfloat16; {os.cpu_count()} cores, load "
            f"{os.getloadavg()[0]:.1f}, {platform.machine()}, Python {platform.python_version()}"
        )
        repeats = options.repeats or (1 if options.quick else 3)
        results = bench(models, work, python, repeats, options.quick, options.jobs)
    print(json.dumps({"bench": "merge", "results": results}))


if __name__ == "__main__":
    main()
