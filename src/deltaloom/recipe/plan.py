"""What a recipe will take, before any weight is loaded: time, memory, disk.

Tokens come from the data (a sample is tokenised), FLOPs from the model's config, seconds from the
speed of a matrix product measured here and now. Real training reaches a part of that speed, so the
times are lower bounds and say so.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from deltaloom.core.base import Base
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples
from deltaloom.core.method import Merger, Selector, Sizes, Work, of_kind
from deltaloom.recipe.parsing import parse_recipe, read_yaml
from deltaloom.recipe.steps import MeasureStep, MergeStep, Planned, Recipe

SAMPLE = 200
"""Rows tokenised to estimate the mean length."""


def plan(recipe: str | Path | dict[str, Any], **overrides: Any) -> list[dict[str, Any]]:
    """One mapping a step: name, verb, method, rows, tokens, flops, seconds, memory, disk.

    A merge has `merging` as well: what is not at hand, and what the headers of the rest say
    (tensors, bytes read and written, passes, problems, notes).
    """
    content = recipe if isinstance(recipe, dict) else read_yaml(Path(recipe))
    where = "recipe" if isinstance(recipe, dict) else str(recipe)
    return plan_recipe(parse_recipe(content, where, overrides))


def plan_recipe(recipe: Recipe) -> list[dict[str, Any]]:
    """As `plan`, for checked steps."""
    speed = matmul_speed()
    rows_of: dict[str, tuple[int, float]] = {}
    steps = {planned.step.name for planned in recipe.steps}
    shapes: dict[str, dict[str, int]] = {}
    lines = []
    for planned in recipe.steps:
        sizes = _sizes(planned, rows_of, steps, shapes, lines)
        work = planned.method.work(sizes)
        if isinstance(planned.step, MeasureStep):
            work = _times(work, max(len(planned.step.deltas), 1))
        if planned.step.verb == "select":
            kept = of_kind(planned.method, Selector).keeps(sizes)
            rows_of[planned.step.name] = (kept, sizes.row_tokens)
        flops = work.flops(sizes.matmul_parameters)
        merging = _merging(planned, steps) if isinstance(planned.step, MergeStep) else None
        if merging and merging.get("memory_bytes") is not None:
            exact = {
                "memory_bytes": merging["memory_bytes"],
                "disk_bytes": merging["written_bytes"],
            }
            work = replace(work, **exact)
        lines.append(
            {
                "name": planned.step.name,
                "verb": planned.step.verb,
                "method": planned.step.method,
                "base": planned.step.base.model if planned.step.base else None,
                "rows": sizes.rows,
                "tokens": round(work.forward_tokens + work.adapter_tokens + work.full_tokens),
                "flops": flops,
                "seconds_at_least": flops / speed,
                "memory_bytes": work.memory_bytes,
                "disk_bytes": work.disk_bytes,
                **({"merging": merging} if merging else {}),
            }
        )
    return lines


def _merging(planned: Planned, steps: set[str]) -> dict[str, Any]:
    """What the headers of a merge's files say, and which files are not at hand."""
    step, method = planned.step, of_kind(planned.method, Merger)
    assert step.base is not None
    assert isinstance(step, MergeStep)
    named = [step.base, *(_named(step.base, name) for name in step.deltas or ())]
    places = [None if one.model in steps else one.at_hand() for one in named]
    absent = [
        f"{one.model} ({'made by that step' if one.model in steps else 'not here'})"
        for one, place in zip(named, places, strict=True)
        if place is None
    ]
    base, *deltas = places
    if base is not None and not any(base.glob("*.safetensors")):
        base = None
        absent.append(f"{step.base.model} (has no weights)")
    survey = method.survey(base, deltas) if base is not None and step.deltas else None
    return {"absent": absent, **(asdict(survey) if survey else {})}


def _named(base: Base, name: str) -> Base:
    return base.model_copy(update={"model": name, "revision": None})


