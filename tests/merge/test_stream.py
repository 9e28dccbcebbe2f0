"""The streaming engine: same bytes whatever the cut, adapters as PEFT merges, clear refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.tensors import INDEX, TensorFolder, TensorWriter
from deltaloom.merge import _kernels as kernels
from deltaloom.merge._formats import narrow, widen
from deltaloom.merge._rule import ElementRule
from deltaloom.merge._stream import merge_folders
from deltaloom.merge.arithmetic import Arithmetic

LINEAR = Arithmetic().rule(1)
TIES = {"sparsify": "magnitude", "consensus": True, "normalize": True, "density": 0.3}
DARE = {"sparsify": "random", "consensus": True, "rescale": True, "density": 0.4}
SHAPES = {
    "model.embed_tokens.weight": (40, 24),
    "model.layers.0.mlp.up_proj.weight": (50, 24),
    "model.layers.0.norm.weight": (24,),
    "lm_head.weight": (40, 24),
}


def tensors(seed, dtype=torch.bfloat16, base=None):
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in SHAPES.items():
        noise = torch.randn(shape, generator=generator)
        made[name] = (noise if base is None else base[name].float() + 0.2 * noise).to(dtype)
    return made


def save(folder, values, shards=1, config=None):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": False} | (config or {})))
    if shards == 1:
        save_file(values, folder / "model.safetensors", {"format": "pt"})
        return folder
    table = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(values)}
    for file in set(table.values()):
        save_file({n: t for n, t in values.items() if table[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": table}))
    return folder


@pytest.fixture
def models(tmp_path):
    base = tensors(0)
    paths = [save(tmp_path / "base", base)]
    return paths + [save(tmp_path / f"m{i}", tensors(i, base=base)) for i in (1, 2)]


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def loaded(folder):
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.mark.parametrize("values", [{}, {"normalize": True}, TIES, DARE])
def test_bytes_depend_on_neither_threads_nor_blocks_nor_shards(tmp_path, models, values):
    base, *sources = models
    other = [
        save(tmp_path / "split" / path.name, load_file(path / "model.safetensors"), shards=3)
        for path in models
    ]
    rule = Arithmetic(**values).rule(2)
    first = content(merge_folders(base, sources, rule, tmp_path / "a", threads=1, block=10**6))
    for i, (threads, block) in enumerate([(2, 10**6), (2, 37), (1, 256), (4, 1000)]):
        out = tmp_path / f"b{i}"
        assert content(merge_folders(base, sources, rule, out, threads=threads, block=block)) == (
            first
        )
    out = merge_folders(other[0], other[1:], rule, tmp_path / "c", block=100)
    assert content(out) == first
    out = merge_folders(base, sources, rule, tmp_path / "d", shard_bytes=2000)
    assert len(list(out.glob("*.safetensors"))) == 4
    whole = load_file(tmp_path / "a" / "model.safetensors")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in loaded(out).items())


def test_blocks_are_cut_at_round_positions_of_the_output_file(tmp_path, models, monkeypatch):
    cuts = []
    write = TensorWriter.write

    def seen(self, name, start, data):
        cuts.append((name, start, self.entries[name].offset // 2 + start, data.nbytes // 2))
        write(self, name, start, data)

    monkeypatch.setattr(TensorWriter, "write", seen)
    merge_folders(models[0], models[1:], Arithmetic().rule(2), tmp_path / "out", block=256)
    assert any(start for _, start, _, _ in cuts)
    assert all(place % 256 == 0 for _, start, place, _ in cuts if start)
    assert all(count <= 256 for *_, count in cuts)
    sizes = {name: sum(row[3] for row in cuts if row[0] == name) for name in SHAPES}
    assert sizes == {name: int(np.prod(shape)) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_one_model_alone_comes_back_to_the_bit(tmp_path, dtype):
    base = tensors(0, getattr(torch, dtype))
    tuned = tensors(1, getattr(torch, dtype))
    tuned["lm_head.weight"] *= 1e-4  # so small beside the base that base + (tuned - base) rounds
    folders = save(tmp_path / "base", base), save(tmp_path / "tuned", tuned)
    for values in ({}, {"normalize": True}, {"normalize": True, "weights": [0.3]}):
        rule = Arithmetic(**values).rule(1)
        out = merge_folders(folders[0], [folders[1]], rule, tmp_path / f"out{len(values)}")
        assert all(torch.equal(tensor, tuned[name]) for name, tensor in loaded(out).items())


def test_other_dtypes_out_and_mixed_in(tmp_path):
    base = tensors(0)
    tuned = tensors(1, torch.float32, base)
    folders = save(tmp_path / "base", base), save(tmp_path / "tuned", tuned)
    kept = loaded(merge_folders(folders[0], [folders[1]], LINEAR, tmp_path / "bf16"))
    assert all(torch.equal(tensor, tuned[n].bfloat16()) for n, tensor in kept.items())
    out = merge_folders(folders[0], [folders[1]], LINEAR, tmp_path / "f32", dtype="float32")
    assert all(torch.equal(tensor, tuned[n]) for n, tensor in loaded(out).items())
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_companions_are_copied_and_weights_are_not(tmp_path, models):
    for name in ("tokenizer.json", "merges.txt", "generation_config.json", "chat_template.jinja"):
        (models[0] / name).write_text(name)
    for name in ("optimizer.pt", "pytorch_model.bin", "other.safetensors", "README.md", ".hidden"):
        (models[0] / name).write_text(name)
    out = merge_folders(models[0], models[1:2], LINEAR, tmp_path / "out")
    assert sorted(file.name for file in out.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_integer_tensors_are_copied_when_equal(tmp_path):
    count = {"count": torch.arange(5)}
    base = save(tmp_path / "base", tensors(0) | count)
    same = save(tmp_path / "same", tensors(1) | count)
    out = merge_folders(base, [same], LINEAR, tmp_path / "out")
    assert torch.equal(loaded(out)["count"], count["count"])
    other = save(tmp_path / "other", tensors(1) | {"count": torch.arange(5) + 1})
    with pytest.raises(InputError, match=r"other: tensor 'count' \(I64\) is not a float and diff"):
        merge_folders(base, [other], LINEAR, tmp_path / "out2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "other", "out", "same"]


def test_tied_output_layers(tmp_path):
    tied = {"tie_word_embeddings": True}
    base, tuned = tensors(0), tensors(1)
    whole = save(tmp_path / "whole", base)
    base.pop("lm_head.weight")
    bare = save(tmp_path / "bare", base, config=tied)
    repeated = tuned | {"lm_head.weight": tuned["model.embed_tokens.weight"].clone()}
    both = save(tmp_path / "both", repeated, config=tied)
    own = save(tmp_path / "own", tuned)
    head = tuned.pop("lm_head.weight")
    shared = save(tmp_path / "shared", tuned, config=tied)

    for source in (both, shared):
        out = loaded(merge_folders(bare, [source], LINEAR, tmp_path / f"out-{source.name}"))
        assert set(out) == set(base)
    out = loaded(merge_folders(whole, [shared], LINEAR, tmp_path / "untied"))
    assert torch.equal(out["lm_head.weight"], tuned["model.embed_tokens.weight"])
    assert not torch.equal(out["lm_head.weight"], head)
    with pytest.raises(InputError, match=r"own has tensor 'lm_head.weight'.*untie the base's"):
        merge_folders(bare, [own], LINEAR, tmp_path / "no")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("model.layers.0.norm.weight"), "m has no tensor 'model.layers.0.norm.we"),
        (lambda t: t.pop("lm_head.weight"), "m has no tensor 'lm_head.weight', which the base"),
        (lambda t: t.update(extra=torch.ones(2)), "m has tensor 'extra', which the base .* lacks"),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(41, 24)}),
            r"m: tensor 'lm_head.weight' has shape \[41, 24\], the base .* has \[40, 24\]",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(40, 24).int()}),
            "m: tensor 'lm_head.weight' is I32, in the base BF16",
        ),
    ],
)
def test_models_that_do_not_fit(tmp_path, change, sentence):
    values = tensors(1)
    change(values)
    base, source = save(tmp_path / "base", tensors(0)), save(tmp_path / "m", values)
    with pytest.raises(InputError, match=sentence):
        merge_folders(base, [source], LINEAR, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_refusals(tmp_path, models):
    with pytest.raises(InputError, match="nothing to merge"):
        merge_folders(models[0], [], LINEAR, tmp_path / "out")
    with pytest.raises(InputError, match="m1 is already there; remove it or choose another"):
        merge_folders(models[0], models[1:], LINEAR, models[1])
    with pytest.raises(InputError, match="dtype 'int8' is not one of float64, float32"):
        merge_folders(models[0], models[1:], LINEAR, tmp_path / "out", dtype="int8")
    eight = {"w": torch.ones(4).to(torch.float8_e4m3fn)}
    with pytest.raises(InputError, match="'w' is F8_E4M3; 8-bit floats do not merge"):
        merge_folders(save(tmp_path / "f8", eight), models[1:], LINEAR, tmp_path / "out")


class Failing(ElementRule):
    """A rule that fails on the tensor it is told to."""

    form, needs_base = "values", False

    def begin(self, tensor, models):
        if tensor.name.startswith("lm_head"):
            raise RuntimeError("as told")
        return self

    def write(self, block):
        block.out[:] = block.models[0]


def test_a_failing_rule_leaves_nothing(tmp_path, models):
    with pytest.raises(RuntimeError, match="as told"):
        merge_folders(models[0], models[1:], Failing(), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m1", "m2"]


KILLED = """
import json, os, signal, sys
from deltaloom.merge._stream import merge_folders
from deltaloom.merge.arithmetic import Arithmetic
base, sources, values, out = map(json.loads, sys.argv[1:])
def progress(done):
    os.kill(os.getpid(), signal.SIGKILL)
