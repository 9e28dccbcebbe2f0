"""The section about labels: what it lists, counts and says without scripts."""

import json
import shutil
from html.parser import HTMLParser

import fake_runs
import pytest

from deltaloom.core.features import Features
from deltaloom.report.page import render
from deltaloom.report.reading import read_runs
from deltaloom.report.suspicion import SHOWN, suspicions


def judged(home, rows=900, predicted=True):
    """A tune step with judgements: every third row is below one half."""
    pool = fake_runs.pool_rows(home, rows)
    folder = home / "skill"
    fake_runs.tune(folder, ["pool.jsonl"], 1e5, method="clear")
    scores = [0.4 * (i % 9) / 9 if i % 3 == 0 else 0.6 + 0.001 * (i % 300) for i in range(rows)]
    columns = {"loss": [3.0 - s for s in scores]}
    if predicted:
        columns["predicted"] = [f"<b>class {i % 4}</b>" for i in range(rows)]
    Features.from_scores(folder / "scores", pool.ids, scores, about={}, columns=columns)
    below = sorted((i for i in range(rows) if scores[i] < 0.5), key=lambda i: scores[i])
    shown = {name: dict(zip(pool.ids, own, strict=True)) for name, own in columns.items()}
    shown["score"] = dict(zip(pool.ids, scores, strict=True))
    pool.take(below).write(folder / "suspicious.jsonl", shown)
    return folder


@pytest.mark.parametrize("predicted", [True, False])
def test_the_most_suspicious_rows_are_listed(tmp_path, predicted):
    folder = judged(tmp_path, predicted=predicted)
    (found,) = suspicions(read_runs([folder]))
    assert (found.below, found.rows, len(found.suspects)) == (300, 900, SHOWN)
    assert sum(a for a, _ in found.counts) == 300
    assert sum(b for _, b in found.counts) == 600
    scores = [one.row.score for one in found.suspects]
    assert scores == sorted(scores)
    assert found.suspects[0].loss == pytest.approx(3.0 - scores[0])
    assert bool(found.suspects[0].predicted) == predicted


def test_the_page_says_it_without_scripts(tmp_path):
    page = render(read_runs([judged(tmp_path)]))
    section = page[page.index('id="labels"') : page.index('id="how"')]
    assert "300 of 900 labels are more likely wrong than right (33 %)" in section
    assert "The 200 most suspicious of 300 rows; 100 more are in suspicious.jsonl" in section
    assert section.count("<tr><td") == SHOWN
    assert "<b>class" not in section
    assert "&lt;b&gt;class" in section
    assert "<script" not in section
    assert "more likely wrong, " in section  # what the chart's bars say
    HTMLParser().feed(page)
    assert '<a href="#labels">' in page


def test_no_section_without_judgements(tmp_path):
    fake_runs.tune(tmp_path / "plain", ["pool.jsonl"], 1e5)
    page = render(read_runs([tmp_path / "plain"]))
    assert 'id="labels"' not in page


def test_nothing_suspicious_and_damaged_judgements_are_said(tmp_path):
    folder = judged(tmp_path, rows=30)
    (folder / "suspicious.jsonl").write_text("")
    assert "No label is more likely wrong than right." in render(read_runs([folder]))
    shutil.rmtree(folder / "scores")
    page = render(read_runs([folder]))
    assert "The judgements cannot be read" in page
    (folder / "suspicious.jsonl").write_text(json.dumps({"id": "x", "score": None}) + "\n{torn")
    assert suspicions(read_runs([folder]))[0].below == 1
