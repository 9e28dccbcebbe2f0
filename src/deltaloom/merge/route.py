"""Route between the deltas by the input: an expert each, and small trained routers.

Paper: Pari, Jelassi, Agrawal 2024, "Collective Model Intelligence Requires Compatible
Specialization" (arXiv 2411.02207), routing; the authors' code for what the paper leaves open.

Formula, per routed module: sum_e p_e(x) f_e(x) with p = softmax(G x), token by token; f_e is expert
e's module, all experts count, and only the routers G (experts, in), without bias, are trained. With
`layers` = c a router chooses among the experts of its layer and of the c - 1 above it; at the top
the window is moved down. With `level` = example, p = softmax(G m), m the mean of the module's
inputs over the tokens up to x's.

Differs: LoRA experts are kept as factors beside the base's weights, not as copies. What a delta
changes outside the routed modules is left out, and its share of the delta's squared length is said
(the paper's experts change MLPs only). A routed linear layer adds the experts' changes, weighted.
Routing by example is ours: its mean goes on over the answer, as nothing tells a model where the
prompt ends, and never reads ahead.

Not covered: sparse choice (top-k below all experts); one router shared by all layers; quantised
bases; a window of layers that lie on several devices; by example, two forward passes before one
backward pass under gradient checkpointing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

from pydantic import Field

from deltaloom.core.atomic import write_json
from deltaloom.core.delta import Delta, describe, load
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples
from deltaloom.core.method import Merger, Sizes, Work
from deltaloom.core.progress import say
from deltaloom.tune._gradient import GradientSettings, train

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.run import Run


@final
class Route(GradientSettings, Merger):
    """Routers over experts; the result is an adapter folder of the kind DELTALOOM_ROUTED."""

    needs = frozenset({"deltas", "data"})

    lr: Annotated[float, Field(gt=0)] = 5e-3
    """Peak learning rate of the routers (the paper's: 5e-3)."""
    modules: list[str] | Literal["linear"] = ["mlp"]
    """Modules to route, by the last part of their name (the paper: each block's MLP); `linear` is
    every linear layer but the output head, for LoRA experts only."""
    include_base: bool = False
    """Whether the base's own module is one more expert (a variant of the paper's)."""
    level: Literal["token", "example"] = "token"
    """What a router reads: each token's input (the paper's), or their mean over the example so
    far."""
    layers: Annotated[int, Field(ge=1)] = 1
    """Layers whose experts a router chooses among, its own and those above (the paper: 1 to 4)."""

    def work(self, sizes: Sizes) -> Work:
        """Each expert as if it were a whole model more, which is its most; routers are small."""
        experts = sizes.deltas + self.include_base
        tokens = self.epochs * sizes.rows * sizes.row_tokens * experts * self.layers
        return Work(
            adapter_tokens=tokens,
            memory_bytes=float(sizes.weight_bytes) * (1 + sizes.deltas),
            disk_bytes=3.0 * sizes.weight_bytes * sizes.deltas,
        )

    def merge(
        self, base: Base, deltas: list[Delta], run: Run, *, data: Sequence[Examples] = ()
    ) -> Delta:
        """Train routers on the rows of all of `data`; writes an adapter folder to `run.folder`.

        Raises InputError for fewer than two experts, modules that the base does not have, a delta
        that changes none of them, or `linear` with a delta that is no plain LoRA adapter.
        """
        if len(deltas) + self.include_base < 2:
            raise InputError("merge route: needs two experts; give two deltas, or include_base")
        rows = Examples([row for part in data for row in part], ", ".join(d.name for d in data))
        model = self.attach(base, deltas, run)
        settings = self.train_settings(self.lr, trainable="adapter")
        model = train(model, base, rows, run, self, settings, None)
        result = run.work / "result"
        _save(model, result, base)
        run.publish(result)
        return load(run.folder, base)

    def attach(self, base: Base, deltas: Sequence[Delta], run: Run) -> Any:
        """`base` loaded, its modules routed between the experts by fresh routers."""
        from peft import get_peft_model
        from transformers import set_seed

        from deltaloom.core.adapters.routed import RoutedConfig
        from deltaloom.merge._experts import fill, labels, left_out, rank_of, targets

        model = base.load()
        inside = targets(model, None if self.modules == "linear" else self.modules, base.model)
        names = labels(deltas)
        ranks = [rank_of(delta, inside) for delta in deltas]
        pairs = zip(names, deltas, strict=True)
        shares = {name: left_out(delta, inside, name) for name, delta in pairs}
        run.note(left_out=shares)
        for name, share in shares.items():
            if share > 0:
                say(f"{name}: {share:.1%} of its squared change is outside the routed modules")
        config = RoutedConfig(
            task_type="CAUSAL_LM",  # pyright: ignore[reportArgumentType]
            target_modules=inside if self.modules == "linear" else list(self.modules),
            experts=names,
            ranks=ranks,
            include_base=self.include_base,
            layers=self.layers,
            level=self.level,
        )
        set_seed(run.seed)
        try:
            model = get_peft_model(model, config)
        except ValueError as error:
            raise InputError(f"merge route: {error}") from None
        fill(model, deltas, base)
        if self.gradient_checkpointing:
            # Frozen embeddings give activations without a gradient to recompute from.
            model.enable_input_require_grads()
        return model.train()


def _save(model: Any, folder: Path, base: Base) -> None:
    """Write the adapter folder; its bytes depend on the weights alone."""
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # PEFT may make a set of these, whose order changes from process to process.
    config["target_modules"] = sorted(config["target_modules"])
    config["base_model_name_or_path"] = base.model
    write_json(path, config)
    (folder / "README.md").unlink(missing_ok=True)
    describe(folder, "routed", base)
