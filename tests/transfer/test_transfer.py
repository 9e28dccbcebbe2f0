"""Transfer methods against arithmetic by hand, closed forms, brute force and scikit-learn."""

import json

import numpy as np
import pytest
import torch
import vocabularies
from safetensors.torch import load_file, save_file

import deltaloom
from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.core.errors import InputError
from deltaloom.core.vocabulary import Vocabulary

torch.set_num_threads(1)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("transfer")
    vocabularies.old(home / "old")
    vocabularies.old(home / "untied", tied=False, seed=2)
    vocabularies.new(home / "new", hidden=12, seed=1)
    vocabularies.new(home / "new-untied", hidden=12, seed=3, tied=False)
    lines = [{"text": f"{vocabularies.WORDS[i % 7 :]} the mat"} for i in range(24)]
    (home / "text.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return home


def moved(home, method, out, base="old", tokenizer="new", **settings):
    return deltaloom.transfer(
        method, base=home / base, tokenizer=home / tokenizer, out=out, **settings
    )


def both(home, base="old", tokenizer="new"):
    return (
        Vocabulary.read(home / base),
        Vocabulary.read(home / tokenizer),
        load_file(home / base / "model.safetensors")[EMBED],
    )


def by_hand(old, new, table):
    """Rows by token: the shared ones, and for others the pieces."""
    shared, pieces = {}, {}
    for number, token in enumerate(new.tokens):
        if token is None:
            continue
        same = old.numbers.get(token)
        if same is not None:
            shared[number] = table[same]
        else:
            pieces[number] = old.pieces(token)
    return shared, pieces


def test_fvt_by_hand(home, tmp_path):
    delta = moved(home, "fvt", tmp_path / "out")
    old, new, table = both(home)
    made = load_file(tmp_path / "out" / "model.safetensors")[EMBED]
    shared, pieces = by_hand(old, new, table)
    assert delta.kind == "vocab"
    for number, row in shared.items():
        assert torch.equal(made[number], row)
    # "▁mat" is Ġm + at; "cats" is cat + s; "é" is two bytes
    expected = {b" mat": [b" m", b"at"], b"cats": [b"cat", b"s"], "é".encode(): [b"\xc3", b"\xa9"]}
    for token, parts in expected.items():
        number = new.numbers[token]
        assert [old.tokens[i] for i in pieces[number]] == parts
        wanted = torch.stack([table[old.numbers[part]] for part in parts]).mean(0)
        assert torch.allclose(made[number], wanted, atol=1e-6)
    # specials by role: <begin> is <s>, <end> is </s>; nothing does the work of <unk>
    assert torch.equal(made[new.roles["bos"]], table[old.roles["bos"]])
    assert torch.equal(made[new.roles["eos"]], table[old.roles["eos"]])
    assert torch.allclose(made[new.roles["unk"]], table.mean(0), atol=1e-6)


def test_one_end_of_text_begins_texts_in_the_input_and_ends_them_in_the_output(home, tmp_path):
    vocabularies.byte_level(
        tmp_path / "one", vocabularies.OLD, bos_token="<|e|>", eos_token="<|e|>"
    )
    moved(home, "fvt", tmp_path / "out", base="untied", tokenizer=tmp_path / "one")
    made = load_file(tmp_path / "out" / "model.safetensors")
    own = load_file(home / "untied" / "model.safetensors")
    assert torch.equal(made[EMBED][0], own[EMBED][0])  # <s>
    assert torch.equal(made[HEAD][0], own[HEAD][1])  # </s>


def test_copy_draws_with_the_tables_moments(home, tmp_path):
    old, new, table = both(home)
    shared, pieces = by_hand(old, new, table)
    for rest, wanted in (("zero", torch.zeros(16)), ("mean", table.mean(0))):
        moved(home, "copy", tmp_path / rest, rest=rest)
        made = load_file(tmp_path / rest / "model.safetensors")[EMBED]
        for number in pieces:
            assert torch.allclose(made[number], wanted, atol=1e-6)
    from deltaloom.transfer.copy import drawn

    rows = drawn(table, 20000, seed=0)
    assert torch.allclose(rows.mean(0), table.mean(0), atol=0.02)
    assert torch.allclose(rows.std(0), table.std(0), atol=0.02)
    first, second = moved(home, "copy", tmp_path / "a"), moved(home, "copy", tmp_path / "b", seed=1)
    for number in (*shared, *pieces):
        same = torch.equal(first.tables[EMBED][number], second.tables[EMBED][number])
        assert same is (number in shared)


def anchors(home, base="old", donor="new"):
    old, new = Vocabulary.read(home / base), Vocabulary.read(home / donor)
    shared = [token for token in old.numbers if token in new.numbers]
    return [old.numbers[t] for t in shared], [new.numbers[t] for t in shared]


@pytest.mark.parametrize("ridge", [0.01, 0.1])
def test_ridge_is_the_closed_form(home, tmp_path, ridge):
    moved(home, "ridge", tmp_path / "out", ridge=ridge)
    moved(home, "blend", tmp_path / "blend", ridge=ridge, share=0.25)
    moved(home, "fvt", tmp_path / "fvt")
    _, new, table = both(home)
    donor = load_file(home / "new" / "model.safetensors")[EMBED].double().numpy()
    ours, theirs = anchors(home)
    a, b = donor[theirs], table.double().numpy()[ours]
    ca, cb = a - a.mean(0), b - b.mean(0)
    gram = ca.T @ ca
    w = np.linalg.solve(gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram)), ca.T @ cb)
    made, mixed, means = (
        load_file(tmp_path / one / "model.safetensors")[EMBED] for one in ("out", "blend", "fvt")
    )
    number = new.numbers[b" mat"]
    wanted = (donor[number] - a.mean(0)) @ w + b.mean(0)
    assert np.allclose(made[number].numpy(), wanted, atol=1e-5)
    blend = 0.75 * means[number] + 0.25 * torch.from_numpy(wanted).float()
    assert torch.allclose(mixed[number], blend, atol=1e-5)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("form", ["gram", "together"])
