"""The section about visual concepts: cells, the grader, pictures on the page, and damage."""

import base64
import json
import shutil

import pytest

import deltaloom
from deltaloom.report.concepts import LARGEST, concepts
from deltaloom.report.page import render
from deltaloom.report.reading import read_runs


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("concepts") / "mix"
    deltaloom.measure("conceptmix", out=out, images="renderer", k=[1, 3], n=6, noise=0.2, audit=10)
    return out


@pytest.fixture
def copied(measured, tmp_path):
    """A copy to damage, and its model's folder."""
    copy = tmp_path / "mix"
    shutil.copytree(measured, copy)
    return copy, copy / "renderer--conceptmix"


def test_every_cell_is_that_of_the_result(measured):
    (found,) = concepts(read_runs([measured]))
    document = json.loads((measured / "renderer--conceptmix/conceptmix.json").read_text())
    assert found.ks == (1, 3)
    assert [name for name, _ in found.totals] == ["Full marks", "Concepts shown"]
    assert [cell.n for cell in found.totals[0][1]] == [6, 6]
    # The first object and k more: 12 and 24 answers.
    assert [cell.n for cell in found.totals[1][1]] == [12, 24]
    by_category = {name: (cells, whole) for name, cells, whole in found.rows}
    assert {*by_category} == {*document["categories"]}
    for name, (cells, whole) in by_category.items():
        assert sum(cell.n for cell in cells if cell) == whole.n
        assert whole.value == f"{document['categories'][name]['value']:.2f}"
    shown = dict(found.grader)
    error = document["grader"]["audit"]["error"]
    assert float(shown["error on drawn scenes"].value) == pytest.approx(error["value"], abs=0.01)
    assert "concept fraction corrected for it" in shown


def test_pictures_are_those_of_both_kinds(measured):
    (found,) = concepts(read_runs([measured]))
    answers = {
        row["id"]: row["answers"]
        for row in map(
            json.loads, (measured / "renderer--conceptmix/answers.jsonl").read_text().splitlines()
        )
    }
    shown = dict(found.pictures)
    assert {*shown} == {"Full marks", "Not all"}
    for heading, pictures in shown.items():
        for picture in pictures:
            assert all(answers[picture.id]) == (heading == "Full marks")
            given = ["yes" if one else "no" for one in answers[picture.id]]
            assert [said for _, said in picture.answers] == given
            file = measured / "renderer--conceptmix/images" / f"{picture.id}.png"
            assert base64.b64decode(picture.data.partition(",")[2]) == file.read_bytes()
    assert {len(one.answers) for one in shown["Not all"]} == {2, 4}  # of either k


def test_the_page_shows_it(measured):
    page = render(read_runs([measured]))
    section = page[page.index('<section id="concepts"') : page.index('<section id="how"')]
    assert '<th scope="row">Full marks</th>' in section
    assert '<img src="data:image/png;base64,' in section
    assert "error on drawn scenes" in section
    assert "style=" not in section


def test_large_missing_and_strange_pictures(copied):
    copy, folder = copied
    files = sorted((folder / "images").iterdir())
    for file in files[1:]:
        file.unlink()
    files[0].write_bytes(b"x" * (LARGEST + 1))
    (found,) = concepts(read_runs([copy]))
    ((_, (picture,)),) = found.pictures
    assert (picture.data, picture.file) == (None, f"images/{files[0].name} (195 KiB)")
    files[0].write_text("<svg onload='x'>")
    (found,) = concepts(read_runs([copy]))
    assert found.pictures[0][1][0].data is None
    outside = {"id": "../../run", "prompt": "p", "questions": ["q"]}
    (folder / "prompts.jsonl").write_text(json.dumps(outside) + "\n")
    (folder / "answers.jsonl").write_text(json.dumps({"id": "../../run", "answers": [True]}) + "\n")
    (copy / "run.png").write_bytes(b"\x89PNG")
    assert concepts(read_runs([copy]))[0].pictures == ()


def test_a_damaged_result_is_said(copied):
    copy, folder = copied
    (folder / "conceptmix.json").write_text('{"k": {"1": 3}, "categories": {}}')
    (found,) = concepts(read_runs([copy]))
    assert "cannot be read" in found.problem
    assert "cannot be read" in render(read_runs([copy]))
