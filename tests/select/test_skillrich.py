"""Composed training rows: only full marks, and nothing that is held out."""

import json
from collections import Counter

import pytest
from chat_server import serving

import deltaloom
from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.run import Run
from deltaloom.lab import skills as world
from deltaloom.lab.skill_files import contents, tokenizer, write_skill_lab

HELD_OUT = [f"[{name}]" for name in world.HELD_OUT]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    files = {}
    for name, content in zip(("skills", "topics", "wording"), contents(), strict=True):
        files[name] = str(folder / f"{name}.json")
        (folder / f"{name}.json").write_text(json.dumps(content))
    rows = world.compose([1, 2, 3], 400, 3, wrong=0.25)
    pool = folder / "pool.jsonl"
    pool.write_text("".join(json.dumps({"id": f"p{n}", **r}) + "\n" for n, r in enumerate(rows)))
    return files, pool, rows


def test_a_pool_keeps_full_marks_of_what_is_not_held_out(lab, tmp_path):
    files, pool, rows = lab
    kept = deltaloom.select(
        "skillrich", pool=pool, out=tmp_path / "o", k=[2, 3], without=HELD_OUT, **files
    )
    # the oracle: rows that the composer left a skill out of are shorter than their like
    from deltaloom.measure._skills import read_skills

    checks = {skill.name: skill.check for skill in read_skills(files["skills"])[0]}
    wanted = [
        f"p{n}"
        for n, row in enumerate(rows)
        if len(row["skills"]) in (2, 3)
        and not set(row["skills"]) & set(HELD_OUT)
        and all(checks[name](row["completion"].strip()) for name in row["skills"])
    ]
    assert kept.ids == wanted
    assert 0 < len(wanted) < len(rows) / 2
    split = json.loads((tmp_path / "o/split.json").read_text())
    assert split["held_out_skills"] == [
        f"[{name}]" for name in world.NAMES if name in world.HELD_OUT
    ]
    assert len(split["skills"]) == 15
    lines = (tmp_path / "o/transcripts.jsonl").read_text().splitlines()
    assert len(lines) == len(rows)
    notes = Run.read(tmp_path / "o")["notes"]
    assert 0 < notes["rows_without_full_marks"] < 0.3 * len(rows)


def test_a_pool_gives_at_most_count_at_random(lab, tmp_path):
    files, pool, _ = lab
    one, same, other = (
        deltaloom.select("skillrich", pool=pool, out=tmp_path / f"o{n}", count=20, seed=s, **files)
        for n, s in enumerate((0, 0, 1))
    )
    assert one.ids == same.ids != other.ids
    assert len(one) == 20
    assert set(one.sources()) == {"k1", "k2", "k3"}


def writer(messages, body):
    """The lab's composer behind an endpoint; one text in three is empty of skills."""
    import random

    *tokens, _ = messages[0]["content"].split()
    topic, names = tokens[0][1:-1], [token[1:-1] for token in tokens[1:]]
    rng = random.Random(messages[0]["content"])
    return world.write(topic, names if rng.random() < 0.67 else [], rng)


def test_an_endpoint_writes_and_full_marks_are_kept(lab, tmp_path):
    files, _, _ = lab
    with serving(writer) as server:
        given = {"writer": f"{server.url}#w", "count": 40, "k": [2, 3], "without": HELD_OUT}
        kept = deltaloom.select("skillrich", out=tmp_path / "o", form="prompt", **given, **files)
        messages = deltaloom.select("skillrich", out=tmp_path / "m", **given, **files)
    assert len(kept) == 40
    for row in kept:
        names = row.extra["skills"]
        assert len(names) in (2, 3)
        assert not set(names) & set(HELD_OUT)
        assert row.prompt == f"{row.extra['topic']} {' '.join(names)} =>"
    assert Counter(row.source for row in kept).keys() == {"k2", "k3"}
    assert [row.messages[1]["content"] for row in messages] == [
        row.completion.strip() for row in kept
    ]
    record = Run.read(tmp_path / "o")
    assert record["notes"]["asked_texts"] > 40
    assert record["cost"]["endpoint_calls"] <= record["notes"]["asked_texts"]


def test_what_ends_in_a_sentence(lab, tmp_path):
    files, pool, _ = lab
    with pytest.raises(InputError, match="nobody to write"):
        deltaloom.select("skillrich", out=tmp_path / "a", **files)
    with pytest.raises(WorkError, match="none of 400 rows is kept"):
        deltaloom.select("skillrich", pool=pool, k=[7], out=tmp_path / "b", **files)
    with (
        serving(lambda messages, body: "nothing") as server,
        pytest.raises(WorkError, match="none earned full marks"),
    ):
        deltaloom.select(
            "skillrich", writer=f"{server.url}#w", out=tmp_path / "c", count=2, tries=2, **files
        )
    (tmp_path / "plain.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(InputError, match=r"plain.jsonl line 1: needs 'skills'"):
        deltaloom.select("skillrich", pool=tmp_path / "plain.jsonl", out=tmp_path / "d", **files)


def test_the_lab_of_skills_is_written_whole(tmp_path):
    first = write_skill_lab(tmp_path / "a", 1, rows=30, texts=60)
    second = write_skill_lab(tmp_path / "b", 1, rows=30, texts=60)
    for name, path in first.items():
        files = [path] if path.is_file() else sorted(path.iterdir())
        for file in files:
            twin = second[name] if path.is_file() else second[name] / file.name
            assert file.read_bytes() == twin.read_bytes(), file
    words = tokenizer()
    row = json.loads(first["pool"].read_text().splitlines()[0])
    ids = words(row["prompt"] + row["completion"])["input_ids"]
    assert words.unk_token_id not in ids
    found = deltaloom.measure(
        "skillmix", out=tmp_path / "m", base=str(first["base"]), k=[1], combinations=4,
        max_new_tokens=8, **{key: str(first[key]) for key in ("skills", "topics", "wording")},
    )  # fmt: skip
    assert found["base--skillmix"].n == 4
