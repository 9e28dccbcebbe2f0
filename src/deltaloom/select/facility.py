"""Keep the rows that represent the pool: facility location and its kin on features.

Paper: Wei, Iyer & Bilmes 2015, "Submodularity in Data Subset Selection and Active Learning" (ICML);
Iyer et al. 2021, "Submodular Combinatorial Information Measures with Applications in Machine
Learning" (ALT) for flmi and flcg.

With s_ij the cosine of rows' features, a set A is chosen greedily to maximise
facility: sum_i max_{j in A} s_ij;
flmi: sum_i min(max_{j in A} s_ij, eta max_{q in target} s_iq), what pool and target share;
flcg: sum_i max(max_{j in A} s_ij - nu max_{p in given} s_ip, 0), what `given` leaves open;
graphcut: sum_i sum_{j in A} s_ij - redundancy sum_{i in A, j in A} s_ij;
logdet: log det(I + S_A / ridge), the volume that the rows span.
The function is flmi with a target, flcg with `given`, else facility, unless `function` names one.
The score of a row is the function's value of that row alone.

Differs: features are those stored in `features`, or else the base's last hidden states, averaged
over a row's tokens, less the pool's mean; negative cosines count as zero (but for logdet). Above
16,384 rows cosines are made when needed (`neighbours` keeps only the nearest), so memory grows with
the rows, not with their square.

Not covered: rows of unequal cost; a target or given rows for graphcut and logdet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, final

from pydantic import Field, field_validator, model_validator

from deltaloom.core.errors import InputError
from deltaloom.core.method import Selection, Sizes, Work
from deltaloom.core.places import PLACE
from deltaloom.select._budget import BudgetSelector
from deltaloom.select._inputs import absolute

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run
    from deltaloom.engine.similarity import Kernel
    from deltaloom.engine.submodular import Picks

DENSE_ROWS = 16384
"""Rows up to which all cosines are kept, 1 GiB."""
EXTRA = {"flmi": "target", "flcg": "given"}
"""What a function needs beside the pool; the others take nothing."""


@final
class Facility(BudgetSelector):
    """Representative rows."""

    function: Literal["facility", "flmi", "flcg", "graphcut", "logdet"] | None = None
    """What to maximise; null follows from what is given: flmi with target, flcg with given, else
    facility."""
    features: list[str] = []
    """Folders of stored features that have a row for each id of pool, target and given; the base's
    hidden states when left out."""
    given: Annotated[str | None, PLACE] = None
    """Rows that need no more like them: file, folder or dataset id."""
    neighbours: Annotated[int | None, Field(ge=1)] = None
    """Most similar rows kept for each row, others count as zero: less time and memory for large
    pools. Null keeps all."""
    eta: Annotated[float, Field(ge=0)] = 1.0
    """Of flmi: how far beyond the target's similarity a row's similarity counts (submodlib: 1)."""
    nu: Annotated[float, Field(ge=0)] = 1.0
    """Of flcg: how strictly what is given is left out (submodlib: 1)."""
    redundancy: Annotated[float, Field(ge=0)] = 0.5
    """Of graphcut: weight of similarities among the chosen rows; greedy's guarantee ends above 0.5
    (Iyer et al. 2021)."""
    ridge: Annotated[float, Field(gt=0)] = 1.0
    """Of logdet: added to each row's similarity with itself; smaller asks for more diversity
    (ours)."""
    greedy: Literal["lazy", "stochastic"] = "lazy"
    """lazy picks exactly what plain greedy picks, at least 1 - 1/e of the optimum; stochastic looks
    at a random part of the pool for each pick (1 - 1/e - eps in expectation)."""
    eps: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Of stochastic greedy: smaller looks at more rows (Mirzasoleiman et al. 2015: 0.1)."""

    @field_validator("features")
    @classmethod
    def _absolute_features(cls, value: list[str]) -> list[str]:
        return [absolute(name) for name in value]

    @model_validator(mode="after")
    def _functions_that_go_together(self) -> Facility:
        if self.function in ("graphcut", "logdet") and self.greedy == "stochastic":
            raise ValueError(f"greedy=stochastic is not for {self.function}, which is fast without")
        if self.function == "logdet" and self.neighbours is not None:
            raise ValueError("logdet needs all similarities; leave out neighbours=")
        return self

    def work(self, sizes: Sizes) -> Work:
        """One forward pass over every row, unless features are stored."""
        rows = sizes.rows + sizes.target_rows
        kept = min(self.neighbours or sizes.rows, sizes.rows, DENSE_ROWS)
        memory = 8.0 * sizes.rows * kept
        if self.features:
            return Work(memory_bytes=memory)
        return Work(
            forward_tokens=rows * sizes.row_tokens,
            memory_bytes=max(memory, sizes.weight_bytes),
        )

    def select(
        self, pool: Examples, run: Run, *, target: Examples | None, base: Base | None
    ) -> Selection:
        """Rows in order of choice; the scores cover the whole pool."""
        from deltaloom.core.examples import Examples
        from deltaloom.core.features import Features

        known = Examples.read(self.given) if self.given is not None else None
        others = {"target": target, "given": known}
        groups = {"pool": pool, **{name: rows for name, rows in others.items() if rows is not None}}
        function = self._resolved(groups)
        budget = self.reach(len(pool))
        units = self._units(groups, base, run)
        picks = self._picks(function, units, budget, run.seed)
        run.note(function=function, value=picks.value)
        chosen = self.take(pool, picks.indices, run, base)
        about = {"method": "facility", "function": function}
        scores = Features.from_scores(
            run.work / "scores",
            pool.ids,
            picks.alone,
            about={**about, **{name: rows.digest() for name, rows in groups.items()}},
            columns={"source": [row.source for row in pool]},
        )
        gains = dict(zip((pool.ids[int(i)] for i in picks.indices), picks.gains, strict=True))
        reasons = {row.id: f"adds {gains[row.id]:.4g} to {function}" for row in chosen}
        return Selection(chosen, scores, reasons)

    def _resolved(self, groups: dict[str, Examples]) -> str:
        """The function, checked against what there is for it."""
        extra = [name for name in EXTRA.values() if name in groups]
        function = self.function or next((f for f, n in EXTRA.items() if n in extra), "facility")
        wanted = EXTRA.get(function)
        if wanted is not None and wanted not in extra:
            raise InputError(f"facility: function={function} needs {wanted}=")
        unused = [name for name in extra if name != wanted]
        if unused:
            other = next(f for f, name in EXTRA.items() if name == unused[0])
            raise InputError(
                f"facility: {unused[0]}= has no use with {function}; leave it out, or choose "
                f"function={other}"
            )
        return function

    def _units(
        self, groups: dict[str, Examples], base: Base | None, run: Run
    ) -> dict[str, NDArray[np.float32]]:
        """Each group's features (rows, d), scaled to unit length."""
        from deltaloom.engine.similarity import unit_rows

        if self.features:
            found = _stored(self.features, groups)
        elif base is not None:
            from deltaloom.select._embedding import centred

            found = centred(groups, base, run)
        else:
            raise InputError("facility needs base= to embed the rows with, or features=")
        return {name: unit_rows(each, f"{name} features") for name, each in found.items()}

    def _picks(
        self, function: str, units: dict[str, NDArray[np.float32]], budget: int, seed: int
    ) -> Picks:
        from deltaloom.engine.similarity import Blockwise
        from deltaloom.engine.submodular import FUNCTIONS, How

        kernel, maximise = self._kernel(function, units["pool"]), FUNCTIONS[function]
        how = How(self.greedy, self.eps, seed)
        if function == "facility":
            return maximise(kernel, budget, how=how)
        if function == "graphcut":
            return maximise(kernel, budget, self.redundancy)
        if function == "logdet":
            return maximise(kernel, budget, self.ridge)
        weight = self.eta if function == "flmi" else self.nu
        others = Blockwise.of(units[EXTRA[function]], units["pool"])
        return maximise(kernel, budget, others, weight, how=how)

    def _kernel(self, function: str, rows: NDArray[np.float32]) -> Kernel:
        from deltaloom.engine.similarity import Blockwise, Dense, nearest

        if self.neighbours is not None:
            kept = min(self.neighbours, len(rows))
            return nearest(rows, kept, symmetric=function == "graphcut")
        return Dense.of(rows @ rows.T) if len(rows) <= DENSE_ROWS else Blockwise.of(rows)


def _stored(folders: list[str], groups: dict[str, Examples]) -> dict[str, Any]:
    """Rows of stored features by id, for each group; InputError names an id that has none."""
    import numpy as np

    from deltaloom.core.features import Features, require_same_space

    stores = [Features.open(folder) for folder in folders]
    for store in stores[1:]:
        require_same_space(stores[0], store)
    places = {identity: n for n, identity in enumerate(i for store in stores for i in store.ids)}
    whole = np.concatenate([store.matrix() for store in stores])
    found = {}
    for name, rows in groups.items():
        absent = [identity for identity in rows.ids if identity not in places]
        if absent:
            raise InputError(
                f"features= has no row for {absent[0]!r} of {name} ({len(absent)} of {len(rows)} "
                "missing); name the folders that have them too"
            )
        found[name] = whole[[places[identity] for identity in rows.ids]]
    return found
