"""One way into PEFT's tables for kinds that are not in its enumeration.

PEFT takes methods from outside by `register_peft_method`, but only those of its `PeftType`, and its
mixed models know their kinds by name in one file. Both are opened here, for our own names and
nothing else; a test pins what this relies on.
"""

from __future__ import annotations

from typing import Any, Union

from peft.tuners.mixed import model as mixed
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType


def register(name: str, config: type, tuner: Any, *, mixed_layer: type | None = None) -> None:
    """Make the adapter kind `name` (lower case) known to PEFT; `tuner.prefix` is its prefix.

    Kinds with a `mixed_layer`, the class of their layers, may be mixed with others on one model.
    Raises KeyError when PEFT has the name or the prefix already.
    """
    kind = name.upper()
    if kind not in PeftType.__members__:
        member = str.__new__(PeftType, kind)
        member._name_, member._value_ = kind, kind
        type.__setattr__(PeftType, kind, member)
        PeftType._member_names_.append(kind)
        PeftType._member_map_[kind] = member
        PeftType._value2member_map_[kind] = member
    register_peft_method(
        name=name,
        config_cls=config,
        model_cls=tuner,
        prefix=tuner.prefix,
        is_mixed_compatible=mixed_layer is not None,
    )
    if mixed_layer is not None:
        _open_mixed(PeftType(kind), config, tuner, mixed_layer)


def _open_mixed(kind: PeftType, config: type, model: Any, layer: type) -> None:
    import peft.tuners.mixed as package

    kinds = (*mixed.COMPATIBLE_TUNER_TYPES, kind)
    mixed.COMPATIBLE_TUNER_TYPES = package.COMPATIBLE_TUNER_TYPES = kinds  # pyright: ignore
    mixed.PREFIXES.append(model.prefix)
    mixed.Configs = Union[(*mixed.Configs.__args__, config)]  # pyright: ignore
    mixed.Layers = (*mixed.Layers, layer)  # pyright: ignore
    theirs = mixed.MixedModel._create_and_replace

    def create_and_replace(self: Any, own: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(own, config):
            model._create_and_replace(self, own, *args, **kwargs)
        else:
            theirs(self, own, *args, **kwargs)

    mixed.MixedModel._create_and_replace = create_and_replace  # pyright: ignore
