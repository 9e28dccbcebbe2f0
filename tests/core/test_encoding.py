"""Token ids and response masks against oracles that render and tokenise on their own."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import (
    LINES,
    SEPARATED,
    SEPARATED_MARKED,
    byte_level,
    metaspace,
    word_level,
    wrapped,
)

from deltaloom.core.encoding import encode, encode_continuation, encode_prompt
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples, parse

BYTES = byte_level()
SPACED, SPACED_EOS = metaspace(), metaspace(eos=True)
WORDS = word_level(["p", "q", "r", "s", "t", "u", "v", "w", "x", "y", "z"])
TEXT = st.text(alphabet="abc the.?\n", min_size=1, max_size=14)
SPACED_TEXT = st.text(alphabet="abc the.", min_size=1, max_size=14)


def example(**row):
    return parse("rows.jsonl line 7", "rows", row)


def encoded(tokenizer, max_length=512, **row):
    (found,) = encode(Examples([example(**row)]), tokenizer, max_length)
    assert len(found.input_ids) == len(found.response_mask)
    return found


def parts(found):
    """Ids with mask 0 and ids with mask 1."""
    pairs = list(zip(found.input_ids, found.response_mask, strict=True))
    return [i for i, m in pairs if not m], [i for i, m in pairs if m]


def refuses(message, tokenizer=BYTES, max_length=512, **row):
    with pytest.raises(InputError, match=message) as caught:
        encoded(tokenizer, max_length, **row)
    assert str(caught.value).startswith("rows.jsonl line 7: ")


# Prompt and completion.


def test_prompt_is_masked_and_completion_with_eos_is_not():
    found = encoded(WORDS, prompt="p q", completion="r s")
    assert WORDS.convert_ids_to_tokens(found.input_ids) == ["p", "q", "r", "s", "</s>"]
    assert found.response_mask == [0, 0, 1, 1, 1]
    assert not found.truncated


def test_a_tokenizer_without_eos_ends_with_the_answer():
    found = encoded(word_level(["p", "q"], eos=None), prompt="p", completion="q")
    assert found.response_mask == [0, 1]


def test_an_answer_that_ends_in_eos_gets_no_second_one():
    ids = encoded(BYTES, prompt="the ", completion="cat</s>").input_ids
    assert ids.count(BYTES.eos_token_id) == 1


@given(TEXT, TEXT)
def test_byte_level_parts_decode_to_their_texts(prompt, completion):
    before, after = parts(encoded(BYTES, prompt=prompt, completion=completion))
    assert before == BYTES(prompt)["input_ids"]
    assert after[-1] == BYTES.eos_token_id
    assert BYTES.decode(before) == prompt
    assert BYTES.decode(after[:-1]) == completion


@given(SPACED_TEXT, SPACED_TEXT, st.sampled_from([SPACED, SPACED_EOS]))
def test_tokenizers_that_add_bos_eos_and_a_space(prompt, completion, tokenizer):
    found = encoded(tokenizer, prompt=prompt, completion=completion)
    before, after = parts(found)
    assert found.response_mask == sorted(found.response_mask)
    assert before[0] == tokenizer.bos_token_id
    assert found.input_ids.count(tokenizer.bos_token_id) == 1
    assert found.input_ids.count(tokenizer.eos_token_id) == 1
    assert found.input_ids[-1] == tokenizer.eos_token_id
    asked = "".join(tokenizer.convert_ids_to_tokens(before[1:]))
    said = "".join(tokenizer.convert_ids_to_tokens(after[:-1]))
    assert asked == "▁" + prompt.removeprefix(" ").replace(" ", "▁")
    assert said == completion.replace(" ", "▁")


@pytest.mark.parametrize("tokenizer", [BYTES, SPACED], ids=["bytes", "spaced"])
def test_a_token_over_the_border_is_split_at_the_border(tokenizer):
    apart = tokenizer("the a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("the ab", add_special_tokens=False)["input_ids"]
    assert whole[: len(apart)] != apart, "the case needs a merge over the border"
    before, after = parts(encoded(tokenizer, prompt="the a", completion="b"))
    assert before == tokenizer("the a")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(after) == ["b", "</s>"]


def test_a_clean_border_gives_the_tokens_of_the_whole_text():
    found = encoded(SPACED, prompt="the cat", completion=" sat on")
    assert found.input_ids[:-1] == SPACED("the cat sat on")["input_ids"]


def test_continuation_of_a_conversation_has_no_space_put_before_it():
    tokenizer = metaspace(template=LINES.replace("assistant: {% endif", "a{% endif"))
    row = example(messages=[{"role": "user", "content": "the cat"}])
    prompt = encode_prompt(row, tokenizer)
    after = encode_continuation(row, prompt, "b", tokenizer)
    assert tokenizer.convert_ids_to_tokens(after) == ["b"]


def test_questions_learn_their_right_choice():
    found = encoded(WORDS, prompt="p", choices=["q", "r"], answer=1)
    assert WORDS.convert_ids_to_tokens(parts(found)[1]) == ["r", "</s>"]


def test_a_text_row_is_response_from_end_to_end():
    found = encoded(SPACED_EOS, text="the cat")
    assert found.input_ids == SPACED_EOS("the cat")["input_ids"]
    assert all(found.response_mask)


# Conversations.

CONTENT = TEXT.filter(lambda text: text.strip())
TURNS = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3)


def conversation(pairs):
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(roles, pair, strict=True)
    ]


def by_offsets(tokenizer, rendered):
    """The oracle: render, find what the assistant says, mask the tokens that begin inside."""
    spans = [m.span(1) for m in re.finditer(r"assistant<\|sep\|>(.*?<\|end\|>)", rendered, re.S)]
    out = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    inside = [int(any(a <= s < b for a, b in spans)) for s, _ in out["offset_mapping"]]
    return out["input_ids"], inside


SEPARATED_BYTES = byte_level(SEPARATED)
MARKED_BYTES = byte_level(SEPARATED_MARKED)


@settings(max_examples=60)
@given(TURNS, st.sampled_from([SEPARATED_BYTES, MARKED_BYTES]))
def test_multi_turn_mask_is_what_the_offsets_say(pairs, tokenizer):
    messages = conversation(pairs)
    found = encoded(tokenizer, messages=messages)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert (found.input_ids, found.response_mask) == by_offsets(tokenizer, rendered)


@settings(max_examples=40)
@given(TURNS)
def test_marked_template_agrees_with_transformers(pairs):
    messages = conversation(pairs)
    found = encoded(MARKED_BYTES, messages=messages)
    theirs = MARKED_BYTES.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert found.input_ids == theirs["input_ids"]
    assert found.response_mask == theirs["assistant_masks"]


@settings(max_examples=60)
@given(TURNS)
def test_borders_of_plain_text_keep_the_prompt_that_generation_sees(pairs):
    tokenizer = LINES_BYTES
    messages = conversation(pairs)
    found = encoded(tokenizer, messages=messages)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(found.input_ids) == rendered
    first = found.response_mask.index(1)
    assert found.input_ids[:first] == encode_prompt(example(messages=messages[:2]), tokenizer)
    said = "".join(f"{text}<|end|>" for _, text in pairs)
    assert tokenizer.decode(parts(found)[1]) == said


LINES_BYTES = byte_level(LINES)


def test_marks_survive_a_tokenizer_that_drops_the_space_they_begin_with():
    # transformers' own mask is empty here: the first marked character is in no token.
    tokenizer = word_level(["p", "q", "r", "s"])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{%- generation %} {{ m.content }}"
        "{%endgeneration%}{% else %} {{ m.content }}{% endif %}{% endfor %}"
    )
    found = encoded(tokenizer, messages=conversation([("p", "q"), ("r", "s")]))
    assert tokenizer.convert_ids_to_tokens(found.input_ids) == ["p", "q", "r", "s"]
    assert found.response_mask == [0, 1, 0, 1]


def test_what_follows_the_last_answer_is_not_learned():
    messages = [*conversation([("the", "cat")]), {"role": "user", "content": "sat"}]
    for tokenizer in (SEPARATED_BYTES, MARKED_BYTES):
        before, after = parts(encoded(tokenizer, messages=messages))
        assert tokenizer.decode(after) == "cat<|end|>"
        assert "cat" not in tokenizer.decode(before)


def test_a_conversation_may_begin_with_the_assistant():
    messages = [{"role": "assistant", "content": "hello"}, *conversation([("the", "cat")])]
    for tokenizer in (SEPARATED_BYTES, MARKED_BYTES):
        said = tokenizer.decode(parts(encoded(tokenizer, messages=messages))[1])
        assert said.endswith("cat<|end|>")
        assert "hello<|end|>" in said


def test_sharegpt_roles_are_those_of_the_template():
    turns = [{"from": "human", "value": "the"}, {"from": "gpt", "value": "cat"}]
    found = encoded(SEPARATED_BYTES, conversations=turns)
    assert found == encoded(SEPARATED_BYTES, messages=conversation([("the", "cat")]))


def test_prompt_of_a_conversation_ends_where_the_answer_begins():
    messages = conversation([("the", "cat"), ("sat", "mat")])
    ids = encode_prompt(example(messages=messages), SEPARATED_BYTES)
    text = SEPARATED_BYTES.decode(ids)
    assert text.endswith("sat<|end|><|start|>assistant<|sep|>")
    assert encoded(SEPARATED_BYTES, messages=messages).input_ids[: len(ids)] == ids


# Faults.


def test_rows_without_an_answer_are_refused():
    refuses("has no answer; add a 'completion'", prompt="the cat")
    refuses("the answer is empty", prompt="the cat", completion="")
    refuses("nothing to learn: the text is empty", text=" \n")
    refuses(
        "no message of the assistant", SEPARATED_BYTES, messages=[{"role": "user", "content": "a"}]
    )
    silent = conversation([("the", " ")])
    for tokenizer in (SEPARATED_BYTES, MARKED_BYTES):
        refuses("no message of the assistant", tokenizer, messages=silent)


def test_an_empty_prompt_is_refused_rather_than_all_learned():
    refuses("every token counts as response because the prompt is empty", prompt="", completion="a")
    alone = [{"role": "assistant", "content": "cat"}]
    tokenizer = byte_level("{% for m in messages %}{{ m.content }}{% endfor %}")
    refuses("every token counts as response", tokenizer, messages=alone)


def test_marks_that_mark_nothing_are_refused():
    empty = byte_level(
        "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}"
    )
    refuses("nothing to learn", empty, messages=conversation([("the", "cat")]))


def test_a_tokenizer_without_chat_template_is_refused_with_the_remedy():
    messages = conversation([("the", "cat")])
    refuses("no chat template; use rows with 'prompt' and 'completion'", messages=messages)
    with pytest.raises(InputError, match="no chat template"):
        encode_prompt(example(messages=messages), BYTES)


def test_what_a_template_refuses_names_the_row():
    raising = "{{ raise_exception('roles must alternate') }}"
    for template in (raising, raising + "{% generation %}{% endgeneration %}"):
        refuses(
            r"the chat template refuses the messages \(roles must alternate\)",
            byte_level(template),
            messages=conversation([("the", "cat")]),
        )


def test_a_template_that_rewrites_earlier_turns_is_refused():
    last_only = byte_level("{{ messages[-1].content }}{% if add_generation_prompt %}:{% endif %}")
    refuses(
        "rewrites earlier messages.*{% generation %}",
        last_only,
        messages=conversation([("the", "cat"), ("sat", "mat")]),
    )


def test_a_prompt_is_needed_to_answer():
    with pytest.raises(InputError, match="line 7: has no 'prompt' to answer"):
        encode_prompt(example(text="the"), BYTES)
    with pytest.raises(InputError, match="line 7: no message before the assistant's"):
        encode_prompt(example(messages=[{"role": "assistant", "content": "a"}]), SEPARATED_BYTES)


# Truncation.


@given(st.integers(1, 9), st.integers(1, 9), st.integers(2, 24))
def test_prompt_goes_from_the_left_first_then_the_response_from_the_right(asked, said, limit):
    tokenizer = NUMBERED
    prompt = [f"p{i}" for i in range(asked)]
    response = [*(f"r{i}" for i in range(said)), "</s>"]
    found = encoded(tokenizer, limit, prompt=" ".join(prompt), completion=" ".join(response[:-1]))
    kept_response = response[: limit - 1]
    kept_prompt = prompt[-(limit - len(kept_response)) :]
    assert tokenizer.convert_ids_to_tokens(found.input_ids) == kept_prompt + kept_response
    assert found.response_mask == [0] * len(kept_prompt) + [1] * len(kept_response)
    assert found.truncated == (asked + len(response) > limit)


NUMBERED = word_level([f"{side}{i}" for side in "pr" for i in range(10)])


@given(st.integers(2, 12))
def test_text_rows_lose_their_end(limit):
    found = encoded(NUMBERED, limit, text=" ".join(f"r{i}" for i in range(9)))
    tokens = [*(f"r{i}" for i in range(9)), "</s>"]
    assert NUMBERED.convert_ids_to_tokens(found.input_ids) == tokens[:limit]
    assert found.truncated == (limit < 10)


@settings(max_examples=50)
@given(TURNS, st.integers(2, 40))
def test_a_cut_conversation_is_one_stretch_with_its_first_answer(pairs, limit):
    messages = conversation(pairs)
    whole = encoded(SEPARATED_BYTES, messages=messages)
    cut = encoded(SEPARATED_BYTES, limit, messages=messages)
    first = whole.response_mask.index(1)
    starts = [
        start
        for start in range(len(whole.input_ids))
        if whole.input_ids[start:][: len(cut.input_ids)] == cut.input_ids
        and whole.response_mask[start:][: len(cut.input_ids)] == cut.response_mask
    ]
    assert any(start < first < start + len(cut.input_ids) for start in starts)
    assert len(cut.input_ids) == min(limit, len(whole.input_ids))
    assert cut.truncated == (len(whole.input_ids) > limit)


def test_two_tokens_keep_one_of_each_side():
    found = encoded(NUMBERED, 2, prompt="p1 p2 p3", completion="r1 r2")
    assert NUMBERED.convert_ids_to_tokens(found.input_ids) == ["p3", "r1"]
    assert found.response_mask == [0, 1]


@pytest.mark.parametrize("limit", [1, 0, -3])
def test_a_length_without_room_for_an_answer_is_refused(limit):
    with pytest.raises(InputError, match=f"max_length = {limit}: must be at least 2"):
        encoded(NUMBERED, limit, prompt="p1", completion="r1")


# Real tokenizers.

REAL = ("gpt2", "tinystories_4096_bpe", "tinystories_8k_bpe", "guppylm_4k", "llama2c")
PAIRS = [
    ("Once upon a time", " there was a cat."),
    ("Question: is 7 > 3?\nAnswer:", "yes"),
    ("un", "believable stories"),
    ("Lily said: \n", "\nHello,  Tom!"),
]


def real(assets, name):
    if name == "llama2c":
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(assets / "models" / "stories260K")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = assets / "tokenizers" / name
    if (folder / "tokenizer.json").exists():
        inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:
        inner = Tokenizer(
            models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        )
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
    return wrapped(inner)


@pytest.mark.parametrize("pair", PAIRS, ids=range(len(PAIRS)))
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_say_prompt_and_answer_whole(assets, name, pair):
    tokenizer = real(assets, name)
    prompt, completion = pair
    found = encoded(tokenizer, prompt=prompt, completion=completion)
    before, _ = parts(found)
    assert found.response_mask == sorted(found.response_mask)
    ids = found.input_ids[:-1] if tokenizer.eos_token_id is not None else found.input_ids
    said = tokenizer.decode(ids, skip_special_tokens=True)
    whole = tokenizer(prompt + completion)["input_ids"]
    assert said == tokenizer.decode(whole, skip_special_tokens=True)
    assert before == tokenizer(prompt)["input_ids"]
