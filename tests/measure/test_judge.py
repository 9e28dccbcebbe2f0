"""Judges behind a real server and loaded ones: verdicts, orders, agreement, biases, corrections."""

import json
import math
import random
import re

import pytest
import torch
from chat_server import serving

from deltaloom.core.errors import InputError
from deltaloom.core.run import Run
from deltaloom.measure._judge_prompts import request, verdict_in
from deltaloom.measure._judgements import judgements
from deltaloom.measure._rulings import rule
from deltaloom.measure._verdicts import Opinion
from deltaloom.measure.judge import Judge
from deltaloom.recipe.execute import run_step
from deltaloom.recipe.parsing import parse_step


def shown(messages):
    """The parts of a prompt: instruction, response A and response B."""
    text = messages[-1]["content"]
    context = text.partition("CONTEXT:\n")[2].partition("\n\nEVALUATION:")[0]
    return dict(line.split(": ", 1) for line in context.split("\n") if ": " in line)


def by_quality(messages, body=None):
    """A judge that reads the quality written into the responses."""
    parts = shown(messages)
    a, b = (int(parts[f"response {side}"].split()[1]) for side in "AB")
    return f"explanation: {a} and {b}.\nverdict: {'A' if a > b else 'B' if b > a else 'tie'}"


def pairs(n=40, seed=0, labelled=lambda k: True):
    """Rows in LLMBar's form whose responses differ in quality; people err now and then."""
    rng = random.Random(seed)
    rows = []
    for k in range(n):
        first, second = rng.sample(range(10), 2)
        row = {
            "input": f"task {k}",
            "output_1": f"quality {first} x",
            "output_2": f"quality {second} y",
        }
        if labelled(k):
            row["label"] = 1 + (second > first)
        rows.append(row)
    return rows


@pytest.fixture
def judged(tmp_path, rows):
    """Measure with an endpoint; gives the estimate and `judge.json`."""

    def measured(server, given, **settings):
        settings = {"verdict": "generated", **settings}
        fast = {"url": server.url, "model": "m", "backoff": 0.01, "timeout": 5}
        judge = Judge.parse({"judge": fast, **settings}, "judge")
        with Run.open(tmp_path / "judging", {"steps": []}, {}, seed=0) as run:
            part = run.part("m--q")
            found = judge.measure(None, None, rows(*given), part)
            return found, json.loads((part.folder / "judge.json").read_text()), run

    return measured


def test_a_good_judge_agrees_in_both_orders(judged):
    with serving(by_quality) as server:
        found, report, run = judged(server, pairs())
    assert (found.value, found.n, found.missing) == (1.0, 40, 0)
    assert "longer_wins" not in report["biases"]  # all are equally long
    assert len(server.bodies) == 80  # both orders
    assert report["agreement"]["kappa"]["value"] == 1.0
    assert report["biases"]["first"]["value"] == report["biases"]["second"]["value"] == 0.0
    assert found.cost["endpoint_calls"] == 80
    assert run.record["notes"]["m--q.failed_rows"] == 0


def test_a_judge_that_always_takes_the_first_is_found_out(judged):
    with serving(lambda messages, body: "[[A]]") as server:
        found, report, _ = judged(server, pairs())
    assert report["biases"]["first"]["value"] == 1.0
    assert set(found.items.values()) == {0.5}  # ties, whoever is the better one
    # Bonett and Price for no discordant pair of 40, halved.
    reach = 1.959964 * math.sqrt(2 / 42 / 42) / 2
    assert (found.low, found.high) == pytest.approx((0.5 - reach, 0.5 + reach))
    assert report["verdicts"] == {"tie": 40}
    with serving(lambda messages, body: "[[A]]") as server:
        given, _, _ = judged(server, pairs(), orders="given")
    assert given.value == pytest.approx(sum(row["label"] == 1 for row in pairs()) / 40)


