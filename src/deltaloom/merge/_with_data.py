"""What mergers with data share: one file of statistics per model, then a streaming merge.

Each specialist is loaded whole, one at a time, and run over its own rows; the file of its
statistics in the run's scratch is what an interrupted run need not do again. Statistics are stored
under the base's tensor names, so the merge reads weights and statistics side by side.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from deltaloom.core.errors import InputError
from deltaloom.merge._streaming import Streamed, folders_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltaloom.core.base import Base
    from deltaloom.core.delta import Delta
    from deltaloom.core.encoding import Encoded
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run
    from deltaloom.merge._rule import Rule


@dataclass(frozen=True)
class Specialist:
    """One loaded model with its rows."""

    model: Any
    rows: list[Encoded]
    pad_id: int
    names: Mapping[str, str]
    """The base's tensor -> the parameter of the loaded model that it is."""
    advance: Callable[[int, int], None]
    """Takes rows and tokens of each batch done."""


@dataclass(frozen=True)
class Statistics:
    """What one model's data say of it."""

    tensors: dict[str, Tensor]
    about: dict[str, Any]
    """JSON beside them."""


class WithData(Streamed):
    """A merger that weighs models by what they do on rows. Subclasses are final."""

    needs = frozenset({"deltas", "data"})

    max_length: int | None = Field(None, ge=2)
    """Tokens a row may have; longer ones are cut. The model's context when not given."""

    @abstractmethod
    def statistics(self, specialist: Specialist, seed: int, run: Run) -> Statistics:
        """What the rule needs to know of one model; `seed` differs between models."""

    @abstractmethod
    def rule(self, files: Sequence[Path]) -> Rule:
        """The rule that merges by the statistics in `files`, one per model."""

    def merge(
        self, base: Base, deltas: list[Delta], run: Run, *, data: Sequence[Examples] = ()
    ) -> Delta:
        """Write the merged model to `run.folder` and return it as a change over `base`.

        `data` has the rows of each delta, in their order. Raises InputError for another number of
        them, rows without anything to learn, or deltas that do not fit the base.
        """
        from deltaloom.core.encoding import encode
        from deltaloom.core.tensors import TensorFolder
        from deltaloom.engine.forward import padding_token
        from deltaloom.merge._sources import open_source

        if len(data) != len(deltas):
            raise InputError(
                f"data has {len(data)} inputs for {len(deltas)} deltas; give one for each, in "
                "their order"
            )
        folders = folders_of(deltas, run.work)
        stored = TensorFolder(base.folder)
        for folder in folders:
            open_source(folder).check(stored)
        tokenizer = base.tokenizer()
        limit = min(self.max_length or base.max_length, base.max_length)
        rows = [encode(one, tokenizer, limit) for one in data]
        run.note(tokens=[sum(len(row.input_ids) for row in own) for own in rows])
        pad_id = padding_token(tokenizer)
        files = [run.work / f"statistics-{i}.safetensors" for i in range(len(deltas))]
        for i, file in enumerate(files):
            if not file.exists():
                seed = run.seed * len(files) + i
                self._measure(deltas[i], rows[i], pad_id, seed, file, run)
        return self.publish(base, folders, self.rule(files), run)

    def _measure(
        self, delta: Delta, rows: list[Encoded], pad_id: int, seed: int, file: Path, run: Run
    ) -> None:
        """Load one specialist, and write the file of its statistics."""
        from safetensors.torch import save_file

        from deltaloom.core.atomic import new_file
        from deltaloom.core.deltas.dense import Dense
        from deltaloom.core.progress import progress

        # Adapters are added to the weights, so that modules and parameters are the base's own.
        whole = delta if isinstance(delta, Dense) else Dense(delta.base, ((1.0, delta),))
        model = whole.apply(delta.base)
        with progress(f"{file.stem}, rows", len(rows)) as advance:

            def on_batch(done: int, _: int) -> None:
                advance(done)

            known = names_of(model, delta.base.folder)
            found = self.statistics(Specialist(model, rows, pad_id, known, on_batch), seed, run)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in found.tensors.items()}
        about = {"about": json.dumps(found.about)}
        with new_file(file) as temporary:
            save_file(tensors, temporary, metadata=about)


def names_of(model: nn.Module, folder: Path) -> dict[str, str]:
    """Stored tensor -> parameter of the loaded model, which may be known by another name: under a
    prefix that the file lacks, or as the tensor that it is tied to. Others are left out.
    """
    from deltaloom.core.tensors import TensorFolder

    first = {id(parameter): name for name, parameter in model.named_parameters()}
    state = model.state_dict(keep_vars=True)
    prefix = getattr(model, "base_model_prefix", "")
    found = {}
    for name in TensorFolder(folder):
        own = state.get(name, state.get(f"{prefix}.{name}"))
        if own is not None and id(own) in first:
            found[name] = first[id(own)]
    return found
