from collections import Counter

import numpy as np
import peft
import pytest
import torch
from torch.func import functional_call, jacrev

from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples
from deltaloom.core.method import Sizes
from deltaloom.core.registry import get
from deltaloom.measure._differentiable import differentiable
from deltaloom.measure._label_words import LabelWords, questions
from deltaloom.measure.choice import Choice
from deltaloom.measure.kernel import Kernel

WORDS = ["what", "is", "the", "capital", "of", "France", "w1", "w2", "w3", "w4"]


def asked(n=18, choices=("a", "b", "c"), seed=0):
    """Questions that a linear rule on the words could answer."""
    draw = np.random.default_rng(seed)
    made = []
    for k in range(n):
        answer = k % len(choices)
        prompt = [*draw.permutation(WORDS)[: 2 + k % 4], f"w{10 + answer}"]
        made.append(
            {"prompt": " ".join(prompt) + " ", "choices": [*choices], "answer": answer}
            | {"id": f"q{seed}-{k}"}
        )
    return made


def by_hand(tiny, data, splits, kind, start, names=None, ridge=0.0):
    """Every row alone in float64 through torch.func, dense least squares, lists of choices."""
    model = tiny.model.double()
    own = {n: p for n, p in model.named_parameters() if names is None or n in names}
    gradients, before, goals, place = [], [], [], []
    for row, example in enumerate(data):
        ids = torch.tensor([tiny.tokenizer(example.prompt)["input_ids"]])
        words = [tiny.tokenizer.convert_tokens_to_ids(text) for text in example.choices]

        def f(parameters, ids=ids, words=words):
            logits = functional_call(model, parameters, (ids,)).logits[0, -1, words]
            return logits - logits.mean()

        jacobian = jacrev(f)(own)
        gradients.append(torch.cat([jacobian[n].flatten(1) for n in own], 1).detach())
        before += f(own).tolist()
        right = example.choices.index(example.answers[0])
        goals += [(c == right) - 1 / len(words) for c in range(len(words))]
        place += [row] * len(words)
    g, place = torch.cat(gradients).numpy(), np.array(place)
    goals, before = np.array(goals), np.array(before) * start
    left = np.sign(g) if kind != "sgd" else g
    right = np.sign(g) if kind == "sign" else g
    scores = np.zeros(len(goals))
    for train, test in splits:
        a, b = np.isin(place, train), np.isin(place, test)
        kernel = (left[a] @ right[a].T).T
        penalty = ridge * np.linalg.norm(kernel, 2) * np.eye(len(kernel))
        weights = np.linalg.pinv(kernel + penalty, 1e-6) @ (goals - before)[a]
        scores[b] = before[b] + right[b] @ left[a].T @ weights
    found = {}
    for row, example in enumerate(data):
        best = scores[place == row].argmax()
        found[example.id] = float(example.choices[best] == example.answers[0])
    model.float()
    return found


def folds(method, data, seed=0):
    return method._folds(data, seed)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "sign", "asymmetric"])
def test_equals_the_definition(kind, start, tiny, rows, run):
    data = rows(*asked())
    method = Kernel(kernels=[kind], folds=3, from_start=start)
    wanted = by_hand(tiny, data, folds(method, data), kind, start)
    tiny.model.double()  # signs of what is nearly zero are the same only there
    found = method.measure(tiny.model, tiny.tokenizer, data, run)
    assert dict(found.items) == wanted
    assert 0 < found.value < 1
    assert (found.metric, found.interval) == (f"kernel_accuracy_{kind}", "wilson")


def test_ridge_equals_the_definition(tiny, rows, run):
    data = rows(*asked(n=30))
    method = Kernel(kernels=["sgd"], ridge=3e-2)
    found = method.measure(tiny.model, tiny.tokenizer, data, run)
    wanted = by_hand(tiny, data, folds(method, data), "sgd", False, ridge=3e-2)
    assert dict(found.items) == wanted
    least = by_hand(tiny, data, folds(method, data), "sgd", False)
    assert wanted != least  # the ridge is seen


