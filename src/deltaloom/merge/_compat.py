"""The rule for one tensor in the compatibility mode: mergekit 0.1.5's arithmetic, method by method.

Settings are those of `_dialect.py`; number formats and rounding are in `_compat_numbers.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deltaloom.core.errors import InputError
from deltaloom.core.registry import get
from deltaloom.merge._compat_numbers import Numbers
from deltaloom.merge._compat_parts import Choice
from deltaloom.merge._compat_sums import (
    CompatChanges,
    CompatLinear,
    CompatRule,
    CompatScale,
)

Values = dict[str, Any]
Build = Callable[[Numbers, Values, list[Values], bool], CompatRule]
"""(format, settings for all, settings per source, whether there is a base) -> rule."""


def build(
    method: str, shared: Values, each: list[Values], base: bool, seed: int, numbers: Numbers
) -> CompatRule:
    """The rule of mergekit's `method`; raises InputError for settings that it would not take."""
    if method in BUILDS:
        return BUILDS[method](numbers, shared, each, base)
    return _changes(method, numbers, shared, each, seed)


def _linear(numbers: Numbers, shared: Values, each: list[Values], base: bool) -> CompatRule:
    weights = [one["weight"] for one in each]
    if shared["normalize"] and abs(sum(weights)) < 1e-8:
        raise InputError("the weights sum to zero, so they cannot be normalized")
    return CompatLinear(numbers, weights, shared["normalize"])


def _scale(numbers: Numbers, shared: Values, each: list[Values], base: bool) -> CompatRule:
    return CompatScale(numbers, each[0]["scale"])


def _changes(
    method: str, numbers: Numbers, shared: Values, each: list[Values], seed: int
) -> CompatRule:
    row = get("merge", method).preset
    how = row.get("sparsify", "none")
    choices = []
    for one in each:
        density = one["density"]
        epsilon = one.get("epsilon", 0.0)
        if how == "ranked" and 0 < density < 1 and not epsilon < density < 1 - epsilon:
            raise InputError(
                f"density -/+ epsilon = {density - epsilon:.4g}, {density + epsilon:.4g} must be "
                "probabilities above 0 and below 1; set a smaller epsilon"
            )
        choices.append(Choice(how, density, one.get("gamma", 0.0), epsilon, shared["rescale"]))
    return CompatChanges(
        numbers,
        choices,
        [one["weight"] for one in each],
        scale=shared["lambda"],
        consensus=row.get("consensus", False),
        normalize=shared["normalize"],
        seed=seed,
    )


def _slerp(numbers: Numbers, shared: Values, each: list[Values], base: bool) -> CompatRule:
    from deltaloom.merge._compat_points import CompatSlerp

    if not 0 <= shared["t"] <= 1:
        raise InputError(f"t = {shared['t']:g} must be from 0 to 1")
    return CompatSlerp(numbers, shared["t"])


def _nearswap(numbers: Numbers, shared: Values, each: list[Values], base: bool) -> CompatRule:
    from deltaloom.merge._compat_points import CompatNearSwap

    return CompatNearSwap(numbers, shared["t"])


def _nuslerp(numbers: Numbers, shared: Values, each: list[Values], base: bool) -> CompatRule:
    from deltaloom.merge._compat_points import CompatNuSlerp

    first, second = (one["weight"] for one in each)
    total = first + second
    t = 0.5 if abs(total) < 1e-6 else second / total
    flat, turned = shared["nuslerp_flatten"], shared["nuslerp_row_wise"]
    return CompatNuSlerp(
        numbers, t, changes=base, by_row=not flat and not turned, turned=turned and not flat
    )


def _multislerp(numbers: Numbers, shared: Values, each: list[Values], base: bool) -> CompatRule:
    from deltaloom.merge._compat_means import CompatMultiSlerp

    if len(each) == 1:
        return CompatScale(numbers, None)
    weights = [one["weight"] for one in each]
    normalize = shared["normalize_weights"]
    if normalize and abs(sum(weights)) < 1e-8:
        raise InputError("the weights sum to zero, so they cannot be normalized")
    return CompatMultiSlerp(
        numbers, weights, changes=base, normalize=normalize, least=shared["eps"]
    )


def _karcher(numbers: Numbers, shared: Values, each: list[Values], base: bool) -> CompatRule:
    from deltaloom.merge._compat_means import CompatKarcher

    return CompatKarcher(numbers, shared["max_iter"], shared["tol"])


def _stock(numbers: Numbers, shared: Values, each: list[Values], base: bool) -> CompatRule:
    from deltaloom.merge._compat_means import CompatStock

    return CompatStock(numbers, by_row=shared["filter_wise"])


def _sce(numbers: Numbers, shared: Values, each: list[Values], base: bool) -> CompatRule:
    from deltaloom.merge._compat_choices import CompatSce

    return CompatSce(numbers, shared["select_topk"])


def _fusion(numbers: Numbers, shared: Values, each: list[Values], base: bool) -> CompatRule:
    from deltaloom.merge._compat_choices import CompatFusion

    return CompatFusion(numbers)


def _ram(numbers: Numbers, shared: Values, each: list[Values], base: bool) -> CompatRule:
    from deltaloom.merge._compat_choices import CompatRam

    return CompatRam(numbers, shared["epsilon"])


def _ram_plus(numbers: Numbers, shared: Values, each: list[Values], base: bool) -> CompatRule:
    from deltaloom.merge._compat_choices import CompatRamPlus

    return CompatRamPlus(numbers, shared["epsilon"], shared["r"], shared["alpha"])


BUILDS: dict[str, Build] = {
    "linear": _linear,
    "passthrough": _scale,
    "slerp": _slerp,
    "nearswap": _nearswap,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "model_stock": _stock,
    "sce": _sce,
    "arcee_fusion": _fusion,
    "ram": _ram,
    "ramplus_tl": _ram_plus,
}
