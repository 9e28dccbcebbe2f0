"""`deltaloom mergekit CONFIG OUT`: mergekit's YAML and the flags of mergekit-yaml, unchanged."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaloom.core.errors import InputError
from deltaloom.merge._options import SWITCHES, VALUES, size

if TYPE_CHECKING:
    from deltaloom.merge._checked import Checked, Values
    from deltaloom.merge._config import Files, MergeConfig
    from deltaloom.merge._mergekit import Job

SHOWN = 40
"""Groups of tensors that a plan lists."""
Words = Annotated[list[str] | None, typer.Argument(metavar="CONFIG OUT [--dry-run] [FLAG]...")]


def mergekit(words: Words = None) -> None:
    """Merge by a YAML file of mergekit; takes the flags of mergekit-yaml (--help lists them)."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy is imported
    from deltaloom.core.progress import progress
    from deltaloom.merge._config import read_config
    from deltaloom.merge._documents import Asked, checked_documents, run_documents

    options = _parser().parse_args(words or [])
    configs = read_config(options.config)
    checked = checked_documents(configs, options.config, options.precision)
    _say([f"{one.place}: {note}" for one in checked for note in one.notes], quiet=False)
    _say(_without_effect(options), quiet=options.quiet)
    if options.dry_run:
        made: set[str] = set()
        for one in checked:
            _show(one, made, options.num_threads)
            made.add(one.config.name or "")
        return
    out: Path = options.out
    asked = Asked(
        options.random_seed,
        options.num_threads,
        options.out_shard_size,
        options.copy_tokenizer,
        options.precision,
        options.max_memory,
    )
    with ExitStack() as bars:

        def bar(total: int) -> Any:
            bars.close()  # that of the document before
            return bars.enter_context(progress("merge, bytes", total))

        def say(note: str) -> None:
            _say([note], quiet=False)

        yaml = options.config.read_bytes()
        run_documents(checked, out, yaml, asked, say=say, progress=bar)
    print(f"done: {out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deltaloom mergekit",
        description="Merge by a YAML file of mergekit. Flags of mergekit-yaml that change nothing "
        "here are accepted.",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the YAML file")
    parser.add_argument("out", type=Path, metavar="OUT", help="the new model folder")
    parser.add_argument("--dry-run", action="store_true", help="show the plan, merge nothing")
    parser.add_argument("--random-seed", type=int, default=0, help="seed of random choices")
    parser.add_argument(
        "--precision",
        choices=("mergekit", "float32"),
        default="mergekit",
        help="round every step as mergekit does, or work in float32 and round once (ours)",
    )
    parser.add_argument("-j", "--num-threads", type=int, help="threads over tensors (two)")
    parser.add_argument("--out-shard-size", type=_size, default="5B", help="bytes, as 500M or 5B")
    parser.add_argument("--max-memory", type=_size, help="bytes of all buffers, as 256M")
    both = argparse.BooleanOptionalAction
    parser.add_argument(
        "--copy-tokenizer", action=both, default=True, help="give the output a tokenizer"
    )
    parser.add_argument("--quiet", action=both, default=False, help="say less on stderr")
    parser.add_argument("-v", action="count", help="no effect")
    for name, reason in SWITCHES.items():
        parser.add_argument(f"--{name}", action=both, help=f"no effect: {reason}")
    for name, reason in VALUES.items():
        parser.add_argument(f"--{name}", help=f"no effect: {reason}")
    return parser


def _size(text: str) -> int:
    try:
        return size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _without_effect(options: argparse.Namespace) -> list[str]:
    reasons = {**SWITCHES, **VALUES}
    # of this one the negation asks for something
    silent = {name: (None, name == "safe-serialization") for name in reasons}
    return [
        f"--{name} has no effect: {reason}"
        for name, reason in reasons.items()
        if getattr(options, name.replace("-", "_")) not in silent[name]
    ]


def _say(lines: list[str], *, quiet: bool) -> None:
    for line in () if quiet else lines:
        print(f"note: {line}", file=sys.stderr)


def _at_hand(files: Files) -> Path:
    """Files that need no download; raises InputError when there are none."""
    folder = Path(files.path).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(files.path, revision=files.revision, local_files_only=True)
    except Exception:  # whatever the reason, it is not here
        raise InputError(f"{files} is not at hand") from None
    return Path(found)


def _state(files: Files, made: set[str]) -> str:
    """Why files cannot be looked at now; empty when they can."""
    if files.path in made:
        return "made by an earlier document"
    try:
        _at_hand(files)
    except InputError as error:
        return str(error)
    return ""


def _show(checked: Checked, made: set[str], threads: int | None) -> None:
    """Print the plan of one document."""
    from deltaloom.merge._mergekit import Job

    config = checked.config
    print(f"{checked.place}: {config.merge_method}, {_form(config)}")
    missing = False
    for reference in config.references():
        asked = [files for files in (reference.model, reference.lora) if files]
        states = [_state(files, made) for files in asked]
        missing = missing or any(states)
        role = "base " if reference == config.base_model else "model"
        print(f"  {role} {reference}{''.join(f' ({state})' for state in states if state)}")
    print(f"  type of the output: {checked.dtype or 'that of each tensor'}")
    if missing:
        found = {_settings(values): where for where, values in checked.samples()}
        for text, where in found.items():
            print(f"    {where if len(found) > 1 else 'all tensors'}: {text}")
        print("  the YAML is right; tensors and bytes are known once every model is at hand")
        return
    _show_job(Job(checked, _at_hand), threads)


def _form(config: MergeConfig) -> str:
    if config.slices:
        return f"{len(config.slices)} slices"
    return f"{len(config.models or ())} models" if config.models else "a module"


def _show_job(job: Job, threads: int | None) -> None:
    groups: dict[str, list[str]] = {}
    for name, values in job.values.items():
        groups.setdefault(_settings(values), []).append(name)
    for note in job.notes:
        print(f"  note: {note}")
    if job.move and job.tables:
        print(f"  vocabulary of {job.move.size:,} rows, {len(job.tables)} tensors moved to it")
        for reference, known in job.move.known.items():
            lacking = job.move.vocabulary.lacking(known)
            print(f"    {reference} has {known.rows:,} rows and lacks {lacking:,} of the tokens")
    if job.checked.precision == "mergekit":
        finer = " (finer inputs are rounded to it)"
        found = {one.name + finer * (one.kind > 0 and one.finer) for one in job.numbers.values()}
        print(f"  arithmetic in {', '.join(sorted(found))}")
    plan = job.plan(threads)
    print(f"  reads {plan.read_bytes:,} bytes, writes {plan.written_bytes:,}")
    scans = [f"{n + 1} of {count} tensors" for n, count in sorted(plan.scans.items())]
    print(f"  passes over the inputs: {', '.join(scans)}")
    print(f"  buffers of {plan.threads} threads: {plan.buffer_bytes / 1e6:,.1f} MB")
    print(f"  {len(job.rows)} tensors, {len(groups)} groups by settings:")
    for text, names in list(groups.items())[:SHOWN]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"    {names[0]}{more}: {text}")
    if len(groups) > SHOWN:
        print(f"    and {len(groups) - SHOWN} groups more")


def _settings(values: Values) -> str:
    """Settings of a group of tensors in one line."""
    shared, each = values
    texts = [_line(shared), *(f"{name} {_line(own)}" for name, own in each if own)]
    return "; ".join(text for text in texts if text) or "no settings"


def _line(settings: dict[str, Any]) -> str:
    shown = {key: f"{v:.6g}" if isinstance(v, float) else v for key, v in settings.items()}
    return " ".join(f"{key}={value}" for key, value in shown.items() if key != "int8_mask")
