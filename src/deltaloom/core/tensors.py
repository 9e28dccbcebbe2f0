"""Model folders as flat tensors on disk: safetensors without a model library.

A safetensors file is eight bytes (length of the header, little endian), a JSON header
(name -> dtype, shape, byte range) and the raw little-endian numbers. Headers are enough to plan any
streamed job: `TensorFolder` tells where every tensor lies and reads flat ranges of it by `pread`
(thread safe, nothing is mapped, so memory is what the caller allocates); `TensorWriter` fixes the
whole output layout from names, dtypes and shapes before the first byte and then takes flat ranges
in any order from any thread. Format: https://huggingface.co/docs/safetensors (section Format).

Importing this module does not import torch; `read` and `read_range` do, when they are called.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaloom.core.atomic import write_json
from deltaloom.core.errors import InputError, WorkError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
MAX_HEADER = 100_000_000
"""Largest header in bytes, the limit of the reference implementation."""

# safetensors code -> bytes per element, name of the torch dtype
DTYPES: dict[str, tuple[int, str]] = {
    "F64": (8, "float64"),
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U64": (8, "uint64"),
    "U32": (4, "uint32"),
    "U16": (2, "uint16"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `shape`, safetensors `dtype` code, and bytes from `offset` on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Byte position of the first element in `file`."""

    @property
    def count(self) -> int:
        """Number of elements (1 for a scalar)."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return DTYPES[self.dtype][0]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.count * self.itemsize


def read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Entries by name and the metadata of one safetensors file, from its header alone.

    Raises InputError when the file is not safetensors, or is shorter than its header promises.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise InputError(
                f"{file} is not a whole safetensors file: it has {size} bytes and its header "
                f"needs {length + 8}; copy or download it again"
            )
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            metadata = header.pop("__metadata__", None) or {}
            entries = {name: _entry(file, name, row, 8 + length) for name, row in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{file} is not a safetensors file: its header is broken") from None
    end = max((entry.offset + entry.nbytes for entry in entries.values()), default=8 + length)
    if size < end:
        raise InputError(
            f"{file} is cut short: it has {size} bytes and its header promises {end}; "
            "copy or download it again"
        )
    return entries, metadata


def _entry(file: Path, name: str, row: dict[str, Any], data: int) -> TensorEntry:
    if row["dtype"] not in DTYPES:
        raise InputError(
            f"{file}: tensor {name!r} has dtype {row['dtype']!r}; known: {', '.join(DTYPES)}"
        )
    start, stop = row["data_offsets"]
    shape = tuple(int(side) for side in row["shape"])
    entry = TensorEntry(name, row["dtype"], shape, file, data + int(start))
    if min(shape, default=0) < 0 or start < 0 or stop - start != entry.nbytes:
        raise InputError(
            f"{file}: tensor {name!r} of shape {list(shape)} and dtype {entry.dtype} takes "
            f"{entry.nbytes} bytes, its header says {stop - start}"
        )
    return entry


class TensorFolder(Mapping[str, TensorEntry]):
    """The tensors of a model or adapter folder, by name; also one `.safetensors` file.

    Looks for `model.safetensors.index.json`, `model.safetensors`, `adapter_model.safetensors`, in
    this order. Raises InputError when the folder holds none of them, when the index names a shard
    that is not there, or when a shard is broken or cut short. Reading is thread safe.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self._files: dict[Path, int] = {}
        if self.path.is_file():
            entries, self.metadata = read_header(self.path)
        elif not self.path.is_dir():
            raise InputError(f"{self.path} is not a folder; give the path of a local model folder")
        elif (self.path / INDEX).is_file():
            entries = self._sharded()
        else:
            entries, self.metadata = read_header(_single(self.path))
        self._entries = entries
        for entry in entries.values():
            if entry.file not in self._files:
                self._files[entry.file] = os.open(entry.file, os.O_RDONLY | os.O_CLOEXEC)

    def _sharded(self) -> dict[str, TensorEntry]:
        index = self.path / INDEX
        try:
            table: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{index} is not a weight index: no readable 'weight_map'") from None
        headers: dict[str, dict[str, TensorEntry]] = {}
        for name, shard in table.items():
            if shard not in headers:
                if Path(shard).name != shard:
                    raise InputError(f"{index} lists {shard!r}, which is outside its folder")
                if not (self.path / shard).is_file():
                    raise InputError(
                        f"{index} lists {shard} for tensor {name!r} but it is not in {self.path}; "
                        "copy the shard or download the model again"
                    )
                headers[shard], metadata = read_header(self.path / shard)
                self.metadata.update(metadata)
            if name not in headers[shard]:
                raise InputError(f"{index} lists {shard} for tensor {name!r}, which it lacks")
        return {name: headers[shard][name] for name, shard in table.items()}

    def __getitem__(self, name: str) -> TensorEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self._entries.values())

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fill `out` (contiguous, the tensor's element size) from flat element `start` on."""
        entry = self[name]
        target = out.data.cast("B")
        position = entry.offset + start * entry.itemsize
        if start < 0 or position + len(target) > entry.offset + entry.nbytes:
            raise ValueError(f"range {start}+{out.size} is outside {name!r} ({entry.count})")
        handle = self._files[entry.file]
        while target:
            got = os.preadv(handle, [target], position)
            if got == 0:
                raise WorkError(f"{entry.file} became shorter while it was read")
            target, position = target[got:], position + got

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Flat elements [start, stop) as bytes, shape ((stop - start) * itemsize,), uint8."""
        entry = self[name]
        stop = entry.count if stop is None else stop
        out = np.empty(max(stop - start, 0) * entry.itemsize, np.uint8)
        self.read_into(name, start, out)
        return out

    def read_range(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Flat elements [start, stop) in the tensor's own dtype, shape (stop - start,)."""
        import torch

        dtype = getattr(torch, DTYPES[self[name].dtype][1])
        raw = self.raw(name, start, stop)
        return torch.from_numpy(raw).view(dtype) if raw.size else torch.empty(0, dtype=dtype)

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in its own dtype and shape."""
        return self.read_range(name).reshape(self[name].shape)

    def close(self) -> None:
        """Close the files; later reads fail."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> TensorFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # When Python ends, modules go before the last objects do.
        if hasattr(self, "_files") and os is not None:
            self.close()


def _single(folder: Path) -> Path:
    for name in (WHOLE, ADAPTER):
        if (folder / name).is_file():
            return folder / name
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    found = f"it has {pickles[0]}, a pickle, which is never read" if pickles else "it has no such"
    raise InputError(
        f"{folder} is not a model folder: expected {INDEX}, {WHOLE} or {ADAPTER}, {found}"
        + ("; save the model as safetensors first" if pickles else " file")
    )


class TensorWriter:
    """A model folder written in place: headers first, then flat ranges in any order.

    `layout` gives (name, safetensors dtype, shape) for every tensor. Tensors are placed by falling
    element size and then by name, so the files do not depend on the order of `layout`; a shard
    holds at most `shard_bytes` bytes unless one tensor alone is larger. One shard is
    `model.safetensors`; several get the usual names and an index. `write` is thread safe for
    ranges that do not overlap. With `keep`, files of the same layout that are there keep what was
    written to them. Raises InputError when the disk has too little room.
    """

    def __init__(
        self,
        folder: str | Path,
        layout: Iterable[tuple[str, str, tuple[int, ...]]],
        *,
        shard_bytes: int = 5_000_000_000,
        metadata: dict[str, str] | None = None,
        keep: bool = False,
    ):
        self.folder = Path(folder)
        self._flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if keep else os.O_TRUNC)
        shards = _shards(layout, shard_bytes)
        self.nbytes = sum(entry.nbytes for shard in shards for entry in shard)
        room = os.statvfs(self.folder)
        if not keep and room.f_bavail * room.f_frsize < self.nbytes:
            raise InputError(
                f"{self.folder} needs {self.nbytes / 1e9:.2f} GB and its disk has "
                f"{room.f_bavail * room.f_frsize / 1e9:.2f} GB left"
            )
        self.entries: dict[str, TensorEntry] = {}
        self._files: dict[Path, int] = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._begin(self.folder / (WHOLE if len(shards) == 1 else name), shard, metadata)
        if len(shards) > 1:
            table = {name: entry.file.name for name, entry in sorted(self.entries.items())}
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": table}
            write_json(self.folder / INDEX, index)

    def _begin(self, file: Path, shard: list[TensorEntry], metadata: dict[str, str] | None) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        position = 0
        for entry in shard:
            header[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [position, position + entry.nbytes],
            }
            position += entry.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the numbers start at a multiple of eight bytes
        handle = os.open(file, self._flags, 0o644)
        self._files[file] = handle
        os.ftruncate(handle, 8 + len(text) + position)
        os.pwrite(handle, len(text).to_bytes(8, "little") + text, 0)
        offset = 8 + len(text)
        for entry in shard:
            self.entries[entry.name] = TensorEntry(
                entry.name, entry.dtype, entry.shape, file, offset
            )
            offset += entry.nbytes

    def write(self, name: str, start: int, data: np.ndarray) -> None:
        """Put `data` (contiguous, the tensor's element size) at flat element `start` on."""
        entry = self.entries[name]
        rest = data.data.cast("B")
        position = entry.offset + start * entry.itemsize
        if start < 0 or position + len(rest) > entry.offset + entry.nbytes:
            raise ValueError(f"range {start}+{data.size} is outside {name!r} ({entry.count})")
        while rest:
            done = os.pwrite(self._files[entry.file], rest, position)
            rest, position = rest[done:], position + done

    def finish(self) -> None:
        """Force everything to the disk and close."""
        for handle in self._files.values():
            os.fsync(handle)
        self.close()
        sync_folder(self.folder)

    def close(self) -> None:
        """Close without forcing; the files stay as they are."""
        while self._files:
            os.close(self._files.popitem()[1])


def _shards(
    layout: Iterable[tuple[str, str, tuple[int, ...]]], shard_bytes: int
) -> list[list[TensorEntry]]:
    entries = [TensorEntry(name, dtype, tuple(shape), Path(), 0) for name, dtype, shape in layout]
    shards: list[list[TensorEntry]] = [[]]
    filled = 0
    for entry in sorted(entries, key=lambda entry: (-entry.itemsize, entry.name)):
        if shards[-1] and filled + entry.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    return shards


def sync_folder(folder: Path) -> None:
    """Force the folder's own entries (names, renames) to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
