"""Tune learning rate and constants on a narrow, shallow proxy; they hold for the model itself.

Paper: Yang et al. 2022 (Tensor Programs V, muTransfer, arXiv 2203.03466); depth: Yang et al. 2023
(Tensor Programs VI, arXiv 2310.02244) and Dey et al. 2025 (CompleteP, arXiv 2505.01618).

A proxy of the base's architecture is made from its config (fewer heads of the same size, fewer
layers), and trained from scratch on the rows with every trial's settings. Initial scales and
learning rates of the proxy follow the rules of `engine/parametrization.py` relative to the base, at
which the rules change nothing: the learning rate found is that of plain AdamW on the base with its
architecture's own initialisation, in any trainer. A coordinate check over widths and depths, with
the rules and without, is written to `coordinates.json` and drawn in the report.

Differs: the rules are anchored at the model to be trained, not at the proxy as in the authors' mup,
so that the proxy is what gets unusual scales and the model is trained as usual.

Not covered: transfer to tuning from pretrained weights (rules are about training from scratch);
transfer over batch size and number of steps, which must be set as they will be or scaled by other
laws; regularisation, which does not transfer (muTransfer, table 1).
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

from pydantic import Field

from deltaloom.core.atomic import write_json
from deltaloom.core.errors import InputError
from deltaloom.core.method import Evaluation, Found, Searcher, Sizes, Work, of_whole
from deltaloom.core.progress import say
from deltaloom.core.registry import get
from deltaloom.search._front import Goals
from deltaloom.search._space import Dimension, Space, check_space
from deltaloom.search._study import Outcome, Study, best, brief
from deltaloom.tune._gradient import GradientSettings, rows_for

if TYPE_CHECKING:
    from deltaloom.core.base import Base
    from deltaloom.core.delta import Delta
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run
    from deltaloom.engine.parametrization import Scales

COORDINATES, RULES = "coordinates.json", "rules.json"
OPTIMIZER = ("lr", "weight_decay")
SCALES = ("init", "embedding", "output", "attention", "embedding_lr")
"""What can be searched: AdamW's settings, and the fields of `Scales`."""
GOAL = "objective"
"""What trials are compared by; the lower the better, as a loss or an accuracy times -1."""
CHECKED = 16
"""Rows of the coordinate check's one batch, at most (ours)."""


