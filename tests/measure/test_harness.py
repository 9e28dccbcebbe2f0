"""lm-eval's tasks as Estimates, against lm-eval's own numbers; skipped where it is absent."""

import json
import subprocess
import sys

import pytest
import tiny

import deltaloom
from deltaloom.core.errors import InputError
from deltaloom.measure.harness import means
from deltaloom.measure.lm_eval_tasks import FOLDER

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


def sample(i, **values):
    return {"doc_id": i, "filter": "none", "metrics": list(values), **values}


def test_means_and_others():
    samples = [sample(0, acc=1.0, ppl=[3.0, 2]), sample(1, acc=0.0, ppl=[1.0, 1])]
    found = means({"acc,none": 0.5, "ppl,none": 1.8}, samples)
    assert found == {"acc": {"0": 1.0, "1": 0.0}, "": 1}
    assert means({"acc,none": 0.7}, samples)[""] == 2  # no mean of these items
    twice = [*samples, *({**one, "filter": "strict"} for one in samples)]
    assert means({"acc,none": 0.5, "acc,strict": 0.5}, twice)["acc"] == {"0": 1.0, "1": 0.0}
    assert means({}, []) == {}


def test_the_folder_that_lm_eval_is_given():
    command = [sys.executable, "-m", "deltaloom.measure.lm_eval_tasks"]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    assert said.stdout.strip() == str(FOLDER)
    assert (FOLDER / "deltaloom_skillmix.yaml").exists()


def test_without_lm_eval_or_names(tmp_path, monkeypatch):
    base = str(tiny.base_in(tmp_path / "base"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "deltaloom\[harness\]"'):
        deltaloom.measure("harness", base=base, suite=["x"], out=tmp_path / "o")


def test_against_lm_evals_own_numbers(tmp_path):
    pytest.importorskip("lm_eval")
    base = str(tiny.base_in(tmp_path / "base"))
    rows = tmp_path / "rows.jsonl"
    with open(rows, "w") as file:
        for i in range(12):
            who = tiny.PEOPLE[i % 6]
            row = {"prompt": f"where lives {who} ?", "choices": list(tiny.CITIES), "answer": i % 3}
            file.write(json.dumps(row) + "\n")
    (tmp_path / "mine").mkdir()
    for name in ("cities", "towns"):
        (tmp_path / f"mine/{name}.yaml").write_text(TASK.format(name=name, rows=rows))
    given = {"base": base, "include": [str(tmp_path / "mine")], "out": tmp_path / "o"}
    found = deltaloom.measure("harness", suite=["cities", "towns"], **given)
    raw = json.loads((tmp_path / "o/base--harness/harness.json").read_text())
    for name in ("cities", "towns"):
        one = found[f"base--harness.{name}"]
        assert (one.metric, one.n) == ("acc", 12)
        assert one.value == pytest.approx(raw[name][name]["acc,none"])
        norm = found[f"base--harness.{name}.acc_norm"]
        assert norm.value == pytest.approx(raw[name][name]["acc_norm,none"])
    assert found["base--harness"].n == 24
    assert found["base--harness"].cost["forward_tokens"] > 0
    with pytest.raises(InputError, match="did you mean 'cities'"):
        deltaloom.measure("harness", suite=["citties"], **{**given, "out": tmp_path / "p"})
    with pytest.raises(InputError, match="no task is named"):
        deltaloom.measure("harness", **{**given, "out": tmp_path / "q"})
