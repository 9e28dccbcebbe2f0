"""Methods: what each verb asks of a way to do it, and what it hands over.

One file, one final class; `core.registry` finds them.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from deltaloom.core.spec import Spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltaloom.core.base import Base
    from deltaloom.core.delta import Delta
    from deltaloom.core.estimate import Estimate
    from deltaloom.core.examples import Examples
    from deltaloom.core.features import Features
    from deltaloom.core.run import Run
    from deltaloom.core.source_weights import SourceWeights


@dataclass(frozen=True)
class Sizes:
    """What `plan` knows of a step before any weight is loaded."""

    rows: int
    """Rows of the pool, the data or the tasks."""
    row_tokens: float
    """Mean tokens per row."""
    target_rows: int
    matmul_parameters: int
    """Parameters a token meets in matrix products (embeddings excluded, head included)."""
    parameters: int
    linear_sides: int
    """Sum of in + out over the linear modules but the head: a rank-r LoRA has r times that."""
    weight_bytes: int
    """Bytes of the base's weights."""
    deltas: int


@dataclass(frozen=True)
class Work:
    """What a step will do: tokens through the model, bytes held and bytes written."""

    forward_tokens: float = 0.0
    adapter_tokens: float = 0.0
    """Tokens trained with frozen weights: forward, and backward through activations only."""
    full_tokens: float = 0.0
    """Tokens trained with every weight."""
    memory_bytes: float = 0.0
    disk_bytes: float = 0.0

    def flops(self, matmul_parameters: int) -> float:
        """2 N a token forward, 4 N with adapters, 6 N with all weights."""
        tokens = 2 * self.forward_tokens + 4 * self.adapter_tokens + 6 * self.full_tokens
        return tokens * matmul_parameters


@dataclass(frozen=True)
class Survey:
    """What file headers say of a merge before it runs."""

    product: str
    """What will be written: a model or an adapter."""
    tensors: int
    read_bytes: int
    written_bytes: int
    passes: int
    """Times that the weights are read, at most."""
    memory_bytes: int | None = None
    """Bytes of the buffers; None where only `Work` has an estimate."""
    problems: tuple[str, ...] = ()
    """Why it will be refused."""
    notes: tuple[str, ...] = ()
    """What is worth a look."""


class Method(Spec):
    """A way to do one verb. Subclasses below are abstract per verb; every method is final."""

    verb: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    """Inputs of the verb that this method cannot do without."""
    uses: ClassVar[frozenset[str]] = frozenset()
    """Inputs that it can do without; a merge step refuses inputs that its method never looks at."""
    optional: ClassVar[frozenset[str]] = frozenset()
    """Inputs that its verb asks for and that this method can do without: the `pool` of a selector
    that makes its rows, the `tasks` of a measurer that brings its questions."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Packages of an extra that it cannot do without."""
    trial: ClassVar[dict[str, Any]] = {}
    """Settings for the conformance suite's tiny model, where the defaults are meant for hours."""
    classifiers: ClassVar[bool] = False
    """Whether the base may be a sequence classifier (a Base with `labels`)."""
    weightless: ClassVar[bool] = False
    """Whether a base of config and tokenizer alone will do."""

    @abstractmethod
    def work(self, sizes: Sizes) -> Work:
        """What this will do on inputs of these sizes, for `plan`."""


@dataclass(frozen=True)
class Selection:
    """What a selector gives back: the rows in order of choice and the scores behind them."""

    chosen: Examples
    scores: Features | None = None
    """Width-one Features over the whole pool, when the method scores."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Optional row id -> why it was chosen, shown in reports."""
    weights: SourceWeights | None = None
    """Shares of the sources, from a method that finds them; `chosen` is then one epoch by them."""


class Selector(Method):
    """Chooses rows of a pool."""

    verb = "select"

    def keeps(self, sizes: Sizes) -> int:
        """Rows it will keep of a pool of these sizes, at most."""
        return sizes.rows

    @abstractmethod
    def select(
        self, pool: Examples, run: Run, *, target: Examples | None, base: Base | None
    ) -> Selection:
        """Choose from `pool`; intermediate work goes to `run.work`."""


