"""Recipes run, resume, replay; their records say what was done."""

import json
import shutil

import pytest
import tiny

import deltaloom
from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Estimate, compare
from deltaloom.core.run import Run
from deltaloom.recipe import execute
from deltaloom.recipe.parsing import parse_recipe, parse_step, read_yaml
from deltaloom.testing import product


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    tiny.base_in(home / "base")
    tiny.rows_in(home / "pool.jsonl", 24)
    tiny.rows_in(home / "dev.jsonl", 6, offset=100)
    with open(home / "test.jsonl", "w") as file:
        for i, who in enumerate(tiny.PEOPLE):
            row = {"prompt": f"where lives {who} ? ", "choices": list(tiny.CITIES), "answer": i % 3}
            file.write(json.dumps(row) + "\n")
    return home


def recipe_of(home, **changes):
    steps = [
        {"select": {"method": "random", "pool": str(home / "pool.jsonl"), "fraction": 0.5}},
        {"tune": {"method": "lora", "data": "select-random", "name": "a", "lr": 1e-2, "epochs": 1}},
        {"tune": {"method": "full", "data": "select-random", "name": "b", "epochs": 1}},
        {"merge": {"method": "ties", "deltas": ["a", "b"], "density": 0.5, "name": "both"}},
        {
            "measure": {
                "method": "choice",
                "tasks": str(home / "test.jsonl"),
                "deltas": ["base", "a", "b", "both"],
                "compare": "base",
                "name": "quality",
            }
        },
    ]
    for key, value in changes.items():
        step = next(one for s in steps for one in s.values() if one.get("name") == key)
        step.update(value)
    return {"base": str(home / "base"), "seed": 1, "steps": steps}


@pytest.fixture(scope="module")
def done(home):
    record = deltaloom.run(recipe_of(home), out=home / "done")
    return home / "done", record


def test_each_step_has_a_folder_that_is_its_product(done):
    out, _ = done
    assert len(deltaloom.Examples.read(out / "select-random")) == 12
    assert (out / "a" / "adapter_config.json").exists()
    assert (out / "both" / "config.json").exists()
    assert (out / "both" / "tokenizer.json").exists()
    assert not list(out.rglob(".work"))


def test_products_load_with_the_libraries_people_use(done, home):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = done
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    assert PeftModel.from_pretrained(base, out / "a").peft_config["default"].r == 8
    for name in ("b", "both"):
        AutoModelForCausalLM.from_pretrained(out / name)
        AutoTokenizer.from_pretrained(out / name)


def test_estimates_have_items_and_comparisons_are_paired(done):
    out, record = done
    key = "a/test/accuracy"
    stored = json.loads((out / "quality" / "a--test" / "estimate.json").read_text())
    mine, base = (
        Estimate.from_json(json.loads((out / "quality" / f"{n}--test/estimate.json").read_text()))
        for n in ("a", "base")
    )
    assert len(stored["items"]) == 6
    assert record["results"]["estimates"][key]["value"] == mine.value
    paired = compare(mine, base)
    there = record["results"]["comparisons"]["a - base/test/accuracy"]
    assert (there["value"], there["p"]) == (paired.difference.value, paired.p_value)
    assert there["p_holm"] >= there["p"]


def test_the_ledger_of_the_recipe_is_the_sum_of_its_steps(done):
    out, record = done
    steps = [json.loads((path).read_text()) for path in out.glob("*/run.json")]
    for key in ("backward_tokens", "flops", "wall_seconds"):
        assert record["cost"][key] == pytest.approx(sum(one["cost"][key] for one in steps))
    assert record["cost"]["backward_tokens"] > 0


def test_cards_tell_base_data_recipe_and_estimates(done):
    out, _ = done
    card = (out / "a" / "README.md").read_text()
    for part in ("base_model:", "| s0 |", "test/accuracy", "method: lora", "library_name: peft"):
        assert part in card


def test_running_again_does_nothing(done, home, monkeypatch):
    out, record = done
    monkeypatch.setattr(execute, "DOING", {})  # any step that ran would fail
    assert deltaloom.run(recipe_of(home), out=out)["results"] == record["results"]


