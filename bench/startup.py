"""Start-up: `--help`, `ls`, `show` and `schema` answer at once and import no model library."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

COMMANDS = {"--help": ["--help"], "ls": ["ls"], "show less": ["show", "less"], "schema": ["schema"]}
BOUND = 0.5
# An installed package has its bytecode on disk; the first, uncounted call leaves ours there.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
HEAVY = ("torch", "transformers", "peft", "datasets")


def cpu_seconds(words: list[str]) -> float:
    """CPU seconds of one call, steady on a noisy machine."""
    before = os.times()
    subprocess.run(
        [sys.executable, "-m", "deltaloom", *words],
        stdout=subprocess.DEVNULL,
        check=True,
        env=ENVIRONMENT,
    )
    after = os.times()
    return sum(
        getattr(after, key) - getattr(before, key) for key in ("children_user", "children_system")
    )


def heavy_imports(words: list[str]) -> list[str]:
    """Model libraries that a call imports."""
    log = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "deltaloom", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    ).stderr
    names = {line.rpartition("|")[2].strip() for line in log.splitlines()}
    return [name for name in HEAVY if name in names]


def main() -> None:
    repeats = 3 if "--quick" in sys.argv else 11
    results = []
    for name, words in COMMANDS.items():
        cpu_seconds(words)
        value = statistics.median(cpu_seconds(words) for _ in range(repeats))
        holds = value < BOUND and not heavy_imports(words)
        results.append(
            {"name": name, "value": value, "bound": f"< {BOUND}", "holds": holds, "unit": "CPU s"}
        )
    print("Median of", repeats, "calls; a call that imports torch or transformers does not hold.")
    print(json.dumps({"bench": "startup", "results": results}))


if __name__ == "__main__":
    main()