@final
class Width(GradientSettings, Searcher):
    """Hyper-parameter transfer over width and depth."""

    weightless = True
    # Five are the fewest of which two are proposed by results.
    trial = {"trials": 5, "epochs": 0.1, "check_steps": 2}

    rule: Literal["completep", "depth-mup", "mup"] = "completep"
    """Which rules: mup for width alone; depth-mup and completep for depth as well, with residual
    branches times (layers)^-1/2 or ^-1 (completep: the one that transfers over depth in
    transformers, arXiv 2505.01618)."""
    width: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Proxy's hidden size over the base's (ours; muTransfer advises at least 256)."""
    depth: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Proxy's layers over the base's (ours)."""
    space: Space = {"lr": Dimension(low=1e-4, high=1e-1, log=True)}
    """What to tune: lr, weight_decay, and constants that are the same at every size: init (of the
    weights in blocks), embedding, output and attention (forward multipliers), embedding_lr (of the
    embedding, over lr). The default range is ours."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate where the space has none (ours)."""
    trials: Annotated[int, Field(ge=1)] = 8
    """Proxies to train (ours)."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data for each proxy (ours)."""
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the rows that compares trials, when `evaluate` is not given (ours)."""
    check_steps: Annotated[int, Field(ge=0)] = 4
    """Steps of the coordinate check (about as many as in muTransfer); 0 leaves it out."""
    ahead: Annotated[int, Field(ge=1)] = 1
    """Trials that may be done at the same time once each depends on earlier ones: a proposal knows
    the results of all but so many less one. Set it to the number of `workers`."""
    save_steps: Annotated[int | None, Field(ge=1)] = None
    """Optimizer steps between checkpoints within a trial; None saves finished trials only."""
    train: bool = False
    """Also train the base's architecture from a new initialisation with the choice: a model folder
    beside the choice."""
    storage: str | None = None
    """Database URL of the Optuna study, as postgresql+psycopg://USER@HOST/DB; None keeps a journal
    file in the run's folder."""

    def work(self, sizes: Sizes) -> Work:
        """Proxies from scratch; a proxy's share of the base's parameters is width^2 x depth."""
        share = self.width**2 * self.depth
        passes = self.epochs * sizes.rows * sizes.row_tokens
        models = self.trials * share + self.train
        return Work(
            full_tokens=passes * models,
            memory_bytes=16.0 * sizes.parameters * (1.0 if self.train else share),
            disk_bytes=12.0 * sizes.parameters * share + self.train * 16.0 * sizes.parameters,
        )

    def search(
        self, base: Base, data: Examples, run: Run, *, evaluation: Evaluation | None = None
    ) -> Found:
        """Tune proxies of `base`; its weights are not read."""
        from transformers import AutoConfig

        from deltaloom.engine.proxy import resized

        check_space(self.space, (*OPTIMIZER, *SCALES), "search width")
        target = AutoConfig.from_pretrained(base.folder, trust_remote_code=base.trust_remote_code)
        self._rules(target, target, self.rule, {})  # refuses what is not understood
        proxy = resized(target, self.width, self.depth)
        kept, evaluation = self._split(data, evaluation, run)
        tokenizer = base.tokenizer()
        rows = rows_for(base, tokenizer, kept, self.max_length, run)
        if not rows:
            raise InputError(f"{data.name}: holds no rows to tune on")
        goals: Goals = {GOAL: "lower"}
        study = Study(run, self.space, goals, self.trials, self.storage, ahead=self.ahead)
        trials = study.explore(_Attempt(self, target, proxy, rows, tokenizer, evaluation))
        chosen = best(trials, GOAL, "lower")
        say(f"best of {len(trials)} trials: {brief(chosen.settings)}")
        choice = {
            "settings": self._for_tuners(chosen.settings),
            "scales": {key: chosen.settings[key] for key in SCALES if key in chosen.settings},
            GOAL: chosen.values[GOAL],
            "trial": chosen.number,
            "rule": self.rule,
            "proxy": _sizes(proxy),
            "base": _sizes(target),
        }
        if self.check_steps:
            choice["slopes"] = self._check(target, rows, tokenizer, chosen.settings, run)
        rules = self._rules(target, proxy, self.rule, chosen.settings)
        write_json(run.folder / RULES, rules.table())
        delta = self._whole(base, target, rows, tokenizer, chosen.settings, run)
        return Found(choice, trials, delta)

    def _split(
        self, data: Examples, evaluation: Evaluation | None, run: Run
    ) -> tuple[Examples, Evaluation]:
        """Rows to train on, and what compares trials."""
        if evaluation is not None:
            return data, evaluation
        if len(data) < 2:
            raise InputError(f"{data.name}: one row cannot be split; give evaluate= rows")
        order = random.Random(run.seed).sample(range(len(data)), len(data))
        held = max(1, round(self.holdout * len(data)))
        measurer: Any = get("measure", "loss").make({"max_length": self.max_length})
        return data.take(sorted(order[held:])), Evaluation(
            measurer, data.take(sorted(order[:held]))
        )

    def _rules(self, base: Any, config: Any, rule: Any, settings: dict[str, Any]) -> Any:
        from deltaloom.engine.parametrization import Parametrization

        return Parametrization(base, config, rule, _scales(settings))

    def _train(
        self, rules: Any, rows: list[Any], tokenizer: Any, settings: dict[str, Any], run: Run
    ) -> Any:
        """A fresh model of the rules' config, trained."""
        import torch
        from transformers import AutoModelForCausalLM, set_seed

        from deltaloom.engine.forward import padding_token
        from deltaloom.engine.scaled_adam import Scaled
        from deltaloom.engine.train import fit

        set_seed(run.seed)
        model = AutoModelForCausalLM.from_config(rules.config, dtype=torch.float32)
        rules.initialize(model)
        decay = settings.get("weight_decay", self.weight_decay)
        # The companion clips, by the norm before folding; a tenth of a run in checkpoints would
        # cost a small proxy more than its training.
        how = self.train_settings(
            settings.get("lr", self.lr), clip=0.0, save_steps=self.save_steps or 10**9, keep=1
        )
        companion = Scaled(rules, weight_decay=decay, clip=self.clip)
        pad = padding_token(tokenizer)
        return fit(model, rows, pad, how, run, tokenizer=tokenizer, companion=companion).model

    def _for_tuners(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {"lr": self.lr, **{key: settings[key] for key in OPTIMIZER if key in settings}}

    def _check(
        self, target: Any, rows: list[Any], tokenizer: Any, settings: dict[str, Any], run: Run
    ) -> dict[str, Any]:
        """The coordinate check over widths, then over depths, with the rules and without."""
        from deltaloom.engine.coordinates import coordinates, slopes
        from deltaloom.engine.forward import padding_token
        from deltaloom.engine.proxy import resized

        batch = rows[:CHECKED]
        lr, pad = settings.get("lr", self.lr), padding_token(tokenizer)
        result: dict[str, Any] = {}
        written: list[dict[str, Any]] = []
        for over, pairs in (
            ("width", [(f, self.depth) for f in _steps_up(self.width)]),
            ("layers", [(self.width, f) for f in _steps_up(self.depth)]),
        ):
            for rule in (self.rule, "standard"):
                found = []
                for width, depth in pairs:
                    rules = self._rules(target, resized(target, width, depth), rule, settings)
                    found += coordinates(rules, batch, pad, lr, self.check_steps, run.seed)
                written += [{"over": over, **asdict(one)} for one in found]
                if len(pairs) > 1:
                    flat = slopes(found, over)
                    result.setdefault(over, {})[rule] = {
                        place: slope if slope == slope else None for place, slope in flat.items()
                    }
        write_json(run.folder / COORDINATES, json.loads(json.dumps(written).replace("NaN", "null")))
        return result

    def _whole(
        self,
        base: Base,
        target: Any,
        rows: list[Any],
        tokenizer: Any,
        settings: dict[str, Any],
        run: Run,
    ) -> Delta | None:
        if not self.train:
            return None
        from deltaloom.core.delta import describe, load

        rules = self._rules(target, target, self.rule, settings)
        model = self._train(rules, rows, tokenizer, settings, run)
        result = run.work / "result"
        model.save_pretrained(result)
        tokenizer.save_pretrained(result)
        has_weights = any(base.folder.glob("*.safetensors"))
        if has_weights:
            describe(result, "dense", base)
        run.publish(result)
        return load(run.folder, base) if has_weights else None


@dataclass(frozen=True)
class _Attempt:
    """Trains a proxy by settings and measures it."""

    method: Width
    target: Any
    proxy: Any
    rows: list[Any]
    tokenizer: Any
    evaluation: Evaluation

    def __call__(self, settings: dict[str, Any], part: Run) -> Outcome:
        """See `search/_study.py`."""
        from deltaloom.engine.meter import training_cost

        rules = self.method._rules(self.target, self.proxy, self.method.rule, settings)
        model = self.method._train(rules, self.rows, self.tokenizer, settings, part)
        by = self.evaluation
        estimate = of_whole(by.method.measure(model, self.tokenizer, by.data, part))
        sign = 1.0 if estimate.better == "lower" else -1.0
        tokens = round(self.method.epochs * sum(len(row.input_ids) for row in self.rows))
        return Outcome({GOAL: sign * estimate.value}, training_cost(model, tokens))


def _scales(settings: dict[str, Any]) -> Scales:
    from deltaloom.engine.parametrization import Scales

    return Scales(
        **{one.name: settings[one.name] for one in fields(Scales) if one.name in settings}
    )


def _steps_up(factor: float) -> list[float]:
    """`factor` doubled up to 1, four values at most."""
    found = [factor]
    while found[-1] * 2 <= 1 and len(found) < 4:
        found.append(found[-1] * 2)
    return found


def _sizes(config: Any) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    return {name: getattr(config, name) for name in names if hasattr(config, name)}
