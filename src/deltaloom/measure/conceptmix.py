"""Can a model put k visual concepts into one image: a yes/no question for each.

Paper: Wu, Yu, Huang, Russakovsky and Arora 2024, "ConceptMix: A Compositional Image Generation
Benchmark with Controllable Difficulty" (arXiv 2408.14339).

Formula: a scene is one object and k concepts of eight categories (object, color, number, shape,
size, texture, style, spatial), bound into a graph; a prompt says it in words, an image is made of
the prompt, and each of the k + 1 concepts is one yes/no question about the image. An item is 1
where all answers are yes (`full_marks`); `concept_fraction` is the share of yes.

Images come from the measured base, which writes in words what is in each cell of a grid and is
drawn here (`drawing`); from a `pipeline` of diffusers; from an `endpoint`; from a `folder`; or from
the package's own `renderer`, which shows every concept and so tests the chain. Answers come from a
vision model, or `exact`ly from the pixels of images drawn here.

**A grader is graded too**: it is asked about `audit` scenes drawn here, each with its own questions
and as many whose answer is no, which gives its sensitivity, specificity and error rate with
intervals; with those the concept fraction is corrected (Rogan and Gladen). Where all images are
drawn here its error on them is known exactly beside, and full marks are corrected by a random part
of them (prediction-powered).

`conceptmix.json` in the run's folder has the metrics by k and by category, the audit and the
corrected shares; `prompts.jsonl` the scenes with prompts and questions; `answers.jsonl` every
answer; `images/` the images. Estimates come for the whole and each k.

Differs: prompt and questions are written by rule, where the paper has GPT-4o write both (`writer`
lets a model write the prompt); calls that fail are missing, where the official code scores them 0;
`concept_fraction` has clustered errors; words are our own.

Not covered: words that a grader does not know; the audit's scenes are drawings, and a grader may
err otherwise on photographs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, final

from pydantic import BeforeValidator, Field, model_validator

from deltaloom.core.atomic import write_json, write_text
from deltaloom.core.base import Base
from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.estimate import Estimate
from deltaloom.core.examples import Examples
from deltaloom.core.method import Measurer, Sizes, Work
from deltaloom.core.places import PLACE
from deltaloom.core.run import Run
from deltaloom.engine.chat import BaseChat, Kept, Speaker, open_chat
from deltaloom.engine.endpoint import Endpoint, endpoint_of
from deltaloom.measure._items import note
from deltaloom.measure._scenes import Scene, sample_scene, vocabulary

if TYPE_CHECKING:
    from deltaloom.measure._concept_report import Audit
    from deltaloom.measure._graders import Answers, Asked, Grader
    from deltaloom.measure._pictures import Pictures

Count = Annotated[int, Field(ge=1)]
DRAWN = ("drawing", "renderer")
"""Sources whose images are drawn here, so that the exact grader can read them."""
WRITE = """Write the prompt for a text-to-image model that shows exactly this scene, in one or two \
plain sentences. Name every object, attribute, relation and the style, and add nothing.

{graph}

By rule it would be: {prompt}

