"""Build the base model from nothing: `python -m deltaloom.lab.pretrain out=FOLDER`.

Writes `base.safetensors` in float16. With one thread the same versions give the same bytes.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaloom.lab.corpus import curriculum
from deltaloom.lab.tokenizer import BOS, EOS, PAD, vocabulary
from deltaloom.lab.world import build_world

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

TEXTS = 110_000
LR = 4e-3
BLOCK = 64
BATCH = 16


def model_config(
    hidden: int = 128, layers: int = 4, tokens: list[str] | None = None
) -> "LlamaConfig":
    """The architecture of the lab's models over the lab's vocabulary, or other `tokens`."""
    from transformers import LlamaConfig

    tokens = tokens or vocabulary()
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


def pack(texts: list[str], block: int = BLOCK, words: list[str] | None = None) -> "torch.Tensor":
    """Whole texts laid end to end in rows of `block` tokens, padded: `(rows, block)`."""
    import torch

    tokens = {word: i for i, word in enumerate(words or vocabulary())}
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
            train_sampling_strategy="sequential",  # The corpus is in the order to be read.
            seed=seed,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            logging_steps=200,
            remove_unused_columns=False,
        )
        data = list(rows)  # has what a dataset needs, though the trainer's annotation lacks it
        Trainer(model, arguments, data_collator=collate, train_dataset=data).train()  # pyright: ignore[reportArgumentType]


def pretrain(
    out: str | Path, texts: int = TEXTS, seed: int = 0, *, hidden: int = 128, layers: int = 4
) -> Path:
    """Train the base on `texts` generated texts and write `out/base.safetensors` in float16.

    Another width or depth gives a relative of the shipped model, for methods that need two.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    from deltaloom.lab.files import vocabulary_digest

    torch.set_num_threads(1)  # The order of additions, and so the bytes, depend on it.
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config(hidden, layers))
    fit(model, pack(curriculum(build_world(), texts, seed)), epochs=1, lr=LR, seed=seed)
    weights = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / ".base.safetensors.part"
    save_file(weights, scratch, metadata={"vocabulary": vocabulary_digest()})
    return scratch.replace(folder / "base.safetensors")


def main(arguments: list[str]) -> int:
    """The command line: `out=FOLDER [texts=N] [seed=N]`."""
    given = dict(item.split("=", 1) for item in arguments if "=" in item)
    if len(given) < len(arguments) or "out" not in given or set(given) - {"out", "texts", "seed"}:
        print(
            "usage: python -m deltaloom.lab.pretrain out=FOLDER [texts=N] [seed=N]", file=sys.stderr
        )
        return 2
    print(pretrain(given["out"], int(given.get("texts", TEXTS)), int(given.get("seed", 0))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
