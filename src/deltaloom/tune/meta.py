"""Learn, from many tasks, weights that a few rows of a new task adapt.

Paper: Zhou et al. 2021, "Meta-Learning with Neural Tangent Kernels" (arXiv 2102.03909) for `kernel`
(Meta-RKHS-II) and `energy` (Meta-RKHS-I); Finn et al. 2017, "Model-Agnostic Meta-Learning" (arXiv
1703.03400) for `gradient`; Nichol et al. 2018, "On First-Order Meta-Learning Algorithms" (arXiv
1803.02999) for `reptile`.

A step draws tasks m, of each rows S to adapt to and rows Q to be judged by, and Adam follows the
mean over m of the gradient by theta of
  kernel    L(theta + J' K^-1 (I - exp(-t K)) (0 - f), Q): f the losses of the rows of S, J their
            gradients, K = J J'; the end of gradient flow on the squares of the linear model
  energy    L(theta, S and Q) - strength |dL/dtheta|^2
  gradient  L(theta after inner_steps of inner_lr on L(., S), Q)
  reptile   no loss: the direction theta - theta after inner_steps on S and Q.

Differs: outputs in the closed form are rows' cross-entropies with target zero, where Zhou et al.
take scores of classes with squared loss: an answer of any length is one output, and K has a line
for each row. The query loss is that of the network with the changed parameters, not that of its
linear model, as the changed parameters are what adaptation gives (`engine.adaptation` has both).
Its gradient takes the change for a constant, as first-order MAML does; `order=whole` is the
papers'. Time is in units of n / trace K. Reptile's direction goes through Adam, as its paper
suggests.

Not covered: inner learning rates that are learned; the weighting of tasks' losses by Park & Kang
2024 ("Fast Adaptation with Kernel and Gradient based Meta Leaning", arXiv 2411.00404), whose rule
could not be read; sequence classifiers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, final

from pydantic import Field, model_validator

from deltaloom.core.delta import Delta, load
from deltaloom.core.errors import InputError
from deltaloom.core.method import Evaluation, Sizes, Tuner, Work
from deltaloom.tune._gradient import Count, Positive, rows_for
from deltaloom.tune.full import save_model
from deltaloom.tune.lora import Lora, save_adapter

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.encoding import Encoded
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run


@final
class Meta(Tuner):
    """Meta-learning over tasks; the result is an adapter folder, or a model folder."""

    trial: ClassVar[dict[str, Any]] = {"steps": 8, "tasks": 2, "shots": 3, "queries": 3, "r": 2}

    inner: Literal["kernel", "energy", "gradient", "reptile"] = "kernel"
    """How a task is adapted to while learning: in closed form (Meta-RKHS-II), by a regulariser in
    its place (Meta-RKHS-I), by steps that are differentiated through (MAML), or by steps whose end
    is approached (Reptile)."""
    order: Literal["first", "whole"] = "first"
    """Whether the outer gradient of `kernel` and `gradient` takes the change of the parameters for
    a constant, or is whole, with second derivatives: MAML, where `first` is its first-order form.
    Of `gradient`, `whole` holds the graph of all inner steps."""
    tuned: Literal["lora", "full"] = "lora"
    """What is learned: LoRA's factors, or all parameters."""
    steps: Count = 1000
    """Outer steps (ours; MAML: 60,000 on images)."""
    tasks: Count = 4
    """Tasks of a step (MAML: 4; Meta-RKHS: 16)."""
    shots: Count = 8
    """Rows of a task that are adapted to (ours): as many as new tasks will have."""
    queries: Count = 8
    """Rows of a task that the outcome is judged by (ours; MAML: 15). A task with fewer than shots +
    queries rows is divided in the same proportion."""
    time: Positive = 10.0
    """Time of the closed form: an average direction keeps exp(-time) of its error. Meta-RKHS finds
    10 best, of 0.1 to infinity, in its own units."""
    inner_lr: Positive = 0.1
    """Rate of the inner steps, plain gradient descent (ours, for LoRA; MAML's for images: 0.01)."""
    inner_steps: Count = 5
    """Inner steps (MAML: 5)."""
    strength: Positive = 0.01
    """Of the energy's regulariser, in place of inner rate times inner steps (ours: the energy has
    no lower bound, and 0.05 diverged on the lab)."""
    lr: Positive = 1e-3
    """Adam's rate (MAML: 1e-3)."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the outer gradient, 0 for none (transformers' default: 1)."""
    r: Count = 8
    """LoRA's rank (PEFT's default: 8)."""
    alpha: Positive = 16.0
    """LoRA's scaling is alpha / r (QLoRA: 16)."""
    modules: list[str] | None = None
    """Names of the modules that LoRA adapts, by their last part; None adapts every linear module
    but the output head."""
    max_length: Count | None = None
    """Tokens per row at most; None takes the model's context. Longer rows lose prompt first."""
    save_steps: Count | None = None
    """Outer steps between checkpoints to resume from; None makes ten in a run."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.modules is not None and self.tuned == "full":
            raise ValueError("'modules' narrows LoRA; leave it out with tuned = full")
        return self

    def work(self, sizes: Sizes) -> Work:
        """Passes over support and query; weights, Adam's moments, and slopes of the support."""
        support = {"kernel": self.shots, "gradient": self.shots * self.inner_steps}
        every = self.shots + self.queries
        rows = {"energy": 2 * every, "reptile": self.inner_steps * every}.get(self.inner)
        if rows is None:
            rows = support[self.inner] * (2 if self.order == "whole" else 1) + self.queries
        tokens = self.steps * self.tasks * rows * sizes.row_tokens
        lora = self.tuned == "lora"
        learned = self.r * sizes.linear_sides if lora else sizes.parameters
        held = 4 + self.tasks + (self.shots if self.inner == "kernel" else 0)
        return Work(
            adapter_tokens=tokens if lora else 0.0,
            full_tokens=0.0 if lora else tokens,
            memory_bytes=(sizes.weight_bytes if lora else 0) + 4.0 * held * learned,
            disk_bytes=4.0 * 4 * learned,
        )

    def tune(
        self, base: Base, data: Examples, run: Run, *, evaluation: Evaluation | None = None
    ) -> Delta:
        """Learn from the tasks of `data`, which are its sources; writes the result to `run.folder`.

        Raises InputError for a single task, for a task of one row, and for `evaluate`.
        """
        from deltaloom.engine.forward import padding_token
        from deltaloom.tune._meta import Learner, MetaSettings, learn

        if evaluation is not None:
            raise InputError(
                "tune meta is judged by what its result adapts to; leave out evaluate, and measure "
                "what tune lora or tune kernel make of it with start="
            )
        tasks = self._tasks(base, data, run)
        model = self._model(base, run.seed)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        learner = Learner(model, names, padding_token(base.tokenizer()))
        values = {name: getattr(self, name) for name in MetaSettings.__dataclass_fields__}
        learn(learner, tasks, MetaSettings(**values), run, self._counted)
        run.note(tasks=len(tasks), steps=self.steps)
        result = run.work / "result"
        if self.tuned == "full":
            save_model(model, result, base)
        else:
            save_adapter(model, result, base)
        run.publish(result)
        return load(run.folder, base)

    @property
    def _counted(self) -> Literal["adapter", "all"]:
        return "adapter" if self.tuned == "lora" else "all"

    def _tasks(self, base: Base, data: Examples, run: Run) -> Sequence[Sequence[Encoded]]:
        """The rows of each task, tasks by name."""
        sizes = data.sources()
        if len(sizes) < 2:
            raise InputError(
                f"{data.name}: has one task (source) only; give rows a 'source', or a file to each "
                "task"
            )
        if alone := [name for name, size in sorted(sizes.items()) if size < 2]:
            raise InputError(
                f"{data.name}: task {alone[0]!r} has one row, and one to adapt to and one to judge "
                "by are needed; add rows or leave it out"
            )
        rows = rows_for(base, base.tokenizer(), data, self.max_length, run)
        found: dict[str, list[Encoded]] = {name: [] for name in sorted(sizes)}
        for example, row in zip(data, rows, strict=True):
            found[example.source].append(row)
        return [*found.values()]

    def _model(self, base: Base, seed: int) -> Any:
        if self.tuned == "full":
            return base.load(dtype="float32")
        return Lora(r=self.r, alpha=self.alpha, modules=self.modules).attach(base, seed)
