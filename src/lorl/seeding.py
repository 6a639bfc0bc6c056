"""Counted randomness: every draw's seed is a hash of what the draw is for, so nothing is carried from draw to draw."""

import hashlib
import json


def stable_seed(*parts: int | str) -> int:
    """A 63-bit seed from `parts`, the same on every machine, Python version and process (`hash()` is salted).

    The parts are hashed as JSON, so ("1", "2"), ("12",) and (1, 2) differ. BLAKE2b rather than a sum or xor of the
    parts: generators started at adjacent seeds (as reasoning_gym does, seed + index) must not overlap.
    """
    text = json.dumps(parts, ensure_ascii=True, separators=(",", ":"))
    digest = hashlib.blake2b(text.encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
