"""`deltaloom mergekit` on tiny models: beside formulas in float64, and beside mergekit itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from deltaloom.cli.mergekit import mergekit
from deltaloom.core.errors import InputError

PEER = os.environ.get("DELTALOOM_MERGEKIT", "")
"""The mergekit-yaml of mergekit 0.1.5, for the comparison with it."""
LAYERS = 5
H, INNER, V = 16, 24, 64


def shapes():
    found = {"model.embed_tokens.weight": (V, H), "model.norm.weight": (H,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        found |= {f"{layer}self_attn.{k}_proj.weight": (H, H) for k in "qkvo"}
        found |= {f"{layer}mlp.{k}_proj.weight": (INNER, H) for k in ("gate", "up")}
        found[f"{layer}mlp.down_proj.weight"] = (H, INNER)
        found |= {f"{layer}{k}_layernorm.weight": (H,) for k in ("input", "post_attention")}
    return {**found, "lm_head.weight": (V, H)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Llama folders base, a, b and c in float32."""
    home = tmp_path_factory.mktemp("home")
    draw = torch.Generator().manual_seed(0)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": H,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "vocab_size": V,
        "tie_word_embeddings": False,
    }
    base = {n: torch.randn(s, generator=draw) for n, s in shapes().items()}
    for name in ("base", "a", "b", "c"):
        folder = home / name
        folder.mkdir()
        step = 0.0 if name == "base" else 0.5
        moved = {n: t + step * torch.randn(t.shape, generator=draw) for n, t in base.items()}
        save_file(moved, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        tokens = {"model": {"vocab": {"x": 0, "y": 1}}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(tokens))
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{1}}"}))
    tokens["model"]["vocab"]["z"] = 2
    (home / "c" / "tokenizer.json").write_text(json.dumps(tokens))
    return home


def weights(folder):
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.fixture
def merge(home, tmp_path, monkeypatch):
    """Merge by a YAML text in the folder of the models; gives the output's folder."""

    def merge(text, *flags):
        monkeypatch.chdir(home)
        (tmp_path / "c.yml").write_text(text)
        mergekit([str(tmp_path / "c.yml"), str(tmp_path / "out"), *flags])
        return tmp_path / "out"

    return merge


LINEAR = """
models:
  - {model: a, parameters: {weight: [1.0, 0.2]}}
  - {model: b, parameters: {weight: [{filter: mlp, value: "3e-1"}, {value: 0.5}]}}
merge_method: linear
parameters: {normalize: false}
"""
TIES = """
models:
  - {model: a, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
  - {model: b, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
  - {model: c, parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0}]}}
merge_method: ties
base_model: base
parameters: {int8_mask: true}
"""
SLERP = """
slices:
  - sources: [{model: base, layer_range: [0, 5]}, {model: a, layer_range: [0, 5]}]
merge_method: slerp
base_model: base
parameters:
  t: [{filter: self_attn, value: [0, 0.5, 0.3, 1]}, {filter: mlp, value: [1, 0]}, {value: 0.5}]
"""
STACK = """
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources:
      - {model: b, layer_range: [1, 5], parameters: {scale: {filter: o_proj, value: 0.5}}}
merge_method: passthrough
"""
CHANGES = """
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: a, layer_range: [3, 5], parameters: {weight: 0.7}}
    parameters: {lambda: 0.5}
  - sources:
      - {model: b, layer_range: [2, 4], parameters: {weight: [0.1, 0.9]}}
      - {model: base, layer_range: [2, 4]}
merge_method: task_arithmetic
base_model: base
"""
CRUMBS = """
models:
  - {model: a, parameters: {weight: 0.5, density: 0.8, gamma: 0.05}}
  - {model: b, parameters: {weight: 0.7, density: [0.5, 0.9], gamma: 0.02}}
base_model: base
merge_method: breadcrumbs
parameters: {lambda: 0.9, normalize: true}
"""