def test_a_changed_step_is_refused_and_the_others_are_kept(done, home):
    out, _ = done
    before, record = product(out), (out / "run.json").read_bytes()
    with pytest.raises(InputError, match=r"b holds another run \(different recipe.*lr"):
        deltaloom.run(recipe_of(home, b={"lr": 5e-4}), out=out)
    assert product(out) == before
    assert (out / "run.json").read_bytes() == record
    deltaloom.run(recipe_of(home), out=out)


def test_a_new_last_step_reuses_the_rest(done, home, tmp_path):
    out, _ = done
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    changed = recipe_of(home)
    changed["steps"].append(
        {"measure": {"method": "loss", "tasks": str(home / "dev.jsonl"), "deltas": ["a"]}}
    )
    stamp = (copy / "b" / "model.safetensors").stat().st_mtime_ns
    record = deltaloom.run(changed, out=copy)
    assert "a/dev/loss_per_token" in record["results"]["estimates"]
    assert (copy / "b" / "model.safetensors").stat().st_mtime_ns == stamp


def test_two_bases_measured_on_one_task_are_told_apart(home, tmp_path):
    other = tiny.base_in(tmp_path / "other", seed=5)
    measure = {"method": "loss", "tasks": str(home / "test.jsonl")}
    steps = [
        {"measure": {**measure, "name": "first"}},
        {"measure": {**measure, "name": "second", "base": str(other)}},
    ]
    record = deltaloom.run({"base": str(home / "base"), "steps": steps}, out=tmp_path / "run")
    estimates = record["results"]["estimates"]
    (first,) = (key for key in estimates if key.startswith("base/"))
    (second,) = (key for key in estimates if key.startswith("base (second)/"))
    assert len(estimates) == 2
    for step, key in (("first", first), ("second", second)):
        own = json.loads((tmp_path / "run" / step / "run.json").read_text())["results"]["estimates"]
        assert estimates[key] == own[first]


def test_recipes_and_single_steps_replay_from_their_folders(done, tmp_path):
    out, _ = done
    deltaloom.run(out / "recipe.yaml", out=tmp_path / "again")
    skip = ("recipe.yaml", "README.md")  # these name folders
    ours, theirs = (
        {k: v for k, v in product(one).items() if not k.endswith(skip)}
        for one in (out, tmp_path / "again")
    )
    assert ours == theirs
    deltaloom.run(out / "both" / "recipe.yaml", out=tmp_path / "one")
    merged = (tmp_path / "one" / "both" / "model.safetensors").read_bytes()
    assert merged == (out / "both" / "model.safetensors").read_bytes()


def test_changed_data_is_refused(home, tmp_path):
    pool = tiny.rows_in(tmp_path / "pool.jsonl", 10)
    deltaloom.select("random", pool=pool, count=3, out=tmp_path / "out")
    tiny.rows_in(tmp_path / "pool.jsonl", 11)
    with pytest.raises(InputError, match=r"different inputs\.pool"):
        deltaloom.select("random", pool=pool, count=3, out=tmp_path / "out")


