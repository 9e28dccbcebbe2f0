"""Features: a matrix (n, d) aligned to example ids, on disk, shard by shard.

A score is a Features of width one. The folder holds `header.json`, `index.parquet` (one line per
row: id, source, and named columns) and `shards/00000.safetensors` ... with the tensor `rows`, and
`scale` where rows are int8. A shard is done when its file is there: it is written under a temporary
name and renamed. Shards are mapped, not loaded: what is read is what is asked for.
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

    from deltaloom.core._shard import Shard

SCHEMA = 1
DTYPES = ("float32", "float16", "bfloat16", "int8")
SPACE = ("base", "checkpoint", "projection", "pooling")
"""What `about` must agree in before rows of two stores may be compared."""
BLOCK = 2**22
"""Numbers of a store held in memory at once by `scores`: 16 MiB. Ours."""


class Features:
    """An id-aligned matrix in shards of `shard_rows` rows, read as float32 however it is stored.

    A unit row of 4,096 normal numbers comes back with an error of 2e-4 of its length from
    float16, 2e-3 from bfloat16 and 9e-3 from int8 (absmax per row); int8 loses more where a few
    numbers of a row are much larger than the others: 4e-2 for Student's t with 3 degrees.
    """

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
            raise InputError(f"features cannot be stored as {dtype!r}; use {', '.join(DTYPES)}")
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
        """Write one shard, (rows of that shard, width); whole or not at all.

        Raises WorkError naming a row that is not finite, or is not once it is stored.
        """
        import numpy as np

        from deltaloom.core._shard import pack

        with np.errstate(over="ignore"):  # what overflows float32 is refused below
            rows = np.ascontiguousarray(rows, dtype=np.float32)
        own = self.shards()[number]
        wanted = (len(own), self.width)
        if rows.shape != wanted:
            raise ValueError(f"shard {number} must have shape {wanted}, not {rows.shape}")
        dtype = self.header["dtype"]
        _check_finite(rows, self.ids[own.start : own.stop], self.folder, dtype)
        data = pack(rows, dtype, self._mark(number))
        path = self._path(number)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def blocks(self) -> Iterator[tuple[range, np.ndarray]]:
        """Each shard's row numbers and its rows as float32, (m, d); one shard in memory at once.

        Rows stored as float32 are the file itself, read only.
        """
        for number, rows in enumerate(self.shards()):
            yield rows, self.block(number)

    def block(self, number: int) -> np.ndarray:
        """One shard's rows as float32, (m, d); mapped, as `blocks` gives them."""
        return self._open(number).rows()

    def matrix(self) -> np.ndarray:
        """All rows as float32, (n, d), in memory."""
        import numpy as np

        found = np.empty((len(self), self.width), np.float32)
        for rows, block in self.blocks():
            found[rows.start : rows.stop] = block
        return found

    def scores(self, queries: np.ndarray) -> np.ndarray:
        """Inner products (n, t) of every row with each of `queries` (t, d), float32.

        Beside the answer it holds `BLOCK` numbers of the store, however many rows that has.
        Raises ValueError for queries of another width.
        """
        import numpy as np

        goal = np.ascontiguousarray(queries, dtype=np.float32).T  # (d, t)
        if goal.ndim != 2 or len(goal) != self.width:
            raise ValueError(f"queries must have shape (t, {self.width}), not {queries.shape}")
        found = np.empty((len(self), goal.shape[1]), np.float32)
        step = max(1, BLOCK // max(self.width, 1))
        for number, rows in enumerate(self.shards()):
            shard = self._open(number)
            for start in range(0, len(rows), step):
                stop = min(start + step, len(rows))
                part = found[rows.start + start : rows.start + stop]
                np.matmul(shard.rows(start, stop), goal, out=part)
        return found

    def check(self) -> None:
        """Raise InputError naming what shards are missing, or one that is damaged or foreign."""
        absent = self.missing()
        if absent:
            which = f"shard {_spans(absent)}" if len(absent) == 1 else f"shards {_spans(absent)}"
            raise InputError(
                f"{self.folder / 'shards'}: {which} of {len(self.shards())} missing; "
                "run the step again to make what is missing"
            )
        for number in range(len(self.shards())):
            self._open(number)

    def _mark(self, number: int) -> dict[str, str]:
        # One key only: safetensors writes several in an order that changes from call to call.
        return {"shard": f"{number} of {digest(self.header)}"}

    def _path(self, number: int) -> Path:
        return self.folder / "shards" / f"{number:05d}.safetensors"

    def _open(self, number: int) -> Shard:
        """A shard's file, mapped; what is wrong with it is said as an InputError."""
        from deltaloom.core._shard import Shard

        path = self._path(number)
        try:
            shard = Shard.open(path)
        except FileNotFoundError:
            raise InputError(f"{path} is missing; run the step again to make it") from None
        except (ValueError, OSError):
            raise InputError(
                f"{path} is cut short or damaged; remove it and run the step again"
            ) from None
        if shard.mark != self._mark(number):
            raise InputError(f"{path} belongs to other features; remove it and run the step again")
        wanted = (len(self.shards()[number]), self.width)
        if shard.stored.shape != wanted or shard.dtype != self.header["dtype"]:
            raise InputError(f"{path} is damaged; remove it and run the step again")
        return shard


def require_same_space(a: Features, b: Features) -> None:
    """Raise InputError, naming the key, unless rows of both stores may be compared.

    They may when they have one width and `about` agrees in all of `SPACE` (a key that neither has
    is no difference). The number format may differ.
    """
    ours, theirs = (
        {"width": one.width, **{key: one.header["about"].get(key) for key in SPACE}}
        for one in (a, b)
    )
    for key in ours:
        if canonical(ours[key]) != canonical(theirs[key]):
            where = first_difference(ours[key], theirs[key], key)
            raise InputError(
                f"{b.folder} cannot be compared with {a.folder} (different {where}); "
                f"compute both with the same {key}"
            )


def _spans(numbers: Sequence[int]) -> str:
    """Ascending numbers as text, runs shortened: "0, 3-5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


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


def _check_finite(
    rows: np.ndarray, ids: Sequence[str], folder: Path, dtype: str = "float32"
) -> None:
    """Raise WorkError naming the first row that is not finite, as float32 or once in `dtype`."""
    import numpy as np

    limit = _largest(dtype)
    bad = np.flatnonzero(~(np.abs(rows) < limit).all(axis=1))
    if len(bad):
        finite = np.isfinite(rows[bad[0]]).all()
        raise WorkError(
            f"{folder}: row {ids[bad[0]]!r} has values that are not finite"
            f"{f' in {dtype}' if finite else ''}; look at that row, or use a float32 model"
        )


def _largest(dtype: str) -> float:
    """The least number that a format does not hold."""
    # The floats: half a unit above the largest, 65504 + 16 and (2 - 2^-7) 2^127 + 2^119.
    # int8: 127 times a scale that was rounded up must not overflow float32.
    limits = {"float16": 65520.0, "bfloat16": (2 - 2.0**-8) * 2.0**127, "int8": 2.0**127}
    return limits.get(dtype, float("inf"))