rule = Arithmetic(**values).rule(len(sources))
merge_folders(base, sources, rule, out, threads=1, progress=progress)
"""


INTERRUPTED = KILLED.replace(
    "def progress(done):\n",
    "seen = []\ndef progress(done):\n    seen.append(done)\n    if len(seen) == 2:\n    ",
).replace("progress=progress)", "progress=progress, resume=True)")


def test_an_interrupted_merge_is_taken_up_where_it_was(tmp_path, models):
    whole = merge_folders(models[0], models[1:], Arithmetic(**DARE).rule(2), tmp_path / "whole")
    paths = [str(path) for path in models]
    arguments = (paths[0], paths[1:], DARE, str(tmp_path / "out"))
    command = [sys.executable, "-c", INTERRUPTED, *map(json.dumps, arguments)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    part = tmp_path / ".out.part"
    done = (part / ".merged").read_text().split("\n")[1:-1]
    assert len(done) == 2
    rule, begun = Arithmetic(**DARE).rule(2), []
    begin = rule.begin
    rule.begin = lambda tensor, k: begun.append(tensor.name) or begin(tensor, k)
    out = merge_folders(models[0], models[1:], rule, tmp_path / "out", resume=True)
    assert not set(begun) & {json.loads(name) for name in done}
    assert len(begun) == len(TensorFolder(out)) - 2
    assert files_of(out) == files_of(whole)
    assert not part.exists()


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_after_a_restart_of_the_machine_nothing_is_trusted(tmp_path, models):
    whole = merge_folders(models[0], models[1:], Arithmetic().rule(2), tmp_path / "whole")
    part = tmp_path / ".out.part"
    shutil.copytree(whole, part)
    names = "".join(json.dumps(name) + "\n" for name in TensorFolder(models[0]))
    (part / ".merged").write_text("another start\n" + names)
    weights = part / "model.safetensors"
    weights.write_bytes(b"\0" * weights.stat().st_size)
    out = merge_folders(models[0], models[1:], Arithmetic().rule(2), tmp_path / "out", resume=True)
    assert files_of(out) == files_of(whole)


def test_killed_and_started_again_gives_the_same_bytes(tmp_path, models):
    paths = [str(path) for path in models]
    arguments = (paths[0], paths[1:], DARE, str(tmp_path / "out"))
    command = [sys.executable, "-c", KILLED, *map(json.dumps, arguments)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.part" / "model.safetensors").exists()
    rule = Arithmetic(**DARE).rule(2)
    out = merge_folders(models[0], models[1:], rule, tmp_path / "out")
    assert content(out) == content(merge_folders(*models[:1], models[1:], rule, tmp_path / "clean"))
    assert not (tmp_path / ".out.part").exists()


def test_two_writers_of_one_output(tmp_path, models):
    def progress(done):
        if not refused:
            with pytest.raises(WorkError, match="out is being written by another process"):
                merge_folders(models[0], models[1:], LINEAR, tmp_path / "out")
            refused.append(done)

    refused = []
    merge_folders(models[0], models[1:2], LINEAR, tmp_path / "out", progress=progress)
    assert len(refused) == 1
    assert set(os.listdir(tmp_path / "out")) == {"config.json", "model.safetensors"}


def test_the_merge_path_loads_no_model_library(models, tmp_path):
    code = KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "pass") + (
        "\nsys.exit(len({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    paths = [str(path) for path in models]
    arguments = (paths[0], paths[1:], {}, str(tmp_path / "out"))
    command = [sys.executable, "-c", code, *map(json.dumps, arguments)]
    assert subprocess.run(command).returncode == 0


def adapter_of(tmp_path, model, name="adapter", **settings):
    """A PEFT LoRA adapter with random factors, its folder, and PEFT's own merge."""
    from peft import LoraConfig, get_peft_model

    model.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, LoraConfig(**settings))
        torch.manual_seed(1)
        for key, value in tuned.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(value, std=0.3)
        tuned.save_pretrained(tmp_path / name)
        return tmp_path / name, tuned.merge_and_unload().state_dict()


