"""deltaloom: efficient post-training of language models.

Everything tuned is a Delta, everything chosen is a score, everything claimed is an Estimate,
everything done is a Run.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.delta import Delta
    from deltaloom.core.deltas.extraction import extract
    from deltaloom.core.errors import InputError, WorkError
    from deltaloom.core.estimate import (
        Estimate,
        compare,
        compare_seeds,
        items_needed,
        pool_seeds,
    )
    from deltaloom.core.examples import Examples
    from deltaloom.core.features import Features
    from deltaloom.core.registry import methods
    from deltaloom.core.run import Run
    from deltaloom.recipe.plan import plan
    from deltaloom.recipe.verbs import measure, merge, run, search, select, transfer, tune

_HOMES = {
    "Base": "core.base",
    "Delta": "core.delta",
    "Estimate": "core.estimate",
    "Examples": "core.examples",
    "Features": "core.features",
    "InputError": "core.errors",
    "Run": "core.run",
    "WorkError": "core.errors",
    "compare": "core.estimate",
    "compare_seeds": "core.estimate",
    "extract": "core.deltas.extraction",
    "items_needed": "core.estimate",
    "measure": "recipe.verbs",
    "merge": "recipe.verbs",
    "methods": "core.registry",
    "plan": "recipe.plan",
    "pool_seeds": "core.estimate",
    "run": "recipe.verbs",
    "search": "recipe.verbs",
    "select": "recipe.verbs",
    "transfer": "recipe.verbs",
    "tune": "recipe.verbs",
}

__version__ = "0.1.0"

__all__ = [
    "Base",
    "Delta",
    "Estimate",
    "Examples",
    "Features",
    "InputError",
    "Run",
    "WorkError",
    "compare",
    "compare_seeds",
    "extract",
    "items_needed",
    "measure",
    "merge",
    "methods",
    "plan",
    "pool_seeds",
    "run",
    "search",
    "select",
    "transfer",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `import deltaloom` stays instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'deltaloom' has no attribute {name!r}")
    return getattr(importlib.import_module(f"deltaloom.{_HOMES[name]}"), name)


class _Api(ModuleType):
    """Keeps `deltaloom.select(...)` the verb when the room `deltaloom/select/` is imported.

    The import system would set the attribute to the room; the room stays reachable by
    `from deltaloom.select.less import Less`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Api
