"""What all charts share: scales, round ticks, grid lines, and the frame with its description."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup, escape

from deltaloom.report.numbers import tick


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers inside [low, high]: steps of 1, 2, 2.5 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high], with 2 and 5 times those when there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5)):
        found = [m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high]
        if len(found) >= 3:
            return found
    return found or ticks(low, high, 3)


class Scale:
    """Values to percent of the plotting area."""

    def __init__(self, low: float, high: float, log: bool = False) -> None:
        self.low, self.high, self.log = low, high, log

    @classmethod
    def around(cls, values: Sequence[float], pad: float = 0.05, log: bool = False) -> Scale:
        """A scale over `values` with room at both ends."""
        at = [math.log10(value) if log else value for value in values] or [0.0, 1.0]
        low, high = min(at), max(at)
        room = pad * (high - low) if high > low else max(abs(high) * 0.1, 0.05)
        low, high = low - room, high + room
        return cls(10.0**low, 10.0**high, True) if log else cls(low, high)

    def __call__(self, value: float) -> float:
        """The place of `value`."""
        if self.log:
            return 100 * math.log(value / self.low) / math.log(self.high / self.low)
        return 100 * (value - self.low) / (self.high - self.low)

    def ticks(self, wanted: int) -> list[float]:
        """Round numbers on this scale."""
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, wanted)


def grid_x(scale: Scale, height: int, show: Callable[[float], str]) -> str:
    """Vertical grid lines with their labels underneath."""
    found = []
    for value in scale.ticks(4):
        at = scale(value)
        anchor = "start" if at < 3 else "end" if at > 97 else "middle"
        found.append(
            line(at, 0, at, height, "grid")
            + f'<text x="{percent(at)}" y="{height + 16}" text-anchor="{anchor}">'
            f"{escape(show(value))}</text>"
        )
    return "".join(found)


def grid_y(scale: Scale, height: int) -> str:
    """Horizontal grid lines with their labels at the left."""
    found = []
    for value in scale.ticks(4):
        y = height * (1 - scale(value) / 100)
        found.append(
            line(0, y, 100, y, "grid")
            + f'<text x="0" dx="-7" y="{y + 4:.1f}" text-anchor="end">{escape(tick(value))}</text>'
        )
    return "".join(found)


def figure(
    name: str,
    height: int,
    body: str,
    *,
    left: int,
    foot: int = 24,
    x_name: str = "",
    y_name: str = "",
) -> Markup:
    """The chart: its plotting area with room around it for labels, and its description."""
    named = f'<p class="axis x">{escape(x_name)}</p>' if x_name else ""
    above = f'<p class="axis y">{escape(y_name)}</p>' if y_name else ""
    style = f"margin:4px 8px {foot}px {left}px;width:calc(100% - {left + 8}px)"
    return Markup(
        f'<div class="chart">{above}<svg role="img" aria-label="{escape(name)}" '
        f'height="{height}" style="{style}">{body}</svg>{named}</div>'
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "") -> str:
    """A line; horizontal places in percent, vertical ones in pixels."""
    mark = f' class="{kind}"' if kind else ""
    return f'<line{mark} x1="{percent(x1)}" y1="{y1:.1f}" x2="{percent(x2)}" y2="{y2:.1f}"/>'


def percent(value: float) -> str:
    """A horizontal place."""
    return f"{value:.2f}%"


def cut(text: str, longest: int) -> str:
    """A text shortened to at most `longest` characters."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