def llama(**settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "vocab_size": 50}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **settings))


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_is_merged_as_peft_merges_it(tmp_path, rslora):
    adapter, wanted = adapter_of(
        tmp_path,
        llama(tie_word_embeddings=False),
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        rank_pattern={"layers.0.self_attn.q_proj": 7},
        alpha_pattern={r"model\.layers\.1\..*": 3},
    )
    one = loaded(merge_folders(tmp_path / "base", [adapter], LINEAR, tmp_path / "out", block=256))
    two = loaded(merge_folders(tmp_path / "base", [adapter], LINEAR, tmp_path / "two", threads=1))
    assert set(one) == set(wanted)
    base = loaded(tmp_path / "base")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(tensor, two[name])
        targeted = any(part in name for part in ("q_proj", "down_proj", "embed_tokens"))
        assert torch.equal(tensor, base[name]) != targeted


def test_lora_on_transposed_weights(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30))
    adapter, wanted = adapter_of(
        tmp_path, model, r=3, lora_alpha=5, target_modules=["c_attn"], fan_in_fan_out=True
    )
    got = loaded(merge_folders(tmp_path / "base", [adapter], LINEAR, tmp_path / "out", block=256))
    name = "transformer.h.0.attn.c_attn.weight"
    assert got[name].shape == (16, 48)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"use_dora": True}, "DoRA cannot be merged as it is; merge the adapter into its model"),
        ({"lora_bias": True}, "LoRA with a bias cannot be merged"),
        ({"bias": "all"}, "trained biases cannot be merged"),
        ({"modules_to_save": ["lm_head"]}, "modules saved whole cannot be merged"),
        ({"trainable_token_indices": [1]}, "trained token rows cannot be merged"),
        ({"init_lora_weights": "pissa"}, "LoRA started by 'pissa', which shifts the base's weig"),
        ({"peft_type": "IA3"}, "IA3 adapters cannot be merged"),
        ({"use_something_new": True}, "use_something_new cannot be merged"),
    ],
)
def test_adapters_of_other_kinds_are_refused_by_name(tmp_path, models, settings, sentence):
    adapter, _ = adapter_of(tmp_path / "peft", llama(), target_modules=["q_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | settings))
    with pytest.raises(InputError, match=sentence):
        merge_folders(models[0], [adapter], LINEAR, tmp_path / "out")


def test_adapters_that_do_not_fit(tmp_path, models):
    adapter, _ = adapter_of(tmp_path / "peft", llama(), target_modules=["q_proj"])
    with pytest.raises(InputError, match=r"changes module 'model.layers.0.self_attn.q_proj', but"):
        merge_folders(models[0], [adapter], LINEAR, tmp_path / "out")
    narrow_base = llama(tie_word_embeddings=False).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    narrow_base[name] = torch.zeros(24, 25)
    base = save(tmp_path / "narrow", {k: v.contiguous() for k, v in narrow_base.items()})
    with pytest.raises(InputError, match=r"has shape \[24, 24\], the base .* has \[24, 25\]"):
        merge_folders(base, [adapter], LINEAR, tmp_path / "out")


def test_an_embedding_adapter_on_a_tied_base_is_refused(tmp_path):
    model = llama(tie_word_embeddings=True)
    adapter, _ = adapter_of(tmp_path, model, target_modules=["embed_tokens"])
    with pytest.raises(InputError, match=r"output layer \(tied\); untie the base first"):
        merge_folders(tmp_path / "base", [adapter], LINEAR, tmp_path / "out")


def test_an_adapter_with_an_embedding_of_its_own_is_refused(tmp_path):
    adapter, _ = adapter_of(
        tmp_path, llama(tie_word_embeddings=False), target_modules=["embed_tokens"]
    )
    stored = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in stored  # PEFT stores it by itself
    stored[key][0, 0] += 1
    save_file(stored, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"brings its own 'model.embed_tokens.weight', which dif"):
        merge_folders(tmp_path / "base", [adapter], LINEAR, tmp_path / "out")


def test_stored_changes_are_a_source(tmp_path, models):
    name = "lm_head.weight"
    change = {name: torch.randn(40, 24)}
    (tmp_path / "delta").mkdir()
    save_file(change, tmp_path / "delta" / "delta.safetensors")
    out = loaded(merge_folders(models[0], [tmp_path / "delta"], LINEAR, tmp_path / "out"))
    base = loaded(models[0])
    wanted = base | {name: (base[name].float() + change[name]).bfloat16()}
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in out.items())
    save_file({"strange": torch.ones(2)}, tmp_path / "delta" / "delta.safetensors")
    with pytest.raises(InputError, match="changes 'strange'"):
        merge_folders(models[0], [tmp_path / "delta"], LINEAR, tmp_path / "no")


def test_bfloat16_is_rounded_as_torch_does():
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    wide = np.empty(2**16, np.float32)
    widen(every.view(torch.uint8).numpy(), "BF16", wide)
    assert np.array_equal(wide.view(np.uint32), every.float().view(torch.uint32).numpy())
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
    halves = wide.view(np.uint32) | np.uint32(0x8000)
    for sample in (bits.view(np.float32), halves.view(np.float32)):
        raw = np.empty(2 * sample.size, np.uint8)
        narrow(sample, "BF16", raw)
        ours = torch.from_numpy(raw).view(torch.bfloat16)
        theirs = torch.from_numpy(sample).bfloat16()
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7))


