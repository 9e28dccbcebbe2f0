"""mergekit's methods in our terms: their settings and defaults, and our rule for one tensor.

The rules here are those of precision float32; `_compat.py` has mergekit's own arithmetic for the
same settings. mergekit gives every tensor and every model settings of its own. A rule here is one
for all tensors, so `ByTensor` holds one for each, and `Each` lets every model be sparsified in its
own way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from deltaloom.core.errors import InputError, suggest
from deltaloom.core.registry import get
from deltaloom.merge._resolve import Parameter
from deltaloom.merge._rule import Block, Form, Rule, TensorRule
from deltaloom.merge._rules import Linear, Selective, SelectiveTensor, _key
from deltaloom.merge.arithmetic import Arithmetic
from deltaloom.merge.passthrough import PassthroughRule

if TYPE_CHECKING:
    from deltaloom.core.tensors import TensorEntry

Values = dict[str, Any]
Build = Callable[[str, Values, list[Values], bool, int], Rule]
"""(method, settings for all, settings per source, whether there is a base, seed) -> rule."""


@dataclass(frozen=True)
class Dialect:
    """One method of mergekit."""

    base: Literal["required", "optional", "ignored"]
    """Whether a base is merged over; where it is ignored it is one of the models."""
    least: int
    """Fewest models beside the base."""
    most: int | None
    """Most models beside the base."""
    parameters: tuple[Parameter, ...]
    build: Build
    ends: bool = False
    """Whether the base is the first of the models that are merged."""

    @property
    def shared(self) -> list[Parameter]:
        """Settings that are one for all models."""
        return [one for one in self.parameters if one.shared]

    @property
    def own(self) -> list[Parameter]:
        """Settings of each model."""
        return [one for one in self.parameters if not one.shared]


class ByTensor(Rule):
    """A rule for each tensor, by name; all take the models in the same form."""

    def __init__(self, rules: dict[str, Rule]):
        self.rules = rules
        every = {id(rule): rule for rule in rules.values()}.values()
        forms: list[Form] = sorted({rule.form for rule in every})
        (self.form,) = forms
        self.needs_base = any(rule.needs_base for rule in every)
        self.keeps_base = all(rule.keeps_base for rule in every)

    def begin(self, tensor: TensorEntry, models: int) -> TensorRule:
        """See Rule."""
        return self.rules[tensor.name].begin(tensor, models)

    def width(self, tensor: TensorEntry) -> type[np.floating]:
        """See Rule."""
        return self.rules[tensor.name].width(tensor)


class Each(Rule):
    """Changes that are sparsified in a way of their own, None dropping all, and then combined."""

    def __init__(self, specs: list[Arithmetic | None], last: Selective):
        self.specs, self.last = specs, last

    def begin(self, tensor: TensorEntry, models: int) -> EachTensor:
        """See Rule."""
        return EachTensor(self, tensor, models)


class EachTensor(TensorRule):
    """One tensor under `Each`: a `SelectiveTensor` for every model, and one that combines."""

    def __init__(self, rule: Each, tensor: TensorEntry, models: int):
        self.parts: list[SelectiveTensor | None] = []
        seed = rule.last.seed
        for i, spec in enumerate(rule.specs):
            part = None
            if spec is not None:
                part = SelectiveTensor(Selective(spec, [1.0], seed), tensor, 1)
                part.keys = [_key(seed, tensor.name, i)]  # draws differ between models
            self.parts.append(part)
        self.last = rule.last.begin(tensor, models)
        active = [part for part in self.parts if part is not None]
        self.scans = max((part.scans for part in active), default=0)
        self.unit = max((part.unit for part in active), default=1)
        self.spare = 4 + max((part.spare for part in (*active, self.last)), default=0)
        self.held = self.last.held + sum(part.held for part in active)

    def scan(self, number: int, block: Block) -> None:
        """Let every part that still scans see its change."""
        for i, part in enumerate(self.parts):
            if part is not None and number < part.scans:
                own = block.models[i : i + 1]
                part.scan(number, Block(block.start, block.base, own, block.out))

    def scanned(self, number: int) -> None:
        """See TensorRule."""
        for part in self.parts:
            if part is not None and number < part.scans:
                part.scanned(number)

    def write(self, block: Block) -> None:
        """Sparsify each change, then combine them."""
        zero = np.zeros_like(block.base)
        for i, part in enumerate(self.parts):
            if part is None:
                block.models[i] = 0
                continue
            part.write(Block(block.start, zero, block.models[i : i + 1], block.out))
            block.models[i] = block.out
        self.last.write(block)


def _sum(factors: list[float], *, of_changes: bool) -> Linear:
    """A weighted sum that takes the models in the same form whatever the factors are."""
    rule = Linear(factors)
    rule.needs_base, rule.form = of_changes, "given" if of_changes else "values"
    return rule


def _linear(_: str, shared: Values, each: list[Values], base: bool, seed: int) -> Rule:
    weights = [one["weight"] for one in each]
    total = sum(weights) if shared["normalize"] else 1.0
    if abs(total) < 1e-8:
        raise InputError("the weights sum to zero, so they cannot be normalized")
    return _sum([weight / total for weight in weights], of_changes=False)


def _arithmetic(method: str, shared: Values, each: list[Values], base: bool, seed: int) -> Rule:
    row = get("merge", method).preset
    sparsify, consensus = row.get("sparsify", "none"), row.get("consensus", False)
    weights, random = [one["weight"] for one in each], sparsify in ("random", "ranked")
    if shared["rescale"] and not random:
        raise InputError(f"rescale belongs to dare and della; {method} does not rescale here")
    total = sum(weights)
    divide = shared["normalize"] and abs(total) >= 1e-8
    if sparsify == "none":
        factor = shared["lambda"] / (total if divide else 1.0)
        return _sum([factor * weight for weight in weights], of_changes=True)
    specs = [
        None
        if one["density"] <= 0
        else Arithmetic.parse(
            {
                "sparsify": sparsify,
                "rescale": shared["rescale"],
                "density": min(one["density"], 1.0),
                **{key: one[key] for key in ("gamma", "epsilon") if key in one},
            },
            f"merge {method}",
        )
        for one in each
    ]
    last: Values = {"normalize": divide, "scale": shared["lambda"], "consensus": consensus}
    shares = weights if consensus or not divide else [weight / total for weight in weights]
    if len(set(specs)) == 1 and specs[0] is not None:
        return Selective(specs[0].model_copy(update=last), shares, seed)
    return Each(specs, Selective(Arithmetic(**last), shares, seed))


def _own(method: str, settings: Values, models: int, seed: int) -> Rule:
    made: Any = get("merge", method).make(settings)
    return made.rule(models, seed)


def _slerp(method: str, shared: Values, each: list[Values], base: bool, seed: int) -> Rule:
    return _own(method, {"t": shared["t"]}, 2, seed)


def _nuslerp(method: str, shared: Values, each: list[Values], base: bool, seed: int) -> Rule:
    flat, first_axis = shared["nuslerp_flatten"], shared["nuslerp_row_wise"]
    if not flat and first_axis:
        raise InputError(
            "nuslerp_row_wise with nuslerp_flatten: false interpolates along the first axis, which "
            "is not supported; leave nuslerp_row_wise out to interpolate along the last"
        )
    settings = {"origin": "base" if base else "zero", "row_wise": not flat}
    return _own(method, {**settings, "weights": [one["weight"] for one in each]}, 2, seed)


def _multislerp(method: str, shared: Values, each: list[Values], base: bool, seed: int) -> Rule:
    settings = {"origin": "base" if base else "zero", "normalize": shared["normalize_weights"]}
    weights = [one["weight"] for one in each]
    return _own(method, {**settings, "weights": weights}, len(each), seed)


def _plain(method: str, shared: Values, each: list[Values], base: bool, seed: int) -> Rule:
    return _own(method, shared, len(each), seed)


def _fusion(method: str, shared: Values, each: list[Values], base: bool, seed: int) -> Rule:
    return _own(method, {}, 2, seed)


def _sce(method: str, shared: Values, each: list[Values], base: bool, seed: int) -> Rule:
    return _own(method, {"density": min(shared["select_topk"], 1.0)}, len(each), seed)


def _ram(method: str, shared: Values, each: list[Values], base: bool, seed: int) -> Rule:
    from deltaloom.merge._compat import build
    from deltaloom.merge._compat_numbers import Numbers

    return build(method, shared, each, base, seed, Numbers("float32", finer=True))


def _passthrough(_: str, shared: Values, each: list[Values], base: bool, seed: int) -> Rule:
    scale = each[0]["scale"]
    return PassthroughRule(1.0 if scale is None else scale)


@cache
def dialects() -> dict[str, Dialect]:
    """mergekit's methods that have a counterpart here, by name."""
    weight = Parameter("weight", float)
    mask = Parameter("int8_mask", bool, False, shared=True)
    t = Parameter("t", float, shared=True)
    normalize = Parameter("normalize", bool, True, shared=True)
    row_wise = Parameter("nuslerp_row_wise", bool, False, shared=True)
    flatten = Parameter("nuslerp_flatten", bool, True, shared=True)
    sizes = Parameter("normalize_weights", bool, True, shared=True)
    steps = Parameter("max_iter", int, 10, shared=True)
    near = Parameter("tol", float, 1e-5, shared=True)
    rows = Parameter("filter_wise", bool, False, shared=True)
    top = Parameter("select_topk", float, 1.0, shared=True)
    least = Parameter("eps", float, 1e-8, shared=True)
    moved = Parameter("epsilon", float, 1e-5, shared=True)
    more_alone = (
        Parameter("r", float, 0.1, shared=True),
        Parameter("alpha", float, 0.2, shared=True),
    )
    scale: Any = float | None
    found = {
        "linear": Dialect("ignored", 1, None, (weight, normalize), _linear),
        "slerp": Dialect("required", 1, 1, (t,), _slerp, ends=True),
        "nearswap": Dialect("required", 1, 1, (t,), _slerp, ends=True),
        "arcee_fusion": Dialect("required", 1, 1, (), _fusion, ends=True),
        "nuslerp": Dialect("optional", 2, 2, (weight, row_wise, flatten), _nuslerp),
        "multislerp": Dialect("optional", 1, None, (weight, sizes, least), _multislerp),
        "karcher": Dialect("ignored", 1, None, (steps, near), _plain),
        "model_stock": Dialect("required", 2, None, (rows,), _plain),
        "sce": Dialect("required", 0, None, (mask, top), _sce),
        "ram": Dialect("required", 0, None, (moved,), _ram),
        "ramplus_tl": Dialect("required", 0, None, (moved, *more_alone), _ram),
        "passthrough": Dialect("ignored", 1, 1, (Parameter("scale", scale, None),), _passthrough),
    }
    more = {
        "middle": (Parameter("gamma", float, 0.01),),
        "ranked": (Parameter("epsilon", float, 0.15),),
    }
    family = ("task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties")
    for name in (*family, "dare_linear", "dare_ties", "della_linear", "della"):
        row = get("merge", name).preset
        parameters = (
            mask,
            Parameter("normalize", bool, row.get("normalize", False), shared=True),
            Parameter("rescale", bool, row.get("rescale", False), shared=True),
            Parameter("lambda", float, 1.0, shared=True),
            weight,
            Parameter("density", float, 1.0),
            *more.get(row.get("sparsify", ""), ()),
        )
        found[name] = Dialect("required", 0, None, parameters, _arithmetic)
    return found


def dialect(name: str, place: str) -> Dialect:
    """The method `name` of mergekit; raises InputError for one that there is not here."""
    known = dialects()
    if name not in known:
        raise InputError(f"{place}: no merge_method {name!r}{suggest(name, known)}")
    return known[name]
