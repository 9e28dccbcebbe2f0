"""Vocabularies as bytes: real tokenizers against what they themselves decode and are made from."""

import os
import struct
from pathlib import Path

import pytest
import vocabularies

from deltaloom.core.errors import InputError
from deltaloom.core.vocabulary import Vocabulary, bytes_of, load_tokenizer, tokenizer_digest

ASSETS = os.environ.get("DELTALOOM_ASSETS")
needs_assets = pytest.mark.skipif(not ASSETS, reason="DELTALOOM_ASSETS is not set")
TEXT = 'Once upon a time, there was a little girl named Lily. She said, "café" – 3 times!\n\nEnd'


def of(name: str) -> Path:
    return Path(str(ASSETS)) / name


@needs_assets
@pytest.mark.parametrize(
    "name",
    [
        "tokenizers/gpt2",
        "tokenizers/guppylm_4k",
        "tokenizers/tinystories_4096_bpe",
        "tokenizers/tinystories_8k_bpe",
        "models/TinyStories-656K",
        "models/stories260K",
    ],
)
def test_a_real_tokenizer_spells_a_text_in_bytes(name):
    """The bytes of a text's tokens, joined, are what the tokenizer itself decodes."""
    tokenizer, vocabulary = load_tokenizer(of(name)), Vocabulary.read(of(name))
    # signs that the tokenizer lacks are lost before there are tokens
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    spelled = b"".join(vocabulary.tokens[i] or b"" for i in ids).decode()
    decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert spelled.removeprefix(" ") == decoded.removeprefix(" ")
    assert "little girl" in spelled
    if name in ("tokenizers/gpt2", "models/stories260K"):
        assert spelled.removeprefix(" ") == TEXT
    assert vocabulary.numbers
    for token, number in list(vocabulary.numbers.items())[:400]:
        assert vocabulary.tokens[number] == token


@needs_assets
def test_the_llama2_file_and_the_converted_tokenizer_are_the_same_bytes():
    """tok512.bin holds the pieces of stories260K as plain bytes, written by llama2.c's exporter."""
    raw = (of("tokenizers/llama2c_tok512") / "tok512.bin").read_bytes()
    vocabulary, at, pieces = Vocabulary.read(of("models/stories260K")), 4, []
    while at < len(raw):
        _, length = struct.unpack_from("<fi", raw, at)
        pieces.append(raw[at + 8 : at + 8 + length])
        at += 8 + length
    assert len(pieces) == len(vocabulary)
    for number, piece in enumerate(pieces):
        if number in vocabulary.special:
            continue
        # the exporter leaves byte fallbacks as they are written
        assert bytes_of(piece.decode(), "spaces") == vocabulary.tokens[number]


@needs_assets
def test_sentencepiece_model_pieces_decode():
    """tok8192.model: every piece, read from the protobuf by hand, against sentencepiece's rule."""
    raw = (of("tokenizers/tinystories_8192_sp") / "tok8192.model").read_bytes()
    pieces = list(_pieces(raw))
    assert len(pieces) == 8192
    normal = [text for text, kind in pieces if kind == 1]
    fallback = [text for text, kind in pieces if kind == 6]
    assert [bytes_of(text, "spaces") for text in fallback] == [bytes([i]) for i in range(256)]
    for text in normal:
        assert bytes_of(text, "spaces").decode() == text.replace("\u2581", " ")


def _pieces(raw: bytes):
    """(text, type) of the model's pieces: field 1, with piece in 1, score in 2 and type in 3."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        if key & 7 != 2:
            return
        length, at = _varint(raw, at)
        if key >> 3 == 1:
            body, text, kind, inner = raw[at : at + length], "", 1, 0
            while inner < length:
                tag, inner = _varint(body, inner)
                if tag == 0x0A:
                    size, inner = _varint(body, inner)
                    text, inner = body[inner : inner + size].decode(), inner + size
                elif tag == 0x15:
                    inner += 4
                else:
                    kind, inner = _varint(body, inner)
            yield text, kind
        at += length


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


@needs_assets
def test_real_vocabularies_share_more_bytes_than_texts():
    """SentencePiece, byte-level BPE and WordPiece, pair by pair."""

    def both(a, b):
        one, other = Vocabulary.read(of(a)), Vocabulary.read(of(b))
        written = [{*load_tokenizer(of(name)).get_vocab()} for name in (a, b)]
        return len({*one.numbers} & {*other.numbers}), len(written[0] & written[1])

    bytes_, texts = both("models/stories260K", "tokenizers/tinystories_4096_bpe")
    assert bytes_ > 1.5 * texts
    for pair in (
        ("models/TinyStories-656K", "tokenizers/gpt2"),
        ("tokenizers/gpt2", "models/all-MiniLM-L6-v2"),
    ):
        bytes_, texts = both(*pair)
        assert bytes_ > texts
    assert both("models/TinyStories-656K", "models/stories260K")[0] > 100


def test_alphabets(tmp_path):
    vocabularies.byte_level(tmp_path / "a", vocabularies.OLD, bos_token="<s>", eos_token="</s>")
    vocabularies.sentence_piece(
        tmp_path / "b", ["▁the", "é"], bos_token="<begin>", eos_token="<end>"
    )
    a, b = Vocabulary.read(tmp_path / "a"), Vocabulary.read(tmp_path / "b")
    assert (a.form, b.form) == ("bytes", "spaces")
    assert a.tokens[a.numbers[b" the"]] == b.tokens[b.numbers[b" the"]] == b" the"
    assert a.roles == {"bos": 0, "eos": 1}
    assert b.roles == {"bos": 1, "eos": 2, "unk": 0}
    assert {a.tokens[i] for i in a.special} == {None}
    # é is one token in b and two bytes in a; alone, each half is a fallback of b
    assert [a.tokens[i] for i in a.pieces("é".encode())] == [b"\xc3", b"\xa9"]
    assert b.pieces("é".encode()) == [b.numbers["é".encode()]]
    assert b.pieces(b"\xc3") == [b.fallbacks[b"\xc3"]]
    assert b.find(b"t") == b.fallbacks[b"t"]


def test_wordpiece_words_begin_with_a_space():
    assert bytes_of("##ing", "words") == b"ing"
    assert bytes_of("play", "words") == b" play"
    assert bytes_of("##", "words") == b" ##"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no tokenizer"):
        tokenizer_digest(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no tokenizer that loads|does not load"):
        load_tokenizer(tmp_path)
