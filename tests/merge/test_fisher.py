"""Fisher merging against gradients taken one row at a time."""

import pytest
import specialists
import tiny
import torch
from safetensors.torch import load_file

from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.core.errors import InputError
from deltaloom.merge.fisher import Fisher


def merged(home, base, folders, data, **settings):
    deltas = [load(folder, base) for folder in folders]
    Fisher(**settings).merge(base, deltas, tiny.run_in(home / "run"), data=data)
    return load_file(home / "run" / "model.safetensors")


def log_likelihoods(model, ids, mask):
    """log p of the response's tokens, one by one."""
    logits = model(ids).logits[0, :-1].log_softmax(-1)
    return logits, logits.gather(1, ids[0, 1:, None])[:, 0] * mask[0, 1:]


def fisher_by_hand(base, folder, data):
    """Squared gradients of every row's log-likelihood, alone and unpadded, averaged."""
    model = Base(model=str(folder)).load()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    rows = specialists.each_row(data, base)
    for ids, mask in rows:
        model.zero_grad()
        log_likelihoods(model, ids, mask)[1].sum().backward()
        for name, parameter in model.named_parameters():
            total[name] += parameter.grad**2
    return {name: value / len(rows) for name, value in total.items()}


@pytest.mark.parametrize(
    ("normalize", "weights"), [(False, None), (True, None), (True, [1.0, 3.0])]
)
def test_it_is_the_formula(tmp_path, normalize, weights):
    base, folders, data = specialists.make(tmp_path)
    settings = {"labels": "data", "normalize": normalize, "weights": weights}
    got = merged(tmp_path, base, folders, data, **settings)
    models = [load_file(folder / "model.safetensors") for folder in folders]
    fishers = [fisher_by_hand(base, *pair) for pair in zip(folders, data, strict=True)]
    factors = weights or [1.0, 1.0]
    if normalize:
        lengths = [sum((f**2).sum() for f in own.values()) ** 0.5 for own in fishers]
        factors = [factor / length for factor, length in zip(factors, lengths, strict=True)]
    for name in got:
        own = [
            factor * fisher[name].clamp_min(1e-6)
            for factor, fisher in zip(factors, fishers, strict=True)
        ]
        wanted = sum(w * m[name] for w, m in zip(own, models, strict=True)) / sum(own)
        assert torch.allclose(got[name], wanted, atol=1e-10), name


def test_equal_fishers_give_the_average(tmp_path):
    base, folders, data = specialists.make(tmp_path, dtype="float32")
    got = merged(tmp_path, base, folders, data, floor=1e9)  # all the same: the floor
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    lengths = merged(tmp_path / "n", base, folders, data, floor=1e9, normalize=False)
    for name in got:
        mean = (first[name] + second[name]) / 2
        assert torch.allclose(lengths[name], mean, atol=1e-7), name


def test_drawn_labels_estimate_the_fisher_information(tmp_path):
    from deltaloom.core.encoding import encode
    from deltaloom.engine.gradients import mean_squares, sampled_loss

    base, folders, data = specialists.make(tmp_path, counts=(4, 4))
    model = Base(model=str(folders[0])).load()
    row = encode(data[0], base.tokenizer(), 64)[3]
    names = [name for name, _ in model.named_parameters()]
    loss = sampled_loss(torch.Generator().manual_seed(0))
    got = mean_squares(model, [row] * 2000, 0, names, loss=loss)
    ids, mask = torch.tensor([row.input_ids]), row.response_mask
    exact = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    parameters = list(model.parameters())
    logits = model(ids).logits[0, :-1].log_softmax(-1)
    for position in (i for i in range(len(mask) - 1) if mask[i + 1]):
        for label in range(logits.shape[1]):
            value = logits[position, label]
            for name, g in zip(
                exact, torch.autograd.grad(value, parameters, retain_graph=True), strict=True
            ):
                exact[name] += value.exp().detach() * g**2
    for name in names:
        assert got[name].sum() == pytest.approx(float(exact[name].sum()), rel=0.1), name


def test_a_head_stored_beside_the_embedding_it_is_tied_to_gets_its_weights(tmp_path):
    from safetensors.torch import save_file

    base, folders, data = specialists.make(tmp_path, dtype="float32")
    for folder in (*folders, base.folder):
        file = folder / "model.safetensors"
        own = load_file(file)
        own["lm_head.weight"] = own["model.embed_tokens.weight"].clone()
        save_file(own, file, {"format": "pt"})
    got = merged(tmp_path, base, folders, data)
    assert torch.equal(got["lm_head.weight"], got["model.embed_tokens.weight"])


def test_weights_that_are_no_weights_are_refused(tmp_path):
    base, folders, data = specialists.make(tmp_path)
    with pytest.raises(InputError, match="must be above 0"):
        merged(tmp_path, base, folders, data, weights=[1.0, 0.0])
    with pytest.raises(InputError, match="1 weights for 2 deltas"):
        merged(tmp_path / "b", base, folders, data, weights=[1.0])
