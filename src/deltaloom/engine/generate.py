"""Generation in batches: the same texts in the same order, whatever the batches were."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from deltaloom.core.errors import InputError
from deltaloom.core.spec import digest
from deltaloom.engine.forward import budgeted, context_length, device_of, padding_token

TOKENS_PER_BATCH = 8192
"""Rows x (prompt + continuation) of a batch. Ours: a few GiB of cache for a model of 7B."""


@dataclass(frozen=True, slots=True)
class Generated:
    """The continuation of one prompt."""

    text: str
    """Without special tokens, and cut before the first stop string."""
    prompt_tokens: int
    """Tokens of the prompt that the model saw."""
    new_tokens: int
    """Tokens generated, with the end-of-sequence token if it came."""
    cut: bool
    """Whether the prompt was too long and lost tokens on its left."""
    finished: bool
    """Whether it ended by itself: False when `max_new_tokens` ran out."""

    @property
    def forward_tokens(self) -> int:
        """Tokens computed for it; the last one generated is never read."""
        return self.prompt_tokens + self.new_tokens - 1


def generate_greedily(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[str] = (),
    tokens_per_batch: int = TOKENS_PER_BATCH,
    on_batch: Callable[[int], None] | None = None,
    within: Callable[[list[int], list[int]], AbstractContextManager[None]] | None = None,
) -> list[Generated]:
    """`generate` at temperature 0: each next token is the most probable one."""
    return generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens,
        stop,
        tokens_per_batch=tokens_per_batch,
        on_batch=on_batch and (lambda chosen, answers: on_batch(len(chosen))),
        within=within,
    )


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[str] = (),
    *,
    temperature: float = 0.0,
    seed: int = 0,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    on_batch: Callable[[list[int], list[Generated]], None] | None = None,
    within: Callable[[list[int], list[int]], AbstractContextManager[None]] | None = None,
) -> list[Generated]:
    """Continue each prompt token by token: the most probable one, or one drawn at `temperature`.

    A draw is the largest of `logits / temperature + g`, g standard Gumbel noise (which is exactly a
    draw from the softmax), and a prompt's noise is made from `seed` and its own tokens: its text
    does not depend on what it is generated with, and a prompt given twice gets one text twice.

    Ends at an end-of-sequence token (the tokenizer's or any that the model's generation config
    names), after `max_new_tokens`, or once the text holds a stop string. Everything else in the
    model's generation config (sampling, penalties, forced tokens) is set aside for the call and
    put back. Padding is on the left and masked; the tokenizer is not touched. In float32 a text
    depends on its batch only where two tokens are equally probable to about 1e-5.

    Args:
        model: Causal language model or PeftModel, in evaluation mode.
        tokenizer: Decodes, and names the end-of-sequence and pad tokens (if any).
        prompts: Token ids of each prompt, at least one.
        max_new_tokens: Tokens to generate at most, at least 1. A prompt that leaves no room for
            them in the context is cut from the left (lm-eval's way) and says so in `cut`.
        stop: Texts that end a continuation and are not part of it.
        tokens_per_batch: Rows x (prompt + `max_new_tokens`) of a batch at most.
        temperature: 0 takes the most probable token; 1 draws from the model's distribution.
        seed: Decides the draws.
        on_batch: Called after each batch with the numbers of its prompts and their continuations.
        within: Makes the context in which a batch is generated, from the prompts' numbers and how
            many of each one's last tokens are left.

    Returns:
        One `Generated` per prompt, in input order.

    Raises:
        InputError: An empty prompt, or `max_new_tokens` that leave no room for any prompt.
    """
    room = context_length(model) - max_new_tokens
    if room < 1 or max_new_tokens < 1:
        raise InputError(
            f"max_new_tokens = {max_new_tokens}: must be at least 1 and below the model's "
            f"context of {room + max_new_tokens} tokens"
        )
    kept = [list(prompt[-room:]) for prompt in prompts]
    if not all(kept):
        raise InputError(f"prompt {kept.index([]) + 1} has no tokens; begin it with start_token")
    order = sorted(range(len(kept)), key=lambda i: (-len(kept[i]), i))
    widths = [len(kept[i]) + max_new_tokens for i in order]
    ends = end_tokens(model, tokenizer)
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature = {temperature}: must be a number of at least 0")
    pad = padding_token(tokenizer)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
    )
    results: list[Any] = [None] * len(kept)
    with _only_settings(model, settings), torch.inference_mode():
        for batch in budgeted(widths, tokens_per_batch):
            chosen = [order[k] for k in batch]
            rows = [kept[i] for i in chosen]
            noise = _Noise(rows, temperature, seed) if temperature else None
            with within(chosen, [*map(len, rows)]) if within else nullcontext():
                answers = _batch(model, tokenizer, rows, settings, stop, noise)
            for i, (text, new_tokens, finished) in zip(chosen, answers, strict=True):
                cut = len(kept[i]) < len(prompts[i])
                results[i] = Generated(text, len(kept[i]), new_tokens, cut, finished)
            if on_batch is not None:
                on_batch(chosen, [results[i] for i in chosen])
    return results


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string in it, and whether there was one."""
    found = [place for place in map(text.find, stop) if place >= 0]
    return (text[: min(found)], True) if found else (text, False)


def _batch(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    settings: GenerationConfig,
    stop: Sequence[str],
    noise: LogitsProcessor | None,
) -> list[tuple[str, int, bool]]:
    """Text, number of new tokens and whether it ended by itself, for each of one batch."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), settings.pad_token_id)  # (b, T)
    attention = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        attention[i, width - len(prompt) :] = 1
    device = device_of(model)
    generator, inputs, width = _generator(model, ids.to(device), attention.to(device))
    watcher = _StopTexts(tokenizer, stop, width, len(prompts))
    output = generator.generate(
        **inputs,
        generation_config=settings,
        logits_processor=LogitsProcessorList([] if noise is None else [noise]),
        stopping_criteria=StoppingCriteriaList([watcher] if stop else []),
    )
    ends = set(settings.eos_token_id or ())
    results = []
    for row, stopped_at in zip(output[:, width:].tolist(), watcher.lengths, strict=True):
        # What follows is padding, and a pad token can be any token.
        first_end = next((k + 1 for k, token in enumerate(row) if token in ends), None)
        length = min(first_end or len(row), stopped_at or len(row))
        # An end that only the model's config names need not be special to the tokenizer.
        ids = row[: length - (first_end == length)]
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text, stopped = cut_at_stop(text, stop)
        results.append((text, length, stopped or first_end is not None))
    return results


def _generator(
    model: Any, ids: torch.Tensor, attention: torch.Tensor
) -> tuple[Any, dict[str, Any], int]:
    """Who generates, its inputs, and how many tokens of its output are input; ids are `(b, T)`.

    Virtual tokens are put before the padding here, and the base generates: PEFT's own way drops
    the position ids, so that rows would see virtual tokens as far away as their padding is wide,
    and it does not know a cache under the name that transformers gives it since 5.24.
    """
    config: Any = getattr(model, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False):
        return model, {"input_ids": ids, "attention_mask": attention}, ids.shape[1]
    inner = model.get_base_model()
    virtual = attention.new_ones(len(ids), config.num_virtual_tokens)  # (b, k)
    inputs: dict[str, Any] = {"attention_mask": torch.cat([virtual, attention], 1)}
    prompt = model.get_prompt(len(ids))
    if isinstance(prompt, torch.Tensor):
        embedded = model.word_embeddings(ids)  # (b, T, h)
        inputs["inputs_embeds"] = torch.cat([prompt.to(embedded.dtype), embedded], 1)
        return inner, inputs, 0
    # What a cache holds counts as input already read; the ids in its place are never looked at.
    inputs["input_ids"] = torch.cat([virtual, ids], 1)
    named = inspect.signature(inner.forward).parameters
    inputs["cache" if "cache" in named else "past_key_values"] = prompt
    return inner, inputs, inputs["input_ids"].shape[1]


class _Noise(LogitsProcessor):
    """Turns the largest logit into a draw; every row has random numbers of its own."""

    def __init__(self, prompts: list[list[int]], temperature: float, seed: int) -> None:
        self.temperature = temperature
        self.seeds = [int(digest([seed, prompt])[:15], 16) for prompt in prompts]
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """The scores `(b, V)` with Gumbel noise."""
        self.generators = self.generators or [
            torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds
        ]
        exponential = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(exponential, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() / self.temperature - exponential.log()


class _StopTexts(StoppingCriteria):
    """Ends a row when the end of its text holds a stop string, and remembers where."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], width: int, rows: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width
        # A token may be a single byte; a few more let the first ones be decoded in context.
        self.window = max((len(text.encode()) for text in stop), default=0) + 4
        self.lengths = [0] * rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        """Which rows are done, `(b,)`."""
        length = input_ids.shape[1] - self.width
        open_rows = [i for i, at in enumerate(self.lengths) if not at]
        tails = input_ids[open_rows, self.width :][:, -self.window :].tolist()
        for i, tail in zip(open_rows, tails, strict=True):
            text = self.tokenizer.decode(
                tail, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            if cut_at_stop(text, self.stop)[1]:
                self.lengths[i] = length
        done = [at > 0 for at in self.lengths]
        return torch.tensor(done, device=input_ids.device)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """All end-of-sequence ids; chat models have several and name them in the generation config."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = named if isinstance(named, list | tuple) else [named]
    return sorted({one for one in (*listed, tokenizer.eos_token_id) if one is not None})


@contextmanager
def _only_settings(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Let nothing of the model's own generation config, which `generate` merges in, be left."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = inner.generation_config
    inner.generation_config = settings
    try:
        yield
    finally:
        inner.generation_config = before
