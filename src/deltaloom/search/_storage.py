"""A search's trials as an Optuna study, which other tools open: a journal file or a database.

The study says what the run's own records say and is no part of the result: it holds times. A trial
is written when it has ended, whole, and only by the process that holds the run's lock: whatever is
killed leaves none that would be running for ever, which is what Optuna has heartbeats for. A trial
of a cheap attempt is a pruned one there.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from deltaloom.core.errors import InputError
from deltaloom.core.method import Trial
from deltaloom.core.progress import say
from deltaloom.core.spec import digest
from deltaloom.search._space import Dimension

if TYPE_CHECKING:
    from deltaloom.core.run import Run

JOURNAL = "study.journal"
"""The journal file's name in a run's folder; `optuna-dashboard study.journal` opens it."""


class Mirror:
    """The study of one run. `storage` is a database URL; None takes the journal file."""

    def __init__(
        self,
        run: Run,
        space: Mapping[str, Dimension],
        goals: Mapping[str, Literal["lower", "higher"]],
        storage: str | None,
        rungs: int = 1,
    ) -> None:
        self.space, self.goals, self.url, self.rungs = space, goals, storage, rungs
        self.path = run.folder / JOURNAL
        about = {key: run.record[key] for key in ("recipe", "inputs", "seed")}
        self.name = f"deltaloom-{digest(about)}"
        """The same for the same search wherever it runs, so that a database finds it again."""
        self.study = self._open()

    def trials(self) -> dict[int, Trial]:
        """The trials that the study holds, by our number."""
        found = [
            Trial(**json.loads(one.user_attrs["trial"]))
            for one in self.study.get_trials(deepcopy=False)
            if "trial" in one.user_attrs
        ]
        return {trial.number: trial for trial in found}

    def restore(self, done: Mapping[int, Trial]) -> None:
        """Make the study say what `done` says."""
        held = self.trials()
        others = len(self.study.get_trials(deepcopy=False)) - len(held)
        if others or any(done.get(number) != trial for number, trial in held.items()):
            self._remove()
            self.study, held = self._open(), {}
        for number in sorted(done.keys() - held.keys()):
            self.add(done[number])

    def add(self, trial: Trial) -> None:
        """One more trial; what the storage does not take is said and can be restored later."""
        import optuna

        states = optuna.trial.TrialState
        # A trial whose settings came from elsewhere may lie outside the space.
        kinds = {name: one.distribution() for name, one in self.space.items()}
        attributes: dict[str, Any] = {"trial": json.dumps(trial.__dict__)}
        if trial.failed is not None:
            attributes["failed"] = trial.failed
        whole = trial.failed is None and trial.rung == self.rungs - 1
        state = states.FAIL if trial.failed else states.COMPLETE if whole else states.PRUNED
        values = [trial.values[name] for name in self.goals] if whole else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            frozen = optuna.trial.create_trial(
                state=state,
                params=trial.settings,
                distributions=kinds,
                values=values,
                user_attrs=attributes,
            )
        try:
            self.study.add_trial(frozen)
        except Exception as error:
            # The run's own record has it; the study is completed when the search is taken up.
            say(f"{self._said()} did not take trial {trial.number} ({_first(error)})")

    def _open(self) -> Any:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        if self.url is not None:
            return self._create(self.url)
        try:
            return self._create(self._journal())
        except Exception as error:
            say(f"{self.path} is damaged ({_first(error)}); it is written again")
            self.path.unlink(missing_ok=True)
            return self._create(self._journal())

    def _journal(self) -> Any:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        # A process that was killed may have left its lock; the run's own lock keeps others out.
        self.path.with_name(f"{self.path.name}.lock").unlink(missing_ok=True)
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            raise ValueError("its last line is cut short")
        return JournalStorage(JournalFileBackend(str(self.path)))

    def _create(self, storage: Any) -> Any:
        import optuna

        ways: list[Literal["minimize", "maximize"]] = [
            "minimize" if way == "lower" else "maximize" for way in self.goals.values()
        ]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                study = optuna.create_study(
                    storage=storage, study_name=self.name, directions=ways, load_if_exists=True
                )
                study.set_metric_names(list(self.goals))
        except Exception as error:
            if not isinstance(storage, str):
                raise
            raise InputError(
                f"storage = {self._said()}: cannot be used ({_first(error)}); check the address "
                "and that its database and driver are there"
            ) from None
        return study

    def _remove(self) -> None:
        import optuna

        if self.url is None:
            self.path.unlink(missing_ok=True)
        else:
            optuna.delete_study(study_name=self.name, storage=self.url)

    def _said(self) -> str:
        """The storage by name, without a password."""
        return re.sub(r"//([^:/@]+):[^@]*@", r"//\1:***@", self.url or str(self.path))


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
