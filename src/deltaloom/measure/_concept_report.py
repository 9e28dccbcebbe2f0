"""What answers about images add up to: marks by k and category, and the grader's own errors."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from deltaloom.core.agreement import kappa
from deltaloom.core.corrected import LEAST, prediction_powered, rogan_gladen
from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Estimate
from deltaloom.measure._drawing import laid_out
from deltaloom.measure._graders import Answers, Asked
from deltaloom.measure._scenes import CATEGORIES, Concept, Scene, Vocabulary


@dataclass(frozen=True)
class Marked:
    """Scenes and the answers to their questions; a scene that could not be graded has none."""

    scenes: Sequence[Scene]
    answers: Mapping[str, Answers]

    @property
    def complete(self) -> list[Scene]:
        """Scenes all of whose questions were answered."""
        return [one for one in self.scenes if self._whole(one) is not None]

    @property
    def unanswered(self) -> int:
        """Questions about images that the grader did not answer."""
        return sum(given is None for found in self.answers.values() for given in found)

    def estimates(self) -> dict[str, Estimate]:
        """Full marks of the whole, called "", and of each k."""
        found = {"": self._full(self.scenes)}
        for k, scenes in self._by_k().items():
            if any(self._whole(one) is not None for one in scenes):
                found[f"k{k}"] = self._full(scenes)
        return found

    def tables(self) -> dict[str, Any]:
        """Full marks, concept fraction and the share of yes by category, by k and over all."""
        by_k = {}
        for k, scenes in self._by_k().items():
            if any(self._whole(one) is not None for one in scenes):
                by_k[str(k)] = {
                    "full_marks": self._full(scenes).to_json(),
                    "concept_fraction": self._share(_concepts(scenes), "concept_fraction"),
                    "categories": self._categories(scenes),
                }
        return {"k": by_k, "categories": self._categories(self.scenes)}

    def _categories(self, scenes: Sequence[Scene]) -> dict[str, Any]:
        """Share of yes by category, of those that were asked about."""
        shares = {
            category: self._share(_concepts(scenes, category), f"{category}_share")
            for category in CATEGORIES
        }
        return {category: share for category, share in shares.items() if share is not None}

    def _by_k(self) -> dict[int, list[Scene]]:
        found: dict[int, list[Scene]] = {}
        for one in self.scenes:
            found.setdefault(len(one.concepts) - 1, []).append(one)
        return dict(sorted(found.items()))

    def _whole(self, scene: Scene) -> list[bool] | None:
        given = self.answers.get(scene.id)
        whole = [answer for answer in given or () if answer is not None]
        return whole if given and len(whole) == len(given) else None

    def _full(self, scenes: Sequence[Scene]) -> Estimate:
        items = {
            one.id: float(all(whole)) for one in scenes if (whole := self._whole(one)) is not None
        }
        return Estimate.from_items(items, metric="full_marks", missing=len(scenes) - len(items))

    def _share(self, pairs: Sequence[tuple[Scene, int]], metric: str) -> dict[str, Any] | None:
        items, clusters = {}, {}
        for scene, number in pairs:
            answer = self.answers[scene.id][number] if scene.id in self.answers else None
            if answer is not None:
                items[f"{scene.id}/{number}"] = float(answer)
                clusters[f"{scene.id}/{number}"] = scene.id
        if not items:
            return None
        missing = len(pairs) - len(items)
        return Estimate.from_items(
            items, metric=metric, clusters=clusters, missing=missing
        ).to_json()


def _concepts(scenes: Sequence[Scene], category: str | None = None) -> list[tuple[Scene, int]]:
    """Scenes with the places of their concepts, of one category or all."""
    return [
        (one, number)
        for one in scenes
        for number, concept in enumerate(one.concepts)
        if category in (None, concept.category)
    ]


@dataclass(frozen=True)
class Audit:
    """Questions about drawn scenes, a grader's answers, and the right ones."""

    asked: Sequence[Asked]
    answers: Answers
    truth: Answers

    def pairs(self) -> dict[str, tuple[bool, bool]]:
        """Answer and truth by question, where the grader answered."""
        return {
            one.id: (answer, right)
            for one, answer, right in zip(self.asked, self.answers, self.truth, strict=True)
            if answer is not None and right is not None
        }

    def table(self) -> dict[str, Any]:
        """Sensitivity, specificity and error rate."""
        return _errors(self.pairs(), missing=sum(one is None for one in self.answers))


def both_ways(scene: Scene, words: Vocabulary) -> list[tuple[Concept, bool]]:
    """Each question of a drawn scene with answer yes, and a like one with answer no."""
    picture = laid_out(scene)
    assert picture is not None
    rng = random.Random(f"{scene.id} no")
    found = []
    for concept in scene.concepts:
        found.append((concept, True))
        others = [replace(concept, value=word) for word in words[concept.category]]
        wrong = [one for one in others if not picture.answer(one)]
        if wrong:
            found.append((rng.choice(wrong), False))
    return found


def against(answers: Mapping[str, Answers], exact: Mapping[str, Answers]) -> dict[str, Any]:
    """The grader's errors on the measured images themselves, all of which were drawn here."""
    pairs = {
        f"{name}/{number}": (said, right)
        for name, given in answers.items()
        for number, (said, right) in enumerate(zip(given, exact[name], strict=True))
        if said is not None and right is not None
    }
    return _errors(pairs, missing=0)


def corrected(
    answers: Mapping[str, Answers], audit: Audit, gold: Mapping[str, Answers]
) -> dict[str, Any]:
    """Shares corrected for the grader's errors; what there is too little for is left out."""
    found = {}
    known = {name: float(right) for name, (_, right) in audit.pairs().items()}
    judged = {
        f"{name}/{number}": float(answer)
        for name, given in answers.items()
        for number, answer in enumerate(given)
        if answer is not None
    }
    if len(known) >= LEAST and judged:
        asked = {name: float(said) for name, (said, _) in audit.pairs().items()}
        share = rogan_gladen({**judged, **asked}, known, metric="concept_fraction_corrected")
        if share is not None:
            found["concept_fraction"] = share.to_json()
    whole = {
        name: float(all(given)) for name, given in answers.items() if None not in given and given
    }
    right = {name: float(all(given)) for name, given in gold.items() if name in whole}
    if LEAST <= len(right) < len(whole):
        found["full_marks"] = prediction_powered(
            whole, right, metric="full_marks_corrected"
        ).to_json()
    return found


def _errors(pairs: Mapping[str, tuple[bool, bool]], missing: int) -> dict[str, Any]:
    """Errors of answers against truth, clustered by scene."""
    found: dict[str, Any] = {}
    sides = {
        "error": {name: float(said != right) for name, (said, right) in pairs.items()},
        "sensitivity": {name: float(said) for name, (said, right) in pairs.items() if right},
        "specificity": {
            name: float(not said) for name, (said, right) in pairs.items() if not right
        },
    }
    for metric, items in sides.items():
        if items:
            better = "lower" if metric == "error" else "higher"
            found[metric] = Estimate.from_items(
                items,
                metric=metric,
                better=better,
                clusters={name: name.rpartition("/")[0] for name in items},
                missing=missing if metric == "error" else 0,
            ).to_json()
    if len({right for _, right in pairs.values()}) < 2:
        return found  # kappa is 0 whatever was said
    with suppress(InputError):  # too few answers, or all the same
        found["kappa"] = kappa(
            {name: said for name, (said, _) in pairs.items()},
            {name: right for name, (_, right) in pairs.items()},
            clusters={name: name.rpartition("/")[0] for name in pairs},
        ).to_json()
    return found
