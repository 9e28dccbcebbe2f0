"""Build the base model from nothing: `python -m deltaloom.lab.pretrain out=FOLDER`.

Writes `base.safetensors` in float16. With one thread the same versions give the same bytes.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .corpus import documents
from .tokenizer import BOS, EOS, PAD, build_tokenizer, vocabulary
from .world import build_world

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

BLOCK = 64
BATCH = 16


def model_config(hidden: int = 128, layers: int = 4) -> "LlamaConfig":
    """The architecture of the lab's models over the lab's vocabulary."""
    from transformers import LlamaConfig

    tokens = vocabulary()
    return LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        # Task words are never read in pretraining; tied to the head their embeddings would all
        # be pushed one way and could not be told apart.
        tie_word_embeddings=False,
        bos_token_id=tokens.index(BOS),
        eos_token_id=tokens.index(EOS),
        pad_token_id=tokens.index(PAD),
    )


def pack(texts: list[str], block: int = BLOCK) -> "torch.Tensor":
    """Whole texts laid end to end in rows of `block` tokens, padded: `(rows, block)`."""
    import torch

    tokens = {word: i for i, word in enumerate(vocabulary())}
    rows: list[list[int]] = [[]]
    for text in texts:
        ids = [tokens[BOS], *(tokens[w] for w in text.split()), tokens[EOS]]
        if len(rows[-1]) + len(ids) > block:
            rows.append([])
        rows[-1] += ids
    packed = torch.full((len(rows), block), tokens[PAD])
    for i, row in enumerate(rows):
        packed[i, : len(row)] = torch.tensor(row)
    return packed


def fit(model: "LlamaForCausalLM", rows: "torch.Tensor", *, epochs: float, lr: float, seed: int):
    """Train all the weights of `model` on packed rows; the one place that knows a trainer."""
    import tempfile

    from transformers import Trainer, TrainingArguments

    pad = model.config.pad_token_id

    def collate(batch: list[Any]) -> dict[str, Any]:
        import torch

        ids = torch.stack(batch)
        return {"input_ids": ids, "labels": ids.masked_fill(ids == pad, -100)}

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=BATCH,
            num_train_epochs=epochs,
            learning_rate=lr,
            lr_scheduler_type="cosine",
            warmup_steps=100,
            weight_decay=0.0,
            adam_beta2=0.98,
            seed=seed,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            logging_steps=200,
            remove_unused_columns=False,
        )
        Trainer(model, arguments, data_collator=collate, train_dataset=list(rows)).train()
