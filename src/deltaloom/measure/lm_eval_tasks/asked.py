"""What the YAML beside this calls: the questions, and the points of an answer."""

from __future__ import annotations

from typing import Any

from deltaloom.measure._asking import Asking
from deltaloom.measure._combinations import Combination, draw
from deltaloom.measure._rubric import verify, without_named
from deltaloom.measure._skills import Rules
from deltaloom.measure._wording import Wording, read_wording

SETTINGS = ("skills", "topics", "wording", "only", "without", "only_topics")
PLACES: dict[str, tuple[Combination, Rules, Wording]] = {}
"""What each question's id means, for grading in the same process."""


def load(**given: Any) -> dict[str, Any]:
    """The test split: one row a combination. lm-eval passes `--metadata` as keywords."""
    from datasets import Dataset

    settings = {key: given[key] for key in SETTINGS if given.get(key) is not None}
    how = Asking.parse(settings, "deltaloom_skillmix metadata")
    k, count = int(given.get("k", 2)), int(given.get("combinations", 100))
    drawn, wording = how.pool(), read_wording(how.wording)
    rows = []
    for one in draw(drawn.skills, drawn.topics, k, count, int(given.get("seed", 0))):
        PLACES[one.id] = (one, drawn.rules, wording)
        rows.append(
            {
                "id": one.id,
                "prompt": wording.fill(wording.ask, one, drawn.rules),
                "skills": [skill.name for skill in one.skills],
                "topic": one.topic.name,
                "cluster": one.cluster,
            }
        )
    return {"test": Dataset.from_list(rows)}


def points(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The published metrics of one answer."""
    asked, rules, wording = PLACES[doc["id"]]
    text = wording.text(results[0])
    return without_named(asked, text, verify(asked, rules, text)).marks()
