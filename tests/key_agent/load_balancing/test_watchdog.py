"""The watchdog beside a real HAProxy, and beside one that does not listen to it."""

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog

from key_agent.load_balancing.haproxy_config import haproxy_config
from key_agent.load_balancing.settings import Settings
from key_agent.load_balancing.watchdog import Watchdog
from runtime.clock import Clock, SystemClock
from tests.fakes.clock import ManualClock
from tests.key_agent.conftest import until
from tests.key_agent.load_balancing.balanced import (
    Caller,
    DataPlane,
    haproxy_running,
    planes_running,
    settings_for,
    until_answers,
)
from tests.ports import free_port

type Lines = list[MutableMapping[str, Any]]
WAIT_S = 60


@asynccontextmanager
async def answering(port: int) -> AsyncIterator[None]:
    """In the lb-agent's place: every server is up."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readline()
            writer.write(b"up ready 100%\n")
            await writer.drain()
        except OSError:
            pass
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", port):
        yield


@asynccontextmanager
async def haproxy(path: Path, answers: bytes) -> AsyncIterator[list[str]]:
    """In HAProxy's place: it answers every command so; yields what it was asked."""
    asked: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readline()).decode().strip())
        writer.write(answers)
        writer.close()

    async with await asyncio.start_unix_server(answer, path):
        yield asked


@asynccontextmanager
async def watching(settings: Settings, *, port: int, clock: Clock | None = None) -> AsyncIterator[Lines]:
    """A watchdog of the lb-agent at *port*; yields what it logs."""
    path = settings.frontend.stats_socket
    assert path is not None
    dog = Watchdog(
        host="127.0.0.1",
        port=port,
        servers=[server.name for server in settings.servers],
        socket_path=path,
        clock=clock or SystemClock(),
        every_s=0.05,
    )
    with structlog.testing.capture_logs() as lines:
        task = asyncio.create_task(dog.run())
        try:
            yield lines
        finally:
            task.cancel()
            await asyncio.wait([task])


def said(lines: Lines) -> list[str]:
    return [str(line["event"]) for line in lines]


async def test_it_acts_when_the_lb_agent_is_gone(tmp_path: Path) -> None:
    """B-52: HAProxy leaves a server as it was when its agent is silent; the watchdog does not."""
    planes = [DataPlane("a"), DataPlane("b")]
    settings = settings_for(planes, tmp_path)
    port = settings.lb_agent.port
    async with (
        planes_running(planes),
        haproxy_running(haproxy_config(settings), tmp_path),
        Caller(settings.frontend.bind) as caller,
    ):
        async with answering(port), watching(settings, port=port):
            await until_answers(caller, {"a", "b"})
        async with answering(port), watching(settings, port=free_port()) as lines:
            seen: set[str] = set()
            async with asyncio.timeout(WAIT_S):
                while "503" not in seen:
                    seen |= set(await caller.count(6))
            await until(
                lambda: "the lb-agent is silent: every server is set down" in said(lines), timeout_s=WAIT_S
            )
        async with answering(port):
            await until_answers(caller, {"a", "b"})  # the next `up` undoes it


async def test_the_second_look_without_an_answer_sets_every_server_down(tmp_path: Path) -> None:
    settings = settings_for([DataPlane("a"), DataPlane("b")], tmp_path)
    path, clock = settings.frontend.stats_socket, ManualClock()
    assert path is not None
    async with haproxy(path, b"\n") as asked, watching(settings, port=free_port(), clock=clock):
        await clock.wait_for_sleepers()
        first = settings.servers[0].name
        assert asked == [f"get weight any/{first}"], "one look may be lost"
        clock.shift(1)
        await until(lambda: len(asked) == 1 + len(settings.servers), timeout_s=WAIT_S)
        assert asked[1:] == [f"set server any/{server.name} agent down" for server in settings.servers]


@pytest.mark.parametrize("answers", [b"Permission denied\n", b"No such server.\n", None])
async def test_nothing_is_said_to_be_down_that_haproxy_has_not_confirmed(
    tmp_path: Path, answers: bytes | None
) -> None:
    settings = settings_for([DataPlane("a")], tmp_path)
    path = settings.frontend.stats_socket
    assert path is not None
    cause = str(path) if answers is None else answers.decode().strip()
    port = free_port()
    async with asyncio.timeout(WAIT_S):
        if answers is None:
            await _told_of(settings, port, cause)
        else:
            async with haproxy(path, answers):
                await _told_of(settings, port, cause)


async def _told_of(settings: Settings, port: int, cause: str) -> None:
    async with watching(settings, port=port) as lines:
        async with answering(port):
            pass  # the port is free again: nobody answers there
        await until(lambda: any("AND HAPROXY CANNOT" in event for event in said(lines)), timeout_s=WAIT_S)
        assert not [event for event in said(lines) if "set down" in event]
        assert all(cause in str(line["cause"]) for line in lines if "cause" in line)


async def test_that_haproxy_cannot_be_told_is_known_before_it_is_needed(tmp_path: Path) -> None:
    settings = settings_for([DataPlane("a")], tmp_path)
    path = settings.frontend.stats_socket
    assert path is not None
    port = free_port()
    async with answering(port), watching(settings, port=port) as lines:
        before = "HAProxy cannot be told: were the lb-agent silent, servers would stay as they are"
        await until(lambda: before in said(lines), timeout_s=WAIT_S)
        async with haproxy(path, b"100 (initial 100)\n"):
            after = "the lb-agent answers, HAProxy can be told"
            await until(lambda: after in said(lines), timeout_s=WAIT_S)


async def test_a_group_may_use_the_socket_if_the_settings_say_so(tmp_path: Path) -> None:
    settings = settings_for([DataPlane("a")], tmp_path)
    assert "mode 600 level admin" in haproxy_config(settings)
    shared = msgspec.structs.replace(settings.frontend, stats_socket_group="haproxy")
    assert "mode 660 group haproxy level admin" in haproxy_config(
        msgspec.structs.replace(settings, frontend=shared)
    )
    with pytest.raises(ValueError, match="not a group"):
        msgspec.structs.replace(settings.frontend, stats_socket_group="a user root")
