"""Random numbers without a state: each is a function of what it is for (a seed, a step, a place), so any process can
work out any of them, in any order."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

_ROUNDS = 6
_MASK = np.uint64(0xFFFFFFFF)


def stream_key(*parts: Any) -> int:
    """A 64-bit key of anything json knows (a seed, a set's name, a pass)."""
    text = json.dumps(parts, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def uniforms(key: int, start: int, count: int) -> np.ndarray:
    """Draw numbers ``start`` to ``start + count`` of a stream, in [0, 1): [count] float64. Philox 4x64-10 (Salmon et
    al., SC 2011), whose output is a function of key and counter; NumPy's is used."""
    block, offset = divmod(start, 4)  # one counter gives four numbers
    raw = np.random.Philox(key=key, counter=[block, 0, 0, 0]).random_raw(offset + count)[offset:]
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permuted(key: int, n: int, places: np.ndarray) -> np.ndarray:
    """Say where a keyed permutation of range(n) puts ``places`` (int64, each in range): no table, any place alone.

    A Feistel network (Luby and Rackoff, 1988) on the smallest even number of bits that holds n, walked on until it
    falls below n, which keeps it a bijection (Black and Rogaway, 2002).
    """
    half = max(1, ((max(n, 2) - 1).bit_length() + 1) // 2)
    keys = np.frombuffer(hashlib.blake2b(key.to_bytes(8, "little"), digest_size=8 * _ROUNDS).digest(), dtype=np.uint64)
    out = np.asarray(places, dtype=np.int64).copy()
    pending = np.arange(out.size)
    flat = out.reshape(-1)
    while pending.size:
        flat[pending] = _feistel(flat[pending].astype(np.uint64), half, keys).astype(np.int64)
        pending = pending[flat[pending] >= n]
    return out


def _feistel(x: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    shift, low = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> shift, x & low
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & low)
    return (left << shift) | right


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al., OOPSLA 2014): every bit of the result depends on every one of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def spread(n: int, count: int, key: int = 0) -> np.ndarray:
    """Draw ``count`` different numbers of range(n), ascending, the same ones for the same key."""
    return np.sort(permuted(stream_key("spread", key), n, np.arange(min(count, n))))
