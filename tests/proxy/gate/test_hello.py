"""A ClientHello: any way of cutting it is understood, none that grows without an end is collected."""

import itertools
import random
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.gate.hello import MAX_HELLO_BYTES, Hello

BODY = bytes(range(256)) * 9


def record(data: bytes) -> bytes:
    return b"\x16\x03\x01" + struct.pack("!H", len(data)) + data


def hello(body: bytes = BODY) -> bytes:
    return b"\x01" + len(body).to_bytes(3) + body


def decided_at(stream: bytes, step: int) -> int | None:
    """How many bytes were there when it was decided."""
    looked, buffer = Hello(), bytearray()
    for at in range(0, len(stream), step):
        buffer += stream[at : at + step]
        if looked.is_decided(buffer):
            return len(buffer)
    return None


@given(
    cuts=st.lists(st.integers(1, len(BODY) + 3), max_size=8, unique=True),
    step=st.integers(1, 400),
    rest=st.binary(max_size=20),
)
def test_it_is_whole_at_its_last_byte(cuts: list[int], step: int, rest: bytes) -> None:
    message = hello()
    edges = [0, *sorted(cuts), len(message)]
    pieces = [message[begin:end] for begin, end in itertools.pairwise(edges) if begin != end]
    stream = b"".join(map(record, pieces))
    at = decided_at(stream + rest, step)
    assert at is not None
    assert at - step < len(stream) <= at
    assert decided_at(stream[:-1], step) is None


@pytest.mark.parametrize(
    "stream",
    [b"\x17\x03\x01\x00\x01a", b"GET / HTTP/1.1", b"\x16\x03\x01\x00\x00", record(b"\x01") + b"PUT /x"],
)
def test_what_is_none_is_decided_too(stream: bytes) -> None:
    assert decided_at(stream, 1) is not None


def test_each_byte_is_looked_at_once() -> None:
    """The smallest records, byte by byte: what costs mitmproxy minutes."""
    stream = b"".join(record(bytes([byte])) for byte in hello(random.Random(1).randbytes(1 << 16)))
    began_s = time.process_time()
    assert decided_at(stream[:MAX_HELLO_BYTES], 1) is None
    assert time.process_time() - began_s < 5  # 0.06 s
