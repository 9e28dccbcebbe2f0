"""From rows to token ids and a response mask, once, with the mask checked.

A silent all-ones or all-zero mask is the commonest bug of fine-tuning code, so the mask is part
of the type here: a row whose mask came out empty, or full without being plain `text`, is an
error that names the row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaloom.core.errors import InputError

if TYPE_CHECKING:
    from deltaloom.core.examples import Example

ANCHORS = ("\n", ".", "a")
"""Texts put before a piece that must be tokenised as if it stood in the middle of a text."""
GENERATION = re.compile(r"\{%-?\s*generation\b")
"""The mark of chat templates that say themselves what the assistant wrote."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as a model sees it; both lists have the same length T."""

    id: str
    input_ids: list[int]
    response_mask: list[int]
    """1 where the token is to be learned or scored."""
    truncated: bool = False
    label: int | None = None
    """Number of the row's class, for a sequence classifier; no token is scored then."""


def encode(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[Encoded]:
    """Encode every row, at most `max_length` tokens each.

    Too long rows keep their response: the prompt is cut from the left first, then the response
    from the right, and `Encoded.truncated` says so. Raises InputError for a row without a
    response, for messages without a chat template, and for a `max_length` below 2, which leaves
    no token to learn from.
    """
    if max_length < 2:
        raise InputError(
            f"max_length = {max_length}: must be at least 2, a prompt token and a response token"
        )
    return [_checked(example, tokenizer, max_length) for example in examples]


def encode_labelled(
    examples: Sequence[Example], tokenizer: Any, max_length: int, labels: Sequence[str]
) -> list[Encoded]:
    """Encode every row for a sequence classifier: its prompt, and its answer as a class.

    Spaces around an answer do not count. Raises InputError for a row whose answer is none of
    `labels`, and for one without a prompt.
    """
    numbers = {label.strip(): number for number, label in enumerate(labels)}
    return [_labelled(example, tokenizer, max_length, numbers) for example in examples]


def _labelled(
    example: Example, tokenizer: Any, max_length: int, numbers: dict[str, int]
) -> Encoded:
    answer = (example.response or "").strip()
    if answer not in numbers:
        raise InputError(
            f"{example.where}: the answer {answer!r} is none of the base's labels "
            f"({', '.join(numbers)}); add it to labels or mend the row"
        )
    if not (example.prompt or "").strip():
        raise InputError(f"{example.where}: has no 'prompt' to classify")
    ids = tokenizer(example.prompt)["input_ids"]
    if len(ids) > max_length:
        ids = tokenizer(example.prompt, truncation=True, max_length=max_length)["input_ids"]
        return Encoded(example.id, ids, [0] * len(ids), True, numbers[answer])
    return Encoded(example.id, ids, [0] * len(ids), False, numbers[answer])


def encode_prompt(example: Example, tokenizer: Any) -> list[int]:
    """Token ids of everything before the response, as generation would start from."""
    text = _prompt_text(example, tokenizer)
    return _tokens(text, tokenizer, special=example.messages is None)


def encode_continuation(
    example: Example, prompt_ids: list[int], continuation: str, tokenizer: Any
) -> list[int]:
    """Token ids of `continuation` after the row's prompt.

    The two are tokenised together where that leaves the prompt's own tokens alone, and apart
    where a token would span the border, because generation starts from the prompt's tokens.
    """
    text = _prompt_text(example, tokenizer)
    special = example.messages is None
    return _after(text, prompt_ids, continuation, tokenizer, special=special)


def window(mask: Sequence[int], max_length: int) -> slice:
    """The part of a row with this response mask that `encode` keeps."""
    if len(mask) <= max_length:
        return slice(0, len(mask))
    first = list(mask).index(1)
    # At least one prompt token stays, so that the first response token is still predicted.
    room = max(max_length - (len(mask) - first), min(first, 1))
    start = first - room if first else 0
    return slice(start, start + max_length)


def _checked(example: Example, tokenizer: Any, max_length: int) -> Encoded:
    ids, mask = _whole(example, tokenizer)
    if not any(mask):
        raise InputError(f"{example.where}: nothing to learn: the response has no tokens")
    if all(mask) and example.text is None:
        raise InputError(
            f"{example.where}: every token counts as response because the prompt is empty; "
            "use a 'text' row if that is meant"
        )
    kept = window(mask, max_length)
    return Encoded(example.id, ids[kept], mask[kept], truncated=len(ids) > max_length)


def _whole(example: Example, tokenizer: Any) -> tuple[list[int], list[int]]:
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if example.text is not None:
        if not example.text.strip():
            raise InputError(f"{example.where}: nothing to learn: the text is empty")
        ids = _tokens(example.text, tokenizer, special=True) + eos
        return ids, [1] * len(ids)
    if example.messages is not None:
        return _conversation(example, tokenizer)
    response = example.response
    if response is None:
        raise InputError(
            f"{example.where}: the row has no answer; add a 'completion' "
            "(or 'output', 'response', 'answer')"
        )
    prompt_ids = encode_prompt(example, tokenizer) if example.prompt else []
    response_ids = encode_continuation(example, prompt_ids, response, tokenizer)
    if not response_ids:
        raise InputError(f"{example.where}: the answer is empty; write one or remove the row")
    return prompt_ids + response_ids + eos, [0] * len(prompt_ids) + [1] * len(response_ids + eos)


def _conversation(example: Example, tokenizer: Any) -> tuple[list[int], list[int]]:
    turns = list(example.messages or ())
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns):
        raise InputError(f"{example.where}: no message of the assistant to learn from")
    template = _template(example, tokenizer)
    pieces = (_marked if GENERATION.search(template) else _by_prefixes)(example, tokenizer)
    ids: list[int] = []
    mask: list[int] = []
    done = ""
    for piece, value in pieces:
        before = _tokens(done, tokenizer, special=False)
        new = _after(done, before, piece, tokenizer, special=False)
        ids.extend(new)
        mask.extend([value] * len(new))
        done += piece
    return ids, mask


