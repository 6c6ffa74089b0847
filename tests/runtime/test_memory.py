"""Overwriting secrets where they lie."""

import ctypes
import os

from runtime.memory import wipe


def _as_it_lies(address: int, size: int) -> bytes:
    return ctypes.string_at(address + bytes.__basicsize__ - 1, size)


def test_every_byte_is_overwritten() -> None:
    for size in (2, 31, 32, 33, 4096):
        secret = os.urandom(size)
        copy = bytearray(secret)
        address = id(secret)
        assert _as_it_lies(address, size) == copy
        wipe(secret)
        assert _as_it_lies(address, size) == bytes(size)
        assert secret == bytes(size)
        assert copy != bytes(size)


def test_what_python_shares_is_left_alone() -> None:
    for value in range(256):
        shared = bytes([value])
        wipe(shared)
        assert shared[0] == value
    wipe(b"")
    assert bytes(0) == b""
