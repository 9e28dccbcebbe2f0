"""A tiny random model with a word-level tokenizer, as a folder on disk and loaded."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deltaloom.core.base import Base
from deltaloom.core.examples import Examples, parse
from deltaloom.core.run import Run

WORDS = [
    *("<unk>", "<s>", "</s>", "user:", "assistant:", "Paris", "paris.", "London", "the", "city"),
    *("what", "is", "capital", "of", "France", "?", "a", "b", "c", "d", "####", "42", "1,000"),
    *(f"w{i}" for i in range(17)),
]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def word_tokenizer(bos=True):
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "eos_token": "</s>"}
    if bos:
        special["bos_token"] = "<s>"
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE, **special)


def tiny_llama(positions=64):
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return Base(model=str(folder), device="cpu")


@pytest.fixture
def tiny(base):
    return SimpleNamespace(model=base.load(), tokenizer=base.tokenizer())


@pytest.fixture
def run(tmp_path):
    with Run.open(tmp_path / "run", {"steps": []}, {}, seed=0) as opened:
        yield opened


@pytest.fixture
def rows():
    """From dicts to Examples, with line numbers as in a file."""

    def make(*given):
        parsed = (parse(f"q.jsonl line {k}", "q", dict(row)) for k, row in enumerate(given, 1))
        return Examples(parsed, "q.jsonl")

    return make


@pytest.fixture
def logits_of():
    """Plain log-probabilities (T, V) of one unpadded sequence in float64."""

    def table(model, ids):
        exact = tiny_llama(model.config.max_position_embeddings).double()
        exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
        with torch.no_grad():
            return torch.log_softmax(exact(torch.tensor([ids])).logits[0], -1)

    return table


@pytest.fixture
def tokenizer_without_bos():
    return word_tokenizer(bos=False)


@pytest.fixture
def small_context():
    return tiny_llama(positions=8)
