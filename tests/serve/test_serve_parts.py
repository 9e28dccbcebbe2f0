"""Draws, texts as they grow, metrics, and launch files."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from core.small import byte_level, metaspace
from hypothesis import example, given, settings
from hypothesis import strategies as st
from serve.shelf import shelf_in
from typer.testing import CliRunner

from deltaloom.cli.main import app
from deltaloom.core.errors import InputError
from deltaloom.core.spec import explain
from deltaloom.serve._metrics import Metrics
from deltaloom.serve._sampling import Sampling, choose
from deltaloom.serve._text import GrowingText
from deltaloom.serve.export import export
from deltaloom.serve.settings import Serving


@pytest.mark.parametrize("rule", [Sampling(0.7), Sampling(1.5, 0.6), Sampling(1.0, 0.2)])
def test_draws_follow_the_distribution(rule):
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(2)) * 2
    share = np.exp(logits[0].double().numpy() / rule.temperature)
    share /= share.sum()
    order = np.argsort(-share)
    kept = order[: int(np.searchsorted(np.cumsum(share[order]), rule.top_p)) + 1]
    wanted = np.zeros(9)
    wanted[kept] = share[kept] / share[kept].sum()
    # A grid of draws meets each token as often as it is probable.
    draws = (np.arange(4000) + 0.5) / 4000
    found = choose(logits.expand(4000, -1), [rule] * 4000, draws.tolist())
    np.testing.assert_allclose(np.bincount(found, minlength=9) / 4000, wanted, atol=1e-3)


def test_choices_by_row():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 0.0], [0.0, float("nan"), 0.0]])
    greedy, cold = Sampling(0.0), Sampling(1e-9)
    assert choose(logits, [greedy, cold, greedy], [0.0, 0.999, 0.0]) == [1, 0, None]
    # The greatest draw there is stays inside the vocabulary.
    assert choose(logits[:1], [Sampling(1.0)], [1 - 2**-53]) == [2]
    assert choose(logits[:1], [Sampling(1.0, 1e-6)], [1 - 2**-53]) == [1]


TOKENIZERS = {"bytes": byte_level(), "metaspace": metaspace()}
STOPS = ["the cat", "ab", ". on", "é", "\n\n"]


@settings(max_examples=150, deadline=None)
@example("metaspace", "éééééé a", [])
@given(
    st.sampled_from(sorted(TOKENIZERS)),
    st.text(alphabet=st.sampled_from("ab thec.\n on日é🙂"), min_size=1, max_size=40),
    st.lists(st.sampled_from(STOPS), max_size=2, unique=True),
)
def test_pieces_are_the_text(kind, text, stop):
    """However a text is cut into tokens, its pieces are it, up to the first stop."""
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    ends = [place for one in stop if (place := whole.find(one)) >= 0]
    growing, said = GrowingText(tokenizer, stop), ""
    read = 0
    for token in ids:
        read += 1
        ended = growing.add(token)
        said += growing.piece()
        assert whole.startswith(said)
        if ended:
            break
    said += growing.finish(ids[:read])
    assert said == (whole[: min(ends)] if ends else whole)
    assert growing.stopped == bool(ends)


def test_metrics_text():
    metrics = Metrics()
    metrics.counter("seen_total", "What was seen.")
    metrics.histogram("size", "How large.", (1, 2))
    metrics.gauge("now", "At this moment.", lambda: 2.5)
    metrics.add("seen_total", model='a"b\\')
    metrics.add("seen_total", 2, model="c", name="d")
    for value in (0.5, 1, 1.5, 7):
        metrics.see("size", value)
    assert metrics.text() == (
        "# HELP seen_total What was seen.\n# TYPE seen_total counter\n"
        'seen_total{model="a\\"b\\\\"} 1\nseen_total{model="c",name="d"} 2\n'
        "# HELP size How large.\n# TYPE size histogram\n"
        'size_bucket{le="1"} 2\nsize_bucket{le="2"} 3\nsize_bucket{le="+Inf"} 4\n'
        "size_sum 10\nsize_count 4\n"
        "# HELP now At this moment.\n# TYPE now gauge\nnow 2.5\n"
    )
    assert metrics.value("seen_total", model="c") == 2
    assert metrics.value("seen_total") == 3


KINDS = ("lora", "wide", "dora", "rslora", "prompt", "whole", "sparse")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return shelf_in(tmp_path_factory.mktemp("a shelf"), KINDS)


def serving(shelf, *names, **more):
    deltas = [str(shelf / name) for name in names]
    return Serving.parse({"base": str(shelf / "base"), "deltas": deltas, **more}, "serve")


def last_words(path):
    return shlex.split(path.read_text().splitlines()[-1])


def test_vllm(shelf, tmp_path, monkeypatch):
    out = export("vllm", serving(shelf, "lora", "wide", port=9000), tmp_path / "new" / "run.sh")
    words = last_words(out)
    assert words[:4] == ["exec", "vllm", "serve", str(shelf / "base")]
    assert words[words.index("--max-lora-rank") + 1] == "8"
    at = words.index("--lora-modules")
    assert words[at + 1 : at + 3] == [f"lora={shelf / 'lora'}", f"wide={shelf / 'wide'}"]
    assert os.access(out, os.X_OK)
    subprocess.run(["bash", "-n", out], check=True)
    monkeypatch.setenv("DELTALOOM_API_KEY", "key")
    out = export("vllm", serving(shelf, host="0.0.0.0"), tmp_path / "open.sh")
    assert '--api-key "${DELTALOOM_API_KEY:?set it}"' in out.read_text()
    assert "key" not in out.read_text().replace("--api-key", "")


def test_transformers(shelf, tmp_path):
    names = ("lora", "dora", "sparse", "whole")
    out = export("transformers", serving(shelf, *names), tmp_path / "run.sh")
    text = out.read_text()
    merges = [shlex.split(line) for line in text.splitlines() if line.startswith("deltaloom")]
    assert [one[-1] for one in merges] == [
        "out=models/lora",
        "out=models/dora",
        "out=models/sparse",
    ]
    assert merges[0][4:6] == [f"deltas=[{shelf / 'lora'}]", "form=model"]
    assert f"#   {shelf / 'whole'}" in text
    subprocess.run(["bash", "-n", out], check=True)


@pytest.mark.parametrize(
    ("engine", "names", "more", "words"),
    [
        ("vllm", ["dora"], {}, "dora: vLLM does not serve DoRA"),
        ("vllm", ["rslora"], {}, "does not read rank_pattern"),
        ("vllm", ["prompt"], {}, "this is prompt"),
        ("vllm", ["whole"], {}, "this is model"),
        ("transformers", ["prompt"], {}, "prompt makes none"),
        ("transformers", [], {"router": "r"}, "does not route by content"),
        ("tgi", [], {}, "must be one of vllm, transformers"),
    ],
)
def test_what_other_engines_cannot_serve(engine, names, more, words, shelf, tmp_path):
    with pytest.raises(InputError, match=words):
        export(engine, serving(shelf, *names, **more), tmp_path / "run.sh")
    assert not (tmp_path / "run.sh").exists()


def test_the_command_writes_launch_files(shelf, tmp_path):
    out = tmp_path / "run.sh"
    words = [f"base={shelf / 'base'}", f"deltas.law={shelf / 'lora'}", f"out={out}"]
    told = CliRunner().invoke(app, ["serve", *words, "--export", "vllm"])
    assert (told.exit_code, told.stdout) == (0, f"{out}\n")
    assert f"law={shelf / 'lora'}" in last_words(out)
    with pytest.raises(InputError, match="serve: 'base' is missing: The model under all tasks"):
        CliRunner().invoke(app, ["serve", "port=1"], catch_exceptions=False)


def test_without_the_extra(shelf, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "deltaloom.serve.server", raising=False)
    with pytest.raises(InputError, match=r"needs uvicorn; .*deltaloom\[serve\]"):
        CliRunner().invoke(app, ["serve", f"base={shelf / 'base'}"], catch_exceptions=False)


def test_the_page_has_every_setting():
    """Texts live once, in the settings' docstrings; the page repeats them."""
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
    for key in Serving.model_fields:
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{key}` |")]
        assert line.endswith(f" | {explain(Serving, key)} |")
