"""The product's gradient pass over a pool in a file, as a process of its own.

    python bench/_gradient_pass.py WORK POOL [--workers N]

WORK holds the lab's base (`base`) and, once the first call has made it, a warm-up. Prints one JSON
object: seconds, peak resident memory and rows. `gradients.py` runs it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
import warnings
from pathlib import Path

import torch

from deltaloom.core.base import Base
from deltaloom.core.examples import Examples
from deltaloom.core.run import Run, Workers
from deltaloom.select._influence import Sketching, gradient_pass
from deltaloom.select._warmup import read_epochs, warm_up
from deltaloom.tune.lora import Lora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("pool", type=Path)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    work: Path = options.work
    base = Base(model=str(work / "base"), device="cpu")
    lora = Lora(r=8, epochs=1, batch_size=4)
    how = Sketching(base, lora, "sparse", 4096, 0, "int8")
    home = work / f"pass-{options.pool.stem}"
    shutil.rmtree(home, ignore_errors=True)
    with Run.open(home / "run", {}, {}) as run:
        run.workers = Workers(options.workers)
        if not (work / "warmup.json").exists():
            warm_up(how, 1.0, Examples.read(work / "few.jsonl"), run, work)
        epoch = read_epochs(work / "warmup")[-1]
        pool = Examples.read(options.pool)
        cpu, wall = time.process_time(), time.perf_counter()
        gradient_pass(how, epoch, "pool", pool, run, home)
        spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    peak = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    )
    print(json.dumps({"rows": len(pool), "mb": int(peak.split()[1]) / 1024, **spent}))


if __name__ == "__main__":
    main()
