"""The section about likeness: layers of every model, numbers beside the lines, damaged files."""

from html.parser import HTMLParser

import fake_runs

from deltaloom.core.atomic import write_json
from deltaloom.core.run import Run
from deltaloom.report.likeness import likenesses
from deltaloom.report.page import render
from deltaloom.report.reading import read_runs

LAYERS = ["embeddings", "block 0", "block 1", "norm"]


def compared(home, labels=("code", "math"), depth=4):
    """A `measure cka` step of specialists with the base, on one file of rows."""
    folder = home / "alike"
    settings = {"name": "alike", "method": "cka", "base": fake_runs.BASE, "seed": 3}
    settings |= {"deltas": [f"/runs/{label}" for label in labels], "tasks": ["/data/rows.jsonl"]}
    with Run.open(folder, {"steps": [{"measure": settings}]}, {"base": "b" * 16}, 3) as run:
        for place, label in enumerate(labels):
            layers = [
                {"layer": name, "cka": 0.9 - 0.1 * i - 0.05 * place, "low": 0.4, "high": 0.95}
                for i, name in enumerate(LAYERS[:depth])
            ]
            layers[0] |= {"cka": None, "low": None, "high": None}  # all rows end alike
            part = run.part(f"{label}--rows").folder
            content = {"value": 0.75 - 0.05 * place, "layers": layers, "weights": None}
            write_json(part / "cka.json", content)
            one = fake_runs.answers(label, "rows", "cka", 20)
            write_json(part / "estimate.json", one.to_json())
        run.finish(estimates={}, comparisons={})
    fake_runs.settle(folder)
    return folder


def test_layers_are_read_in_order(tmp_path):
    (found,) = likenesses(read_runs([compared(tmp_path, labels=("math", "code"))]))
    assert (found.task, found.other, found.layers) == ("rows", "the base", LAYERS)
    assert [line.label for line in found.lines] == ["math", "code"]
    assert found.lines[0].series.points == [(1, 0.8), (2, 0.7), (3, 0.9 - 0.1 * 3)]


def test_the_page_has_the_lines_and_the_numbers(tmp_path):
    page = render(read_runs([compared(tmp_path)]))
    section = page[page.index('id="likeness"') : page.index('id="how"')]
    assert section.count("<polyline") == 2
    assert "CKA with the base by layer on rows, of code, math" in section
    assert '<th scope="row">block 0</th><td class="n">0.80 [0.40, 0.95]</td>' in section
    assert section.count('<td class="n">unknown</td>') == 2  # embeddings, of both
    assert '<td class="n">0.750</td><td class="n">0.700</td>' in section
    assert '<a href="#likeness">' in page
    HTMLParser().feed(page)


def test_a_damaged_file_is_said_and_the_rest_shown(tmp_path):
    folder = compared(tmp_path)
    (folder / "code--rows" / "cka.json").write_text('{"layers": [{"cka": 1}]}', encoding="utf-8")
    section = render(read_runs([folder]))
    assert "code: code--rows/cka.json cannot be read" in section
    assert section.count("<polyline") == 1
    (folder / "math--rows" / "cka.json").write_text("[", encoding="utf-8")
    assert "<polyline" not in render(read_runs([folder]))


def test_no_section_where_nothing_was_compared(tmp_path):
    fake_runs.measure(tmp_path / "m", ["base"], ["test-home"], "accuracy")
    assert 'id="likeness"' not in render(read_runs([tmp_path / "m"]))
