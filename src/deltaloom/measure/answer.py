"""Share of questions whose greedily generated answer matches an accepted one.

Paper: SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250), exact match of its official script, for
`normalised`; the other rules are the conventions of lm-eval (`generate_until`).

Formula: an item is `max_a match(output, a)` over the accepted answers a, in {0, 1}.
`exact`: equal but for outer whitespace. `normalised`: equal after SQuAD's normalisation (lower
case, ASCII punctuation removed, then the articles a, an, the, then repeated whitespace).
`contains`: the normalised answer's words stand in a row in the normalised output. `regex`:
`pattern` is searched in the output and in the answer, its first group (else the whole match) is
compared; equal texts match, and so do equal numbers (`1,000` and `1000.0`). An output without a
match is wrong; an answer without one is compared whole. Rows come in clusters when all have a
`cluster` (at least two, fewer than rows).

The texts are kept in `generations.jsonl` in the run's folder (id, end of the prompt, output,
answers, correct), written whole when all are there. **Each measurement needs a run folder of its
own** (`Run.part`): where several models or tasks share one, the file holds the last. A repeated
or resumed measurement replaces the file by the same bytes.

Differs: SQuAD's script knows no `contains` and no F1 is given here; lm-eval ends at a blank line
by default, here only `stop` says so. Generation is greedy and sets the model's own sampling
settings aside.

Not covered: sampled answers, F1, and symbolic equality (`1/2` and `0.5` differ).
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, Literal, Self, final

from pydantic import Field, model_validator

from deltaloom.core.atomic import write_text
from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Estimate
from deltaloom.core.examples import Example, Examples
from deltaloom.core.method import Measurer, Sizes, Work
from deltaloom.core.progress import progress
from deltaloom.core.run import Run
from deltaloom.measure._items import (
    accepted_answers,
    clusters_of,
    note,
    prompt_ids,
    require_rows,
)

if TYPE_CHECKING:
    from deltaloom.engine.generate import Generated

TAIL = 200
"""Characters of the prompt's end that are kept beside an output."""


@final
class Answer(Measurer):
    """Share of generated answers that match."""

    match: Literal["exact", "normalised", "contains", "regex"] = "normalised"
    """When an output is right; normalised is SQuAD's exact match."""
    pattern: str | None = None
    """Regular expression that finds the answer in the output; for `match: regex` only."""
    take: Literal["first", "last"] = "first"
    """Which match of the pattern counts. First is lm-eval's default (`group_select: 0`)."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Tokens generated at most. Ours, for short answers; lm-eval's default is 256."""
    stop: list[str] = []
    """Texts at which an output ends; they are not part of it. None by default (ours)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.match == "regex") != (self.pattern is not None):
            raise ValueError("'pattern' and 'match: regex' go together: give both or neither")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"pattern is no regular expression: {error}") from None
        if not all(self.stop):
            raise ValueError("'stop' holds an empty text")
        return self

    def work(self, sizes: Sizes) -> Work:
        """Every row and `max_new_tokens` after it; the key-value cache is not counted."""
        tokens = sizes.rows * (sizes.row_tokens + self.max_new_tokens)
        return Work(forward_tokens=tokens, memory_bytes=sizes.weight_bytes)

    def measure(self, model: Any, tokenizer: Any, data: Examples, run: Run) -> Estimate:
        """Generate an answer to every row of `data`; items are 1 (right) or 0.

        Raises InputError for no rows and for a row without prompt or accepted answer.
        """
        from deltaloom.engine.generate import generate_greedily
        from deltaloom.engine.meter import count_forward

        require_rows(data, "answer")
        accepted = [accepted_answers(example) for example in data]
        judges = [
            self._judge(example, answers) for example, answers in zip(data, accepted, strict=True)
        ]
        prompts = [prompt_ids(example, tokenizer) for example in data]
        model.eval()
        with progress("answer", len(data)) as advance:
            found = generate_greedily(
                model, tokenizer, prompts, self.max_new_tokens, self.stop, on_batch=advance
            )
        items = {
            example.id: float(judge(one.text))
            for example, judge, one in zip(data, judges, found, strict=True)
        }
        cost = count_forward(run, model, sum(one.forward_tokens for one in found))
        note(
            run,
            truncated_rows=sum(one.cut for one in found),
            unfinished_outputs=sum(not one.finished for one in found),
        )
        _keep(run, tokenizer, data, prompts, accepted, found, items)
        return Estimate.from_items(
            items, metric=f"{self.match}_match", clusters=clusters_of(data), cost=cost
        )

    def _judge(self, example: Example, answers: Sequence[str]) -> Callable[[str], bool]:
        """A function that tells whether an output is right."""
        if self.match == "exact":
            wanted = {answer.strip() for answer in answers}
            return lambda output: output.strip() in wanted
        if self.match == "regex":
            return lambda output: self._regex_match(output, answers)
        plain = [normalised(answer) for answer in answers]
        if not all(plain):
            raise InputError(
                f"{example.where}: nothing is left of answer {answers[plain.index('')]!r} after "
                f"normalisation; use match=exact"
            )
        if self.match == "contains":
            return lambda output: any(f" {a} " in f" {normalised(output)} " for a in plain)
        return lambda output: normalised(output) in plain

    def _regex_match(self, output: str, answers: Sequence[str]) -> bool:
        found = self._extract(output)
        if found is None:
            return False
        for answer in answers:
            inside = self._extract(answer)
            if _equal(found, answer if inside is None else inside):
                return True
        return False

    def _extract(self, text: str) -> str | None:
        found = list(re.finditer(self.pattern or "", text))
        if not found:
            return None
        chosen = found[0 if self.take == "first" else -1]
        return next((part for part in chosen.groups() if part is not None), chosen[0])


def normalised(text: str) -> str:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no articles, single spaces."""
    lower = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", lower).split())


def _equal(a: str, b: str) -> bool:
    a, b = a.strip(), b.strip()
    if a == b:
        return True
    try:
        return Decimal(a.replace(",", "")) == Decimal(b.replace(",", ""))
    except InvalidOperation:
        return False


def _keep(
    run: Run,
    tokenizer: Any,
    data: Examples,
    prompts: Sequence[list[int]],
    accepted: Sequence[tuple[str, ...]],
    found: Sequence[Generated],
    items: dict[str, float],
) -> None:
    lines = []
    for example, ids, answers, one in zip(data, prompts, accepted, found, strict=True):
        # A token is a character at least, but for the special ones that chat prompts end with.
        tail = tokenizer.decode(ids[-2 * TAIL :])[-TAIL:]
        row = {
            "id": example.id,
            "prompt_tail": tail,
            "output": one.text,
            "answers": list(answers),
            "correct": bool(items[example.id]),
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(run.folder / "generations.jsonl", "".join(lines))
