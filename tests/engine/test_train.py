"""Training: the loss that is promised, accumulation, resumption, stops."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from deltaloom.core.base import Base
from deltaloom.core.encoding import encode
from deltaloom.core.errors import WorkError
from deltaloom.core.estimate import Estimate
from deltaloom.core.examples import Examples
from deltaloom.core.method import Evaluation, Measurer, Work
from deltaloom.engine import train
from deltaloom.engine._checkpoints import WHOLE, checkpoints, last_whole, step_of
from deltaloom.engine._watching import Ledger
from deltaloom.engine.train import Paused, TrainSettings, collate, fit

SETTINGS = TrainSettings(epochs=2, lr=1e-2, batch_size=8, warmup=0.0, schedule="constant")


@pytest.fixture
def base(tmp_path):
    return Base(model=str(tiny.base_in(tmp_path / "base")), dtype="float32")


def rows_of(base, tmp_path, count=24):
    data = Examples.read(tiny.rows_in(tmp_path / "rows.jsonl", count))
    return encode(data, base.tokenizer(), 64)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def do(base, rows, run, settings=SETTINGS, **options):
    torch.manual_seed(0)
    model = base.load().train()
    fit(model, rows, 0, settings, run, **options)
    return weights(model)


def test_first_step_is_adamw_on_the_mean_loss_of_response_tokens(base, tmp_path):
    rows = rows_of(base, tmp_path, 8)
    settings = TrainSettings(
        epochs=1, lr=1e-2, batch_size=8, warmup=0.0, schedule="constant", clip=0.0
    )
    got = do(base, rows, tiny.run_in(tmp_path / "run"), settings)
    model = base.load()
    total, count = 0.0, 0
    for row in rows:  # the definition, a row at a time
        ids = torch.tensor([row.input_ids])
        mask = torch.tensor(row.response_mask[1:], dtype=torch.bool)
        logits = model(input_ids=ids).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits[mask], ids[0, 1:][mask], reduction="sum"
        )
        count += int(mask.sum())
    (total / count).backward()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    optimizer.step()
    assert torch.allclose(got, weights(model), atol=1e-5)


def test_accumulation_changes_nothing(base, tmp_path):
    rows = rows_of(base, tmp_path)
    whole = do(base, rows, tiny.run_in(tmp_path / "whole"))
    for micro in (1, 4):
        settings = TrainSettings(**{**vars(SETTINGS), "micro_batch": micro})
        parts = do(base, rows, tiny.run_in(tmp_path / f"micro{micro}"), settings)
        assert torch.allclose(whole, parts, atol=2e-4), (whole - parts).abs().max()


def test_padding_and_prompt_do_not_enter_the_labels(base, tmp_path):
    rows = rows_of(base, tmp_path, 6)
    batch = collate(rows, pad_id=0)
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        learned = [t for t, m in zip(row.input_ids, row.response_mask, strict=True) if m]
        labels = batch["labels"][i]
        assert labels[labels != -100].tolist() == learned
        assert (labels[n:] == -100).all()
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (len(labels) - n)


def test_interrupted_after_a_checkpoint_ends_in_the_same_bytes(base, tmp_path):
    rows = rows_of(base, tmp_path)
    whole_run, broken_run = tiny.run_in(tmp_path / "whole"), tiny.run_in(tmp_path / "broken")
    whole = do(base, rows, whole_run)

    def stop(trainer, epoch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do(base, rows, broken_run, after_epoch=stop)
    assert list((broken_run.work / "checkpoints").glob("checkpoint-*"))
    assert torch.equal(do(base, rows, broken_run), whole)
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "broken")]
    assert logs[0] == logs[1]


def test_killed_between_a_checkpoint_and_its_ledger_nothing_is_left_unpaid(
    base, tmp_path, monkeypatch
):
    rows = rows_of(base, tmp_path)
    whole_run, broken_run = tiny.run_in(tmp_path / "whole"), tiny.run_in(tmp_path / "broken")
    whole = do(base, rows, whole_run)
    account = Ledger.on_save

    def killed(ledger, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt
        account(ledger, args, state, control, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "on_save", killed)
        with pytest.raises(KeyboardInterrupt):
            do(base, rows, broken_run)
    assert step_of(last_whole(broken_run.work / "checkpoints")) == 2
    assert torch.equal(do(base, rows, broken_run), whole)
    for key in ("backward_tokens", "flops"):
        assert broken_run.record["cost"][key] == whole_run.record["cost"][key], key


@pytest.mark.parametrize("epochs", [2, 0.7])
def test_a_training_that_pauses_ends_in_the_same_bytes(base, tmp_path, epochs):
    rows = rows_of(base, tmp_path, 40)
    settings = replace(SETTINGS, epochs=epochs)
    whole = do(base, rows, tiny.run_in(tmp_path / "whole"), settings)
    run = tiny.run_in(tmp_path / "run")
    seen = []
    for run.until in (0.4, 0.4, 1.0):  # asked for again, a pause is reached again
        with pytest.raises(Paused) as paused:
            do(base, rows, run, settings)
        seen.append((paused.value.tokens, weights(paused.value.model)))
    run.until = None
    assert torch.equal(do(base, rows, run, settings), whole)
    (early, first), (again, second), (late, last) = seen
    assert early == again < late
    assert torch.equal(first, second)
    assert not torch.equal(first, last)
    assert torch.equal(last, whole)


def test_what_follows_an_epoch_is_done_before_its_checkpoint_counts(base, tmp_path):
    rows, run = rows_of(base, tmp_path), tiny.run_in(tmp_path / "run")
    seen = []

    def see(trainer, epoch):
        seen.append((epoch, step_of(last_whole(run.work / "checkpoints"))))

    do(base, rows, run, TrainSettings(**{**vars(SETTINGS), "save_steps": 0}), after_epoch=see)
    batches = -(-len(rows) // SETTINGS.batch_size)
    epochs = range(1, round(SETTINGS.epochs) + 1)
    assert seen == [(epoch, (epoch - 1) * batches) for epoch in epochs]


def test_half_a_checkpoint_is_ignored(base, tmp_path):
    rows = rows_of(base, tmp_path)
    run = tiny.run_in(tmp_path / "run")
    whole = do(base, rows, run)
    last = max((run.work / "checkpoints").glob("checkpoint-*"), key=step_of)
    (last / WHOLE).unlink()
    (last / "optimizer.pt").write_bytes(b"half")
    assert torch.equal(do(base, rows, run), whole)


def test_nan_loss_stops_with_step_and_last_checkpoint(base, tmp_path):
    rows = rows_of(base, tmp_path)
    settings = TrainSettings(**{**vars(SETTINGS), "lr": 1e30, "clip": 0.0, "save_steps": 1})
    with pytest.raises(WorkError, match=r"the loss is nan at step \d; the last good checkpoint is"):
        do(base, rows, tiny.run_in(tmp_path / "run"), settings)


def test_a_base_that_holds_a_nan_is_not_blamed_on_the_rate(base, tmp_path):
    path = tmp_path / "base" / "model.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(WorkError, match=r"at step 1; no checkpoint .* nothing was changed yet"):
        do(base, rows_of(base, tmp_path), tiny.run_in(tmp_path / "run"))


def test_full_disk_keeps_the_previous_checkpoint(base, tmp_path, monkeypatch):
    rows = rows_of(base, tmp_path)
    run = tiny.run_in(tmp_path / "run")
    settings = TrainSettings(**{**vars(SETTINGS), "save_steps": 2})
    real = train.Trainer._save_optimizer_and_scheduler

    def full(self, folder):
        real(self, folder)
        if self.state.global_step > 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(WorkError, match=r"No space left.*last good checkpoint is .*point-2"):
            do(base, rows, run, settings)
    assert [p.name for p in checkpoints(run.work / "checkpoints")] == ["checkpoint-2"]
    whole = do(base, rows, tiny.run_in(tmp_path / "whole"), settings)
    assert torch.equal(do(base, rows, run, settings), whole)


class Falling(Measurer):
    """A measure that gets worse from the third call on."""

    def work(self, sizes):
        return Work()

    def measure(self, model, tokenizer, data, run):
        CALLS.append(weights(model))
        value = [1.0, 3.0, 2.0, 1.5, 1.0, 0.5][len(CALLS) - 1]
        return Estimate.from_items({"a": value, "b": value}, metric="m")


CALLS: list = []


def test_early_stop_keeps_the_best_weights(base, tmp_path):
    CALLS.clear()
    rows = rows_of(base, tmp_path)
    data = Examples.read(tmp_path / "rows.jsonl")
    settings = TrainSettings(**{**vars(SETTINGS), "epochs": 6, "patience": 2})
    run = tiny.run_in(tmp_path / "run")
    evaluation = Evaluation(Falling(), data, every=2)
    got = do(base, rows, run, settings, evaluation=evaluation)
    assert len(CALLS) == 4  # best at the second, two worse after it
    assert torch.equal(got, CALLS[1])
    logged = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [one["step"] for one in logged if "evaluation_m" in one] == [2, 4, 6, 8]


def test_the_ledger_counts_tokens_without_padding(base, tmp_path):
    rows = rows_of(base, tmp_path)
    run = tiny.run_in(tmp_path / "run")
    do(base, rows, run)
    tokens = 2 * sum(len(row.input_ids) for row in rows)
    assert run.record["cost"]["backward_tokens"] == tokens
