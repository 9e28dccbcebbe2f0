"""PNG files of 8 bits a channel, written and read with the standard library and numpy."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deltaloom.core.errors import InputError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}
"""Channels by PNG's colour type; palettes (3) are not read."""

Image = NDArray[np.uint8]


def encode_png(image: Image) -> bytes:
    """The file of an RGB image (h, w, 3); the same bytes every time."""
    height, width, _ = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    lines = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, -1)], axis=1)
    data = zlib.compress(lines.tobytes(), 9)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def decode_png(data: bytes, where: str | Path) -> Image:
    """The RGB image (h, w, 3) of a PNG file; transparency is laid over white.

    Raises InputError for what is no whole PNG file, and for interlaced ones and palettes.
    """
    try:
        return _decoded(data)
    except (ValueError, KeyError, IndexError, struct.error, zlib.error) as error:
        raise InputError(
            f"{where}: no whole PNG file of 8-bit gray or colours without interlacing ({error})"
        ) from None


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


def _decoded(data: bytes) -> Image:
    if not data.startswith(SIGNATURE):
        raise ValueError("another signature")
    at, parts, header = len(SIGNATURE), [], b""
    while True:
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        if kind == b"IHDR":
            header = body
        elif kind == b"IDAT":
            parts.append(body)
        elif kind == b"IEND":
            break
        at += 12 + size
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if depth != 8 or interlaced:
        raise ValueError(f"{depth} bits, interlaced: {bool(interlaced)}")
    channels = CHANNELS[colour]
    raw = np.frombuffer(zlib.decompress(b"".join(parts)), np.uint8)
    lines = raw.reshape(height, 1 + width * channels)
    image = _unfiltered(lines, channels).reshape(height, width, channels)
    if channels in (2, 4):
        alpha = image[..., -1:].astype(np.float64) / 255
        image = np.rint(image[..., :-1] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def _unfiltered(lines: Image, step: int) -> Image:
    """Undo PNG's five line filters; `step` is the bytes of a pixel."""
    done = np.zeros((len(lines), lines.shape[1] - 1), np.uint8)
    above = np.zeros(done.shape[1], np.uint8)
    for row, (kind, line) in enumerate(zip(lines[:, 0].tolist(), lines[:, 1:], strict=True)):
        if kind == 0:
            done[row] = line
        elif kind == 2:
            done[row] = line + above
        elif kind == 1:
            pixels = line.reshape(-1, step).astype(np.uint32)
            done[row] = np.cumsum(pixels, axis=0).astype(np.uint8).ravel()
        elif kind in (3, 4):
            done[row] = _by_pixel(kind, line.tolist(), above.tolist(), step)
        else:
            raise ValueError(f"line filter {kind}")
        above = done[row]
    return done


def _by_pixel(kind: int, line: list[int], above: list[int], step: int) -> list[int]:
    """The average (3) and Paeth (4) filters, which need the pixel just undone."""
    found = [0] * len(line)
    for i, value in enumerate(line):
        left, up = (found[i - step] if i >= step else 0), above[i]
        if kind == 3:
            guess = (left + up) // 2
        else:
            corner = above[i - step] if i >= step else 0
            gaps = (abs(up - corner), abs(left - corner), abs(left + up - 2 * corner))
            guess = (left, up, corner)[gaps.index(min(gaps))]
        found[i] = (value + guess) & 255
    return found
