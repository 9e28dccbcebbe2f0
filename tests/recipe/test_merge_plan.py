"""`plan` of merge steps: what headers say, without a weight loaded or a byte written."""

import json
import shutil

import peft
import pytest
import tiny
from safetensors.torch import load_file, save_file

import deltaloom
from deltaloom.cli.main import app
from deltaloom.core.base import Base
from deltaloom.core.delta import describe
from deltaloom.core.errors import InputError
from deltaloom.core.tensors import TensorFolder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("plan")
    base = Base(model=str(tiny.base_in(home / "base")))
    for seed in (1, 2):
        shutil.copytree(home / "base", home / f"m{seed}")
    tiny.base_in(home / "wide", hidden_size=32)
    for name, settings in (("lora", {"r": 3}), ("dora", {"r": 2, "use_dora": True})):
        config = peft.LoraConfig(target_modules=["q_proj"], **settings)
        peft.get_peft_model(base.load(), config).save_pretrained(home / name)
    return home


def merging(home, method, names, **settings):
    deltas = [str(home / name) if (home / name).exists() else name for name in names]
    steps = [{"merge": {"method": method, "deltas": deltas, "name": "both", **settings}}]
    (line,) = deltaloom.plan({"base": str(home / "base"), "steps": steps})
    return line


def test_tensors_bytes_and_passes_are_those_of_the_merge(home):
    line = merging(home, "ties", ["m1", "m2"])
    stored = TensorFolder(home / "base")
    found = line["merging"]
    assert found["product"] == "model"
    assert found["tensors"] == len(stored)
    assert found["written_bytes"] == line["disk_bytes"] == stored.nbytes
    assert (found["passes"], found["read_bytes"]) == (3, 3 * 3 * stored.nbytes)
    assert found["problems"] == found["notes"] == ()
    assert found["absent"] == []
    average = merging(home, "average", ["m1", "m2"])["merging"]
    assert (average["passes"], average["read_bytes"]) == (1, 2 * stored.nbytes)


def test_memory_is_within_the_budget_or_a_problem(home):
    line = merging(home, "ties", ["m1", "m2"], memory="4M")
    assert 0 < line["memory_bytes"] <= 4_000_000
    (problem,) = merging(home, "ties", ["m1", "m2"], memory="1K")["merging"]["problems"]
    assert "memory = 1,000: tensor" in problem


def test_every_mismatch_is_told_and_the_rest_still_checked(home, tmp_path):
    other = tiny.base_in(tmp_path / "other", seed=5)
    shutil.copytree(home / "m1", tmp_path / "foreign")
    describe(tmp_path / "foreign", "dense", Base(model=str(other)))
    shutil.copytree(home / "m1", tmp_path / "half")
    file = tmp_path / "half" / "model.safetensors"
    save_file({n: t.bfloat16() for n, t in load_file(file).items()}, file, {"format": "pt"})
    shutil.copytree(home / "m1", tmp_path / "words")
    tokens = json.loads((tmp_path / "words" / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["tom"], tokens["model"]["vocab"]["anna"] = 1000, 1001
    (tmp_path / "words" / "tokenizer.json").write_text(json.dumps(tokens))
    shutil.copytree(home / "m1", tmp_path / "short")
    file = tmp_path / "short" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    names = [str(tmp_path / name) for name in ("foreign", "half", "words", "short")]
    found = merging(home, "average", [*names, "wide", "m2", "some/model"])["merging"]
    assert found["absent"] == ["some/model (not here)"]
    for text, part in zip(
        found["problems"], ("is a delta over", "is cut short", "has shape"), strict=True
    ):
        assert part in text
    assert "half holds BF16 where the base" in found["notes"][0]
    assert "words has another vocabulary" in found["notes"][1]
    assert "2 of its" in found["notes"][1]


def test_settings_that_do_not_fit_the_deltas_are_a_problem(home):
    (problem,) = merging(home, "ties", ["m1", "m2"], weights=[1.0])["merging"]["problems"]
    assert problem == "1 weights for 2 deltas; give one for each"


def test_adapters_are_planned_as_adapters(home, tmp_path):
    for rank, names in ((None, ["lora", "lora"]), (2, ["lora", "dora"])):
        settings = {} if rank is None else {"rank": rank}
        found = merging(home, "average", names, **settings)["merging"]
        assert found["product"] == "adapter"
        out = tmp_path / f"out{rank}"
        deltas = [str(home / name) for name in names]
        deltaloom.merge("average", base=str(home / "base"), deltas=deltas, out=out, **settings)
        tensors = load_file(out / "adapter_model.safetensors")
        factors = {n: t for n, t in tensors.items() if "magnitude" not in n}
        assert found["written_bytes"] == sum(t.numel() * 4 for t in factors.values())
        assert found["tensors"] == len(factors)
    dora = merging(home, "ties", ["dora", "lora"])["merging"]
    assert (dora["product"], dora["problems"]) == ("model", ())


def test_methods_with_data_are_surveyed_too(home, tmp_path):
    rows = str(tiny.rows_in(tmp_path / "rows.jsonl"))
    line = merging(home, "regmean", ["m1", "wide"], data=[rows, rows])
    assert "has shape" in line["merging"]["problems"][0]
    assert line["tokens"] > 0
    assert line["memory_bytes"] > TensorFolder(home / "base").nbytes


def test_earlier_steps_and_a_base_that_is_not_here_are_named(home, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = str(tiny.rows_in(tmp_path / "rows.jsonl"))
    steps = [
        {"tune": {"method": "full", "data": rows, "name": "tuned"}},
        {"merge": {"method": "average", "deltas": ["tuned", str(home / "m1")], "name": "both"}},
    ]
    _, line = deltaloom.plan({"base": str(home / "base"), "steps": steps})
    assert line["merging"]["absent"] == ["tuned (made by that step)"]
    assert line["merging"]["tensors"] > 0
    steps = [{"merge": {"method": "average", "deltas": [str(home / "m1")], "name": "both"}}]
    (line,) = deltaloom.plan({"base": "some/base", "steps": steps})
    assert line["merging"] == {"absent": ["some/base (not here)"]}


def test_the_command_prints_the_plan_and_refuses_problems(home, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    recipe = tmp_path / "r.yaml"
    good, bad = f"[{home}/m1, {home}/m2]", f"[{home}/m1, {home}/wide]"
    text = f"base: {home}/base\nsteps:\n  - merge: {{method: slerp, name: x, deltas: %s}}\n"
    recipe.write_text(text % good)
    app(["plan", str(recipe)], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "x: 20 tensors, written as one model; reads" in shown
    assert "in at most 2 passes, writes" in shown
    recipe.write_text(text % bad)
    with pytest.raises(InputError, match="has shape"):
        app(["plan", str(recipe)], standalone_mode=False)
    assert "problem: " in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in home.rglob("*")}
