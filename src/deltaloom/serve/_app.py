"""The HTTP side: OpenAI's paths, errors in its form, keys, limits, health and metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Call
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from deltaloom.core.errors import InputError
from deltaloom.serve._generation import Generation, Mail
from deltaloom.serve._protocol import (
    Chat,
    Completion,
    Refusal,
    Request,
    asked_text,
    read_request,
)
from deltaloom.serve._service import Service, Task
from deltaloom.serve.settings import ADMIN_KEY, AUTO, KEY, admin_key, api_key

BODY_SECONDS = 30.0
"""How long a body may take to arrive. Ours."""
TOLD = "deltaloom_requests_total"
GONE = 499
"""Nginx' status for a client that did not wait."""


class Endpoints:
    """All paths of one service."""

    def __init__(self, service: Service, mail: Mail) -> None:
        self.service, self.mail = service, mail
        self.key, self.admin = api_key(), admin_key()
        self.limit = service.settings.body_bytes
        metrics = service.metrics
        metrics.counter(TOLD, "Answers, by path, model and status; 499: the client went away.")
        metrics.histogram("deltaloom_request_seconds", "Duration of a request, by path.")

    def app(self) -> Starlette:
        """The application."""
        routes = [
            self._route("POST", "/v1/chat/completions", self.chat),
            self._route("POST", "/v1/completions", self.complete),
            self._route("GET", "/v1/models", self.models),
            self._route("GET", "/v1/models/{name}", self.model),
            self._route("POST", "/v1/adapters", self.add, who="admin"),
            self._route("DELETE", "/v1/adapters/{name}", self.remove, who="admin"),
            self._route("GET", "/metrics", self.metrics),
            self._route("GET", "/health", self.health, who="all"),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _as_openai})

    async def chat(self, call: Call) -> Response:
        """`/v1/chat/completions`."""
        return await self._generate(call, Chat)

    async def complete(self, call: Call) -> Response:
        """`/v1/completions`."""
        return await self._generate(call, Completion)

    async def models(self, call: Call) -> Response:
        """`/v1/models`."""
        shown = [_shown(task) for task in self.service.tasks.values()]
        if self.service.router is not None:
            shown.append({"id": AUTO, "object": "model", "created": 0, "owned_by": "deltaloom"})
        return JSONResponse({"object": "list", "data": shown})

    async def model(self, call: Call) -> Response:
        """`/v1/models/NAME`."""
        return JSONResponse(_shown(self._task(call.path_params["name"])))

    async def add(self, call: Call) -> Response:
        """Load a task: `{"name": ..., "path": ...}`."""
        try:
            wanted = json.loads(await self._body(call))
            name, path = wanted["name"], wanted["path"]
        except (ValueError, KeyError, TypeError):
            name = path = None
        if not isinstance(name, str) or not isinstance(path, str):
            raise Refusal(400, "the body must be a JSON object with the texts 'name' and 'path'")
        if name in self.service.tasks:
            raise Refusal(409, f"{name!r} is taken; remove it first", param="name")
        task = await asyncio.to_thread(self.service.add, name, path)
        return JSONResponse(_shown(task), status_code=201)

    async def remove(self, call: Call) -> Response:
        """Forget a task."""
        task = self._task(call.path_params["name"])
        await asyncio.to_thread(self.service.remove, task.name)
        return JSONResponse({"id": task.name, "object": "model", "deleted": True})

    async def metrics(self, call: Call) -> Response:
        """Prometheus' text."""
        return PlainTextResponse(
            self.service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def health(self, call: Call) -> Response:
        """200 while the worker lives."""
        if not self.service.worker.alive:
            return JSONResponse({"status": "the worker has died"}, status_code=503)
        return JSONResponse({"status": "ok"})

    async def _generate(self, call: Call, kind: type[Request]) -> Response:
        request = read_request(await self._body(call), kind)
        name = request.model
        if name == AUTO and self.service.router is not None:
            name = await self.service.route(asked_text(request))
        task = self._task(name)
        call.state.model = task.name
        return await Generation(self.service, self.mail, request, task).respond(call)

    def _task(self, name: str) -> Task:
        try:
            return self.service.task(name)
        except InputError as error:
            names = ", ".join(self.service.tasks)
            raise Refusal(
                404, f"{error}; models: {names}", code="model_not_found", param="model"
            ) from None

    async def _body(self, call: Call) -> bytes:
        """The body, no larger and no later than it may be."""
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in call.stream():
                    body += part
                    if len(body) > self.limit:
                        raise Refusal(413, f"the body is larger than {self.limit} bytes")
        except TimeoutError:
            raise Refusal(408, f"the body took longer than {BODY_SECONDS:.0f} seconds") from None
        return bytes(body)

    def _route(
        self,
        method: str,
        path: str,
        answer: Callable[[Call], Awaitable[Response]],
        who: Literal["users", "admin", "all"] = "users",
    ) -> Route:
        """An endpoint behind its key, with errors in OpenAI's form and every answer counted."""

        async def guarded(call: Call) -> Response:
            begun = time.monotonic()
            call.state.model = ""
            try:
                if who != "all":
                    self._let_in(call, who == "admin")
                response = await answer(call)
            except Refusal as refusal:
                response = _refused(refusal)
            except InputError as error:
                response = _refused(Refusal(400, str(error)))
            except ClientDisconnect:
                response = Response(status_code=GONE)
            except Exception:
                traceback.print_exc()
                response = _refused(Refusal(500, "the server failed", kind="server_error"))
            status = str(response.status_code)
            self.service.metrics.add(TOLD, 1, path=path, model=call.state.model, status=status)
            if not isinstance(response, StreamingResponse):
                seconds = time.monotonic() - begun
                self.service.metrics.see("deltaloom_request_seconds", seconds, path=path)
            return response

        return Route(path, guarded, methods=[method])

    def _let_in(self, call: Call, admin: bool) -> None:
        wanted = self.admin if admin else self.key
        if wanted is None:
            if not admin:
                return
            raise Refusal(
                403, f"adding and removing needs a key; start the server with {KEY} or {ADMIN_KEY}",
                kind="permission_error",
            )  # fmt: skip
        scheme, _, given = call.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            given.strip().encode(), wanted.encode()
        ):
            raise Refusal(
                401, "the API key is missing or wrong", kind="authentication_error",
                code="invalid_api_key",
            )  # fmt: skip


def _shown(task: Task) -> dict[str, Any]:
    return {
        "id": task.name,
        "object": "model",
        "created": task.created,
        "owned_by": "deltaloom",
        "kind": task.kind,
        "max_model_len": task.context - (len(task.prefix[0][0]) if task.prefix else 0),
    }


def _refused(refusal: Refusal) -> Response:
    headers = {"Retry-After": str(refusal.retry_after)} if refusal.retry_after else None
    return JSONResponse(refusal.body, status_code=refusal.status, headers=headers)


async def _as_openai(call: Call, error: Any) -> Response:
    """Unknown paths and methods."""
    what = f"{call.method} {call.url.path}: {error.detail}"
    return _refused(Refusal(error.status_code, what))
