"""Scenes: the sampler's shares, words, drawings and their reader, PNG files."""

import json
import zlib
from collections import Counter

import numpy as np
import pytest

from deltaloom.core.errors import InputError
from deltaloom.measure._drawing import (
    BACKGROUNDS,
    Picture,
    Tile,
    draw,
    drawable,
    laid_out,
    parse_drawing,
    read,
    written,
)
from deltaloom.measure._png import SIGNATURE, _chunk, decode_png, encode_png
from deltaloom.measure._scenes import CATEGORIES, Concept, Scene, Thing, sample_scene, vocabulary

WORDS = vocabulary("drawn")


def drawn(k, count=25, seed=0):
    return [
        sample_scene(WORDS, k, seed, i, lambda one: laid_out(one) is not None) for i in range(count)
    ]


@pytest.mark.parametrize("k", [1, 3, 7])
def test_k_concepts_beside_the_first_object(k):
    for scene in drawn(k):
        assert len(scene.concepts) == k + 1
        asked = Counter(one.category for one in scene.concepts)
        assert all(
            asked[name] <= asked["object"] for name in CATEGORIES if name not in ("style", "object")
        )
        assert asked["style"] <= 1
        assert len({one.noun for one in scene.things}) == len(scene.things)
        # Two concepts of one category are never bound to one object.
        bound = [(c.category, c.about) for c in scene.concepts if c.category != "object"]
        assert len(set(bound)) == len(bound)
        prompt = scene.prompt()
        assert all(
            concept.value in prompt for concept in scene.concepts if concept.category != "number"
        )


def test_a_quarter_of_the_draws_are_objects():
    asked = Counter(
        c.category for i in range(600) for c in sample_scene(WORDS, 1, 0, i).concepts[1:]
    )
    assert 0.2 < asked["object"] / 600 < 0.3
    for name in CATEGORIES[1:]:
        assert 0.06 < asked[name] / 600 < 0.16  # 0.75 / 7


def test_same_seed_same_scene():
    assert drawn(4, 5) == drawn(4, 5) != drawn(4, 5, seed=1)


def test_questions_and_prompt():
    scene = Scene(
        "s",
        (Thing("house", {"color": "red", "number": "3", "shape": "heart"}), Thing("owl")),
        "sepia",
        (("house", "above", "owl"),),
        (Concept("object", "owl"), Concept("number", "3", ("house",)),
         Concept("spatial", "above", ("house", "owl"))),
    )  # fmt: skip
    assert scene.prompt() == (
        "An image in sepia style of three red houses in the shape of a heart and an owl. "
        "The houses are above the owl."
    )
    assert [one.question() for one in scene.concepts] == [
        "Does the image contain an owl?",
        "Are there exactly three houses?",
        "Is the house above the owl?",
    ]


def test_what_is_drawn_is_read_and_answers_yes():
    for k in range(1, 8):
        for scene in drawn(k, 12):
            picture = laid_out(scene)
            found = read(draw(picture))
            assert set(found.tiles) == set(picture.tiles)
            assert found.style == picture.style
            assert all(found.answer(concept) for concept in scene.concepts)


def test_every_style_is_read_through_noise_and_photographs_are_not():
    rng = np.random.default_rng(0)
    for style in BACKGROUNDS:
        picture = Picture((Tile("key", "red", "heart", "tiny", "glass", 2, 3),), style)
        noisy = draw(picture).astype(int) + rng.integers(-3, 4, size=(96, 96, 3))
        assert read(noisy.clip(0, 255).astype(np.uint8)) == picture
    assert read(rng.integers(0, 256, size=(96, 96, 3)).astype(np.uint8)) is None
    assert read(np.zeros((64, 64, 3), np.uint8)) is None


ONE = Picture(
    (Tile("house", "red", row=0, column=0), Tile("house", "red", row=1, column=0),
     Tile("cup", "blue", row=3, column=2)),
    "sepia",
)  # fmt: skip


