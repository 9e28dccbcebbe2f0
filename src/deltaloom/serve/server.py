"""Serve until told to stop: a socket, an event loop, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Iterator

import uvicorn

from deltaloom.core.errors import InputError
from deltaloom.core.progress import say
from deltaloom.serve._app import Endpoints
from deltaloom.serve._generation import Mail
from deltaloom.serve._service import Service
from deltaloom.serve.settings import Serving

CONNECTIONS = 2048
"""Open connections; more are turned away with 503. Ours."""
IDLE_SECONDS = 30
"""How long an idle connection is kept. Ours; clients' pools close theirs sooner or ask again."""


class Server:
    """A running service. `serve` blocks until `stop` or a signal."""

    def __init__(self, settings: Serving) -> None:
        self.settings = settings
        self.socket = _listen(settings.host, settings.port)
        self.mail = Mail()
        try:
            self.service = Service.open(settings, self.mail.deliver)
        except BaseException:
            self.socket.close()
            raise
        config = uvicorn.Config(
            Endpoints(self.service, self.mail).app(),
            # Warnings come a line for each piece of garbage, and a full pipe stops the loop.
            log_level="error",
            access_log=False,
            lifespan="off",
            ws="none",
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=settings.drain_seconds,  # pyright: ignore
        )
        self._uvicorn = _Quiet(config)

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def serve(self) -> None:
        """Answer until SIGTERM, SIGINT or `stop`; then let what is under way finish."""
        try:
            loops = self._uvicorn.config.get_loop_factory()
            with _signals(self.stop), asyncio.Runner(loop_factory=loops) as runner:
                runner.run(self._run())
        finally:
            self.service.worker.stop()
            self.socket.close()

    def stop(self) -> None:
        """Take no more requests and end when those under way are answered; a second call is not
        so patient. Any thread may."""
        self._uvicorn.force_exit = self._uvicorn.should_exit
        self._uvicorn.should_exit = True

    async def _run(self) -> None:
        self.mail.loop = asyncio.get_running_loop()
        names = ", ".join(self.service.tasks)
        say(f"serving {names} at {self.url}/v1")
        await self._uvicorn.serve(sockets=[self.socket])
        say("stopped")


class _Quiet(uvicorn.Server):
    """Signals are ours: uvicorn would raise them again after an orderly end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


@contextlib.contextmanager
def _signals(stop: object) -> Iterator[None]:
    """SIGTERM and SIGINT stop; only the main thread can say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = (signal.SIGTERM, signal.SIGINT)
    before = {one: signal.signal(one, lambda *_: stop()) for one in caught}  # pyright: ignore
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port in use is told before a model is loaded."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # asyncio sends small parts at once (TCP_NODELAY) only where it sees that this is TCP.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise _no_listening(host, port, error) from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(CONNECTIONS)
    except OSError as error:
        listening.close()
        raise _no_listening(host, port, error) from None
    return listening


def _no_listening(host: str, port: int, error: OSError) -> InputError:
    return InputError(f"cannot listen on {host}:{port} ({error}); choose another port=")
