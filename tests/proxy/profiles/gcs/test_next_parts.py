"""The next part of a resumable upload: a key that ends while it is made ends it at that piece."""

import os
from collections.abc import AsyncIterator

import pytest

from envelope.errors import KeyUnavailableError
from envelope.keys import KeyId, KeyMaterial, KeyState
from envelope.objects import sealed_length
from proxy.keys.cache import KeyCache
from proxy.messages.checksums import Crc32C
from proxy.profiles.gcs.next_parts import NextPart
from proxy.profiles.gcs.sessions import Known, State
from tests.fakes.clock import ManualClock
from tests.proxy.profiles.gcs.upload_world import OWNER

PIECES = [os.urandom(40_000) for _ in range(3)]
SIZE_BYTES = sum(map(len, PIECES))


class Ending:
    """Content in three pieces; the key ends before piece *before* of the reading *reading*; 3: behind all."""

    def __init__(self, reading: int, before: int) -> None:
        secret = bytearray(os.urandom(32))
        active = KeyMaterial(
            owner=OWNER, key_id=KeyId.random(), state=KeyState.ACTIVE, version=1, secret=secret
        )
        self.keys = KeyCache(ManualClock())
        self.keys.install(OWNER, [active], deadline_boot_s=1e9)
        self.key = self.keys.sealing_key(OWNER)
        self.state = State(ref=bytes(range(16)), secrets=Known().sealed(self.key, bytes(range(16))))
        self._at = (reading, before)
        self._reading = 0

    async def content(self) -> AsyncIterator[bytes]:
        self._reading += 1
        for number, piece in enumerate(PIECES):
            self._end_at(number)
            yield piece
        self._end_at(len(PIECES))

    def _end_at(self, number: int) -> None:
        if (self._reading, number) == self._at:
            self.keys.withdraw(OWNER)

    async def part(self) -> NextPart:
        return await NextPart.of(self.key, self.state, self.content, also=Crc32C(), is_last=True)


async def test_a_key_that_holds_makes_all_of_it() -> None:
    part = await Ending(0, 0).part()
    made = b"".join([piece async for piece in part.stored()])
    assert part.part.stored_bytes == sealed_length(SIZE_BYTES)
    assert len(made) == part.end > part.part.stored_bytes, "the manifest is behind it"


@pytest.mark.parametrize("before", range(3))
async def test_a_key_that_ends_ends_the_first_reading_at_that_piece(before: int) -> None:
    ending, told = Ending(1, before), Crc32C()
    with pytest.raises(KeyUnavailableError):
        await NextPart.of(ending.key, ending.state, ending.content, also=told, is_last=True)
    so_far = Crc32C()
    for piece in PIECES[:before]:
        so_far.update(piece)
    assert told.digest() == so_far.digest(), "nothing is read on"


@pytest.mark.parametrize("before", range(4))
async def test_a_key_that_ends_ends_the_sending_at_that_piece(before: int) -> None:
    part = await Ending(2, before).part()
    made = bytearray()

    async def send() -> None:
        async for piece in part.stored():
            made.extend(piece)

    with pytest.raises(KeyUnavailableError):
        await send()
    assert len(made) <= sealed_length(sum(map(len, PIECES[:before])))
