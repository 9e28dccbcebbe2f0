"""A tiny model, rows and a run for tests: nothing here needs the network or the lab."""

import json
from pathlib import Path

import torch

from deltaloom.core.run import Run

torch.set_num_threads(1)

WORDS = "who where lives likes tom anna lily ben sue max oslo rome lima ? : . in yes no"


def tokenizer_in(folder: Path, template: bool = True) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS.split()])
    }
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    if template:
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role == 'assistant' %}"
            "{% generation %} : {{ m.content }} </s> {% endgeneration %}"
            "{% else %}<s> {{ m.content }} {% endif %}{% endfor %}"
        )
    tokenizer.save_pretrained(folder)


def base_in(folder: Path, seed: int = 0, **config) -> Path:
    """A random Llama of two layers, hidden 16, with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(WORDS.split()) + 4,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,
        **config,
    }
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    tokenizer_in(folder)
    return folder


PEOPLE, CITIES = ("tom", "anna", "lily", "ben", "sue", "max"), ("oslo", "rome", "lima")


def rows_in(path: Path, count: int = 24, offset: int = 0) -> Path:
    """Prompt and completion rows of unequal length: who lives where."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(offset, offset + count):
            who, city = PEOPLE[i % 6], CITIES[(i * 5) % 3]
            prompt = f"where lives {who} ? " + "yes " * (i % 4)
            row = {"id": f"r{i}", "source": f"s{i % 3}", "prompt": prompt, "completion": city}
            file.write(json.dumps(row) + "\n")
    return path


def run_in(folder: Path, seed: int = 0) -> Run:
    return Run.open(folder, {"steps": []}, {}, seed)


def loss_in_parts(monkeypatch):
    """`measure loss` gives parts beside its whole from now on, as `measure skillmix` does."""
    from deltaloom.measure.loss import Loss

    real = Loss.measure

    def measure(*args):
        found = real(*args)
        return {"": found, "k = 2": found}

    monkeypatch.setattr(Loss, "measure", measure)
