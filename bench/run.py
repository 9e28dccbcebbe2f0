"""Run every benchmark and write `docs/benchmarks.md`: date, machine, versions, tables, verdicts.

    python bench/run.py [--quick] [--only NAME ...]

Each script prints text for people and, as its last line, one JSON object with its results. Results
of scripts that are not run now stay in the page: they are kept in `bench/results/NAME.json`. What a
person has to say about them is in `bench/results/NAME.md`. A script in a folder, as
`claims/atm.py`, is named `claims/atm`, and its files `claims-atm`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from deltaloom.core.run import versions

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Every figure here was printed by a script under `bench/`, on the machine and date beside it, with
the peer measured in the same run. `python bench/run.py` makes this page.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small cases; writes no page")
    parser.add_argument("--only", nargs="*", help="names of scripts to run")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    parser.add_argument("--keep", nargs=2, metavar=("COMMAND", "FILE"), help="output saved before")
    options = parser.parse_args()
    scripts = [p for p in (*HERE.glob("*.py"), *HERE.glob("claims/*.py")) if p.stem[0] != "_"]
    names = sorted(p.relative_to(HERE).with_suffix("").as_posix() for p in scripts)
    names.remove("run")
    holds = True
    if options.keep:
        command, file = options.keep
        keep(packed(command, Path(file).read_text()))
    for name in [] if options.page or options.keep else options.only or names:
        result = measure(name, options.quick)
        holds &= all(one["holds"] for one in result["results"])
        if not options.quick:
            keep(result)
    if not options.quick:
        stored = sorted(RESULTS.glob("*.json"))
        PAGE.write_text("\n".join([HEAD, *(section(json.loads(p.read_text())) for p in stored)]))
    return 0 if holds else 1


def measure(name: str, quick: bool) -> dict:
    """Run one script; its last line is the result, the lines before are for people."""
    command = ["python", f"bench/{name}.py", *(["--quick"] if quick else [])]
    print("$", *command, flush=True)
    out = subprocess.run(
        [sys.executable, *command[1:]],
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    print(out, flush=True)
    return packed(" ".join(command), out)


def keep(result: dict) -> None:
    """Store one script's result for the page."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{result['bench']}.json").write_text(json.dumps(result, indent=2) + "\n")


def packed(command: str, out: str) -> dict:
    """A script's output with when, where and by which versions it was made."""
    *text, last = out.rstrip("\n").split("\n")
    script = next(word for word in command.split() if word.endswith(".py"))
    name = Path(script).with_suffix("").as_posix().removeprefix("bench/")
    return {
        **json.loads(last),
        "bench": name.replace("/", "-"),
        "text": "\n".join(text).strip(),
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": versions(),
    }


def processor() -> str:
    """The processor's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def section(result: dict) -> str:
    """One script's part of the page."""
    used = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if k in ("python", "torch"))
    rows = [
        f"| {one['name']} | {number(one['value'])} | {one['unit']} | "
        f"{'none' if one['bound'] is None else one['bound']} | {verdict(one)} |"
        for one in result["results"]
    ]
    return "\n".join(
        [
            f"## {result['bench']}",
            "",
            f"`{result['command']}`, {result['date']}, {result['machine']}; {used}.",
            "",
            "| what | value | unit | bound | holds |",
            "|---|---|---|---|---|",
            *rows,
            "",
            result["text"],
            "",
            *([notes.read_text()] if (notes := RESULTS / f"{result['bench']}.md").exists() else []),
        ]
    )


def verdict(one: dict) -> str:
    """Whether a claim holds; a figure without a bound claims nothing."""
    if one["bound"] is None:
        return ""
    return "yes" if one["holds"] else "**no**"


def number(value: object) -> str:
    """A value with four digits, or as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
