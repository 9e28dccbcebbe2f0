"""Multiple choice as a function to differentiate: the choices' logits where they first differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from deltaloom.core.encoding import Encoded, encode_continuation, encode_prompt
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Example, Examples

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class Question:
    """What the model reads, the token that tells each choice from the others, and the answer."""

    example: Example
    ids: list[int]
    """The prompt and what all choices begin with."""
    words: list[int]
    answer: int
    truncated: bool

    def lesson(self) -> Encoded:
        """The question with its answer's token to be learned, and nothing else."""
        ids = [*self.ids, self.words[self.answer]]
        return Encoded(self.example.id, ids, [0] * len(self.ids) + [1], self.truncated)


def questions(data: Examples, tokenizer: Any, delimiter: str, limit: int) -> list[Question]:
    """Every row's question; prompts are cut from the left to `limit` tokens.

    Raises InputError naming the row that has no choices with an answer, no prompt, or two choices
    that begin alike: their first tokens, after what all share, must be different.
    """
    return [_question(example, tokenizer, delimiter, limit) for example in data]


def _question(example: Example, tokenizer: Any, delimiter: str, limit: int) -> Question:
    if not example.choices or not example.answers:
        raise InputError(
            f"{example.where}: has no 'choices' with an 'answer' (its index or its text)"
        )
    prompt = encode_prompt(example, tokenizer)
    texts = [delimiter + text for text in example.choices]
    choices = [encode_continuation(example, prompt, text, tokenizer) for text in texts]
    shared = len([*takewhile(lambda column: len({*column}) == 1, zip(*choices, strict=False))])
    words = [ids[shared] for ids in choices if len(ids) > shared]
    if len({*words}) < len(choices):
        raise InputError(
            f"{example.where}: two choices begin with the same token, so no single one tells them "
            "apart; name the choices by different words (a, b, ...)"
        )
    ids = prompt + choices[0][:shared] or _start(example, tokenizer)
    answer = example.choices.index(example.answers[0])
    return Question(example, ids[-limit:], words, answer, len(ids) > limit)


def _start(example: Example, tokenizer: Any) -> list[int]:
    from deltaloom.engine.forward import start_token

    start = start_token(tokenizer)
    if start is None:
        raise InputError(
            f"{example.where}: the prompt is empty, and the tokenizer has neither a BOS nor an EOS "
            "token to stand before the choices"
        )
    return [start]


class LabelWords:
    """f(x) = the logits of x's label words less their mean, which no softmax over them sees.

    The outputs of a batch are (b, C) for at most C choices, 0 where a row has fewer. Two choices
    have one output, half the second's logit less half the first's: the other is its negative.
    """

    def __init__(self, model: Any, width: int, pad_id: int) -> None:
        from deltaloom.engine.forward import accepts_kept_logits, device_of

        self.model, self.width, self.pad_id = model, width, pad_id
        self.device = device_of(model)
        self.keeps = accepts_kept_logits(model)
        self.forward_tokens = self.backward_tokens = 0

    @property
    def outputs(self) -> int:
        """k: scalar functions of a row."""
        return 1 if self.width == 2 else self.width

    def batches(
        self, asked: Sequence[Question], most: int | None = None
    ) -> list[tuple[list[int], dict[str, Any]]]:
        """Numbers of the questions and their tensors, batch by batch of at most `most` rows,
        longest first."""
        from deltaloom.engine.forward import TOKENS_PER_BATCH, budgeted

        lengths = [len(one.ids) for one in asked]
        order = sorted(range(len(asked)), key=lambda i: (-lengths[i], i))
        tokens = TOKENS_PER_BATCH["cpu" if self.device.type == "cpu" else "other"]
        found = []
        for wide in budgeted([lengths[i] for i in order], tokens):
            for start in range(0, len(wide), most or len(wide)):
                numbers = [order[k] for k in wide[start : start + (most or len(wide))]]
                found.append((numbers, self._batch([asked[i] for i in numbers])))
        return found

    def _batch(self, asked: Sequence[Question]) -> dict[str, Tensor]:
        import torch

        width = max(len(one.ids) for one in asked)
        ids = torch.full((len(asked), width), self.pad_id)  # (b, T)
        words = torch.full((len(asked), self.width), -1)  # (b, C)
        for line, own, one in zip(ids, words, asked, strict=True):
            line[: len(one.ids)] = torch.tensor(one.ids)
            own[: len(one.words)] = torch.tensor(one.words)
        lengths = torch.tensor([len(one.ids) for one in asked])  # (b,)
        attention = (torch.arange(width) < lengths[:, None]).long()
        found = {"input_ids": ids, "attention_mask": attention, "at": lengths - 1, "words": words}
        return {name: value.to(self.device) for name, value in found.items()}

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """The outputs (b, k) of a batch, differentiable."""
        import torch

        tokens = int(batch["attention_mask"].sum())
        self.forward_tokens += tokens
        if torch.is_grad_enabled():
            self.backward_tokens += tokens * self.outputs
        real = batch["words"] >= 0  # (b, C)
        logits = self._logits(batch).gather(1, batch["words"].clamp(min=0))
        logits = torch.where(real, logits, 0.0)
        centred = torch.where(real, logits - logits.sum(1, True) / real.sum(1, True), 0.0)
        return centred[:, 1:] if self.width == 2 else centred

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        """(b, V) after each row's last token."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        at = batch["at"]  # (b,)
        if self.keeps:
            kept, at = at.unique(return_inverse=True)
            # Counted from the end, because prompt tuning puts virtual tokens in front.
            inputs["logits_to_keep"] = kept - inputs["input_ids"].shape[1]
        else:
            at = at - inputs["input_ids"].shape[1]
        logits = self.model(**inputs, use_cache=False).logits  # (b, T or kept, V)
        return logits[range(len(at)), at.to(logits.device)]

    def scores(self, outputs: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, C) from the outputs (n, k); the largest is the prediction."""
        import numpy as np

        return np.concatenate([-outputs, outputs], 1) if self.width == 2 else outputs

    def goals(self, asked: Sequence[Question]) -> NDArray[np.float64]:
        """What the outputs (n, k) are trained to: 1 at the answer and 0 elsewhere, centred; NaN
        where a row has no such choice."""
        import numpy as np

        goal = np.full((len(asked), self.width), np.nan)
        for row, one in zip(goal, asked, strict=True):
            row[: len(one.words)] = -1 / len(one.words)
            row[one.answer] += 1
        return goal[:, 1:] if self.width == 2 else goal

    def right(self, outputs: NDArray[np.float64], asked: Sequence[Question]) -> dict[str, float]:
        """1 by row id where the answer's score is the largest, the first of equals."""
        return {
            one.example.id: float(row[: len(one.words)].argmax() == one.answer)
            for one, row in zip(asked, self.scores(outputs), strict=True)
        }
