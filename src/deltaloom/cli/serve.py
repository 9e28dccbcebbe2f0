"""`deltaloom serve`: read the settings, then serve them or write them down for another engine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from deltaloom.core.errors import InputError
from deltaloom.serve.settings import Serving


def serve(settings: dict[str, Any]) -> None:
    """Serve until told to stop."""
    checked = Serving.parse(settings, "serve").checked()
    try:
        from deltaloom.serve.server import Server
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise InputError(
            f"serving needs {error.name}; install it: pip install 'deltaloom[serve]'"
        ) from None
    Server(checked).serve()


def launch_file(engine: str, settings: dict[str, Any]) -> None:
    """Write `out`, the file that launches `engine` with these tasks, and print its path."""
    from deltaloom.serve.export import export

    out = Path(str(settings.pop("out", f"serve-{os.path.basename(engine)}.sh")))
    print(export(engine, Serving.parse(settings, "serve"), out))
