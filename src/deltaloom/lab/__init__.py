"""The embedded default: a tiny base model and generated tasks whose truth is known.

`write_lab(folder)` writes a pretrained 0.9M-parameter model and its data; nothing is downloaded.
Importing this package loads neither torch nor transformers.
"""

from deltaloom.lab.files import shipped_model, tiny_base, write_lab
from deltaloom.lab.tasks import TARGETS
from deltaloom.lab.world import World, build_world

__all__ = ["TARGETS", "World", "build_world", "shipped_model", "tiny_base", "write_lab"]
