"""Every check against texts that have the skill and near misses that lack it."""

import json
import random

import pytest

from deltaloom.core.errors import InputError
from deltaloom.lab import skills as world
from deltaloom.measure._checks import CHECKS, check, sentences
from deltaloom.measure._skills import chosen, plausible, read_skills, read_topics

CASES = [
    ({"kind": "pattern", "pattern": r"\bif\b"}, "IF so", "wife"),
    ({"kind": "pattern", "pattern": r"\b[A-Z]{4,}\b", "case": True}, "STOP it", "Stop it"),
    ({"kind": "pattern", "pattern": "a", "count": 3}, "banana", "bandana"[:3] + "na"),
    ({"kind": "without", "pattern": "u"}, "a plain text", "a plUm"),
    ({"kind": "contains", "any": ["it seems", "maybe"]}, "So it seems.", "it all seems"),
    ({"kind": "contains", "any": ["a", "b"], "count": 2}, "b then a", "a then a"),
    ({"kind": "amount", "of": "words", "multiple": 5, "least": 1}, "one two three four five", "a"),
    ({"kind": "amount", "of": "sentences", "most": 1}, "One. two", "One. Two."),
    ({"kind": "amount", "of": "questions", "least": 1}, 'He said "Why?"', "Why."),
    ({"kind": "alliteration"}, "big brown bears", "big brown big"),
    ({"kind": "alliteration"}, "go Big, brown bears", "big old brown bears"),
    ({"kind": "same start", "of": "clauses", "length": 2}, "we go, we go on", "we go, we stay"),
    ({"kind": "same end", "of": "lines"}, "for gold\nin gold", "gold for\nin gold"),
    ({"kind": "rhyme"}, "at night\na light", "at night\nat night"),
    ({"kind": "acrostic", "least": 3}, "an\nbe\ncat", "an\nbe\ndog"),
    ({"kind": "acrostic", "word": "so"}, "sun\nover", "sun\nunder"),
    ({"kind": "repeated"}, "very very", "very, not very"),
    ({"kind": "repeated", "together": False, "times": 3}, "rain rain or rain", "a a a"),
    ({"kind": "chiasmus"}, "fruit daily, daily fruit", "fruit daily, fruit daily"),
    ({"kind": "palindrome"}, "at noon", "at moon"),
    ({"kind": "growing", "least": 3}, "I am the", "I am in"),
    ({"kind": "growing", "of": "numbers", "least": 3}, "1 then 2, 3.5", "1, 3, 2"),
    ({"kind": "total"}, "3 and 4 make 7", "3 and 4 make 8"),
    ({"kind": "total"}, "1,000 and 2.5 is 1002.5", "7 is 7"),
    ({"kind": "equation"}, "as 12 + 30 = 42.", "as 12 + 30 = 43"),
    ({"kind": "equation"}, "3 x 4=12", "3 - 4 = 1"),
    ({"kind": "json object"}, 'so {"a": {"b": 1}} is', "so {a: 1} is"),
    ({"kind": "json object", "least": 2}, '{"a": 1, "b": 2}', '{"a": 1}'),
    (
        {"kind": "grammar", "classes": {"N": ["cat"], "v": ["runs"]}, "pattern": "N+v"},
        "cat cat runs",
        "cat runs cat",
    ),
]


@pytest.mark.parametrize(("given", "yes", "no"), CASES)
def test_each_kind(given, yes, no):
    test = check(given, "here")
    assert test(yes)
    assert not test(no)
    assert not test("") or "most" in given


def test_every_kind_has_a_case():
    assert {given["kind"] for given, _, _ in CASES} == set(CHECKS)


def test_sentences_are_counted_as_people_do():
    assert len(sentences("Mr. Fox met Dr. Hen. They ate.")) == 2
    assert len(sentences('"Go!" she said. He went')) == 2
    assert len(sentences("It cost 3.50 in all, e.g. bread.")) == 1
    assert sentences("  ") == []


