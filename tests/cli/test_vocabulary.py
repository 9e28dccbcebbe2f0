"""`deltaloom mergekit` where vocabularies differ: beside float64 sums, mergekit, transformers."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from deltaloom.cli.mergekit import mergekit
from deltaloom.core.errors import InputError

PEER = os.environ.get("DELTALOOM_MERGEKIT", "")
H, INNER, LAYERS = 16, 24, 2
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
TEXTS = {
    "base": ["the cat sat on the mat and the cat ate"],
    "a": ["a dog ran to the park; the dog barked at a man"],
    "b": ["the cat ran on the mat: a man sat and ate in the park"],
}
ADDED = {
    "base": [("<pad>", True), ("<s>", True), ("</s>", True)],
    "a": [("</s>", True), ("<s>", True), ("<|user|>", True), ("<think>", False)],
    "b": [("<pad>", True), ("<s>", True), ("</s>", True), ("<think>", False), ("<|user|>", False)],
}
MORE = {"base": 0, "a": 3, "b": 0}
"""Rows beyond the tokens."""


def tokenizer(name):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=60, special_tokens=[token for token, _ in ADDED[name][:2]], show_progress=False
    )
    made.train_from_iterator(TEXTS[name], trainer)
    for token, special in ADDED[name]:
        made.add_tokens([AddedToken(token, special=special, normalized=not special)])
    return made


def numbers(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()


def shapes(rows, tied):
    found = {TABLES[0]: (rows, H), "model.norm.weight": (H,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        found |= {f"{layer}self_attn.{k}_proj.weight": (H, H) for k in "qkvo"}
        found |= {f"{layer}mlp.{k}_proj.weight": (INNER, H) for k in ("gate", "up")}
        found[f"{layer}mlp.down_proj.weight"] = (H, INNER)
        found |= {f"{layer}{k}_layernorm.weight": (H,) for k in ("input", "post_attention")}
    return found if tied else {**found, TABLES[1]: (rows, H)}


def write(folder, made, dtype, *, tied=False, more=0, draw=None):
    rows = made.get_vocab_size() + more
    folder.mkdir(parents=True)
    tensors = {
        name: (0.3 * torch.randn(shape, generator=draw)).to(dtype)
        for name, shape in shapes(rows, tied).items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": H,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "vocab_size": rows,
        "bos_token_id": made.token_to_id("<s>"),
        "eos_token_id": made.token_to_id("</s>"),
        "tie_word_embeddings": tied,
        "dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config))
    made.save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))


def make_home(home, dtype, *, tied=False):
    draw = torch.Generator().manual_seed(5)
    for name in TEXTS:
        made = tokenizer(name)
        write(home / name, made, dtype, tied=tied, more=MORE[name], draw=draw)
    return home


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """Folders with the Llamas base, a and b, whose vocabularies overlap, by type and head."""
    made = {}

    def home(dtype=torch.bfloat16, tied=False):
        if (dtype, tied) not in made:
            made[dtype, tied] = make_home(tmp_path_factory.mktemp("home"), dtype, tied=tied)
        return made[dtype, tied]

    return home


def weights(folder):
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.fixture
def merge(tmp_path, monkeypatch):
    """Merge by a YAML text in a folder of models; gives the output's folder."""

    def merge(home, text, *flags):
        monkeypatch.chdir(home)
        (tmp_path / "c.yml").write_text(text)
        mergekit([str(tmp_path / "c.yml"), str(tmp_path / "out"), *flags])
        return tmp_path / "out"

    return merge


LINEAR = """
models:
  - {model: base, parameters: {weight: 0.2}}
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.4}}
merge_method: linear
%s
"""
CHANGES = """
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.25}}
merge_method: task_arithmetic
base_model: base
%s
"""


TOKENS = """tokenizer:
  source: base
  tokens:
    ran: {source: a}
    <think>: {source: {kind: model_token, model: a, token: "<|user|>"}, force: true}
    <s>: {source: {kind: model_token, model: b, token_id: 7}, force: true}
    <|new|>: {source: {kind: zero}}
  pad_to_multiple_of: 32
"""


