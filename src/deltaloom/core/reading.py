"""Reading rows from JSONL, JSON, CSV and Parquet files, folders of them, and `datasets` ids."""

from __future__ import annotations

import codecs
import csv
import datetime
import decimal
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltaloom.core.errors import InputError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

Row = tuple[str, str, dict[str, Any]]
"""Where it stands ("pool.jsonl line 3"), its default source, and its columns."""


def rows(name: str) -> Iterator[Row]:
    """Rows of a file, of every data file in a folder, or of a `datasets` id (`org/name[:split]`).

    A finished `select` run folder gives its selected rows. Raises InputError naming file and
    line for whatever cannot be read.
    """
    path = Path(name).expanduser()
    if path.is_file():
        yield from _file_rows(path)
    elif path.is_dir():
        yield from _folder_rows(path)
    elif path.suffix in SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"{name}: no such file or folder; check the path")
    else:
        yield from _hub_rows(name)


def files_of(name: str) -> list[Path]:
    """The local files behind a data name, for hashing; empty for a `datasets` id."""
    path = Path(name).expanduser()
    if path.is_dir():
        chosen = path / "selected.jsonl"
        return [chosen] if chosen.exists() else _data_files(path)
    return [path] if path.is_file() else []


def _folder_rows(path: Path) -> Iterator[Row]:
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        import datasets

        try:
            data = datasets.load_from_disk(str(path))
        except Exception as error:
            raise InputError(f"{path}: the dataset does not load ({_first_line(error)})") from None
        yield from _dataset_rows(data, str(path), "give the folder of one, {name}/{split}")
        return
    found = files_of(str(path))
    if not found:
        raise InputError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
    for file in found:
        yield from _file_rows(file)


def _data_files(path: Path) -> list[Path]:
    return sorted(
        file for file in path.iterdir() if file.suffix in SUFFIXES and file.name[0] not in "._"
    )


def _file_rows(path: Path) -> Iterator[Row]:
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix)
    if reader is None:
        raise InputError(f"{path}: unknown file type {path.suffix!r}; use {', '.join(SUFFIXES)}")
    for where, row in reader(path):
        if not isinstance(row, dict):
            raise InputError(f"{where}: a row must be an object with named fields")
        yield where, path.stem, row


def _text(path: Path) -> str:
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path} line {line}: not UTF-8; convert the file to UTF-8") from None


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{where}: not JSON ({error.msg}); one object a line") from None
            yield where, row


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as error:
        hint = "; name it .jsonl if it has one object a line" if error.msg == "Extra data" else ""
        raise InputError(f"{path} line {error.lineno}: not JSON ({error.msg}){hint}") from None
    if isinstance(value, dict):
        lists = [key for key, part in value.items() if isinstance(part, list)]
        if len(lists) != 1:
            raise InputError(f"{path}: must be a list of rows, or an object holding one list")
        value = value[lists[0]]
    if not isinstance(value, list):
        raise InputError(f"{path}: must be a list of rows, or an object holding one list")
    for number, row in enumerate(value, 1):
        yield f"{path} row {number}", row


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a text of 128 KiB
    # Only real line ends separate rows: str.splitlines would cut at U+2028 and form feeds too.
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        names = reader.fieldnames or []
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise InputError(f"{path} line 1: column {twice[0]!r} is there twice; rename one")
        for row in reader:
            where = f"{path} line {reader.line_num}"
            if None in row or None in row.values():
                raise InputError(f"{where}: has not as many fields as the header")
            # CSV knows texts only: an empty cell is an absent value.
            yield where, {name: cell for name, cell in row.items() if cell != ""}
    except csv.Error as error:
        # DictReader counts a line only once it is read whole.
        raise InputError(f"{path} line {reader.reader.line_num}: not CSV ({error})") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
        number = 0
        for batch in table.iter_batches(4096):
            for row in batch.to_pylist():
                number += 1
                where = f"{path} row {number}"
                yield where, _plain(where, row)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a Parquet file ({_first_line(error)})") from None


def _hub_rows(name: str) -> Iterator[Row]:
    import datasets

    repo, _, split = name.partition(":")
    try:
        data = datasets.load_dataset(repo, split=split or None)
    except Exception as error:
        raise InputError(
            f"{name}: neither a file or folder here nor a loadable dataset id "
            f"({_first_line(error)})"
        ) from None
    yield from _dataset_rows(data, name, "name one as {name}:{split}")


def _dataset_rows(data: Any, name: str, remedy: str) -> Iterator[Row]:
    if isinstance(data, dict):
        if len(data) != 1:
            one = remedy.format(name=name, split=next(iter(data), "SPLIT"))
            raise InputError(f"{name}: has the splits {', '.join(data)}; {one}")
        (data,) = data.values()
    for number, row in enumerate(data, 1):
        where = f"{name} row {number}"
        yield where, name, _plain(where, row)


def _plain(where: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row with times and decimals as texts; JSON has no form for them."""
    return {key: _plain_value(where, key, value) for key, value in row.items()}


def _plain_value(where: str, key: str, value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain_value(where, key, part) for part in value]
    if isinstance(value, dict):
        return {str(name): _plain_value(where, key, part) for name, part in value.items()}
    raise InputError(
        f"{where}: column {key!r} holds {type(value).__name__}, which a row of text cannot keep; "
        "drop the column"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
