"""Seeds of random numbers that processes draw alike."""

import hashlib


def seed_from(*parts: object) -> int:
    """A seed that follows from all parts (numbers, strings, tuples), the same in every process, unlike ``hash``."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")
