"""Random draws from (seed, keys). Equal keys give equal draws, and no draw depends on another."""

import hashlib
import json
import random


def draw(seed: int, *keys: str | int) -> random.Random:
    """An independent random stream for (seed, keys)."""
    return random.Random(_key_bytes(seed, keys))


def uniform(seed: int, *keys: str | int) -> float:
    """One number in [0, 1) for (seed, keys). Many times cheaper than a stream."""
    return int.from_bytes(_key_bytes(seed, keys)[:7]) / 2**56


def _key_bytes(seed: int, keys: tuple[str | int, ...]) -> bytes:
    return hashlib.sha256(json.dumps([seed, *keys]).encode("utf-8", "surrogatepass")).digest()
