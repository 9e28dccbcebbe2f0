"""Rows in ragged batches against one backward pass a row; what a sketch keeps."""

import pytest
import tiny
import torch

from deltaloom.core.base import Base
from deltaloom.core.encoding import encode
from deltaloom.core.errors import InputError, WorkError
from deltaloom.core.examples import Examples
from deltaloom.engine import gradients
from deltaloom.engine.gradients import per_example, sketched, summed_loss
from deltaloom.engine.preconditioning import Adam, sign
from deltaloom.engine.projection import projection
from deltaloom.tune.lora import Lora


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    home = tmp_path_factory.mktemp("gradients")
    base = Base(model=str(tiny.base_in(home / "base")))
    rows = encode(Examples.read(tiny.rows_in(home / "rows.jsonl")), base.tokenizer(), 64)
    model = Lora(r=3).attach(base, seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start: half of the gradients would vanish
            parameter.data.normal_(std=0.3)
    return model, rows


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def one_by_one(model, rows, reduction="mean"):
    """The definition: batch of one, no padding, autograd's own parameter gradients."""
    model.eval()
    found = []
    for row in rows:
        model.zero_grad(set_to_none=True)
        ids = torch.tensor([row.input_ids])
        logits = model(input_ids=ids).logits[0, :-1].double()
        mask = torch.tensor(row.response_mask[1:], dtype=torch.bool)
        loss = torch.nn.functional.cross_entropy(
            logits[mask], ids[0, 1:][mask], reduction=reduction
        )
        loss.backward()
        found.append(torch.cat([model.get_parameter(n).grad.flatten() for n in trained(model)]))
    model.zero_grad(set_to_none=True)
    return torch.stack(found)


def gathered(batches, rows, width):
    out = torch.zeros(len(rows), width)
    sizes = []
    for numbers, block in batches:
        out[numbers] = block
        sizes.append(len(numbers))
    assert sum(sizes) == len(rows)
    return out, sizes


@pytest.mark.parametrize("tokens", [20, 64, 4096])
def test_batched_equals_one_by_one(setting, tokens, monkeypatch):
    monkeypatch.setattr(gradients, "TOKENS", {"cpu": tokens})
    model, rows = setting
    wanted = one_by_one(model, rows)
    got, sizes = gathered(per_example(model, rows, pad_id=0), rows, wanted.shape[1])
    if tokens > 20:
        assert max(sizes) > 1
    assert (got - wanted).norm() / wanted.norm() < 1e-5
    assert all(parameter.grad is None for parameter in model.parameters())


def test_summed_over_tokens(setting):
    model, rows = setting
    wanted = one_by_one(model, rows, "sum")
    got, _ = gathered(per_example(model, rows, 0, loss=summed_loss), rows, wanted.shape[1])
    assert (got - wanted).norm() / wanted.norm() < 1e-5


@pytest.mark.parametrize("shaped", ["plain", "adam", "sign"])
@pytest.mark.parametrize("kind", ["sparse", "rademacher"])
def test_a_sketch_is_the_projected_gradient(setting, kind, shaped):
    model, rows = setting
    generator = torch.Generator().manual_seed(2)
    shapes = {name: model.get_parameter(name).shape for name in trained(model)}
    moments = [
        {n: torch.rand(s, generator=generator) * 1e-3 for n, s in shapes.items()} for _ in "mv"
    ]
    how = {"plain": None, "adam": Adam(*moments), "sign": sign}[shaped]
    whole, _ = gathered(per_example(model, rows, 0), rows, sum(s.numel() for s in shapes.values()))
    wanted = torch.zeros(len(rows), 32)
    start = 0
    for name, shape in shapes.items():
        part = whole[:, start : start + shape.numel()]
        start += shape.numel()
        part = part if how is None else how(name, part)
        eye = torch.zeros(shape.numel(), 32)
        one = torch.eye(shape.numel()).reshape(-1, *shape)
        projection(kind, 32, 5).add(name, tiny_rows(one), eye, None)
        wanted += part @ eye
    sketch = projection(kind, 32, 5)
    got, _ = gathered(sketched(model, rows, 0, sketch, precondition=how), rows, 32)
    assert (got - wanted).norm() / wanted.norm() < 1e-4


def tiny_rows(matrix):
    from deltaloom.engine.taps import Rows

    return Rows(lambda: matrix)


def test_half_precision_and_recomputation_point_the_same_way(setting, tmp_path):
    _, rows = setting
    whole = {}
    for dtype in ("float32", "bfloat16"):
        base = Base(model=str(tiny.base_in(tmp_path / dtype)), dtype=dtype)
        for checkpointing in (False, True):
            model = Lora(r=3).attach(base, seed=0)
            sketch = projection("sparse", 512, 0)
            batches = sketched(model, rows, 0, sketch, checkpointing=checkpointing)
            whole[dtype, checkpointing], _ = gathered(batches, rows, 512)
    assert torch.equal(whole["float32", False], whole["float32", True])
    cosine = torch.cosine_similarity(whole["float32", False], whole["bfloat16", False], dim=1)
    assert cosine.min() > 0.99


def test_a_gradient_that_is_not_finite_names_its_row(setting):
    model, rows = setting

    bad = min(range(len(rows)), key=lambda i: len(rows[i].input_ids))

    def broken(model, batch):
        losses = summed_loss(model, batch)
        return losses * torch.tensor([float("inf")] + [1.0] * (len(losses) - 1))

    with pytest.raises(WorkError, match=f"row '{rows[bad].id}' has a gradient that is not finite"):
        next(per_example(model, rows, 0, loss=broken))


def test_unknown_parameters_are_refused(setting):
    model, rows = setting
    with pytest.raises(InputError, match="no parameter 'wrong'"):
        next(per_example(model, rows, 0, names=["wrong"]))