@pytest.mark.skipif(not PEER, reason="DELTALOOM_MERGEKIT is not set")
@pytest.mark.parametrize(
    ("text", "tied"),
    [
        (CHANGES % "tokenizer_source: union", False),
        (LINEAR % "base_model: base\ntokenizer_source: base", True),
        (CHANGES % "tokenizer_source: a", True),
        (LINEAR % "tokenizer_source: b", False),
        # it cannot add tokens to the base's own tokenizer, which then seems to have them
        (CHANGES % TOKENS.replace("source: base", "source: union"), False),
    ],
)
def test_beside_mergekit(merge, homes, tmp_path, text, tied):
    home = homes(tied=tied)
    out = merge(home, text)
    theirs = tmp_path / "theirs"
    words = [PEER, tmp_path / "c.yml", theirs, "--no-write-model-card"]
    done = subprocess.run(words, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compare(out, theirs)


def compare(out, theirs):
    """Equal to the bit, rows by token: mergekit puts the tokens of a union in any order."""
    ours, wanted = weights(out), weights(theirs)
    assert set(ours) == set(wanted)
    own, other = numbers(out), numbers(theirs)
    assert set(own) == set(other)
    mine = [own[token] for token in sorted(own)]
    yours = [other[token] for token in sorted(own)]
    for name, tensor in wanted.items():
        got = ours[name]
        assert (got.shape, got.dtype) == (tensor.shape, tensor.dtype), name
        same = torch.equal(got[mine], tensor[yours]) if name in TABLES else torch.equal(got, tensor)
        assert same, name
        if name in TABLES:  # padding
            assert torch.equal(got[len(own) :], tensor[len(own) :])
    sizes = [json.loads((f / "config.json").read_text())["vocab_size"] for f in (out, theirs)]
    assert sizes[0] == sizes[1]
    flags = []
    for folder in (out, theirs):
        rows = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        flags.append({row["content"]: {**row, "id": 0} for row in rows})
        flags[-1].pop("<|user|>", None)  # a and b differ in it, and mergekit takes either
    assert flags[0] == flags[1]


def filled(home, names, key, wanted, base, changes=None):
    """Every model's table in the numbers `wanted`, (k, n, H), by a loop over tokens in torch."""
    changes = changes or {}
    tables = [weights(home / name) for name in names]
    tables = [table.get(key, table[TABLES[0]]) for table in tables]
    tables = [one + changes.get(name, 0) for one, name in zip(tables, names, strict=True)]
    tokens = [numbers(home / name) for name in names]
    out = torch.zeros(len(names), max(wanted.values()) + 1, H, dtype=tables[0].dtype)
    for token, at in wanted.items():
        rows = [
            table[own[token]] if token in own else None
            for table, own in zip(tables, tokens, strict=True)
        ]
        has = [row for row in rows if row is not None]
        if not has:
            continue
        if len(has) > 1 and base in names and rows[names.index(base)] is not None:
            default = rows[names.index(base)]
        else:
            total = torch.zeros_like(has[0])
            for row in has:
                total = total + row
            default = total / len(has)
        for i, row in enumerate(rows):
            out[i, at] = default if row is None else row
    return out


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", ["union", "base", "a"])
def test_beside_a_dense_sum(merge, homes, dtype, source, tied):
    home = homes(dtype, tied)
    out = merge(home, CHANGES % f"tokenizer_source: {source}", "--precision", "float32")
    got, wanted = weights(out), numbers(out)
    assert (TABLES[1] in got) == (not tied)
    close = 2**-22 if dtype is torch.float32 else 2**-8  # half a unit of bfloat16, and float32's
    for key in TABLES[: 1 if tied else 2]:
        base, a, b = filled(home, ["base", "a", "b"], key, wanted, "base").double()
        dense = base + 0.5 * (a - base) + 0.25 * (b - base)
        assert got[key].shape == (len(wanted), H)
        torch.testing.assert_close(got[key].double(), dense, rtol=close, atol=2**-22)


def test_the_order_of_a_union(merge, homes):
    """The base's numbers first; then what the models bring, plain before added."""
    out = merge(homes(), CHANGES % "tokenizer_source: union")
    base, a, b = (numbers(homes() / name) for name in ("base", "a", "b"))
    got = sorted(numbers(out).items(), key=lambda one: one[1])
    assert dict(got[: len(base)]) == base
    added = ["<|user|>", "<think>"]
    plain = [token for own in (a, b) for token in sorted(own, key=own.get) if token not in base]
    plain = [token for token in dict.fromkeys(plain) if token not in added]
    assert [token for token, _ in got[len(base) :]] == plain + added
    assert len(plain) > 20
    assert set(a) - set(b)
    assert set(b) - set(a)


OF_ALL = {
    "linear": "weight: 0.4",
    "task_arithmetic": "weight: 0.4",
    "ties": "weight: 0.4, density: 0.5",
    "dare_ties": "weight: 0.4, density: 0.5",
    "della": "weight: 0.4, density: 0.5, epsilon: 0.1",
    "breadcrumbs": "weight: 0.4, density: 0.7, gamma: 0.1",
    "model_stock": "",
    "karcher": "",
    "multislerp": "weight: 0.4",
    "sce": "",
}
OF_TWO = {"slerp": "t: 0.3", "nuslerp": "weight: 0.4", "nearswap": "t: 0.1", "arcee_fusion": ""}


def moved(home, out, names, wanted, base="base"):
    """The models of `home` with tables already in the numbers `wanted`, as folders of `out`."""
    tables = {key: filled(home, names, key, wanted, base) for key in TABLES}
    for i, name in enumerate(names):
        (out / name).mkdir(parents=True)
        tensors = weights(home / name) | {key: table[i] for key, table in tables.items()}
        save_file(tensors, out / name / "model.safetensors", {"format": "pt"})
        (out / name / "config.json").write_text((home / name / "config.json").read_text())
    return out


@pytest.mark.parametrize("method", [*OF_ALL, *OF_TWO])
def test_every_method_as_on_moved_models(merge, homes, tmp_path, method):
    """To the bit what the same merge gives of models written out in the new vocabulary."""
    settings = {**OF_ALL, **OF_TWO}[method]
    shared = "t:" in settings[:2]
    each = f", parameters: {{{settings}}}" if settings and not shared else ""
    names = ["base", "a"] if method in OF_TWO and method != "nuslerp" else ["base", "a", "b"]
    listed = "".join(
        f"  - {{model: {name}{'' if name == 'base' and not each else each}}}\n"
        for name in names
        if name != "base" or method in ("linear", "slerp")
    )
    text = f"merge_method: {method}\nbase_model: base\nmodels:\n{listed}"
    text += f"parameters: {{{settings}}}\n" if shared else ""
    for precision, dtype in (("mergekit", torch.bfloat16), ("float32", torch.float32)):
        home, flags = homes(dtype), ("--precision", precision)
        out = merge(home, text + "tokenizer_source: union", *flags)
        got, wanted = weights(out), numbers(out)
        out.rename(tmp_path / f"first {precision}")
        dense = moved(home, tmp_path / precision, names, wanted)
        again = merge(dense, text, *flags)
        for name, tensor in weights(again).items():
            assert torch.equal(got[name], tensor), (name, precision)
        again.rename(tmp_path / f"second {precision}")


def test_a_mean_where_there_is_no_base(merge, homes, tmp_path):
    """Taken in the models' own format, as the rest of mergekit's steps."""
    names = ["base", "a", "b"]
    out = merge(homes(), LINEAR % "tokenizer_source: b")
    got, wanted = weights(out), numbers(out)
    out.rename(tmp_path / "first")
    own = [set(numbers(homes() / name)) for name in names]
    assert (own[0] & own[2]) - own[1]
    again = merge(moved(homes(), tmp_path / "dense", names, wanted, base=None), LINEAR % "")
    for name, tensor in weights(again).items():
        assert torch.equal(got[name], tensor), name


SLICES = """
slices:
  - sources: [{model: base, layer_range: [0, 1]}, {model: a, layer_range: [0, 1]}]
  - sources: [{model: base, layer_range: [1, 2]}, {model: b, layer_range: [1, 2]}]
merge_method: task_arithmetic
base_model: base
parameters: {weight: 0.5}
tokenizer_source: union
"""


def test_slices_of_other_models(merge, homes):
    """The embedding is of the first slice's models, the output layer of the last one's."""
    home = homes(torch.float32)
    out = merge(home, SLICES)
    for key, name in zip(TABLES, "ab", strict=True):
        base, other = filled(home, ["base", name], key, numbers(out), "base")
        torch.testing.assert_close(weights(out)[key], base + 0.5 * (other - base))


def test_an_adapter_on_a_model_of_another_vocabulary(merge, homes, tmp_path):
    home = homes(torch.float32)
    factors = {
        f"base_model.model.model.embed_tokens.lora_embedding_{side}": torch.randn(shape)
        for side, shape in (("A", (2, len(numbers(home / "b")))), ("B", (H, 2)))
    }
    folder = tmp_path / "lora"
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["embed_tokens"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    text = (CHANGES % "tokenizer_source: union").replace("model: b,", f"model: b+{folder},")
    out = merge(home, text)
    change = (factors.popitem()[1] @ factors.popitem()[1]).T
    wanted = numbers(out)
    base, a, b = filled(home, ["base", "a", "b"], TABLES[0], wanted, "base", {"b": change})
    dense = base + 0.5 * (a - base) + 0.25 * (b - base)
    torch.testing.assert_close(weights(out)[TABLES[0]], dense, rtol=1e-5, atol=1e-5)


def test_rows_of_single_tokens_and_padding(merge, homes):
    home = homes(torch.float32)
    out = merge(home, CHANGES % TOKENS)
    wanted, got = numbers(out), weights(out)
    own = {name: numbers(home / name) for name in ("base", "a", "b")}
    assert wanted == own["base"] | {token: wanted[token] for token in ("ran", "<think>", "<|new|>")}
    for key in TABLES:
        tables = filled(home, ["base", "a", "b"], key, wanted, "base")
        tables[0, wanted["ran"]] = tables[1, wanted["ran"]]
        stored = {name: weights(home / name)[key] for name in own}
        for token, row in {
            "<think>": stored["a"][own["a"]["<|user|>"]],
            "<s>": stored["b"][7],
            "<|new|>": torch.zeros(H),
        }.items():
            tables[:, wanted[token]] = row
        padding = -len(wanted) % 32
        means = tables.double().mean(1, keepdim=True).float().expand(-1, padding, -1)
        base, a, b = torch.cat([tables, means], 1)
        dense = base + 0.5 * (a - base) + 0.25 * (b - base)
        assert 0 < padding == got[key].shape[0] - len(wanted)
        torch.testing.assert_close(got[key], dense, rtol=1e-5, atol=1e-6)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(wanted) + padding


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("source", ["union", "a"])
def test_transformers_loads_and_generates(merge, homes, source, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = merge(homes(tied=tied), CHANGES % f"tokenizer_source: {source}")
    words, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    text = "the dog ran at<|user|>"
    asked = words(text, return_tensors="pt")
    assert words.decode(asked["input_ids"][0]) == text
    rows = model.get_input_embeddings().weight
    assert rows.shape == (len(words), H) == (len(numbers(out)), H)
    if tied:
        assert rows.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    ids = model.generate(**asked, max_new_tokens=4, do_sample=False)
    assert ids.shape[1] > asked["input_ids"].shape[1]
    assert ids.max() < len(words)
    assert model.config.eos_token_id == words.eos_token_id == numbers(out)["</s>"]
    assert words.convert_tokens_to_ids("<|user|>") == numbers(out)["<|user|>"]


def test_a_plan_says_what_is_lacking(merge, homes, capsys):
    home = homes()
    out = merge(home, CHANGES % "tokenizer_source: union", "--dry-run")
    said = capsys.readouterr().out
    own = {name: set(numbers(home / name)) for name in ("base", "a", "b")}
    every = set.union(*own.values())
    assert not out.exists()
    assert f"vocabulary of {len(every)} rows, 2 tensors moved to it" in said
    for name, tokens in own.items():
        rows = len(tokens) + MORE[name]
        assert f"{name} has {rows} rows and lacks {len(every - tokens)} of the tokens" in said


def changed(home, tmp_path, change):
    """The models of `home`, with a damaged."""
    for name in TEXTS:
        (tmp_path / "home" / name).mkdir(parents=True)
        for file in (home / name).iterdir():
            (tmp_path / "home" / name / file.name).write_bytes(file.read_bytes())
    change(tmp_path / "home" / "a")
    return tmp_path / "home"


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def other_tokens(folder):
    made = Tokenizer(models.WordLevel({f"other {i}": i for i in range(20)}, unk_token="other 0"))
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")


def added_elsewhere(folder):
    config = {"added_tokens_decoder": {"9": {"content": "<late>"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def special_elsewhere(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<late>"}))


@pytest.mark.parametrize("source", ["union", "base"])
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (no_tokenizer, r"needs tokenizer.json of every model, and .*a has none .* save it there$"),
        (other_tokens, r"a has none of the tokens of .*base, .* leave it out"),
        (added_elsewhere, r"a adds '<late>', which tokenizer.json lacks; load the tokenizer"),
        (special_elsewhere, r"a adds '<late>', which tokenizer.json lacks; load the tokenizer"),
    ],
)
def test_vocabularies_that_cannot_be_brought_together(
    merge, homes, tmp_path, change, fault, source
):
    home = changed(homes(), tmp_path, change)
    if change is other_tokens and source == "union":
        pytest.skip("a union has the tokens of all")
    for flags in ((), ("--dry-run",)):
        with pytest.raises(InputError, match=fault):
            merge(home, CHANGES % f"tokenizer_source: {source}", *flags)
    assert {path.name for path in tmp_path.iterdir()} == {"home", "c.yml"}


@pytest.mark.parametrize(
    ("tokens", "fault"),
    [
        ("<x>: {force: true}", r"tokens\['<x>'\] names no source; name one of the merged models"),
        ("<x>: {source: c}", r"tokens\['<x>'\] names c; name one of the merged models"),
        ("<x>: {source: a}", "a has no row for it; name a token that it has"),
        ("<x>: {source: {kind: model_token, model: a, token_id: 999}}", "a has no row for it"),
        ("<x>: {source: {kind: model_token, model: a}}", "one of token and token_id"),
    ],
)
def test_tokens_without_a_row(merge, homes, tokens, fault):
    with pytest.raises(InputError, match=fault):
        merge(homes(), CHANGES % f"tokenizer: {{source: base, tokens: {{{tokens}}}}}")


@pytest.mark.parametrize(
    "text", [CHANGES % "tokenizer_source: union", LINEAR % "tokenizer_source: b"]
)
@pytest.mark.parametrize("token", ["Ġdog", "a", "k"])
def test_a_nan_is_found_in_its_own_model(merge, homes, tmp_path, text, token):
    """Where it came to other models, and as a part of a mean, too."""
    row = numbers(homes() / "a")[token]

    def spoil(folder):
        tensors = weights(folder)
        tensors[TABLES[0]][row, 3] = float("nan")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    home = changed(homes(), tmp_path, spoil)
    if token in numbers(home / "b") or "union" in text:
        fault = f"^a: tensor '{TABLES[0]}' is not a number at element {row * H + 3},"
        with pytest.raises(InputError, match=fault):
            merge(home, text)
    else:  # a row that does not reach the output
        merge(home, text)


def test_tokens_beyond_the_embedding(merge, homes, tmp_path):
    """A base's last tokens that have no rows are left out of its tokenizer, with their merges."""

    def cut(folder):
        tensors = weights(folder)
        for key in TABLES:
            tensors[key] = tensors[key][:38].clone()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    home = changed(homes(), tmp_path, cut)
    text = "{merge_method: task_arithmetic, base_model: a, tokenizer_source: base, models: "
    out = merge(home, text + "[{model: b, parameters: {weight: 0.5}}]}")
    own = numbers(home / "a")
    assert numbers(out) == {token: i for token, i in own.items() if i < 38}
    assert weights(out)[TABLES[0]].shape == (38, H)


def test_a_killed_run_is_taken_up(merge, homes, tmp_path):
    text = (CHANGES % "tokenizer_source: union").replace("task_arithmetic", "dare_ties")
    text = text.replace("weight:", "density: 0.5, weight:")
    out = merge(homes(), text)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    out.rename(tmp_path / "whole")
    code = (
        "import os, signal, sys\n"
        "from deltaloom.merge import _stream\n"
        "note = _stream.Merge._note\n"
        "def noted(self, name):\n"
        "    note(self, name)\n"
        "    if name == 'model.embed_tokens.weight': os.kill(os.getpid(), signal.SIGKILL)\n"
        "_stream.Merge._note = noted\n"
        "from deltaloom.cli.mergekit import mergekit\n"
        "mergekit(sys.argv[1:])\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "c.yml"), str(out), "-j", "1"]
    assert subprocess.run(words, cwd=homes(), capture_output=True).returncode == -9
    assert not out.exists()
    assert (tmp_path / ".out.part").exists()
    again = merge(homes(), text)
    assert {path.name: path.read_bytes() for path in again.iterdir()} == whole


def test_no_model_library_is_imported(homes, tmp_path):
    (tmp_path / "c.yml").write_text(CHANGES % "tokenizer_source: union")
    code = (
        "import sys\n"
        "from deltaloom.cli.mergekit import mergekit\n"
        "mergekit(sys.argv[1:])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "c.yml"), str(tmp_path / "out")]
    done = subprocess.run(words, cwd=homes(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