def test_pursuit_is_scikit_learns_for_each_vector(monkeypatch, normalise, form):
    from sklearn.linear_model import orthogonal_mp

    from deltaloom.transfer import _pursuit

    monkeypatch.setattr(_pursuit, "TOGETHER", 7)
    monkeypatch.setattr(_pursuit, "NEAR", 24)  # few enough that runs of picks are taken back
    if form == "together":
        monkeypatch.setattr(_pursuit, "GRAM_BYTES", 0)
    dice = torch.Generator().manual_seed(0)
    mix = torch.randn(40, 40, generator=dice) / 6
    lengths = 0.5 + torch.rand(300, 1, generator=dice)
    atoms = torch.randn(300, 40, generator=dice) @ mix * lengths
    vectors = torch.randn(20, 40, generator=dice) @ mix
    places, factors = _pursuit.Pursuit(atoms, 12, normalise=normalise).sums(vectors)
    scale = atoms.double().norm(dim=1).numpy() if normalise else np.ones(300)
    unit = (atoms.double().numpy().T / scale).astype(np.float64)
    for one in range(len(vectors)):
        wanted = orthogonal_mp(unit, vectors[one].double().numpy(), n_nonzero_coefs=12) / scale
        got = np.zeros(300)
        np.add.at(got, places[one].numpy(), factors[one].numpy())
        assert np.flatnonzero(wanted).tolist() == sorted(places[one].tolist())
        assert np.allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize("bytes_", [2**31, 0])
def test_pursuit_ends_early(monkeypatch, bytes_):
    """An atom itself takes one pick, a repeated atom none, and nothing is picked for nothing."""
    from deltaloom.transfer import _pursuit

    monkeypatch.setattr(_pursuit, "GRAM_BYTES", bytes_)
    atoms = torch.cat([torch.zeros(1, 6), torch.eye(6)[[0, 1, 2, 3, 0]]])
    vectors = torch.stack([2 * torch.eye(6)[1], torch.zeros(6), torch.eye(6)[5]])
    places, factors = _pursuit.Pursuit(atoms, 3).sums(vectors)
    assert places[0, 0] == 2
    assert factors[0].tolist() == [2.0, 0.0, 0.0]
    assert factors[1:].abs().max() == 0


