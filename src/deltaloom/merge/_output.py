"""The folder that a merge writes: temporary until it is whole, locked, taken up when asked for."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.tensors import sync_folder

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
JOURNAL = ".merged"
KEY = "key"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_COPIED = (
    "README.md",
    "trainer_state.json",
    "run.json",
    "recipe.yaml",
    "metrics.jsonl",
    "delta.json",
)


def start_of_machine() -> str:
    """What tells this start of the machine from any other; empty where that is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


def copy_companions(source: Path, target: Path, dtype: str | None = None) -> None:
    """Copy what makes weights a model (config, tokenizer, templates, code), never weights."""
    for file in sorted(source.iterdir()):
        weights = file.name.endswith((*WEIGHT_SUFFIXES, ".index.json"))
        if file.is_file() and not weights and file.name[0] != "." and file.name not in NOT_COPIED:
            shutil.copyfile(file, target / file.name)
    config = target / "config.json"
    if dtype and config.is_file():
        values = json.loads(config.read_text(encoding="utf-8"))
        values = {key: value for key, value in values.items() if key != "torch_dtype"}
        config.write_text(json.dumps({**values, "dtype": dtype}, indent=2) + "\n", encoding="utf-8")


def check_free(out: Path) -> None:
    """Raise InputError for an output folder that is there and not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is already there; remove it or choose another output folder")


@contextmanager
def published(out: Path, started: str, *, resume: bool) -> Iterator[Path]:
    """A locked temporary folder beside `out` that takes its place when all went well.

    It is empty, unless `resume` finds one whose journal begins with the line `started`; bad input
    and a full disk leave nothing of it.
    """
    check_free(out)
    with locked(out.with_name(f".{out.name}.part"), out) as folder:
        # What was written reaches the disk with time, unless the machine itself went down.
        known = started[0] != " " and _first_line(folder / JOURNAL) == started
        if not (resume and known):
            empty(folder)
        try:
            yield folder
            os.replace(folder, out)
            sync_folder(out.parent)
        except BaseException as error:
            full = error.strerror if isinstance(error, OSError) and error.errno in FULL else None
            if not resume or full or isinstance(error, InputError):
                shutil.rmtree(folder, ignore_errors=True)
            if full:
                raise InputError(
                    f"{out}: the disk became full ({full}); nothing is left of the "
                    "merge, make room and run it again"
                ) from None
            raise


@contextmanager
def locked(folder: Path, out: Path) -> Iterator[Path]:
    """`folder`, made when it is not there, for this process alone.

    Raises WorkError when another process writes `out` there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            # the lock dies with its process, so a killed merge does not block the next one
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(folder).st_ino != os.fstat(lock).st_ino:
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            raise WorkError(f"{out} is being written by another process; wait for it") from None
        yield folder
    finally:
        os.close(lock)


@contextmanager
def workplace(out: Path, key: str) -> Iterator[Path]:
    """A locked folder beside `out` for what a merge makes on its way there.

    What an interrupted merge of the same `key` left is in it. It is removed at the end, unless
    work failed that can be taken up.
    """
    with locked(out.with_name(f".{out.name}.work"), out) as folder:
        if _first_line(folder / KEY) != key:
            empty(folder)
            (folder / KEY).write_text(key + "\n", "utf-8")
        try:
            yield folder
        except BaseException as error:
            if isinstance(error, InputError):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def empty(folder: Path) -> None:
    """Remove all that is in the folder."""
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def _first_line(file: Path) -> str | None:
    try:
        return file.read_text("utf-8").split("\n", 1)[0]
    except (OSError, UnicodeDecodeError):
        return None
