"""Skill-Mix end to end against a real server, by hand-made points and by brute force."""

import json
import math
import random
import re
from collections import Counter

import numpy as np
import pytest
from chat_server import serving

import deltaloom
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples, parse
from deltaloom.core.run import Run
from deltaloom.measure import _rubric as rubric
from deltaloom.measure._combinations import (
    Combination,
    draw,
    expected_occurrences,
    listed,
    new_at_least,
    possible,
)
from deltaloom.measure._composition import Marked, efficiency
from deltaloom.measure._mixing import APART, refuses
from deltaloom.measure._rubric import METRICS, Points
from deltaloom.measure._skills import Skill, read_skills, read_topics
from deltaloom.measure._wording import Wording, grading, read_wording

SKILLS, RULES = read_skills(None)
TOPICS = read_topics(None)
CHECKED = [skill for skill in SKILLS if skill.check]


def asked(k=2, topic=0):
    return Combination("x", tuple(CHECKED[:k]), TOPICS[topic])


# points


@pytest.mark.parametrize(
    ("points", "full", "every", "fraction"),
    [
        (Points((1, 1), 1, 1, 1), 1, 1, 1.0),
        (Points((1, 1), 1, 1, 0), 0, 1, 0.0),
        (Points((1, 1), 1, 0, 0), 0, 0, 0.0),
        (Points((1, 0), 1, 1, 1), 0, 0, 0.5),
        (Points((0, 0), 1, 1, 1), 0, 0, 0.0),
    ],
)
def test_the_published_metrics(points, full, every, fraction):
    assert points.marks() == dict(zip(METRICS, (full, every, fraction), strict=True))


LINES = "1. Point earned: 1\n2. **Points earned:** 0\n3. Point earned: 1.0\n4. Point Earned 1\n5. "
TABLE = "| Criteria | Points Earned |\n|---|---|\n" + "".join(
    f"| c{n} | {point} |\n" for n, point in enumerate([1, 0, 1, 1, 0])
)


@pytest.mark.parametrize("reply", [LINES + "Point earned: 0", TABLE])
def test_gradings_that_can_be_read(reply):
    found = rubric.parsed(asked(), RULES, "Short.", reply)
    # the length is counted here, whatever the grader says of it
    assert found == Points((1, 0), 1, 1, 1)


@pytest.mark.parametrize(
    "reply", ["", "A fine text, full marks!", LINES, LINES + "Point earned: 2", TABLE[:-9]]
)
def test_gradings_that_cannot_are_missing(reply):
    assert rubric.parsed(asked(), RULES, "Short.", reply) is None


def test_majority_by_point():
    a, b = Points((1, 0), 1, 1, 1), Points((1, 1), 0, 1, 1)
    assert rubric.majority([a, a, b]) == a
    assert rubric.majority([a, None, b]) == Points((1, 0), 0, 1, 1)
    assert rubric.majority([None]) is None


def test_a_named_skill_earns_nothing():
    one = Combination("x", (Skill("irony (verbal)", "", ""), Skill("simile", "", "")), TOPICS[0])
    points = Points((1, 1), 1, 1, 1)
    assert rubric.without_named(one, "What an Irony.", points).skills == (0, 1)
    assert rubric.without_named(one, "Like a rose.", points) == points


# combinations


def test_draws_are_even_and_follow_the_seed():
    one = draw(SKILLS, TOPICS, 3, 300, 5)
    assert [c.key for c in one] == [c.key for c in draw(SKILLS, TOPICS, 3, 300, 5)]
    assert [c.key for c in one] != [c.key for c in draw(SKILLS, TOPICS, 3, 300, 6)]
    assert all(len({s.name for s in c.skills}) == 3 for c in one)
    counts = Counter(s.name for c in one for s in c.skills)
    expected = 300 * 3 / len(SKILLS)
    statistic = sum((counts[s.name] - expected) ** 2 / expected for s in SKILLS)
    assert statistic < len(SKILLS) + 4 * math.sqrt(2 * len(SKILLS))
    singles = Counter(c.skills[0].name for c in draw(SKILLS, TOPICS, 1, 92, 5))
    assert set(singles.values()) == {2}


def test_seen_combinations_are_not_drawn():
    skills, topics = SKILLS[:4], TOPICS[:2]
    every = {c.key for c in draw(skills, topics, 2, 400, 0)}
    assert len(every) == possible(4, 2, 2) == 12
    seen = set(sorted(every)[:9])
    found = {c.key for c in draw(skills, topics, 2, 50, 0, seen)}
    assert found
    assert not found & seen
    with pytest.raises(InputError, match="nearly every combination"):
        draw(skills, topics, 2, 5, 0, every)
    with pytest.raises(InputError, match="only 4 skills"):
        draw(skills, topics, 5, 5, 0)


