"""The part of a resumable upload that follows on its state, as it will be stored.

1. Its content is read twice: once for its digest, of which its salt is made, and once more for every time
   that it is sent. The same content gives the same bytes each time.
2. What goes up begins with what was carried; it ends with a whole granule, or with the object's own end.
3. The key is asked at every piece.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from typing import Final

from envelope.multipart import Part, part_sealer, seal_ending
from envelope.objects import Sealer, sealed_length
from proxy.keys.data_key import DataKey
from proxy.messages.checksums import Crc32C
from proxy.profiles.gcs.sessions import GRANULE_BYTES, State

type Content = Callable[[], AsyncIterator[bytes]]
"""Reads the part's plaintext, from its beginning, as often as it is called."""


class NextPart:
    """Use `NextPart.of`. `begin`, `end`: which stored bytes of the object go up with it."""

    def __init__(
        self, key: DataKey, state: State, content: Content, *, size_bytes: int, digest: bytes, is_last: bool
    ) -> None:
        self._key: Final = key
        self._state: Final = state
        self._content: Final = content
        self._digest: Final = digest
        self._number: Final = state.next_number
        stored_bytes = sealed_length(size_bytes)
        self.is_last: Final = is_last
        self.stop: Final = state.plain_bytes + size_bytes
        """Of the content: what is sealed when this part is."""
        self.part: Final = Part(self._number, stored_bytes, self._sealer().commitment)
        self._ending: Final = self._sealed_ending() if is_last else b""
        there = len(state.carry) + stored_bytes + len(self._ending)
        self._sending = there if is_last else there // GRANULE_BYTES * GRANULE_BYTES
        self._carried = there - self._sending
        self._tail: bytes | None = None
        self.begin: Final = state.sent_bytes
        self.end: Final = state.sent_bytes + self._sending

    @classmethod
    async def of(
        cls, key: DataKey, state: State, content: Content, *, also: Crc32C, is_last: bool
    ) -> "NextPart":
        """*also* is told the content, too. RefusedError(TOO_MANY_CHUNKS)."""
        sha256, size_bytes = hashlib.sha256(), 0
        async for piece in content():
            key.check()
            sha256.update(piece)
            also.update(piece)
            size_bytes += len(piece)
        return cls(key, state, content, size_bytes=size_bytes, digest=sha256.digest(), is_last=is_last)

    def _sealer(self) -> Sealer:
        return part_sealer(
            self._key.object_key,
            self._key.owner,
            self._key.key_id,
            upload=self._state.ref,
            number=self._number,
            content_sha256=self._digest,
        )

    def _sealed_ending(self) -> bytes:
        manifest = self._state.manifest_with(self.part)
        return seal_ending(
            self._key.object_key, self._key.owner, self._key.key_id, manifest, is_synthetic=True
        )

    async def stored(self) -> AsyncIterator[bytes]:
        """From `begin` on, all that there is: more than goes up, where the rest is carried."""
        tail = bytearray()
        async for piece in self._pieces():
            tail += piece
            del tail[: -max(self._carried, 1)]
            yield piece
        self._tail = bytes(tail[len(tail) - self._carried :])

    async def _pieces(self) -> AsyncIterator[bytes]:
        yield self._state.carry
        sealer = self._sealer()
        async for piece in self._content():
            self._key.check()
            yield bytes(sealer.update(piece))
            await asyncio.sleep(0)
        self._key.check()
        yield sealer.finalize()
        yield self._ending

    async def carry(self) -> bytes:
        """What is left behind `end`: less than a granule."""
        if self._tail is None:
            async for _ in self.stored():
                pass
        return self._tail or b""


async def cut(pieces: AsyncIterator[bytes], start: int, stop: int) -> AsyncIterator[bytes]:
    """Bytes [start, stop) of all that *pieces* make; they are read to their end."""
    at = 0
    async for piece in pieces:
        low, high = max(start - at, 0), min(stop - at, len(piece))
        at += len(piece)
        if low < high:
            yield piece[low:high]