@pytest.mark.parametrize("k", [4, None])
def test_omp_reads_the_sums_off_in_the_base(home, tmp_path, k):
    from sklearn.linear_model import orthogonal_mp

    moved(home, "omp", tmp_path / "out", base="untied", tokenizer="new-untied", k=k)
    _, new, _ = both(home, "untied", "new-untied")
    ours, theirs = anchors(home, "untied", "new-untied")
    made = load_file(tmp_path / "out" / "model.safetensors")
    own, given = (load_file(home / n / "model.safetensors") for n in ("untied", "new-untied"))
    number = new.numbers[b"cats"]
    for name in (EMBED, HEAD):
        atoms = given[name].double().numpy()[theirs]
        unit = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
        most = k or atoms.shape[1] // 8
        found = orthogonal_mp(unit.T, given[name].double().numpy()[number], n_nonzero_coefs=most)
        wanted = (found / np.linalg.norm(atoms, axis=1)) @ own[name].double().numpy()[ours]
        assert np.allclose(made[name][number].numpy(), wanted, atol=1e-4)


def test_long_rows_do_not_win_every_pick():
    """mergekit's form, without unit length, picks the long atoms first."""
    from deltaloom.transfer._pursuit import Pursuit

    dice = torch.Generator().manual_seed(0)
    atoms = torch.randn(200, 24, generator=dice)
    atoms[:7] *= 5
    vectors = torch.randn(30, 24, generator=dice)

    def share(normalise):
        places, _ = Pursuit(atoms, 4, normalise=normalise).sums(vectors)
        return (places < 7).float().mean().item()

    assert share(normalise=False) > 3 * share(normalise=True)


