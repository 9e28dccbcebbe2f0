"""Numbers of bytes as people write them: 256M is 256,000,000."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(value: Any) -> Any:
    """The number that `256M` stands for; anything but a text comes back as it is.

    Raises ValueError for a text that is no number with one of K, M, G, T or nothing behind it.
    """
    if not isinstance(value, str):
        return value
    text = value.strip().upper().removesuffix("B")
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("K", "M", "G", "T") else (text, "")
    try:
        return int(float(number) * UNITS[unit])
    except ValueError:
        raise ValueError("give a number of bytes, such as 256M or 2G") from None


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=1)]
"""A field for a number of bytes, at least one."""
