"""The embedded default: a tiny base model and generated tasks whose truth is known.

`write_lab(folder)` writes a pretrained 0.9M-parameter model and its data; nothing is downloaded.
Importing this package loads neither torch nor transformers.
"""

from .files import shipped_model, tiny_base, write_lab
from .tasks import TARGETS
from .world import World, build_world

__all__ = ["TARGETS", "World", "build_world", "shipped_model", "tiny_base", "write_lab"]
