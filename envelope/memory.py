"""Overwriting secrets where they lie.

1. Best effort: what CPython, OpenSSL or a parser copied is not ours to find. So code that holds key material
   makes as few copies as it can, each of them by name, and overwrites those:
   `tests/integration/test_key_residue.py` searches processes for what is left.
2. A `bytearray` is overwritten by `secret[:] = bytes(len(secret))`, and never grown: that would move it and
   leave the old one behind. `bytes` and `str` are immutable to Python but not in memory: `wipe`, `wipe_text`.
3. Only for what nothing else holds, hashes or interns. CPython shares the empty ones and those of length 1:
   they are left alone, and hold no key.
"""

import ctypes
from typing import Final

_BYTES_HEADER: Final = bytes.__basicsize__ - 1
_TEXT_HEADER: Final = "".__sizeof__() - 1
"""Of ASCII text, which lies behind it with one byte per character (PEP 393)."""


def wipe(secret: bytes) -> None:
    """Overwrite *secret* in place."""
    if len(secret) > 1:
        ctypes.memset(id(secret) + _BYTES_HEADER, 0, len(secret))


def wipe_text(secret: str) -> None:
    """Overwrite *secret* in place if it is ASCII; no key is written otherwise."""
    if len(secret) > 1 and secret.isascii():
        ctypes.memset(id(secret) + _TEXT_HEADER, 0, len(secret))
