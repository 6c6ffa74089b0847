"""A body kept aside while it is on its way: in memory while it is small, else in a nameless file, sealed.

1. What is on disk is sealed by a key that is drawn for this one body and stands in this process's memory
   only: when the process ends, however it ends, nobody can read it any more.
2. Each piece is sealed under its number (AES-256-GCM), so pieces cannot change places; the file has no name.
3. It is written once, then read, as often as it takes.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from types import TracebackType
from typing import IO, Final, Self

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

PIECE_BYTES: Final = 1 << 20
_NONCE_SIZE: Final = 12
_TAG_SIZE: Final = 16


class Spool:
    """Use as a context manager. OSError: the disk is full."""

    def __init__(self, *, whole_bytes: int) -> None:
        """Up to *whole_bytes* stay in memory."""
        self._whole_bytes = whole_bytes
        self._piece = bytearray()
        self._pieces = 0
        self._file: IO[bytes] | None = None
        self._key = AESGCM(AESGCM.generate_key(256))
        self.size_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._piece[:] = bytes(len(self._piece))
        if self._file is not None:
            self._file.close()

    async def write(self, data: bytes) -> None:
        """Append *data*."""
        self._piece += data
        self.size_bytes += len(data)
        if self.size_bytes > self._whole_bytes:
            while len(self._piece) >= PIECE_BYTES:
                await asyncio.to_thread(self._put_away)

    def _put_away(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed by __exit__
        piece, self._piece = self._piece[:PIECE_BYTES], self._piece[PIECE_BYTES:]
        sealed = self._key.encrypt(self._nonce(self._pieces), piece, None)
        written = 0
        while written < len(sealed):
            written += self._file.write(sealed[written:])
        self._pieces += 1

    async def read(self) -> AsyncIterator[bytes]:
        """All of it, in pieces."""
        for number in range(self._pieces):
            yield await asyncio.to_thread(self._take, number)
        if self._piece:
            yield bytes(self._piece)

    def _take(self, number: int) -> bytes:
        if self._file is None:
            raise AssertionError("unreachable: pieces are in a file")
        size = PIECE_BYTES + _TAG_SIZE
        self._file.seek(number * size)
        sealed = bytearray()
        while len(sealed) < size and (data := self._file.read(size - len(sealed))):
            sealed += data
        return self._key.decrypt(self._nonce(number), bytes(sealed), None)

    @staticmethod
    def _nonce(number: int) -> bytes:
        return number.to_bytes(_NONCE_SIZE)
