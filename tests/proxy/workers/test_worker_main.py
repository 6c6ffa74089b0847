"""The order in which a worker takes pictures of the directory: what was acknowledged is in force."""

import asyncio
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from proxy.workers import wire
from proxy.workers.worker_main import WorkerProcess


class Receiver:
    def __init__(self) -> None:
        self.directory = picture(1)

    def apply(self, directory: Any) -> None:
        self.directory = directory


class Plane:
    """Opens its listeners by one picture, and then takes its time, as the engine does."""

    problems = ()
    service_ports = ()

    def __init__(self) -> None:
        self.served = 0
        self.opening = asyncio.Event()
        self.may_open = asyncio.Event()

    async def start(self, directory: Any) -> None:
        self.served = directory.revision
        self.opening.set()
        await self.may_open.wait()

    async def apply(self, directory: Any) -> None:
        self.served = directory.revision

    def tasks(self, group: object) -> None:
        assert group is not None


def picture(revision: int) -> Any:
    return SimpleNamespace(revision=revision)


@pytest.fixture
def worker() -> Iterator[Any]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        made: Any = WorkerProcess(ours)
        made._plane, made._receiver, made._store = Plane(), Receiver(), object()
        yield made


async def test_what_is_revoked_while_the_listeners_open_is_not_served_once_acknowledged(worker: Any) -> None:
    async def snapshot(_store: object) -> Any:
        return picture(2)

    worker._snapshot = snapshot
    async with asyncio.TaskGroup() as group:
        opening = group.create_task(worker._answered(wire.Open(), group))
        await worker._plane.opening.wait()
        reload = group.create_task(worker._answered(wire.Reload(2), group))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not reload.done() or worker._plane.served == 2
        worker._plane.may_open.set()
        await asyncio.gather(opening, reload)
    assert worker._plane.served == 2


async def test_an_older_picture_that_was_read_slowly_does_not_follow_a_newer_one(worker: Any) -> None:
    newer_is_read = asyncio.Event()
    pictures = iter((2, 3))

    async def snapshot(_store: object) -> Any:
        revision = next(pictures)
        if revision == 2:
            for _ in range(20):  # the other one has every chance to pass
                await asyncio.sleep(0)
        else:
            newer_is_read.set()
        return picture(revision)

    worker._snapshot = snapshot
    worker._plane.may_open.set()
    async with asyncio.TaskGroup() as group:
        await worker._answered(wire.Open(), group)
        await asyncio.gather(*(worker._answered(wire.Reload(revision), group) for revision in (2, 3)))
    assert newer_is_read.is_set()
    assert worker._plane.served == 3
    assert worker._receiver.directory.revision == 3
