"""The section about judges: its tables, its disagreements, and damaged records."""

import json
from html.parser import HTMLParser

import fake_runs
import pytest

from deltaloom.core.run import Run
from deltaloom.measure._judge_report import accuracy
from deltaloom.measure._rulings import rule
from deltaloom.measure._verdicts import Opinion
from deltaloom.measure.judge import Judge
from deltaloom.report.judging import judgings
from deltaloom.report.page import render
from deltaloom.report.reading import read_runs


class Shorter:
    """A judge that takes the shorter response."""

    cut = 0

    def ask(self, questions, run):
        found = []
        for one in questions:
            a, b = (len(line) for line in one.prompt.split("\n") if line.startswith("response "))
            found.append(Opinion({"A": 0.9, "B": 0.1} if a < b else {"A": 0.2, "B": 0.8}))
        return found


def rows(n=30):
    return [
        {
            "prompt": f"<i>task {k}</i>",
            "chosen": "x" * (3 if k % 3 else 9),
            "rejected": "y" * 6,
            "subset": "hep-python" if k % 2 else "hep-go",
            "chosen_model": "good",
            "rejected_model": "poor",
        }
        for k in range(n)
    ]


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """A finished step that measured a judge."""
    monkeypatch.setattr(Judge, "_asked", lambda *_: Shorter())
    from deltaloom.recipe.execute import run_step
    from deltaloom.recipe.parsing import parse_step

    tasks = tmp_path / "pairs.json"
    tasks.write_text(json.dumps(rows()))
    values = {
        "method": "judge", "tasks": str(tasks), "judge": "http://localhost:1/v1#m",
        "verdict": "generated", "probes": ["bandwagon"],
    }  # fmt: skip
    run_step(parse_step("measure", values, "step"), tmp_path / "out")
    return tmp_path / "out"


def test_tables_and_disagreements(judged):
    (found,) = judgings(read_runs([judged]))
    assert found.label == "measure-judge: m on pairs"
    assert dict(found.rates)["accuracy"].value == "0.67"
    assert dict(found.biases)["First place wins both times"].value == "0.000"
    assert [name for name, _ in found.subsets] == ["hep-go", "hep-python", "rewardbench/reasoning"]
    assert [(model, mine.value, theirs.value) for model, mine, theirs in found.wins] == [
        ("good", "0.67", "1.000"),
        ("poor", "0.33", "0.000"),
    ]
    assert (found.differing, len(found.disagreements)) == (10, 10)
    first = found.disagreements[0]
    assert (first.people, first.judge, first.sure) == ("A", "B", "85 %")


def test_the_page_says_it_and_escapes_texts(judged):
    page = render(read_runs([judged]))
    section = page[page.index('id="judges"') : page.index('id="how"')]
    assert "People say A, the judge B (85 %): &lt;i&gt;task 0" in section
    assert "<i>task" not in section
    assert section.count("<details") == 10
    HTMLParser().feed(page)
    assert '<a href="#judges">' in page


def test_damaged_records_are_said_and_others_have_no_section(judged, tmp_path):
    (judged / "m--pairs" / "judge.json").write_text("{torn")
    assert "The judgements cannot be read" in render(read_runs([judged]))
    fake_runs.tune(tmp_path / "plain", ["pool.jsonl"], 1e5)
    assert 'id="judges"' not in render(read_runs([tmp_path / "plain"]))


def test_the_value_is_that_of_the_rulings(judged, tmp_path):
    from deltaloom.core.examples import Examples, parse
    from deltaloom.measure._judgements import judgements

    data = Examples(parse(f"p row {k}", "p", dict(row)) for k, row in enumerate(rows()))
    with Run.open(tmp_path / "again", {"steps": []}, {}, 0) as run:
        found = rule(judgements(data, [], False, False), Shorter(), run, orders="both")
    assert accuracy(found, None).value == pytest.approx(2 / 3)
