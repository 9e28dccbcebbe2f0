"""The folder that a merge writes: temporary until it is whole, locked, taken up when asked for."""

from __future__ import annotations

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


@contextmanager
def published(out: Path, resume: bool) -> Iterator[Path]:
    """A locked temporary folder beside `out` that takes its place when all went well.

    It is empty, unless `resume` finds one with a journal; bad input leaves nothing of it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is already there; remove it or choose another output folder")
    folder = out.with_name(f".{out.name}.part")
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
        if not (resume and (folder / JOURNAL).exists()):
            for left in folder.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield folder
            os.replace(folder, out)
            sync_folder(out.parent)
        except BaseException as error:
            if not resume or isinstance(error, InputError):
                shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(lock)
