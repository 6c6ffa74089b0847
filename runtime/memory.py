"""Overwriting secrets where they lie.

1. Best effort (shared reference hsm.md, "Memory"): what CPython, OpenSSL or a parser copied is not ours to
   find. It works for the copies that we make, and those last longest.
2. A `bytearray` is overwritten by `secret[:] = bytes(len(secret))`; `bytes` are immutable to Python but not
   in memory: `wipe`.
"""

import ctypes
from typing import Final

_BYTES_HEADER: Final = bytes.__basicsize__ - 1


def wipe(secret: bytes) -> None:
    """Overwrite *secret* in place. Only for `bytes` that nothing else holds, hashes or interns.

    CPython shares the empty one and those of length 1: they are left alone, and hold no key.
    """
    if len(secret) > 1:
        ctypes.memset(id(secret) + _BYTES_HEADER, 0, len(secret))
