"""One way into PEFT's tables for kinds that are not in its enumeration."""

from __future__ import annotations

from typing import Any

from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType


def register(name: str, config: type, tuner: Any) -> None:
    """Make the adapter kind `name` (lower case) known to PEFT; `tuner.prefix` is its prefix.

    PEFT takes methods by `register_peft_method`, but only those of its `PeftType`; the member is
    added first. Raises KeyError when PEFT has the name or the prefix already.
    """
    kind = name.upper()
    if kind not in PeftType.__members__:
        member = str.__new__(PeftType, kind)
        member._name_, member._value_ = kind, kind
        setattr(PeftType, kind, member)
        PeftType._member_names_.append(kind)
        PeftType._member_map_[kind] = member
        PeftType._value2member_map_[kind] = member
    register_peft_method(name=name, config_cls=config, model_cls=tuner, prefix=tuner.prefix)
