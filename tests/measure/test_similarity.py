import json
import math

import numpy as np
import pytest
import torch
from torch.func import functional_call, jacrev

from deltaloom.core.errors import InputError
from deltaloom.core.method import Sizes
from deltaloom.measure._affinity import affinities, margin_pseudovalues, margins, unit
from deltaloom.measure.similarity import Similarity


@pytest.fixture
def draw():
    return np.random.default_rng(3)


def examples(draw, sizes, width=40, shared=1.0):
    tasks = np.repeat(np.arange(len(sizes)), sizes)
    centres = draw.normal(size=(len(sizes), width)) * shared
    rows = unit(centres[tasks] + draw.normal(size=(len(tasks), width)))
    return rows, tasks


@pytest.mark.parametrize("sizes", [(5, 4, 3), (6, 4), (7,)])
def test_margins_and_their_jackknife_by_loops(draw, sizes):
    rows, tasks = examples(draw, sizes)

    def by_loops(rows, tasks):
        found = []
        for i, task in enumerate(tasks):
            means = {}
            for other in set(tasks.tolist()):
                alike = [
                    float(rows[i] @ rows[j])
                    for j in range(len(rows))
                    if j != i and tasks[j] == other
                ]
                means[other] = np.mean(alike)
            away = [value for other, value in means.items() if other != task]
            found.append(means[task] - (np.mean(away) if away else 0.0))
        return np.array(found)

    order = draw.permutation(len(rows))
    rows, tasks = rows[order], tasks[order]
    np.testing.assert_allclose(margins(rows @ rows.T, tasks), by_loops(rows, tasks))
    n, whole = len(rows), by_loops(rows, tasks).mean()
    wanted = [
        n * whole - (n - 1) * by_loops(np.delete(rows, i, 0), np.delete(tasks, i)).mean()
        for i in range(n)
    ]
    np.testing.assert_allclose(margin_pseudovalues(rows @ rows.T, tasks), wanted)


def test_pseudovalues_have_the_error_that_new_examples_show(draw):
    """The spread of the margins themselves claims about half of it."""
    values, claimed, naive = [], [], []
    centre = draw.normal(size=40) * 0.5
    for _ in range(300):
        rows = unit(centre + draw.normal(size=(15, 40)))
        gram, tasks = rows @ rows.T, np.zeros(15, int)
        found = margin_pseudovalues(gram, tasks)
        values.append(found.mean())
        claimed.append(found.std(ddof=1) / math.sqrt(15))
        naive.append(margins(gram, tasks).std(ddof=1) / math.sqrt(15))
    assert np.mean(claimed) == pytest.approx(np.std(values), rel=0.15)
    assert np.mean(naive) < 0.65 * np.std(values)


def test_affinities_find_the_true_cosine_with_few_examples(draw):
    first, second = draw.normal(size=(2, 60))
    second = first + 0.7 * second
    truth = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    found, plain, inside = [], [], 0
    for seed in range(40):
        noise = draw.normal(size=(16, 60)) * 2
        rows = np.concatenate([first + noise[:8], second + noise[8:]])
        tasks = np.repeat([0, 1], 8)
        value, low, high = affinities(rows @ rows.T, tasks, seed)
        found.append(value[0, 1])
        inside += low[0, 1] <= truth <= high[0, 1]
        a, b = rows[:8].mean(0), rows[8:].mean(0)
        plain.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        assert value[0, 0] == pytest.approx(1)
        np.testing.assert_allclose(value, value.T)
    assert np.mean(found) == pytest.approx(truth, abs=0.04)
    assert np.mean(plain) < truth - 0.1  # what taking every row's own square along would give
    assert inside >= 32


def test_no_common_direction_is_no_number():
    rows = np.array([[1.0, 0], [-1.0, 0], [0, 1.0], [0, 1.0]])
    found, _, _ = affinities(rows @ rows.T, np.array([0, 0, 1, 1]), 0)
    assert np.isnan(found[0]).all()
    assert found[1, 1] == 1


def lessons(n=12, sources=3):
    """Each source has an answer of its own."""
    answers = ["a", "b", "Paris"]
    return [
        {
            "prompt": f"what is w{k % 4} ",
            "completion": answers[k % sources],
            "source": f"task{k % sources}",
            "id": f"r{k}",
        }
        for k in range(n)
    ]


def test_affinity_equals_full_gradients(tiny, rows, run):
    """With as many buckets as to make collisions rare, the sketch is near the gradients."""
    from deltaloom.core.encoding import encode

    data = rows(*lessons())
    method = Similarity(parameters="layers", dimension=2**14)
    found = method.measure(tiny.model, tiny.tokenizer, data, run)
    model = tiny.model.double()
    own = {n: p for n, p in model.named_parameters() if "layers" in n}
    gradients = []
    for row in encode(data, tiny.tokenizer, 64):
        ids = torch.tensor([row.input_ids])
        scored = torch.tensor(row.response_mask[1:]).bool()

        def loss(parameters, ids=ids, scored=scored):
            logits = functional_call(model, parameters, (ids,)).logits[0, :-1][scored]
            return torch.nn.functional.cross_entropy(logits, ids[0, 1:][scored])

        parts = jacrev(loss)(own)
        gradients.append(torch.cat([parts[n].detach().flatten() for n in own]).numpy())
    exact = unit(gradients)
    tasks = np.array([k % 3 for k in range(12)])
    wanted = margin_pseudovalues(exact @ exact.T, tasks)
    np.testing.assert_allclose([found.items[f"r{k}"] for k in range(12)], wanted, atol=2e-2)
    assert found.metric == "affinity_margin"
    assert found.value > 0.05  # the answers tell the tasks apart
    written = json.loads((run.folder / "affinity.json").read_text())
    assert written["tasks"] == ["task0", "task1", "task2"]
    matrix = affinities(exact @ exact.T, tasks, 0)[0]
    np.testing.assert_allclose(written["affinity"], matrix, atol=2e-2)


def test_groups_go_before_sources_and_one_task_has_no_margin(tiny, rows, run):
    one = rows(*({**row, "group": "all"} for row in lessons()))
    assert Similarity().measure(tiny.model, tiny.tokenizer, one, run).metric == "affinity_own"
    some = rows(*({**row, "group": "all"} for row in lessons()[:3]), *lessons()[3:])
    assert Similarity().measure(tiny.model, tiny.tokenizer, some, run).metric == "affinity_margin"


def test_equal_tasks_are_not_told_apart(tiny, rows, run, draw):
    halves = draw.permutation(36) % 2
    made = [
        {"prompt": f"what w{k % 6} w{k // 6} ", "completion": "a", "source": f"half{halves[k]}"}
        for k in range(36)
    ]
    found = Similarity().measure(tiny.model, tiny.tokenizer, rows(*made), run)
    assert found.low < 0 < found.high


def test_a_task_needs_three_rows(tiny, rows, run):
    with pytest.raises(InputError, match=r"task 'task2' of .* has 2 row"):
        Similarity().measure(tiny.model, tiny.tokenizer, rows(*lessons(8)), run)
    with pytest.raises(InputError, match="holds no rows"):
        Similarity().measure(tiny.model, tiny.tokenizer, rows(), run)


def test_plan():
    sizes = Sizes(
        rows=10,
        row_tokens=8.0,
        target_rows=0,
        matmul_parameters=10,
        parameters=12,
        linear_sides=4,
        weight_bytes=48,
        deltas=0,
    )
    assert Similarity().work(sizes).adapter_tokens == 80
    assert Similarity(parameters="all").work(sizes).full_tokens == 80
