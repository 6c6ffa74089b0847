"""Sealed bytes that have to wait: for a length, or for a service that takes them in pieces of its own size.

1. Ciphertext only: what is written here was sealed before. Names, keys, plaintext never are.
2. Files have no name: an unlinked file ends with the process, whatever ends it.
3. All spools of a process together hold at most `limit_bytes`, those of a tenant its share of that; who comes
   too late is told to come again (shares.py).
4. A little is held in memory, so that small uploads touch no disk.
"""

import asyncio
import os
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from envelope.errors import MisuseError
from proxy import refusals
from proxy.bodies.shares import DEFAULT_SHARE, Shares
from proxy.refusals import RefusedError

MEMORY_BYTES: Final = 256 * 1024
PIECE_BYTES: Final = 256 * 1024
LIMIT_BYTES: Final = 1024 * 1024 * 1024


class Spools:
    """All spools of a process. *directory* None: the system's own for temporary files."""

    def __init__(
        self,
        *,
        limit_bytes: int = LIMIT_BYTES,
        share: float = DEFAULT_SHARE,
        directory: Path | None = None,
    ) -> None:
        self._shares = Shares(
            limit_bytes=limit_bytes,
            share=share,
            full=refusals.SPOOL_FULL,
            share_full=refusals.SPOOL_SHARE,
        )
        self._directory = directory

    @property
    def held_bytes(self) -> int:
        return self._shares.held_bytes

    def open(self, tenant: str) -> "Spool":
        """An empty spool for *tenant*; whoever opens it closes it."""
        return Spool(self._shares, tenant, self._directory)


class Spool:
    """Written once, read as often as wanted. Use as `with`, or close it."""

    def __init__(self, shares: Shares, tenant: str, directory: Path | None) -> None:
        self._shares = shares
        self._tenant = tenant
        self._directory = directory
        self._memory = bytearray()
        self._file: int | None = None
        self._is_closed = False
        self.size_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Let go of everything. Again: no harm."""
        if self._is_closed:
            return
        self._is_closed = True
        self._shares.give_back(self._tenant, self.size_bytes)
        self._memory = bytearray()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def write(self, piece: bytes | bytearray | memoryview) -> None:
        """Append. RefusedError(SPOOL_FULL, SPOOL_SHARE) if there is no room, on the disk either."""
        if self._is_closed:
            raise MisuseError("the spool is closed")
        self._shares.take(self._tenant, len(piece))
        self.size_bytes += len(piece)
        try:
            if self._file is None and len(self._memory) + len(piece) <= MEMORY_BYTES:
                self._memory += piece
                return
            if self._file is None:
                self._file = _nameless_file(self._directory)
                held, self._memory = self._memory, bytearray()
                _write(self._file, held)
            _write(self._file, piece)
        except OSError as error:
            raise RefusedError(refusals.SPOOL_FULL) from error

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop). MisuseError for what was not written."""
        if self._is_closed or not 0 <= start <= stop <= self.size_bytes:
            raise MisuseError(f"[{start}, {stop}) was not written, or the spool is closed")
        if self._file is None:
            return bytes(memoryview(self._memory)[start:stop])
        data = bytearray()
        while start + len(data) < stop:
            piece = os.pread(self._file, stop - start - len(data), start + len(data))
            if not piece:
                raise OSError("the spool is shorter than what was written")
            data += piece
        return bytes(data)

    async def pieces(self, start: int = 0, stop: int | None = None) -> AsyncGenerator[bytes]:
        """Bytes [start, stop) in pieces; the disk is read beside the event loop."""
        end = self.size_bytes if stop is None else stop
        while start < end:
            upto = min(start + PIECE_BYTES, end)
            if self._file is None:
                yield self.read(start, upto)
            else:
                yield await asyncio.to_thread(self.read, start, upto)
            start = upto


def _nameless_file(directory: Path | None) -> int:
    place = directory or Path(tempfile.gettempdir())
    try:
        return os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except (OSError, AttributeError):  # not every file system has it
        file, name = tempfile.mkstemp(dir=place)
        os.unlink(name)  # noqa: PTH108 - of what mkstemp gives
        return file


def _write(file: int, piece: bytes | bytearray | memoryview) -> None:
    view = memoryview(piece)
    while view:
        view = view[os.write(file, view) :]
