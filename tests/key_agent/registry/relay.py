"""The network between agent and PostgreSQL, in the test's hands: a Unix socket before the server's own."""

import asyncio
import contextlib
from pathlib import Path

SOCKET_NAME = ".s.PGSQL.5432"


class Relay:
    """Passes bytes on, except for the one answer that it is told to lose."""

    def __init__(self, server: Path) -> None:
        self._server = server / SOCKET_NAME
        self._writers: set[asyncio.StreamWriter] = set()
        self._listener: asyncio.Server | None = None
        self._loses_commit = False
        self._mark = b""
        self.lost = asyncio.Event()
        """The answer to a COMMIT was lost."""

    async def open(self, directory: Path) -> str:
        """Listen in *directory*; the URL to use."""
        self._listener = await asyncio.start_unix_server(self._serve, directory / SOCKET_NAME)
        return f"postgresql+psycopg://sealgate@/sealgate?host={directory}"

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self.cut()
            await self._listener.wait_closed()

    def cut(self) -> None:
        """Every connection ends now."""
        for writer in self._writers:
            writer.transport.abort()

    def lose_the_next_commit(self, *, after: bytes) -> None:
        """The server commits the next transaction that sent *after*; nobody hears of it: the network dies."""
        self._mark = after
        self._loses_commit = True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            behind_reader, behind_writer = await asyncio.open_unix_connection(self._server)
        except OSError:
            writer.transport.abort()
            return
        mine = {writer, behind_writer}
        self._writers |= mine
        state = {"marked": False, "loses": False}
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_queries(reader, behind_writer, state))
                group.create_task(self._pass_answers(behind_reader, writer, state))
        except* (OSError, EOFError):
            pass
        finally:
            self._writers -= mine
            for one in mine:
                one.transport.abort()

    async def _pass_queries(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, state: dict[str, bool]
    ) -> None:
        while data := await reader.read(65_536):
            if self._loses_commit and self._mark in data:
                state["marked"] = True
            if state["marked"] and b"COMMIT" in data:
                self._loses_commit = state["marked"] = False
                state["loses"] = True
            writer.write(data)
            await writer.drain()
        raise EOFError

    async def _pass_answers(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, state: dict[str, bool]
    ) -> None:
        while data := await reader.read(65_536):
            if state["loses"]:
                self.lost.set()
                break
            writer.write(data)
            with contextlib.suppress(OSError):
                await writer.drain()
        raise EOFError