def test_the_bound_against_simulation():
    """Sentences with independent skills: how often does a given combination occur?"""
    rng = np.random.default_rng(0)
    rates, topic_rate, sentences = [0.3, 0.2], 0.1, 500
    hits = [
        int(np.prod([*rates, topic_rate] > rng.random((3, sentences)).T, axis=1).sum())
        for _ in range(2000)
    ]
    assert np.mean(hits) == pytest.approx(
        expected_occurrences(rates, topic_rate, sentences), rel=0.05
    )
    # the published example: .12 of full marks, at most .07 met before
    assert new_at_least(0.12, 0.07) == pytest.approx(1 - 0.07 / 0.12)
    assert new_at_least(0.05, 0.07) == 0.0
    assert new_at_least(0.0, 0.07) is None


# efficiency


def world(rng, power, n=120):
    """Marks of a student whose full marks at k are the product of single rates to a power."""
    rates = {skill.name: rng.uniform(0.5, 0.95) for skill in CHECKED[:8]}
    marked = []
    for k in (1, 3):
        for one in draw(CHECKED[:8], TOPICS, k, n, 1):
            p = math.prod(rates[s.name] for s in one.skills) ** (power if k > 1 else 1)
            full = {name: float(rng.random() < p) for name in METRICS}
            marked.append(Marked(one, full, full, {}))
    return marked, rates


def test_efficiency_is_one_for_independent_skills_and_its_interval_covers():
    inside, ratios = 0, []
    for seed in range(40):
        marked, _ = world(random.Random(seed), 1.0)
        found = efficiency(marked, 3, seed)
        inside += found["low"] <= 1.0 <= found["high"]
        ratios.append(found["value"])
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.04)
    assert inside >= 34  # 95 % of 40 is 38; fewer than 34 has probability 0.01
    marked, _ = world(random.Random(1), 2.0)
    assert efficiency(marked, 3, 0)["high"] < 0.9


def test_efficiency_where_it_means_nothing():
    marked, _ = world(random.Random(0), 1.0, n=40)
    assert efficiency([one for one in marked if one.asked.k > 1], 3, 0) is None
    some = [one for one in marked if one.asked.k > 1 or one.asked.skills[0] is not CHECKED[0]]
    found = efficiency(some, 3, 0)
    assert found["n"] + found["left_out"] == 40
    assert found["left_out"] == sum(
        CHECKED[0] in one.asked.skills for one in marked if one.asked.k == 3
    )


# wordings


def test_wordings_fill_and_find():
    wording = Wording()
    first = wording.fill(wording.ask, asked(3), RULES)
    assert "2 sentences" in first
    assert all(skill.definition in first for skill in CHECKED[:3])
    assert wording.text("**Answer:** The text.\n\n**Explanation:** why") == "The text."
    assert wording.text("no marks at all") == "no marks at all"
    assert wording.text("Answer: one\nAnswer: two Explanation: x") == "two"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"revise": "x"}, "a text 'ask'"),
        ({"ask": "{skils}"}, "unknown field {skils}; did you mean 'skills'"),
        ({"ask": "x", "asks": "y"}, "unknown key 'asks'"),
        ({"ask": "x {"}, "'ask'"),
    ],
)
def test_wrong_wordings(tmp_path, content, why):
    file = tmp_path / "w.json"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=re.escape(why)):
        read_wording(str(file))


# end to end: a student and a grader behind one real server


def known_student(messages, body):
    """Shows 'lipogram in u' and 'words by fives' always; what else it is asked, never."""
    return "Answer: The garden rests in rain.\nExplanation: five words."


def by_checks(messages, body):
    """A grader that reads the prompt and gives exact points, once in three in prose."""
    prompt = messages[0]["content"]
    text = prompt.split('"""')[1].strip()
    if body["seed"] % 3 == 2:
        return "I liked it very much."
    points = []
    for line in re.findall(r"^\d+\. (.*)$", prompt, re.MULTILINE):
        name = line.removeprefix("Correctly illustrates ")
        skill = next((one for one in SKILLS if one.name == name), None)
        topic = next((one for one in TOPICS if line == f"Pertains to {one.name}"), None)
        if skill is not None:
            points.append(int(bool(skill.check and skill.check(text))))
        else:
            points.append(1 if topic is None else int(topic.on_topic(text)))
    return "\n".join(f"{n}. Point earned: {point}" for n, point in enumerate(points, 1))


def both(messages, body):
    return (by_checks if body["model"] == "grader" else known_student)(messages, body)


SMALL = {
    "only": ["lipogram in u", "words by fives", "palindrome"],
    "only_topics": ["gardening"],
    "k": [1, 2],
    "combinations": 6,
}


