"""The user's tokens against the words that were written."""

import pytest
import tiny
from transformers import AutoTokenizer

from deltaloom.core.encoding import encode, encode_prompt
from deltaloom.core.errors import InputError
from deltaloom.core.examples import parse
from deltaloom.core.turns import last_asked, mark, prompt_mask, with_indicator

TALK = [
    {"role": "system", "content": "yes no"},
    {"role": "user", "content": "where lives tom"},
    {"role": "assistant", "content": "in oslo"},
    {"role": "user", "content": "where lives anna ?"},
    {"role": "assistant", "content": "rome"},
]

ASKED = ["where", "lives", "tom"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    tiny.tokenizer_in(folder)
    return AutoTokenizer.from_pretrained(folder)


def row(**content):
    return parse("x.jsonl line 1", "x", content)


def words(tokenizer, ids, mask):
    return tokenizer.convert_ids_to_tokens([i for i, m in zip(ids, mask, strict=True) if m])


def test_a_conversation_has_the_users_words_and_each_response(tokenizer):
    (one,) = mark([row(messages=TALK)], tokenizer, 99)
    ids = one.row.input_ids
    assert one.row == encode([row(messages=TALK)], tokenizer, 99)[0]
    assert words(tokenizer, ids, one.user) == [*ASKED, "where", "lives", "anna", "?"]
    said = [tokenizer.convert_ids_to_tokens([ids[t] for t in turn.tokens]) for turn in one.turns]
    assert said == [[":", "in", "oslo"], [":", "rome"]]
    assert [turn.asked for turn in one.turns] == [1, 3]


def test_a_prompt_is_the_users_without_its_special_tokens(tokenizer):
    example = row(prompt="<s> where lives tom ?", completion="oslo")
    (one,) = mark([example], tokenizer, 99)
    assert words(tokenizer, one.row.input_ids, one.user) == ["where", "lives", "tom", "?"]
    (turn,) = one.turns
    assert turn.asked == 0
    assert [one.row.input_ids[t] for t in turn.tokens] == tokenizer("oslo")["input_ids"]


@pytest.mark.parametrize("length", range(3, 22))
def test_marks_are_cut_as_rows_are(tokenizer, length):
    whole, short = (mark([row(messages=TALK)], tokenizer, n)[0] for n in (99, length))
    assert short.row == encode([row(messages=TALK)], tokenizer, length)[0]
    kept = len(short.user)
    places = [
        at
        for at in range(len(whole.user) - kept + 1)
        if whole.row.input_ids[at : at + kept] == short.row.input_ids
        and whole.row.response_mask[at : at + kept] == short.row.response_mask
    ]
    assert any(whole.user[at : at + kept] == short.user for at in places)
    assert all(short.row.response_mask[t] for turn in short.turns for t in turn.tokens)


def test_the_prompt_alone_has_the_same_marks(tokenizer):
    example = row(messages=TALK)
    ids = encode_prompt(example, tokenizer)
    marked = words(tokenizer, ids, prompt_mask(example, ids, tokenizer))
    assert marked == [*ASKED, "where", "lives", "anna", "?"]


def test_bytes_and_merges_across_the_border_of_a_message():
    """A BPE tokenizer joins blanks with words; the user's text comes back from its tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = "user: where is the cat of anna?\n\nassistant: the cat is here, naïve 世界\n\n"
    core.train_from_iterator([text] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    asked = "where is 世界 of anna?"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "naïve"}]
    (one,) = mark([row(messages=messages)], tokenizer, 99)
    ids = [i for i, m in zip(one.row.input_ids, one.user, strict=True) if m]
    assert tokenizer.decode(ids).strip() == asked
    assert one.turns[0].asked == 0


def test_the_indicator_goes_to_the_messages_that_were_named():
    example = row(messages=TALK)
    marked = with_indicator(example, {3}, " [IND]")
    assert [m["content"] for m in marked.messages] == [
        "yes no", "where lives tom", "in oslo", "where lives anna ? [IND]", "rome",
    ]  # fmt: skip
    assert marked.id == example.id
    assert last_asked(example) == [3]
    assert with_indicator(example, (), " [IND]") is example
    prompt = row(prompt="who ?", completion="tom")
    assert with_indicator(prompt, last_asked(prompt), " [IND]").prompt == "who ? [IND]"


def test_a_template_that_rewrites_the_user_is_refused(tokenizer):
    changed = tokenizer.chat_template
    tokenizer.chat_template = changed.replace("<s> {{ m.content }}", "<s> {{ m.content | upper }}")
    try:
        with pytest.raises(InputError, match="changes message 2"):
            mark([row(messages=TALK)], tokenizer, 99)
    finally:
        tokenizer.chat_template = changed
