"""Numbers as people read them: 1.2 M tokens, 38 s, 4.1 TFLOP, 0.713 [0.651, 0.768]."""

from __future__ import annotations

import math

MINUS = "−"
UNKNOWN = "unknown"


def short(value: float) -> str:
    """Three digits and a letter: 950, 1.2 k, 34.5 M."""
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P", "E", "Z"))


def flops(value: float) -> str:
    """Floating-point operations: 4.1 TFLOP."""
    text = short(value)
    return f"{text}FLOP" if " " in text else f"{text} FLOP"


def size(value: float) -> str:
    """Bytes: 1.2 GiB."""
    text = _scaled(value, 1024, ("", "Ki", "Mi", "Gi", "Ti"))
    return f"{text}B" if " " in text else f"{text} B"


def seconds(value: float) -> str:
    """A duration: 0.4 s, 38 s, 2 min 05 s, 3 h 20 min."""
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    hours, minutes = divmod(round(value / 60), 60)
    return f"{hours:,} h {minutes:02d} min"


def count(value: float) -> str:
    """A whole number with thousands separated: 12,345."""
    return f"{round(value):,}"


def share(part: float, whole: float) -> str:
    """Percent of a whole: 4.2 %, 45 %."""
    percent = 100 * part / whole if whole else 0.0
    return f"{percent:.1f} %" if 0 < percent < 9.95 else f"{percent:.0f} %"


def times(ratio: float) -> str:
    """A multiple: 0.31×, 1.4×, 12×."""
    return f"{ratio:.2g}×" if ratio < 10 else f"{count(ratio)}×"


def places(low: float, high: float) -> int:
    """Decimals that show two digits of the interval's half width."""
    half = (high - low) / 2
    return min(6, max(0, 1 - math.floor(math.log10(half)))) if 0 < half < math.inf else 3


def plain(value: float, decimals: int) -> str:
    """A fixed number of decimals with a real minus sign."""
    text = f"{value:.{decimals}f}"
    return text.replace("-", MINUS) if float(text) else text.replace("-", "")


def signed(value: float, decimals: int) -> str:
    """As `plain`, with its sign always shown."""
    text = plain(value, decimals)
    return text if text.startswith(MINUS) or not float(text) else f"+{text}"


def interval(low: float, high: float) -> str:
    """`[0.651, 0.768]`; an end that is not known is said to be so."""
    if not (math.isfinite(low) or math.isfinite(high)):
        return "[unknown]"
    decimals = places(low, high)
    ends = [plain(end, decimals) if math.isfinite(end) else UNKNOWN for end in (low, high)]
    return f"[{ends[0]}, {ends[1]}]"


def probability(p: float) -> str:
    """A p-value: 0.031, or < 0.001."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def tick(value: float) -> str:
    """A label on an axis: as few digits as say it, large numbers short."""
    if abs(value) >= 10_000:
        return short(value).replace(".0 ", " ").replace("-", MINUS)
    return f"{value:.6g}".replace("-", MINUS)


def _scaled(value: float, step: int, units: tuple[str, ...]) -> str:
    size, unit = float(value), 0
    while abs(size) >= step and unit < len(units) - 1:
        size, unit = size / step, unit + 1
    digits = 0 if unit == 0 and size == round(size) else max(0, 2 - len(str(int(abs(size)))))
    text = f"{size:.{digits}f}"
    if abs(float(text)) >= step and unit < len(units) - 1:
        text, unit = "1", unit + 1
    return f"{text} {units[unit]}" if units[unit] else text