@pytest.mark.parametrize("memory", [1.0, 1e-9])
def test_two_choices_and_two_numbers_of_choices_agree(memory, tiny, rows, run):
    """One output for two choices, three for three: the same regression on rows of two."""
    two = asked(n=8, choices=("a", "b"))
    method = Kernel(kernels=["sgd", "asymmetric"], folds=2, memory_gib=memory)
    alone = method.measure(tiny.model, tiny.tokenizer, rows(*two), run)
    mixed = rows(*two, *asked(n=2, seed=5))
    found = method.measure(tiny.model, tiny.tokenizer, mixed, run)
    assert dict(found.items) == by_hand(tiny, mixed, folds(method, mixed), "sgd", False)
    assert dict(alone.items) == by_hand(tiny, rows(*two), folds(method, rows(*two)), "sgd", False)


def test_train_file_equals_the_definition(tiny, rows, run, tmp_path):
    data, lessons = rows(*asked(n=10, seed=1)), rows(*asked(n=15, seed=2))
    lessons.write(tmp_path / "train.jsonl")
    method = Kernel(kernels=["sgd", "sign"], train=str(tmp_path / "train.jsonl"))
    found = method.measure(tiny.model, tiny.tokenizer, data, run)
    both = Examples([*lessons, *data])
    wanted = by_hand(tiny, both, [(range(15), range(15, 25))], "sgd", False)
    assert dict(found.items) == {key: wanted[key] for key in data.ids}
    assert set(run.record["notes"]) >= {"accuracy_sgd", "accuracy_sign", "sign_minus_sgd"}


def test_named_parameters_equal_the_definition(tiny, rows, run):
    data = rows(*asked())
    method = Kernel(kernels=["sgd"], parameters=r"layers\.1\..*v_proj")
    found = method.measure(tiny.model, tiny.tokenizer, data, run)
    names = ["model.layers.1.self_attn.v_proj.weight"]
    assert dict(found.items) == by_hand(tiny, data, folds(method, data), "sgd", False, names)
    assert run.record["notes"]["parameters"] == 16 * 32


def test_untuned_accuracy_is_that_of_measure_choice(tiny, rows, run):
    data = rows(*asked(n=40))
    Kernel(kernels=["sgd"], parameters="v_proj").measure(tiny.model, tiny.tokenizer, data, run)
    wanted = Choice().measure(tiny.model, tiny.tokenizer, data, run)
    assert run.record["notes"]["accuracy_untuned"][0] == wanted.value


def test_a_rule_in_the_words_is_learned(tiny, rows, run):
    data = rows(*asked(n=90))
    found = Kernel(kernels=["sgd"]).measure(tiny.model, tiny.tokenizer, data, run)
    assert found.low > 0.5  # chance is a third


def test_clusters_are_not_divided(rows):
    made = [{**row, "cluster": f"c{k // 3}"} for k, row in enumerate(asked(n=30))]
    data = rows(*made)
    for train, test in Kernel()._folds(data, 3):
        sides = [{data[int(i)].cluster for i in side} for side in (train, test)]
        assert not sides[0] & sides[1]
        assert len(train) + len(test) == 30
    tested = np.concatenate([test for _, test in Kernel()._folds(data, 3)])
    assert sorted(tested.tolist()) == list(range(30))


def test_answers_are_spread_over_the_folds(rows):
    data = rows(*asked(n=30))
    orders = set()
    for seed in range(4):
        for train, test in Kernel()._folds(data, seed):
            counts = Counter(data[int(i)].answers[0] for i in train)
            assert counts == {"a": 8, "b": 8, "c": 8}
            orders.add(tuple(test.tolist()))
    assert len(orders) > 15  # and are others for another seed


def lora_side(model):
    return {n: p for n, p in model.named_parameters() if "lora" in n}


