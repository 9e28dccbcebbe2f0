"""Adapter kinds of ours made known to PEFT.

PEFT's `register_peft_method` takes methods from outside only if their name is a member of its enum
of kinds, and its mixed models know their kinds by name in one file. Both are opened here, for our
own names and nothing else; a test pins what this relies on.
"""

from __future__ import annotations

from typing import Any, Union

from peft.tuners.mixed import model as mixed
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType


def register(name: str, config: type, model: Any, layer: type) -> None:
    """Make an adapter kind known to PEFT, also inside its mixed models; once is enough.

    `name` is lower case. It is what adapter_config.json calls the kind, in capitals, and what
    PEFT's KeyError shows to those who load such a folder without this package: so it should name
    the package.
    """
    _add_member(name.upper(), name.upper())
    register_peft_method(
        name=name, config_cls=config, model_cls=model, prefix=model.prefix, is_mixed_compatible=True
    )
    _open_mixed(PeftType(name.upper()), config, model, layer)


def _add_member(name: str, value: str) -> None:
    member = str.__new__(PeftType, value)
    member._name_, member._value_ = name, value
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[value] = member
    type.__setattr__(PeftType, name, member)


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
