"""Whether answers come from the context: recall of what stands in it, and attention to it.

Paper: Wang, Bai, Peng and Hsieh 2024, "On the Loss of Context Awareness in General Instruction
Fine-tuning" (arXiv 2411.02688), the needle test (Kamradt 2023), the attention to the user's tokens
and steering to them (after PASTA, Zhang et al. 2023, arXiv 2311.02262).

Formula: an item is the share of an accepted answer's words (the needle's `keywords`) that are among
the greedy output's, the best over accepted answers; `match: contains` is 1 where the answer's words
stand in a row in it. Words are compared as SQuAD does. Steering:
Att'(x, y) = Att(x, y) / Z for keys y of the user, alpha Att(x, y) / Z for all others, the
generated ones too, in every layer and head.

`attention.json` in the run's folder holds, with the accepted answer as the response: `heads`, each
layer's and head's mean share of attention on the user's tokens; `share`, an Estimate of the mean
over all of them; and `dependency`, an Estimate of the score that `tune conditional` goes by, in
`layer`. `generations.jsonl` holds the outputs. **Measure a model before and after tuning, and with
and without `indicator`, `alpha` and `chat`**, and compare the runs.

Differs: the official steering changes one mask in place, so that alpha becomes alpha^(l+1) in
layer l, and leaves generated tokens as they are; here it is as the paper writes it. The question
follows the haystack after an empty line; the paper averages four templates. Haystacks of one length
share their filler and are a cluster.

Not covered: needles of several parts, and the paper's benchmarks (SQuAD, QuAC, DROP), which are
ordinary rows here. With answers of one token the attention score says nothing (it is near 1 for
any row); `one_token_answers` in the run's notes counts them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, final

from pydantic import Field, model_validator

from deltaloom.core.atomic import write_json, write_text
from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Estimate
from deltaloom.core.examples import Example, Examples
from deltaloom.core.method import Measurer, Sizes, Work
from deltaloom.core.progress import progress
from deltaloom.core.run import Run
from deltaloom.core.turns import last_asked, mark, prompt_mask, with_indicator
from deltaloom.measure._items import accepted_answers, clusters_of, note, prompt_ids, require_rows
from deltaloom.measure._needle import hidden
from deltaloom.measure.answer import normalised

if TYPE_CHECKING:
    from deltaloom.engine.generate import Generated

Count = Annotated[int, Field(ge=1)]


@final
class Context(Measurer):
    """Recall from the context, and the attention given to the user's tokens."""

    needle: str | None = None
    """A sentence to hide in the tasks' texts, which are then only filler; None asks the tasks'
    rows as they are. The paper's: "The best thing to do in San Francisco is eat a sandwich and sit
    in Dolores Park on a sunny day."."""
    question: str = "What is the best thing to do in San Francisco?"
    """What is asked about the needle (Kamradt's)."""
    keywords: list[str] = []
    """Words of the needle that an answer must have (the paper: eat, sandwich, sit, dolores, park,
    sunny, day)."""
    lengths: Count = 20
    """Lengths of haystacks, evenly spaced (the paper: 20)."""
    depths: Count = 20
    """Depths of the needle in each, evenly spaced from start to end (the paper: 20)."""
    shortest: Count = 200
    """Tokens of the shortest haystack (the paper: 200)."""
    longest: Count | None = None
    """Tokens of the longest haystack; None takes what the model's context has room for."""
    match: Literal["recall", "contains"] = "recall"
    """The share of the answer's words (the paper's needle test), or whether the whole answer is
    contained (its question answering)."""
    chat: bool = False
    """Ask rows with a `prompt` as a user's message through the chat template."""
    indicator: str = ""
    """Text put after the user's last turn: the one that `tune conditional` was given."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Steering: the weight of keys that are not the user's; 1 is none (the paper: 0.95)."""
    attention: bool = True
    """Whether to read the attention on the user's tokens, by one more pass with eager attention."""
    layer: Annotated[int, Field(ge=0)] | None = None
    """Block whose score `dependency` is, from 0; None takes the paper's 15 of 22 in proportion."""
    max_new_tokens: Count = 100
    """Tokens generated at most (the official code: 100)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.needle is None) != (not self.keywords):
            raise ValueError("'needle' and 'keywords' go together: give both or neither")
        if not all(normalised(word) for word in self.keywords):
            raise ValueError("'keywords' holds a word of which normalisation leaves nothing")
        return self

    def work(self, sizes: Sizes) -> Work:
        """Every row and what is generated, and every row once more for the attention."""
        rows, width = sizes.rows, sizes.row_tokens
        if self.needle is not None:
            rows = self.lengths * self.depths
            width = (self.shortest + (self.longest or self.shortest)) / 2
        tokens = rows * (width * (1 + self.attention) + self.max_new_tokens)
        return Work(forward_tokens=tokens, memory_bytes=sizes.weight_bytes)

    def measure(self, model: Any, tokenizer: Any, data: Examples, run: Run) -> Estimate:
        """Ask every row, or every needle; items are recalls in [0, 1].

        Raises InputError for no rows, a row without prompt or answer, haystacks that do not fit the
        context, a `layer` the model does not have, and a model that cannot be steered or whose
        attention cannot be read.
        """
        from deltaloom.engine.meter import count_forward

        require_rows(data, "context")
        model.eval()
        rows = self._haystacks(model, tokenizer, data) if self.needle is not None else data
        accepted = [accepted_answers(example) for example in rows]
        asked = [self._asked(example) for example in rows]
        found = self._answers(model, tokenizer, asked)
        tokens = sum(one.forward_tokens for one in found)
        items = {
            example.id: self._grade(example, answers, one.text)
            for example, answers, one in zip(rows, accepted, found, strict=True)
        }
        note(run, truncated_rows=sum(one.cut for one in found))
        _keep(run, rows, accepted, found, items)
        if self.attention:
            tokens += self._attention(model, tokenizer, asked, accepted, run)
        return Estimate.from_items(
            items,
            metric="context_recall" if self.match == "recall" else "context_contains",
            clusters=clusters_of(rows),
            cost=count_forward(run, model, tokens),
        )

    def _haystacks(self, model: Any, tokenizer: Any, data: Examples) -> Examples:
        from deltaloom.engine.forward import context_length

        def count(text: str) -> int:
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])

        around = hidden(str(self.needle), self.question, data, [1], 1, count)[0]
        overhead = len(prompt_ids(self._asked(around), tokenizer))
        room = context_length(model) - self.max_new_tokens - overhead
        longest = self.longest or room
        if not self.shortest <= longest <= room:
            raise InputError(
                f"haystacks of {self.shortest} to {longest} tokens: the context has room for "
                f"{room} beside needle, question and max_new_tokens; set shortest and longest"
            )
        step = (longest - self.shortest) / max(self.lengths - 1, 1)
        lengths = sorted({round(self.shortest + k * step) for k in range(self.lengths)})
        return hidden(str(self.needle), self.question, data, lengths, self.depths, count)

    def _asked(self, example: Example) -> Example:
        """The row without its response, as it is put to the model."""
        if self.chat and example.messages is None and example.prompt is not None:
            turn = {"role": "user", "content": example.prompt}
            example = replace(example, messages=(turn,), prompt=None)
        if self.indicator:
            example = with_indicator(example, last_asked(example), self.indicator)
        return example

    def _answers(self, model: Any, tokenizer: Any, asked: Sequence[Example]) -> list[Generated]:
        from deltaloom.engine.attention import steered
        from deltaloom.engine.generate import generate_greedily

        prompts = [prompt_ids(example, tokenizer) for example in asked]
        user = [
            prompt_mask(example, ids, tokenizer) if self.alpha < 1 else []
            for example, ids in zip(asked, prompts, strict=True)
        ]

        def within(chosen: list[int], lengths: list[int]) -> AbstractContextManager[None]:
            width = max(lengths)
            rows = [[0] * (width - n) + user[i][-n:] for i, n in zip(chosen, lengths, strict=True)]
            return steered(model, rows, self.alpha)

        with progress("context", len(prompts)) as advance:
            return generate_greedily(
                model,
                tokenizer,
                prompts,
                self.max_new_tokens,
                on_batch=advance,
                within=within if self.alpha < 1 else None,
            )

    def _grade(self, example: Example, answers: Sequence[str], output: str) -> float:
        said = normalised(output).split()
        grades = []
        for answer in [" ".join(self.keywords)] if self.needle is not None else answers:
            words = normalised(answer).split()
            if not words:
                raise InputError(f"{example.where}: nothing is left of the answer's words")
            if self.match == "recall":
                grades.append(len({*words} & {*said}) / len({*words}))
            else:
                grades.append(float(f" {' '.join(words)} " in f" {' '.join(said)} "))
        return max(grades)

    def _attention(
        self,
        model: Any,
        tokenizer: Any,
        asked: Sequence[Example],
        accepted: Sequence[Sequence[str]],
        run: Run,
    ) -> int:
        """Write `attention.json`; returns the tokens it took."""
        import numpy as np

        from deltaloom.engine.attention import Watched, middle_layer, user_shares
        from deltaloom.engine.forward import context_length, padding_token

        layer, depth = self.layer, model.config.get_text_config().num_hidden_layers
        layer = middle_layer(depth) if layer is None else layer
        if layer >= depth:
            raise InputError(f"layer = {layer}: the model has blocks 0 to {depth - 1}")
        answered = [_with_answer(row, one[0]) for row, one in zip(asked, accepted, strict=True)]
        marked = mark(answered, tokenizer, context_length(model))
        rows = [Watched(one.row.input_ids, one.user, [one.turns[-1].tokens]) for one in marked]
        with progress("attention", len(rows)) as advance:
            found = user_shares(
                model,
                rows,
                padding_token(tokenizer),
                alpha=self.alpha,
                on_batch=lambda done, _: advance(done),
            )
        heads = np.mean([shares.heads for (shares,) in found], axis=0)  # (layers, heads)
        ids = [one.row.id for one in marked]
        read = {
            "share": [float(shares.heads.mean()) for (shares,) in found],
            "dependency": [float(shares.dependency[layer]) for (shares,) in found],
        }
        estimates = {
            name: Estimate.from_items(
                dict(zip(ids, values, strict=True)),
                metric=f"user_attention_{name}",
                clusters=clusters_of(Examples(asked)),
            ).to_json()
            for name, values in read.items()
        }
        about = {"layer": layer, "heads": np.round(heads.astype(float), 6).tolist()}
        write_json(run.folder / "attention.json", {**about, **estimates})
        note(run, one_token_answers=sum(len(row.groups[0]) == 1 for row in rows))
        return sum(len(row.ids) for row in rows)


def _with_answer(asked: Example, answer: str) -> Example:
    """The row with `answer` as its response."""
    if asked.messages is None:
        return replace(asked, completion=answer)
    turns = list(asked.messages)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    return replace(asked, messages=(*turns, {"role": "assistant", "content": answer}))


def _keep(
    run: Run,
    rows: Examples,
    accepted: Sequence[Sequence[str]],
    found: Sequence[Generated],
    items: dict[str, float],
) -> None:
    lines = []
    for example, answers, one in zip(rows, accepted, found, strict=True):
        row = {
            "id": example.id,
            "output": one.text,
            "answers": list(answers),
            "grade": items[example.id],
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(run.folder / "generations.jsonl", "".join(lines))