def test_lora_kernel_is_the_projected_one(tiny, rows):
    """dL/dB = scaling dL/dW A', so the kernel of B is that of W seen through A."""
    data = rows(*asked(n=6))
    weights = {n: p.detach().clone() for n, p in tiny.model.named_parameters()}
    from deltaloom.engine.ntk import gradients, gram

    with differentiable(tiny.model, "lora", 4, seed=1) as ready:
        words = LabelWords(ready.model, 3, 0)
        own = [batch for _, batch in words.batches(questions(data, tiny.tokenizer, "", 64))]
        found = gram(ready.model, own, own, words, names=ready.names)
        a = {n: p.detach().clone() for n, p in lora_side(ready.model).items() if "lora_A" in n}
        assert all(bool((p == 0).all()) for n, p in lora_side(ready.model).items() if "_B" in n)
        assert {n.replace("lora_A", "lora_B") for n in a} == set(ready.names)
    words = LabelWords(tiny.model, 3, 0)
    a = {n.removeprefix("base_model.model."): p for n, p in a.items()}
    plain = {n.replace("lora_A.default.", ""): p for n, p in a.items()}
    whole = gradients(tiny.model, own[0], words, [*plain])
    seen = [
        2.0 * torch.einsum("bkoi,ri->bkor", whole[n].unflatten(2, weights[n].shape), p).flatten(2)
        for n, p in plain.items()
    ]
    flat = torch.cat(seen, 2).double()
    wanted = torch.einsum("icp,jdp->icjd", flat, flat).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("parameters", ["all", "lora", "layers"])
def test_diagnosis_leaves_the_model_as_it_was(parameters, tiny, rows, run):
    before = {n: p.clone() for n, p in tiny.model.state_dict().items()}
    modules = [type(m) for m in tiny.model.modules()]
    data = rows(*asked())
    method = Kernel(kernels=["sgd"], parameters=parameters, diagnose=True, steps=3, lr=1e-3)
    method.measure(tiny.model, tiny.tokenizer, data, run)
    found = tiny.model.state_dict()
    assert found.keys() == before.keys()
    assert all(torch.equal(found[n], before[n]) for n in before)
    assert [type(m) for m in tiny.model.modules()] == modules
    assert all(p.requires_grad for p in tiny.model.parameters())
    assert not hasattr(tiny.model, "peft_config")
    # And once more: nothing is left in the way.
    again = method.measure(tiny.model, tiny.tokenizer, data, run)
    assert again.n == len(data)


def test_small_steps_are_linear_and_large_ones_are_not(tiny, rows, run):
    data = rows(*asked(n=24))
    found = {}
    for lr in (1e-5, 1e-1):
        method = Kernel(kernels=["sgd"], diagnose=True, steps=4, lr=lr, batch_size=8)
        part = run.part(f"rate{lr}")
        method.measure(tiny.model, tiny.tokenizer, data, part)
        found[lr] = run.record["notes"][f"rate{lr}.diagnosis"]
    small, large = found[1e-5], found[1e-1]
    assert small["linearisation"] > 0.99
    assert small["feature_distance"] < 0.02
    assert large["linearisation"] < 0.5
    assert large["feature_distance"] > 0.3
    assert large["mean_change"] > 100 * small["mean_change"] > 0
    assert small["accuracy_linearised"] == small["accuracy_after"]