def transcripts(out):
    text = (out / "student--skillmix/transcripts.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def run_at(server, out, **settings):
    given = {"student": {"url": server.url, "model": "student", "backoff": 0.0, "attempts": 2}}
    return deltaloom.measure("skillmix", out=out, **{**SMALL, **given, **settings})


def test_exact_grading_of_an_endpoint(tmp_path):
    with serving(both) as server:
        found = run_at(server, tmp_path / "out")
        turns = Counter(len(body["messages"]) for body in server.bodies)
    whole = found["student--skillmix"]
    assert whole.n == 12
    rows = transcripts(tmp_path / "out")
    for row in rows:
        right = "palindrome" not in row["skills"]
        assert row["full_marks"] == right
        assert whole.items[row["id"]] == right
        assert row["text"] == "The garden rests in rain."
        assert [turn["role"] for turn in row["conversation"]] == ["user", "assistant"] * 2
    assert found["student--skillmix.k1"].value == pytest.approx(4 / 6)
    document = json.loads((tmp_path / "out/student--skillmix/skillmix.json").read_text())
    assert set(document["by_k"]["2"]) == set(METRICS)
    cells = {(row["skill"], row["k"]): row["value"] for row in document["by_skill"]}
    assert cells["palindrome", 2] == 0.0
    assert cells["lipogram in u", 1] == 1.0
    record = Run.read(tmp_path / "out")
    # equal conversations are one call; each new one has two turns
    assert record["cost"]["endpoint_calls"] == sum(turns.values())
    assert turns[1] == turns[3]
    assert record["results"]["estimates"]["student/skillmix.k2/full_marks"]["n"] == 6


def test_a_grader_is_read_by_majority_and_held_against_the_checks(tmp_path):
    with serving(both) as server:
        exact = run_at(server, tmp_path / "exact")
        graded = run_at(server, tmp_path / "graded", grader={"url": server.url, "model": "grader"})
    # seeds 0, 1 and 2: the third grading of each text is prose, and is missing
    assert graded["student--skillmix"].items == exact["student--skillmix"].items
    notes = Run.read(tmp_path / "graded")["notes"]
    assert notes["student--skillmix.unread_gradings"] == 12
    assert notes["student--skillmix.ungraded_texts"] == 0
    assert notes["student--skillmix.grader_agreement"] == 1.0
    assert notes["student--skillmix.grader_checked_points"] == 18


def test_failures_are_missing_and_never_zero(tmp_path):
    def prose_or_both(messages, body):
        if body["model"] == "grader" and "palindrome" in messages[0]["content"]:
            return "What a lovely text!"
        return both(messages, body)

    with serving(prose_or_both) as server:
        found = run_at(
            server, tmp_path / "out", grader={"url": server.url, "model": "grader"}, gradings=1
        )
    whole = found["student--skillmix"]
    assert whole.value == 1.0
    assert whole.n + whole.missing == 12
    assert whole.missing > 0
    rows = transcripts(tmp_path / "out")
    lost = [row for row in rows if "palindrome" in row["skills"]]
    assert len(lost) == whole.missing
    assert all(row["failure"] == "grader: no grading could be read" for row in lost)


REFUSES = "I'm sorry, but I can't help with that."


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        (REFUSES, True),
        ("I cannot assist with this request.", True),
        ("As an AI model, I am unable to write that.", True),
        ("Unfortunately, I won't provide it.", True),
        ("I cannot sleep, said the moon.", False),
        ("I'm sorry about the rain, but the garden needs it.", False),
        (f"Answer: {REFUSES}", False),
    ],
)
def test_refusals_in_prose(text, yes):
    assert refuses(Wording(), text) == yes


def test_a_refusal_and_prose_are_asked_again(tmp_path):
    """The student refuses its first seed and always when told to revise 'palindrome'."""

    def moody(messages, body):
        if body["model"] == "grader":
            again = body["seed"] >= 300
            return by_checks(messages, {"seed": 0}) if again else "A nice text."
        if body["seed"] < 500 or "palindrome" in messages[0]["content"]:
            return REFUSES
        return known_student(messages, body)

    with serving(moody) as server:
        grader = {"url": server.url, "model": "grader"}
        found = run_at(server, tmp_path / "out", grader=grader, gradings=1, k=[1])
    one = found["student--skillmix"]
    assert (one.value, one.n, one.missing) == (1.0, 4, 2)
    rows = transcripts(tmp_path / "out")
    lost = [row["failure"] for row in rows if row["text"] is None]
    assert lost == [f"student: refused: {REFUSES}"] * 2
    notes = Run.read(tmp_path / "out")["notes"]
    assert notes["student--skillmix.unread_gradings"] == 0


