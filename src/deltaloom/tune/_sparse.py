"""What the sparse tuners share: how many elements, adapters on the base, adapters to a Delta."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from deltaloom.core.errors import InputError
from deltaloom.core.method import Sizes
from deltaloom.tune._gradient import GradientTuner

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltaloom.core.adapters.sparse import SparseConfig, SparseLinear
    from deltaloom.core.base import Base
    from deltaloom.core.delta import Delta
    from deltaloom.core.run import Run

ADAPTER = "default"
"""PEFT's name of the one adapter that is tuned."""


class SparseTuner(GradientTuner):
    """Abstract: tunes a few elements of linear modules' weights."""

    density: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Part of the adapted weights that is tuned (ours; SpIEL's scripts come to 0.6 to 2.4 % of a
    7B model, at ranks 16 to 64)."""
    r: Annotated[int, Field(ge=1)] | None = None
    """Tune as many elements as a LoRA of this rank has parameters, in place of `density` (SpIEL's
    scripts count in ranks, 8 to 64)."""
    modules: list[str] | None = None
    """Names of the modules to adapt, by their last part (`[q_proj, v_proj]`); None adapts every
    linear module but the output head."""

    def elements(self, weights: float, sides: float) -> int:
        """How many of `weights` elements are tuned; `sides` is the sum of in + out."""
        wanted = self.density * weights if self.r is None else self.r * sides
        return max(1, min(math.floor(wanted), int(weights)))

    def state_bytes(self, sizes: Sizes) -> float:
        """Bytes of index, value, gradient and optimizer of the tuned elements."""
        return 24.0 * self.elements(sizes.matmul_parameters, sizes.linear_sides)

    def attach(self, base: Base, supports: dict[str, Tensor] | None = None, seed: int = 0) -> Any:
        """`base` in PEFT with sparse adapters of zeros.

        Without `supports` (module -> flat indices, rising) each module has its share of elements in
        proportion to its size, at places that `seed` decides. Raises InputError when the base has
        none of `modules`.
        """
        from deltaloom.core.adapters.sparse import SparseConfig, sparse_layers

        model = base.load()
        if supports is None:
            layers = self.linear(model, base)
            weights = sum(layer.layout.numel for layer in layers.values())
            share = self.elements(weights, self._sides(layers)) / weights
            config = SparseConfig(task_type="CAUSAL_LM", density=share, seed=seed)
            config.target_modules = sorted(layers)
        else:
            config = SparseConfig(task_type="CAUSAL_LM")
            config.entries = {name: len(where) for name, where in supports.items() if len(where)}
            config.target_modules = sorted(config.entries)
        model = self._in_peft(model, config, base)
        for name, layer in sparse_layers(model).items():
            if supports is not None:
                layer.support(ADAPTER).copy_(supports[name])
        if self.gradient_checkpointing:
            # Frozen embeddings give activations without a gradient to recompute from.
            model.enable_input_require_grads()
        return model.train()

    def linear(self, model: nn.Module, base: Base) -> dict[str, SparseLinear]:
        """The modules that `modules` names, as layers with room for adapters; `model` stays bare.

        Raises InputError when there are none.
        """
        from deltaloom.core.adapters.sparse import SparseConfig, sparse_layers

        config = SparseConfig(target_modules=self.modules or "all-linear", inference_mode=True)
        wrapped = self._in_peft(model, config, base)
        layers = sparse_layers(wrapped)
        wrapped.unload()
        return layers

    def count(self, layers: dict[str, SparseLinear]) -> int:
        """How many elements are tuned of the weights of `layers`."""
        weights = sum(layer.layout.numel for layer in layers.values())
        return self.elements(weights, self._sides(layers))

    def _sides(self, layers: dict[str, SparseLinear]) -> int:
        return sum(layer.layout.rows + layer.layout.columns for layer in layers.values())

    def _in_peft(self, model: Any, config: SparseConfig, base: Base) -> Any:
        from peft import get_peft_model

        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise InputError(
                f"modules = {self.modules}: {base.model} has no such modules ({error})"
            ) from None


def publish(model: Any, base: Base, run: Run) -> Delta:
    """The tuned elements as a delta, written to `run.folder`."""
    from deltaloom.core.adapters.sparse import sparse_layers
    from deltaloom.core.delta import load
    from deltaloom.core.deltas.sparse import Elements, Sparse

    elements = {
        f"{name}.weight": Elements(
            layer.support(ADAPTER).long().cpu(),
            layer.sparse_values[ADAPTER].detach().float().cpu(),
            (layer.layout.rows, layer.layout.columns),
        )
        for name, layer in sparse_layers(model).items()
    }
    result = run.work / "result"
    Sparse(base, elements, "CAUSAL_LM").save(result)
    run.publish(result)
    return load(run.folder, base)
