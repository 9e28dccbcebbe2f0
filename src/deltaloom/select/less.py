"""Keep the rows whose Adam-shaped gradients point like the target's (LESS).

Paper: Xia et al. 2024, "LESS: Selecting Influential Data for Targeted Instruction Tuning"
(arXiv 2402.04333).

Score of row z for subtask S: sum_c w_c mean_{z' in S} cos(P Gamma_c(z), P grad l(z'; theta_c)),
the largest over subtasks. theta_c are the epochs' checkpoints of a warm-up LoRA run on a random
part of the pool, w_c the epochs' mean learning rates scaled to sum to 1, P a random projection,
and Gamma = m' / sqrt(v' + 1e-8) with m' = 0.9 m + 0.1 g, v' = 0.999 v + 0.001 g^2 from the
warm-up optimizer's moments m, v. Subtasks are the target rows' `group` (one when they have none).

Differs: the update follows the authors' code (no bias correction, epsilon inside the root) where
the paper prints Adam's; the projection is a sparse Johnson-Lindenstrauss transform of the same
fidelity (`projection=rademacher` is the authors'); groups may differ in size; adapters sit on all
linear modules unless `warmup.modules` says otherwise.

Not covered: features kept for other targets, features from another model than the base.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, final

from pydantic import Field, field_validator

from deltaloom.core.method import Selection, Sizes, Work
from deltaloom.select._budget import BudgetSelector
from deltaloom.select.random import draw
from deltaloom.tune.lora import Lora

if TYPE_CHECKING:
    import numpy as np

    from deltaloom.core.base import Base
    from deltaloom.core.examples import Examples
    from deltaloom.core.features import Features
    from deltaloom.core.run import Run

AUTHORS = {"r": 128, "alpha": 512.0, "dropout": 0.1, "lr": 2e-5, "epochs": 4, "batch_size": 128}
"""LESS's warm-up (scripts/train, on four devices)."""