@pytest.mark.skipif(not PEER, reason="DELTALOOM_MERGEKIT is not set")
@pytest.mark.parametrize("text", [LINEAR, TIES, SLERP, STACK, CHANGES, CRUMBS])
@pytest.mark.parametrize("kinds", [{}, {"dtype": "float32", "out_dtype": "bfloat16"}])
def test_beside_mergekit(merge, home, tmp_path, text, kinds):
    text = yaml.safe_dump({**yaml.safe_load(text), **kinds})
    ours = weights(merge(text))
    words = [PEER, tmp_path / "c.yml", tmp_path / "theirs", "--no-copy-tokenizer"]
    done = subprocess.run([*words, "--no-write-model-card"], cwd=home, capture_output=True)
    assert done.returncode == 0, done.stderr
    theirs = weights(tmp_path / "theirs")
    assert set(ours) == set(theirs)
    for name, wanted in theirs.items():
        got = ours[name]
        assert got.dtype == wanted.dtype
        # ties has random, so different, magnitudes: sorts have no choice
        assert torch.equal(got, wanted), name
    for file in ("ours", "theirs"):
        config = tmp_path / file.replace("ours", "out") / "config.json"
        assert json.loads(config.read_text())["num_hidden_layers"] == len(
            {n.split(".")[2] for n in ours if ".layers." in n}
        )


def test_a_sum_by_layer_and_filter(merge, home):
    got, a, b = weights(merge(LINEAR)), weights(home / "a"), weights(home / "b")
    for name in a:
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        first = 1.0 - 0.8 * layer / (LAYERS - 1)
        wanted = first * a[name].double() + (0.3 if "mlp" in name else 0.5) * b[name].double()
        torch.testing.assert_close(got[name].double(), wanted, rtol=1e-6, atol=1e-6)


def test_densities_by_model(merge, home):
    got = weights(merge(TIES.replace("merge_method: ties", "merge_method: ties\ndtype: float64")))
    base, *models = (weights(home / name) for name in ("base", "a", "b", "c"))
    for name, origin in base.items():
        t = int(name.split(".")[2]) / (LAYERS - 1) if ".layers." in name else 0.0
        first = 1 - 0.3 * t / 0.5 if t <= 0.5 else 0.7 - 0.6 * (t - 0.5) / 0.5
        low = min(int(3 * t), 2)
        second = [0, 0.3, 0.7, 1][low] + (3 * t - low) * (
            [0, 0.3, 0.7, 1, 1][low + 1] - [0, 0.3, 0.7, 1][low]
        )
        changes = []
        for model, density in zip(models, (first, 0.5, 0.33), strict=True):
            change = (model[name] - origin).double().flatten()
            kept = change.abs().argsort(descending=True)[: int(density * change.numel() + 1e-9)]
            changes.append(torch.zeros_like(change).index_copy(0, kept, change[kept]))
        share = torch.tensor([1.0, second, 0.5 if "mlp" in name else 0.0]).double()[:, None]
        changes = torch.stack(changes)
        sign = torch.where((share * changes).sum(0) >= 0, 1.0, -1.0)
        agree = (share * changes).sign() == sign
        mass = (share * agree).sum(0)
        merged = (share * changes * agree).sum(0) / torch.where(mass == 0, 1.0, mass)
        wanted = origin.double() + merged.reshape(origin.shape)
        assert got[name].dtype == torch.float64
        torch.testing.assert_close(got[name], wanted, rtol=1e-5, atol=1e-6)


