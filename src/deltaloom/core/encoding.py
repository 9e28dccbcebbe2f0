"""From rows to token ids and a response mask, once, with the mask checked.

A silent all-ones or all-zero mask is the commonest bug of fine-tuning code, so the mask is part
of the type here: a row whose mask came out empty, or full without being plain `text`, is an
error that names the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaloom.core.errors import InputError

if TYPE_CHECKING:
    from deltaloom.core.examples import Example


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as a model sees it; both lists have the same length T."""

    id: str
    input_ids: list[int]
    response_mask: list[int]
    """1 where the token is to be learned or scored."""
    truncated: bool = False


def encode(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[Encoded]:
    """Encode every row, at most `max_length` tokens each.

    Too long rows keep their response: the prompt is cut from the left first, then the response
    from the right, and `Encoded.truncated` says so. Raises InputError for a row without a
    response and for messages without a chat template.
    """
    return [_checked(example, tokenizer, max_length) for example in examples]


def encode_prompt(example: Example, tokenizer: Any) -> list[int]:
    """Token ids of everything before the response, as generation would start from."""
    if example.messages is not None:
        turns = list(example.messages)
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        if not turns:
            raise InputError(f"{example.where}: no message before the assistant's")
        text = _template(example, tokenizer)(turns, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    if example.prompt is None:
        raise InputError(f"{example.where}: has no 'prompt' to answer")
    return _without_eos(tokenizer(example.prompt)["input_ids"], tokenizer)


def encode_continuation(
    example: Example, prompt_ids: list[int], continuation: str, tokenizer: Any
) -> list[int]:
    """Token ids of `continuation` after the row's prompt.

    The two are tokenised together where that leaves the prompt's own tokens alone, and apart
    where a token would span the border, because generation starts from the prompt's tokens.
    """
    if example.prompt is not None:
        whole = _without_eos(tokenizer(example.prompt + continuation)["input_ids"], tokenizer)
        if whole[: len(prompt_ids)] == prompt_ids:
            return whole[len(prompt_ids) :]
    return tokenizer(continuation, add_special_tokens=False)["input_ids"]


def _checked(example: Example, tokenizer: Any, max_length: int) -> Encoded:
    ids, mask = _whole(example, tokenizer)
    if not any(mask):
        raise InputError(f"{example.where}: nothing to learn: the response has no tokens")
    if all(mask) and example.text is None:
        raise InputError(
            f"{example.where}: every token counts as response because the prompt is empty; "
            "use a 'text' row if that is meant"
        )
    short_ids, short_mask = _fit(ids, mask, max_length)
    return Encoded(example.id, short_ids, short_mask, truncated=len(ids) > max_length)


def _whole(example: Example, tokenizer: Any) -> tuple[list[int], list[int]]:
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if example.text is not None:
        ids = _without_eos(tokenizer(example.text)["input_ids"], tokenizer) + eos
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
        raise InputError(f"{example.where}: the answer is empty")
    return prompt_ids + response_ids + eos, [0] * len(prompt_ids) + [1] * len(response_ids + eos)


def _conversation(example: Example, tokenizer: Any) -> tuple[list[int], list[int]]:
    turns = list(example.messages or ())
    if not any(turn["role"] == "assistant" for turn in turns):
        raise InputError(f"{example.where}: no message of the assistant to learn from")
    apply = _template(example, tokenizer)
    if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        out = apply(turns, return_dict=True, return_assistant_tokens_mask=True)
        return list(out["input_ids"]), list(out["assistant_masks"])
    return _by_prefixes(example, turns, apply, tokenizer)


def _by_prefixes(
    example: Example, turns: list[dict[str, str]], apply: Any, tokenizer: Any
) -> tuple[list[int], list[int]]:
    """Mask by rendering every prefix of the conversation and tokenising the pieces between."""
    ids: list[int] = []
    mask: list[int] = []
    done = ""

    def add(text: str, value: int) -> None:
        nonlocal done
        if not text.startswith(done):
            raise InputError(
                f"{example.where}: the chat template rewrites earlier messages, so the response "
                "cannot be told apart; use a template with {% generation %} marks"
            )
        piece = tokenizer(text[len(done) :], add_special_tokens=False)["input_ids"]
        ids.extend(piece)
        mask.extend([value] * len(piece))
        done = text

    for number, turn in enumerate(turns):
        if turn["role"] == "assistant":
            add(apply(turns[:number], tokenize=False, add_generation_prompt=True), 0)
            add(apply(turns[: number + 1], tokenize=False), 1)
    return ids, mask


def _template(example: Example, tokenizer: Any) -> Any:
    if not tokenizer.chat_template:
        raise InputError(
            f"{example.where}: the row is a conversation and the tokenizer has no chat template; "
            "use rows with 'prompt' and 'completion', or a base whose tokenizer has one"
        )
    return tokenizer.apply_chat_template


def _fit(ids: list[int], mask: list[int], max_length: int) -> tuple[list[int], list[int]]:
    if len(ids) <= max_length:
        return ids, mask
    first = mask.index(1)
    # At least one prompt token stays, so that the first response token is still predicted.
    room = max(max_length - (len(ids) - first), min(first, 1))
    start = first - room if first else 0
    return ids[start : start + max_length], mask[start : start + max_length]


def _without_eos(ids: list[int], tokenizer: Any) -> list[int]:
    ids = list(ids)
    if ids and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids
