"""One way to ask: conversations in, replies out in the same order, whoever answers.

`BaseChat` answers with a loaded model, `endpoint.EndpointChat` with a server; `Kept` puts a file
between a chat and its caller, so that an interrupted evaluation asks nothing twice. A call that
fails is a `Reply` that says why: it is for the caller to count, and never an empty text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import BeforeValidator

from deltaloom.core.base import Base
from deltaloom.core.encoding import encode_prompt
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Example
from deltaloom.core.spec import digest
from deltaloom.engine.endpoint import Endpoint, endpoint_of

if TYPE_CHECKING:
    from deltaloom.core.run import Run

Message = dict[str, Any]
"""`role` and `content`; endpoints also take content that is a list of parts, with images."""
Conversation = Sequence[Message]
OnReply = Callable[[int, "Reply"], None]


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one conversation."""

    text: str | None
    """None where the call failed."""
    failure: str | None = None
    """Why there is no text, in a sentence."""
    tokens_in: int = 0
    tokens_out: int = 0
    logprobs: tuple[dict[str, float], ...] = ()
    """For each of the first tokens, the likeliest ones and their log-probabilities in nats; empty
    unless asked for and offered."""
    cut: bool = False
    """Whether the conversation was too long and lost tokens on its left."""
    finished: bool = True
    """Whether it ended by itself: False when `max_new_tokens` ran out."""


class Chat(Protocol):
    """Whoever answers conversations."""

    name: str
    """Names who answers, in files and tables."""

    def replies(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        top_logprobs: int = 0,
        on_reply: OnReply | None = None,
    ) -> list[Reply]:
        """One reply for each conversation, in order.

        A conversation given twice may get one reply twice: ask for another `seed` to get another.
        `on_reply` is called with a conversation's number and its reply as soon as it is there,
        never twice at a time. Raises InputError where no call can succeed (a wrong address or key).
        """
        ...

    def spend(self, run: Run, replies: Sequence[Reply]) -> dict[str, float]:
        """Enter what replies cost in the run's ledger; gives it back, ready for an Estimate."""
        ...


