"""Requests of all tasks in one batch, each against its own model by itself."""

import threading
from concurrent.futures import Future

import pytest
import torch
from serve.shelf import ALONE, KINDS, LOW_RANK, PROMPTS, answers, shelf_in, texts

from deltaloom.core.base import Base
from deltaloom.core.errors import InputError
from deltaloom.serve._continuation import Continuation, Piece
from deltaloom.serve._forward import RaggedModel
from deltaloom.serve._sampling import Sampling
from deltaloom.serve._service import Service
from deltaloom.serve._worker import Overloaded
from deltaloom.serve.settings import Serving

NEW = 12
LAYERS = ["full_attention", "sliding_attention"]
GREEDY = Sampling(temperature=0)


def served(folder, names, **settings):
    deltas = {name: str(folder / name) for name in names}
    return Service.open(
        Serving.parse({"base": str(folder / "base"), "deltas": deltas, **settings}, "serve")
    )


class Asked:
    """One continuation handed to a service, and what it told."""

    def __init__(self, service, name, prompt, max_tokens=NEW, sampling=GREEDY, **more):
        task = service.task(name)
        self.pieces, self.end = [], Future()
        self.one = Continuation(
            task=name,
            adapter=task.adapter,
            prefix=task.prefix,
            prompt=task.reader(lambda tokenizer: tokenizer(prompt)["input_ids"]),
            max_tokens=max_tokens,
            sampling=sampling,
            tell=self._tell,
            **more,
        )
        self.lane = task.lane

    def _tell(self, piece: Piece):
        self.pieces.append(piece)
        if piece.finish:
            self.end.set_result("".join(one.text for one in self.pieces))

    def submit(self, service):
        service.worker.submit(self.lane, [self.one])
        return self

    @property
    def text(self):
        return self.end.result(timeout=20)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return shelf_in(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(scope="module")
def service(shelf):
    service = served(shelf, KINDS, batch=7, piece=16)
    yield service
    service.worker.stop()


def compare(service, folder, names, count=6, seed=0, **more):
    """Ask everything at once; every text must be what the task's model answers alone."""
    asked = [
        (name, k, Asked(service, name, text, stream=k % 2 == 0, **more))
        for k, text in enumerate(texts(count, seed))
        for name in names
    ]
    for _, _, one in asked:
        one.submit(service)
    ids = service.reader.tokenizer(texts(count, seed))["input_ids"]
    wanted = {name: answers(folder, name, ids, NEW, more.get("stop", ())) for name in names}
    for name, k, one in asked:
        assert (name, one.text) == (name, wanted[name][k].text)
        assert len(one.one.tokens) == wanted[name][k].new_tokens
        assert one.pieces[-1].finish == ("stop" if wanted[name][k].finished else "length")
    return wanted


def test_every_kind_answers_as_alone(service, shelf):
    wanted = compare(service, shelf, ["base", *KINDS])
    # The tasks differ on these prompts, so crossed answers would be seen.
    assert len({tuple(one.text for one in found) for found in wanted.values()}) == len(wanted)


def test_which_kinds_share_the_base_s_batch(service):
    beside = {name for name in KINDS if service.task(name).lane is service.lane}
    assert beside == {*LOW_RANK, *PROMPTS}
    assert {service.task(name).kind for name in ALONE} == {
        "model", "lowrank with whole tensors", "dense", "sparse",
    }  # fmt: skip


def test_equal_tensors_are_held_once(service):
    base = service.lane.ragged.model
    one = sum(weight.nbytes for weight in base.parameters())
    changed = sum(w.nbytes for name, w in base.named_parameters() if "layers.1" in name)
    head, factors = base.lm_head.weight.nbytes, 2 * (2 * 16 + 16 * 2) * 4
    stacked = service.lane.stack.nbytes
    assert service.weight_bytes() - stacked == one + 3 * changed + head + factors


def test_stop_texts(service, shelf):
    found = compare(service, shelf, ["base", "lora", "whole"], stop=("lives", "tom anna", "rome"))
    assert any(one.finished for texts in found.values() for one in texts)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("mistral", {"sliding_window": 6}),
        ("gemma3_text", {"sliding_window": 6, "head_dim": 8, "layer_types": LAYERS}),
        ("gpt2", {}),
        ("gemma2", {"sliding_window": 5, "head_dim": 8}),
    ],
)
def test_other_architectures(kind, config, tmp_path):
    _other_base(tmp_path / "base", kind, config)
    service = served(tmp_path, [], batch=4, piece=16)
    try:
        compare(service, tmp_path, ["base"], count=9)
    finally:
        service.worker.stop()


