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
"""Mean absolute difference per channel up to which a tile is one of ours, so that copies with some
compression noise are read, and photographs are not. Ours."""
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
Kind = tuple[str, str | None, str | None, str | None, str | None]
"""Noun, color, shape, size and texture of a tile."""


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
    kinds = _badges()[0]
    parts = image.reshape(GRID, TILE, GRID, TILE, 3).swapaxes(1, 2).reshape(GRID * GRID, -1)
    known = _by_bytes(style)
    tiles = []
    for at, part in enumerate(parts):
        number = known.get(part.tobytes())
        number = _nearest(part, style) if number is None else number
        if number is None:
            return None
        if number:  # 0 is the empty tile
            tiles.append(Tile(*kinds[number - 1], *divmod(at, GRID)))
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
def _every_tile(style: str | None) -> Image:
    """Every tile that can be drawn on this background, the empty one first, (n, 1728)."""
    _, badges, covered = _badges()
    ground = np.array(BACKGROUNDS[style], np.uint8)
    drawn = np.where(covered[..., None], badges, ground).reshape(len(badges), -1)
    return np.concatenate([np.tile(ground, TILE * TILE)[None], drawn])


@cache
def _by_bytes(style: str | None) -> dict[bytes, int]:
    """Number of a tile by its bytes."""
    return {tile.tobytes(): number for number, tile in enumerate(_every_tile(style))}


def _nearest(part: Image, style: str | None) -> int | None:
    """Number of the tile that a changed copy is the nearest to; None where none is near."""
    gaps = np.abs(_every_tile(style).astype(np.int16) - part).mean(1)
    best = int(gaps.argmin())
    return best if gaps[best] <= FARTHEST else None


@cache
def _badges() -> tuple[list[Kind], Image, NDArray[np.bool_]]:
    """All kinds of object, their tiles (n, 24, 24, 3) and the pixels that they cover."""
    kinds: list[Kind] = list(product(SIGNS, COLORS, SHAPES, RADII, TEXTURES))
    signs = np.stack([_sign(noun) for noun in SIGNS])[:, None, None, None, None]
    fills = np.stack([[_fill(c, t) for t in TEXTURES] for c in COLORS])[None, :, None, None]
    outlines = np.stack([[_outline(s, r) for r in RADII] for s in SHAPES])
    outlines = outlines[None, None, :, :, None]  # (noun, color, shape, size, texture, 24, 24)
    inked = np.where(signs[..., None], np.array(INK, np.uint8), fills)
    shape = (len(SIGNS), len(COLORS), len(SHAPES), len(RADII), len(TEXTURES), TILE, TILE)
    badges = np.broadcast_to(inked, (*shape, 3)).reshape(len(kinds), TILE, TILE, 3)
    covered = np.broadcast_to(outlines | signs, shape).reshape(len(kinds), TILE, TILE)
    return kinds, badges, covered


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
    inside, inked = _outline(shape, size), _sign(noun)
    tile = np.where(inside[..., None], _fill(color, texture), _empty(style))
    return np.where(inked[..., None], np.array(INK, np.uint8), tile)


def _sign(noun: str) -> NDArray[np.bool_]:
    """The pixels of an object's sign."""
    found = np.zeros((TILE, TILE), bool)
    marks = [[mark == "#" for mark in line] for line in SIGNS[noun].split()]
    start = TILE // 2 - 3
    found[start : start + 5, start : start + 5] = marks
    return found


def _fill(color: str | None, texture: str | None) -> Image:
    """A tile of this color and texture, (24, 24, 3)."""
    fill = np.array(COLORS[color], dtype=np.float64)
    shade = _shades(texture)[..., None]
    lit = np.where(shade > 0, fill + shade * (255 - fill), fill * (1 + shade))
    return np.rint(lit).astype(np.uint8)


def _outline(shape: str | None, size: str | None) -> NDArray[np.bool_]:
    """Which pixels a badge of this shape and size covers."""
    y, x = np.mgrid[:TILE, :TILE] - (TILE - 1) / 2
    radius = RADII[size]
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


def _shades(texture: str | None) -> Image:
    """How far each pixel is from its fill: up to 1 towards white, down to -1 towards black."""
    y, x = np.mgrid[:TILE, :TILE] - (TILE - 1) / 2
    if texture == "glass":
        return np.where(np.mod(x + y, 8) < 3, 0.55, 0.0)
    if texture == "metallic":
        return np.where(np.mod(y + 0.5, 4) < 2, -0.35, 0.0)
    if texture == "fluffy":
        return np.where((np.mod(x + 0.5, 3) < 1) & (np.mod(y + 0.5, 3) < 1), 0.7, 0.0)
    return np.zeros_like(x)