class BaseChat:
    """A loaded causal language model, asked through its chat template.

    Where the tokenizer has no template, it continues the messages' texts with an empty line between
    each two. `max_new_tokens` is cut to half of the model's context. A draw at a temperature
    depends on `seed` and the conversation only. Only texts can be asked about.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name

    def prompt(self, conversation: Conversation) -> list[int]:
        """The tokens that the answer begins after, at least one."""
        from deltaloom.engine.forward import start_token

        if self.tokenizer.chat_template:
            turns = tuple({k: str(v) for k, v in turn.items()} for turn in conversation)
            example = Example("", "", f"{self.name}: the conversation", messages=turns)
        else:
            text = "\n\n".join(str(turn["content"]) for turn in conversation)
            example = Example("", "", f"{self.name}: the conversation", prompt=text)
        ids = encode_prompt(example, self.tokenizer)
        start = start_token(self.tokenizer)
        if not ids and start is None:
            raise InputError(
                f"{self.name}: the conversation is empty, and there is no BOS or EOS token to "
                "begin from"
            )
        return ids or [int(start or 0)]

    def replies(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        top_logprobs: int = 0,
        on_reply: OnReply | None = None,
    ) -> list[Reply]:
        """As `Chat.replies`; `top_logprobs` gives those of the first token."""
        from deltaloom.engine.forward import context_length
        from deltaloom.engine.generate import Generated, generate

        prompts = [self.prompt(one) for one in conversations]
        first = self._first(prompts, top_logprobs) if top_logprobs else [()] * len(prompts)
        found: list[Any] = [None] * len(prompts)

        def arrived(chosen: list[int], answers: list[Generated]) -> None:
            for i, one in zip(chosen, answers, strict=True):
                found[i] = Reply(
                    one.text,
                    tokens_in=one.prompt_tokens,
                    tokens_out=one.new_tokens,
                    logprobs=first[i],
                    cut=one.cut,
                    finished=one.finished,
                )
                if on_reply is not None:
                    on_reply(i, found[i])

        generate(
            self.model,
            self.tokenizer,
            prompts,
            min(max_new_tokens, context_length(self.model) // 2),
            temperature=temperature,
            seed=seed,
            on_batch=arrived,
        )
        return found

    def spend(self, run: Run, replies: Sequence[Reply]) -> dict[str, float]:
        """Forward tokens and FLOPs."""
        from deltaloom.engine.meter import count_forward

        # The last token generated is never read.
        tokens = sum(one.tokens_in + max(one.tokens_out - 1, 0) for one in replies)
        return count_forward(run, self.model, tokens)

    def _first(self, prompts: list[list[int]], count: int) -> list[tuple[dict[str, float], ...]]:
        """The likeliest first tokens of each answer."""
        import torch

        from deltaloom.engine.forward import context_length, device_of

        device, found = device_of(self.model), []
        for prompt in prompts:
            ids = torch.tensor([prompt[-context_length(self.model) :]], device=device)  # (1, T)
            with torch.inference_mode():
                logits = self.model(input_ids=ids).logits[0, -1].float()  # (V,)
            top = logits.log_softmax(0).topk(min(count, len(logits)))
            names = [self.tokenizer.decode([i]) for i in top.indices.tolist()]
            found.append((dict(zip(names, top.values.tolist(), strict=True)),))
        return found


class Kept:
    """A chat whose replies are kept in an append-only JSONL file and never asked for twice.

    A line's key is a hash of who answers, the messages and every parameter. Each reply is on the
    disk before the next one is waited for. A failed call that cost nothing is not kept: the next
    attempt makes it again. `spend` enters each call once, those too that an interrupted attempt,
    whose ledger was lost, has paid for.
    """

    def __init__(self, chat: Chat, path: Path) -> None:
        self.chat, self.path, self.name = chat, path, chat.name
        self.known: dict[str, Reply] = {}
        self.used: dict[str, Reply] = {}
        self.entered: set[str] = set()
        for row in _whole_lines(path):
            key, row["logprobs"] = row.pop("key"), tuple(row["logprobs"])
            self.known[key] = Reply(**row)

    def replies(
        self,
        conversations: Sequence[Conversation],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        top_logprobs: int = 0,
        on_reply: OnReply | None = None,
    ) -> list[Reply]:
        """As `Chat.replies`; asks only what the file does not hold."""
        asked = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "top_logprobs": top_logprobs,
        }
        keys = [digest([self.name, list(one), asked]) for one in conversations]
        places: dict[str, list[int]] = {}
        for i, key in enumerate(keys):
            places.setdefault(key, []).append(i)
        found: list[Any] = [None] * len(keys)

        def arrived(key: str, reply: Reply) -> None:
            self.used[key] = reply
            for i in places[key]:
                found[i] = reply
                if on_reply is not None:
                    on_reply(i, reply)

        for key in places.keys() & self.known.keys():
            arrived(key, self.known[key])
        new = [key for key in places if key not in self.known]
        if new:
            with self._writing() as write:

                def fresh(number: int, reply: Reply) -> None:
                    write(new[number], reply)
                    arrived(new[number], reply)

                firsts = [conversations[places[key][0]] for key in new]
                self.chat.replies(firsts, on_reply=fresh, **asked)
        return found

    def spend(self, run: Run, replies: Sequence[Reply] = ()) -> dict[str, float]:
        """Enter what was used since the last call of this, whatever `replies` are."""
        new = [key for key in self.used if key not in self.entered]
        self.entered.update(new)
        return self.chat.spend(run, [self.used[key] for key in new])

    @contextmanager
    def _writing(self) -> Iterator[Callable[[str, Reply], None]]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":  # an interruption cut the last line short
                    file.write(b"\n")

            def write(key: str, reply: Reply) -> None:
                if reply.text is None and not reply.tokens_in:
                    return
                self.known[key] = reply
                row = {"key": key, **asdict(reply)}
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                file.flush()

            yield write


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:  # cut short by an interruption, or empty
            continue
        if isinstance(row, dict) and "key" in row:
            yield row


def _named(value: Any) -> Any:
    if isinstance(value, str):
        return endpoint_of(value) or Base(model=value)
    if isinstance(value, dict):  # one of the two, so that a wrong key is named and not both kinds
        return (Endpoint if "url" in value else Base).model_validate(value)
    return value


Speaker = Annotated[
    Endpoint | Base, BeforeValidator(_named, json_schema_input_type=str | Endpoint | Base)
]
"""Who answers, in settings: `http://host/v1#model` or a mapping with `url`, `model` and an
endpoint's other settings; or a Base: a hub id, a folder, or a mapping."""


def open_chat(speaker: Endpoint | Base | str, keep: Path | None = None) -> Chat:
    """Whoever `speaker` names, ready to answer; with `keep` its replies are kept in that file.

    Raises InputError for a base that does not load and an endpoint whose key is not set.
    """
    from deltaloom.engine.endpoint import EndpointChat

    if isinstance(speaker, str):
        speaker = endpoint_of(speaker) or Base(model=speaker)
    chat: Chat
    if isinstance(speaker, Endpoint):
        chat = EndpointChat(speaker)
    else:
        speaker.check()
        name = f"{speaker.model}@{speaker.fingerprint()}"
        chat = BaseChat(speaker.load(), speaker.tokenizer(), name)
    return chat if keep is None else Kept(chat, keep)


__all__ = ["BaseChat", "Chat", "Conversation", "Kept", "Message", "Reply", "Speaker", "open_chat"]