def test_what_a_tuning_is_evaluated_on_is_an_input(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dev = tiny.rows_in(tmp_path / "dev.jsonl", 4)
    values = {"base": str(home / "base"), "data": str(home / "pool.jsonl"), "epochs": 0.1}
    step = parse_step("tune", {"method": "lora", **values, "evaluate": "dev.jsonl"}, "t")
    record = execute.run_step(step, tmp_path / "out")
    assert record["recipe"]["steps"][0]["tune"]["evaluate"]["data"] == [str(dev)]
    tiny.rows_in(dev, 5)
    with pytest.raises(InputError, match=r"different inputs\.evaluate"):
        execute.run_step(step, tmp_path / "out")


def test_bad_input_leaves_nothing_behind(home, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "where lives tom ? "}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl line 1: the row has no answer"):
        deltaloom.tune("lora", base=home / "base", data=rows, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_deltas_of_another_base_are_refused(done, home, tmp_path):
    out, _ = done
    tiny.base_in(tmp_path / "other", seed=5)
    with pytest.raises(InputError, match="is a delta over"):
        deltaloom.merge(
            "ties", base=tmp_path / "other", deltas=[out / "a", out / "b"], out=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_verbs_give_the_nouns(done, home, tmp_path):
    out, _ = done
    rows = deltaloom.select("random", pool=home / "pool.jsonl", count=4, out=tmp_path / "s")
    assert len(rows) == 4
    found = deltaloom.measure(
        "loss", base=home / "base", deltas=[out / "a"], tasks=home / "dev.jsonl", out=tmp_path / "m"
    )
    assert found["a--dev"].n == 6
    delta = deltaloom.merge(
        "average", base=home / "base", deltas=[out / "a", out / "b"], out=tmp_path / "merged"
    )
    assert delta.norm() > 0


def test_early_stop_takes_a_file(home, tmp_path):
    delta = deltaloom.tune(
        "lora",
        base=home / "base",
        data=home / "pool.jsonl",
        evaluate=str(home / "dev.jsonl"),
        lr=1e-2,
        epochs=3,
        out=tmp_path / "out",
    )
    assert delta.kind == "lowrank"
    notes = Run.read(tmp_path / "out")["notes"]
    assert notes["best_evaluation"]["step"] > 0


def test_plan_loads_no_weights_and_counts_tokens(home, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(home / "base", bare)
    (bare / "model.safetensors").unlink()
    content = recipe_of(home)
    content["base"] = str(bare)
    lines = {one["name"]: one for one in deltaloom.plan(content)}
    assert lines["a"]["rows"] == 12
    rows = deltaloom.Examples.read(home / "pool.jsonl")
    tokens = sum(len(ids) for ids in tiny_tokens(home, [f"{r.prompt}{r.completion}" for r in rows]))
    assert lines["a"]["tokens"] == pytest.approx(tokens / 2, rel=0.01)
    assert all(one["seconds_at_least"] >= 0 for one in lines.values())
    assert lines["b"]["flops"] > lines["a"]["flops"] > 0


def test_plan_downloads_config_and_tokenizer_alone(home, tmp_path, monkeypatch):
    asked = []

    def fetch(name, revision=None, allow_patterns=(), **_):
        asked.append((name, revision, allow_patterns))
        return str(home / "base")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    content = recipe_of(home)
    content["base"] = {"model": "org/model", "revision": "v1"}
    deltaloom.plan(content)
    assert {(name, revision) for name, revision, _ in asked} == {("org/model", "v1")}
    assert not any("safetensors" in one for *_, patterns in asked for one in patterns)


def test_plan_of_a_base_that_is_not_there(home, tmp_path, monkeypatch):
    def fetch(*_, **__):
        raise OSError("no such repository\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    content = recipe_of(home)
    content["base"] = "org/modle"
    with pytest.raises(InputError, match=r"org/modle: neither a local folder nor a reachable hub"):
        deltaloom.plan(content)
    (tmp_path / "empty").mkdir()
    content["base"] = str(tmp_path / "empty")
    with pytest.raises(InputError, match=r"empty has no config\.json: not a model"):
        deltaloom.plan(content)


def tiny_tokens(home, texts):
    return deltaloom.Base(model=str(home / "base")).tokenizer()(texts)["input_ids"]


def test_readme_recipe_shape_parses(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "base: Qwen/Qwen3-0.6B\nsteps:\n"
        "  - select: {method: less, pool: p.jsonl, target: d.jsonl, name: chosen}\n"
        "  - tune: {method: lora, data: chosen, lr: 1e-4, name: skill}\n"
    )
    assert parse_recipe(read_yaml(path), "r").steps[1].method.lr == 1e-4


@pytest.mark.parametrize("method", ["similarity", "cka"])
def test_workers_measure_the_same(tmp_path, method):
    base = tiny.base_in(tmp_path / "base")
    rows = tiny.rows_in(tmp_path / "rows.jsonl", 30)
    other = {"other": str(tiny.base_in(tmp_path / "other", seed=1))}
    settings = other if method == "cka" else {"dimension": 64}
    found = []
    for workers in (0, 2):
        values = {"base": str(base), "tasks": [str(rows)], "workers": workers, **settings}
        planned = parse_step("measure", {"method": method, **values}, f"measure {method}")
        out = tmp_path / f"out{workers}"
        execute.run_step(planned, out)
        found.append((out / "base--rows" / "estimate.json").read_text())
    assert found[0] == found[1]
