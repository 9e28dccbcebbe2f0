"""One request on its way through: tokens, continuations, and the answer whole or in pieces."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from jinja2 import TemplateError
from starlette.requests import Request as Call
from starlette.responses import JSONResponse, Response, StreamingResponse

from deltaloom.core.encoding import encode_prompt
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Example
from deltaloom.engine.forward import start_token
from deltaloom.serve._continuation import Continuation, Piece
from deltaloom.serve._protocol import (
    CHOICES,
    Answer,
    Chat,
    Completion,
    Refusal,
    usage_of,
)
from deltaloom.serve._service import Service, Task
from deltaloom.serve._worker import Overloaded

MAX_TOKENS = 16
"""Of `/v1/completions` where the request says nothing: OpenAI's default."""
LONG_TEXT = 20_000
"""Characters from which a text is tokenised beside the event loop. Ours."""
RETRY = 1
"""Seconds after which to ask again when the queue is full. Ours."""


class Mail:
    """Takes news from the worker's thread to the event loop, a batch a step."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._news: list[tuple[Callable[[Any], None], Any]] = []

    def post(self, take: Callable[[Any], None], news: Any) -> None:
        """Keep news for the next `deliver`; on the worker's thread."""
        self._news.append((take, news))

    def deliver(self) -> None:
        """Send off what was kept; on the worker's thread."""
        if self._news and self.loop is not None and not self.loop.is_closed():
            news, self._news = self._news, []
            with contextlib.suppress(RuntimeError):  # closed in this moment: nobody waits any more
                self.loop.call_soon_threadsafe(_hand_out, news)


def _hand_out(news: list[tuple[Callable[[Any], None], Any]]) -> None:
    for take, one in news:
        take(one)