Prompt:"""


def _as_source(value: Any) -> Any:
    if isinstance(value, str):
        return endpoint_of(value) or value
    return Endpoint.model_validate(value) if isinstance(value, dict) else value


def _as_grader(value: Any) -> Any:
    return None if value == "exact" else value


@final
class ConceptMix(Measurer):
    """Full marks for images that show k concepts at once."""

    optional: ClassVar[frozenset[str]] = frozenset({"tasks"})
    trial: ClassVar[dict[str, Any]] = {"k": [1, 3], "n": 2, "audit": 4, "max_new_tokens": 8}

    k: Annotated[list[Count], Field(min_length=1)] = [1, 2, 3, 4, 5, 6, 7]
    """How many concepts beside the first object (the paper: 1 to 7)."""
    n: Count = 300
    """Scenes for each k (the paper: 300)."""
    concepts: str = "drawn"
    """Words of the eight categories: `drawn` (what can be drawn here), `everyday` (for real
    pipelines), or a JSON file with a list for each category."""
    images: Literal["drawing", "renderer", "pipeline", "endpoint", "folder"] = "drawing"
    """Where images come from; `drawing` is the measured base itself."""
    source: Annotated[Endpoint | str | None, BeforeValidator(_as_source), PLACE] = None
    """The pipeline's hub id or folder, `http://host/v1#model`, or the folder of images."""
    writer: Annotated[Speaker | None, PLACE] = None
    """Who writes the prompts: `http://host/v1#model`, or a base. None writes them by rule."""
    grader: Annotated[Speaker | None, BeforeValidator(_as_grader), PLACE] = None
    """Who answers the questions: `http://host/v1#model`, or an image-text model of transformers.
    None (`exact`) reads the pixels of images drawn here."""
    noise: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the grader's answers to turn around, to see whether the audit finds it."""
    audit: Annotated[int, Field(ge=0)] = 100
    """Scenes on which a grader that is not exact is graded (ours: about 500 questions)."""
    steps: Count | None = None
    """Denoising steps of a pipeline; None is the pipeline's own."""
    max_new_tokens: Count = 256
    """Tokens of a drawing in words at most. Ours: sixteen lines."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.source is None) != (self.images in DRAWN):
            raise ValueError(f"images: {self.images} and 'source' do not go together")
        if isinstance(self.source, Endpoint) != (self.images == "endpoint"):
            raise ValueError("images: endpoint and a 'source' http://host/v1#model go together")
        return self

    @property
    def subject(self) -> str | None:
        """What makes the images, when it is not the base."""
        if self.images in DRAWN:
            return "renderer" if self.images == "renderer" else None
        if isinstance(self.source, Endpoint):
            return self.source.model.rpartition("/")[2]
        return Path(str(self.source)).name

    def work(self, sizes: Sizes) -> Work:
        """What the base writes; a prompt is about 200 tokens. Pipelines and graders not counted."""
        scenes = len(set(self.k)) * self.n if self.images == "drawing" else 0
        tokens = scenes * (200 + self.max_new_tokens)
        return Work(forward_tokens=tokens, memory_bytes=sizes.weight_bytes)

    def measure(
        self, model: Any, tokenizer: Any, data: Examples, run: Run
    ) -> Estimate | dict[str, Estimate]:
        """Make and grade the images; items are full marks by scene.

        Raises InputError for words that cannot be drawn where they must be, rows in `data`, and a
        source without images; WorkError when no image could be graded at all.
        """
        from deltaloom.measure._concept_report import Marked

        if len(data):
            raise InputError("conceptmix makes its own scenes: leave out tasks, set concepts=")
        scenes = self._scenes(run.seed)
        folder = run.folder / "images"
        folder.mkdir(exist_ok=True)
        prompts, failures = self._prompts(scenes, run)
        asked = [one for one in scenes if one.id in prompts]
        failures |= self._pictures(model, tokenizer, run).make(asked, prompts, folder, run)
        made = [one for one in asked if one.id not in failures]
        grader = self._grader(run)
        answers = _by_scene(made, grader.grade(_questions(made, folder), run))
        marked = Marked(scenes, answers)
        if not marked.complete:
            raise WorkError(f"no image could be graded: {_commonest(failures)}")
        _keep(run, scenes, prompts, answers, failures)
        report = {
            **marked.tables(),
            "grader": self._graded(grader, made, answers, run) if self._fallible else None,
        }
        write_json(run.folder / "conceptmix.json", report)
        note(run, missing_images=len(failures), unanswered_questions=marked.unanswered)
        return marked.estimates()

    @property
    def _fallible(self) -> bool:
        """Whether the grader can err."""
        return self.grader is not None or self.noise > 0

    def _scenes(self, seed: int) -> list[Scene]:
        from deltaloom.measure._drawing import drawable, laid_out

        words = vocabulary(self.concepts)
        drawn = self.images in DRAWN or self.grader is None
        if drawn:
            drawable(words)
        return [
            sample_scene(
                words, k, seed, index, (lambda one: laid_out(one) is not None) if drawn else _any
            )
            for k in dict.fromkeys(self.k)
            for index in range(self.n)
        ]

    def _prompts(self, scenes: Sequence[Scene], run: Run) -> tuple[dict[str, str], dict[str, str]]:
        """Prompts by scene, and why there is none."""
        ruled = {one.id: one.prompt() for one in scenes}
        if self.writer is None:
            return ruled, {}
        chat = open_chat(self.writer, run.work / f"{run.folder.name}-writer.jsonl")
        talks = [
            [
                {
                    "role": "user",
                    "content": WRITE.format(graph=json.dumps(one.graph()), prompt=ruled[one.id]),
                }
            ]
            for one in scenes
        ]
        replies = chat.replies(talks, max_new_tokens=128)
        chat.spend(run, replies)
        found, missing = {}, {}
        for one, reply in zip(scenes, replies, strict=True):
            if reply.text and reply.text.strip():
                found[one.id] = " ".join(reply.text.split())
            else:
                missing[one.id] = reply.failure or "the writer wrote nothing"
        return found, missing

    def _pictures(self, model: Any, tokenizer: Any, run: Run) -> Pictures:
        from deltaloom.measure._pictures import Files, Pipeline, Renderer, Server, Words

        if self.images == "renderer":
            return Renderer()
        if self.images == "pipeline":
            return Pipeline(str(self.source), self.steps)
        if isinstance(self.source, Endpoint):
            return Server(self.source)
        if self.images == "folder":
            return Files(Path(str(self.source)).expanduser())
        own = BaseChat(model, tokenizer, run.folder.name)
        kept = Kept(own, run.work / f"{run.folder.name}-drawings.jsonl")
        return Words(kept, vocabulary(self.concepts), self.max_new_tokens)

    def _grader(self, run: Run) -> Grader:
        from deltaloom.measure._graders import ByServer, Exact, Noisy, VisionModel

        grader: Grader = Exact()
        if isinstance(self.grader, Endpoint):
            file = run.work / f"{run.folder.name}-answers.jsonl"
            grader = ByServer(open_chat(self.grader, file))
        elif isinstance(self.grader, Base):
            grader = VisionModel(self.grader)
        return Noisy(grader, self.noise) if self.noise else grader

    def _graded(
        self,
        grader: Grader,
        made: Sequence[Scene],
        answers: Mapping[str, Answers],
        run: Run,
    ) -> dict[str, Any]:
        """What the audit says of the grader, and what follows for the scores."""
        from deltaloom.measure import _concept_report as reports
        from deltaloom.measure._graders import Exact

        found: dict[str, Any] = {}
        audited = reports.Audit([], [], [])
        if self.audit:
            audited = self._audited(grader, run)
            found["audit"] = audited.table()
        exact: dict[str, Answers] = {}
        if self.images in DRAWN:
            folder = run.folder / "images"
            exact = _by_scene(made, Exact().grade(_questions(made, folder), run))
            found["against_exact"] = reports.against(answers, exact)
        rng = random.Random(f"{run.seed} gold")
        gold = rng.sample(sorted(exact), min(self.audit, len(exact) // 2))
        found["corrected"] = reports.corrected(
            answers, audited, {name: exact[name] for name in gold}
        )
        return found

    def _audited(self, grader: Grader, run: Run) -> Audit:
        """The grader asked about scenes drawn for it, with true and false questions."""
        from deltaloom.measure._concept_report import Audit, both_ways
        from deltaloom.measure._drawing import laid_out
        from deltaloom.measure._graders import Asked, Exact
        from deltaloom.measure._pictures import Renderer

        words = vocabulary("drawn")
        scenes = [
            sample_scene(words, 1 + i % 5, run.seed + 1, i, lambda one: laid_out(one) is not None)
            for i in range(self.audit)
        ]
        folder = run.work / f"{run.folder.name}-audit"
        folder.mkdir(exist_ok=True)
        Renderer().make(scenes, {}, folder, run)
        asked = []
        for scene in scenes:
            for number, (concept, _) in enumerate(both_ways(scene, words)):
                asked.append(
                    Asked(f"audit {scene.id}/{number}", folder / f"{scene.id}.png", concept)
                )
        return Audit(asked, grader.grade(asked, run), Exact().grade(asked, run))


def _any(scene: Scene) -> bool:
    return True


def _questions(scenes: Sequence[Scene], folder: Path) -> list[Asked]:
    from deltaloom.measure._graders import Asked

    return [
        Asked(f"{scene.id}/{number}", folder / f"{scene.id}.png", concept)
        for scene in scenes
        for number, concept in enumerate(scene.concepts)
    ]


def _by_scene(scenes: Sequence[Scene], answers: Answers) -> dict[str, Answers]:
    remaining = iter(answers)
    return {scene.id: [next(remaining) for _ in scene.concepts] for scene in scenes}


def _commonest(failures: Mapping[str, str]) -> str:
    reasons = list(failures.values())
    return max(set(reasons), key=reasons.count) if reasons else "the grader answered no question"


def _keep(
    run: Run,
    scenes: Sequence[Scene],
    prompts: Mapping[str, str],
    answers: Mapping[str, Answers],
    failures: Mapping[str, str],
) -> None:
    """The scenes with their questions, and the answers."""
    asked, said = [], []
    for one in scenes:
        questions = [concept.question() for concept in one.concepts]
        about = {"id": one.id, "prompt": prompts.get(one.id), "scene": one.graph()}
        asked.append({**about, "questions": questions})
        row = {"id": one.id, "answers": answers.get(one.id), "failure": failures.get(one.id)}
        said.append(row)
    for name, rows in (("prompts", asked), ("answers", said)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(run.folder / f"{name}.jsonl", text)
