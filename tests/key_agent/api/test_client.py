"""Whoever asks finds the agent that runs, or hears that none does."""

import asyncio
from pathlib import Path

from key_agent.api import client, server
from tests.key_agent.conftest import Bench


async def test_nobody_listens_is_none_and_no_error(tmp_path: Path, bench: Bench) -> None:
    assert await client.call(tmp_path / "control.sock", "status", {}) is None
    # Left behind by an agent that was killed.
    path = tmp_path / "control.sock"
    left = await asyncio.start_unix_server(lambda *_: None, path)
    left.close()
    await left.wait_closed()
    if not path.exists():  # Python >= 3.13 removes it
        path.touch()
    assert await client.call(path, "status", {}) is None
    async with bench.agent() as (_, operations), server.control_socket(operations, path):
        assert await client.call(path, "status", {}) is not None
