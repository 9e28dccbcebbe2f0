"""The hypernetwork's parts against brute force and arithmetic by hand, and the whole on a small
model.
"""

import itertools
import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import vocabularies
from safetensors.torch import load_file, save_file

import deltaloom
from deltaloom.core.base import Base
from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.examples import Examples
from deltaloom.core.run import Run
from deltaloom.core.vocabulary import ALPHABET, CODES, Vocabulary
from deltaloom.transfer import _hypernetwork, _hypernetwork_training
from deltaloom.transfer._hypernetwork import Hypernetwork
from deltaloom.transfer._sampled_tokenizers import NEVER, TokenizerSampler, splitter, substrings
from deltaloom.transfer.zett import Zett, leads_with_space

torch.set_num_threads(1)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHORT = {**Zett.trial, "rows_per_step": 6, "row_tokens": 24}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("zett")
    vocabularies.old(home / "old")
    vocabularies.old(home / "untied", tied=False, seed=2)
    vocabularies.new(home / "new", hidden=12, seed=1)
    lines = [{"text": f"{vocabularies.WORDS[i % 7 :]} the mat é"} for i in range(24)]
    (home / "text.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return home


def moved(home, out, base="old", tokenizer="new", **settings):
    return deltaloom.transfer(
        "zett",
        base=home / base,
        tokenizer=home / tokenizer,
        out=out,
        data=home / "text.jsonl",
        **{**SHORT, **settings},
    )


def training(home, run, base="old", **settings):
    method = Zett(**{**SHORT, **settings})
    own = Base(model=str(home / base))
    data = Examples.read(home / "text.jsonl")
    return method._training(own, Vocabulary.read(home / base), data, run)


def sampler(texts, **how):
    settings = {"seed": 0, "batch": 3, "window": 2, "size": 300, "length": 20}
    settings |= {"noise": 1e-12, "spread": 0.0, "leading_space": True}
    return TokenizerSampler(texts, **{**settings, **how})


def cuts(word):
    """Every way to cut a word."""
    for borders in itertools.product([False, True], repeat=len(word) - 1):
        places = [0, *(i + 1 for i, cut in enumerate(borders) if cut), len(word)]
        yield [word[a:b] for a, b in itertools.pairwise(places)]


def test_text_is_cut_where_the_scores_sum_is_largest():
    texts = [vocabularies.WORDS, "the mat and the cats", "é naïve mat sat flat"]
    _, found = sampler(texts, noise=1e-3).draw(4)
    score = dict(zip(found.pieces, found.scores, strict=True))
    text = "naïve cats sat flat é"
    wanted = []
    for word, _ in splitter(True).pre_tokenize_str(text):
        known = [cut for cut in cuts(word) if all(piece in score for piece in cut)]
        wanted += max(known, key=lambda cut: sum(score[piece] for piece in cut))
    (ids,) = found.encode([text])
    assert [found.pieces[number] for number in ids] == wanted
    assert b"".join(found.tokens[number] for number in ids) == f" {text}".encode()


def test_pieces_and_scores_are_those_of_the_published_rule():
    words = Counter({"Ġthe": 5, "Ġcats": 2, "Ã©lan": 1})  # é is two bytes
    shares = Counter()
    for word, count in words.items():
        signs = [i for i, sign in enumerate(word) if not 0x80 <= CODES[sign] < 0xC0]
        for start in signs[::4]:
            for stop in range(start + 1, min(len(word), start + 15) + 1):
                shares[word[start:stop]] += count * (stop - start)
    total = sum(shares.values())
    found = sampler([""]).sampled(words, np.random.default_rng(0))
    assert set(found.pieces) == {*ALPHABET, *shares}
    assert len(found.pieces) == len(set(found.pieces))
    for piece, score in zip(found.pieces, found.scores, strict=True):
        share = shares[piece] if len(piece) > 1 else min(shares.values())
        assert score == pytest.approx(math.log(share / total), abs=1e-6)
    few = sampler([""], size=258).sampled(words, np.random.default_rng(0))
    assert few.pieces == (*ALPHABET, *sorted(shares, key=lambda p: (-shares[p], p))[:2])
    noisy = sampler([""], noise=10.0).sampled(words, np.random.default_rng(0))
    assert NEVER in noisy.scores  # half of the noise is below nothing
    assert max(map(len, substrings("Ġ" + "a" * 40))) == 15


def test_a_step_is_its_number_and_not_what_was_drawn_before():
    texts = [f"{word} mat {i}" for i, word in enumerate(vocabularies.WORDS.split())]
    one, other = sampler(texts), sampler(texts)
    for step in range(4):
        one.draw(step)
    assert one.draw(4) == other.draw(4)
    assert one.draw(4) != one.draw(5)
    long = "abc def " * 100
    (text, whole), *_ = sampler([long], batch=1).draw(0)[0]
    assert len(text) == 320
    assert text in long
    assert whole is long.endswith(text) or long.count(text) > 1


def test_tokens_go_through_the_network_as_if_each_was_alone(monkeypatch):
    """Groups of as many pieces, in blocks that are made again going backward, change nothing."""
    torch.manual_seed(0)
    tables = [torch.randn(30, 8), 3 * torch.randn(30, 8) + 1]
    network = Hypernetwork(tables, 12, 2)
    forms = [(3,), (1, 2, 3), (4, 5), (7, 8, 9), (2,), (9, 8, 7)]
    network.scale_to(tables, [(number,) for number in range(30)])
    for table, rows in zip(tables, network([(number,) for number in range(30)]), strict=True):
        assert torch.allclose(rows.mean(0), table.mean(0), atol=1e-4)
        assert torch.allclose(rows.std(0), table.std(0), atol=1e-4)
    together = network(forms)
    torch.stack([rows.square().sum() for rows in together]).sum().backward()
    gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    for place, form in enumerate(forms):
        for rows, alone in zip(together, network([form]), strict=True):
            assert torch.allclose(rows[place], alone[0], atol=1e-5)
    assert not torch.allclose(together[0][3], together[0][5], atol=1e-2)  # order counts
    monkeypatch.setattr(_hypernetwork, "BLOCK", 2)
    network.zero_grad()
    torch.stack([rows.square().sum() for rows in network(forms)]).sum().backward()
    again = [p.grad for p in network.parameters() if p.grad is not None]
    for a, b in zip(gradients, again, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("base", ["old", "untied"])
def test_the_identity_phase_ends_at_the_bases_rows(home, tmp_path, base):
    steps = {"steps": 80, "identity_steps": 80, "identity_lr": 5e-3, "width": 64}
    with Run.open(tmp_path / "run", {"steps": []}, {}) as run:
        learner = training(home, run, base, **steps)
        learner.known = learner.known[-40:]  # random rows: nothing to learn but each by heart
        learner.train(run, run.work / "hypernetwork")
    made = learner.predict([(number,) for number in learner.known])
    assert len(made) == len(learner.tables) == (1 if base == "old" else 2)
    for rows, table in zip(made, learner.tables, strict=True):
        wanted = table[learner.known]
        left = (rows - wanted).square().mean() / wanted.var()
        assert left < 0.05


@pytest.mark.parametrize("base", ["old", "untied"])
def test_a_steps_loss_is_that_of_a_model_with_these_tables(home, tmp_path, monkeypatch, base):
    """Against a model that holds the tables itself, for each row alone; and in parts or at once."""
    with Run.open(tmp_path / "run", {"steps": []}, {}) as run:
        learner = training(home, run, base)
    losses, count = learner._language(3)
    gradients = [p.grad.clone() for p in learner.network.parameters() if p.grad is not None]
    texts, tokenizer = learner.sampler.draw(3)
    forms = [learner.pieces(token) for token in tokenizer.tokens]
    begin, end = learner.vocabulary.roles["bos"], learner.vocabulary.roles["eos"]
    tables = [
        torch.cat([own[[begin, end]], rows])
        for own, rows in zip(learner.tables, learner.predict(forms), strict=True)
    ]
    model = Base(model=str(home / base)).load()
    for module, table in zip(
        (model.get_input_embeddings(), model.get_output_embeddings()), tables * 2, strict=False
    ):
        module.weight = torch.nn.Parameter(table)
    total = tokens = 0.0
    for (_, whole), ids in zip(texts, tokenizer.encode([text for text, _ in texts]), strict=True):
        row = [0, *(number + 2 for number in ids), *([1] if whole else [])]
        row = torch.tensor([row[: learner.sampler.length]])
        with torch.no_grad():
            logits = model(row).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
        tokens += row.shape[1]
    assert count == tokens
    assert losses["loss"] == pytest.approx(total / (tokens - len(texts)), rel=1e-4)
    near = []
    for own, rows in zip(learner.tables, learner.predict(forms), strict=True):
        pairs = [(rows[i], own[form[0]]) for i, form in enumerate(forms) if len(form) == 1]
        apart = sum((a - b).square().sum() for a, b in pairs)
        near.append(apart / sum(b.norm() for _, b in pairs))
    assert losses["near_loss"] == pytest.approx(float(sum(near)) / len(near), rel=1e-4)
    monkeypatch.setattr(_hypernetwork_training, "LOGITS_PER_BATCH", 1)
    learner.network.zero_grad()
    assert learner._language(3)[0]["loss"] == pytest.approx(losses["loss"], rel=1e-5)
    again = [p.grad for p in learner.network.parameters() if p.grad is not None]
    for a, b in zip(gradients, again, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def test_pieces_are_the_bytes_of_the_base(home, tmp_path):
    with Run.open(tmp_path / "run", {"steps": []}, {}) as run:
        learner = training(home, run, pieces=3)
    tokens = learner.vocabulary.tokens
    for token in learner.sampler.draw(0)[1].tokens:
        whole = learner.vocabulary.pieces(token)
        assert b"".join(tokens[number] for number in whole) == token
        assert learner.pieces(token) == tuple(whole[:3])
    assert leads_with_space(Base(model=str(home / "old")), learner.vocabulary) is False


@pytest.mark.parametrize("base", ["old", "untied"])
def test_special_tokens_keep_their_rows_and_others_are_the_networks(home, tmp_path, base):
    delta = moved(home, tmp_path / "out", base)
    assert delta.kind == "vocab"
    own = load_file(home / base / "model.safetensors")
    made = load_file(tmp_path / "out" / "model.safetensors")
    old, new = Vocabulary.read(home / base), Vocabulary.read(home / "new")
    for name in [EMBED] if base == "old" else [EMBED, HEAD]:
        for role in ("bos", "eos"):
            assert torch.equal(made[name][new.roles[role]], own[name][old.roles[role]])
        shared = [(n, old.numbers[t]) for t, n in new.numbers.items() if t in old.numbers]
        assert not any(torch.equal(made[name][n], own[name][o]) for n, o in shared)
        assert made[name].shape == (len(new), 16)
    others = set(own) - {EMBED, HEAD}
    assert all(torch.equal(own[name], made[name]) for name in others)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_training_lowers_the_loss_on_tokenizers_not_seen(home, tmp_path):
    """Steps that the network was not trained on have tokenizers of their own."""
    steps = {"steps": 60, "identity_steps": 20, "warmup_steps": 2}
    rates = {"identity_lr": 1e-2, "network_lr": 1e-2}
    with Run.open(tmp_path / "run", {"steps": []}, {}) as run:
        learner = training(home, run, **steps, **rates)
        before = learner._language(1000)[0]["loss"]
        learner.train(run, run.work / "hypernetwork")
    assert learner._language(1000)[0]["loss"] < before - 0.3


@pytest.mark.parametrize("healing", [{}, {"heal": "tune", "lr": 1e-2}])
def test_killed_between_checkpoints_it_ends_in_the_same_bytes(home, tmp_path, monkeypatch, healing):
    steps = {"steps": 20, "identity_steps": 8, **healing}
    moved(home, tmp_path / "whole", **steps)
    step = _hypernetwork_training.HyperTraining._step

    def interrupted(self, number):
        if number == 13:  # a checkpoint is written every second step
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(_hypernetwork_training.HyperTraining, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        moved(home, tmp_path / "cut", **steps)
    monkeypatch.setattr(_hypernetwork_training.HyperTraining, "_step", step)
    moved(home, tmp_path / "cut", **steps)
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_the_learning_rate_rises_twice_and_falls_once():
    settings = _hypernetwork_training.HyperSettings(
        steps=50,
        identity_steps=10,
        identity_lr=1.0,
        identity_tokens=1,
        lr=2.0,
        warmup_steps=20,
        near=0.5,
        pieces=7,
        precision="float32",
    )
    rates = [settings.lr_at(step) for step in range(50)]
    assert rates[9] == 1.0
    assert rates[10] == pytest.approx(0.1)
    assert rates[29] == rates[30] == 2.0
    assert rates[40] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rates[49] > settings.lr_at(50) == pytest.approx(0.2)


def test_refusals(home, tmp_path):
    with pytest.raises(InputError, match="zett needs data="):
        deltaloom.transfer("zett", base=home / "old", tokenizer=home / "new", out=tmp_path / "a")
    shutil.copytree(home / "old", tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors[EMBED][5, 0] = float("nan")
    save_file(tensors, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WorkError, match="smaller identity_lr or network_lr"):
        moved(home, tmp_path / "b", base=tmp_path / "nan")
    blank = tmp_path / "blank.jsonl"
    blank.write_text(json.dumps({"text": " "}) + "\n")
    with pytest.raises(InputError, match=r"every row of .*blank"):
        deltaloom.transfer(
            "zett", base=home / "old", tokenizer=home / "new", data=blank, out=tmp_path / "c"
        )
    assert not (tmp_path / "c").exists()
