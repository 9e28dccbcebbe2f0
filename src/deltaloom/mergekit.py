"""The part of mergekit's Python interface that others import, on this library's engine.

    from deltaloom.mergekit import MergeConfiguration, MergeOptions, run_merge

TRL's `MergeModelCallback` imports these three from `mergekit.config` and `mergekit.merge`; after
`stand_in()` it finds them there, and mergekit need not be installed.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from deltaloom.core.errors import InputError, suggest
from deltaloom.merge._checked import Precision
from deltaloom.merge._config import MergeConfig
from deltaloom.merge._options import SWITCHES, VALUES, size

__all__ = ["MergeConfiguration", "MergeOptions", "run_merge", "stand_in"]


class MergeConfiguration(MergeConfig):
    """One document of mergekit's YAML; `model_validate` takes what `yaml.safe_load` gives."""

    def to_yaml(self) -> str:
        """The document as YAML that this and mergekit read."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> MergeConfiguration:
        """The document in `text`."""
        return cls.model_validate(yaml.safe_load(text))


def _size(value: Any) -> Any:
    return size(value) if isinstance(value, str) else value


class MergeOptions(BaseModel):
    """The options of mergekit's `run_merge`. Those of mergekit that are not fields here are taken
    and change nothing; any other is refused.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    random_seed: int | None = None
    """Seed of random choices; 0 when not given."""
    out_shard_size: Annotated[int, BeforeValidator(_size)] = Field(default=5_000_000_000, ge=1)
    """Largest weights file: bytes, or text such as 500M."""
    copy_tokenizer: bool = True
    """Give the output a tokenizer."""
    num_threads: int | None = Field(default=None, ge=1)
    """Threads over tensors; two when not given."""
    quiet: bool = False
    """Say nothing on stderr."""
    precision: Precision = "mergekit"
    """Round every step as mergekit does, or work in float32 and round once; ours."""

    def model_post_init(self, context: Any) -> None:
        """Refuse what mergekit does not have either."""
        known = {name.replace("-", "_") for name in (*SWITCHES, *VALUES)} | {"verbosity"}
        for name in self.model_extra or {}:
            if name not in known:
                raise ValueError(f"no option {name!r}{suggest(name, known)}")


def run_merge(
    merge_config: MergeConfig,
    out_path: str | Path,
    options: MergeOptions | None = None,
    config_source: str | None = None,
) -> None:
    """Merge by one document into the new folder `out_path`, as `deltaloom mergekit` does.

    `config_source` is the YAML that is kept beside the result, in place of the document's own. A
    call that was interrupted is taken up by the same call. Raises InputError for what cannot be
    merged, or an output that is already there.
    """
    from deltaloom.merge._checked import check
    from deltaloom.merge._documents import Asked, run_documents

    options = options or MergeOptions()
    text = config_source or MergeConfiguration.model_validate(merge_config.model_dump()).to_yaml()
    seed = options.random_seed or 0
    asked = Asked(
        seed, options.num_threads, options.out_shard_size, options.copy_tokenizer, options.precision
    )

    def say(note: str) -> None:
        if not options.quiet:
            print(f"note: {note}", file=sys.stderr)

    checked = check(merge_config, "MergeConfiguration", options.precision)
    for note in checked.notes:
        say(note)
    run_documents(
        [checked], Path(out_path), text.encode(), asked, say=say, progress=lambda total: None
    )


def stand_in() -> None:
    """Let `import mergekit` in this process find these names, where mergekit is not installed.

    Raises InputError when another mergekit was imported already.
    """
    ours = {"": (), "config": ("MergeConfiguration",), "merge": ("MergeOptions", "run_merge")}
    there = sys.modules.get("mergekit")
    if there is not None and not hasattr(there, "deltaloom"):
        raise InputError("mergekit itself is imported already; call stand_in() before that")
    for name, exported in ours.items():
        full = f"mergekit.{name}" if name else "mergekit"
        module = ModuleType(full, "Stands in for mergekit.")
        module.__spec__ = ModuleSpec(full, None, is_package=not name)
        module.__dict__.update({key: globals()[key] for key in exported})
        sys.modules[full] = module
        if name:
            setattr(sys.modules["mergekit"], name, module)
    vars(sys.modules["mergekit"]).update(deltaloom=True, __path__=[])
