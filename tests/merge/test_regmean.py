"""RegMean against least squares by brute force, on every linear layer of real small models."""

import numpy as np
import pytest
import specialists
import tiny
import torch
from safetensors.torch import load_file, save_file

from deltaloom.core.base import Base
from deltaloom.core.delta import load
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples
from deltaloom.merge.regmean import Regmean, least_change


def inputs_of(base, folder, data):
    """Linear module -> its inputs (tokens, in) over rows put through one by one."""
    model = Base(model=str(folder)).load()
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":

            def hook(_, given, name=name):
                seen.setdefault(name, []).append(given[0][0].double().numpy())

            module.register_forward_pre_hook(hook)
    for ids, _ in specialists.each_row(data, base):
        with torch.no_grad():
            model(ids)
    return {name: np.concatenate(parts) for name, parts in seen.items()}


def merged(home, base, folders, data, **settings):
    deltas = [load(folder, base) for folder in folders]
    Regmean(**settings).merge(base, deltas, tiny.run_in(home / "run"), data=data)
    return load_file(home / "run" / "model.safetensors")


def tensors(folder):
    return load_file(folder / "model.safetensors")


def test_at_alpha_one_nothing_fits_the_outputs_better(tmp_path):
    base, folders, data = specialists.make(tmp_path)
    got = merged(tmp_path, base, folders, data, alpha=1.0)
    weights = [tensors(folder) for folder in folders]
    inputs = [inputs_of(base, *pair) for pair in zip(folders, data, strict=True)]
    unique = 0
    for name in inputs[0]:
        xs = np.concatenate([own[name] for own in inputs])
        ys = np.concatenate(
            [x[name] @ w[f"{name}.weight"].T.numpy() for x, w in zip(inputs, weights, strict=True)]
        )
        best, _, rank, _ = np.linalg.lstsq(xs, ys, rcond=1e-9)
        ours = got[f"{name}.weight"].T.numpy()
        losses = [((xs @ w - ys) ** 2).sum() for w in (ours, best)]
        assert losses[0] <= losses[1] * (1 + 1e-8) + 1e-16, name
        if rank == xs.shape[1]:
            unique += 1
            assert np.allclose(ours, best, atol=1e-7), name
    assert unique >= 10  # of 14; the first layer sees fewer tokens than it has inputs
    for name in set(got) - {f"{name}.weight" for name in inputs[0]}:
        mean = sum(w[name] for w in weights) / 2
        assert torch.allclose(got[name], mean, atol=1e-12), name


@pytest.mark.parametrize("alpha", [0.0, 0.9])
def test_below_one_it_is_the_papers_formula(tmp_path, alpha):
    base, folders, data = specialists.make(tmp_path)
    got = merged(tmp_path, base, folders, data, alpha=alpha)
    weights = [tensors(folder) for folder in folders]
    inputs = [inputs_of(base, *pair) for pair in zip(folders, data, strict=True)]
    for name in inputs[0]:
        grams = [own[name].T @ own[name] for own in inputs]
        grams = [alpha * gram + (1 - alpha) * np.diag(np.diag(gram)) for gram in grams]
        right = sum(
            gram @ w[f"{name}.weight"].T.numpy() for gram, w in zip(grams, weights, strict=True)
        )
        wanted = np.linalg.inv(sum(grams)) @ right
        assert np.allclose(got[f"{name}.weight"].T.numpy(), wanted, atol=1e-10), name


def test_equal_grams_give_the_average(tmp_path):
    # Specialists that differ in the last layer's last module alone have equal inputs everywhere.
    only = "layers.1.mlp.down_proj"
    base, folders, data = specialists.make(tmp_path, only=only)
    got = merged(tmp_path, base, folders, [data[0], data[0]])
    first, second = map(tensors, folders)
    for name in got:
        assert torch.allclose(got[name], (first[name] + second[name]) / 2, atol=1e-12), name