def test_an_adapter_is_merged_first(tiny, rows, run):
    data = rows(*asked(n=12))
    adapted = peft.get_peft_model(
        tiny.model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    for parameters in ("all", "lora"):
        method = Kernel(kernels=["sgd"], parameters=parameters)
        found = method.measure(adapted, tiny.tokenizer, data, run)
        import copy

        merged = copy.deepcopy(adapted).merge_and_unload()
        wanted = method.measure(merged, tiny.tokenizer, data, run)
        assert dict(found.items) == dict(wanted.items)
    assert isinstance(adapted, peft.PeftModel)
    assert any("lora" in n for n, _ in adapted.named_parameters())


def test_prompts_are_refused(tiny, rows, run):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prompted = peft.get_peft_model(tiny.model, config)
    with pytest.raises(InputError, match="prompts cannot be merged"):
        Kernel().measure(prompted, tiny.tokenizer, rows(*asked(n=6)), run)


def test_what_all_choices_begin_with_belongs_to_the_prompt(tiny, rows):
    given = {"prompt": "what ", "choices": ["the city a", "the city b w1"], "answer": 1}
    (found,) = questions(rows(given), tiny.tokenizer, "", 64)
    ids = tiny.tokenizer("what the city")["input_ids"]
    assert found.ids == ids
    assert found.words == tiny.tokenizer.convert_tokens_to_ids(["a", "b"])
    lesson = found.lesson()
    assert lesson.input_ids == [*ids, found.words[1]]
    assert lesson.response_mask == [0] * len(ids) + [1]


def test_prompts_are_cut_from_the_left(tiny, rows, run):
    data = rows({"prompt": "what is the capital ", "choices": ["a", "b"], "answer": 0})
    (found,) = questions(data, tiny.tokenizer, "", 3)
    assert found.truncated
    assert found.ids == tiny.tokenizer.convert_tokens_to_ids(["is", "the", "capital"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": "what", "answer": "a"}, "has no 'choices'"),
        ({"prompt": "what", "choices": ["a b", "a c", "d"], "answer": 0}, "same token"),
        ({"prompt": "what", "choices": ["a", "a b"], "answer": 0}, "same token"),
        ({"prompt": "what", "choices": ["zig", "zag"], "answer": 0}, "same token"),
    ],
)
def test_rows_that_cannot_be_asked(given, message, tiny, rows):
    with pytest.raises(InputError, match=f"q.jsonl line 1: .*{message}"):
        questions(rows(given), tiny.tokenizer, "", 64)


def test_bad_settings(tiny, rows, run, tmp_path):
    data = rows(*asked(n=4))
    with pytest.raises(InputError, match="no such parameter"):
        Kernel(parameters="bias").measure(tiny.model, tiny.tokenizer, data, run)
    with pytest.raises(InputError, match="no regular expression"):
        Kernel(parameters="(").measure(tiny.model, tiny.tokenizer, data, run)
    with pytest.raises(InputError, match="holds one row"):
        Kernel().measure(tiny.model, tiny.tokenizer, rows(*asked(n=1)), run)
    with pytest.raises(InputError, match="holds no rows"):
        Kernel().measure(tiny.model, tiny.tokenizer, rows(), run)
    with pytest.raises(InputError, match="nowhere"):
        Kernel(train=str(tmp_path / "nowhere.jsonl")).measure(tiny.model, tiny.tokenizer, data, run)
    with pytest.raises(InputError, match="name each kernel once"):
        get("measure", "kernel").make({"kernels": ["sgd", "sgd"]})


def test_cost_counts_forward_and_backward(tiny, rows, run):
    data = rows(*asked(n=12))
    found = Kernel(kernels=["sgd"]).measure(tiny.model, tiny.tokenizer, data, run)
    tokens = sum(len(tiny.tokenizer(row.prompt)["input_ids"]) for row in data)
    assert found.cost["backward_tokens"] == 3 * tokens
    assert found.cost["forward_tokens"] >= 2 * tokens  # the outputs, and the pass behind gradients
    sizes = Sizes(
        rows=12,
        row_tokens=tokens / 12,
        target_rows=0,
        matmul_parameters=10,
        parameters=12,
        linear_sides=4,
        weight_bytes=48,
        deltas=0,
    )
    assert Kernel().work(sizes).full_tokens == pytest.approx(4 * tokens)
    assert Kernel(parameters="lora").work(sizes).adapter_tokens == pytest.approx(4 * tokens)