def test_the_packages_own_lists():
    skills, rules = read_skills(None)
    topics = read_topics(None)
    assert len(skills) == 46
    assert sum(skill.check is not None for skill in skills) == 28
    assert len(topics) == 30
    assert all(len(topic.words) >= 10 for topic in topics)
    assert [rules.limit(k) for k in (1, 2, 3, 5)] == [1, 1, 2, 4]
    # an example is no example of most others, or the points would say nothing
    tests = [skill for skill in skills if skill.check]
    for skill in tests:
        others = [one.example for one in skills if one is not skill]
        rate = sum(map(skill.check, others)) / len(others)
        assert rate < (0.75 if skill.name == "lipogram in u" else 0.4), skill.name


@pytest.mark.parametrize(
    "text", ["", "!!! ???", "<|end_story|>", "la la la la no", "........................ a"]
)
def test_nonsense_that_is_told(text):
    assert not plausible(text)


def test_names_and_categories():
    skills, _ = read_skills(None)
    assert {one.category for one in chosen(skills, ["lexical"], [])} == {"lexical"}
    assert len(chosen(skills, ["lexical"], ["palindrome"])) == 7
    with pytest.raises(InputError, match="did you mean 'palindrome'"):
        chosen(skills, [], ["palindrom"])


SKILL = {"name": "a", "definition": "d", "example": "e"}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[", "line 1: not JSON"),
        ([], "at least one entry"),
        ([3], "entry 1: must be an object"),
        ([{"name": "a", "definition": "d"}], "entry 1: 'example' must be a text"),
        ([{**SKILL, "chek": {}}], r"entry 1 \(a\): unknown key 'chek'; did you mean 'check'"),
        ([SKILL, SKILL], r"entry 2 \(a\): the name is there twice"),
        ([{**SKILL, "occurs": 2}], "occurs = 2"),
        ([{**SKILL, "check": {"kind": "patern"}}], "no check of kind 'patern'; did you mean"),
        ([{**SKILL, "check": {"kind": "pattern", "patern": "x"}}], "no parameter 'patern'"),
        ([{**SKILL, "check": {"kind": "pattern", "pattern": "("}}], "unterminated"),
        ([{**SKILL, "check": {"kind": "amount", "of": "word"}}], "no unit 'word'"),
        ([{**SKILL, "check": {"kind": "pattern"}}], "missing"),
        ([{**SKILL, "check": {"kind": "pattern", "pattern": "x"}}], "its own check|own check"),
        ({"skills": [SKILL], "length": {"unit": "pages"}}, "length must be"),
        ({"skills": [SKILL], "sense": {"kind": "no"}}, "sense: no check of kind 'no'"),
    ],
)
def test_wrong_files_name_the_place(tmp_path, content, why):
    file = tmp_path / "skills.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=why):
        read_skills(str(file))


def test_yaml_and_missing_files(tmp_path):
    file = tmp_path / "topics.yaml"
    file.write_text("- tea\n- {name: rain, words: [rain, wet]}\n")
    tea, rain = read_topics(str(file))
    assert tea.name == "tea"
    assert rain.on_topic("It was wet.")
    with pytest.raises(InputError, match="no such file"):
        read_topics(str(tmp_path / "none.json"))


def test_the_labs_writer_shows_what_it_says_and_nothing_else(tmp_path):
    """The oracle is the writer: exactly the skills that it was given are found."""
    (tmp_path / "s.json").write_text(json.dumps(world.skill_records()))
    (tmp_path / "t.json").write_text(json.dumps(world.topic_records()))
    skills, rules = read_skills(str(tmp_path / "s.json"))
    topics = {topic.name: topic for topic in read_topics(str(tmp_path / "t.json"))}
    known = set(world.vocabulary())
    rng = random.Random(4)
    for _ in range(300):
        names = rng.sample(world.NAMES, rng.randint(0, 8))
        topic = rng.choice(list(world.TOPICS))
        text = world.write(topic, names, rng)
        assert {one.name for one in skills if one.check(text)} == {f"[{name}]" for name in names}
        assert rules.sense(text)
        assert rules.short(text, max(len(names), 1))
        assert topics[f"<{topic}>"].on_topic(text)
        assert set(text.split()) <= known
        words = text.split()
        i = rng.randrange(len(words) - 1)
        if words[i] != words[i + 1]:
            words[i], words[i + 1] = words[i + 1], words[i]
            swapped = " ".join(words)
            # a swap leaves the grammar or, between equal classes, changes nothing
            assert not rules.sense(swapped) or len(swapped) == len(text)
