"""A chat behind an OpenAI-compatible `/chat/completions` address, asked with patience.

Written over the standard library. Time-outs, broken connections, 408, 409, 425, 429, 5xx and
answers that are no whole JSON are asked again after `backoff * 2^attempt` seconds with jitter, or
when `Retry-After` says; after `attempts` of them the call is a failed Reply. A refusal or an empty
answer is asked again once, as it has been paid for, and a 400 (one conversation too long, say) not
at all; a wrong address or key would fail every call and raises InputError.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from deltaloom.core.errors import InputError
from deltaloom.core.spec import Spec

if TYPE_CHECKING:
    from deltaloom.core.run import Run
    from deltaloom.engine.chat import Conversation, OnReply, Reply

AGAIN = {408, 409, 425, 429}
"""Answers that another attempt may change, beside 5xx."""
HOPELESS = {301, 302, 303, 307, 308, 401, 402, 403, 404, 405}
"""Answers that every call would get."""
LONGEST_WAIT = 60.0
"""Seconds between two attempts at most, unless the server asks for more."""
LONGEST_ASKED = 600.0
"""Seconds that a server's `Retry-After` is obeyed for at most. Ours."""


class Endpoint(Spec):
    """An OpenAI-compatible server and the model it is asked for."""

    url: str
    """Address up to and with `/v1`."""
    model: str
    """The model's name there."""
    key: str = "OPENAI_API_KEY"
    """Environment variable that holds the key. Without it, none is sent."""
    timeout: Annotated[float, Field(gt=0)] = 120.0
    """Seconds to wait for an answer (ours; the openai client: 600)."""
    attempts: Annotated[int, Field(ge=1)] = 6
    """Times a call is made before it counts as failed (ours; the openai client: 3)."""
    backoff: Annotated[float, Field(ge=0)] = 1.0
    """Seconds before the second attempt; doubled for each next one (ours)."""
    requests_per_minute: Annotated[float | None, Field(gt=0)] = None
    """Calls begun a minute at most; None for no limit."""
    concurrency: Annotated[int, Field(ge=1)] = 4
    """Calls that may be waited for at once (ours)."""
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Name under which the server takes the most tokens to answer."""

    @field_validator("url")
    @classmethod
    def _web(cls, url: str) -> str:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an address like http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("must hold no key, query or fragment; keys come from the environment")
        return url.rstrip("/")


def endpoint_of(text: str) -> Endpoint | None:
    """`http://host/v1#model` as an Endpoint; None for what is no web address."""
    if not text.startswith(("http://", "https://")):
        return None
    url, _, model = text.partition("#")
    if not model:
        raise InputError(f"{text}: say which model to ask for, as in {url}#MODEL")
    return Endpoint.parse({"url": url, "model": model}, text)


class EndpointChat:
    """The model behind an endpoint; see `engine.chat.Chat` for what it does."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.name = f"{endpoint.url}#{endpoint.model}"
        handlers: list[Any] = [_NoRedirect()]
        if urllib.parse.urlsplit(endpoint.url).hostname in ("localhost", "127.0.0.1", "::1"):
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)
        self._pace = _Pace(endpoint.requests_per_minute)
        self._reached = False
        """Whether the server was ever there."""

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
        """As `Chat.replies`; `seed` is sent and it is for the server to heed it."""
        extra: dict[str, Any] = {"logprobs": True, "top_logprobs": top_logprobs}
        bodies = [
            {
                "model": self.endpoint.model,
                "messages": list(conversation),
                self.endpoint.limit: max_new_tokens,
                "temperature": temperature,
                "seed": seed,
                **(extra if top_logprobs else {}),
            }
            for conversation in conversations
        ]
        found: list[Any] = [None] * len(bodies)

        def arrived(i: int, reply: Reply) -> None:
            found[i] = reply
            if on_reply is not None:
                on_reply(i, reply)

        self.ask_all([partial(self.ask, body) for body in bodies], arrived)
        return found

    def ask_all(self, calls: Sequence[Callable[[], Reply]], on_reply: OnReply) -> None:
        """Make all calls, `concurrency` at a time; `on_reply` takes a call's number and reply.

        A call begins when an earlier one's reply has been taken and not only when it is there, so
        that an interruption loses no more than the replies to `concurrency` calls.
        """
        left = enumerate(calls)
        waited: dict[Future[Reply], int] = {}
        pool = ThreadPoolExecutor(self.endpoint.concurrency)
        try:
            while True:
                for i, call in islice(left, self.endpoint.concurrency - len(waited)):
                    waited[pool.submit(call)] = i
                if not waited:
                    break
                for future in wait(waited, return_when=FIRST_COMPLETED).done:
                    on_reply(waited.pop(future), future.result())
        finally:
            # After an interruption or a hopeless answer nothing more is asked.
            self._pace.stop()
            pool.shutdown(cancel_futures=True)
            self._pace.resume()

    def spend(self, run: Run, replies: Sequence[Reply]) -> dict[str, float]:
        """Calls, and tokens read and written by the server."""
        spent = {
            "endpoint_calls": float(len(replies)),
            "endpoint_tokens_in": float(sum(one.tokens_in for one in replies)),
            "endpoint_tokens_out": float(sum(one.tokens_out for one in replies)),
        }
        run.spend(**spent)
        return spent

    def ask(
        self,
        body: dict[str, Any],
        path: str = "/chat/completions",
        read: Callable[[bytes], Reply] | None = None,
    ) -> Reply:
        """One call with all its attempts; `read` makes a Reply of the answer's bytes.

        `read` raises Unreadable for an answer that another attempt may mend.
        """
        from deltaloom.engine.chat import Reply

        read = read or _reply
        reason, asked, refused = "", 0.0, None
        jitter = random.Random(json.dumps(body, sort_keys=True))
        for attempt in range(self.endpoint.attempts):
            if attempt:
                wait = min(self.endpoint.backoff * 2 ** (attempt - 1), LONGEST_WAIT)
                if not self._pace.sleep(max(asked, wait * (1 + jitter.random()) / 2)):
                    break
            if not self._pace.wait():
                break
            asked = 0.0
            try:
                reply = read(self._send(body, path))
                if reply.text is None and refused is None and attempt + 1 < self.endpoint.attempts:
                    refused = reply
                    continue
                return reply if refused is None else _paid_too(reply, refused)
            except urllib.error.HTTPError as error:
                said = _said(error)
                if error.code in HOPELESS:
                    self._pace.stop()  # before another thread begins the next call
                    raise InputError(self._hopeless(error.code, said)) from None
                self._reached = True
                reason = f"HTTP {error.code}: {said}"
                if error.code not in AGAIN and error.code < 500:
                    break
                asked = _retry_after(error)
            except Unreadable as error:
                reason = str(error)
            except (OSError, http.client.HTTPException) as error:
                timed_out = "timed out" in str(error)
                # Only what fails before there is a connection comes as a URLError.
                self._reached |= timed_out or not isinstance(error, urllib.error.URLError)
                cause = getattr(error, "reason", error)
                reason = (
                    f"no answer in {self.endpoint.timeout:g} s"
                    if timed_out
                    else f"no connection ({cause or type(error).__name__})"
                )
        if reason and not self._reached:
            self._pace.stop()
            raise InputError(f"{self.name}: {reason}; start the server, or check the address")
        failed = Reply(None, reason or "interrupted")
        return failed if refused is None else _paid_too(failed, refused)

    def _send(self, body: dict[str, Any], path: str) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        key = os.environ.get(self.endpoint.key)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.endpoint.url}{path}", json.dumps(body).encode(), headers
        )
        with self._opener.open(request, timeout=self.endpoint.timeout) as response:
            self._reached = True
            return response.read()

    def _hopeless(self, code: int, said: str) -> str:
        remedy = {401: "key", 402: "key", 403: "key"}.get(code, "address")
        if remedy == "key":
            remedy = f"set the key in the environment variable {self.endpoint.key}"
        else:
            remedy = "check the address (it ends in /v1) and the model's name"
        return f"{self.name}: the server answers HTTP {code} ({said}); {remedy}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the address that was given and nowhere else."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any):
        """No request follows."""