def test_philox_gives_the_published_numbers():
    words = np.empty((4, 64), np.uint64)
    kernels.draw(0, 0, 0, words)  # Random123, kat_vectors, philox4x32 10, all zero
    assert [hex(w) for w in words[:, 0]] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 30), rank=st.integers(1, 5), data=st.data())
def test_a_range_of_a_product_is_a_range_of_the_whole(rows, columns, rank, data):
    random = np.random.default_rng(rows * 100 + columns)
    left = random.standard_normal((rows, rank)).astype(np.float32)
    right = random.standard_normal((rank, columns)).astype(np.float32)
    whole = np.zeros(rows * columns, np.float32)
    kernels.add_product(left, right, 0, np.float32(0.7), whole)
    np.testing.assert_allclose(whole, 0.7 * (left @ right).ravel(), rtol=1e-4, atol=1e-5)
    start = data.draw(st.integers(0, whole.size))
    part = np.zeros(data.draw(st.integers(0, whole.size - start)), np.float32)
    kernels.add_product(left, right, start, np.float32(0.7), part)
    assert np.array_equal(part, whole[start : start + part.size])


def test_output_is_a_model_folder(tmp_path, models):
    out = merge_folders(models[0], models[1:], Arithmetic(**TIES).rule(2), tmp_path / "out")
    assert set(TensorFolder(out)) == set(SHAPES)
