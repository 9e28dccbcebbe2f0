"""Few-shot tasks: right by the world, other answers in other tasks, nobody in two parts."""

import json

from deltaloom.lab.few_shot import draw_tasks, write_few_shot
from deltaloom.lab.world import KINDS


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_right_and_words_and_people_of_new_tasks_are_new(world, tmp_path):
    paths = write_few_shot(tmp_path / "one", 3, learned=20, rows=12, new=3, shots=6, asked=70)
    learned = read(paths["tasks"])
    assert len({row["source"] for row in learned}) == 20
    assert len(learned) == 240
    parts = {"tasks": learned} | {key: read(path) for key, path in paths.items() if key != "tasks"}
    people: dict[str, set[str]] = {}
    words: dict[bool, set[str]] = {}
    ids = [row["id"] for part in parts.values() for row in part]
    assert len({*ids}) == len(ids)
    for key, part in parts.items():
        for row in part:
            attribute, word, _ = row["source"].split("-")
            said = row["prompt"].split()
            name = said[said.index("of") + 1]
            assert word in said
            people.setdefault(key.partition("-")[0], set()).add(name)
            words.setdefault(key == "tasks", set()).add(word)
            answer = row.get("completion") or row["choices"][row["answer"]]
            assert answer == f" {world.facts[name][attribute]}"
            if "choices" in row:
                assert [one.strip() for one in row["choices"]] in map(list, KINDS.values())
                assert row["cluster"] == name
    assert not words[True] & words[False]
    for one, other in (("tasks", "shots"), ("tasks", "test"), ("shots", "test")):
        assert not people[one] & people[other]
    again = write_few_shot(tmp_path / "two", 3, learned=20, rows=12, new=3, shots=6, asked=70)
    assert [p.read_bytes() for p in paths.values()] == [p.read_bytes() for p in again.values()]


def test_a_word_means_different_things_in_different_tasks():
    learned, new = draw_tasks(60, 6, 0)
    assert len({task.name for task in (*learned, *new)}) == 66
    meanings: dict[str, set[str]] = {}
    for task in learned:
        meanings.setdefault(task.word, set()).add(task.attribute)
    assert sum(len(own) > 1 for own in meanings.values()) > 10
