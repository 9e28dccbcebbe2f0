"""The package's own pictures: scenes drawn on a grid of tiles, and read back from their pixels.

A tile holds one object: a badge whose outline is the shape, whose fill is color and texture and
whose radius is the size, with the object's sign in its middle. What a scene leaves open is drawn as
no word of the vocabulary says: an octagon, gray, plain, of medium size, on white. So a question is
answered by the pixels alone, and exactly: the reader compares every tile with every one that can be
drawn.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from deltaloom.core.errors import InputError
from deltaloom.measure._png import Image
from deltaloom.measure._scenes import Concept, Scene, Vocabulary

GRID, TILE = 4, 24
"""Tiles a side, and pixels of a tile's side."""
FARTHEST = 12.0
"""Mean absolute difference per channel up to which a tile is one of ours. Ours: two that differ
the least are 1.1 apart, and a photograph is about 60 from all."""
TRIES = 200
"""Random placements tried before a scene cannot be laid out."""

INK = (20, 20, 20)
COLORS = {
    None: (128, 128, 128),
    **{"red": (220, 50, 47), "green": (60, 160, 60), "blue": (50, 90, 220)},
    **{"yellow": (235, 205, 50), "purple": (140, 60, 180), "orange": (240, 140, 40)},
}
BACKGROUNDS = {
    None: (255, 255, 255),
    **{"blueprint": (24, 50, 110), "sepia": (226, 205, 160), "chalkboard": (40, 70, 55)},
}
RADII = {None: 9.0, "tiny": 6.0, "huge": 11.5}
SHAPES = (None, "circle", "square", "triangle", "diamond", "heart")
TEXTURES = (None, "glass", "metallic", "fluffy")
SIGNS = {
    "house": "..#.. .###. ##### #...# #.#.#",
    "tree": "..#.. .###. ##### ..#.. ..#..",
    "star": "#.#.# .###. ##### .###. #.#.#",
    "cup": "#...# #...# #...# .###. .#.#.",
    "key": ".##.. #..## .##.# ....# ...##",
    "boat": "..#.. ..##. ..#.. ##### .###.",
    "bell": "..#.. .#.#. .#.#. ##### ..#..",
    "flag": "####. #..#. ####. #.... #....",
}
RELATIONS = {
    "to the left of": (0, 1),
    "to the right of": (0, -1),
    "above": (1, 1),
    "below": (1, -1),
}
"""Axis (column 0, row 1) and the direction in which the first comes before the second."""


@dataclass(frozen=True)
class Tile:
    """One drawn object and where it is."""

    noun: str
    color: str | None = None
    shape: str | None = None
    size: str | None = None
    texture: str | None = None
    row: int = 0
    column: int = 0


@dataclass(frozen=True)
class Picture:
    """What is on an image."""

    tiles: tuple[Tile, ...]
    style: str | None = None

    def answer(self, concept: Concept) -> bool:
        """Whether the concept's question is to be answered with yes."""
        about = [[t for t in self.tiles if t.noun == noun] for noun in concept.about]
        if concept.category == "style":
            return self.style == concept.value
        if concept.category == "object":
            return any(tile.noun == concept.value for tile in self.tiles)
        if not all(about):
            return False
        if concept.category == "number":
            return len(about[0]) == int(concept.value)
        if concept.category == "spatial":
            axis, sign = RELATIONS[concept.value]
            a, b = ([sign * (t.row if axis else t.column) for t in side] for side in about)
            return max(a) < min(b)
        return all(getattr(tile, concept.category) == concept.value for tile in about[0])


def drawable(words: Vocabulary) -> None:
    """Raise InputError for a concept that cannot be drawn."""
    known: Mapping[str, Sequence[str | None]] = {
        "object": [*SIGNS],
        "color": [*COLORS],
        "number": [str(n) for n in range(2, GRID * GRID + 1)],
        "shape": SHAPES,
        "size": [*RADII],
        "texture": TEXTURES,
        "style": [*BACKGROUNDS],
        "spatial": [*RELATIONS],
    }
    for category, listed in words.items():
        for word in listed:
            if word not in known[category]:
                raise InputError(
                    f"{category} {word!r} cannot be drawn; use concepts=drawn, or images and a "
                    "grader that need no drawing"
                )


def laid_out(scene: Scene) -> Picture | None:
    """The scene with a place for every object, or None where no place was found."""
    rng = random.Random(f"{scene.id} {scene.graph()}")
    total = sum(one.count for one in scene.things)
    if total > GRID * GRID:
        return None
    cells = list(product(range(GRID), range(GRID)))
    for _ in range(TRIES):
        free = iter(rng.sample(cells, total))
        tiles = [
            Tile(
                one.noun,
                one.attributes.get("color"),
                one.attributes.get("shape"),
                one.attributes.get("size"),
                one.attributes.get("texture"),
                *next(free),
            )
            for one in scene.things
            for _ in range(one.count)
        ]
        found = Picture(tuple(tiles), scene.style)
        if all(found.answer(concept) for concept in scene.concepts):
            return found
    return None


def draw(picture: Picture) -> Image:
    """The picture as RGB, (96, 96, 3)."""
    image = np.tile(_empty(picture.style), (GRID, GRID, 1))
    for tile in picture.tiles:
        rows, columns = (slice(TILE * at, TILE * (at + 1)) for at in (tile.row, tile.column))
        image[rows, columns] = _drawn(
            tile.noun, tile.color, tile.shape, tile.size, tile.texture, picture.style
        )
    return image