class Unreadable(Exception):
    """An answer that is not what the protocol says; the sentence is for the Reply."""


class _Pace:
    """Begins at most so many calls a minute, evenly spaced, over all threads."""

    def __init__(self, per_minute: float | None) -> None:
        self.gap = 60.0 / per_minute if per_minute else 0.0
        self.lock, self.next = threading.Lock(), 0.0
        self.stopped = threading.Event()

    def wait(self) -> bool:
        """Wait for this call's turn; False when no more calls are to be made."""
        with self.lock:
            now = time.monotonic()
            turn = max(now, self.next)
            self.next = turn + self.gap
        return self.sleep(turn - now)

    def sleep(self, seconds: float) -> bool:
        """Whether calls may go on after that long."""
        return not self.stopped.wait(max(seconds, 0.0))

    def stop(self) -> None:
        self.stopped.set()

    def resume(self) -> None:
        self.stopped.clear()


def _paid_too(reply: Reply, refused: Reply) -> Reply:
    """A reply with the tokens of the refusal before it."""
    tokens_in = reply.tokens_in + refused.tokens_in
    return replace(reply, tokens_in=tokens_in, tokens_out=reply.tokens_out + refused.tokens_out)


def _reply(answer: bytes) -> Reply:
    from deltaloom.engine.chat import Reply

    try:
        document = json.loads(answer)
    except ValueError:
        raise Unreadable(f"the answer is no whole JSON ({len(answer)} bytes)") from None
    try:
        choice = document["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
        usage = document.get("usage") or {}
        ended = choice.get("finish_reason")
        read = int(usage.get("prompt_tokens") or 0)
        written = int(usage.get("completion_tokens") or 0)
        logprobs = _logprobs(choice)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise Unreadable("the answer holds no choices with a message") from None
    if isinstance(text, list):
        text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
    if refusal or ended == "content_filter":
        return Reply(None, f"refused: {refusal or 'content filter'}", read, written)
    if not isinstance(text, str):
        return Reply(None, f"empty answer (finish_reason {ended!r})", read, written)
    return Reply(text, None, read, written, logprobs, finished=ended != "length")


def _logprobs(choice: dict[str, Any]) -> tuple[dict[str, float], ...]:
    listed = ((choice.get("logprobs") or {}).get("content")) or []
    return tuple(
        {str(one["token"]): float(one["logprob"]) for one in place.get("top_logprobs") or [place]}
        for place in listed
    )


def _said(error: urllib.error.HTTPError) -> str:
    """What the server says of an error, in one short line."""
    try:
        body = error.read(4096).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        body = ""
    try:
        found = json.loads(body)
        inner = found.get("error", found)
        body = str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    except (ValueError, AttributeError):
        pass
    return " ".join(body.split())[:200] or str(error.reason)


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds that the server asks to wait, as a number or a date; 0 where it says nothing."""
    given = error.headers.get("Retry-After") or ""
    try:
        seconds = float(given)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(given).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_ASKED)
