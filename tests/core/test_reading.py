"""Rows from files of every format, and one sentence for each that cannot be read."""

import csv
import datetime
import decimal
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaloom.core.errors import InputError
from deltaloom.core.reading import files_of, rows

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c\nd", "completion": 'e "f", g'}]


def read(path):
    return [row for _, _, row in rows(str(path))]


def refuses(path, message):
    with pytest.raises(InputError, match=message) as caught:
        list(rows(str(path)))
    assert str(path) in str(caught.value)


def lines(items):
    return "".join(json.dumps(item) + "\n" for item in items)


# Formats.


def write_jsonl(path):
    path.write_text(lines(ROWS))


def write_json(path):
    path.write_text(json.dumps(ROWS, indent=1))


def write_json_object(path):
    path.write_text(json.dumps({"version": "1", "data": ROWS}))


def write_csv(path):
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, ["prompt", "completion"])
        table.writeheader()
        table.writerows(ROWS)


def write_parquet(path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("d.jsonl", write_jsonl),
        ("d.json", write_json),
        ("d.json", write_json_object),
        ("d.csv", write_csv),
        ("d.parquet", write_parquet),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name, write):
    write(tmp_path / name)
    assert read(tmp_path / name) == ROWS
    assert {source for _, source, _ in rows(str(tmp_path / name))} == {"d"}


def test_a_folder_gives_its_data_files_in_order_and_nothing_hidden(tmp_path):
    (tmp_path / "b.csv").write_text("prompt\nlast\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "first"}\n')
    (tmp_path / ".hidden.jsonl").write_text("broken")
    (tmp_path / "_note.json").write_text("broken")
    (tmp_path / "README.md").write_text("broken")
    assert read(tmp_path) == [{"prompt": "first"}, {"prompt": "last"}]
    assert [file.name for file in files_of(str(tmp_path))] == ["a.jsonl", "b.csv"]


def test_a_finished_select_folder_gives_its_selected_rows_only(tmp_path):
    (tmp_path / "selected.jsonl").write_text('{"prompt": "chosen"}\n')
    (tmp_path / "run.json").write_text("{}")
    assert read(tmp_path) == [{"prompt": "chosen"}]


def test_a_datasets_folder_is_read_from_disk(tmp_path):
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved") == ROWS


def test_a_datasets_folder_of_splits_asks_for_one(tmp_path):
    from datasets import Dataset, DatasetDict

    saved = tmp_path / "saved"
    one = Dataset.from_list(ROWS)
    DatasetDict({"train": one, "test": one}).save_to_disk(str(saved))
    refuses(saved, f"has the splits train, test; give the folder of one, {saved}/train")
    assert read(saved / "train") == ROWS


def test_a_broken_datasets_folder_is_named(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    refuses(tmp_path, "the dataset does not load")


def test_dates_and_decimals_become_texts_and_bytes_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {"prompt": "a", "day": datetime.date(2024, 1, 2), "cost": decimal.Decimal("1.50")}
    row |= {"nested": [{"at": datetime.datetime(2024, 1, 2, 3)}]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "d.parquet")
    (found,) = read(tmp_path / "d.parquet")
    assert found["day"] == "2024-01-02"
    assert found["cost"] == "1.50"
    assert found["nested"] == [{"at": "2024-01-02 03:00:00"}]
    pq.write_table(pa.Table.from_pylist([{"prompt": "a", "image": b"x"}]), tmp_path / "e.parquet")
    refuses(tmp_path / "e.parquet", "row 1: column 'image' holds bytes.*drop the column")


# What editors and other systems do to files.


def test_byte_order_mark_and_windows_line_ends_are_no_content(tmp_path):
    for name, text in [
        ("d.jsonl", '{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n'),
        ("d.json", '[{"prompt": "a"},\r\n{"prompt": "b"}]\r\n'),
        ("d.csv", "prompt\r\na\r\n\r\nb\r\n"),
    ]:
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read(path) == [{"prompt": "a"}, {"prompt": "b"}], name


SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"]


@pytest.mark.parametrize("separator", SEPARATORS, ids=[f"{ord(s):x}" for s in SEPARATORS])
def test_unicode_separators_end_no_row(tmp_path, separator):
    text = f"one{separator}two"
    (tmp_path / "d.jsonl").write_text(
        json.dumps({"prompt": text}, ensure_ascii=ord(separator) < 32) + '\n{"prompt": "b"}\n',
        encoding="utf-8",
    )
    (tmp_path / "d.csv").write_text(f"prompt,n\n{text},1\nb,2\n", encoding="utf-8")
    assert [row["prompt"] for row in read(tmp_path / "d.jsonl")] == [text, "b"]
    assert [row["prompt"] for row in read(tmp_path / "d.csv")] == [text, "b"]


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)


@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=4))
def test_csv_and_jsonl_give_back_any_text(tmp_path, cells):
    written = [{"prompt": a, "completion": b} for a, b in cells]
    with open(tmp_path / "d.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["prompt", "completion"], quoting=csv.QUOTE_ALL)
        table.writeheader()
        table.writerows(written)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written)
    (tmp_path / "d.jsonl").write_bytes(text.encode())
    assert read(tmp_path / "d.csv") == written
    assert read(tmp_path / "d.jsonl") == written