def brute_force_sparsemax(scores):
    """The projection on the simplex, by bisection of its threshold in float64."""
    low, high = scores.min() - 1, scores.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(scores - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(scores - low, 0)


def test_focus_is_its_formula(home, tmp_path, monkeypatch):
    from deltaloom.transfer import _static_vectors, focus

    vectors = np.random.default_rng(0).standard_normal((400, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    old, new, table = both(home)
    seldom = new.numbers["é".encode()]

    def given(texts, tokens, **how):
        found = vectors[:tokens].copy()
        found[seldom] = 0
        return found

    monkeypatch.setattr(_static_vectors, "static_vectors", given)
    monkeypatch.setattr(focus, "FIRST", 3)  # so that the support goes on for some
    moved(home, "focus", tmp_path / "out", data=home / "text.jsonl")
    made = load_file(tmp_path / "out" / "model.safetensors")[EMBED]
    shared, pieces = by_hand(old, new, table)
    known = sorted(shared)
    for number in pieces:
        if number == seldom:
            continue
        weights = brute_force_sparsemax((vectors[known] @ vectors[number]).astype(np.float64))
        wanted = weights @ torch.stack([shared[i] for i in known]).double().numpy()
        assert np.allclose(made[number].numpy(), wanted, atol=1e-5)
    from deltaloom.transfer.copy import drawn

    place = sorted(pieces).index(seldom)
    assert torch.equal(made[seldom], drawn(table, len(pieces), 0)[place])


def test_static_vectors_are_the_factors_of_the_information():
    """Against dense NumPy: cosines of rows of U sqrt(S) of the PPMI matrix."""
    from deltaloom.transfer._static_vectors import static_vectors

    dice = np.random.default_rng(1)
    texts = [dice.integers(0, 12, 40).tolist() for _ in range(6)]
    found = static_vectors(texts, 13, window=2, least=5, width=4)
    counts = np.zeros((12, 12))
    for text in texts:
        for i, one in enumerate(text):
            for j in (i - 2, i - 1, i + 1, i + 2):
                if 0 <= j < len(text):
                    counts[one, text[j]] += 1
    total = counts.sum(1)
    smooth = total**0.75 / (total**0.75).sum()
    with np.errstate(divide="ignore"):
        ppmi = np.maximum(np.log(counts / total[:, None] / smooth[None]), 0)
    left, values, _ = np.linalg.svd(ppmi)
    rows = left[:, :4] * np.sqrt(values[:4])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.allclose(found[:12] @ found[:12].T, rows @ rows.T, atol=1e-4)
    assert not found[12].any()


def test_a_tokenizer_without_overlap_is_refused(home, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<u>": 0, "зима": 1, "лето": 2}, unk_token="<u>"))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<u>").save_pretrained(tmp_path / "w")
    vocabularies.model(tmp_path / "w")
    for method in ("omp", "ridge", "blend", "copy"):
        with pytest.raises(InputError, match=r"share no token|nothing to copy"):
            moved(home, method, tmp_path / method, tokenizer=tmp_path / "w")
        assert not (tmp_path / method).exists()
    moved(home, "fvt", tmp_path / "fvt", tokenizer=tmp_path / "w")  # bytes are always known


def test_refusals_name_what_is_needed(home, tmp_path):
    bare = vocabularies.byte_level(tmp_path / "bare", vocabularies.OLD)
    with pytest.raises(InputError, match="donor="):
        moved(home, "omp", tmp_path / "a", tokenizer=bare)
    with pytest.raises(InputError, match="makes no use of donor="):
        moved(home, "fvt", tmp_path / "b", donor=home / "new")
    with pytest.raises(InputError, match="heal = tune needs data="):
        moved(home, "fvt", tmp_path / "c", heal="tune")
    with pytest.raises(InputError, match="focus needs data="):
        moved(home, "focus", tmp_path / "d")
    with pytest.raises(InputError, match="no such folder"):
        moved(home, "fvt", tmp_path / "e", tokenizer=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no tokenizer"):
        moved(home, "fvt", tmp_path / "f", tokenizer=tmp_path / "empty")
    assert not [path for path in tmp_path.iterdir() if path.name in "abcdef"]


def test_text_for_nothing_is_told(home, tmp_path, capsys):
    moved(home, "fvt", tmp_path / "a", data=home / "text.jsonl")
    assert "heal = none: nothing is tuned on data=" in capsys.readouterr().err
    moved(home, "focus", tmp_path / "b", data=home / "text.jsonl", least=1)
    assert "heal = none" not in capsys.readouterr().err


def test_a_tokenizer_without_an_end_is_told(home, tmp_path, capsys):
    moved(home, "fvt", tmp_path / "a")
    assert "ends a text" not in capsys.readouterr().err
    bare = vocabularies.byte_level(tmp_path / "bare", vocabularies.OLD)
    moved(home, "fvt", tmp_path / "b", tokenizer=bare)
    assert "bare names no token that ends a text" in capsys.readouterr().err


def test_a_table_that_nobody_knows_is_refused_by_name(home, tmp_path):
    import shutil

    shutil.copytree(home / "untied", tmp_path / "biased")
    tensors = load_file(tmp_path / "biased" / "model.safetensors")
    tensors["lm_head.bias"] = torch.zeros(len(tensors[HEAD]))
    save_file(tensors, tmp_path / "biased" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lm_head\.bias"):
        moved(home, "fvt", tmp_path / "out", base=tmp_path / "biased")


def test_rows_that_are_not_finite_are_refused(home, tmp_path):
    import shutil

    shutil.copytree(home / "new", tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors[EMBED][Vocabulary.read(tmp_path / "nan").numbers[b" mat"], 3] = float("nan")
    save_file(tensors, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="not finite"):
        moved(home, "ridge", tmp_path / "out", tokenizer=tmp_path / "nan")


def test_ids_beyond_the_rows_are_unknown(home, tmp_path):
    """A donor whose tokenizer has more tokens than its table has rows."""
    import shutil

    shutil.copytree(home / "new", tmp_path / "short")
    tensors = load_file(tmp_path / "short" / "model.safetensors")
    new = Vocabulary.read(tmp_path / "short")
    last = new.numbers["é".encode()]
    assert last == len(new) - 1
    tensors[EMBED] = tensors[EMBED][:-1].clone()
    save_file(tensors, tmp_path / "short" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(
        json.dumps({**config, "vocab_size": config["vocab_size"] - 1})
    )
    moved(home, "ridge", tmp_path / "out", tokenizer=tmp_path / "short")
    moved(home, "fvt", tmp_path / "fvt", tokenizer=tmp_path / "short")
    made, means = (load_file(tmp_path / n / "model.safetensors")[EMBED] for n in ("out", "fvt"))
    assert torch.equal(made[last], means[last])
    base = Base(model=str(home / "old"))
    assert load(tmp_path / "out", base).shape(EMBED)[0] == len(new)
