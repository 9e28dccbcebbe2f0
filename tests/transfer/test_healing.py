"""Healing: what it leaves alone, what it lowers, and the chunks' loss by hand."""

import json
import math

import pytest
import torch
import vocabularies
from safetensors.torch import load_file

import deltaloom
from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.transfer._distillation import TEMPERATURE, Distillation, aligned, chunk_loss

torch.set_num_threads(1)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("healing")
    vocabularies.old(home / "old")
    vocabularies.old(home / "untied", tied=False, seed=2)
    vocabularies.byte_level(home / "new", [("Ġ", "t"), ("a", "t"), ("Ġt", "h")], eos_token="</s>")
    lines = [{"text": f"{vocabularies.WORDS[i % 7 :]} the mat"} for i in range(24)]
    (home / "text.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return home


def healed(home, out, base="old", **settings):
    return deltaloom.transfer(
        "fvt",
        base=home / base,
        tokenizer=home / "new",
        data=home / "text.jsonl",
        out=out,
        **{"lr": 1e-2, "epochs": 4, "batch_size": 8, **settings},
    )


def loss(home, model, out):
    found = deltaloom.measure("loss", base=model, tasks=home / "text.jsonl", out=out)
    return next(iter(found.values())).value


@pytest.mark.parametrize(("base", "how"), [("old", "tune"), ("untied", "tune"), ("old", "distill")])
def test_only_the_tables_are_tuned_and_the_text_is_likelier(home, tmp_path, base, how):
    healed(home, tmp_path / "plain", base, heal="none")
    delta = healed(home, tmp_path / "healed", base, heal=how)
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("plain", "healed")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == ({EMBED} if base == "old" else {EMBED, HEAD})
    assert delta.kind == "vocab"
    again = load(tmp_path / "healed", Base(model=str(home / base)))
    assert torch.equal(again.tables[EMBED], after[EMBED])
    first, second = (loss(home, tmp_path / n, tmp_path / f"m-{n}") for n in ("plain", "healed"))
    assert second < first - 0.1
    record = json.loads((tmp_path / "healed" / "run.json").read_text())
    assert record["notes"]["healing_steps"] == 12
    if how == "distill":
        assert record["notes"]["rows_not_aligned"] == 0
        assert record["notes"]["chunks"] > 100


def test_a_tied_model_may_name_no_output_table(home, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    healed(home, tmp_path / "named", heal="tune")
    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda _: None)
    healed(home, tmp_path / "unnamed", heal="tune")
    named, unnamed = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("named", "unnamed")
    )
    assert named == unnamed


@pytest.mark.parametrize("how", ["tune", "distill"])
def test_an_interrupted_healing_ends_in_the_same_bytes(home, tmp_path, monkeypatch, how):
    from deltaloom.transfer._healing import Healing

    healed(home, tmp_path / "whole", heal=how)
    write = Healing._write

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Healing, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        healed(home, tmp_path / "cut", heal=how)
    monkeypatch.setattr(Healing, "_write", write)
    healed(home, tmp_path / "cut", heal=how)
    whole, cut = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()
    assert not (tmp_path / "cut" / ".work").exists()


def test_chunks_end_where_both_have_a_border():
    # <s>|the| cat|s| sat| against <b>|th|e| c|ats sat|: borders at 0, 3, 12
    student = b"the cats sat", [0, 3, 7, 8, 12, 12]
    teacher = b"the cats sat", [0, 2, 3, 5, 12]
    found = aligned(student, teacher, [-1.0, -2.0, -4.0, -8.0])
    assert found is not None
    assert found.start == 0
    assert found.ends == (1, 4)  # the end token, which has no bytes, is in no chunk
    assert found.teacher == (-3.0, -12.0)
    # a space that one tokenizer puts before the text; a row that one side cut short
    shifted = aligned(student, (b" the cats sat", [0, 3, 4, 6, 13]), [-1.0, -2.0, -4.0, -8.0])
    assert shifted == found
    short = aligned(student, (b"the cat", [0, 3, 7]), [-1.0, -2.0])
    assert short is not None
    assert (short.ends, short.teacher) == ((1, 2), (-1.0, -2.0))
    assert aligned(student, (b"THE cats", [0, 3, 8]), [-1.0, -2.0]) is None
    assert aligned(student, (b"the cats sat", [0, 12]), [-1.0]) is not None


def test_the_chunks_loss_by_hand_and_its_lowest_place():
    teacher = torch.tensor([-1.0, -20.0, -300.0])
    student = torch.tensor([-2.0, -10.0, -50.0], requires_grad=True)
    found = chunk_loss(teacher, student)
    for t, s, got in zip(teacher.tolist(), student.tolist(), found.tolist(), strict=True):
        p, q = math.exp(t / TEMPERATURE), math.exp(s / TEMPERATURE)
        wanted = -TEMPERATURE * (p * math.log(q) + (1 - p) * math.log(1 - q))
        assert got == pytest.approx(wanted, rel=1e-4)
    equal = teacher.clone().requires_grad_(True)
    chunk_loss(teacher, equal).sum().backward()
    assert equal.grad.abs().max() < 1e-4
    # where the student is too sure, the gradient points down, and the other way round
    found.sum().backward()
    assert (student.grad.sign() == torch.tensor([-1.0, 1.0, 1.0])).all()


def test_the_student_as_its_own_teacher_has_the_lowest_loss(home):
    """With one tokenizer on both sides, chunks are tokens and the scores are the model's own."""
    from deltaloom.core.encoding import encode
    from deltaloom.core.examples import Examples
    from deltaloom.core.run import Run

    base = Base(model=str(home / "old"))
    data = Examples.read(home / "text.jsonl")
    rows = encode(data, base.tokenizer(), 64)
    with Run.open(home / "run", {"steps": []}, {}) as run:
        objective = Distillation.prepare(base, base, data, rows, run)
    objective.begin_training(rows, 0)
    model = base.load()
    ids = torch.tensor([rows[3].input_ids])
    logits = model(ids).logits.detach().requires_grad_(True)
    chunks = objective.chunks[3]
    assert len(chunks.ends) == len(rows[3].input_ids) - 2  # all but the first and the end
    own = torch.log_softmax(logits[0].float(), -1)[range(len(ids[0]) - 1), ids[0, 1:]]
    assert torch.allclose(torch.tensor(chunks.teacher), own[: len(chunks.teacher)], atol=1e-4)
    value = objective.added_loss(logits, ids, torch.tensor([3]), None)
    value.backward()
    assert logits.grad.abs().max() < 1e-5
