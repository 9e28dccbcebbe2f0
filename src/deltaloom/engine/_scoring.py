"""Reading log-probabilities off passes: rows alone, or going on from a shared beginning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deltaloom.engine import forward
from deltaloom.engine.forward import Masked
from deltaloom.engine.prefixes import Family, cache_name, is_plain, selected


@dataclass(frozen=True, slots=True)
class Cells:
    """What to read from a batch: at `rows`, `positions` the log-probability of `targets`, (m,)."""

    rows: NDArray[Any]
    positions: NDArray[Any]
    targets: NDArray[Any]

    def where(self, chosen: NDArray[np.bool_]) -> Cells:
        """The chosen cells."""
        return Cells(self.rows[chosen], self.positions[chosen], self.targets[chosen])

    def of_rows(self, first: int, end: int) -> Cells:
        """The cells of the rows `first` to `end`; cells come sorted by row."""
        a, b = np.searchsorted(self.rows, [first, end])
        return Cells(self.rows[a:b] - first, self.positions[a:b], self.targets[a:b])


@dataclass(frozen=True, slots=True)
class Jobs:
    """What is to be read from the pass of every sequence that is computed."""

    sequences: Sequence[Masked]
    needed: Sequence[NDArray[np.int64]]
    guests: Mapping[int, list[int]]

    def served(self, chosen: Sequence[int]) -> int:
        """How many sequences the chosen ones answer."""
        return sum(len(self.guests[host]) for host in chosen)

    def cells(self, chosen: Sequence[int]) -> Cells:
        """The cells of a batch with one row for each chosen sequence, for it and its guests."""
        pairs = [(row, guest) for row, host in enumerate(chosen) for guest in self.guests[host]]
        return Cells(
            np.concatenate([np.full(len(self.needed[guest]), row) for row, guest in pairs]),
            np.concatenate([self.needed[guest] for _, guest in pairs]),
            np.concatenate(
                [np.asarray(self.sequences[guest][0])[self.needed[guest] + 1] for _, guest in pairs]
            ),
        )

    def give(
        self,
        results: list[NDArray[np.float32]],
        chosen: Sequence[int],
        values: NDArray[np.float32],
    ) -> None:
        """Put the values of `cells(chosen)` where they belong."""
        answered = [guest for host in chosen for guest in self.guests[host]]
        ends = np.cumsum([len(self.needed[guest]) for guest in answered])
        for guest, part in zip(answered, np.split(values, ends[:-1]), strict=True):
            results[guest] = part


def together(
    runner: Runner, batch: Sequence[Family], inputs: list[list[int]], jobs: Jobs, budget: int
) -> Iterator[tuple[list[int], NDArray[np.float32], int]]:
    """Members of a batch of families with their values and the tokens computed for them.

    The beginnings are computed once, padded on the left so that what follows is at its distance;
    then their members' own tokens, from copies of the beginnings' cache.
    """
    beginnings = [inputs[family.members[0]][: family.length] for family in batch]
    place = {member: row for row, family in enumerate(batch) for member in family.members}
    members = list(place)
    width = max(map(len, beginnings))
    tails = [inputs[i][batch[place[i]].length :] for i in members]
    cells = jobs.cells(members)
    lengths = np.array([batch[place[i]].length for i in members])[cells.rows]
    early = cells.positions < lengths
    values = np.zeros(len(early), np.float32)
    rows = np.array([place[i] for i in members])[cells.rows]
    first = Cells(rows, cells.positions + (width - lengths), cells.targets).where(early)
    if len(batch) > 1 and runner.too_many(len(batch), first, width):
        for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            yield from together(runner, half, inputs, jobs, budget)
        return
    values[early], cache = runner.begin(beginnings, first)
    if not is_plain(cache):
        for part in forward.budgeted([len(inputs[i]) for i in members], budget):
            own = [members[k] for k in part]
            yield own, runner.score([inputs[i] for i in own], jobs.cells(own)), width * len(own)
        return
    # Keys and values of a tail batch are copied, so their memory is bounded as well.
    sizes = [width + len(tail) for tail in tails]
    computed = sum(map(len, beginnings))
    parts = [*forward.budgeted(sizes, 2 * budget)][::-1]
    while parts:
        part = parts.pop()
        inside = np.isin(cells.rows, part)
        late = inside & ~early
        own = Cells(cells.rows - part[0], cells.positions - lengths, cells.targets).where(late)
        if len(part) > 1 and runner.too_many(len(part), own, max(len(tails[k]) for k in part)):
            parts += [part[len(part) // 2 :], part[: len(part) // 2]]
            continue
        starts = [batch[place[members[k]]].length for k in part]
        at = [place[members[k]] for k in part]
        values[late] = runner.go_on([tails[k] for k in part], starts, at, cache, width, own)
        computed += sum(len(tails[k]) for k in part)
        yield [members[k] for k in part], values[inside], computed
        computed = 0


class Runner:
    """One model, asked what it can do once."""

    def __init__(self, model: Any, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id
        self.device = forward.device_of(model)
        self.keeps = forward.accepts_kept_logits(model)
        self.options = {"use_cache": False} if "use_cache" in forward.accepted(model) else {}
        self.vocabulary = int(model.config.get_text_config().vocab_size)

    def score(self, rows: Sequence[Sequence[int]], cells: Cells) -> NDArray[np.float32]:
        """Log-probabilities `(m,)` of the cells; halves a batch that has too many logits."""
        kept = np.unique(cells.positions)
        if len(rows) > 1 and self.too_many(len(rows), cells, max(map(len, rows))):
            half = len(rows) // 2
            parts = ((0, half), (half, len(rows)))
            return np.concatenate([self.score(rows[a:b], cells.of_rows(a, b)) for a, b in parts])
        with torch.inference_mode():
            return log_softmax_at(self._logits(rows, kept), kept, cells)

    def too_many(self, rows: int, cells: Cells, width: int) -> bool:
        """Whether a batch would give more logits than are held at once; a model that cannot keep
        some alone gives those of its whole `width`.
        """
        columns = len(np.unique(cells.positions)) if self.keeps else width
        return rows * columns * self.vocabulary > forward.LOGITS_PER_BATCH

    def begin(self, rows: Sequence[Sequence[int]], cells: Cells) -> tuple[NDArray[np.float32], Any]:
        """Log-probabilities of the cells, counted from the left of the padding, and the cache."""
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad_id)  # (b, W)
        attention = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            attention[i, width - len(row) :] = 1
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        return self._cached(ids, attention, positions, None, cells)

    def go_on(
        self,
        rows: Sequence[Sequence[int]],
        starts: Sequence[int],
        at: Sequence[int],
        cache: Any,
        width: int,
        cells: Cells,
    ) -> NDArray[np.float32]:
        """Log-probabilities of the cells of `rows`, which go on from the cache's rows `at`."""
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.pad_id)  # (b, T)
        attention = torch.zeros(len(rows), width + longest, dtype=torch.long)
        positions = torch.zeros_like(ids)
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            ids[i, : len(row)] = torch.tensor(row)
            attention[i, width - start : width + len(row)] = 1
            positions[i] = start + torch.arange(longest)
        positions.clamp_(max=forward.context_length(self.model) - 1)  # of padding alone
        own = selected(cache, torch.tensor(at, device=self.device))
        return self._cached(ids, attention, positions, own, cells)[0]

    def _cached(
        self,
        ids: torch.Tensor,
        attention: torch.Tensor,
        positions: torch.Tensor,
        cache: Any,
        cells: Cells,
    ) -> tuple[NDArray[np.float32], Any]:
        kept = np.unique(cells.positions)
        if not len(kept):  # nothing is scored here, and some column must be asked for
            kept = np.array([ids.shape[1] - 1])
        given = {
            "input_ids": ids.to(self.device),
            "attention_mask": attention.to(self.device),
            "position_ids": positions.to(self.device),
            "use_cache": True,
            **({cache_name(self.model): cache} if cache is not None else {}),
        }
        columns = torch.from_numpy(kept).to(self.device)
        with torch.inference_mode():
            if self.keeps:
                output = self.model(**given, logits_to_keep=columns)
                logits = output.logits
            else:
                output = self.model(**given)
                logits = output.logits[:, columns.to(output.logits.device)]
            made = getattr(output, "cache", None)
            made = getattr(output, "past_key_values", None) if made is None else made
            if not len(cells.positions):
                return np.zeros(0, np.float32), made
            return log_softmax_at(logits, kept, cells), made

    def _logits(self, rows: Sequence[Sequence[int]], kept: NDArray[Any]) -> torch.Tensor:
        """Logits `(b, k, V)` at the positions `kept` of every row."""
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad_id)  # (b, T)
        attention = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            attention[i, : len(row)] = 1
        inputs = {
            "input_ids": ids.to(self.device),
            "attention_mask": attention.to(self.device),
            **self.options,
        }
        # Counted from the end, because prompt tuning puts virtual tokens in front.
        at = torch.from_numpy(kept - width).to(self.device)
        if self.keeps:
            return self.model(**inputs, logits_to_keep=at).logits
        logits = self.model(**inputs).logits
        return logits[:, at.to(logits.device)]


def log_softmax_at(logits: torch.Tensor, kept: NDArray[Any], cells: Cells) -> NDArray[np.float32]:
    """`log softmax(logits)[target]` of every cell `(m,)`, a block of cells at a time."""
    vocabulary = logits.shape[-1]
    flat = logits.reshape(-1, vocabulary)  # (b * k, V)
    index = cells.rows * len(kept) + np.searchsorted(kept, cells.positions)
    at = torch.from_numpy(index).to(logits.device)
    targets = torch.from_numpy(cells.targets).to(logits.device)
    size = max(1, forward.LOGITS_PER_BLOCK // vocabulary)
    values = []
    for start in range(0, len(at), size):
        part = slice(start, start + size)
        block = flat[at[part]].float()  # (size, V)
        chosen = block.gather(1, targets[part, None])[:, 0]
        values.append(chosen - block.logsumexp(1))
    return torch.cat(values).cpu().numpy()