def _marked(example: Example, tokenizer: Any) -> list[tuple[str, int]]:
    """The conversation cut where the template's generation marks begin and end."""
    from transformers.utils.chat_template_utils import render_jinja_template

    with _naming(example):
        texts, marked = render_jinja_template(
            conversations=[list(example.messages or ())],
            chat_template=_template(example, tokenizer),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    text: str = texts[0]
    spans: Any = marked[0]
    pieces, done = [], 0
    for start, stop in spans:
        pieces += [(text[done:start], 0), (text[start:stop], 1)]
        done = stop
    return [piece for piece in (*pieces, (text[done:], 0)) if piece[0]]


def _by_prefixes(example: Example, tokenizer: Any) -> list[tuple[str, int]]:
    """The conversation cut by rendering every prefix of it."""
    turns = list(example.messages or ())
    pieces: list[tuple[str, int]] = []
    done = ""

    def add(text: str, value: int) -> None:
        nonlocal done
        if not text.startswith(done):
            raise InputError(
                f"{example.where}: the chat template rewrites earlier messages, so the response "
                "cannot be told apart; use a template with {% generation %} marks"
            )
        pieces.append((text[len(done) :], value))
        done = text

    for number, turn in enumerate(turns):
        if turn["role"] == "assistant":
            if number:
                add(_render(example, turns[:number], tokenizer, add_generation_prompt=True), 0)
            add(_render(example, turns[: number + 1], tokenizer), 1)
    return pieces


def _prompt_text(example: Example, tokenizer: Any) -> str:
    if example.messages is not None:
        turns = list(example.messages)
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        if not turns:
            raise InputError(f"{example.where}: no message before the assistant's")
        return _render(example, turns, tokenizer, add_generation_prompt=True)
    if example.prompt is None:
        raise InputError(f"{example.where}: has no 'prompt' to answer")
    return example.prompt


def _render(example: Example, turns: list[dict[str, str]], tokenizer: Any, **options: Any) -> str:
    _template(example, tokenizer)
    with _naming(example):
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)


def _template(example: Example, tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        raise InputError(
            f"{example.where}: the row is a conversation and the tokenizer has no chat template; "
            "use rows with 'prompt' and 'completion', or a base whose tokenizer has one"
        )
    return tokenizer.get_chat_template()


@contextmanager
def _naming(example: Example) -> Iterator[None]:
    """Turn what a chat template refuses into a sentence that names the row."""
    from jinja2 import TemplateError

    try:
        yield
    except TemplateError as error:
        raise InputError(
            f"{example.where}: the chat template refuses the messages ({error})"
        ) from None


def _tokens(text: str, tokenizer: Any, *, special: bool) -> list[int]:
    """Token ids of `text`, with a leading special token where the tokenizer has one."""
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    return _without_eos(ids, tokenizer) if special else ids


def _after(
    text: str, text_ids: list[int], piece: str, tokenizer: Any, *, special: bool
) -> list[int]:
    """Token ids of `piece` after `text`: of both together, or apart when a token spans both."""
    whole = _tokens(text + piece, tokenizer, special=special)
    if whole[: len(text_ids)] == text_ids:
        return whole[len(text_ids) :]
    alone = _alone(piece, tokenizer)
    return _without_eos(alone, tokenizer) if special else alone


def _alone(piece: str, tokenizer: Any) -> list[int]:
    # Many tokenizers put a space before a text of its own, and the piece is not one.
    for anchor in ANCHORS:
        before = _tokens(anchor, tokenizer, special=False)
        both = _tokens(anchor + piece, tokenizer, special=False)
        known = before and tokenizer.unk_token_id not in before
        if known and both[: len(before)] == before:
            return both[len(before) :]
    return _tokens(piece, tokenizer, special=False)


def _without_eos(ids: list[int], tokenizer: Any) -> list[int]:
    ends = tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id]
    return ids[:-1] if ends else ids