class Tuner(Method):
    """Tunes a base on examples."""

    verb = "tune"
    preferences: ClassVar[bool] = False
    """Whether rows must say which answer is better, and not only what to learn."""

    @abstractmethod
    def tune(
        self, base: Base, data: Examples, run: Run, *, evaluation: Evaluation | None = None
    ) -> Delta:
        """Tune; checkpoints go to `run.work`, the result to `run.folder`."""


class Merger(Method):
    """Merges deltas of one base; some do it with data, some make the deltas themselves."""

    verb = "merge"
    needs = frozenset({"deltas"})

    @abstractmethod
    def merge(
        self, base: Base, deltas: list[Delta], run: Run, *, data: Sequence[Examples] = ()
    ) -> Delta:
        """Merge; the result is written to `run.folder`. `data` has one Examples per name given."""

    def survey(self, base: Path, deltas: Sequence[Path | None]) -> Survey | None:
        """What headers say of merging `deltas` over `base`, local folders, None for those that are
        not at hand; None when the method cannot tell.
        """
        return None


class Transferrer(Method):
    """Gives a base another tokenizer."""

    verb = "transfer"

    @abstractmethod
    def transfer(
        self,
        base: Base,
        tokenizer: Path,
        run: Run,
        *,
        donor: Base | None = None,
        data: Examples | None = None,
    ) -> Delta:
        """Move `base` to the tokenizer in the folder `tokenizer`; the result, a model folder, is
        written to `run.folder`. `donor` is a model that has that tokenizer.
        """


@dataclass(frozen=True)
class Trial:
    """One try of a search: finished with its values, or failed for a reason."""

    number: int
    settings: dict[str, Any]
    values: dict[str, float]
    """Empty when it failed."""
    cost: dict[str, float] = field(default_factory=dict)
    """Tokens and estimated FLOPs that it took; no times, which no two runs share."""
    failed: str | None = None
    """Why it has no values."""
    rung: int = 0
    """Which attempt it is, where settings are tried in a cheap way first: 0 is the cheapest."""


@dataclass(frozen=True)
class Found:
    """What a searcher gives back: the settings chosen and every trial behind them."""

    choice: dict[str, Any]
    """`settings` (a method's keys and values, as a later step takes them) and what else is known of
    the choice; written to `choice.json`."""
    trials: tuple[Trial, ...]
    """In order; written to `trials.jsonl`."""
    delta: Delta | None = None
    """A model made with the choice, when the search makes one; in `run.folder`."""


class Searcher(Method):
    """Tries settings on a base and rows, and chooses."""

    verb = "search"

    @abstractmethod
    def search(
        self, base: Base, data: Examples, run: Run, *, evaluation: Evaluation | None = None
    ) -> Found:
        """Search; finished trials stay in `run.work`, so that an interrupted search goes on."""


class Measurer(Method):
    """Measures a base, with or without a delta, on examples."""

    verb = "measure"
    by_token: ClassVar[bool] = False
    """Whether values are by token of the model's own tokenizer, so that models whose tokenizers cut
    rows otherwise do not compare."""

    @property
    def subject(self) -> str | None:
        """Name of what is measured where no base is given (an endpoint, say); None where one must
        be. The model and the tokenizer that `measure` then gets are None.
        """
        return None

    @abstractmethod
    def measure(
        self, model: Any, tokenizer: Any, data: Examples, run: Run
    ) -> Estimate | dict[str, Estimate]:
        """Measure a loaded model (`transformers.PreTrainedModel` or `PeftModel`) on `data`, which
        has no rows where `tasks` is optional and not given. What has parts (the tasks of a
        benchmark, say) gives a mapping of their names to Estimates, and `""` to that of the whole.
        """


Kind = TypeVar("Kind", bound=Method)


def of_kind(method: Method, kind: type[Kind]) -> Kind:
    """`method`, which the registry gave for the verb of `kind` (Tuner, Measurer, ...), as one.

    Raises TypeError for a method of another verb.
    """
    if isinstance(method, kind):
        return method
    raise TypeError(f"{type(method).__name__} is no {kind.verb} method")


def of_whole(found: Estimate | dict[str, Estimate]) -> Estimate:
    """The one Estimate of a measurement, its whole where it has parts."""
    return found[""] if isinstance(found, dict) else found


@dataclass(frozen=True)
class Evaluation:
    """A measurement that a tuner may make while it works, passed in by whoever knows measures."""

    method: Measurer
    data: Examples
    every: int | None = None
    """Optimizer steps between evaluations; None means once an epoch."""
