"""The section about skills: every cell of the result is on the page, and texts to read."""

import json
import re

import pytest
from chat_server import serving

import deltaloom
from deltaloom.report.composition import compositions
from deltaloom.report.page import render
from deltaloom.report.reading import read_runs


def student(messages, body):
    """Two of the three skills, on topic, in five words of which two are a tag."""
    return "Answer: The <i>garden</i> rain."


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("skills") / "mix"
    with serving(student) as server:
        deltaloom.measure(
            "skillmix", student=f"{server.url}#m", out=out, k=[1, 2], combinations=6,
            only=["lipogram in u", "words by fives", "palindrome"], only_topics=["gardening"],
        )  # fmt: skip
    return out


def test_the_heat_map_has_every_cell(measured):
    (found,) = compositions(read_runs([measured]))
    document = json.loads((measured / "m--skillmix/skillmix.json").read_text())
    assert found.ks == (1, 2)
    cells = {(name, k) for name, row in found.rows for k, cell in zip(found.ks, row, strict=True)
             if cell is not None}  # fmt: skip
    assert cells == {(row["skill"], row["k"]) for row in document["by_skill"]}
    assert [cell.n for cell in found.full] == [6, 6]
    assert {one.text for one in found.good} == {"The <i>garden</i> rain."}
    assert all(one.lost for one in found.bad)
    cells = {
        cell.value for name, row in found.rows for cell in row if name == "palindrome" and cell
    }
    assert cells == {"0.00"}


def test_the_page_shows_it_and_escapes(measured):
    page = render(read_runs([measured]))
    section = page[page.index('<section id="skills"') : page.index('<section id="how"')]
    for name in ("lipogram in u", "words by fives", "palindrome"):
        assert f'<th scope="row">{name}</th>' in section
    assert "The &lt;i&gt;garden&lt;/i&gt; rain." in section
    assert "<i>garden" not in section
    assert len(re.findall(r'<td class="n h\d+">', section)) >= 4
    assert "style=" not in section


def test_a_damaged_result_is_said(measured, tmp_path):
    import shutil

    copy = tmp_path / "mix"
    shutil.copytree(measured, copy)
    (copy / "m--skillmix/skillmix.json").write_text("{")
    (found,) = compositions(read_runs([copy]))
    assert "cannot be read" in found.problem
    assert "cannot be read" in render(read_runs([copy]))