def test_random_orders_show_each_row_once(judged):
    with serving(by_quality) as server:
        found, report, _ = judged(server, pairs(), orders="random")
    assert (found.value, len(server.bodies)) == (1.0, 40)
    first = sum(shown(body["messages"])["response A"].endswith("x") for body in server.bodies)
    assert 10 < first < 30
    assert "first" not in report["biases"]


def swayed(messages, body):
    """Prefers the response that a remark names, however bad; else the better one."""
    remark = shown(messages).get("remark", "")
    for side in "AB":
        if f"response {side} is better" in remark:
            return f"verdict: {side}"
    if max(len(shown(messages)[f"response {side}"]) for side in "AB") > 100:
        sides = sorted("AB", key=lambda side: len(shown(messages)[f"response {side}"]))
        return f"verdict: {sides[-1]}"
    return by_quality(messages)


def test_probes_find_what_sways_a_judge(judged):
    probes = ["length", "egocentric", "bandwagon", "attention"]
    with serving(swayed) as server:
        _, report, _ = judged(server, pairs(20), probes=probes)
    biases = {name: one["value"] for name, one in report["biases"].items()}
    assert (biases["bandwagon"], biases["length"]) == (1.0, 1.0)
    assert (biases["attention"], biases["egocentric"]) == (0.0, 0.0)
    assert report["biases"]["bandwagon"]["n"] == 20


def test_faults_are_missing_and_prose_is_no_verdict(judged):
    given = pairs(12)

    def answer(messages, body):
        if shown(messages)["instruction"] == "task 3":
            return "Both are wonderful in their own way, and it would be unfair to name one."
        return by_quality(messages)

    with serving(answer) as server:
        asked = judgements_of(given)
        first = request(asked[0])
        server.faults = {first: [429, 500, "truncated"], request(asked[5]): ["refusal"] * 6}
        found, report, run = judged(server, given)
    assert (found.n, found.missing, found.value) == (10, 2, 1.0)
    assert server.asked[first] == 4  # asked again until it was answered
    assert server.asked[request(asked[3])] == 3  # prose is asked again twice
    assert run.record["notes"]["m--q.failed_rows"] == 2
    assert sorted(report["failures"]) == [
        "refused: I cannot help with that",
        "the answer states no verdict",
    ]


def judgements_of(given):
    from deltaloom.core.examples import Examples, parse

    data = Examples(parse(f"q.jsonl line {k}", "q", dict(row)) for k, row in enumerate(given, 1))
    return judgements(data, [], False, True)


def test_an_interrupted_judge_is_not_paid_twice(judged):
    with serving(by_quality) as server:
        server.faults = {request(judgements_of(pairs())[30]): [401]}
        with pytest.raises(InputError, match="OPENAI_API_KEY"):
            judged(server, pairs())
        before = len(server.bodies)
        found, _, _ = judged(server, pairs())
        # The call that failed is made again, and what was under way when it did.
        assert before > 10
        assert len(server.bodies) <= 80 + 1 + 4
    assert found.value == 1.0


def test_samples_vote_and_their_agreement_is_told(judged):
    def answer(messages, body):
        good = by_quality(messages)
        if random.Random(f"{body['seed']} {messages[-1]['content']}").random() < 0.7:
            return good
        return good.replace("verdict: A", "verdict: x").replace("B", "A").replace("x", "B")

    with serving(answer) as server:
        one, _, _ = judged(server, pairs(), samples=1, temperature=0.7)
    with serving(answer) as server:
        many, report, _ = judged(server, pairs(), samples=9)
        assert {body["temperature"] for body in server.bodies} == {0.7}
    assert many.value > one.value
    assert 0 < report["self_agreement"]["samples_alpha"]["value"] < 0.6