def test_padding_beyond_the_context_is_no_position(tmp_path):
    _other_base(tmp_path / "base", "gpt2", {})
    base = Base(model=str(tmp_path / "base"))
    ragged = RaggedModel(base.load(), "gpt2", 2)
    late, early = [i % 23 for i in range(63)], [5] * 20
    with torch.inference_mode():
        ragged.read(0, [late[:61], early[:1]], [0, 0])
        # The first row's two tokens are padded to 19, to place 80 of a context of 64.
        found = ragged.read(0, [late[61:], early[1:]], [61, 1])
        plain = [ragged.model(torch.tensor([row])).logits[0, -1] for row in (late, early)]
    torch.testing.assert_close(found, torch.stack(plain), atol=1e-5, rtol=1e-4)


def _other_base(folder, kind, config):
    from tiny import tokenizer_in
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"vocab_size": 23, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    shape = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    }  # fmt: skip
    if kind == "gpt2":
        shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    torch.manual_seed(0)
    made = AutoConfig.for_model(kind, **common, **shape, **config, initializer_range=0.3)
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    tokenizer_in(folder)


def test_a_model_that_keeps_states_is_refused(tmp_path):
    from tiny import tokenizer_in
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=23, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer_in(tmp_path / "base")
    with pytest.raises(InputError, match="MambaForCausalLM cannot be served in batches"):
        served(tmp_path, [])


def test_bfloat16(shelf):
    base = {"model": str(shelf / "base"), "dtype": "bfloat16"}
    service = served(shelf, ["lora", "whole"], base=base)
    try:
        assert service.lane.ragged.model.dtype == torch.bfloat16
        assert Asked(service, "lora", "tom").submit(service).text
        assert Asked(service, "whole", "tom").submit(service).text
    finally:
        service.worker.stop()


def test_a_mask_that_a_model_takes_otherwise_is_noticed(shelf, monkeypatch):
    """As a model with masks of its own would."""
    for dtype in ("float32", "bfloat16"):
        ragged = RaggedModel(Base(model=str(shelf / "base")).load(dtype), "this")
        ragged.check()
        monkeypatch.setattr(ragged, "_mask", lambda positions, seen: None)
        with pytest.raises(InputError, match=r"this: LlamaForCausalLM cannot be served .*alone"):
            ragged.check()


def test_seeded_draws_do_not_depend_on_the_batch(service):
    warm = Sampling(temperature=1.3, top_p=0.9)
    alone = Asked(service, "lora", "tom lives", sampling=warm, seed=7).submit(service).text
    crowd = [
        Asked(service, name, text, sampling=Sampling(1.0), seed=k)
        for k, (name, text) in enumerate(zip(["base", "dora"] * 5, texts(10), strict=True))
    ]
    again = Asked(service, "lora", "tom lives", sampling=warm, seed=7)
    other = Asked(service, "lora", "tom lives", sampling=warm, seed=8)
    for one in (*crowd[:5], again, other, *crowd[5:]):
        one.submit(service)
    assert again.text == alone
    assert other.text != alone


def test_what_a_broken_row_leaves_behind_reaches_nobody(shelf):
    """A row's places may hold no numbers at all; whoever gets them next must not see that."""
    service = served(shelf, [], batch=3)
    try:
        held = threading.Event()
        service.worker.call(lambda: held.wait(5))
        first = [Asked(service, "base", "tom " * n).submit(service) for n in (9, 3, 2)]

        def spoil():
            service.lane.step()
            cache = service.lane.ragged.cache
            for layer in cache.own:
                layer.keys[: cache._reach[0]] = float("nan")
                layer.values[: cache._reach[0]] = float("nan")

        service.worker.call(spoil)
        rest = [Asked(service, "base", text).submit(service) for text in texts(6, seed=3)]
        held.set()
        assert first[0].end.result(timeout=20) is not None
        assert "no finite logits" in first[0].pieces[-1].error
        ids = service.reader.tokenizer(texts(6, seed=3))["input_ids"]
        assert [one.text for one in rest] == [a.text for a in answers(shelf, "base", ids, NEW)]
        assert {one.pieces[-1].finish for one in first[1:]} <= {"stop", "length"}
    finally:
        service.worker.stop()


def test_a_failed_step_ends_its_rows_and_no_others(shelf, monkeypatch):
    service = served(shelf, ["whole"], batch=4)
    try:
        read = service.lane.ragged.read
        calls = iter(range(100))

        def fails(*given):
            if next(calls) == 2:
                raise RuntimeError("out of memory\nand more")
            return read(*given)

        monkeypatch.setattr(service.lane.ragged, "read", fails)
        held = threading.Event()
        service.worker.call(lambda: held.wait(5))
        asked = [Asked(service, "base", text).submit(service) for text in texts(6)]
        other = Asked(service, "whole", "tom").submit(service)
        held.set()
        ends = [(one.end.result(timeout=20) and one.pieces[-1]) or one.pieces[-1] for one in asked]
        assert [one.finish == "error" for one in ends] == [True] * 4 + [False] * 2
        assert ends[0].error == "generation failed: out of memory"
        assert other.pieces[-1].finish != "error" or other.text is None
        assert service.metrics.value("deltaloom_step_failures_total") == 1
    finally:
        service.worker.stop()