def test_nothing_answers(tmp_path):
    with serving(both) as server:
        url = server.url
    student = {"url": url, "model": "student", "backoff": 0.0, "attempts": 1}
    with pytest.raises(InputError, match="no connection"):
        deltaloom.measure("skillmix", out=tmp_path / "out", student=student, **SMALL)


def test_an_interrupted_measurement_pays_nothing_twice(tmp_path):
    with serving(both) as server:
        whole = run_at(server, tmp_path / "whole")
        calls = len(server.bodies)
    with serving(both) as server:
        settings = {"url": server.url, "model": "student", "concurrency": 1}
        server.stop_after = 5
        with pytest.raises(InputError, match="HTTP 401"):
            run_at(server, tmp_path / "out", student=settings)
        server.stop_after = None
        found = run_at(server, tmp_path / "out", student=settings)
        assert len(server.bodies) == calls + 1  # the one that was refused
    assert found["student--skillmix"].items == whole["student--skillmix"].items
    assert Run.read(tmp_path / "out")["cost"]["endpoint_calls"] == calls


def test_what_is_asked_twice_is_drawn_twice(tmp_path):
    with serving(both) as server:
        run_at(server, tmp_path / "warm", k=[1], only=["words by fives"], combinations=3)
        assert len({(body["seed"], len(body["messages"])) for body in server.bodies}) == 6
        before = len(server.bodies)
        run_at(server, tmp_path / "cold", k=[1], only=["words by fives"], combinations=3,
               temperature=0.0)  # fmt: skip
        # the likeliest text is the same one, and is paid for once
        assert len(server.bodies) - before == 2


def test_seen_rows_and_copies(tmp_path):
    rows = [
        {"prompt": "p", "completion": "The garden  rests in rain.",
         "skills": ["words by fives", "lipogram in u"], "topic": "gardening"},
    ]  # fmt: skip
    (tmp_path / "seen.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with serving(both) as server:
        run_at(server, tmp_path / "out", seen=[str(tmp_path / "seen.jsonl")], k=[2])
    document = json.loads((tmp_path / "out/student--skillmix/skillmix.json").read_text())
    rows = transcripts(tmp_path / "out")
    assert all("palindrome" in row["skills"] for row in rows)
    assert document["novelty"]["2"] == {"possible": 3, "seen": 0}
    assert document["counts"]["copied_texts"] == 6


def test_rounds_mean_and_best(tmp_path):
    def fickle(messages, body):
        # the second round's seed is another one
        text = "The garden rests in rain." if body["seed"] % APART else "No."
        return f"Answer: {text}"

    with serving(fickle) as server:
        found = run_at(server, tmp_path / "out", rounds=2, k=[1], only=["words by fives"],
                       combinations=3)  # fmt: skip
    assert found["student--skillmix"].value == 0.5
    document = json.loads((tmp_path / "out/student--skillmix/skillmix.json").read_text())
    assert document["by_k"]["1"]["best_full_marks"]["value"] == 1.0


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"k": [4]}, "only 3 skills"),
        ({"only": ["metaphors"]}, "did you mean 'metaphor'"),
        ({"only_topics": ["garden"]}, "did you mean 'gardening'"),
        ({"skills": "none.json"}, "no such file"),
        ({"only": ["metaphor"], "k": [1]}, "only 0 skills"),
    ],
)
def test_wrong_input(tmp_path, settings, why):
    given = {"student": "http://127.0.0.1:9/v1#m", **SMALL, **settings}
    with pytest.raises(InputError, match=why):
        deltaloom.measure("skillmix", out=tmp_path / "o", **given)


def test_who_is_measured(tmp_path):
    with pytest.raises(InputError, match="base= is missing"):
        deltaloom.measure("skillmix", out=tmp_path / "o")
    rows = Examples([parse("f line 1", "f", {"prompt": "x"})])
    with pytest.raises(InputError, match="f line 1: needs 'skills'"):
        list(listed(rows, SKILLS, TOPICS))


def test_the_graders_prompt_has_the_rubric():
    prompt = grading(asked(2), RULES, "The text.")
    assert prompt.count("\n1. Correctly illustrates") == 1
    assert "5. At most 1 sentence\n" in prompt


def test_two_steps_of_a_recipe_keep_their_names(tmp_path):
    with serving(both) as server:
        asked = {"method": "skillmix", "student": f"{server.url}#student", **SMALL, "k": [1]}
        steps = [{"measure": {**asked, "name": name}} for name in ("first", "second")]
        record = deltaloom.run({"steps": steps}, out=tmp_path / "out")
    assert {key for key in record["results"]["estimates"] if "k1" in key} == {
        "student/first.k1/full_marks",
        "student/second.k1/full_marks",
    }
    assert (tmp_path / "out/first/student--first/skillmix.json").exists()
