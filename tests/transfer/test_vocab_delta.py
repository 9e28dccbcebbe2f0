"""The vocab delta, its folders and what other verbs make of them."""

import json
import shutil

import pytest
import torch
import vocabularies
from safetensors.torch import load_file, save_file

import deltaloom
from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.core.deltas.vocab import Vocab
from deltaloom.core.errors import InputError
from deltaloom.core.tensors import TensorFolder
from deltaloom.core.vocabulary import Vocabulary, load_tokenizer

torch.set_num_threads(1)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEXT = "the cat sat on a mat"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("vocab")
    vocabularies.old(home / "old")
    vocabularies.old(home / "untied", tied=False, seed=2)
    vocabularies.new(home / "new", hidden=12, seed=1)
    for base in ("old", "untied"):
        deltaloom.transfer(
            "fvt", base=home / base, tokenizer=home / "new", out=home / f"moved-{base}"
        )
    lines = [{"text": f"{vocabularies.WORDS[i % 7 :]} the mat"} for i in range(16)]
    (home / "text.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return home


def logits(model, tokenizer):
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("which", ["old", "untied"])
def test_the_folder_is_a_plain_model_and_the_delta_is_the_same(home, tmp_path, which):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = Base(model=str(home / which))
    delta = load(home / f"moved-{which}", base)
    plain = AutoModelForCausalLM.from_pretrained(home / f"moved-{which}").eval()
    tokenizer = AutoTokenizer.from_pretrained(home / f"moved-{which}")
    wanted = logits(plain, tokenizer)
    assert isinstance(delta, Vocab)
    assert torch.equal(logits(delta.apply(base), delta.tokenizer(base)), wanted)
    # the compact form: new rows and the tokenizer alone
    delta.save(tmp_path / "rows")
    again = load(tmp_path / "rows", base)
    assert not (tmp_path / "rows" / "model.safetensors").exists()
    assert {**again.tables}.keys() == {**delta.tables}.keys()
    assert all(torch.equal(again.tables[name], delta.tables[name]) for name in delta.tables)
    model = again.apply(base)
    assert torch.equal(logits(model, again.tokenizer(base)), wanted)
    assert model.config.vocab_size == plain.config.vocab_size == len(tokenizer)
    assert model.config.bos_token_id == plain.config.bos_token_id == tokenizer.bos_token_id
    assert plain.config.eos_token_id == plain.generation_config.eos_token_id
    assert plain.config.eos_token_id == tokenizer.eos_token_id


def test_it_is_no_vector_over_the_base(home):
    base = Base(model=str(home / "untied"))
    delta = load(home / "moved-untied", base)
    assert 1.0 * delta is delta
    assert delta.names() == [HEAD, EMBED]
    total = sum((delta.tables[name].double() ** 2).sum() for name in delta.tables)
    assert delta.norm() == pytest.approx(float(total) ** 0.5)
    for wrong in (lambda: 2 * delta, lambda: delta + delta, lambda: delta.to_dense(EMBED)):
        with pytest.raises(InputError, match="tokenizer"):
            wrong()


def test_merging_it_as_a_change_is_refused_with_the_remedy(home, tmp_path):
    for method in ("task_arithmetic", "ties", "average"):
        with pytest.raises(InputError, match="as the base of this step"):
            deltaloom.merge(
                method, base=home / "old", deltas=[home / "moved-old"], out=tmp_path / method
            )


def test_a_moved_model_merges_with_a_tuned_one_of_the_same_tokenizer(home, tmp_path):
    """Two models with different tokenizers, merged after transfer, all in one recipe."""
    moved, text = {"tokenizer": str(home / "new"), "method": "fvt"}, str(home / "text.jsonl")
    tune = {"method": "full", "data": text, "epochs": 1, "lr": 1e-2}
    recipe = {
        "base": str(home / "old"),
        "steps": [
            {"transfer": {**moved, "name": "common"}},
            {"tune": {**tune, "base": "common", "name": "one"}},
            {"tune": {**tune, "seed": 1, "name": "other"}},
            {"transfer": {**moved, "base": "other", "name": "other-moved"}},
            {
                "merge": {
                    "method": "average",
                    "base": "common",
                    "deltas": ["one", "other-moved"],
                    "name": "both",
                }
            },
            {"measure": {"method": "loss", "base": "common", "deltas": ["both"], "tasks": text}},
        ],
    }
    deltaloom.run(recipe, out=tmp_path / "run")
    one, other, both = (
        load_file(tmp_path / "run" / name / "model.safetensors")
        for name in ("one", "other-moved", "both")
    )
    assert both.keys() == one.keys()
    for name in both:
        assert torch.allclose(both[name], (one[name] + other[name]) / 2, atol=1e-6)
    assert Vocabulary.read(tmp_path / "run" / "both").tokens == Vocabulary.read(home / "new").tokens


def test_a_moved_model_does_not_merge_over_another_tokenizer(home, tmp_path):
    vocabularies.byte_level(tmp_path / "third", [("Ġ", "t")], bos_token="<b>", eos_token="<e>")
    deltaloom.transfer("fvt", base=home / "old", tokenizer=tmp_path / "third", out=tmp_path / "t")
    with pytest.raises(InputError, match="different tokenizers"):
        load(tmp_path / "t", Base(model=str(home / "moved-old")))


def test_measuring_it_uses_its_own_tokenizer(home, tmp_path):
    text = home / "text.jsonl"
    deltaloom.measure(
        "loss", base=home / "old", deltas=[home / "moved-old"], tasks=text, out=tmp_path / "a"
    )
    deltaloom.measure("loss", base=home / "moved-old", tasks=text, out=tmp_path / "b")
    values = [
        json.loads(next((tmp_path / name).glob("*/estimate.json")).read_text())["value"]
        for name in "ab"
    ]
    assert values[0] == values[1]


@pytest.mark.parametrize("per", ["token", "example"])
def test_losses_over_unlike_tokens_are_not_compared(home, tmp_path, per):
    names, text = ["base", str(home / "moved-old")], home / "text.jsonl"
    given = {"base": home / "old", "deltas": names, "tasks": text, "per": per, "compare": "base"}
    with pytest.raises(InputError, match="moved-old has another tokenizer than base, and losses"):
        deltaloom.measure("loss", out=tmp_path / "a", **given)
    assert not (tmp_path / "a").exists()


def test_shards_types_and_odd_tensors_survive(home, tmp_path):
    """A sharded bfloat16 base whose tied pair is stored under the head's name."""
    tensors = {
        name: tensor.bfloat16()
        for name, tensor in load_file(home / "old/model.safetensors").items()
    }
    shutil.copytree(home / "old", tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    tensors[HEAD] = tensors.pop(EMBED)
    names, table = sorted(tensors), {}
    for number, part in enumerate((names[:4], names[4:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / "base" / file)
        table |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": table}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    config = (tmp_path / "base" / "config.json").read_text().replace("float32", "bfloat16")
    (tmp_path / "base" / "config.json").write_text(config)
    delta = deltaloom.transfer(
        "fvt", base=tmp_path / "base", tokenizer=home / "new", out=tmp_path / "out"
    )
    assert delta.names() == [HEAD]
    made = TensorFolder(tmp_path / "out")
    assert {entry.dtype for entry in made.values()} == {"BF16"}
    for name in names:
        if name != HEAD:
            assert torch.equal(made.read(name), tensors[name])
    wanted = load(home / "moved-old", Base(model=str(home / "old"))).tables[EMBED]
    assert torch.allclose(made.read(HEAD).float(), wanted, atol=0.02)


def test_a_chat_template_moves_with_the_tokens_that_it_writes(home, tmp_path):
    shutil.copytree(home / "old", tmp_path / "chat")
    tokenizer = load_tokenizer(tmp_path / "chat")
    tokenizer.add_tokens(["<|turn|>", "<|done|>"], special_tokens=True)
    tokenizer.eos_token = "<|done|>"
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.content }}<|done|>{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "chat")
    vocabularies.model(tmp_path / "chat")
    deltaloom.transfer("fvt", base=tmp_path / "chat", tokenizer=home / "new", out=tmp_path / "out")
    moved = load_tokenizer(tmp_path / "out")
    assert moved.chat_template == tokenizer.chat_template
    assert moved.eos_token == "<|done|>"
    said = moved.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert said == "<begin><|turn|>the<|done|>"
    own, made = (
        load_file(folder / "model.safetensors")[EMBED]
        for folder in (tmp_path / "chat", tmp_path / "out")
    )
    ids = moved.convert_tokens_to_ids(["<|turn|>", "<|done|>"])
    theirs = tokenizer.convert_tokens_to_ids(["<|turn|>", "<|done|>"])
    assert torch.equal(made[ids], own[theirs])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == ids[1]
    assert config["vocab_size"] == len(moved)


def test_a_template_of_roles_alone_adds_no_token(home, tmp_path):
    shutil.copytree(home / "old", tmp_path / "chat")
    tokenizer = load_tokenizer(tmp_path / "chat")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    deltaloom.transfer("fvt", base=tmp_path / "chat", tokenizer=home / "new", out=tmp_path / "out")
    moved = load_tokenizer(tmp_path / "out")
    assert len(moved) == len(load_tokenizer(home / "new"))
    assert moved.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False) == (
        "the<end>"
    )


def test_shell_recipe_plan_and_check(home, tmp_path):
    from deltaloom.recipe.inspection import inspect

    recipe = {
        "base": str(home / "old"),
        "steps": [
            {"transfer": {"method": "omp", "tokenizer": str(home / "new"), "name": "moved"}},
            {"measure": {"method": "loss", "base": "moved", "tasks": str(home / "text.jsonl")}},
        ],
    }
    lines = deltaloom.plan(recipe)
    assert [one["verb"] for one in lines] == ["transfer", "measure"]
    assert inspect(home / "moved-old")["kind"] == "model"
    replay = json.loads((home / "moved-old" / "run.json").read_text())
    assert replay["inputs"].keys() == {"base", "tokenizer"}
    assert "transfer fvt" in (home / "moved-old" / "README.md").read_text()
    load(home / "moved-old", Base(model=str(home / "old"))).save(tmp_path / "rows")
    assert inspect(tmp_path / "rows")["kind"] == "vocabulary delta"