def test_the_queue_is_bounded_and_cancelled_ones_leave_it(shelf):
    service = served(shelf, [], batch=1, queue=3)
    try:
        held = threading.Event()
        service.worker.call(lambda: held.wait(10))
        asked = [Asked(service, "base", "tom", max_tokens=100).submit(service) for _ in range(3)]
        with pytest.raises(Overloaded):
            Asked(service, "base", "tom").submit(service)
        service.worker.cancel([one.one for one in asked[1:]])
        held.set()
        assert [one.end.result(timeout=20) for one in asked[1:]] == ["", ""]
        assert asked[1].pieces[-1].finish == "cancelled"
        assert Asked(service, "base", "anna").submit(service).text
        assert service.metrics.value("deltaloom_cancelled_total", model="base") == 2
    finally:
        service.worker.stop()


def test_cache_budget_is_kept(shelf):
    service = served(shelf, [], batch=8, cache_tokens=64)
    try:
        seen = []
        step = service.lane.step

        def watched():
            done = step()
            longest = max((one.most for one in service.lane.rows), default=0)
            seen.append(len(service.lane.rows) * longest)
            return done

        service.lane.step = watched
        asked = [Asked(service, "base", text).submit(service) for text in texts(12)]
        ids = service.reader.tokenizer(texts(12))["input_ids"]
        assert [one.text for one in asked] == [a.text for a in answers(shelf, "base", ids, NEW)]
        assert max(seen) <= 64
        assert service.lane.ragged.cache.rows == 0
    finally:
        service.worker.stop()


def test_tasks_come_and_go_while_others_generate(shelf):
    service = served(shelf, ["lora"], batch=4)
    try:
        ids = service.reader.tokenizer(texts(8))["input_ids"]
        wanted = {
            name: [a.text for a in answers(shelf, name, ids, NEW)]
            for name in ("lora", "dora", "prefix", "whole")
        }
        running = [Asked(service, "lora", text).submit(service) for text in texts(8)]
        for name in ("dora", "prefix", "whole"):
            service.add(name, str(shelf / name))
        late = [
            (name, k, Asked(service, name, text).submit(service))
            for k, text in enumerate(texts(8))
            for name in ("dora", "prefix", "whole")
        ]
        for name in ("lora", "dora", "whole"):
            service.remove(name)
            with pytest.raises(InputError, match=f"no model '{name}'"):
                service.task(name)
        # The same name, another delta: nobody gets the one before.
        service.add("lora", str(shelf / "wide"))
        assert [one.text for one in running] == wanted["lora"]
        for name, k, one in late:
            assert one.text == wanted[name][k]
        wide = [a.text for a in answers(shelf, "wide", ids[:2], NEW)]
        assert [Asked(service, "lora", t).submit(service).text for t in texts(8)[:2]] == wide
        service.worker.call(lambda: None).result()
        assert len(service.worker.lanes) == 1
        assert {*service.lane.stack._tasks} == {service.task("lora").adapter}
    finally:
        service.worker.stop()


def test_what_cannot_be_added(service, shelf):
    with pytest.raises(InputError, match="'lora' is taken"):
        service.add("lora", str(shelf / "lora"))
    with pytest.raises(InputError, match="neither an adapter"):
        service.add("empty", str(shelf))
    with pytest.raises(InputError, match="a name is letters"):
        service.add("a/b", str(shelf / "lora"))
    with pytest.raises(InputError, match="it stays"):
        service.remove("base")
    assert "empty" not in service.tasks


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"deltas": {"base": "x"}}, "'base' is the base"),
        ({"deltas": {"auto": "x"}}, "a model's name is letters"),
        ({"host": "0.0.0.0"}, "needs a key; set DELTALOOM_API_KEY"),
        ({"examples": {"base": "x"}}, "say where it is kept"),
        ({"examples": {"nobody": "x"}, "router": "r"}, "examples.nobody: no such task"),
        ({"deltas": ["a/x", "b/x"]}, "two are called 'x'"),
        ({"bacth": 3}, "did you mean 'batch'"),
    ],
)
def test_settings_that_are_refused(settings, words, monkeypatch):
    monkeypatch.delenv("DELTALOOM_API_KEY", raising=False)
    with pytest.raises(InputError, match=words):
        Serving.parse({"base": "some/base", **settings}, "serve").checked()
