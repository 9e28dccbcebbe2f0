"""Hyper-parameters from a proxy: what is trained, what is chosen, what is refused."""

import json
import shutil

import pytest
import torch
from tiny import base_in, rows_in, run_in

from deltaloom import Base, Examples
from deltaloom.core.errors import InputError
from deltaloom.core.run import Run
from deltaloom.recipe.execute import run_recipe, run_step
from deltaloom.recipe.parsing import parse_recipe, parse_step
from deltaloom.search.width import Width

torch.set_num_threads(1)
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}


@pytest.fixture
def base(tmp_path):
    return base_in(tmp_path / "base", **SIZES)


@pytest.fixture
def rows(tmp_path):
    return rows_in(tmp_path / "rows.jsonl", 40)


def searched(base, rows, out, **settings):
    values = {"method": "width", "base": str(base), "data": str(rows), "name": "found", **settings}
    return run_step(parse_step("search", values, "search width"), out)


def test_proxies_are_trained_and_the_best_is_chosen(base, rows, tmp_path):
    record = searched(base, rows, tmp_path / "out", trials=3, check_steps=2)
    trials = [json.loads(line) for line in (tmp_path / "out" / "trials.jsonl").open()]
    assert len(trials) == 3
    lowest = min(trials, key=lambda trial: trial["values"]["objective"])
    choice = json.loads((tmp_path / "out" / "choice.json").read_text())
    assert choice["settings"] == lowest["settings"]
    assert choice["proxy"]["hidden_size"] == 4
    assert choice["proxy"]["num_hidden_layers"] == 1
    assert set(choice["slopes"]) == {"width", "layers"}
    assert record["results"]["trials"] == 3
    assert record["cost"]["backward_tokens"] == sum(t["cost"]["backward_tokens"] for t in trials)
    table = {row["parameter"]: row for row in json.loads((tmp_path / "out/rules.json").read_text())}
    assert table["model.layers.*.mlp.up_proj.weight"]["lr"] == pytest.approx(4)


def test_at_the_size_of_the_base_a_trial_is_plain_adamw(base, rows, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    from deltaloom.engine.train import fit
    from deltaloom.tune._gradient import rows_for

    method = Width(width=1.0, depth=1.0, epochs=3.0)
    loaded, data = Base(model=str(base)), Examples.read(rows)
    with run_in(tmp_path / "one") as run:
        encoded = rows_for(loaded, loaded.tokenizer(), data, None, run)
        config = AutoConfig.from_pretrained(base)
        rules = method._rules(config, config, "completep", {})
        ours = method._train(rules, encoded, loaded.tokenizer(), {"lr": 0.01}, run)
    with run_in(tmp_path / "two") as run:
        set_seed(run.seed)
        plain = AutoModelForCausalLM.from_config(config)
        fit(plain, encoded, 0, method.train_settings(0.01), run)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


def test_a_diverged_trial_is_recorded(base, rows, tmp_path):
    space = {"lr": {"choices": [1e-3, 1e30]}}
    record = searched(base, rows, tmp_path / "out", trials=4, space=space, check_steps=0)
    trials = [json.loads(line) for line in (tmp_path / "out" / "trials.jsonl").open()]
    failed = [trial for trial in trials if trial["failed"]]
    assert record["results"]["failed_trials"] == len(failed) > 0
    assert {trial["settings"]["lr"] for trial in failed} == {1e30}
    assert record["results"]["choice"]["settings"] == {"lr": 1e-3}


def test_the_choice_trains_the_whole_and_a_base_without_weights_will_do(base, rows, tmp_path):
    (base / "model.safetensors").unlink()
    space = {"lr": {"low": 1e-3, "high": 1e-1, "log": True}, "output": {"choices": [1.0, 4.0]}}
    searched(
        base, rows, tmp_path / "out", trials=2, space=space, check_steps=0, train=True, holdout=0.2
    )
    made = Base(model=str(tmp_path / "out"))
    made.check()
    model = made.load()
    assert model.config.hidden_size == 16
    assert json.loads((tmp_path / "out" / "choice.json").read_text())["scales"].keys() == {"output"}
    assert not list(base.glob("*.safetensors"))


def test_a_later_step_measures_the_trained_and_tunes_with_the_choice(base, rows, tmp_path):
    search = {"method": "width", "data": str(rows), "trials": 1, "check_steps": 0, "train": True}
    tune = {"method": "full", "data": str(rows), "settings_from": "found", "epochs": 1}
    content = {
        "base": str(base),
        "steps": [
            {"search": {**search, "name": "found"}},
            {"tune": {**tune, "base": "found", "name": "more"}},
            {"measure": {"method": "loss", "deltas": ["base", "found"], "tasks": str(rows)}},
        ],
    }
    record = run_recipe(parse_recipe(content, "recipe"), tmp_path / "out")
    assert len(record["results"]["estimates"]) == 2
    chosen = Run.read(tmp_path / "out" / "found")["results"]["choice"]["settings"]["lr"]
    (step,) = Run.read(tmp_path / "out" / "more")["recipe"]["steps"]
    assert step["tune"]["lr"] == chosen


def test_the_report_draws_trials_and_coordinates(base, rows, tmp_path):
    from deltaloom.report.page import write_report

    searched(base, rows, tmp_path / "out", trials=4)
    write_report([tmp_path / "out"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("Coordinate check: log2 change") == 4  # two charts, each with its heading
    assert "objective of each trial" in page
    assert page.count('<td class="n">') >= 4


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"space": {"rl": {"low": 1, "high": 2}}}, "space has 'rl'"),
        ({"space": {}}, "the space is empty; give at least one of attention, embedding"),
        ({"space": {"lr": {"low": 2, "high": 1}}}, "is empty: low = 2 is above high = 1"),
        ({"width": 0.05}, "hidden size 1 and 1 layers; choose"),
    ],
)
def test_what_cannot_be_searched_is_refused(base, rows, tmp_path, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        searched(base, rows, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def folder_of(model, base, folder):
    """`model` with the tokenizer of `base`."""
    model.save_pretrained(folder)
    for file in base.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def test_models_that_are_not_understood_are_refused(base, rows, tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    small = OPTConfig(
        hidden_size=16, ffn_dim=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=24
    )
    other = folder_of(OPTForCausalLM(small), base, tmp_path / "opt")
    with pytest.raises(InputError, match="models of type 'opt' are not understood"):
        searched(other, rows, tmp_path / "out")


def test_a_model_with_one_tensor_for_queries_keys_and_values(base, rows, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    small = GPT2Config(
        n_embd=16, n_head=4, n_layer=2, vocab_size=24, bos_token_id=1, eos_token_id=2
    )
    other = folder_of(GPT2LMHeadModel(small), base, tmp_path / "gpt")
    searched(other, rows, tmp_path / "out", trials=1, check_steps=1)
    choice = json.loads((tmp_path / "out" / "choice.json").read_text())
    assert choice["proxy"] == {"hidden_size": 4, "num_attention_heads": 1, "num_hidden_layers": 1}
    assert set(choice["slopes"]) == {"width", "layers"}
