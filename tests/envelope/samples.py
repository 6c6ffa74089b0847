"""What the envelope tests seal and open with: fixed names, made-up keys, patterned plaintext."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Protocol

import pytest

from envelope import derive
from envelope.errors import SealgateError
from envelope.keys import KeyId, NetworkService
from envelope.objects import Bind, Header, Opener, Sealer

OWNER: Final = NetworkService("tenant-a", "drive")
OTHER_TENANT: Final = NetworkService("tenant-b", "drive")
OTHER_SERVICE: Final = NetworkService("tenant-a", "drive2")
KEY_ID: Final = KeyId(bytes(range(0xA0, 0xB0)))
MATERIAL: Final = bytes(range(32))
OTHER_MATERIAL: Final = bytes(range(1, 33))
OBJECT_KEY: Final = derive.object_key(MATERIAL, OWNER, KEY_ID)
FIELD_KEY: Final = derive.field_key(MATERIAL, OWNER, KEY_ID)
DETERMINISTIC_KEY: Final = derive.deterministic_key(MATERIAL, OWNER, KEY_ID)
PATH: Final = "$.customer.name"

BOUNDARY_LENGTHS: Final = (0, 1, 15, 16, 17, 16383, 16384, 16385, 32767, 32768, 32769, 49151, 49152, 49153)


class Feedable(Protocol):
    def update(self, piece: bytes, /) -> bytearray: ...
    def finalize(self) -> bytes: ...


def pattern(size: int) -> bytes:
    """*size* bytes without a period that chunks could hide in."""
    return hashlib.shake_128(b"plaintext").digest(size)


def cut(data: bytes, step: int) -> Iterator[bytes]:
    """*data* in pieces of *step* bytes."""
    return (data[at : at + step] for at in range(0, len(data), step))


def run(stream: Feedable, pieces: Iterable[bytes]) -> bytes:
    """All that comes out of *stream*, or what it raises."""
    out = bytearray()
    for piece in pieces:
        out += stream.update(piece)
    return bytes(out + stream.finalize())


def refused(
    stream: Feedable, pieces: Iterable[bytes], expected: type[SealgateError] | tuple[type[SealgateError], ...]
) -> bytes:
    """What *stream* gave away before it raised *expected*, which it must, and again whatever follows."""
    out = bytearray()
    try:
        for piece in pieces:
            out += stream.update(piece)
        stream.finalize()
    except expected as error:
        for _ in range(2):
            with pytest.raises(type(error), match=f"^{re.escape(str(error))}$"):
                stream.finalize()
            with pytest.raises(type(error)):
                stream.update(b"")
        return bytes(out)
    pytest.fail("was not refused")


def always(key: bytes = OBJECT_KEY) -> Callable[[Header], bytes]:
    """A key finder that knows one key and gives it for every header."""
    return lambda _: key


def seal(
    plain: bytes,
    *,
    key: bytes = OBJECT_KEY,
    owner: NetworkService = OWNER,
    key_id: KeyId = KEY_ID,
    bind: Bind = Bind.NOTHING,
    name: bytes = b"",
) -> bytes:
    return run(Sealer(key, owner, key_id, bind=bind, name=name), [plain])


def unseal(
    sealed: bytes,
    *,
    key: bytes = OBJECT_KEY,
    owner: NetworkService = OWNER,
    bind: Bind = Bind.NOTHING,
    name: bytes = b"",
) -> bytes:
    return run(Opener(owner, always(key), bind=bind, name=name), [sealed])
