"""What every measurement asks of its rows, and the one way it goes through scored sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deltaloom.core.encoding import encode_prompt
from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.examples import Example, Examples
from deltaloom.core.progress import progress
from deltaloom.core.run import Run

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from deltaloom.engine.forward import Masked


def require_rows(data: Examples, measure: str) -> None:
    """Raise InputError when there is nothing to measure on."""
    if not len(data):
        raise InputError(f"measure {measure}: {data.name} holds no rows")


def clusters_of(data: Examples) -> dict[str, str] | None:
    """Cluster by id, when every row has a `cluster` and the clusters say something.

    One for all rows names the data set, and one for each row names the row: neither tells which
    rows belong together.
    """
    found = {item.id: item.cluster for item in data if item.cluster is not None}
    return found if len(found) == len(data) and 1 < len({*found.values()}) < len(data) else None


def accepted_answers(example: Example) -> tuple[str, ...]:
    """Accepted answers of a row, at least one; raises InputError when it has none."""
    if example.answers:
        return example.answers
    if example.completion is not None:
        return (example.completion,)
    if example.messages is not None and example.messages[-1]["role"] == "assistant":
        return (example.messages[-1]["content"],)
    raise InputError(f"{example.where}: has no 'answer' to compare with")


def prompt_ids(example: Example, tokenizer: Any) -> list[int]:
    """Tokens to generate from; raises InputError when there is none to begin with."""
    ids = encode_prompt(example, tokenizer)
    if ids:
        return ids
    from deltaloom.engine.forward import start_token

    start = start_token(tokenizer)
    if start is None:
        raise InputError(
            f"{example.where}: the prompt is empty, and the tokenizer has neither a BOS nor an EOS "
            "token to begin from"
        )
    return [start]


def length_limit(max_length: int | None, model: Any) -> int:
    """Tokens a row may have; raises InputError for more than the model's context."""
    from deltaloom.engine.forward import context_length

    context = context_length(model)
    if max_length is not None and max_length > context:
        raise InputError(f"max_length = {max_length}: the model's context is {context} tokens")
    return max_length or context


def scored(
    label: str, model: Any, tokenizer: Any, sequences: Sequence[Masked], run: Run
) -> tuple[list[NDArray[np.float32]], dict[str, float]]:
    """`token_logprobs` with progress on stderr; also what it cost, entered in the run's ledger."""
    from deltaloom.engine.forward import padding_token, token_logprobs
    from deltaloom.engine.meter import count_forward

    tokens = 0
    with progress(label, len(sequences)) as advance:

        def account(answered: int, computed: int) -> None:
            nonlocal tokens
            tokens += computed
            advance(answered)

        model.eval()
        values = token_logprobs(model, sequences, padding_token(tokenizer), on_batch=account)
    return values, count_forward(run, model, tokens)


def note(run: Run, **counts: int) -> None:
    """Note counts in the run's record, under the name of its part if `run` is a part."""
    prefix = "" if run.folder == run.home else f"{run.folder.name}."
    run.note(**{f"{prefix}{name}": count for name, count in counts.items()})


def require_finite(values: NDArray[np.float32], example: Example) -> None:
    """Raise WorkError naming the row when a log-probability is NaN or infinite."""
    import numpy as np

    wrong = values[~np.isfinite(values)]
    if len(wrong):
        raise WorkError(
            f"{example.where}: the model gives row {example.id!r} a log-probability of {wrong[0]}; "
            "its weights may be damaged, or load it with dtype=float32"
        )
