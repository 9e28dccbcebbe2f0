"""What a rule is: how one tensor of the base and the same tensor of every source become one.

Imports no numerics, so that a method's file can define its rule beside its settings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

    from deltaloom.core.tensors import TensorEntry


Form = Literal["changes", "values", "given"]


@dataclass(slots=True)
class Block:
    """Flat elements start..start+n of one tensor; a rule may overwrite all but `start`."""

    start: int
    base: np.ndarray
    """(n,) values of the base; not filled when the rule does not need them."""
    models: np.ndarray
    """(k, n) per source, in order: changes over the base, or values, as the rule's `form` says."""
    out: np.ndarray
    """(n,) to be filled by `write`."""
    given: list[bool] = field(default_factory=list)
    """Per source whether `models` has a change; for rules that take models as they come."""


class TensorRule(ABC):
    """A rule at work on one tensor; blocks come in rising order, from one thread."""

    scans: int = 0
    """Passes over the tensor before the one that writes."""
    unit: int = 1
    """Elements that no cut may part: every block is a whole multiple of it (a row's length, or the
    tensor's); memory is then at least one unit of the base and of every source."""
    takes_bits: bool = False
    """Whether `scan_bits` and `write_bits` can do the work where all is stored as bfloat16."""
    spare: int = 8
    """Bytes per element of a block that `scan` and `write` allocate at most, where the numbers are
    float32; twice as many where they are float64."""
    held: int = 0
    """Bytes that the rule holds for this tensor whatever the block."""

    def scan(self, number: int, block: Block) -> None:
        """See one block in scan `number`, counted from 0."""
        raise NotImplementedError

    def scanned(self, number: int) -> None:
        """Scan `number` has seen the whole tensor."""
        raise NotImplementedError

    @abstractmethod
    def write(self, block: Block) -> None:
        """Fill `block.out`."""

    def scan_bits(self, number: int, start: int, base: np.ndarray, models: np.ndarray) -> None:
        """See the stored bfloat16 of base (n,), if it is needed, and models (k, n), uint16, from
        flat element `start` on.
        """
        raise NotImplementedError

    def write_bits(self, base: np.ndarray, models: np.ndarray, out: np.ndarray) -> bool:
        """Fill out (n,) from base (n,), if it is needed, and models (k, n): bfloat16 as uint16.

        Returns whether a NaN is among `out`.
        """
        raise NotImplementedError


class Rule(ABC):
    """How one tensor of the base and the same tensor of every source become one."""

    form: Form = "changes"
    """What `Block.models` holds: changes over the base, values, or each as its source gives it."""
    needs_base: bool = True
    """Whether `Block.base` is read."""
    keeps_base: bool = True
    """Whether a tensor that no source changes is the base's, and so is copied unseen."""

    @abstractmethod
    def begin(self, tensor: TensorEntry, models: int) -> TensorRule:
        """Start on one tensor."""

    def width(self, tensor: TensorEntry) -> type[np.floating]:
        """The type of a block's numbers."""
        import numpy as np

        return np.float64 if tensor.dtype == "F64" else np.float32


class ElementRule(Rule, TensorRule):
    """A rule that keeps nothing between blocks."""

    def begin(self, tensor: TensorEntry, models: int) -> TensorRule:
        """See Rule."""
        return self