def test_layers_of_two_models(merge, home):
    out = merge(STACK)
    got, a, b = weights(out), weights(home / "a"), weights(home / "b")
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 7
    assert torch.equal(got["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(got["lm_head.weight"], b["lm_head.weight"])
    for i in range(7):
        for rest in ("self_attn.o_proj.weight", "mlp.up_proj.weight"):
            source = a[f"model.layers.{i}.{rest}"] if i < 3 else b[f"model.layers.{i - 2}.{rest}"]
            scale = 0.5 if i >= 3 and "o_proj" in rest else 1.0
            assert torch.equal(got[f"model.layers.{i}.{rest}"], scale * source), (i, rest)
    assert len(got) == 3 + 7 * 9
    assert (out / "mergekit_config.yml").read_text() == STACK


@pytest.fixture(scope="module")
def adapter(home):
    folder = home / "lora"
    folder.mkdir()
    draw = torch.Generator().manual_seed(1)
    module = "base_model.model.model.layers.1.mlp.up_proj"
    factors = {
        f"{module}.lora_A.weight": torch.randn(2, H, generator=draw),
        f"{module}.lora_B.weight": torch.randn(INNER, 2, generator=draw),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    a, b = factors.values()
    return 3.0 * b.double() @ a.double()  # (INNER, H)


@pytest.mark.parametrize("over", ["base", "model"])
def test_an_adapter_on_a_model(merge, home, adapter, over):
    """Over the base as it is, and as the base itself."""
    plain, tuned = ("base", "a+lora") if over == "base" else ("base+lora", "a")
    text = f"{{models: [{{model: {tuned}, parameters: {{weight: 0.25}}}}], base_model: {plain},"
    got = weights(merge(text + " merge_method: task_arithmetic}"))
    base, a = weights(home / "base"), weights(home / "a")
    for name, origin in base.items():
        change = adapter if name == "model.layers.1.mlp.up_proj.weight" else 0.0
        ends = [origin.double(), a[name].double()]
        ends[over == "base"] = ends[over == "base"] + change
        wanted = ends[0] + 0.25 * (ends[1] - ends[0])
        torch.testing.assert_close(got[name].double(), wanted, rtol=1e-5, atol=1e-5)


def test_documents_that_use_each_other(merge, home):
    first = "{name: half, merge_method: linear, models: [%s, %s]}"
    one = first % tuple(f"{{model: {m}, parameters: {{weight: 1}}}}" for m in "ab")
    second = "{merge_method: passthrough, models: [{model: half, parameters: {scale: 2}}]}"
    out = merge(f"{one}\n---\n{second}")
    a, b = weights(home / "a"), weights(home / "b")
    for name, got in weights(out).items():
        torch.testing.assert_close(got, a[name] + b[name])
    assert sorted(path.name for path in out.parent.iterdir()) == ["c.yml", "out"]


PLAIN = "{models: [{model: a}, {model: %s}], merge_method: karcher, base_model: base, %s}"


def test_tokenizers(merge, home, capsys):
    out = merge(PLAIN % ("b", "tokenizer_source: union, chat_template: auto, dtype: bfloat16"))
    assert (out / "tokenizer.json").read_text() == (home / "b" / "tokenizer.json").read_text()
    assert (out / "chat_template.jinja").read_text() == "{{1}}"
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert weights(out)["lm_head.weight"].dtype == torch.bfloat16


def test_without_a_tokenizer(merge):
    out = merge(PLAIN % ("b", ""), "--no-copy-tokenizer")
    assert not list(out.glob("tokenizer*"))
    assert (out / "config.json").exists()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            STACK.replace("[1, 5]", "[1, 6]"),
            r"slices\[1\].sources\[0\].layer_range = \[1, 6\].*5 l",
        ),
        (
            CHANGES.replace("model: base, layer_range: [2", "model: c, layer_range: [2"),
            "lacks base",
        ),
        (LINEAR.replace("model: b", "model: lora"), "is an adapter; write it behind its model"),
        (LINEAR.replace("model: b", "model: ./none"), "./none: no such folder"),
    ],
)
def test_faults_that_the_models_show(merge, adapter, text, fault):
    with pytest.raises(InputError, match=fault):
        merge(text)