@final
class Less(BudgetSelector):
    """Gradient influence on the target."""

    needs: ClassVar[frozenset[str]] = frozenset({"target", "base"})

    warmup_fraction: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Random share of the pool that the warm-up run sees (LESS: 0.05)."""
    warmup: Lora = Lora(**AUTHORS)
    """Settings of the warm-up run; each epoch gives one checkpoint (LESS: r 128, alpha 512,
    dropout 0.1, lr 2e-5, 4 epochs, batch 128). Keys given replace these one by one."""
    projection: Literal["sparse", "rademacher"] = "sparse"
    """Random projection of the gradients: sparse costs O(D), rademacher is the authors'."""
    dimension: Annotated[int, Field(ge=1)] = 4096
    """Width of the projected gradients (LESS: 8192; half of it kept the ranking on CPUs)."""

    @field_validator("warmup", mode="before")
    @classmethod
    def _onto_authors(cls, value: Any) -> Any:
        return {**AUTHORS, **value} if isinstance(value, dict) else value

    def work(self, sizes: Sizes) -> Work:
        """Warm-up epochs on a part, then one gradient pass over everything per checkpoint."""
        checkpoints = round(self.warmup.epochs)
        training = self.warmup.work(sizes)
        rows = sizes.rows * (1 + self.warmup_fraction) + sizes.target_rows
        return Work(
            adapter_tokens=checkpoints * rows * sizes.row_tokens,
            memory_bytes=training.memory_bytes,
            disk_bytes=training.disk_bytes + 2.0 * checkpoints * sizes.rows * self.dimension,
        )

    def select(
        self, pool: Examples, run: Run, *, target: Examples | None, base: Base | None
    ) -> Selection:
        """Rows by descending score; the scores cover the whole pool."""
        import numpy as np

        from deltaloom.core.features import Features

        assert target is not None
        assert base is not None
        count = self.budget(len(pool))
        checkpoints = self._warm_up(pool, base, run)
        groups = [row.group or "" for row in target]
        weights = np.array([checkpoint["lr"] for checkpoint in checkpoints])
        influence = np.zeros((len(pool), len(target)), dtype=np.float32)
        for checkpoint, weight in zip(checkpoints, weights / weights.sum(), strict=True):
            rows, queries = self._features(checkpoint, pool, target, base, run)
            goal = queries.matrix()  # (t, dim)
            for numbers, block in rows.blocks():
                influence[numbers.start : numbers.stop] += weight * (block @ goal.T)
        scores = subtask_scores(influence, groups)  # (n,)
        best = np.argsort(-scores, kind="stable")[:count]
        nearest = influence[best].argmax(axis=1)
        reasons = {
            pool[int(i)].id: f"closest to target row {target[int(j)].id}"
            for i, j in zip(best, nearest, strict=True)
        }
        stored = Features.from_scores(
            run.work / "scores",
            pool.ids,
            scores,
            about={"method": "less", "base": base.fingerprint(), "target": target.digest()},
            columns={"source": [row.source for row in pool]},
        )
        return Selection(pool.take(best.tolist()), stored, reasons)

    def _warm_up(self, pool: Examples, base: Base, run: Run) -> list[dict[str, Any]]:
        """Folder and mean learning rate of each epoch's checkpoint."""
        from deltaloom.core.encoding import encode
        from deltaloom.engine.train import fit
        from deltaloom.select._moments import read_epochs, save_epoch

        home = run.work / "warmup"
        total = round(self.warmup.epochs)
        done = read_epochs(home)
        if len(done) == total:
            return done
        tokenizer = base.tokenizer()
        part = pool.take(draw(len(pool), max(1, round(self.warmup_fraction * len(pool))), run.seed))
        limit = min(self.warmup.max_length or base.max_length, base.max_length)
        rows = encode(part, tokenizer, limit)
        run.note(warmup_rows=len(rows))
        settings = self.warmup.train_settings(
            self.warmup.lr, epochs=total, save_steps=0, trainable="adapter"
        )
        fit(
            self.warmup.attach(base, run.seed),
            rows,
            tokenizer.pad_token_id,
            settings,
            run,
            folder="warmup-training",
            after_epoch=lambda trainer, epoch: save_epoch(home, trainer, epoch, base),
        )
        return read_epochs(home)

    def _features(
        self,
        checkpoint: dict[str, Any],
        pool: Examples,
        target: Examples,
        base: Base,
        run: Run,
    ) -> tuple[Features, Features]:
        """Unit projected gradients of pool (Adam-shaped) and target (plain) rows."""
        from deltaloom.engine.gradients import parameter_names
        from deltaloom.engine.projection import Rademacher, Sparse
        from deltaloom.select._moments import adam_update, load_epoch

        folder: Path = checkpoint["folder"]
        model, moments = load_epoch(folder, base, self.warmup)
        size = sum(model.get_parameter(name).numel() for name in parameter_names(model))
        kind = Sparse if self.projection == "sparse" else Rademacher
        project = kind(size, self.dimension, run.seed)
        stores = []
        for name, data in (("pool", pool), ("target", target)):
            shape = (lambda g: project(adam_update(g, *moments))) if name == "pool" else project
            about = {
                "what": f"{name} gradients",
                "base": base.fingerprint(),
                "checkpoint": folder.name,
                "projection": [self.projection, self.dimension, run.seed],
                "data": data.digest(),
            }
            stores.append(
                unit_features(
                    run.work / "features" / folder.name / name,
                    model,
                    base,
                    data,
                    self.warmup.max_length,
                    self.dimension,
                    shape,
                    about,
                    run,
                )
            )
        return stores[0], stores[1]


def unit_features(
    folder: Path,
    model: Any,
    base: Base,
    data: Examples,
    max_length: int | None,
    dimension: int,
    shape: Any,
    about: dict[str, Any],
    run: Run,
) -> Features:
    """Rows of unit length, `shape(gradients)` scaled, computed shard by missing shard."""
    import numpy as np
    import torch

    from deltaloom.core.encoding import encode
    from deltaloom.core.features import Features
    from deltaloom.core.progress import progress
    from deltaloom.engine.gradients import per_example
    from deltaloom.engine.meter import count_training

    tokenizer = base.tokenizer()
    rows = encode(data, tokenizer, min(max_length or base.max_length, base.max_length))
    store = Features.create(folder, data.ids, dimension, about=about, dtype="float16")
    shards = store.shards()
    missing = store.missing()
    with progress(about["what"], len(shards), len(shards) - len(missing)) as advance:
        for number in missing:
            part = [rows[i] for i in shards[number]]
            out = np.zeros((len(part), dimension), dtype=np.float32)
            for numbers, gradients in per_example(model, part, tokenizer.pad_token_id):
                unit = torch.nn.functional.normalize(shape(gradients), dim=1)
                out[numbers] = unit.cpu().numpy()
            store.write_shard(number, out)
            count_training(run, model, sum(len(row.input_ids) for row in part), trainable="adapter")
            advance(1)
    return store


def subtask_scores(influence: np.ndarray, groups: list[str]) -> np.ndarray:
    """(n, t) -> (n,): mean over each group's columns, then the largest group."""
    import numpy as np

    names = sorted(set(groups))
    columns = [[j for j, group in enumerate(groups) if group == name] for name in names]
    return np.stack([influence[:, own].mean(axis=1) for own in columns], axis=1).max(axis=1)