def matmul_speed() -> float:
    """FLOP per second of a float32 matrix product on this machine, the best of five."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(1024, 1024, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def _sizes(
    planned: Planned,
    rows_of: dict[str, tuple[int, float]],
    steps: set[str],
    shapes: dict[str, dict[str, int]],
    lines: list[dict[str, Any]],
) -> Sizes:
    step = planned.step
    tokenizer, shape = (
        None,
        dict.fromkeys(("matmul_parameters", "parameters", "linear_sides", "weight_bytes"), 0),
    )
    base = None if step.base is None else _root_base(step.base, steps, lines)
    # A merge can be planned in part without its base.
    if base is not None and (step.verb != "merge" or base.at_hand() is not None):
        if base.model not in shapes:
            shapes[base.model] = model_shape(base)
        shape = shapes[base.model]
        tokenizer = base.model_copy(update={"model": str(base.outline)}).tokenizer()
    counts = {key: _rows(getattr(step, key) or [], rows_of, tokenizer) for key in step.data_keys}
    first = counts.get(step.data_keys[0], (0, 0.0)) if step.data_keys else (0, 0.0)
    return Sizes(
        rows=first[0],
        row_tokens=first[1],
        target_rows=counts.get("target", (0, 0.0))[0],
        deltas=len(getattr(step, "deltas", None) or ()),
        **shape,
    )


def _root_base(base: Base, steps: set[str], lines: list[dict[str, Any]]) -> Base:
    """The base itself, or the base of the earlier step that makes it."""
    while base.model in steps:
        (line,) = (line for line in lines if line["name"] == base.model)
        base = base.model_copy(update={"model": line["base"]})
    return base


def _rows(
    names: list[str], rows_of: dict[str, tuple[int, float]], tokenizer: Any
) -> tuple[int, float]:
    """Rows and mean tokens a row over several inputs."""
    total, tokens = 0, 0.0
    for name in names:
        count, mean = rows_of[name] if name in rows_of else _measured(name, tokenizer)
        total, tokens = total + count, tokens + count * mean
    return total, tokens / total if total else 0.0


def _measured(name: str, tokenizer: Any) -> tuple[int, float]:
    data = Examples.read(name)
    if tokenizer is None:
        return len(data), 0.0
    step = max(1, len(data) // SAMPLE)
    sample = [data[i] for i in range(0, len(data), step)]
    texts = [
        row.text
        or " ".join(turn["content"] for turn in row.messages or ())
        or f"{row.prompt}{row.response or ''}"
        for row in sample
    ]
    return len(data), sum(len(ids) for ids in tokenizer(texts)["input_ids"]) / len(texts)


def model_shape(base: Base) -> dict[str, int]:
    """Parameter counts from the config alone, on the meta device.

    Raises InputError for a model that is not there, or whose config does not load.
    """
    import torch
    from torch import nn
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    outline = base.model_copy(update={"model": str(base.outline)})
    outline.config()  # says what is wrong with a folder that has none
    try:
        config = AutoConfig.from_pretrained(outline.model, trust_remote_code=base.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{base.model}: its config.json does not load ({first})") from None
    with torch.device("meta"):
        if base.labels:
            config.num_labels = len(base.labels)
            model = AutoModelForSequenceClassification.from_config(config)
        else:
            model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    parameters = sum(p.numel() for p in model.parameters())
    width = torch.empty(0, dtype=getattr(config, "dtype", None) or torch.float32).element_size()
    return {
        "matmul_parameters": sum(m.weight.numel() for m in linear)
        + (0 if head is None else head.weight.numel()),
        "parameters": parameters,
        "linear_sides": sum(m.in_features + m.out_features for m in linear),
        "weight_bytes": parameters * width,
    }


def _times(work: Work, factor: int) -> Work:
    return Work(
        forward_tokens=work.forward_tokens * factor,
        memory_bytes=work.memory_bytes,
        disk_bytes=work.disk_bytes * factor,
    )
