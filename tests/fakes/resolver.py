"""Name servers that do not answer, for aiohttp's clients."""

import asyncio
from typing import Never, override

import pytest
from aiohttp.abc import AbstractResolver


def silent_name_servers(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """From now on, for clients that are made from now on; the event is set when one waits for a name."""
    asked = asyncio.Event()

    class Silent(AbstractResolver):
        def __init__(self, **_options: object) -> None:
            pass

        @override
        async def resolve(self, host: str, port: int = 0, family: object = 0) -> Never:
            asked.set()
            await asyncio.Event().wait()
            raise AssertionError("unreachable: nobody sets it")

        @override
        async def close(self) -> None:
            pass

    monkeypatch.setattr("aiohttp.connector.DefaultResolver", Silent)
    return asked