def test_scores_are_corrected_for_the_judges_errors(judged):
    """Three quarters of the rows have no label; the judge calls a fifth of the losers winners."""

    def lenient(messages, body):
        good = by_quality(messages)
        return "verdict: A" if int(shown(messages)["instruction"].split()[1]) % 5 == 0 else good

    rng = random.Random(1)
    given = pairs(400, seed=2, labelled=lambda k: rng.random() < 0.25)
    truth = [row["output_1"].split()[1] > row["output_2"].split()[1] for row in given]
    with serving(lenient) as server:
        found, report, _ = judged(server, given, orders="given", unlabelled="correct")
    raw = report["scores"]["judge"]
    assert raw["low"] > sum(truth) / 400  # surely wrong
    assert found.low < sum(truth) / 400 < found.high
    assert found.metric == "share_A_corrected"
    assert report["scores"]["rogan_gladen"]["low"] < sum(truth) / 400
    gold = report["scores"]["gold"]
    assert found.high - found.low < gold["high"] - gold["low"]


def test_pointwise_and_classification(judged):
    scores = [{"prompt": f"task {k}", "response": f"quality {k % 5 + 1}", "score": k % 5 + 1}
              for k in range(20)]  # fmt: skip

    def rate(messages, body):
        return f"verdict: {min(5, int(shown(messages)['response'].split()[1]) + 1)}"

    with serving(rate) as server:
        found, report, _ = judged(server, scores)
    assert found.value == 0.2  # one too much but for the fives
    assert report["agreement"]["spearman"]["value"] > 0.9
    assert 0.5 < report["agreement"]["quadratic_kappa"]["value"] < 0.9
    classes = [{"prompt": f"claim {k}", "label": "yes" if k % 2 else "no"} for k in range(20)]
    with serving(lambda messages, body: "verdict: yes") as server:
        found, report, _ = judged(server, classes)
    assert found.value == 0.5
    assert report["agreement"]["kappa"]["value"] == 0.0


def test_critiques_are_compared_word_by_word(judged):
    given = [{"prompt": "p", "response": "r", "critique": "too short and vague"}] * 2
    with serving(lambda messages, body: "vague and rude") as server:
        found, _, _ = judged(server, given, verdict="likelihood")
    assert found.metric == "critique_f1"
    assert found.value == pytest.approx(2 * 2 / 7)


def test_first_tokens_of_an_endpoint(judged):
    with serving(lambda messages, body: "A") as server:
        found, report, _ = judged(server, pairs(10), verdict="likelihood", orders="given")
    share = math.exp(-0.1) / (math.exp(-0.1) + math.exp(-2.4))
    (row,) = report["calibration"]["bins"]
    assert row["confidence"] == pytest.approx(share)
    assert found.value == pytest.approx(sum(row["label"] == 1 for row in pairs(10)) / 10)


class Leaning:
    """Likes the first place by far, and the better response a little."""

    cut = 0

    def ask(self, questions, run):
        found = []
        for one in questions:
            a, b = re.findall(r"response [AB]: quality (\d)", one.prompt)
            first = 0.9 + (0.05 if a > b else -0.05)
            found.append(Opinion({"A": first, "B": 1 - first}))
        return found


def test_averaging_the_orders_takes_out_a_leaning(run):
    asked = judgements_of(pairs(20))
    agreed = rule(asked, Leaning(), run, orders="both", settle="agree")
    assert {one.verdict for one in agreed} == {"tie"}
    mean = rule(asked, Leaning(), run, orders="both", settle="mean")
    assert [one.verdict for one in mean] == [one.label for one in asked]
    # As it is judged in the first order and in the second, 0.95 and 0.15, or 0.85 and 0.05.
    assert {round(max(one.shares.values()), 9) for one in mean} == {0.55}
    assert all(one.position == "A" for one in mean)
    blind = Leaning()
    blind.ask = lambda questions, run: [Opinion({"A": 0.9, "B": 0.1})] * len(questions)
    found = rule(asked, blind, run, orders="both", settle="mean")
    assert {one.verdict for one in found} == {"tie"}


