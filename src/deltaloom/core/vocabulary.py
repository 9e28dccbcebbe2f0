"""Vocabularies as bytes: what every token of a tokenizer stands for, and what its special ones do.

Tokenizers write the same text in different alphabets: `Ġthe` (byte-level BPE), `▁the`
(SentencePiece), `the` and `##s` (WordPiece), `<0x0A>` (byte fallback). Compared as they are written
they share few tokens, compared as bytes many. Special tokens have no bytes; they are known by their
role (beginning, end, padding, ...) or, without one, by their text.

Word tokenizers drop the spaces: their tokens that begin a word get one here, as words have it in
the middle of a text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from deltaloom.core.base import TOKENIZER_FILES
from deltaloom.core.errors import InputError

ROLES = ("bos", "eos", "cls", "sep", "pad", "unk", "mask")
SPACE = "▁"
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
PATTERNS = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
"""What is fetched from the hub of a model whose tokenizer alone is wanted."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens by number."""

    tokens: tuple[bytes | None, ...]
    """What each stands for; None for special tokens and for numbers without a token."""
    special: Mapping[int, str]
    """Text by number of the special tokens."""
    roles: Mapping[str, int]
    """Number by role, for the roles there are."""
    fallback: frozenset[int] = frozenset()
    """Tokens of one byte that stand in where no other token fits (`<0x0A>`)."""
    form: str = "plain"
    """How tokens are written: bytes, spaces, words or plain."""
    model: Any = None
    """`tokenizers`' own model, which cuts a text into tokens."""

    @classmethod
    def read(cls, folder: Path) -> Vocabulary:
        """The vocabulary of the tokenizer in a folder, as transformers loads it.

        Raises InputError for a tokenizer that does not load, or that the `tokenizers` library does
        not know.
        """
        return cls.of(load_tokenizer(folder), str(folder))

    @classmethod
    def of(cls, tokenizer: Any, where: str) -> Vocabulary:
        """The vocabulary of a loaded tokenizer; `where` names it in messages."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputError(
                f"{where}: {type(tokenizer).__name__} is written in Python and tells nothing of "
                "its tokens; save a fast version of it (tokenizer.json) there"
            )
        spec = json.loads(backend.to_str())
        form, suffix = form_of(spec), spec["model"].get("end_of_word_suffix") or ""
        numbers = backend.get_vocab(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        roles = {
            role: number
            for role in ROLES
            if (number := getattr(tokenizer, f"{role}_token_id")) is not None
        }
        own = {number for number, token in added.items() if token.special}
        own |= {*roles.values(), *(numbers.get(one, -1) for one in tokenizer.all_special_tokens)}
        own.discard(-1)
        texts = {number: token for token, number in numbers.items()}
        tokens: list[bytes | None] = [None] * (max(texts, default=-1) + 1)
        fallback = set()
        for number, text in texts.items():
            if number in own:
                continue
            if number in added:
                tokens[number] = text.encode()
                continue
            tokens[number] = bytes_of(text, form, suffix)
            if form != "bytes" and BYTE.fullmatch(text):
                fallback.add(number)
        special = {number: texts[number] for number in own}
        return cls(tuple(tokens), special, roles, frozenset(fallback), form, backend.model)

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def numbers(self) -> dict[bytes, int]:
        """Number by bytes; a token of its own goes before a fallback, the first before others."""
        found: dict[bytes, int] = {}
        for number, token in sorted(self._bytes(), key=lambda one: (one[0] in self.fallback, one)):
            found.setdefault(token, number)
        return found

    @cached_property
    def fallbacks(self) -> dict[bytes, int]:
        """Number by byte of the fallback tokens."""
        return {token: number for number, token in self._bytes() if number in self.fallback}

    def find(self, token: bytes, *, fallback: bool = False) -> int | None:
        """The number of a token; `fallback` prefers one of the byte fallbacks."""
        first, second = self.numbers, self.fallbacks
        if fallback:
            first, second = second, first
        return first.get(token, second.get(token))

    def named(self, text: str) -> int | None:
        """The number of the special token of this text."""
        return self._named.get(text)

    def pieces(self, token: bytes) -> list[int]:
        """The tokens that this tokenizer's own model cuts some bytes into, without its special
        ones; empty where it knows none of them.
        """
        found = self._cut(token)
        return [number for number in found if self.tokens[number] is not None]

    def _cut(self, token: bytes) -> list[int]:
        if self.form == "bytes":
            return self._by_model("".join(ALPHABET[byte] for byte in token))
        if self.form == "spaces":
            try:
                return self._by_model(token.decode().replace(" ", SPACE))
            except UnicodeDecodeError:
                pass
        return list(self._longest(token))

    def _by_model(self, text: str) -> list[int]:
        return [piece.id for piece in self.model.tokenize(text)] if text else []

    def _longest(self, token: bytes) -> Iterator[int]:
        """The longest token that fits, and again behind it: WordPiece's rule."""
        start = 0
        while start < len(token):
            for stop in range(min(len(token), start + self._width), start, -1):
                number = self.numbers.get(token[start:stop])
                if number is not None:
                    yield number
                    start = stop
                    break
            else:
                start += 1

    def _bytes(self) -> Iterator[tuple[int, bytes]]:
        return ((number, token) for number, token in enumerate(self.tokens) if token)

    @cached_property
    def _named(self) -> dict[str, int]:
        return {text: number for number, text in sorted(self.special.items(), reverse=True)}

    @cached_property
    def _width(self) -> int:
        return max(map(len, self.numbers), default=1)


