"""Weigh sources by a law fitted on many small runs with random mixtures (mixture regression).

Paper: Liu et al. 2024, "RegMix: Data Mixture as Regression for Language Model Pre-training" (arXiv
2407.01492); laws: ours, Ye et al. 2024 (arXiv 2403.16952), and RegMix's boosted trees.

`runs` mixtures are drawn around the pool's, a small LoRA is tuned on each and measured on every
target. A law is fitted per target, L_t(w) = E_t + (b_t . w + b0_t)^-a_t by default, and the weights
are those of the least mean loss over targets, w_s at most repeats n_s / size.

Differs: the default law is a power law in effective data where RegMix fits LightGBM: it is monotone
and convex in w, so that the constrained optimum is exact (a bound on what any other weights could
gain by the laws is in `weights.json`, as `gap`), where RegMix averages the best 128 of 100,000
samples (`law=trees` does that). Proxies are LoRAs on the base (or `proxy`) where RegMix pretrains;
what they really had counts, where a source was short of its share.

Not covered: a law that carries over model sizes; regression on a mixture's experts (MDE).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, final

from pydantic import Field, model_validator

from deltaloom.core.atomic import write_text
from deltaloom.core.base import BaseField
from deltaloom.core.errors import InputError
from deltaloom.core.method import Measurer, Selection, Sizes, Work, of_kind
from deltaloom.core.places import PLACE
from deltaloom.core.progress import say
from deltaloom.core.registry import get
from deltaloom.core.source_weights import SourceWeights, epoch
from deltaloom.core.spec import canonical
from deltaloom.select._mixing import MixtureSelector, amounts_of
from deltaloom.tune.lora import Lora

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run

Kind = Literal["power", "loglinear", "trees"]
TRIALS = "trials.jsonl"
Trial = dict[str, dict[str, float]]
"""`weights` by source and `losses` by target."""


@final
class Regress(MixtureSelector):
    """Mixture regression; `trials.jsonl` in the result has every run."""

    needs: ClassVar[frozenset[str]] = frozenset({"target", "base"})
    trial: ClassVar[dict[str, Any]] = {"runs": 8, "steps": 4}

    runs: Annotated[int, Field(ge=8)] = 32
    """Small runs with random mixtures (RegMix: 512, for trees; ours for a law with two numbers a
    target and one a source)."""
    steps: Annotated[int, Field(ge=1)] = 20
    """Optimizer steps of each (ours)."""
    tuning: Lora = Lora()
    """How each is tuned, at a constant lr; epochs do not count. Keys given replace these one by
    one."""
    proxy: Annotated[BaseField | None, PLACE] = None
    """Model that is tuned instead of the base: a small one of the same family, at its price."""
    trials: Annotated[str | None, PLACE] = None
    """`trials.jsonl` of another selection, or of runs made elsewhere, instead of making any: one
    object a line with `weights` by source and `losses` by target."""
    measure: str = "loss"
    """Measure method for the targets; less must be better."""
    measuring: dict[str, Any] = {}
    """Settings of the measure method."""
    law: Kind = "power"
    """What is fitted to the losses: a power law in effective data, the log-linear data mixing law,
    or boosted trees (needs scikit-learn)."""
    size: Annotated[int | None, Field(ge=1)] = None
    """Rows, or tokens, of the epoch, which the optimum is for: with `repeats` it says how large a
    share a source can have. None takes a quarter of the pool (ours)."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Regress:
        self._measurer()
        return self

    def work(self, sizes: Sizes) -> Work:
        """The runs, and the targets after each."""
        runs = 0 if self.trials else self.runs
        tuned = runs * self.steps * self.tuning.batch_size
        return Work(
            forward_tokens=runs * sizes.target_rows * sizes.row_tokens,
            adapter_tokens=tuned * sizes.row_tokens,
            memory_bytes=self.tuning.work(sizes).memory_bytes,
        )

    def keeps(self, sizes: Sizes) -> int:
        """See Selector."""
        return super().keeps(sizes) if self.size else max(1, sizes.rows // 4)

    def select(
        self, pool: Examples, run: Run, *, target: Examples | None, base: Base | None
    ) -> Selection:
        """One epoch by the weights found; laws and fit go into `weights.json`.

        Raises InputError for a single source, for trials of other sources, and for an epoch that
        is larger than `repeats` allows.
        """
        import numpy as np

        from deltaloom.select import _laws

        assert target is not None
        assert base is not None
        amounts = amounts_of(pool, self.lengths(pool, base))
        if len(amounts) < 2:
            raise InputError(f"{pool.name}: has one source only; there is nothing to weigh")
        sized = self.model_copy(update={"size": self.size or max(1, sum(amounts.values()) // 4)})
        trials = self._trials(pool, target, base, run)
        names, targets = [*amounts], sorted(trials[0]["losses"])
        shares = np.array([[one["weights"].get(name, 0.0) for name in names] for one in trials])
        losses = np.array([[one["losses"][name] for name in targets] for one in trials])
        assert sized.size is not None
        caps = np.array([min(1.0, self.repeats * amounts[n] / sized.size) for n in names])
        if caps.sum() < 1:
            raise InputError(
                f"size = {sized.size} {self.unit} is more than the pool has, each row at most "
                f"{self.repeats:g} times; make size smaller or repeats larger"
            )
        laws = [_laws.fit(self.law, shares, own, run.seed) for own in losses.T]
        w, gap = _laws.best(laws, caps, shares, np.random.default_rng(run.seed))
        about = {
            "method": "regress",
            "law": self.law,
            "measure": self.measure,
            "gap": gap if np.isfinite(gap) else None,
            "fit": self._fit(shares, losses, targets, run.seed),
            "predicted": {
                t: float(law.predict(w[None])[0]) for t, law in zip(targets, laws, strict=True)
            },
        }
        powers = [law for law in laws if isinstance(law, _laws.Power)]
        if powers:
            about["worth"] = {
                target: dict(zip(names, (law.worth / law.worth.max()).tolist(), strict=True))
                for target, law in zip(targets, powers, strict=True)
            }
        # Shares below a thousandth of a percent are what the solver left of zero.
        weights = dict(zip(names, np.where(w < 1e-5, 0.0, w).tolist(), strict=True))
        allowed = SourceWeights(weights, self.unit, sized.size, self.repeats).within(amounts)
        return sized.drawn(pool, allowed.weights, run, base, about)

    def _measurer(self) -> Measurer:
        return of_kind(get("measure", self.measure).make(self.measuring), Measurer)

    def _fit(self, shares: Any, losses: Any, targets: list[str], seed: int) -> dict[str, Any]:
        """How well laws fitted without a run tell its loss: rank correlation and mean error."""
        import numpy as np
        from scipy.stats import spearmanr

        from deltaloom.select import _laws

        found = {}
        for name, own in zip(targets, losses.T, strict=True):
            told = _laws.cross_validated(self.law, shares, own, seed)
            rank = 0.0
            if len({*own.tolist()}) > 1:
                rank = float(spearmanr(told, own).statistic)  # pyright: ignore[reportAttributeAccessIssue]
            error = float(np.abs(told - own).mean())
            found[name] = {"spearman": rank if np.isfinite(rank) else 0.0, "mean_error": error}
            say(f"{name}: held-out rank correlation {found[name]['spearman']:.3f}")
        return found

    def _trials(self, pool: Examples, target: Examples, base: Base, run: Run) -> list[Trial]:
        if self.trials is not None:
            return read_trials(Path(self.trials), set(pool.sources()))
        from deltaloom.select._patches import Patches, settled_heap
        from deltaloom.select.tailpatch import by_name

        source = self.proxy or base
        targets = by_name(target, [row.group or row.source for row in target])
        names = tuple(f"run {k}" for k in range(self.runs))
        opened = lambda: self.tuning.attach(source, run.seed)  # noqa: E731
        patches = Patches(source, self.tuning, self._measurer(), targets, run, opened, names)
        patches.begin(None)
        before = patches.before()
        bad = [one.metric for one in before.values() if one.better != "lower"]
        if bad:
            raise InputError(f"measure = {self.measure}: of {bad[0]} more is better; use a loss")
        amounts, count = amounts_of(pool), self.steps * self.tuning.batch_size
        trials: list[Trial] = []
        with settled_heap():
            for k, weights in enumerate(drawn_mixtures(amounts, self.runs, run.seed)):
                # A source may be short: what counts are the shares that a run really had.
                most = max(1.0, 4.0 * count / len(pool))
                wanted = SourceWeights(weights, size=count, repeats=most)
                rows = epoch(pool, wanted.within(amounts), run.seed + k)
                had = {name: n / len(rows) for name, n in sorted(rows.sources().items())}
                found = patches.patch(names[k], rows, 0, self.steps)
                trials.append(
                    {"weights": had, "losses": {t: one.value for t, one in found.items()}}
                )
        patches.account([(name, 0) for name in names])
        write_text(run.folder / TRIALS, "".join(canonical(one) + "\n" for one in trials))
        return trials


def drawn_mixtures(amounts: dict[str, int], count: int, seed: int) -> list[dict[str, float]]:
    """RegMix's: Dirichlet around the pool's shares to the power 0.5, 2e-4 at least, of strengths
    0.1 to 5, which count for each source here.
    """
    import numpy as np

    rng = np.random.default_rng([seed, 7])
    prior = np.sqrt(np.array([*amounts.values()], float))
    prior /= prior.sum()
    strengths = np.geomspace(0.1, 5.0, 15) * len(prior)
    found = []
    for k in range(count):
        shares = rng.dirichlet(np.maximum(prior * strengths[k % 15], 1e-3))
        found.append(dict(zip(amounts, np.maximum(shares, 2e-4).tolist(), strict=True)))
    return found


def read_trials(path: Path, sources: set[str]) -> list[Trial]:
    """Runs made before; raises InputError naming the line that is none."""
    from deltaloom.core.reading import rows

    path = path / TRIALS if path.is_dir() else path
    found: list[Trial] = []
    for where, _, row in rows(str(path)):
        for key in ("weights", "losses"):
            own = row.get(key)
            good = (
                isinstance(own, dict)
                and own
                and all(
                    isinstance(v, int | float) and not isinstance(v, bool) for v in own.values()
                )
            )
            if not good:
                raise InputError(f"{where}: {key!r} must map names to numbers")
        unknown = sorted(row["weights"].keys() - sources)
        if unknown:
            raise InputError(f"{where}: the pool has no source {unknown[0]!r}")
        total = sum(row["weights"].values())
        if min(row["weights"].values()) < 0 or not total > 0:
            raise InputError(f"{where}: weights must be at least 0, and one above it")
        if found and row["losses"].keys() != found[0]["losses"].keys():
            raise InputError(f"{where}: has losses on other targets than the lines before")
        weights = {name: float(v) / total for name, v in row["weights"].items()}
        found.append(
            {"weights": weights, "losses": {k: float(v) for k, v in row["losses"].items()}}
        )
    if len(found) < 8:
        raise InputError(f"{path}: has {len(found)} runs; a law needs 8 at least")
    return found
