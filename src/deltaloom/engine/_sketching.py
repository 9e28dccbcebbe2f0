"""Compiled inner loops of the sparse projection: read each gradient entry once.

A chunk is first preconditioned and signed in vector instructions, then scattered: a random branch
per entry on its sign would cost more than all the rest.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

CHUNK = 1024


@njit(cache=True, nogil=True, error_model="numpy")
def add(gradients, codes, out):
    """out (b, dim) += signs times gradients (b, n), each entry into the bucket of its code."""
    signed = np.empty(CHUNK, np.float32)
    signs = np.empty(CHUNK, np.float32)
    size = gradients.shape[1]
    for start in range(0, size, CHUNK):
        count = min(CHUNK, size - start)
        _signs(codes, start, count, signs)
        for i in range(gradients.shape[0]):
            for j in range(count):
                signed[j] = signs[j] * gradients[i, start + j]
            _scatter(signed, codes, start, count, out[i])


@njit(cache=True, nogil=True, error_model="numpy")
def add_adam(gradients, m, v, beta1, beta2, eps, codes, out):
    """The same of m' / sqrt(v' + eps), preconditioned on the way; m and v are (n,)."""
    b1, c1, b2, c2, e = (
        np.float32(beta1),
        np.float32(1 - beta1),
        np.float32(beta2),
        np.float32(1 - beta2),
        np.float32(eps),
    )
    signed = np.empty(CHUNK, np.float32)
    signs = np.empty(CHUNK, np.float32)
    size = gradients.shape[1]
    for start in range(0, size, CHUNK):
        count = min(CHUNK, size - start)
        _signs(codes, start, count, signs)
        for i in range(gradients.shape[0]):
            for j in range(count):
                g = gradients[i, start + j]
                second = b2 * v[start + j] + c2 * g * g
                first = b1 * m[start + j] + c1 * g
                signed[j] = signs[j] * first / math.sqrt(second + e)
            _scatter(signed, codes, start, count, out[i])


@njit(cache=True, nogil=True, inline="always")
def _signs(codes, start, count, signs):
    for j in range(count):
        signs[j] = np.float32(codes[start + j] & 1) * np.float32(2) - np.float32(1)


@njit(cache=True, nogil=True, inline="always")
def _scatter(values, codes, start, count, row):
    for j in range(count):
        row[codes[start + j] >> 1] += values[j]
