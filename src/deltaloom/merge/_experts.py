"""From deltas to the experts of a routed model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from deltaloom.core.deltas.dense import Dense, ModelChange
from deltaloom.core.deltas.lowrank import LowRank
from deltaloom.core.errors import InputError
from deltaloom.core.tensors import TensorFolder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltaloom.core.base import Base
    from deltaloom.core.delta import Delta


def labels(deltas: Sequence[Delta]) -> list[str]:
    """Names of the experts: of the deltas' folders, with a number where that is none or not one."""
    folders = [getattr(delta, "folder", None) for delta in deltas]
    names = [folder.name if folder is not None else "expert" for folder in folders]
    return [n if names.count(n) == 1 else f"{n}-{i}" for i, n in enumerate(names, 1)]


def targets(model: Any, modules: Sequence[str] | None, name: str) -> list[str]:
    """Modules of `model` to route: those whose last part is in `modules`; None for every linear
    layer but the output head. Raises InputError, with `name` for the model, when there are none."""
    from deltaloom.core.adapters.routed import LINEAR

    head = model.get_output_embeddings()
    found = [
        key
        for key, module in model.named_modules()
        if (
            isinstance(module, LINEAR) and module is not head
            if modules is None
            else key.rpartition(".")[2] in modules
        )
    ]
    if not found:
        raise InputError(f"merge route: modules = {modules}: {name} has no such modules")
    return found


def rank_of(delta: Delta, inside: Sequence[str]) -> int:
    """The largest rank of its factors in the modules `inside`; 0 if it is no low-rank change."""
    if not (isinstance(delta, LowRank) and delta.plain):
        return 0
    own = [f.a.shape[0] for name, f in delta.factors.items() if _under(name, inside)]
    return max(own, default=0)


def left_out(delta: Delta, inside: Sequence[str], name: str) -> float:
    """The part of its squared length that lies outside the modules `inside`.

    Raises InputError, with `name` for the delta, when all of it does: its expert would be the base.
    """
    within = without = 0.0
    for tensor in delta.names():
        square = float(delta.to_dense(tensor).double().square().sum())
        if _under(tensor, inside):
            within += square
        else:
            without += square
    if within == 0:
        raise InputError(
            f"merge route: {name} changes nothing in the routed modules; "
            "set modules to what its tuning changed, or leave it out"
        )
    return without / (within + without)


def fill(model: Any, deltas: Sequence[Delta], base: Base) -> None:
    """Write every delta into its expert of a freshly routed `model`."""
    import torch

    with torch.no_grad(), TensorFolder(base.folder) as own:
        for number, delta in enumerate(deltas):
            names = {*delta.names()}
            for key, expert in _experts(model, number):
                _fill(expert, key, delta, names, own)


def _experts(model: Any, number: int) -> Iterator[tuple[str, nn.Module]]:
    from deltaloom.core.adapters.routed import RoutedLayer

    for key, layer in model.get_base_model().named_modules():
        if isinstance(layer, RoutedLayer):
            experts: Any = layer.routed_experts["default"]
            yield key, experts[number]


def _fill(expert: nn.Module, key: str, delta: Delta, names: set[str], own: TensorFolder) -> None:
    from deltaloom.core.adapters.routed import LowRankBeside

    for path, part in expert.named_modules():
        if isinstance(part, LowRankBeside):
            assert isinstance(delta, LowRank)
            factors = delta.factors.get(f"{key}.{path}.weight" if path else f"{key}.weight")
            if factors is not None:  # a smaller rank than the expert's leaves zeros
                part.a[: len(factors.a)] = factors.a.float()
                part.b[:, : len(factors.a)] = factors.b.float()
                part.scale.fill_(factors.scale)
    if not isinstance(expert, LowRankBeside) and not _has_factors(expert):
        for path, parameter in expert.named_parameters():
            known = [n for n in _known(f"{key}.{path}") if n in names]
            if known:
                parameter.copy_(_tuned(delta, known[0], own))


def _has_factors(expert: nn.Module) -> bool:
    from deltaloom.core.adapters.routed import LowRankBeside

    return any(isinstance(part, LowRankBeside) for part in expert.modules())


def _tuned(delta: Delta, name: str, own: TensorFolder) -> Tensor:
    """The tuned tensor itself; a model's is read, as base + (tuned - base) would round."""
    if isinstance(delta, Dense) and len(delta.terms) == 1:
        factor, change = delta.terms[0]
        if factor == 1.0 and isinstance(change, ModelChange):
            return change.tuned.read(change.twins.get(name, name))
    stored = next(known for known in _known(name) if known in own)
    return own.read(stored).float() + delta.to_dense(name)


def _known(name: str) -> tuple[str, str]:
    # Some checkpoints hold the bare model and lack its prefix ("transformer.").
    return name, name.partition(".")[2]


def _under(name: str, modules: Sequence[str]) -> bool:
    bare = {module.partition(".")[2] for module in modules}
    parts = name.split(".")
    return any(
        (front := ".".join(parts[:end])) in modules or front in bare for end in range(1, len(parts))
    )