def test_a_plan_writes_nothing(merge, capsys):
    out = merge(TIES, "--dry-run", "--cuda", "--lora-merge-cache", "x", "--lazy-unpickle")
    said = capsys.readouterr()
    assert not out.exists()
    assert f"{len(shapes())} tensors" in said.out
    size = sum(4 * torch.Size(shape).numel() for shape in shapes().values())
    assert f"reads {3 * 4 * size:,} bytes, writes {size:,}" in said.out
    assert f"passes over the inputs: 3 of {len(shapes())} tensors" in said.out
    assert "buffers of " in said.out
    assert "arithmetic in float32\n" in said.out
    assert "10 groups" in said.out
    assert "a weight=1 density=0.85; b weight=0.225 density=0.5; c weight=0.5" in said.out
    assert said.err.count("has no effect") == 3


@pytest.mark.parametrize(("model", "code"), [("org/none", 0), ("a+b+c", 2)])
def test_exit_codes_without_models(tmp_path, model, code):
    text = f"{{models: [{{model: {model}}}], merge_method: passthrough}}"
    (tmp_path / "c.yml").write_text(text)
    words = [sys.executable, "-m", "deltaloom", "mergekit", "c.yml", "out", "--dry-run"]
    out = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == code, out.stderr
    assert ("org/none is not at hand" in out.stdout) == (code == 0)
    assert len(out.stderr.splitlines()) == (1 if code else 0)


def test_the_seed_and_threads(merge, tmp_path):
    text = TIES.replace("ties", "dare_ties")
    runs = []
    for flags in (["-j", "1"], ["-j", "3"], ["--random-seed", "5"]):
        out = merge(text, *flags)
        runs.append(weights(out)["model.layers.3.mlp.up_proj.weight"])
        out.rename(tmp_path / f"done{len(runs)}")
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert Path(tmp_path / "done1" / "model.safetensors").exists()


NATIVE = ("--precision", "float32")


def test_precision(merge, home, tmp_path):
    """The same merge of bfloat16 models, rounded at every step and once."""
    text = TIES.replace("merge_method: ties", "merge_method: ties\ndtype: bfloat16")
    out = merge(text)
    by_steps = weights(out)
    out.rename(tmp_path / "steps")
    once = weights(merge(text, *NATIVE))
    different = sum((by_steps[n] != once[n]).sum().item() for n in once)
    assert 0 < different < sum(t.numel() for t in once.values()) / 4


def test_types_are_promoted_where_none_is_asked_for(merge, home, tmp_path):
    folder = home / "half"
    folder.mkdir(exist_ok=True)
    half = {name: one.half() for name, one in weights(home / "a").items()}
    save_file(half, folder / "model.safetensors")
    (folder / "config.json").write_text((home / "a" / "config.json").read_text())
    text = "{models: [{model: half, parameters: {weight: 1}}, {model: %s, parameters: {weight: 1}}]"
    out = merge(f"{text % 'b'}, merge_method: linear}}")
    assert {one.dtype for one in weights(out).values()} == {torch.float32}