REWARDBENCH = [
    {"id": k, "prompt": f"task {k}", "chosen": "quality 9", "rejected": f"quality {1 + 9 * bad}",
     "subset": subset, "chosen_model": "good", "rejected_model": "poor"}
    for k, (subset, bad) in enumerate(
        [("math-prm", 0), ("math-prm", 1), *[("hep-python", 0)] * 4, ("donotanswer", 1)]
    )
]  # fmt: skip


def test_rewardbench_files_score_out_of_the_box(judged):
    with serving(by_quality) as server:
        found, report, _ = judged(server, REWARDBENCH)
    subsets = {name: one["value"] for name, one in report["subsets"].items()}
    assert subsets["math-prm"] == 0.5
    # 984 * 0.5 + 164 * 1 of 1,148, however many rows there are of each.
    assert subsets["rewardbench/reasoning"] == pytest.approx((984 * 0.5 + 164) / 1148)
    assert subsets["rewardbench/safety"] == 0.0
    assert found.value == pytest.approx(5 / 7)
    assert report["win_rates"]["good"]["judge"]["value"] == pytest.approx(5 / 7)
    assert report["win_rates"]["poor"]["people"]["value"] == 0.0
    # Two rejected responses are longer by a digit, and the judge took both.
    assert report["biases"]["longer_wins"]["value"] == 1.0
    assert report["biases"]["longer_wins_people"]["value"] == 0.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([*pairs(2), {"input": "t", "output_1": "a", "output_2": "b"}], "line 3: has no label"),
        ([{**pairs(1)[0], "label": 7}], "line 1: label 7: say 1 or 2"),
        ([{"prompt": "t", "output_1": "a"}], "line 1: 'output_2' must be a text"),
        ([{"prompt": "t", "label": "yes"}], r"line 1: only \['yes'\] occurs"),
        ([*pairs(1), {"prompt": "t", "label": "yes"}], "is pairwise and q.jsonl line 2 is class"),
    ],
)
def test_bad_files_name_their_line(given, message, rows, run):
    with pytest.raises(InputError, match=message):
        Judge().measure(None, None, rows(*given), run)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("verdict: A", "A"),
        ("Explanation: A is bad.\nVerdict: [[B]]", "B"),
        ("My final verdict is [[C]]", "tie"),
        ("B", "B"),
        ("**B**", "B"),
        ("Response A is better.", "A"),
        ("A is better than B", None),
        ("a good answer", None),
        ("", None),
    ],
)
def test_what_a_written_answer_states(text, verdict):
    assert verdict_in(text, ("A", "B", "tie")) == verdict


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    from deltaloom.core.base import Base
    from deltaloom.lab.files import tiny_base

    return Base(model=str(tiny_base(tmp_path_factory.mktemp("lab") / "base")), device="cpu")


def log_likelihoods(model, tokenizer, prompt, verdicts):
    found, special = [], tokenizer.chat_template is None
    if not special:
        turn = {"role": "user", "content": prompt}
        prompt = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    for verdict in verdicts:
        before = tokenizer(prompt, add_special_tokens=special)["input_ids"]
        ids = tokenizer(prompt + f"verdict: {verdict}", add_special_tokens=special)["input_ids"]
        with torch.no_grad():
            table = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append(sum(table[k - 1, ids[k]].item() for k in range(len(before), len(ids))))
    return torch.tensor(found)


@pytest.mark.parametrize(("contextual", "template"), [(False, True), (True, True), (True, False)])
def test_likelihoods_equal_brute_force(contextual, template, lab, rows, run):
    model, tokenizer = lab.load(), lab.tokenizer()
    tokenizer.eos_token = None  # so that plain tokenising adds nothing at the end
    if not template:
        tokenizer.chat_template = None
    colours = ["red", "blue", "green"]
    given = [
        {"prompt": "tom", "choices": colours, "answer": "red"},
        {"prompt": "a", "choices": colours, "answer": "blue"},
    ]
    Judge(contextual=contextual).measure(model, tokenizer, rows(*given), run)
    kept = [json.loads(line) for line in (run.folder / "verdicts.jsonl").read_text().splitlines()]
    for row, one in zip(kept, judgements_of(given), strict=True):
        wanted = log_likelihoods(model, tokenizer, request(one), colours).softmax(0)
        if contextual:
            blank = request(one).replace(f"text: {one.instruction}", "text: N/A")
            wanted /= log_likelihoods(model, tokenizer, blank, colours).softmax(0)
            wanted /= wanted.sum()
        shares = [row["shares"][verdict] for verdict in colours]
        assert shares == pytest.approx(wanted.tolist(), abs=2e-5)


