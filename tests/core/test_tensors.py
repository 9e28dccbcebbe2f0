"""Safetensors folders: reading ranges, writing in place, and what bad folders are told."""

import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.tensors import DTYPES, INDEX, TensorFolder, TensorWriter, read_header

KINDS = [name for _, name in DTYPES.values()]


def tensors_of_every_kind():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 100, (5, 8), generator=generator)
    return {name: raw.to(getattr(torch, name)) for name in KINDS} | {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4, dtype=torch.bfloat16),
    }


def same(a, b):
    return a.numel() == b.numel() == 0 or torch.equal(
        a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)
    )


def sharded(folder, tensors):
    """One tensor per shard, with an index."""
    folder.mkdir(exist_ok=True)
    table = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        table[name] = f"model-{i}.safetensors"
        save_file({name: tensor}, folder / table[name])
    (folder / INDEX).write_text(json.dumps({"weight_map": table}))
    return folder


def test_reads_every_dtype_as_safetensors_does(tmp_path):
    wanted = tensors_of_every_kind()
    save_file(wanted, tmp_path / "model.safetensors", {"format": "pt"})
    with TensorFolder(tmp_path) as folder:
        assert set(folder) == set(wanted)
        assert folder.metadata == {"format": "pt"}
        for name, tensor in wanted.items():
            got = folder.read(name)
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            assert same(got, tensor)
            assert folder[name].nbytes == tensor.nbytes


@settings(max_examples=30, deadline=None)
@given(cut=st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted))
def test_ranges_are_slices(tmp_path_factory, cut):
    tensor = torch.arange(40, dtype=torch.bfloat16).reshape(4, 10)
    file = tmp_path_factory.mktemp("range") / "model.safetensors"
    save_file({"a": torch.ones(3), "t": tensor}, file)
    with TensorFolder(file) as folder:
        assert torch.equal(folder.read_range("t", *cut), tensor.flatten()[slice(*cut)])


def test_reads_shards_and_adapters(tmp_path):
    wanted = {"a": torch.randn(3, 2), "b": torch.randn(4)}
    folder = TensorFolder(sharded(tmp_path / "model", wanted))
    assert all(torch.equal(folder.read(name), wanted[name]) for name in wanted)
    save_file(wanted, tmp_path / "adapter_model.safetensors")
    assert list(TensorFolder(tmp_path)) == ["a", "b"]
    assert folder.get("c") is None
    with pytest.raises(KeyError):
        folder["c"]


def test_range_outside_the_tensor_is_refused(tmp_path):
    save_file({"a": torch.zeros(4), "b": torch.zeros(4)}, tmp_path / "model.safetensors")
    folder = TensorFolder(tmp_path)
    with pytest.raises(ValueError, match="outside 'a'"):
        folder.read_range("a", 2, 6)
    with pytest.raises(ValueError, match="outside 'a'"):
        folder.read_range("a", -1, 2)


def test_import_leaves_torch_alone():
    code = "import sys, deltaloom.core.tensors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def write_in_pieces(folder, tensors, shard_bytes, threads=2, seed=0):
    """Any order of pieces of any length, from several threads."""
    folder.mkdir()
    codes = {name: code for code, (_, name) in DTYPES.items()}
    layout = [(n, codes[str(t.dtype)[6:]], tuple(t.shape)) for n, t in tensors.items()]
    order = random.Random(seed)
    order.shuffle(layout)
    writer = TensorWriter(folder, layout, shard_bytes=shard_bytes)
    pieces = []
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        raw = tensor.flatten().view(torch.uint8).numpy()
        size = tensor.element_size()
        at = 0
        while at < tensor.numel():
            stop = min(at + order.randint(1, 7), tensor.numel())
            pieces.append((name, at, raw[at * size : stop * size]))
            at = stop
    order.shuffle(pieces)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda piece: writer.write(*piece), pieces))
    writer.finish()
    return folder


@pytest.mark.parametrize("shard_bytes", [10**9, 200])
def test_writer_makes_what_safetensors_and_transformers_read(tmp_path, shard_bytes):
    wanted = tensors_of_every_kind()
    folder = write_in_pieces(tmp_path / "out", wanted, shard_bytes)
    again = write_in_pieces(tmp_path / "again", wanted, shard_bytes, threads=1, seed=5)
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes == 200)
    got = {}
    for file in files:
        part = load_file(file)
        assert sum(tensor.nbytes for tensor in part.values()) <= shard_bytes or len(part) == 1
        got |= part
        assert read_header(file)[1] == {"format": "pt"}
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():
        assert same(got[name], tensor)
    for file in folder.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()
    if len(files) > 1:
        index = json.loads((folder / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in wanted.values())
    assert len(TensorFolder(folder)) == len(wanted)


def test_writer_refuses_ranges_outside_and_full_disks(tmp_path):
    writer = TensorWriter(tmp_path, [("a", "F32", (4,))])
    with pytest.raises(ValueError, match="outside 'a'"):
        writer.write("a", 3, np.zeros(2, np.float32))
    with pytest.raises(InputError, match=r"needs 4000000000\.00 GB and its disk has"):
        TensorWriter(tmp_path, [("a", "F32", (10**9, 10**9))])


def break_index(folder):
    (folder / "model-1.safetensors").unlink()


def point_outside(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../model-0.safetensors"}}))


def name_a_stranger(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"z": "model-0.safetensors"}}))


def garble_index(folder):
    (folder / INDEX).write_text("[]")


def cut_data(folder):
    file = folder / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def cut_header(folder):
    (folder / "model-1.safetensors").write_bytes(b"\x10\x00\x00")


def garble_header(folder):
    file = folder / "model-1.safetensors"
    file.write_bytes(file.read_bytes().replace(b'{"b"', b'{{b"'))


def unknown_dtype(folder):
    file = folder / "model-1.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"F31"'))


def wrong_shape(folder):
    file = folder / "model-1.safetensors"
    file.write_bytes(file.read_bytes().replace(b"[4]", b"[5]"))


def pickled(folder):
    for file in folder.iterdir():
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def emptied(folder):
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (break_index, r"lists model-1.safetensors for tensor 'b' but it is not in .*copy the"),
        (point_outside, "lists '../model-0.safetensors', which is outside its folder"),
        (name_a_stranger, "lists model-0.safetensors for tensor 'z', which it lacks"),
        (garble_index, "no readable 'weight_map'"),
        (cut_data, r"is cut short: it has \d+ bytes and its header promises \d+"),
        (cut_header, "not a whole safetensors file"),
        (garble_header, "its header is broken"),
        (unknown_dtype, "tensor 'b' has dtype 'F31'; known: F64"),
        (wrong_shape, r"tensor 'b' of shape \[5\] and dtype F32 takes 20 bytes"),
        (pickled, "pytorch_model.bin, a pickle, which is never read; save the model as"),
        (emptied, "is not a model folder: expected model.safetensors.index.json"),
    ],
)
def test_bad_folders_are_told_what_is_wrong(tmp_path, harm, sentence):
    folder = sharded(tmp_path / "model", {"a": torch.zeros(3), "b": torch.zeros(4)})
    harm(folder)
    with pytest.raises(InputError, match=sentence):
        TensorFolder(folder)


def test_a_path_that_is_nothing(tmp_path):
    with pytest.raises(InputError, match="is not a folder; give the path"):
        TensorFolder(tmp_path / "nowhere")


def test_a_file_that_shrinks_while_open(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000)}, file)
    folder = TensorFolder(tmp_path)
    with file.open("r+b") as stream:
        stream.truncate(500)
    with pytest.raises(WorkError, match="became shorter while it was read"):
        folder.read("a")