class Generation:
    """The continuations of one request."""

    def __init__(
        self, service: Service, mail: Mail, request: Chat | Completion, task: Task
    ) -> None:
        self.service, self.mail, self.request, self.task = service, mail, request, task
        self.answer = Answer(isinstance(request, Chat), task.name)
        self.news: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self.continuations: list[Continuation] = []
        self.prompt_tokens = 0

    async def respond(self, call: Call) -> Response:
        """Submit, and answer; a client that goes away takes its continuations with it."""
        prompts = await self._prompts()
        self.continuations = self._continuations(prompts)
        self.prompt_tokens = sum(map(len, prompts))
        try:
            self.service.worker.submit(self.task.lane, self.continuations)
        except Overloaded:
            raise Refusal(
                429, f"{self.service.settings.queue} requests are waiting already; ask again later",
                kind="rate_limit_error", code="overloaded", retry_after=RETRY,
            ) from None  # fmt: skip
        if self.request.stream:
            return StreamingResponse(
                self._events(),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )
        try:
            return await self._whole(call)
        finally:
            self._cancel()

    async def _whole(self, call: Call) -> Response:
        gone = asyncio.ensure_future(_disconnected(call))
        collected = asyncio.ensure_future(self._collect())
        try:
            await asyncio.wait((gone, collected), return_when=asyncio.FIRST_COMPLETED)
            if not collected.done():
                return Response(status_code=499)
            pieces = collected.result()
        finally:
            gone.cancel()
            collected.cancel()
        failed = next((one.error for one in pieces if one.error), None)
        if failed is not None:
            raise Refusal(500, failed, kind="server_error")
        body = self.answer.whole(
            [one.text for one in pieces], [one.finish or "stop" for one in pieces], self._usage()
        )
        return JSONResponse(body)

    async def _collect(self) -> list[Piece]:
        done: dict[int, Piece] = {}
        while len(done) < len(self.continuations):
            index, piece = await self.news.get()
            done[index] = piece
        return [done[i] for i in range(len(self.continuations))]

    async def _events(self) -> AsyncIterator[bytes]:
        """Server-sent events. When the client goes, this is closed and cancels."""
        begun = time.monotonic()
        left = len(self.continuations)
        try:
            for index in range(left) if self.answer.chat else ():
                yield _event(self.answer.chunk(index, "", None, first=True))
            while left:
                index, piece = await self.news.get()
                if piece.error is not None:
                    refusal = Refusal(500, piece.error, kind="server_error")
                    yield _event(refusal.body)
                    return
                if piece.text:
                    yield _event(self.answer.chunk(index, piece.text, None))
                if piece.finish is not None:
                    left -= 1
                    yield _event(self.answer.chunk(index, None, piece.finish))
            if self.request.with_usage:
                yield _event(self.answer.last(self._usage()))
            yield b"data: [DONE]\n\n"
        finally:
            self._cancel()
            seconds = time.monotonic() - begun
            path = "/v1/chat/completions" if self.answer.chat else "/v1/completions"
            self.service.metrics.see("deltaloom_request_seconds", seconds, path=path)

    def _cancel(self) -> None:
        rest = [one for one in self.continuations if not one.finished]
        if rest:
            self.service.worker.cancel(rest)

    def _usage(self) -> dict[str, int]:
        return usage_of(self.prompt_tokens, sum(len(one.tokens) for one in self.continuations))

    def _continuations(self, prompts: list[list[int]]) -> list[Continuation]:
        request, task = self.request, self.task
        n = request.n or 1
        if len(prompts) * n > CHOICES:
            raise Refusal(400, f"{len(prompts)} prompts times n = {n} are more than {CHOICES}")
        made = []
        for index in range(len(prompts) * n):
            prompt = prompts[index // n]
            made.append(
                Continuation(
                    task=task.name,
                    adapter=task.adapter,
                    prompt=prompt,
                    max_tokens=self._room(len(prompt)),
                    sampling=request.sampling,
                    tell=lambda piece, index=index: self.mail.post(
                        self.news.put_nowait, (index, piece)
                    ),
                    stop=request.stop,
                    # n answers of one seed must not be one answer.
                    seed=None if request.seed is None else request.seed + index % n,
                    stream=bool(request.stream),
                    prefix=task.prefix,
                )
            )
        return made

    def _room(self, prompt: int) -> int:
        """Tokens to generate at most; raises Refusal where the context has no room for them."""
        request, settings = self.request, self.service.settings
        before = len(self.task.prefix[0][0]) if self.task.prefix else 0
        room = min(self.task.context - before, settings.cache_tokens - before)
        asked = request.max_tokens
        if isinstance(request, Chat):
            asked = request.max_completion_tokens or asked
        elif asked is None:
            asked = min(MAX_TOKENS, settings.max_tokens or MAX_TOKENS)
        if settings.max_tokens is not None and (asked or 0) > settings.max_tokens:
            raise Refusal(
                400, f"max_tokens = {asked}: at most {settings.max_tokens}", param="max_tokens"
            )
        wanted = 1 if asked is None else asked
        if prompt + wanted > room:
            raise Refusal(
                400,
                f"this model takes {room} tokens, and {prompt} of the prompt with {wanted} to "
                "generate are more; shorten the prompt or ask for fewer",
                code="context_length_exceeded",
                param="messages" if isinstance(request, Chat) else "prompt",
            )
        return min(room - prompt, settings.max_tokens or room) if asked is None else asked

    async def _prompts(self) -> list[list[int]]:
        """Token ids of each prompt; raises Refusal for what cannot be encoded."""
        request = self.request
        if isinstance(request, Chat):
            texts = sum(len(turn["content"]) for turn in request.turns)
        else:
            given = [request.prompt] if isinstance(request.prompt, str) else request.prompt
            texts = sum(len(one) for one in given if isinstance(one, str))
        try:
            if texts > LONG_TEXT:
                return await asyncio.to_thread(self.task.reader, self._encode)
            return self.task.reader(self._encode)
        except (InputError, TemplateError) as error:
            raise Refusal(400, str(error)) from None

    def _encode(self, tokenizer: Any) -> list[list[int]]:
        request = self.request
        if isinstance(request, Chat):
            return [_conversation(request.turns, tokenizer)]
        given = request.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not given:
            raise Refusal(400, "prompt is an empty list", param="prompt")
        size = self.task.lane.ragged.config.vocab_size
        prompts = []
        for one in given:
            if isinstance(one, str):
                ids = encode_prompt(Example("request", "", "request", prompt=one), tokenizer)
            else:
                ids = [int(token) for token in one]  # pyright: ignore
            if any(not 0 <= token < size for token in ids):
                raise Refusal(400, f"prompt: token ids go from 0 to {size - 1}", param="prompt")
            prompts.append(ids or _start(tokenizer))
        return prompts


def _conversation(turns: list[dict[str, str]], tokenizer: Any) -> list[int]:
    if not tokenizer.chat_template:
        raise Refusal(
            400, "this model's tokenizer has no chat template; use /v1/completions", param="model"
        )
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) or _start(tokenizer)


def _start(tokenizer: Any) -> list[int]:
    token = start_token(tokenizer)
    if token is None:
        raise Refusal(400, "the prompt has no tokens", param="prompt")
    return [token]


async def _disconnected(call: Call) -> None:
    """Return when the client has gone."""
    while (await call.receive())["type"] != "http.disconnect":
        pass


def _event(body: Any) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