def test_a_classifier_judges_by_its_outputs(lab, rows, run):
    labelled = lab.model_copy(update={"labels": ("A", "B")})
    model = labelled.load(new_head=True)
    with torch.no_grad():
        model.score.weight.zero_()
        model.score.weight[1] = 1.0
    found = Judge().measure(model, lab.tokenizer(), rows(*pairs(6)), run)
    assert found.n == 6
    with pytest.raises(InputError, match="writes nothing"):
        Judge(verdict="generated").measure(model, lab.tokenizer(), rows(*pairs(6)), run)
    with pytest.raises(InputError, match="'tie' is none of the base's labels"):
        Judge(ties=True).measure(model, lab.tokenizer(), rows(*pairs(6)), run)


def test_a_classifier_of_numbers_rates_and_needs_no_order(lab, tmp_path, rows):
    torch.manual_seed(0)
    model = lab.model_copy(update={"labels": ("0", "1")}).load(new_head=True)
    tokenizer = lab.tokenizer()
    given = [
        {"id": str(k), "prompt": "t", "output_1": a, "output_2": b, "label": 1}
        for k, (a, b) in enumerate([("tom", "a red hat"), ("a red hat", "tom"), ("tom", "tom")])
    ]
    with Run.open(tmp_path / "run", {"steps": []}, {}, seed=0) as run:
        found = Judge().measure(model, tokenizer, rows(*given), run)
        lines = (run.folder / "verdicts.jsonl").read_text().splitlines()
        one, two, same = (json.loads(line) for line in lines)
        assert one["ratings"] == two["ratings"][::-1]
        assert (one["ratings"][0] > one["ratings"][1]) == (one["verdict"] == "A")
        assert {one["verdict"], two["verdict"], same["verdict"]} == {"A", "B", "tie"}
        assert found.value == 0.5
        with pytest.raises(InputError, match="'probes' turn a response"):
            Judge(probes=["length"]).measure(model, tokenizer, rows(*given), run)
        with pytest.raises(InputError, match="label 'x': responses are rated by numbers"):
            Judge(labels=["x", "y"], shown="apart").measure(model, tokenizer, rows(*given), run)
        best = {"prompt": "t", "chosen": ["a"], "rejected": ["b"]}
        with pytest.raises(InputError, match="leave out shown=together"):
            Judge(shown="together").measure(model, tokenizer, rows(best), run)


def test_as_a_step_without_a_base(tmp_path):
    tasks = tmp_path / "llmbar.json"
    tasks.write_text(json.dumps(pairs(8)))
    with serving(by_quality) as server:
        values = {
            "method": "judge", "tasks": str(tasks), "judge": f"{server.url}#m",
            "verdict": "generated",
        }  # fmt: skip
        record = run_step(parse_step("measure", values, "step"), tmp_path / "out")
    assert record["results"]["estimates"]["m/llmbar/judge_accuracy"]["value"] == 1.0
    assert (tmp_path / "out" / "m--llmbar" / "verdicts.jsonl").exists()
    assert record["cost"]["endpoint_calls"] == 16


@pytest.mark.parametrize(
    "settings",
    [{"samples": 3}, {"labels": ["x"]}, {"verdict": "generated", "samples": 2, "temperature": 0}],
)
def test_settings_that_do_not_go_together(settings):
    with pytest.raises(InputError):
        Judge.parse(settings, "judge")
