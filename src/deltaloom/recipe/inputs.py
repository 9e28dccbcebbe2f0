"""Inputs of a step: names become earlier steps' folders, rows and bases; all of it is hashed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from deltaloom.core.base import Base
from deltaloom.core.errors import InputError
from deltaloom.core.examples import Examples
from deltaloom.core.places import fingerprint, moved, places
from deltaloom.core.source_weights import SourceWeights
from deltaloom.core.spec import digest
from deltaloom.recipe.steps import Planned, TransferStep

if TYPE_CHECKING:
    from deltaloom.core.delta import Delta


class Inputs:
    """A step's inputs, resolved: earlier steps become folders, names become rows and bases."""

    def __init__(self, planned: Planned, earlier: Mapping[str, Path]) -> None:
        self.step, self.earlier = planned.step, earlier
        self.method = moved(planned.method, self.folder)
        self.hashes: dict[str, str] = {}
        for key, name in places(planned.method):
            path = Path(self.folder(name)).expanduser()
            if path.exists():
                self.hashes[f"{key} {name}"] = fingerprint(path)
        self.base = self._base()
        self.data = {key: self._examples(key) for key in self.step.data_keys}
        self.held = self._held()
        for name in getattr(self.step, "deltas", None) or ():
            if name != "base":
                self.hashes[f"delta {name}"] = Base(model=self.folder(name)).fingerprint()
        self.weights = self._weights()
        self.tokenizer, self.donor = self._tokenizer()

    def folder(self, name: str) -> str:
        """The folder of an earlier step of this name, else the name itself."""
        return str(self.earlier.get(name, name))

    def delta(self, name: str) -> Delta:
        """The delta of this name over the step's base."""
        from deltaloom.core.delta import load

        assert self.base is not None
        return load(self.folder(name), self.base)

    def _base(self) -> Base | None:
        if self.step.base is None:
            return None
        base = self.step.base.model_copy(update={"model": self.folder(self.step.base.model)})
        if self.method.weightless and not any(base.folder.glob("*.safetensors")):
            self.hashes["base"] = digest(base.config())
            return base
        base.check()
        self.hashes["base"] = base.fingerprint()
        return base

    def _tokenizer(self) -> tuple[Path | None, Base | None]:
        """A transfer's tokenizer, and the model that has it if its method looks at one."""
        if not isinstance(self.step, TransferStep):
            return None, None
        from deltaloom.core.vocabulary import tokenizer_digest, tokenizer_folder

        named = self.folder(self.step.tokenizer)
        folder = tokenizer_folder(named)
        self.hashes["tokenizer"] = tokenizer_digest(folder)
        if "donor" not in self.method.uses | self.method.needs:
            return folder, None
        donor = Base(model=self.folder(self.step.donor) if self.step.donor else named)
        if not self.step.donor and not any(donor.folder.glob("*.safetensors")):
            raise InputError(
                f"{self.step.name}: {self.step.method} looks at the embeddings of a model that has "
                f"the tokenizer, and {named} has no weights; name one with donor="
            )
        donor.check()
        self.hashes["donor"] = donor.fingerprint()
        return folder, donor

    def _examples(self, key: str) -> list[Examples]:
        names = getattr(self.step, key) or []
        found = []
        for name in names:
            rows = Examples.read(self.folder(name))
            self.hashes[f"{key} {name}"] = rows.digest()
            found.append(rows)
        return found

    def _held(self) -> Examples | None:
        """What a step measures itself on, all as one."""
        evaluate = getattr(self.step, "evaluate", None)
        if evaluate is None:
            return None
        rows = Examples.read([self.folder(name) for name in evaluate.data])
        self.hashes["evaluate"] = rows.digest()
        return rows

    def _weights(self) -> SourceWeights | None:
        name = getattr(self.step, "weights", None)
        if name is None:
            return None
        found = SourceWeights.read(self.folder(name))
        self.hashes[f"weights {name}"] = digest(found.record())
        return found

    def rows(self, key: str) -> Examples | None:
        """All rows of one input as one Examples with unique ids; None when it was not given."""
        names = getattr(self.step, key)
        if not names:
            return None
        if len(self.data[key]) == 1:
            return self.data[key][0]
        return Examples.read([self.folder(name) for name in names])
