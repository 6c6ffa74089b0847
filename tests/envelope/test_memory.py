"""Overwriting secrets where they lie."""

import base64
import ctypes
import json
import os
import sys

from envelope.memory import wipe, wipe_text


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
        text = chr(value)
        wipe_text(text)
        assert ord(text) == value
    wipe(b"")
    wipe_text("")
    assert bytes(0) == b""
    assert len("") == 0


def test_every_character_is_overwritten() -> None:
    for size in (2, 43, 400, 70_000):
        secret = base64.b64encode(os.urandom(size)).decode()[:size]
        copy = bytearray(secret.encode())
        begin = id(secret) + sys.getsizeof(secret) - 1 - size
        assert ctypes.string_at(begin, size) == copy
        wipe_text(secret)
        assert ctypes.string_at(begin, size + 1) == bytes(size + 1), "and not a byte more is touched"
        assert secret == "\0" * size


def test_text_as_json_returns_it_can_be_overwritten() -> None:
    """The parser remembers names of members, not values: nobody else sees them change."""
    document = json.dumps({"km": "c2VjcmV0c2VjcmV0", "same": "c2VjcmV0c2VjcmV0", "c2VjcmV0c2VjcmV0": 1})
    parsed = json.loads(document)
    wipe_text(parsed["km"])
    assert parsed["km"] == "\0" * 16
    assert parsed["same"] == "c2VjcmV0c2VjcmV0"
    assert json.loads(document)["km"] == "c2VjcmV0c2VjcmV0"


def test_text_that_is_no_ascii_is_left_alone() -> None:
    text = "é" * 40 + str(os.getpid())
    copy = list(text)
    wipe_text(text)
    assert list(text) == copy