def kill_after(count, text, home, tmp_path):
    """Start the command and kill it when `count` tensors are written."""
    (tmp_path / "c.yml").write_text(text)
    code = (
        "import os, signal, sys\n"
        "from deltaloom.merge import _stream\n"
        "note = _stream.Merge._note\n"
        "seen = []\n"
        "def noted(self, name):\n"
        "    note(self, name)\n"
        "    seen.append(name)\n"
        f"    if len(seen) == {count}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "_stream.Merge._note = noted\n"
        "from deltaloom.cli.mergekit import mergekit\n"
        "mergekit(sys.argv[1:])\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "c.yml"), str(tmp_path / "out"), "-j", "1"]
    assert subprocess.run(words, cwd=home, capture_output=True).returncode == -9


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


TWO = "{name: half, merge_method: linear, models: [{model: a, parameters: {weight: 1}}]}\n---\n"


@pytest.mark.parametrize("text", [TIES.replace("ties", "dare_ties"), TWO + CHANGES])
@pytest.mark.parametrize("count", [3, 60])
def test_a_killed_run_is_taken_up(merge, home, tmp_path, monkeypatch, text, count):
    out = merge(text)
    whole = files(out)
    out.rename(tmp_path / "whole")
    before = {name: files(home / name) for name in ("base", "a", "b", "c")}
    if "half" in text and count == 3:
        count = 50  # in the second document
    elif "half" not in text and count == 60:
        count = len(shapes())
    kill_after(count, text, home, tmp_path)
    left = [path.name for path in tmp_path.iterdir()]
    assert "out" not in left
    assert {".out.work", ".out.part"} <= set(left)
    from deltaloom.merge import _stream

    written = []
    note = _stream.Merge._note
    monkeypatch.setattr(
        _stream.Merge, "_note", lambda self, name: written.append(name) or note(self, name)
    )
    assert files(merge(text)) == whole
    ours = len(weights(tmp_path / "out")) + (len(shapes()) if "half" in text else 0)
    assert len(written) == ours - count
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert {name: files(home / name) for name in before} == before


def test_another_run_starts_anew(merge, home, tmp_path):
    kill_after(5, TIES, home, tmp_path)
    out = merge(LINEAR)
    got = files(out)
    out.rename(tmp_path / "first")
    assert files(merge(LINEAR)) == got
    kept = json.loads((out / "config.json").read_text())
    assert kept == json.loads((home / "a" / "config.json").read_text())


def broken(home, name, change):
    """A copy of model a, damaged."""
    folder = home / name
    if not folder.exists():
        folder.mkdir()
        for file in (home / "a").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        change(folder)
    return name


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes(b"\x10\0\0\0\0\0\0\0" + b"not json at all!" + file.read_bytes()[24:])


def wrong_index(folder):
    table = {"model.norm.weight": "model-1.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def other_shape(folder):
    tensors = weights(folder)
    tensors["model.norm.weight"] = torch.zeros(H + 1)
    save_file(tensors, folder / "model.safetensors")


def other_names(folder):
    tensors = weights(folder)
    tensors["model.other.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")


def not_a_number(folder):
    tensors = weights(folder)
    tensors["model.layers.2.mlp.up_proj.weight"].view(-1)[7] = float("nan")
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (cut, r"model.safetensors is cut short: .* download it again"),
        (no_header, "model.safetensors is not a safetensors file"),
        (wrong_index, r"index.json lists model-1.safetensors .* not in"),
        (other_shape, r"'model.norm.weight' has shape \[17\], the base .* has \[16\]"),
        (other_names, r"no tensor 'model.norm.weight', which the base .* has"),
        (
            not_a_number,
            r"not_a_number: tensor 'model.layers.2.mlp.up_proj.weight' is not a number at element"
            " 7",
        ),
    ],
)
@pytest.mark.parametrize("precision", [(), NATIVE])
def test_damaged_models(merge, home, tmp_path, change, fault, precision):
    name = broken(home, change.__name__, change)
    text = TIES.replace("model: c", f"model: {name}").replace("value: 0}]}", "value: 0.1}]}")
    with pytest.raises(InputError, match=fault):
        merge(text, *precision)
    assert [path.name for path in tmp_path.iterdir()] == ["c.yml"]


def test_an_output_that_is_an_input(merge, home, tmp_path):
    before = files(home / "a")
    (tmp_path / "out").symlink_to(home / "a")
    with pytest.raises(InputError, match="out is one of the inputs; choose another"):
        merge(LINEAR)
    assert files(home / "a") == before


@pytest.mark.parametrize("density", [-0.1, 1.5])
def test_densities_that_are_no_shares(merge, density):
    text = TIES.replace("density: 0.33", f"density: {density}")
    with pytest.raises(InputError, match=rf"c: density = {density:g} must be from 0 to 1"):
        merge(text)


def test_a_full_disk(merge, home, tmp_path, monkeypatch):
    write, written = os.pwrite, []

    def full(handle, data, place):
        written.append(len(data))
        if sum(written) > 20_000:
            raise OSError(28, "No space left on device")
        return write(handle, data, place)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(InputError, match="the disk became full"):
            merge(TIES)
    assert [path.name for path in tmp_path.iterdir()] == ["c.yml"]
    assert merge(TIES).exists()
