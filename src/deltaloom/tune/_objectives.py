"""What zeroth-order tuning can minimise beside the loss: anything that gives a number.

Each takes the model as it is at the moment (moved by plus or by minus eps z) and a few rows, and
gives a value that is better when it is lower.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from deltaloom.core.encoding import Encoded, encode_continuation, encode_prompt
from deltaloom.core.errors import InputError

if TYPE_CHECKING:
    from deltaloom.core.examples import Example, Examples
    from deltaloom.engine.perturb import Directed

Reward = Callable[[Sequence["Example"], Sequence[str]], Sequence[float]]
"""Rows and the model's answers to them -> a reward for each, more being better."""


class Signwise:
    """Abstract: an objective that is asked once for each sign."""

    def __call__(self, moved: Directed, chosen: Sequence[int]) -> tuple[float, float, int]:
        """See `engine.descend.Objective`."""
        from deltaloom.engine.perturb import BOTH

        found, tokens = [], 0
        for sign in BOTH:
            with moved.signed((sign,)):
                value, spent = self.value(chosen)
            found.append(value)
            tokens += spent
        return found[0], found[1], tokens

    def value(self, chosen: Sequence[int]) -> tuple[float, int]:
        """The value of these rows, and the tokens that it took."""
        raise NotImplementedError


class Accuracy(Signwise):
    """Minus the share of rows whose right choice is the most probable; ties go to the first."""

    def __init__(self, model: Any, tokenizer: Any, data: Examples, max_length: int) -> None:
        from deltaloom.engine.forward import padding_token

        self.model, self.pad_id = model, padding_token(tokenizer)
        self.questions = [_choices(one, tokenizer, max_length) for one in data]

    def value(self, chosen: Sequence[int]) -> tuple[float, int]:
        """See `Signwise`."""
        from deltaloom.engine.forward import token_logprobs

        spent: list[int] = []
        asked = [self.questions[i] for i in chosen]
        flat = [sequence for sequences, _ in asked for sequence in sequences]
        scores = iter(
            token_logprobs(
                self.model, flat, self.pad_id, on_batch=lambda _, tokens: spent.append(tokens)
            )
        )
        right = 0
        for sequences, answer in asked:
            totals = [float(next(scores).sum()) for _ in sequences]
            right += totals.index(max(totals)) == answer
        return -right / len(chosen), sum(spent)


class Rewarded(Signwise):
    """Minus the mean reward of what the model answers, by greedy generation."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        data: Examples,
        reward: Reward,
        new_tokens: Callable[[Sequence[int]], int],
    ) -> None:
        self.model, self.tokenizer, self.data, self.reward = model, tokenizer, data, reward
        self.new_tokens = new_tokens
        self.prompts = [encode_prompt(one, tokenizer) for one in data]

    def value(self, chosen: Sequence[int]) -> tuple[float, int]:
        """See `Signwise`."""
        from deltaloom.engine.generate import generate_greedily

        prompts = [self.prompts[i] for i in chosen]
        found = generate_greedily(self.model, self.tokenizer, prompts, self.new_tokens(chosen))
        rows, answers = [self.data[i] for i in chosen], [one.text for one in found]
        rewards = [float(one) for one in self.reward(rows, answers)]
        if len(rewards) != len(rows):
            raise InputError(
                f"the reward function gave {len(rewards)} rewards for {len(rows)} rows; it must "
                "give one for each"
            )
        return -sum(rewards) / len(rewards), sum(one.forward_tokens for one in found)


def exact_match(model: Any, tokenizer: Any, data: Examples, encoded: Sequence[Encoded]) -> Rewarded:
    """Reward 1 where the answer is the row's response, but for space around it."""

    def reward(rows: Sequence[Example], answers: Sequence[str]) -> list[float]:
        pairs = zip(rows, answers, strict=True)
        return [float(answer.strip() == (row.response or "").strip()) for row, answer in pairs]

    def longest(chosen: Sequence[int]) -> int:
        return max(sum(encoded[i].response_mask) for i in chosen)

    missing = [row.where for row in data if row.response is None]
    if missing:
        raise InputError(f"{missing[0]}: exact_match needs a 'completion' (or 'answer')")
    return Rewarded(model, tokenizer, data, reward, longest)


def imported(path: str) -> Reward:
    """The function that `module:function` names; raises InputError when there is none."""
    module, _, name = path.partition(":")
    try:
        found: Reward = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"objective = {path}: does not import ({error}); put the module's folder on PYTHONPATH"
        ) from None
    if not callable(found):
        raise InputError(f"objective = {path}: is no function")
    return found


def _choices(example: Example, tokenizer: Any, limit: int) -> tuple[list[Any], int]:
    """Ids and mask of every choice after the prompt, and the number of the right one."""
    if not example.choices or not example.answers or example.answers[0] not in example.choices:
        raise InputError(
            f"{example.where}: objective = accuracy needs 'choices' with an 'answer' (its index or "
            "its text)"
        )
    prompt = encode_prompt(example, tokenizer)
    tails = [encode_continuation(example, prompt, one, tokenizer) for one in example.choices]
    room = limit - max(map(len, tails))
    if not prompt or not all(tails) or room < 1:
        raise InputError(
            f"{example.where}: an empty prompt or choice, or a choice of more than {limit - 1} "
            "tokens"
        )
    kept = prompt[-room:]
    sequences = [(kept + tail, [0] * len(kept) + [1] * len(tail)) for tail in tails]
    return sequences, example.choices.index(example.answers[0])