def test_conv1d_an_untied_head_and_a_file_without_the_prefix(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    folders = []
    for seed in range(3):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=len(tiny.WORDS.split()) + 4, n_positions=64, n_embd=8, n_layer=2, n_head=2,
            initializer_range=0.3, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        folder = tmp_path / f"gpt{seed}"
        GPT2LMHeadModel(config).save_pretrained(folder)
        tiny.tokenizer_in(folder)
        file = folder / "model.safetensors"
        names = {n: n.removeprefix("transformer.") for n in load_file(file)}
        save_file({names[n]: t for n, t in load_file(file).items()}, file, {"format": "pt"})
        specialists.as_type(folder, "float64")
        folders.append(folder)
    base = Base(model=str(folders[0]))
    data = [Examples.read(tiny.rows_in(tmp_path / f"{i}.jsonl", 30, 50 * i)) for i in (0, 1)]
    got = merged(tmp_path, base, folders[1:], data, alpha=0.5)
    models = [Base(model=str(folder)).load() for folder in folders[1:]]
    grams = {}
    for name, layout in (("transformer.h.1.mlp.c_fc", "in-out"), ("lm_head", "out-in")):
        total, right = 0, 0
        for model, rows in zip(models, data, strict=True):
            seen = []
            module = model.get_submodule(name)
            module.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0][0]))
            with torch.no_grad():
                for ids, _ in specialists.each_row(rows, base):
                    model(ids)
            x = torch.cat(seen)
            gram = x.T @ x
            gram = 0.5 * gram + 0.5 * torch.diag(gram.diag())
            weight = module.weight if layout == "in-out" else module.weight.T
            total, right = total + gram, right + gram @ weight
        grams[name] = torch.linalg.solve(total, right.detach())
    assert torch.allclose(got["h.1.mlp.c_fc.weight"], grams["transformer.h.1.mlp.c_fc"])
    assert torch.allclose(got["lm_head.weight"].T, grams["lm_head"])


def test_adapters_merge_as_the_models_they_make(tmp_path):
    import peft

    base, _, data = specialists.make(tmp_path, dtype="float32")
    adapters, wholes = [], []
    for seed, settings in enumerate(({}, {"use_dora": True})):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **settings
        )
        model = peft.get_peft_model(base.load(), config)
        model.save_pretrained(tmp_path / f"adapter{seed}")
        adapters.append(tmp_path / f"adapter{seed}")
        wholes.append(tmp_path / f"whole{seed}")
        model.merge_and_unload().save_pretrained(wholes[-1])
    got = merged(tmp_path / "a", base, adapters, data)
    wanted = merged(tmp_path / "b", base, wholes, data)
    for name in wanted:
        assert torch.allclose(got[name], wanted[name], atol=1e-4), name


def test_bfloat16_models_stay_what_they_are_and_gain_over_the_average(tmp_path):
    base, folders, data = specialists.make(tmp_path, dtype="bfloat16")
    got = merged(tmp_path, base, folders, data)
    assert {tensor.dtype for tensor in got.values()} == {torch.bfloat16}
    weights = [tensors(folder) for folder in folders]
    inputs = [inputs_of(base, *pair) for pair in zip(folders, data, strict=True)]
    name = "model.layers.1.mlp.up_proj"

    def loss(weight):
        return sum(
            ((x[name] @ (weight.double() - w[f"{name}.weight"].double()).T.numpy()) ** 2).sum()
            for x, w in zip(inputs, weights, strict=True)
        )

    mean = sum(w[f"{name}.weight"].double() for w in weights) / 2
    assert loss(got[f"{name}.weight"]) < 0.99 * loss(mean)


def test_what_the_inputs_leave_open_is_the_average():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((5, 8)).astype(np.float32)  # fewer tokens than inputs
    x[:, 3] = 0
    gram = (x.T @ x).astype(np.float64)
    right = gram @ generator.standard_normal((8, 2))
    found = least_change(gram, right, float(np.finfo(np.float32).eps))
    assert np.allclose(gram @ found, right, atol=1e-4)
    assert not found[3].any()
    assert np.abs(found).max() < 10


def test_another_number_of_data_is_refused_before_anything_is_loaded(tmp_path):
    base, folders, data = specialists.make(tmp_path)
    with pytest.raises(InputError, match="data has 1 inputs for 2 deltas"):
        merged(tmp_path, base, folders, data[:1])


def test_statistics_that_are_there_are_not_made_again(tmp_path, monkeypatch):
    base, folders, data = specialists.make(tmp_path)
    own, seen = Regmean.statistics, []

    def failing(self, specialist, seed, run):
        seen.append(seed)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return own(self, specialist, seed, run)

    monkeypatch.setattr(Regmean, "statistics", failing)
    deltas = [load(folder, base) for folder in folders]
    method, run = Regmean(), tiny.run_in(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        method.merge(base, deltas, run, data=data)
    method.merge(base, deltas, run, data=data)
    assert seen == [0, 1, 1]
    whole = merged(tmp_path / "whole", base, folders, data)
    got = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(got[name], whole[name]) for name in whole)
