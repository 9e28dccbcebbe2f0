"""One shard of Features: rows in a number format, as the bytes of a safetensors file, and back.

The tensor `rows` (m, d) is float32, float16, bfloat16 or int8; int8 has `scale` (m,) beside it, and
row i is scale_i * rows_i with scale_i = max |row i| / 127 (absmax per row, as in QLESS, Ananta et
al. 2025, arXiv 2502.01703, at 8 bits). The bytes are written here and not by the safetensors
package, so that they are the same in all its versions, and bfloat16, which numpy lacks, is whole
numbers to both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deltaloom.core.tensors import TensorEntry, read_header

CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
"""Number formats of rows, with safetensors' names for them."""
RAW = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1"}
LARGEST = 127
"""Of int8 on both sides of zero."""


def pack(rows: np.ndarray, dtype: str, mark: dict[str, str]) -> bytes:
    """The file for finite float32 `rows` (m, d).

    What float16 or bfloat16 cannot hold becomes infinite. Metadata is `mark`.
    """
    tensors: dict[str, np.ndarray] = {}
    if dtype == "int8":
        tensors["rows"], tensors["scale"] = quantised(rows)
    elif dtype == "bfloat16":
        tensors["rows"] = to_bfloat16(rows)
    else:
        with np.errstate(over="ignore"):
            tensors["rows"] = rows.astype(RAW[CODES[dtype]], order="C", copy=False)
    layout = {"rows": CODES[dtype], "scale": "F32"}
    # Wider numbers first, so that each tensor begins at a multiple of its size.
    order = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    header: dict[str, object] = {"__metadata__": mark}
    position = 0
    for name in order:
        array = tensors[name]
        offsets = [position, position + array.nbytes]
        shape = list(array.shape)
        header[name] = {"dtype": layout[name], "shape": shape, "data_offsets": offsets}
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # The arrays themselves, not their bytes: a shard is in memory twice, not four times.
    parts = (tensors[name].reshape(-1).view(np.uint8).data for name in order)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


@dataclass(frozen=True)
class Shard:
    """A shard's file, mapped: only the rows that are asked for are read."""

    mark: dict[str, str]
    stored: np.ndarray
    """(m, d) in the file's numbers; bfloat16 as uint16."""
    dtype: str
    scale: np.ndarray | None
    """(m,) for int8."""

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Map a file; raises InputError or ValueError when it is not whole, OSError as files do."""
        entries, mark = read_header(path)
        names = {code: name for name, code in CODES.items()}
        if "rows" not in entries or entries["rows"].dtype not in names:
            raise ValueError(f"{path} holds no rows")
        raw = np.memmap(path, np.uint8, "r").view(np.ndarray)
        dtype = names[entries["rows"].dtype]
        scale = _view(raw, entries["scale"]) if dtype == "int8" and "scale" in entries else None
        if dtype == "int8" and scale is None:
            raise ValueError(f"{path} holds int8 rows without their scale")
        return cls(mark, _view(raw, entries["rows"]), dtype, scale)

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) as float32; those of a float32 file are its own, read only."""
        part = self.stored[start:stop]
        if self.dtype == "bfloat16":
            return from_bfloat16(part)
        values = part.astype(np.float32, copy=False)
        if self.scale is not None:
            values *= self.scale[start:stop, None]
        return values


def _view(raw: np.ndarray, entry: TensorEntry) -> np.ndarray:
    part = raw[entry.offset : entry.offset + entry.nbytes]
    return part.view(RAW[entry.dtype]).reshape(entry.shape)


def quantised(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 rows (m, d) and float32 scales (m,) of float32 rows; a row of zeros has scale 0."""
    scale = np.abs(rows).max(axis=1, initial=0.0) / np.float32(LARGEST)  # (m,)
    divisor = np.where(scale > 0, scale, np.float32(1))
    # Only a scale too small for float32's full precision can round beyond the largest.
    whole = np.clip(np.rint(rows / divisor[:, None]), -LARGEST, LARGEST)
    return whole.astype(np.int8), scale.astype("<f4")


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of finite float32 numbers, to nearest, ties to even, as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")


def from_bfloat16(halves: np.ndarray) -> np.ndarray:
    """float32 numbers with these upper halves."""
    return (halves.astype(np.uint32) << 16).view(np.float32)
