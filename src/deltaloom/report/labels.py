"""Where the labels of points go so that they cover neither points nor one another."""

from __future__ import annotations

from collections.abc import Sequence

LETTER = 2.3
"""Percent of the width that a letter takes: 7 pixels in a plot 300 pixels wide."""

Spot = tuple[float, float, float, float]
"""A point's x in percent, its y and its interval's top and foot in pixels."""
Place = tuple[int, float, str]
"""A label's shift, its y and its anchor."""
Box = tuple[float, float, float, float]
"""Left and right in percent, top and foot in pixels."""


def label_places(
    spots: Sequence[Spot], names: Sequence[str], height: int, others: Sequence[Box] = ()
) -> list[Place]:
    """A place beside each point, the one that covers the least of points, labels and `others`."""
    taken = [*others, *map(_mark, spots)]
    places = []
    for spot, name in zip(spots, names, strict=True):
        wide = LETTER * len(name)
        boxes = {place: _box(place, spot[0], wide) for place in _choices(spot)}
        best = min(boxes, key=lambda place: _covered(boxes[place], taken, height))
        places.append(best)
        taken.append(boxes[best])
    return places


def free_end(spots: Sequence[Spot], name: str, y: float) -> tuple[str, Box]:
    """Anchor and box of a text at the left or the right end, wherever it covers fewer points."""
    wide = LETTER * len(name) + 2
    ends: dict[str, Box] = {
        "start": (0.0, wide, y - 11, y + 3),
        "end": (100.0 - wide, 100.0, y - 11, y + 3),
    }
    marks = [_mark(spot) for spot in spots]
    best = min(ends, key=lambda anchor: _covered(ends[anchor], marks, height=10_000))
    return best, ends[best]


def _mark(spot: Spot) -> Box:
    """What a point and its interval cover."""
    x, y, top, foot = spot
    return x - 1.5, x + 1.5, min(y - 6, top), max(y + 6, foot)


def _choices(spot: Spot) -> list[Place]:
    """Right of the point, left of it, above and below its interval; the preferred first."""
    _, y, top, foot = spot
    right: list[Place] = [(10, y + shift, "start") for shift in (4, -8, 16)]
    left: list[Place] = [(-10, y + shift, "end") for shift in (4, -8, 16)]
    return [*right, *left, (0, top - 5, "middle"), (0, foot + 14, "middle")]


def _box(place: Place, x: float, wide: float) -> Box:
    _, y, anchor = place
    left = {"start": x + 3, "end": x - 3 - wide, "middle": x - wide / 2}[anchor]
    return left, left + wide, y - 11, y + 3


def _covered(box: Box, taken: Sequence[Box], height: int) -> float:
    """The area shared with what is there already, and a price for leaving the plot."""
    left, right, top, foot = box
    outside = max(0.0, -left) + max(0.0, right - 100) + 20 * (top < 0) + 20 * (foot > height)
    shared = sum(
        max(0.0, min(right, b) - max(left, a)) * max(0.0, min(foot, d) - max(top, c))
        for a, b, c, d in taken
    )
    return shared + 5 * outside
