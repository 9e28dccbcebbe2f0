"""OpenAI's requests and answers: what is taken, what is refused by name, how it is said."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from deltaloom.core.spec import Spec, sentence
from deltaloom.serve._continuation import Finish
from deltaloom.serve._sampling import Sampling
from deltaloom.serve.router import question

IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "parallel_tool_calls",
)  # fmt: skip
"""Change nothing of an answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "functions": (None, []),
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "reasoning_effort": (None,),
}
"""Not done here: taken only with a value that asks for nothing."""
CHOICES = 64
"""Most continuations that one request may ask for. Ours; OpenAI allows n up to 128."""

STOPS = 16
"""Most stop texts of a request. Ours; OpenAI allows 4."""


class Refusal(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.body = {"error": error}


class StreamOptions(Spec):
    """What a stream tells beside the text."""

    include_usage: bool = False
    """A last chunk with the tokens used."""
    include_obfuscation: bool = False
    """Ignored."""


def _listed(value: Any) -> Any:
    return () if value is None else (value,) if isinstance(value, str) else value


class Request(Spec):
    """What both kinds of request have."""

    model: str
    """A name from /v1/models."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens to generate."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 is greedy; 1 where it is not given."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Nucleus; 1 where it is not given."""
    n: Annotated[int, Field(ge=1, le=CHOICES)] | None = None
    """Answers for one prompt."""
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        Field(max_length=STOPS),
        BeforeValidator(_listed),
    ] = ()
    """Texts that end an answer and are no part of it."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Makes draws repeatable."""
    stream: bool | None = None
    """Server-sent events."""
    stream_options: StreamOptions | None = None
    """For streams."""

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(
            1.0 if self.temperature is None else self.temperature,
            1.0 if self.top_p is None else self.top_p,
        )

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the tokens used."""
        return self.stream_options is not None and self.stream_options.include_usage


class Completion(Request):
    """`/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    """A text, token ids, or a list of either."""


def _text(value: Any) -> Any:
    """A message's content where it is a list of parts."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError("only parts of type 'text' are read")
        if not isinstance(part.get("text"), str):
            raise ValueError("a part of type 'text' has a 'text'")
    return "".join(part["text"] for part in value)


class Message(Spec):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """Who speaks."""
    content: Annotated[str, BeforeValidator(_text)]
    """What is said."""
    name: str | None = None
    """Ignored."""
    refusal: None = None
    """Ignored: part of answers sent back."""


class Chat(Request):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    """The conversation."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name of `max_tokens`."""

    @property
    def turns(self) -> list[dict[str, str]]:
        """The conversation as chat templates read it."""
        return [{"role": one.role, "content": one.content} for one in self.messages]


def read_request(body: bytes, kind: type[Request]) -> Any:
    """A request's body; raises Refusal naming what is wrong with it."""
    try:
        # json's own constants (NaN, Infinity) are none of JSON's.
        values = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise Refusal(400, "the body must be a JSON object")
    try:
        # Only an escape can bring one in, and nothing that reads or writes texts takes it.
        if b"\\ud" in body.lower():
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Refusal(400, "the body holds half a surrogate pair: no Unicode text") from None
    for key, neutral in NEUTRAL.items():
        if key in values and not _among(values.pop(key), neutral):
            raise Refusal(
                400, f"{key} is not supported by this server; leave it out", param=key,
                code="unsupported_parameter",
            )  # fmt: skip
    for key in IGNORED:
        values.pop(key, None)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise Refusal(400, sentence(error, "request", kind), param=where or None) from None


def asked_text(request: Chat | Completion) -> str:
    """What the router looks at; raises Refusal where there is no one text."""
    if isinstance(request, Chat):
        return question(request.turns)
    prompt = request.prompt
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise Refusal(400, "'auto' routes one text; name a model for token ids", param="model")
    return prompt


def _among(value: Any, known: Sequence[Any]) -> bool:
    """Whether it is one of those; 0 is not false: `logprobs: 0` asks for the chosen tokens'."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in known)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


class Answer:
    """The shapes of one request's answers."""

    def __init__(self, chat: bool, model: str) -> None:
        self.chat, self.model = chat, model
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def whole(self, texts: Sequence[str], ends: Sequence[Finish], usage: dict[str, int]) -> Any:
        """The answer when nothing is streamed."""
        choices = [
            {
                "index": i,
                **(
                    {"message": {"role": "assistant", "content": text, "refusal": None}}
                    if self.chat
                    else {"text": text}
                ),
                "logprobs": None,
                "finish_reason": end,
            }
            for i, (text, end) in enumerate(zip(texts, ends, strict=True))
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage}

    def chunk(self, index: int, text: str | None, end: Finish | None, first: bool = False) -> Any:
        """One event of a stream."""
        choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": end}
        if self.chat:
            delta = {"role": "assistant"} if first else {}
            choice["delta"] = delta if text is None else {**delta, "content": text}
        else:
            choice["text"] = text or ""
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def last(self, usage: dict[str, int]) -> Any:
        """The event with the tokens used."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}

    def _head(self, chat_object: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": chat_object if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
        }


def usage_of(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    """OpenAI's account of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }
