"""Settings of `deltaloom serve`."""

from __future__ import annotations

import os
import re
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from deltaloom.core.base import BaseField
from deltaloom.core.errors import InputError
from deltaloom.core.spec import Spec

AUTO = "auto"
"""The model's name with which the router chooses."""
KEY, ADMIN_KEY = "DELTALOOM_API_KEY", "DELTALOOM_ADMIN_KEY"
"""Environment variables: keys are no settings, which a process list would show."""
NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,99}$")


def _named(value: Any) -> Any:
    """Names by folder where only folders are given."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list):
        return given
    names = [Path(str(one)).name for one in given]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"two are called {min(twice)!r}; name them: deltas.NAME=FOLDER")
    return dict(zip(names, map(str, given), strict=True))


class Serving(Spec):
    """One base, its deltas by name, where to listen and how much to take."""

    base: BaseField
    """The model under all tasks: a folder or hub id; also a merged or tuned model."""
    name: str | None = None
    """What requests call the base; None is the last part of its folder or id."""
    deltas: Annotated[dict[str, str], BeforeValidator(_named)] = {}
    """Tasks: name -> folder or hub id of a delta of the base or of a whole model. A list is named
    by its folders."""
    router: Path | None = None
    """File of a trained router: requests to the model `auto` go where it sends them."""
    examples: dict[str, str] = {}
    """Task -> file of its rows. The router is trained on them when its file is not there or was
    trained on others."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but this machine's own needs an API key."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port; 0 takes a free one."""
    batch: Annotated[int, Field(ge=1)] = 32
    """Requests that a model answers at once. Ours."""
    cache_tokens: Annotated[int, Field(ge=64)] = 65_536
    """Places of a model's key-value cache: requests at once times the longest of them, prompt and
    max_tokens. Ours: 8 GiB for a model of 7B with grouped heads in bfloat16."""
    piece: Annotated[int, Field(ge=16)] = 1024
    """Prompt tokens read between two tokens of those who generate. Ours, as
    `engine.forward.TOKENS_PER_BATCH` on a CPU."""
    queue: Annotated[int, Field(ge=1)] = 256
    """Requests that wait; one more is answered 429. Ours."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens that a request may ask for; None is what the context leaves."""
    body_bytes: Annotated[int, Field(ge=1024)] = 4 * 2**20
    """Largest body of a request, 4 MiB. Ours."""
    drain_seconds: Annotated[float, Field(ge=0)] = 30.0
    """How long a shutdown waits for what is under way. Ours: Kubernetes' grace period."""

    def checked(self) -> Serving:
        """These settings; raises InputError for names that clash and an address left open."""
        for name in self.names:
            if not NAME.match(name) or name == AUTO:
                raise InputError(
                    f"{name!r}: a model's name is letters, digits and . _ : -, and not {AUTO!r}"
                )
        if self.base_name in self.deltas:
            raise InputError(f"{self.base_name!r} is the base; give it another name: name=NAME")
        unknown = sorted(self.examples.keys() - {*self.names})
        if unknown:
            raise InputError(f"examples.{unknown[0]}: no such task; known: {', '.join(self.names)}")
        if self.examples and self.router is None:
            raise InputError("examples are for a router; say where it is kept: router=FILE")
        if not self.is_loopback and api_key() is None:
            raise InputError(
                f"host = {self.host!r}: listening beyond this machine needs a key; set {KEY}"
            )
        return self

    @property
    def base_name(self) -> str:
        """What requests call the base."""
        return self.name or Path(self.base.model.rstrip("/")).name

    @property
    def names(self) -> list[str]:
        """All names, the base's first."""
        return [self.base_name, *self.deltas]

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False


def api_key() -> str | None:
    """The key that requests need, None for none."""
    return os.environ.get(KEY) or None


def admin_key() -> str | None:
    """The key that adds and removes tasks: its own, else the API's; None for none."""
    return os.environ.get(ADMIN_KEY) or api_key()