@pytest.mark.parametrize(
    ("concept", "answer"),
    [
        (Concept("object", "house"), True),
        (Concept("object", "tree"), False),
        (Concept("color", "red", ("house",)), True),
        (Concept("color", "red", ("cup",)), False),
        (Concept("color", "red", ("tree",)), False),
        (Concept("number", "2", ("house",)), True),
        (Concept("number", "3", ("house",)), False),
        (Concept("spatial", "above", ("house", "cup")), True),
        (Concept("spatial", "below", ("house", "cup")), False),
        (Concept("spatial", "to the left of", ("house", "cup")), True),
        (Concept("style", "sepia"), True),
        (Concept("style", "blueprint"), False),
    ],
)
def test_answers(concept, answer):
    assert ONE.answer(concept) is answer


def test_drawings_in_words():
    scene = drawn(5, 1)[0]
    picture = laid_out(scene)
    assert set(parse_drawing(written(picture), WORDS).tiles) == set(picture.tiles)
    text = "Sure!\nStyle: Sepia\nA1: a huge RED house of gold\nE9: key\nB2: nothing\na1: blue cup"
    found = parse_drawing(text, WORDS)
    assert found == Picture((Tile("cup", "blue", row=0, column=0),), "sepia")
    assert parse_drawing("", WORDS) == Picture(())


def png(image, kinds, colour):
    """A PNG file with a given filter for each line, filtered by the standard's formulas."""
    height, width, step = image.shape
    flat = image.reshape(height, -1).astype(int)
    lines = []
    for row, kind in zip(range(height), kinds, strict=True):
        line = [kind]
        for i in range(width * step):
            a = flat[row, i - step] if i >= step else 0
            b = flat[row - 1, i] if row else 0
            c = flat[row - 1, i - step] if row and i >= step else 0
            p = a + b - c
            paeth = min((a, b, c), key=lambda v: abs(p - v))
            guess = (0, a, b, (a + b) // 2, paeth)[kind]
            line.append((flat[row, i] - guess) % 256)
        lines.append(bytes(line))
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, colour, 0, 0, 0])
    data = zlib.compress(b"".join(lines))
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


@pytest.mark.parametrize(("channels", "colour"), [(3, 2), (1, 0), (4, 6)])
def test_png_of_all_filters(channels, colour):
    image = np.random.default_rng(1).integers(0, 256, size=(10, 7, channels)).astype(np.uint8)
    if channels == 4:
        image[..., 3] = 255
    kinds = [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
    found = decode_png(png(image, kinds, colour), "x.png")
    wanted = np.repeat(image, 3, axis=2) if channels == 1 else image[..., :3]
    assert (found == wanted).all()


def test_png_round_trip_and_broken_files():
    image = np.random.default_rng(2).integers(0, 256, size=(5, 9, 3)).astype(np.uint8)
    data = encode_png(image)
    assert (decode_png(data, "x.png") == image).all()
    for broken in (b"", data[:40], data[:-20], b"\xff\xd8jpeg", png(image, [0] * 5, 3)):
        with pytest.raises(InputError, match=r"x\.png: no whole PNG"):
            decode_png(broken, "x.png")


def test_own_words(tmp_path):
    path = tmp_path / "words.json"
    good = {name: ["2", "3"] if name == "number" else ["a", "b", "c"] for name in CATEGORIES}
    path.write_text(json.dumps(good))
    assert vocabulary(str(path)) == good
    with pytest.raises(InputError, match="object 'a' cannot be drawn"):
        drawable(good)
    for change, message in (
        ({"color": ["red"]}, "'color' must be a list of two or more"),
        ({"colour": ["red"]}, "'colour' is no category"),
        ({"number": ["many", "few"]}, "whole numbers"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(InputError, match=message):
            vocabulary(str(path))
    with pytest.raises(InputError, match="neither drawn, everyday nor a file"):
        vocabulary("absent")
    few = {**good, "object": ["x", "y"]}
    with pytest.raises(InputError, match="no scene of so many"):
        sample_scene(few, 40, 0, 0)


def test_everyday_words_make_prompts():
    words = vocabulary("everyday")
    assert all(sample_scene(words, k, 0, i).prompt() for k in range(1, 8) for i in range(5))
