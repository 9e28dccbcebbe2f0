"""All documents of a YAML file of mergekit, merged one after the other; taken up when killed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from deltaloom.core.errors import InputError
from deltaloom.merge._checked import Checked, Precision, check
from deltaloom.merge._config import Files, MergeConfig, where
from deltaloom.merge._mergekit import Find, Job
from deltaloom.merge._output import check_free, workplace


@dataclass(frozen=True)
class Asked:
    """What the command line, or a caller, says beside the file."""

    seed: int = 0
    """Seed of random choices."""
    threads: int | None = None
    """Threads over tensors; two when not given."""
    shard_bytes: int = 5_000_000_000
    """Largest weights file in bytes."""
    tokenizer: bool = True
    """Give the output a tokenizer."""
    precision: Precision = "mergekit"
    """Round every step as mergekit does, or work in float32 and round once."""
    memory: int | None = None
    """Bytes of all buffers at most; what they take when not given."""


def checked_documents(
    configs: Sequence[MergeConfig], file: Path, precision: Precision = "mergekit"
) -> list[Checked]:
    """Every document, checked as far as can be without models; raises InputError."""
    places = [where(file, i, len(configs)) for i in range(len(configs))]
    return [check(one, place, precision) for one, place in zip(configs, places, strict=True)]


def finder(results: dict[str | None, Path]) -> Find:
    """Files of a model: the result of an earlier document, a folder, or the hub's."""
    from deltaloom.core.base import Base

    def find(files: Files) -> Path:
        if files.path in results:
            return results[files.path]
        return Base(model=files.path, revision=files.revision).folder

    return find


def run_documents(
    documents: Sequence[Checked],
    out: Path,
    yaml: bytes,
    asked: Asked,
    *,
    say: Callable[[str], None],
    progress: Callable[[int], Callable[[int], None] | None],
) -> None:
    """Merge into the new folder `out`, beside a copy of the `yaml`.

    A call that was interrupted is taken up by the same call on the same files: documents and
    tensors that are whole are not merged again. `say` gets notes for the user; `progress` is given
    the bytes of each document and returns what is called with those written, or None.

    Raises InputError for bad input (nothing is left of the merge then), WorkError when another
    process writes `out`.
    """
    results: dict[str | None, Path] = {}
    find = finder(results)
    made = {one.config.name for one in documents}
    inputs = [
        find(files)
        for one in documents
        for reference in one.config.references()
        for files in (reference.model, reference.lora)
        if files and files.path not in made
    ]
    for folder in inputs:
        if folder.resolve() == out.resolve():
            raise InputError(f"{out} is one of the inputs; choose another output folder")
    check_free(out)
    key = _key(yaml, asked, inputs)
    out.parent.mkdir(parents=True, exist_ok=True)
    with workplace(out, key) as work:
        for i, one in enumerate(documents):
            last = i == len(documents) - 1
            target = out if last else work / f"document-{i}"
            if not target.exists() or last:
                job = Job(one, find, asked.seed, work / f"bases-{i}")
                notes = job.run(
                    target,
                    asked.threads,
                    asked.shard_bytes,
                    yaml=yaml,
                    tokenizer=asked.tokenizer,
                    memory=asked.memory,
                    progress=progress(job.nbytes),
                    key=key,
                )
                for note in notes:
                    say(f"{one.place}: {note}")
            results[one.config.name] = target


def _key(yaml: bytes, asked: Asked, inputs: Sequence[Path]) -> str:
    """What has to be equal for an interrupted merge to be taken up."""
    from deltaloom.core.run import versions

    files = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
        for folder in inputs
        for file in sorted(folder.iterdir())
        if file.is_file()
    ]
    said = {
        name: value for name, value in asdict(asked).items() if name not in ("threads", "memory")
    }
    text = json.dumps([versions(), yaml.decode("utf-8", "replace"), said, files])
    return hashlib.sha256(text.encode()).hexdigest()
