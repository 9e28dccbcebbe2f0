"""Whole or not at all, and never at the price of what was there."""

import errno
import json
import subprocess
import sys

import pytest

from deltaloom.core.atomic import new_file, new_folder, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_is_written_as_it_is(tmp_path):
    write_text(tmp_path / "a", "one\r\ntwo\u2028\n")
    assert (tmp_path / "a").read_bytes() == "one\r\ntwo\u2028\n".encode()
    assert names(tmp_path) == ["a"]


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"ä": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"ä": float("nan")})
    assert json.loads(path.read_text()) == {"ä": 1}
    assert names(tmp_path) == ["a.json"]


FULL = """
import resource, signal, sys
from pathlib import Path
from deltaloom.core.atomic import write_text
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_text(Path(sys.argv[1]), "new " * 100_000)
except OSError as error:
    print(error.errno)
"""


def test_a_disk_that_fills_up_leaves_the_previous_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(errno.EFBIG)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_file_that_failed_leaves_the_previous_one(tmp_path):
    (tmp_path / "a").write_text("old")

    def fail():
        with new_file(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_new_folder_replaces_the_old_one_whole(tmp_path):
    for content in ("old", "new"):
        with new_folder(tmp_path / "f") as folder:
            (folder / content).write_text(content)
            assert content == "old" or names(tmp_path / "f") == ["old"]
    assert names(tmp_path / "f") == ["new"]
    assert names(tmp_path) == ["f"]


def test_a_folder_that_failed_leaves_the_previous_one(tmp_path):
    with new_folder(tmp_path / "f") as folder:
        (folder / "old").write_text("old")

    def fail():
        with new_folder(tmp_path / "f") as folder:
            (folder / "half").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fail()
    assert names(tmp_path / "f") == ["old"]
    assert names(tmp_path) == ["f"]


def test_what_an_interrupted_attempt_left_is_cleared(tmp_path):
    left = tmp_path / ".f.part"
    left.mkdir()
    (left / "junk").write_text("junk")
    with new_folder(tmp_path / "f") as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path / "f") == ["new"]
    assert names(tmp_path) == ["f"]


def test_the_previous_folder_outlives_an_interruption_between_the_renames(tmp_path):
    old = tmp_path / ".f.old"
    old.mkdir()
    (old / "kept").write_text("kept")

    def fail():
        with new_folder(tmp_path / "f"):
            raise RuntimeError("again")

    with pytest.raises(RuntimeError, match="again"):
        fail()
    assert names(tmp_path / "f") == ["kept"]
