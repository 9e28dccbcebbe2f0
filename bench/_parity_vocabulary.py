"""Merges of models of different vocabularies by mergekit's YAML, ours beside mergekit 0.1.5's.

Three small Llama folders whose tokenizers share some tokens, number them otherwise and have rows
beyond them. Rows of tables are compared by token: mergekit numbers those of a union as a hash table
orders them, and adds them up in that order for the rows of padding, which are their mean.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import torch
import yaml
from _parity_yaml import HIDDEN, INNER, LAYERS
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from deltaloom.merge._checked import check
from deltaloom.merge._config import parse_config
from deltaloom.merge._mergekit import Job

DTYPES = ("bfloat16", "float16", "float32")
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
TEXTS = {
    "base": "the cat sat on the mat and the cat ate while a mouse in the hall slept",
    "a": "a dog ran to the park; the dog barked at a man who fed seven ducks",
    "b": "the cat ran on the mat: a man sat and ate in the park of the old town",
}
ADDED = {
    "base": ["<pad>", "<s>", "</s>"],
    "a": ["</s>", "<s>", "<|user|>", "<think>"],
    "b": ["<pad>", "<s>", "</s>", "<think>"],
}
BEYOND = {"base": 0, "a": 3, "b": 0}
"""Rows beyond the tokens."""

TWO = {
    "merge_method": "task_arithmetic",
    "base_model": "base",
    "models": [
        {"model": "a", "parameters": {"weight": 0.5}},
        {"model": "b", "parameters": {"weight": 0.25}},
    ],
}
THREE = {
    "merge_method": "linear",
    "models": [
        {"model": name, "parameters": {"weight": weight}}
        for name, weight in (("base", 0.2), ("a", 0.5), ("b", 0.4))
    ],
}
TOKENS = {
    "source": "union",
    "tokens": {
        "ran": {"source": "a"},
        "<think>": {
            "source": {"kind": "model_token", "model": "a", "token": "<|user|>"},
            "force": True,
        },
        "<s>": {"source": {"kind": "model_token", "model": "b", "token_id": 7}, "force": True},
        "<|new|>": {"source": {"kind": "zero"}},
    },
    "pad_to_multiple_of": 32,
}
CONFIGS = {
    "union, task_arithmetic": {**TWO, "tokenizer_source": "union"},
    "union, linear": {**THREE, "base_model": "base", "tokenizer_source": "union"},
    "base, linear": {**THREE, "base_model": "base", "tokenizer_source": "base"},
    "of a model, task_arithmetic": {**TWO, "tokenizer_source": "a"},
    "of a model, linear": {**THREE, "tokenizer_source": "b"},
    "tokens and padding, task_arithmetic": {**TWO, "tokenizer": TOKENS},
}


def tokenizer(name: str) -> Tokenizer:
    """A byte-level tokenizer of a few words."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=90, special_tokens=ADDED[name][:2], show_progress=False
    )
    made.train_from_iterator([TEXTS[name]], trainer)
    for token in ADDED[name]:
        special = token != "<think>"
        made.add_tokens([AddedToken(token, special=special, normalized=not special)])
    return made