def read(image: Image) -> Picture | None:
    """What is on an image, from its pixels; None for one that this module did not draw."""
    if image.shape != (GRID * TILE, GRID * TILE, 3):
        return None
    corner = image[0, 0].astype(int)
    style = min(BACKGROUNDS, key=lambda name: np.abs(corner - BACKGROUNDS[name]).sum())
    labels, templates, norms = _templates(style)
    tiles = []
    for row, column in product(range(GRID), range(GRID)):
        part = image[TILE * row : TILE * (row + 1), TILE * column : TILE * (column + 1)]
        flat = part.reshape(-1).astype(np.float32)
        best = int(np.argmin(norms - 2 * (templates @ flat)))
        if float(np.abs(templates[best] - flat).mean()) > FARTHEST:
            return None
        if labels[best] is not None:
            tiles.append(Tile(*labels[best], row, column))
    return Picture(tuple(tiles), style)


def parse_drawing(text: str, words: Vocabulary) -> Picture:
    """A drawing in words, as a language model writes it: lines like `B3: huge red glass house`.

    Columns are A to D from the left and rows 1 to 4 from the top; `style: sepia` is the style.
    Words that the vocabulary lacks are passed over, and lines without an object too; a later line
    about a cell replaces an earlier one.
    """
    tiles: dict[tuple[int, int], Tile] = {}
    style = None
    for line in text.splitlines():
        found = re.match(r"\s*style\s*:\s*(\w+)", line, re.IGNORECASE)
        if found and found[1].lower() in words["style"]:
            style = found[1].lower()
        found = re.match(r"\s*([A-D])([1-4])\s*:\s*(.+)", line, re.IGNORECASE)
        if not found:
            continue
        given = re.findall(r"[a-z]+", found[3].lower())
        said = {
            category: next((word for word in given if word in words[category]), None)
            for category in ("object", "color", "shape", "size", "texture")
        }
        row, column = int(found[2]) - 1, "abcd".index(found[1].lower())
        noun = said.pop("object")
        if noun is not None:
            tiles[row, column] = Tile(noun, **said, row=row, column=column)
    return Picture(tuple(tiles[at] for at in sorted(tiles)), style)


def written(picture: Picture) -> str:
    """The picture in the words that `parse_drawing` reads."""
    lines = [f"style: {picture.style}"] if picture.style else []
    for one in picture.tiles:
        words = [one.size, one.color, one.texture, one.shape, one.noun]
        cell = f"{'ABCD'[one.column]}{one.row + 1}"
        lines.append(f"{cell}: {' '.join(word for word in words if word)}")
    return "\n".join(lines)


@cache
def _templates(style: str | None) -> tuple[list[tuple[str | None, ...] | None], Image, Image]:
    """Every tile that can be drawn on this background, the empty one first."""
    kinds = list(product(SIGNS, COLORS, SHAPES, RADII, TEXTURES))
    drawn = [_empty(style), *(_drawn(*kind, style) for kind in kinds)]
    flat = np.stack(drawn).reshape(len(drawn), -1).astype(np.float32)
    return [None, *kinds], flat, (flat**2).sum(1)


def _empty(style: str | None) -> Image:
    return np.full((TILE, TILE, 3), BACKGROUNDS[style], np.uint8)


def _drawn(
    noun: str,
    color: str | None,
    shape: str | None,
    size: str | None,
    texture: str | None,
    style: str | None,
) -> Image:
    """One tile, (24, 24, 3)."""
    tile = _empty(style)
    y, x = np.mgrid[:TILE, :TILE] - (TILE - 1) / 2
    inside = _outline(shape, x, y, RADII[size])
    fill = np.array(COLORS[color], dtype=np.float64)
    shade = _shades(texture, x, y)[..., None]
    lit = np.where(shade > 0, fill + shade * (255 - fill), fill * (1 + shade))
    tile[inside] = np.rint(lit).astype(np.uint8)[inside]
    middle = TILE // 2
    for row, line in enumerate(SIGNS[noun].split()):
        for column, mark in enumerate(line):
            if mark == "#":
                tile[middle - 3 + row, middle - 3 + column] = INK
    return tile


def _outline(shape: str | None, x: Image, y: Image, radius: float) -> NDArray[np.bool_]:
    """Which pixels a badge of this shape covers."""
    if shape == "circle":
        return x**2 + y**2 <= radius**2
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= radius * 0.87
    if shape == "diamond":
        return abs(x) + abs(y) <= radius
    if shape == "triangle":
        return (y <= radius * 0.8) & (abs(x) <= (y + radius) * 0.6)
    if shape == "heart":
        u, v = 1.25 * x / radius, 0.3 - 1.25 * y / radius
        return (u**2 + v**2 - 1) ** 3 - u**2 * v**3 <= 0
    octagon = np.maximum(abs(x), abs(y)) <= radius * 0.8
    return octagon & (abs(x) + abs(y) <= radius * 1.15)


def _shades(texture: str | None, x: Image, y: Image) -> Image:
    """How far each pixel is from its fill: up to 1 towards white, down to -1 towards black."""
    if texture == "glass":
        return np.where(np.mod(x + y, 8) < 3, 0.55, 0.0)
    if texture == "metallic":
        return np.where(np.mod(y + 0.5, 4) < 2, -0.35, 0.0)
    if texture == "fluffy":
        return np.where((np.mod(x + 0.5, 3) < 1) & (np.mod(y + 0.5, 3) < 1), 0.7, 0.0)
    return np.zeros_like(x)
