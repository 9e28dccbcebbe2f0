"""`deltaloom mergekit` where vocabularies differ: beside float64 sums, mergekit, transformers."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from deltaloom.cli.mergekit import mergekit
from deltaloom.core.errors import InputError

PEER = os.environ.get("DELTALOOM_MERGEKIT", "")
H, INNER, LAYERS = 16, 24, 2
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
TEXTS = {
    "base": ["the cat sat on the mat and the cat ate"],
    "a": ["a dog ran to the park; the dog barked at a man"],
    "b": ["the cat ran on the mat: a man sat and ate in the park"],
}
ADDED = {
    "base": [("<pad>", True), ("<s>", True), ("</s>", True)],
    "a": [("</s>", True), ("<s>", True), ("<|user|>", True), ("<think>", False)],
    "b": [("<pad>", True), ("<s>", True), ("</s>", True), ("<think>", False), ("<|user|>", False)],
}
MORE = {"base": 0, "a": 3, "b": 0}
"""Rows beyond the tokens."""


def tokenizer(name):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=60, special_tokens=[token for token, _ in ADDED[name][:2]], show_progress=False
    )
    made.train_from_iterator(TEXTS[name], trainer)
    for token, special in ADDED[name]:
        made.add_tokens([AddedToken(token, special=special, normalized=not special)])
    return made


def numbers(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()


def shapes(rows, tied):
    found = {TABLES[0]: (rows, H), "model.norm.weight": (H,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        found |= {f"{layer}self_attn.{k}_proj.weight": (H, H) for k in "qkvo"}
        found |= {f"{layer}mlp.{k}_proj.weight": (INNER, H) for k in ("gate", "up")}
        found[f"{layer}mlp.down_proj.weight"] = (H, INNER)
        found |= {f"{layer}{k}_layernorm.weight": (H,) for k in ("input", "post_attention")}
    return found if tied else {**found, TABLES[1]: (rows, H)}


def write(folder, made, dtype, *, tied=False, more=0, draw=None):
    rows = made.get_vocab_size() + more
    folder.mkdir(parents=True)
    tensors = {
        name: (0.3 * torch.randn(shape, generator=draw)).to(dtype)
        for name, shape in shapes(rows, tied).items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": H,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "vocab_size": rows,
        "bos_token_id": made.token_to_id("<s>"),
        "eos_token_id": made.token_to_id("</s>"),
        "tie_word_embeddings": tied,
        "dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config))
    made.save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))


def make_home(home, dtype, *, tied=False):
    draw = torch.Generator().manual_seed(5)
    for name in TEXTS:
        made = tokenizer(name)
        write(home / name, made, dtype, tied=tied, more=MORE[name], draw=draw)
    return home


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """Folders with the Llamas base, a and b, whose vocabularies overlap, by type and head."""
    made = {}

    def home(dtype=torch.bfloat16, tied=False):
        if (dtype, tied) not in made:
            made[dtype, tied] = make_home(tmp_path_factory.mktemp("home"), dtype, tied=tied)
        return made[dtype, tied]

    return home


def weights(folder):
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.fixture
def merge(tmp_path, monkeypatch):
    """Merge by a YAML text in a folder of models; gives the output's folder."""

    def merge(home, text, *flags):
        monkeypatch.chdir(home)
        (tmp_path / "c.yml").write_text(text)
        mergekit([str(tmp_path / "c.yml"), str(tmp_path / "out"), *flags])
        return tmp_path / "out"

    return merge


LINEAR = """
models:
  - {model: base, parameters: {weight: 0.2}}
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.4}}
merge_method: linear
%s
"""
CHANGES = """
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.25}}
merge_method: task_arithmetic
base_model: base
%s
"""


@pytest.mark.skipif(not PEER, reason="DELTALOOM_MERGEKIT is not set")
@pytest.mark.parametrize("text", [LINEAR + "base_model: base\n", CHANGES])
@pytest.mark.parametrize("source", ["union", "base", "a"])
@pytest.mark.parametrize("tied", [False, True])
def test_beside_mergekit(merge, homes, tmp_path, text, source, tied):
    home = homes(tied=tied)
    text = text % f"tokenizer_source: {source}"
    out = merge(home, text)
    theirs = tmp_path / "theirs"
    words = [PEER, tmp_path / "c.yml", theirs, "--no-write-model-card"]
    done = subprocess.run(words, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compare(out, theirs)


def compare(out, theirs):
    """Equal to the bit, rows by token: mergekit puts the tokens of a union in any order."""
    ours, wanted = weights(out), weights(theirs)
    assert set(ours) == set(wanted)
    own, other = numbers(out), numbers(theirs)
    assert set(own) == set(other)
    mine = [own[token] for token in sorted(own)]
    yours = [other[token] for token in sorted(own)]
    for name, tensor in wanted.items():
        got = ours[name]
        assert got.shape == tensor.shape and got.dtype == tensor.dtype, name
        same = torch.equal(got[mine], tensor[yours]) if name in TABLES else torch.equal(got, tensor)
        assert same, name
        if name in TABLES:  # padding
            assert torch.equal(got[len(own) :], tensor[len(own) :])
    sizes = [json.loads((f / "config.json").read_text())["vocab_size"] for f in (out, theirs)]
    assert sizes[0] == sizes[1]
    flags = []
    for folder in (out, theirs):
        rows = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        flags.append({row["content"]: {**row, "id": 0} for row in rows})
    assert flags[0] == flags[1]
