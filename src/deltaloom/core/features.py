"""Features: a matrix (n, d) aligned to example ids, on disk, shard by shard.

A score is a Features of width one. The folder holds `header.json`, `index.parquet` (one line per
row: id, source, and named columns) and `shards/00000.safetensors` ... with the tensor `rows`.
A shard is done when its file is there: it is written under a temporary name and renamed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from deltaloom.core.atomic import new_file, write_json
from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.spec import canonical, digest, first_difference

if TYPE_CHECKING:
    import numpy as np

SCHEMA = 1
DTYPES = ("float32", "float16")


class Features:
    """An id-aligned matrix of float32 or float16 rows in shards of `shard_rows` rows."""

    def __init__(self, folder: Path, header: dict[str, Any], index: Mapping[str, list[Any]]):
        self.folder = folder
        self.header = header
        self.index = index

    @classmethod
    def create(
        cls,
        folder: Path,
        ids: Sequence[str],
        width: int,
        *,
        about: Mapping[str, Any],
        columns: Mapping[str, Sequence[Any]] | None = None,
        dtype: str = "float32",
        shard_rows: int = 256,
    ) -> Self:
        """Start a store, or take up the one in `folder` if it is the same store.

        `about` says what the rows are (base, delta, projection, seed, data digest); a store that
        says something else is refused with InputError, never mixed.
        """
        if dtype not in DTYPES:
            raise InputError(f"features cannot be stored as {dtype!r}; use {' or '.join(DTYPES)}")
        header = {
            "schema": SCHEMA,
            "rows": len(ids),
            "width": width,
            "dtype": dtype,
            "shard_rows": shard_rows,
            "ids": digest(list(ids)),
            "about": dict(about),
        }
        index = {"id": list(ids), **{name: list(col) for name, col in (columns or {}).items()}}
        path = folder / "header.json"
        if path.exists():
            there = _header(folder)
            if canonical(there) != canonical(header):
                where = first_difference(there, header, "header")
                raise InputError(
                    f"{folder} holds features of something else (different {where}); "
                    "remove that folder"
                )
        else:
            (folder / "shards").mkdir(parents=True, exist_ok=True)
            _write_index(folder, index)
            write_json(path, header)
        return cls(folder, header, index)

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """A finished store; raises InputError for a missing or broken one."""
        import pyarrow.parquet as pq

        folder = Path(folder)
        try:
            header = _header(folder)
            index = pq.read_table(folder / "index.parquet").to_pydict()
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: no features there ({error})") from None
        if digest(index.get("id")) != header["ids"]:
            raise InputError(
                f"{folder / 'index.parquet'} belongs to other features; "
                "remove the folder and run the step again"
            )
        store = cls(folder, header, index)
        store.check()
        return store

    @classmethod
    def from_scores(
        cls,
        folder: Path,
        ids: Sequence[str],
        scores: Any,
        *,
        about: Mapping[str, Any],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Self:
        """A finished store of width one from a vector of n scores."""
        import numpy as np

        values = np.asarray(scores, dtype=np.float32).reshape(-1, 1)  # (n, 1)
        if len(values) != len(ids):
            raise ValueError(f"{len(values)} scores for {len(ids)} ids")
        _check_finite(values, ids, folder)
        named = {**(columns or {}), "score": values[:, 0].tolist()}
        store = cls.create(
            folder, ids, 1, about=about, columns=named, shard_rows=max(len(values), 1)
        )
        if len(values):
            store.write_shard(0, values)
        # A store that was there may have had other scores.
        _write_index(folder, store.index)
        return store

    def __len__(self) -> int:
        return self.header["rows"]

    @property
    def ids(self) -> list[str]:
        """Row ids, in order."""
        return self.index["id"]

    @property
    def width(self) -> int:
        """Columns of the matrix."""
        return self.header["width"]

    def shards(self) -> list[range]:
        """The rows of each shard."""
        step = self.header["shard_rows"]
        return [range(i, min(i + step, len(self))) for i in range(0, len(self), step)]

    def missing(self) -> list[int]:
        """Shards still to be written."""
        return [k for k in range(len(self.shards())) if not self._path(k).exists()]

    def write_shard(self, number: int, rows: Any) -> None:
        """Write one shard, (rows of that shard, width); whole or not at all."""
        import numpy as np
        from safetensors.numpy import save

        with np.errstate(over="ignore"):  # what overflows float16 is refused below
            rows = np.ascontiguousarray(rows, dtype=self.header["dtype"])
        own = self.shards()[number]
        wanted = (len(own), self.width)
        if rows.shape != wanted:
            raise ValueError(f"shard {number} must have shape {wanted}, not {rows.shape}")
        _check_finite(rows, self.ids[own.start : own.stop], self.folder)
        data = save({"rows": rows}, metadata=self._mark(number))
        path = self._path(number)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def blocks(self) -> Iterator[tuple[range, np.ndarray]]:
        """Each shard's row numbers and its rows as float32, (m, d)."""
        for number, rows in enumerate(self.shards()):
            yield rows, self._read(number).astype("float32", copy=False)

    def matrix(self) -> np.ndarray:
        """All rows as float32, (n, d)."""
        import numpy as np

        blocks = [block for _, block in self.blocks()]
        return np.concatenate(blocks) if blocks else np.empty((0, self.width), np.float32)

    def check(self) -> None:
        """Raise InputError naming a missing, truncated or foreign shard."""
        absent = self.missing()
        if absent:
            raise InputError(f"{self._path(absent[0])} is missing; run the step again to make it")
        for number in range(len(self.shards())):
            self._read(number)

    def _mark(self, number: int) -> dict[str, str]:
        # One key only: safetensors writes several in an order that changes from call to call.
        return {"shard": f"{number} of {digest(self.header)}"}

    def _path(self, number: int) -> Path:
        return self.folder / "shards" / f"{number:05d}.safetensors"

    def _read(self, number: int) -> np.ndarray:
        from safetensors import SafetensorError, safe_open

        path = self._path(number)
        try:
            with safe_open(path, framework="np") as file:
                marks, rows = file.metadata() or {}, file.get_tensor("rows")
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path} is damaged ({error}); remove it and run the step again"
            ) from None
        if marks != self._mark(number):
            raise InputError(f"{path} belongs to other features; remove it and run the step again")
        return rows


def _write_index(folder: Path, index: Mapping[str, list[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with new_file(folder / "index.parquet") as temporary:
        pq.write_table(pa.table(dict(index)), temporary)


def _header(folder: Path) -> dict[str, Any]:
    path = folder / "header.json"
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} holds no features (no header.json in it)") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} line {error.lineno}: not JSON ({error.msg}); remove the folder"
        ) from None
    schema = header.get("schema") if isinstance(header, dict) else None
    if schema != SCHEMA:
        raise InputError(f"{path}: schema {schema!r}, this version reads {SCHEMA}")
    return header


def _check_finite(rows: np.ndarray, ids: Sequence[str], folder: Path) -> None:
    import numpy as np

    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        dtype = f" in {rows.dtype}" if rows.dtype == np.float16 else ""
        raise WorkError(
            f"{folder}: row {ids[bad[0]]!r} has values that are not finite{dtype}; "
            "look at that row, or use a float32 model"
        )
