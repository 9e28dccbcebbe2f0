"""Weights of a mixture's sources: a small file that selectors write and that tuning reads.

`weights.json` is an object with one needed key, as a person would write it:

    {"weights": {"math": 3, "chat": 1}, "unit": "examples", "size": 4000, "repeats": 1}

`weights` are shares of an epoch, in any scale: of its rows (`unit` examples, the default) or of its
tokens (tokens). `size` is how many rows or tokens an epoch has; without it an epoch is as large as
it can be. `repeats` is how often a row may be in one epoch at most (1): whatever would need more is
refused, never done silently. `about` holds what a selector found out on the way (shares before,
effects with intervals, ratings), for reports.

An epoch drawn by `epoch` is exact: of every source the rows nearest to its share, by largest
remainder, or the tokens to within half a row; each row is in it equally often but for one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from deltaloom.core.atomic import write_json
from deltaloom.core.errors import InputError, suggest

if TYPE_CHECKING:
    from deltaloom.core.examples import Example, Examples

FILE = "weights.json"
SCHEMA = 1
KEYS = ("schema", "weights", "unit", "size", "repeats", "about")

Unit = Literal["examples", "tokens"]


@dataclass(frozen=True)
class SourceWeights:
    """Shares of the sources, which sum to 1, and how an epoch is drawn by them."""

    weights: Mapping[str, float]
    unit: Unit = "examples"
    size: int | None = None
    """Rows, or tokens, of an epoch; None is the most that `repeats` allows."""
    repeats: float = 1.0
    """How often a row may be in one epoch, at most."""
    about: Mapping[str, Any] = field(default_factory=dict)
    where: str = "the weights"
    """File, for messages."""

    def __post_init__(self) -> None:
        bad = [
            name
            for name, one in self.weights.items()
            if isinstance(one, bool) or not isinstance(one, int | float) or not 0 <= one < math.inf
        ]
        if bad:
            raise InputError(
                f"{self.where}: the weight of {bad[0]!r} is {self.weights[bad[0]]!r}; give a "
                "number of at least 0"
            )
        total = math.fsum(self.weights.values())
        if not total > 0:
            raise InputError(f"{self.where}: no source has a weight above 0; give one")
        if self.unit not in ("examples", "tokens"):
            raise InputError(f"{self.where}: unit = {self.unit!r}: must be examples or tokens")
        if self.size is not None and (not isinstance(self.size, int) or self.size < 1):
            raise InputError(f"{self.where}: size = {self.size!r}: must be a count of at least 1")
        if isinstance(self.repeats, bool) or not 1 <= self.repeats < math.inf:
            raise InputError(f"{self.where}: repeats = {self.repeats!r}: must be at least 1")
        shares = {name: float(one) / total for name, one in sorted(self.weights.items())}
        object.__setattr__(self, "weights", shares)

    @classmethod
    def read(cls, name: str | Path) -> Self:
        """A file, or the run folder of a selector that wrote one; raises InputError naming it."""
        path = Path(name).expanduser()
        path = path / FILE if path.is_dir() else path
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"{path}: no such file; name a {FILE} or a select step that weighs sources"
            ) from None
        except json.JSONDecodeError as error:
            raise InputError(f"{path} line {error.lineno}: not JSON ({error.msg})") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: does not read as text ({error})") from None
        if not isinstance(found, dict) or not isinstance(found.get("weights"), dict):
            raise InputError(
                f'{path}: must be an object with "weights", which maps sources to numbers'
            )
        unknown = sorted(found.keys() - {*KEYS})
        if unknown:
            raise InputError(f"{path}: unknown key {unknown[0]!r}{suggest(unknown[0], KEYS)}")
        if found.pop("schema", SCHEMA) != SCHEMA:
            raise InputError(f"{path}: this version reads schema {SCHEMA}")
        if not isinstance(found.get("repeats", 1), int | float):
            raise InputError(f"{path}: repeats = {found['repeats']!r}: must be a number")
        return cls(**found, where=str(path))

    def record(self) -> dict[str, Any]:
        """What the file holds."""
        return {
            "schema": SCHEMA,
            "unit": self.unit,
            "size": self.size,
            "repeats": self.repeats,
            "weights": dict(self.weights),
            "about": dict(self.about),
        }

    def write(self, folder: Path) -> None:
        """Write `weights.json` into `folder`."""
        write_json(folder / FILE, self.record())

    def within(self, amounts: Mapping[str, float]) -> Self:
        """The nearest weights that an epoch of `size` can have, of `amounts` rows or tokens.

        What a source is short of goes to the others in proportion to their weights. Raises
        InputError when all weighted sources together are too small.
        """
        if self.size is None:
            return self
        most = {name: self.repeats * amounts.get(name, 0) / self.size for name in self.weights}
        if math.fsum(most[name] for name, one in self.weights.items() if one) < 1 - 1e-9:
            raise InputError(
                f"{self.where}: an epoch of {self.size} {self.unit} is more than its sources have, "
                f"each at most {self.repeats:g} times; make size smaller or repeats larger"
            )
        shares = dict(self.weights)
        full: dict[str, float] = {}
        while over := [name for name in shares if shares[name] > most[name] + 1e-12]:
            full |= {name: most[name] for name in over}
            free = {n: one for n, one in self.weights.items() if n not in full}
            left, total = 1 - math.fsum(full.values()), math.fsum(free.values())
            shares = {n: one / total * left if total else 0.0 for n, one in free.items()}
        return replace(self, weights={**shares, **full})


def epoch(
    data: Examples, weights: SourceWeights, seed: int, lengths: Sequence[int] | None = None
) -> Examples:
    """One epoch of `data` by `weights`, in an order and a choice of rows that `seed` decides.

    `lengths` are the rows' tokens, needed where `weights.unit` is tokens. Copies of a row have
    ids of their own. Raises InputError for a source without a weight, a weighted source that the
    data lack, and an epoch that would repeat rows more often than `weights.repeats`.
    """
    import numpy as np

    rows = _by_source(data, weights)
    if weights.unit == "tokens" and lengths is None:
        raise InputError(f"{weights.where}: unit = tokens needs base=, whose tokenizer counts them")
    lengths = lengths if weights.unit == "tokens" else None
    amounts = {n: sum(lengths[i] for i in own) if lengths else len(own) for n, own in rows.items()}
    shares = {name: weights.weights[name] for name in rows if weights.weights[name] > 0}
    size = weights.size or math.floor(
        min(weights.repeats * amounts[name] / share for name, share in shares.items()) + 1e-9
    )
    quotas = _largest_remainder(shares, max(size, 1))
    for name, quota in quotas.items():
        _refuse_oversampling(name, quota, amounts[name], shares[name], weights)
    chosen: list[tuple[int, int]] = []
    for name, quota in quotas.items():
        # Its own stream, so that one source's rows do not depend on which others there are.
        rng = np.random.default_rng([seed, *name.encode()])
        order = [rows[name][k] for k in rng.permutation(len(rows[name]))]
        chosen += _taken(order, quota, lengths)
    if not chosen:
        raise InputError(f"{weights.where}: an epoch of {size} {weights.unit} has no row; size up")
    mixed = np.random.default_rng([seed, 1]).permutation(len(chosen))
    taken = {*data.ids}
    return type(data)((_copy(data[i], k, taken) for i, k in (chosen[m] for m in mixed)), data.name)


def _by_source(data: Examples, weights: SourceWeights) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for number, row in enumerate(data):
        rows.setdefault(row.source, []).append(number)
    for name in rows:
        if name not in weights.weights:
            raise InputError(
                f"{weights.where}: has no weight for the source {name!r}"
                f"{suggest(name, weights.weights)}; give it one, 0 to leave it out"
            )
    for name, weight in weights.weights.items():
        if weight > 0 and name not in rows:
            raise InputError(
                f"{weights.where}: {data.name} has no source {name!r}{suggest(name, rows)}"
            )
    return dict(sorted(rows.items()))


def _largest_remainder(shares: Mapping[str, float], size: int) -> dict[str, int]:
    """Whole numbers that sum to `size`, each within one of its share (Hamilton's method)."""
    exact = {name: size * share for name, share in shares.items()}
    whole = {name: math.floor(one + 1e-9) for name, one in exact.items()}
    rest = sorted(exact, key=lambda name: (whole[name] - exact[name], name))
    for name in rest[: size - sum(whole.values())]:
        whole[name] += 1
    return whole


def _refuse_oversampling(
    name: str, quota: int, amount: int, share: float, weights: SourceWeights
) -> None:
    if quota > math.ceil(weights.repeats * amount - 1e-9):
        fits = math.floor(weights.repeats * amount / share)
        raise InputError(
            f"{weights.where}: an epoch of {weights.size} {weights.unit} wants {quota} of "
            f"{name!r}, which has {amount}; make size at most {fits}, or allow repeats = "
            f"{quota / amount:.3g}"
        )


def _taken(
    order: Sequence[int], quota: int, lengths: Sequence[int] | None
) -> list[tuple[int, int]]:
    """Row numbers with the number of their copy, round after round, until the quota is met."""
    if lengths is None:
        return [(order[k % len(order)], k // len(order)) for k in range(quota)]
    found, spent, k = [], 0, 0
    while True:
        row = order[k % len(order)]
        # Nearest to the quota: a row more where that is not farther off.
        if spent + lengths[row] / 2 > quota:
            return found
        found.append((row, k // len(order)))
        spent, k = spent + lengths[row], k + 1


def _copy(row: Example, number: int, taken: set[str]) -> Example:
    """The row itself, or its copy of this number under an id that nothing else has."""
    if not number:
        return row
    identity = f"{row.id}-copy{number}"
    while identity in taken:
        identity += "+"
    taken.add(identity)
    return replace(row, id=identity)
