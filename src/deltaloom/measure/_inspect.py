"""Skill-Mix as an inspect_ai task: `inspect eval deltaloom/skill_mix --model M -T k=3`.

The entry point of the group `inspect_ai` names this module, so an installed deltaloom needs no
registration. The solver has the two turns; the scorer takes the skills' own checks, or with `-T
graded=true` a grader bound by `--model-role grader=MODEL`; a grading that cannot be read leaves the
sample unscored, which no metric counts. Errors are clustered by set of skills, and `by_skill` gives
every skill's own share.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageUser, GenerateConfig, get_model
from inspect_ai.scorer import (
    Metric,
    SampleScore,
    Score,
    Scorer,
    Target,
    mean,
    metric,
    scorer,
    stderr,
)
from inspect_ai.solver import Generate, Solver, TaskState, solver

from deltaloom.measure import _rubric as rubric
from deltaloom.measure._asking import Asking
from deltaloom.measure._combinations import Combination, draw
from deltaloom.measure._skills import Rules
from deltaloom.measure._wording import Wording, grading, read_wording


def _listed(given: str | list[str]) -> list[str]:
    """Names as a list; the command line has them with commas."""
    return given if isinstance(given, list) else [one for one in given.split(",") if one]


@task
def skill_mix(
    k: int = 3,
    combinations: int = 100,
    seed: int = 0,
    skills: str | None = None,
    topics: str | None = None,
    wording: str | None = None,
    only: str | list[str] = "",
    without: str | list[str] = "",
    graded: bool = False,
    gradings: int = 3,
    max_tokens: int = 512,
) -> Task:
    """Texts that show k skills at once; settings as in `deltaloom show skillmix`."""
    how = Asking.parse(
        {
            "skills": skills,
            "topics": topics,
            "wording": wording,
            "only": _listed(only),
            "without": _listed(without),
            # Whoever grades, skills without a check need somebody.
            "grader": {"model": "role:grader"} if graded else None,
            "gradings": gradings,
        },
        "skill_mix",
    )
    drawn, words = how.pool(), read_wording(wording)
    asked = {one.id: one for one in draw(drawn.skills, drawn.topics, k, combinations, seed)}
    samples = [
        Sample(
            id=one.id,
            input=words.fill(words.ask, one, drawn.rules),
            metadata={
                "skills": [skill.name for skill in one.skills],
                "topic": one.topic.name,
                "cluster": one.cluster,
                "k": k,
            },
        )
        for one in asked.values()
    ]
    return Task(
        dataset=MemoryDataset(samples, name="skill_mix"),
        solver=two_turns(asked, drawn.rules, words),
        scorer=points(asked, drawn.rules, words, gradings if graded else 0),
        config=GenerateConfig(temperature=how.temperature, max_tokens=max_tokens),
        metadata={"rules": drawn.rules.digest},
    )


@solver
def two_turns(asked: dict[str, Combination], rules: Rules, wording: Wording) -> Solver:
    """Ask for the text, then once more for a better one."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        state = await generate(state)
        if wording.revise is not None:
            more = wording.fill(wording.revise, asked[str(state.sample_id)], rules)
            state.messages.append(ChatMessageUser(content=more))
            state = await generate(state)
        return state

    return solve


@metric
def by_skill() -> Metric:
    """The share of samples that earn each skill's point."""

    def measured(scores: list[SampleScore]) -> Any:
        points: dict[str, list[int]] = {}
        for one in scores:
            for name, point in ((one.score.metadata or {}).get("points") or {}).items():
                points.setdefault(name, []).append(point)
        return {name: sum(found) / len(found) for name, found in sorted(points.items())}

    return measured


@scorer(
    metrics=[
        {"full_marks": [mean(), stderr(cluster="cluster"), by_skill()]},
        {"all_skills": [mean(), stderr(cluster="cluster")]},
        {"skill_fraction": [mean(), stderr(cluster="cluster")]},
    ]
)
def points(
    asked: dict[str, Combination], rules: Rules, wording: Wording, gradings: int = 0
) -> Scorer:
    """The published metrics, by checks or by majority over a grader's readable gradings."""

    async def score(state: TaskState, target: Target) -> Score:
        one = asked[str(state.sample_id)]
        text = wording.text(state.output.completion)
        said: list[str] = []
        found: rubric.Points | None
        if gradings:
            model = get_model(role="grader")
            for _ in range(gradings):
                said.append((await model.generate(grading(one, rules, text))).completion)
            found = rubric.majority([rubric.parsed(one, rules, text, reply) for reply in said])
        else:
            found = rubric.verify(one, rules, text)
        if found is None:
            return Score.unscored(answer=text, explanation="no grading could be read",
                                  metadata={"gradings": said})  # fmt: skip
        found = rubric.without_named(one, text, found)
        names = [skill.name for skill in one.skills]
        return Score(
            value=dict(found.marks()),
            answer=text,
            metadata={
                "points": dict(zip(names, found.skills, strict=True)),
                "topic": found.topic,
                "sense": found.sense,
                "length": found.length,
                "gradings": said,
            },
        )

    return score
