"""Tasks of the lm-evaluation-harness on a base or delta, with every score as an Estimate.

Paper: Gao et al., "A framework for few-shot language model evaluation" (lm-eval; software, 2021 to
now). Needs the extra: `pip install "deltaloom[harness]"`.

Formula: lm-eval asks its own questions of the loaded model; an item is what it scores one question
with, and an Estimate its mean over them, one for each task and metric, and one for the whole: every
task's first metric over all questions, clustered by task where there are several.

`harness.json` in the run's folder has lm-eval's own results, and `samples-TASK.jsonl` each question
with its answers and scores. Metrics that are no mean of items (perplexities, F1 over a
whole corpus) are in `harness.json` only, and `not_a_mean` in the run's notes counts them. A task
that is done is not asked again when an interrupted run goes on.

Differs: lm-eval gives a standard error for each metric; here there are intervals, and comparisons
are paired on the shared questions.

Not covered: metrics that are no means; groups' own aggregates; tasks that need code to be trusted.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, TypeGuard, final

from pydantic import Field

from deltaloom.core.atomic import write_json, write_text
from deltaloom.core.errors import InputError, WorkError, suggest
from deltaloom.core.estimate import Estimate
from deltaloom.core.examples import Examples
from deltaloom.core.method import Measurer, Sizes, Work
from deltaloom.core.progress import say
from deltaloom.core.run import Run
from deltaloom.measure._items import note


@final
class Harness(Measurer):
    """lm-eval's tasks with intervals."""

    optional: ClassVar[frozenset[str]] = frozenset({"tasks"})
    requires: ClassVar[tuple[str, ...]] = ("lm_eval",)
    trial: ClassVar[dict[str, Any]] = {
        "suite": ["deltaloom_skillmix"],
        "metadata": {"k": 1, "combinations": 3},
        "generation": {"max_gen_toks": 8},
    }

    suite: list[str] = []
    """Names of lm-eval's tasks or groups, or of those in `include`, or deltaloom_skillmix."""
    include: list[str] = []
    """Folders with tasks of your own, as YAML that lm-eval reads."""
    fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; None takes each task's own number."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Questions of each task at most; None asks all."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Rows of a batch (ours; lm-eval's default is 1)."""
    chat: bool = False
    """Whether questions go through the chat template."""
    metadata: dict[str, Any] = {}
    """Passed to the tasks, as lm-eval's `--metadata`."""
    generation: dict[str, Any] = {}
    """Settings of generation that replace the tasks' own, as lm-eval's `--gen_kwargs`."""

    def work(self, sizes: Sizes) -> Work:
        """Unknown before lm-eval has made its questions; the weights are held."""
        return Work(memory_bytes=sizes.weight_bytes)

    def measure(
        self, model: Any, tokenizer: Any, data: Examples, run: Run
    ) -> Estimate | dict[str, Estimate]:
        """Ask every task of the suite; items are lm-eval's scores of single questions.

        Raises InputError where lm-eval is not installed, no task is named or a name is unknown;
        WorkError where no metric of any task is a mean of items.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise InputError('measure harness needs lm-eval: pip install "deltaloom[harness]"')
        if not self.suite:
            raise InputError("harness: no task is named; say suite=[hellaswag,...]")
        manager, names = self._tasks()
        found: dict[str, Any] = {}
        with counted(model) as tokens:
            for name in names:
                found[name] = self._one(name, manager, model, tokenizer, run)
        write_json(
            run.folder / "harness.json", {name: one["results"] for name, one in found.items()}
        )
        return _estimates(found, run, model, tokens)

    def _tasks(self) -> tuple[Any, list[str]]:
        from deltaloom.measure.lm_eval_tasks import FOLDER

        places = [str(FOLDER), *self.include]
        metadata = dict(self.metadata)
        # lm-eval's own list takes seconds to read, and is read only where it is needed.
        make = importlib.import_module("lm_eval.tasks").TaskManager
        manager = make(include_path=places, include_defaults=False, metadata=metadata)
        if not set(self.suite) <= set(manager.all_tasks):
            manager = make(include_path=places, metadata=metadata)
        known = set(manager.all_tasks)
        for name in self.suite:
            if name not in known:
                raise InputError(f"harness: lm-eval has no task {name!r}{_close(name, known)}")
        return manager, list(dict.fromkeys(self.suite))

    def _one(self, name: str, manager: Any, model: Any, tokenizer: Any, run: Run) -> dict[str, Any]:
        """What lm-eval says of one task, or what it said before an interruption."""
        kept = run.work / f"{run.folder.name}-{name}.json"
        if kept.exists():
            return json.loads(kept.read_text(encoding="utf-8"))
        say(f"harness: {name}")
        models = importlib.import_module("lm_eval.models.huggingface")
        wrapped = models.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size)
        # Its decorators hide from type checkers what it takes.
        found = importlib.import_module("lm_eval").simple_evaluate(
            model=wrapped,
            tasks=[name],
            num_fewshot=self.fewshot,
            limit=self.limit,
            bootstrap_iters=0,
            apply_chat_template=self.chat,
            gen_kwargs=self.generation or None,
            task_manager=manager,
            random_seed=run.seed,
            numpy_random_seed=run.seed,
            torch_random_seed=run.seed,
            fewshot_random_seed=run.seed,
        )
        plain = {
            "results": _plain(found["results"]),
            "higher": _plain(found["higher_is_better"]),
            "samples": _plain(found["samples"]),
        }
        write_json(kept, plain)
        return plain


def _estimates(
    found: dict[str, Any], run: Run, model: Any, tokens: list[int]
) -> dict[str, Estimate]:
    """One Estimate for each task and metric, and the whole; samples go to files."""
    from deltaloom.engine.meter import count_forward

    parts: dict[str, Estimate] = {}
    whole: dict[str, float] = {}
    clusters: dict[str, str] = {}
    not_means = 0
    for one in found.values():
        for task, samples in one["samples"].items():
            lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
            write_text(run.folder / f"samples-{task.replace('/', '_')}.jsonl", "".join(lines))
            metrics = means(one["results"][task], samples)
            not_means += metrics.pop("", 0)
            for place, (metric, items) in enumerate(metrics.items()):
                better = "higher" if one["higher"].get(task, {}).get(metric, True) else "lower"
                name = task if place == 0 else f"{task}.{metric}"
                parts[name] = Estimate.from_items(items, metric=metric, better=better)
                if place == 0:
                    whole |= {f"{task}/{key}": value for key, value in items.items()}
                    clusters |= {f"{task}/{key}": task for key in items}
    if not parts:
        raise WorkError(f"harness: no metric of {', '.join(found)} is a mean of items")
    note(run, not_a_mean=not_means)
    several = 1 < len({*clusters.values()}) < len(clusters)
    every = Estimate.from_items(
        whole,
        metric="harness",
        clusters=clusters if several else None,
        cost=count_forward(run, model, tokens[0]),
    )
    return {"": every, **parts}


def means(results: dict[str, Any], samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items by metric, where lm-eval's value is their mean; `""` counts the other metrics.

    With several filters the first counts, as each sample is listed once for each of them.
    """
    if not samples:
        return {}
    first = samples[0].get("filter", "none")
    own = [one for one in samples if one.get("filter", "none") == first]
    found: dict[str, Any] = {}
    others = 0
    for metric in own[0].get("metrics") or []:
        value = results.get(f"{metric},{first}")
        items = {str(one["doc_id"]): one.get(metric) for one in own}
        numbers = {key: float(x) for key, x in items.items() if _is_number(x)}
        mean = math.fsum(numbers.values()) / max(len(numbers), 1)
        if len(numbers) == len(items) and _is_number(value) and abs(mean - value) < 1e-6:
            found[metric] = numbers
        else:
            others += 1
    return {**found, **({"": others} if others else {})}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Count the tokens that go through the model, padding too: lm-eval keeps no account."""
    tokens = [0]

    def count(module: Any, args: Any, given: dict[str, Any]) -> None:
        ids = given.get("input_ids", args[0] if args else None)
        tokens[0] += int(ids.numel()) if ids is not None else 0

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield tokens
    finally:
        handle.remove()


def _plain(value: Any) -> Any:
    """Whatever lm-eval returns, in JSON's terms."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return value.item() if hasattr(value, "item") else str(value)


def _close(name: str, known: set[str]) -> str:
    """A near name; lm-eval has thousands, which are not listed."""
    said = suggest(name, known)
    return said if "did you mean" in said else "; `lm-eval ls tasks` lists them"