def shapes(rows: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a small Llama with so many rows in its tables."""
    found = {name: (rows, HIDDEN) for name in TABLES} | {"model.norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        found |= {f"{layer}self_attn.{k}_proj.weight": (HIDDEN, HIDDEN) for k in "qkvo"}
        found |= {f"{layer}mlp.{k}_proj.weight": (INNER, HIDDEN) for k in ("gate", "up")}
        found[f"{layer}mlp.down_proj.weight"] = (HIDDEN, INNER)
        found |= {f"{layer}{k}_layernorm.weight": (HIDDEN,) for k in ("input", "post_attention")}
    return found


def make_models(home: Path) -> None:
    """The models in every format, `home/DTYPE/NAME`."""
    draws = torch.Generator().manual_seed(1)
    for name in TEXTS:
        made = tokenizer(name)
        rows = made.get_vocab_size() + BEYOND[name]
        tensors = {key: torch.randn(one, generator=draws) for key, one in shapes(rows).items()}
        for dtype in DTYPES:
            folder = home / dtype / name
            folder.mkdir(parents=True)
            kind = getattr(torch, dtype)
            content = {key: one.to(kind) for key, one in tensors.items()}
            save_file(content, folder / "model.safetensors", {"format": "pt"})
            config = {
                "architectures": ["LlamaForCausalLM"], "model_type": "llama",
                "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
                "num_attention_heads": 4, "vocab_size": rows, "tie_word_embeddings": False,
                "bos_token_id": made.token_to_id("<s>"), "eos_token_id": made.token_to_id("</s>"),
                "dtype": dtype,
            }  # fmt: skip
            (folder / "config.json").write_text(json.dumps(config))
            made.save(str(folder / "tokenizer.json"))
            words = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
            (folder / "tokenizer_config.json").write_text(
                json.dumps({**words, "eos_token": "</s>"})
            )


def named(dtype: str, value):
    """The document with its models' names as paths."""
    if isinstance(value, list):
        return [named(dtype, one) for one in value]
    if isinstance(value, dict):
        return {key: named(dtype, one) for key, one in value.items()}
    return f"{dtype}/{value}" if value in TEXTS and value != "base" else value


def jobs(quick: bool = False) -> dict[str, tuple[str, dict]]:
    """Name -> (format of the models, document)."""
    found = {}
    for dtype in DTYPES[: 1 if quick else None]:
        for name, config in list(CONFIGS.items())[: 1 if quick else None]:
            document = named(dtype, config)
            if "base_model" in document:
                document["base_model"] = f"{dtype}/base"
            for one in document["models"]:
                one["model"] = one["model"].replace("base", f"{dtype}/base")
            found[f"vocabulary {name}, {dtype}"] = (dtype, document)
    return found


def compare(home: Path, python: str, quick: bool) -> list[tuple[str, float]]:
    """Per job: its name and the share of elements that are not equal to the bit."""
    make_models(home)
    work = jobs(quick)
    (home / "jobs.json").write_text(json.dumps(list(work.values())))
    script = str(Path(__file__).with_name("_parity_yaml_peer.py"))
    subprocess.run([python, script, str(home)], check=True)
    rows = []
    for number, (name, (_, config)) in enumerate(work.items()):
        out = home / "ours" / str(number)
        job = Job(check(parse_config(config, "job"), "job"), lambda files: home / files.path)
        job.run(out, 1, 5_000_000_000, yaml=yaml.safe_dump(config).encode())
        rows.append((name, unequal(out, home / "theirs" / str(number))))
    return rows


def unequal(ours: Path, theirs: Path) -> float:
    """The share of elements that are not equal to the bit, or in rows of padding further away than
    a unit; 1 where tokens or tensors differ.
    """
    own, other = (
        Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab() for folder in (ours, theirs)
    )
    mine, wanted = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    if set(own) != set(other) or set(mine) != set(wanted):
        return 1.0
    places = torch.tensor([[table[token] for token in sorted(own)] for table in (own, other)])
    differ = count = 0
    for name, theirs_one in wanted.items():
        one = mine[name]
        if one.shape != theirs_one.shape or one.dtype != theirs_one.dtype:
            return 1.0
        if name in TABLES:  # padding follows the tokens
            differ += beyond(one, theirs_one, len(own))
            count += one[len(own) :].numel()
            one, theirs_one = one[places[0]], theirs_one[places[1]]
        bits = torch.int16 if one.element_size() == 2 else torch.int32
        differ += int((one.view(bits) != theirs_one.view(bits)).sum())
        count += one.numel()
    return differ / count


def beyond(ours: torch.Tensor, theirs: torch.Tensor, tokens: int) -> int:
    """Elements of padding that are further away than a unit in the last place of what is summed."""
    largest = theirs[:tokens].double().abs().amax(0)
    unit = torch.finfo(theirs.dtype).eps * 2 ** largest.log2().floor()
    apart = (ours[tokens:].double() - theirs[tokens:].double()).abs()
    return int((apart > unit).sum())