def test_empty_csv_cells_are_absent_values(tmp_path):
    (tmp_path / "d.csv").write_text("id,prompt,weight\n1,a,\n,b,0.5\n")
    assert read(tmp_path / "d.csv") == [
        {"id": "1", "prompt": "a"},
        {"prompt": "b", "weight": "0.5"},
    ]


def test_csv_holds_texts_of_any_length(tmp_path):
    (tmp_path / "d.csv").write_text(f"prompt\n{'long ' * 40_000}\n")
    assert len(read(tmp_path / "d.csv")[0]["prompt"]) == 200_000


# Faults.


@pytest.mark.parametrize("name", ["none.jsonl", "./none", "/none/at/all", "some/deep/folder"])
def test_missing_files_are_named(name):
    with pytest.raises(InputError, match=f"^{name}: no such file or folder; check the path"):
        list(rows(name))


def test_an_unknown_dataset_id_is_named():
    with pytest.raises(InputError, match=r"^nobody/nothing: neither a file or folder here nor a"):
        list(rows("nobody/nothing"))


def test_unknown_file_types_are_named(tmp_path):
    (tmp_path / "d.txt").write_text("a")
    refuses(tmp_path / "d.txt", "unknown file type '.txt'; use .jsonl, .json, .csv, .parquet")


def test_a_folder_without_data_is_named(tmp_path):
    refuses(tmp_path, "no .jsonl, .json, .csv, .parquet file in this folder")


def test_broken_jsonl_names_the_line_blank_lines_counted(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": \n')
    refuses(path, "d.jsonl line 3: not JSON .*one object a line")
    path.write_text('{"prompt": "a"}\n["b"]\n')
    refuses(path, "d.jsonl line 2: a row must be an object")


def test_broken_json_names_the_line_and_a_likely_mistake(tmp_path):
    path = tmp_path / "d.json"
    path.write_text('[{"prompt": "a"},\n\n{"prompt" "b"}]')
    refuses(path, "d.json line 3: not JSON")
    path.write_text(lines(ROWS))
    refuses(path, "d.json line 2: not JSON.*name it .jsonl")
    path.write_text('[{"prompt": "a"}, 5]')
    refuses(path, "d.json row 2: a row must be an object")
    for scalar in ('"text"', "5", "null", '{"a": 1}', '{"a": [], "b": []}'):
        path.write_text(scalar)
        refuses(path, "must be a list of rows, or an object holding one list")


def test_broken_csv_names_the_line(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("prompt,completion\na,b\nc\n")
    refuses(path, "d.csv line 3: has not as many fields as the header")
    path.write_text("prompt,completion\na,b,c\n")
    refuses(path, "d.csv line 2: has not as many fields as the header")
    path.write_text('prompt,completion\na,"b" c\n')
    refuses(path, "d.csv line 2: not CSV")
    path.write_text('prompt,completion\na,"b\n')
    refuses(path, "not CSV")
    path.write_text("prompt,prompt\na,b\n")
    refuses(path, "d.csv line 1: column 'prompt' is there twice; rename one")


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
def test_other_encodings_name_the_line(tmp_path, name, mark):
    (tmp_path / name).write_bytes(mark + b"{}\n\xe9t\xe9\n")
    refuses(tmp_path / name, f"{name} line 2: not UTF-8; convert the file to UTF-8")


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    path = tmp_path / "d.parquet"
    path.write_bytes(b"PAR1 but not really")
    refuses(path, "not a Parquet file")
    write_parquet(path)
    path.write_bytes(path.read_bytes()[:-9])
    refuses(path, "not a Parquet file")
