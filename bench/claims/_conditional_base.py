"""A small model that can copy a note from its context and recall what it knows of keys."""

from __future__ import annotations

import random
from pathlib import Path

import torch

FILLER = [f"f{k}" for k in range(40)]
WORDS = [f"w{k}" for k in range(60)]
KEYS = [f"k{k}" for k in range(48)]
LENGTH = 4
"""Words of a note and of what is known of a key."""
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "[IND]"]
TOKENS = [*SPECIAL, "note", "end", "ask", ":", *FILLER, *WORDS, *KEYS]
STEPS, BATCH, LR = 2000, 64, 2e-3
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' <|assistant|> ' }}"
    "{% generation %}{{ m.content + ' ' + eos_token }}{% endgeneration %}"
    "{% else %}{{ ' <|user|> ' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <|assistant|> ' }}{% endif %}"
)


def known() -> dict[str, list[str]]:
    """What the model will know: four words of each key, always the same."""
    rng = random.Random("known")
    return {key: rng.sample(WORDS, LENGTH) for key in KEYS}


def prompt(note: list[str] | None, key: str | None, rng: random.Random) -> str:
    """Filler, the note if there is one, filler, and the question."""
    parts = rng.sample(FILLER, rng.randint(2, 8))
    if note is not None:
        parts += ["note", *note, "end", *rng.sample(FILLER, rng.randint(2, 8))]
    return " ".join([*parts, "ask", *([key] if key else []), ":"])


def pretrain(folder: Path, quick: bool = False) -> Path:
    """Write the model and its tokenizer.

    A quarter of its texts copy a note, a quarter copy a note although a key is asked about, and
    half recall what is known of a key. Half of them are in the chat template's form.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    rng = random.Random("pretrain")
    ids = {word: k for k, word in enumerate(TOKENS)}
    facts, steps = known(), 60 if quick else STEPS
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENS),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        texts = []
        for k in range(BATCH):
            noted = k % 2 == 0
            key = None if k % 4 == 0 else rng.choice(KEYS)
            answer = facts[key] if key and not noted else rng.sample(WORDS, LENGTH)
            asked = prompt(answer if noted else None, key, rng)
            words = asked.split()
            if k % 8 < 4:  # as the chat template has it
                words = ["<|user|>", *words, "<|assistant|>"]
            texts.append(["<s>", *words, *answer, "</s>"])
        width = max(map(len, texts))
        batch = torch.tensor([[ids[w] for w in t] + [0] * (width - len(t)) for t in texts])
        labels = torch.full_like(batch, -100)
        for i, text in enumerate(texts):
            end = len(text)
            labels[i, end - LENGTH - 1 : end] = batch[i, end - LENGTH - 1 : end]
        loss = model(input_ids=batch, attention_mask=(batch > 0).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            print(f"pretraining, step {step}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer():
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({w: k for k, w in enumerate(TOKENS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=SPECIAL[4:6],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
