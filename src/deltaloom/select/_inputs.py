"""Files that a selector's own settings name."""

from __future__ import annotations

from pathlib import Path


def absolute(name: str) -> str:
    """A local path made absolute, so that a recorded recipe replays from any folder; else as is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
