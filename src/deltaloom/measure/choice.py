"""Accuracy at multiple choice, by the log-likelihood of each choice after the prompt.

Paper: none; the convention of lm-eval (EleutherAI's lm-evaluation-harness, `multiple_choice`),
as in GPT-3 (Brown et al. 2020, arXiv 2005.14165, section 2.4).

Formula: the prediction is `argmax_c sum_t log p(c_t | prompt, c_<t) / n_c` with n_c = 1 (`none`,
lm-eval's `acc`), the choice's tokens (`tokens`), or the UTF-8 bytes of its text without the
delimiter (`bytes`, lm-eval's `acc_bytes`; its `acc_norm` divides by characters, which is the same
in ASCII). Ties go to the lowest index. An item is 1 where the predicted text is the answer.
Rows come in clusters when all have a `cluster` (at least two, fewer than rows). A base with
`labels` is a sequence classifier: its prediction is the choice with the largest output, and
`normalise` and `delimiter` change nothing.

Differs: a prompt that is too long is cut once per row, so that all its choices follow the same
text (lm-eval cuts per choice); `truncated_rows` of the run's notes counts them. A token across
the border of prompt and choice is never formed, as generation could not form it either. No
delimiter by default: the row says whether its choices begin with a space.

Not covered: several right choices; the unconditional (`acc_mutual_info`) score; few-shot prompts,
which belong in the rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, final

from pydantic import Field

from deltaloom.core.encoding import encode_continuation, encode_labelled, encode_prompt
from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Estimate
from deltaloom.core.examples import Example, Examples
from deltaloom.core.method import Measurer, Sizes, Work
from deltaloom.core.run import Run
from deltaloom.measure._classes import class_logits, classes_of
from deltaloom.measure._items import (
    clusters_of,
    length_limit,
    note,
    require_finite,
    require_rows,
    scored,
)

CHOICES = 4
"""Choices a row that `plan` expects, as in MMLU, ARC and HellaSwag."""

if TYPE_CHECKING:
    from deltaloom.engine.forward import Masked


@final
class Choice(Measurer):
    """Accuracy of the most probable choice."""

    classifiers = True

    normalise: Literal["none", "tokens", "bytes"] = "none"
    """What a choice's log-likelihood is divided by, so that long ones are not at a disadvantage.
    None is lm-eval's `acc`."""
    delimiter: str = ""
    """Put between prompt and choice. Ours; lm-eval's `target_delimiter` is one space."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens of prompt and choice at most; the prompt is cut from the left. None (ours) is the
    model's context."""

    def work(self, sizes: Sizes) -> Work:
        """Every row once per choice; choices of one token take less. Activations not counted."""
        width = min(sizes.row_tokens, self.max_length or sizes.row_tokens)
        return Work(forward_tokens=sizes.rows * CHOICES * width, memory_bytes=sizes.weight_bytes)

    def measure(self, model: Any, tokenizer: Any, data: Examples, run: Run) -> Estimate:
        """Score every choice of every row of `data`; items are 1 (right) or 0.

        Raises InputError for no rows and for a row without choices, answer or prompt, and
        WorkError naming the row for a log-probability that is not finite.
        """
        require_rows(data, "choice")
        limit = length_limit(self.max_length, model)
        labels = classes_of(model)
        if labels is not None:
            return self._classified(labels, model, tokenizer, data, limit, run)
        questions = [_question(example) for example in data]
        rows = [
            self._sequences(example, choices, tokenizer, limit)
            for example, (choices, _) in zip(data, questions, strict=True)
        ]
        flat = [sequence for sequences, _ in rows for sequence in sequences]
        values, cost = scored("choice", model, tokenizer, flat, run)
        remaining = iter(values)
        items: dict[str, float] = {}
        for example, (choices, answer) in zip(data, questions, strict=True):
            merits = []
            for text in choices:
                found = next(remaining)
                require_finite(found, example)
                merits.append(self._merit(found, text))
            best = max(range(len(merits)), key=merits.__getitem__)  # the first of equals
            items[example.id] = float(choices[best] == answer)
        note(run, truncated_rows=sum(cut for _, cut in rows))
        suffix = {"none": "", "tokens": "_per_token", "bytes": "_per_byte"}[self.normalise]
        return Estimate.from_items(
            items, metric=f"accuracy{suffix}", clusters=clusters_of(data), cost=cost
        )

    def _classified(
        self, labels: list[str], model: Any, tokenizer: Any, data: Examples, limit: int, run: Run
    ) -> Estimate:
        """As `measure`, by the outputs of a sequence classifier."""
        rows = [
            replace(example, completion=answer)
            for example, (_, answer) in ((one, _question(one)) for one in data)
        ]
        encoded = encode_labelled(rows, tokenizer, limit, labels)
        logits, cost = class_logits(model, tokenizer, encoded, run)
        numbers = {label.strip(): k for k, label in enumerate(labels)}
        items: dict[str, float] = {}
        for example, found in zip(rows, logits, strict=True):
            require_finite(found, example)
            offered = [choice.strip() for choice in example.choices or ()]
            unknown = [choice for choice in offered if choice not in numbers]
            if unknown:
                raise InputError(
                    f"{example.where}: choice {unknown[0]!r} is none of the base's labels"
                )
            best = max(offered, key=lambda choice: found[numbers[choice]])  # the first of equals
            items[example.id] = float(best == (example.completion or "").strip())
        note(run, truncated_rows=sum(row.truncated for row in encoded))
        return Estimate.from_items(items, metric="accuracy", clusters=clusters_of(data), cost=cost)

    def _sequences(
        self, example: Example, texts: Sequence[str], tokenizer: Any, limit: int
    ) -> tuple[list[Masked], bool]:
        """Prompt and choice with the choice masked, per choice; whether the prompt was cut."""
        prompt = encode_prompt(example, tokenizer)
        choices = [
            encode_continuation(example, prompt, self.delimiter + text, tokenizer) for text in texts
        ]
        if not all(choices):
            raise InputError(f"{example.where}: choice {choices.index([]) + 1} has no tokens")
        if not prompt:
            from deltaloom.engine.forward import start_token

            start = start_token(tokenizer)
            if start is None:
                raise InputError(
                    f"{example.where}: the prompt is empty, and the tokenizer has neither a BOS "
                    "nor an EOS token to stand before the choices"
                )
            prompt = [start]
        # The last token of a choice is never read by the model.
        room = limit + 1 - max(map(len, choices))
        if room < 1:
            raise InputError(
                f"{example.where}: a choice has {limit + 1 - room} tokens and at most {limit} fit"
            )
        kept = prompt[-room:]
        masked: list[Masked] = [(kept + ids, [0] * len(kept) + [1] * len(ids)) for ids in choices]
        return masked, len(kept) < len(prompt)

    def _merit(self, logprobs: Any, text: str) -> float:
        total = math.fsum(logprobs)
        if self.normalise == "tokens":
            return total / len(logprobs)
        if self.normalise == "bytes":
            return total / max(1, len(text.encode()))
        return total


def _question(example: Example) -> tuple[tuple[str, ...], str]:
    """The choices and the right one."""
    if not example.choices or not example.answers:
        raise InputError(
            f"{example.where}: has no 'choices' with an 'answer' (its index or its text)"
        )
    return example.choices, example.answers[0]
