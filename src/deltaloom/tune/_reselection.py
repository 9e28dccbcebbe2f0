"""SpIEL's schedule as a part of training: accumulate, drop, grow, and keep all that in checkpoints.

Every `reselect` updates, from the first on, a phase of `accumulate` updates collects evidence; at
its end each adapter gives up its smallest elements for the best-scored ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltaloom.core.adapters._sparse_product import gradient_at
from deltaloom.core.adapters.sparse import SparseLinear, sparse_layers
from deltaloom.core.errors import InputError
from deltaloom.engine.train import Companion, TrainSettings
from deltaloom.tune._growth import exchange, largest_gradients, largest_products
from deltaloom.tune._sparse import ADAPTER
from deltaloom.tune._sparse_optimizers import AgedAdamW, CoverSM3

if TYPE_CHECKING:
    from deltaloom.tune.spiel import Spiel

STATE = "reselection.safetensors"
SUMS = ("now", "total", "square")


@dataclass
class Evidence:
    """What a phase has collected about candidates of one weight, all (c,)."""

    indices: Tensor
    now: Tensor
    """Gradient of the update that is being accumulated."""
    total: Tensor
    """Sum of the updates' gradients."""
    square: Tensor
    """Sum of their squares."""

    @classmethod
    def over(cls, indices: Tensor) -> Evidence:
        """None yet about these candidates."""
        return cls(indices, *(torch.zeros(len(indices), device=indices.device) for _ in SUMS))

    def close_update(self) -> None:
        """The gradient of one more update is complete."""
        self.total += self.now
        self.square += self.now**2
        self.now.zero_()


class Reselection(Companion):
    """Exchanges the elements of a model's sparse adapters while it is trained."""

    def __init__(self, model: Any, method: Spiel) -> None:
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise InputError("tune spiel works in one process; launch it without accelerate")
        self.method = method
        self.layers = sparse_layers(model)
        self.evidence: dict[str, Evidence] = {}
        self.exchanged: list[int] = []
        """Elements replaced at each selection so far."""

    def optimizer(self, model: Any, settings: TrainSettings) -> torch.optim.Optimizer:
        """AdamW with ages for accumulated gradients, SM3 for the momentum approximation."""
        values = {name: layer.sparse_values[ADAPTER] for name, layer in self.layers.items()}
        lr, decay = settings.lr, settings.weight_decay
        if self.method.growth == "gradient":
            self._optimizer = AgedAdamW(values.values(), lr=lr, weight_decay=decay)
        else:
            places = {values[n]: (_indices_of(own), own.layout) for n, own in self.layers.items()}
            self._optimizer = CoverSM3(values.values(), places, lr=lr, weight_decay=decay)
        return self._optimizer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at gradients during a phase, and at no other time."""
        since = state.global_step % self.method.reselect
        if since == 0:
            self.evidence = {}
        looks = self.method.growth == "gradient" and since < self.method.accumulate
        for name, layer in self.layers.items():
            layer.watches = {ADAPTER: self._watch(name, layer)} if looks else {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the update; at a phase's end, exchange elements."""
        for one in self.evidence.values():
            one.close_update()
        step, period = state.global_step, self.method.reselect
        if step % period != self.method.accumulate % period or step >= state.max_steps:
            return
        part = self.method.replaced(step, state.max_steps)
        changed = sum(self._reselect(name, layer, part) for name, layer in self.layers.items())
        self.exchanged.append(changed)
        self.evidence = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the model."""
        for layer in self.layers.values():
            layer.watches = {}

    def _watch(self, name: str, layer: SparseLinear) -> Any:
        def watch(g: Tensor, x: Tensor) -> None:
            own = self.evidence.get(name)
            if own is None:
                count = len(layer.sparse_values[ADAPTER])
                own = Evidence.over(largest_gradients(g, x, layer.layout, count))
                self.evidence[name] = own
            own.now += gradient_at(g, x, own.indices, layer.layout)

        return watch

    @torch.no_grad()
    def _reselect(self, name: str, layer: SparseLinear, part: float) -> int:
        values, indices = layer.sparse_values[ADAPTER], layer.support(ADAPTER)
        count = math.floor(part * len(values))
        state = self._optimizer.state[values]
        if not state:  # the module took no part in any forward pass
            return 0
        if self.method.growth == "gradient":
            own = self.evidence[name]
            found = exchange(values, indices.long(), count, own.indices, own.total.abs())
            seeds = self._seeds(own, found.chosen)
        else:
            offered, scores = largest_products(
                state["rows"], state["columns"], layer.layout, indices, count
            )
            found, seeds = exchange(values, indices.long(), count, offered, scores), {}
        indices[found.leaving] = found.coming.to(indices.dtype)
        values[found.leaving] = 0.0
        order = torch.argsort(indices)
        indices.copy_(indices[order])
        values.copy_(values[order])
        for key, seed in seeds.items():
            state[key][found.leaving] = seed
            state[key].copy_(state[key][order])
        return len(found.coming)

    def _seeds(self, own: Evidence, chosen: Tensor) -> dict[str, Tensor]:
        """State of the grown elements: after bias correction, the means of what was seen."""
        b1, b2 = self._optimizer.param_groups[0]["betas"]
        age = float(self.method.accumulate)
        return {
            "age": torch.full_like(own.total[chosen], age),
            "mean": own.total[chosen] / age * (1 - b1**age),
            "square": own.square[chosen] / age * (1 - b2**age),
        }

    def save(self, folder: Path) -> None:
        """Candidates and sums of the phase under way, and the counts of past exchanges."""
        tensors = {"exchanged": torch.tensor(self.exchanged, dtype=torch.int64)}
        for name, own in self.evidence.items():
            tensors[f"{name}.indices"] = own.indices
            tensors |= {f"{name}.{key}": getattr(own, key) for key in SUMS}
        save_file(tensors, folder / STATE)

    def load(self, folder: Path) -> None:
        """What `save` wrote."""
        found = load_file(folder / STATE)
        self.exchanged = found.pop("exchanged").tolist()
        for name, layer in self.layers.items():
            if f"{name}.indices" in found:
                keys = ("indices", *SUMS)
                device = layer.sparse_values[ADAPTER].device
                own = Evidence(*(found[f"{name}.{key}"].to(device) for key in keys))
                self.evidence[name] = own


def _indices_of(layer: SparseLinear) -> Any:
    return lambda: layer.support(ADAPTER)