def form_of(spec: Mapping[str, Any]) -> str:
    """How a `tokenizer.json` writes its tokens: bytes, spaces, words or plain."""
    parts = {one["type"] for key in ("pre_tokenizer", "decoder") for one in _parts(spec.get(key))}
    if "ByteLevel" in parts:
        return "bytes"
    if spec["model"]["type"] in ("WordPiece", "WordLevel"):
        return "words"
    vocab = spec["model"].get("vocab") or ()
    written = ((one if isinstance(one, str) else one[0]) for one in vocab)
    return "spaces" if "Metaspace" in parts or any(SPACE in one for one in written) else "plain"


def bytes_of(text: str, form: str, suffix: str = "") -> bytes:
    """What a token written as `text` stands for."""
    if form == "bytes" and all(sign in CODES for sign in text):
        return bytes(CODES[sign] for sign in text)
    byte = BYTE.fullmatch(text)
    if byte and form != "bytes":
        return bytes([int(byte[1], 16)])
    if form == "spaces":
        return text.replace(SPACE, " ").encode()
    if form == "words":
        return text[2:].encode() if text.startswith("##") and len(text) > 2 else f" {text}".encode()
    if suffix and text.endswith(suffix):
        return f"{text.removesuffix(suffix)} ".encode()
    return text.encode()


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder, as it is; `vocab.json` and `merges.txt` alone are byte-level BPE.

    Raises InputError when it does not load.
    """
    from transformers import AutoTokenizer, GPT2Tokenizer

    bare = [folder / "vocab.json", folder / "merges.txt"]
    if all(file.is_file() for file in bare) and not any(folder.glob("*config.json")):
        return GPT2Tokenizer(vocab=str(bare[0]), merges=str(bare[1]))
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{folder}: holds no tokenizer that loads ({first.rstrip(' :')}); load it with "
            "transformers and save it there as tokenizer.json"
        ) from None


def tokenizer_folder(name: str) -> Path:
    """Local folder of a tokenizer, fetched from the hub without weights when it is no folder.

    Raises InputError when there is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"{name}: no such folder; check the path of the tokenizer")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS))
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{name}: neither a local folder nor a reachable hub model ({first})"
        ) from None


def tokenizer_digest(folder: Path) -> str:
    """Sixteen hex digits that change when any file of the folder's tokenizer does.

    Raises InputError when the folder has none.
    """
    found = {file for name in TOKENIZER_FILES for file in folder.glob(name)}
    found |= {*folder.glob("merges.txt"), *folder.glob("chat_template*")}
    if not found:
        raise InputError(
            f"{folder} has no tokenizer (no tokenizer.json in it); save the tokenizer there"
        )
    state = hashlib.sha256()
    for file in sorted(found):
        state.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return state.hexdigest()[:16]


def _parts(part: Any) -> Iterator[Mapping[str, Any]]:
    """A component of a `tokenizer.json` and all inside it."""
    if not part:
        return
    yield part
    for key in ("pretokenizers", "decoders"):
        for one in part.get(key, ()):
            yield from _parts(one)


def _alphabet() -> Sequence[str]:
    """GPT-2's printable sign for every byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    signs = [""] * 256
    for byte in shown:
        signs[byte] = chr(byte)
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    for place, byte in enumerate(hidden):
        signs[byte] = chr(256 + place)
    return signs


ALPHABET = _alphabet()
CODES = {sign: byte for byte, sign in enumerate(ALPHABET)}
