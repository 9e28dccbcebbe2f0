"""Things to try that other processes can import; deltaloom's workers do not know the tests."""

import math
import os
import signal
from pathlib import Path

from deltaloom.core.errors import WorkError
from deltaloom.search._space import Dimension
from deltaloom.search._study import Outcome

SPACE = {
    "x": Dimension(low=-2.0, high=2.0),
    "n": Dimension(low=1, high=8, integer=True, log=True),
    "kind": Dimension(choices=["a", "b"]),
}


def bowl(settings, run):
    (run.work / "seen").write_text("x")
    away = (settings["x"] - 1) ** 2 + math.log2(settings["n"]) / 10 + (settings["kind"] == "b")
    run.note(rows=7)
    run.spend(forward_tokens=3.0)
    return Outcome({"loss": away}, {"steps": 1.0})


class Dying:
    """Kills its process in chosen trials, so many times each."""

    def __init__(self, attempt, folder, dies):
        self.attempt, self.folder, self.dies = attempt, Path(folder), dies

    def __call__(self, settings, run):
        name = run.folder.name
        died = len(list(self.folder.glob(f"died-{name}-*")))
        if died < self.dies.get(name, 0):
            (self.folder / f"died-{name}-{died}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.attempt(settings, run)


def half(settings, run):
    """Of one kind nothing works."""
    if settings["kind"] == "b":
        raise WorkError("the loss is nan at step 3")
    return bowl(settings, run)
