"""A worker process: a data plane that is told by its proxy what to hold and what to serve.

1. Started by link.py alone; dead as soon as its proxy is (the kernel sees to that), and when the socket pair
   ends.
2. It believes no key because its proxy says so: every envelope is opened and checked here, by the directory
   as this process has read it, with the private key of its network service.
3. SIGTERM is for whoever ends one worker on purpose: it drains as on Stop, and its proxy starts another.
4. Its audit log is a chain of its own, `audit-worker-<number>.jsonl`.
5. A directory that cannot be read for a moment is asked again; after RELOAD_PATIENCE_S the worker ends rather
   than serve what may have been taken back. Pictures of it are taken one after the other, and one that was
   acknowledged is served.
"""

import asyncio
import contextlib
import os
import socket
import sys
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog
from prometheus_client import generate_latest

from envelope.errors import SealgateError
from proxy import gate
from proxy.config import Settings, database_url
from proxy.data_plane import DataPlane
from proxy.environments import Environments
from proxy.keys.cache import KeyCache
from proxy.keys.receive import Receiver
from proxy.tenants.directory import DirectoryStore
from proxy.tenants.errors import DirectoryUnavailableError
from proxy.tenants.model import Directory
from proxy.workers import wire
from runtime import lifecycle
from runtime.audit import AuditLog
from runtime.cli import CommandError
from runtime.clock import SystemClock
from runtime.observe import REGISTRY, configure_logging

RELOAD_PATIENCE_S: Final = 20.0
RELOAD_STEP_S: Final = 0.5

_REFUSALS: Final = (SealgateError, CommandError, gate.UnknownEngineError, gate.SelfTestError, OSError)
_log: Final = structlog.get_logger("worker")


class _Ended(Exception):  # noqa: N818 - not an error
    """Nothing is left to do."""


class WorkerProcess:
    """One worker. `run` once."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._clock = SystemClock()
        self._plane: DataPlane | None = None
        self._receiver: Receiver | None = None
        self._store: DirectoryStore | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._environments = Environments()
        self._opened = False
        # One picture of the directory after the other: an older one that was read slowly must not follow a
        # newer one, nor may listeners open by one that was replaced while they opened.
        self._picturing = asyncio.Lock()

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until told to stop, by the proxy or by *stop*, or until the proxy is gone."""
        self._connection.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=self._connection)
        self._writer = writer
        request, start = await wire.read_request(reader)
        if not isinstance(start, wire.Start):
            raise wire.WireError(f"{type(start).__name__} instead of Start")
        settings = msgspec.json.decode(start.settings, type=Settings, dec_hook=_path)
        configure_logging(json=settings.log.json)
        structlog.contextvars.bind_contextvars(worker=start.number)
        try:
            async with contextlib.AsyncExitStack() as parts:
                try:
                    plane, keys = await self._prepared(parts, settings, start.number)
                except _REFUSALS as error:
                    self._fail(request, error)
                    return
                parts.push_async_callback(plane.stop, grace_s=0)
                self._answer(request, wire.Done())
                try:
                    async with asyncio.TaskGroup() as group:
                        group.create_task(keys.run_sweeper(), name="keys:sweep")
                        group.create_task(self._stopped(stop, settings.engine.drain_s), name="worker:stop")
                        await self._listen(reader, group)
                except* _Ended:
                    pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()  # what was answered last arrives

    async def _prepared(
        self, parts: contextlib.AsyncExitStack, settings: Settings, number: int
    ) -> tuple[DataPlane, KeyCache]:
        clock = self._clock
        audit = AuditLog.open(settings.proxy.worker_audit_file(number), clock, settings.audit)
        parts.callback(audit.close)
        store = await asyncio.to_thread(
            DirectoryStore.open,
            database_url(settings.proxy),
            settings.proxy.state_dir,
            clock=clock,
            migrate=False,
        )
        parts.callback(store.close)
        directory = await asyncio.to_thread(store.snapshot)
        keys = KeyCache(clock)
        parts.callback(keys.close)
        self._store = store
        self._receiver = Receiver(
            proxy_id=settings.proxy.id,
            cache=keys,
            audit=audit,
            clock=clock,
            validity_s=settings.keys.validity_s,
            directory=directory,
            is_durable=False,
        )
        environment = settings.environment
        self._environments = Environments(
            None if environment is None else environment.name, on_refused=keys.withdraw_tenant
        )
        plane = DataPlane(
            settings,
            keys=keys,
            audit=audit,
            clock=clock,
            directory=directory,
            registry=REGISTRY,
            environments=self._environments,
        )
        self._plane = await parts.enter_async_context(plane)
        audit.append("worker-started", worker=number, revision=directory.revision)
        parts.callback(audit.append, "worker-stopped", worker=number)
        return plane, keys

    async def _listen(self, reader: asyncio.StreamReader, group: asyncio.TaskGroup) -> None:
        while True:
            try:
                number, request = await wire.read_request(reader)
            except (EOFError, OSError):
                raise _Ended from None  # the proxy has gone: nobody would tell us what is withdrawn
            group.create_task(self._handle(number, request, group), name=f"worker:{type(request).__name__}")

    async def _handle(self, number: int, request: wire.Request, group: asyncio.TaskGroup) -> None:
        try:
            answer = await self._answered(request, group)
        except _REFUSALS as error:
            self._fail(number, error)
            raise _Ended from None
        self._answer(number, answer)
        if isinstance(request, wire.Stop):
            raise _Ended

    async def _answered(self, request: wire.Request, group: asyncio.TaskGroup) -> wire.Answer:
        plane, receiver, store = self._plane, self._receiver, self._store
        if plane is None or receiver is None or store is None:
            raise wire.WireError("not started")
        match request:
            case wire.Take(envelopes):
                receipts = await receiver.receive_relayed(envelopes)
                return wire.Taken(tuple(receipt.code for receipt in receipts))
            case wire.Tell(tenant, word):
                self._environments.put(tenant, word)
                return wire.Done(tuple(plane.problems))
            case wire.Ping():
                return wire.Done(tuple(plane.problems))
            case wire.Scrape():
                return wire.Scraped(generate_latest(REGISTRY))
            case wire.Reload(revision):
                async with self._picturing:
                    if receiver.directory.revision < revision:
                        directory = await self._snapshot(store)
                        receiver.apply(directory)
                        if self._opened:
                            await plane.apply(directory)
                return wire.Done(tuple(plane.problems))
            case wire.Open():
                async with self._picturing:
                    await plane.start(receiver.directory)
                    self._opened = True
                plane.tasks(group)
                return wire.Done(tuple(plane.problems), ports=tuple(plane.service_ports))
            case wire.Stop(grace_s):
                await plane.stop(grace_s=grace_s)
                return wire.Done()
            case wire.Start():
                raise wire.WireError("started already")

    async def _snapshot(self, store: DirectoryStore) -> Directory:
        """Rule 5. DirectoryUnavailableError."""
        end_s = self._clock.boot_s() + RELOAD_PATIENCE_S
        while True:
            try:
                return await asyncio.to_thread(store.snapshot)
            except DirectoryUnavailableError:
                if self._clock.boot_s() >= end_s:
                    raise
            await self._clock.sleep(RELOAD_STEP_S)

    async def _stopped(self, stop: asyncio.Event, drain_s: float) -> None:
        """Rule 3."""
        await stop.wait()
        if self._plane is not None:
            await self._plane.stop(grace_s=drain_s)
        raise _Ended

    def _answer(self, number: int, answer: wire.Answer) -> None:
        if self._writer is not None:
            self._writer.write(wire.encode(number, answer))

    def _fail(self, number: int, error: Exception) -> None:
        cause = error.cause if isinstance(error, CommandError) else str(error)
        next_step = getattr(error, "next_step", "")
        _log.error("worker ends", cause=cause)
        self._answer(number, wire.Failed(cause, next_step if isinstance(next_step, str) else ""))


def _path(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"{kind.__name__} from {type(value).__name__}")


def main() -> None:
    """`python -I -m proxy.workers.worker_main PARENT_PID FD`, started by link.py only."""
    parent, descriptor = int(sys.argv[1]), int(sys.argv[2])
    lifecycle.end_with_parent(parent)
    os.set_inheritable(descriptor, False)
    warnings = lifecycle.harden_process()
    del warnings  # the proxy, hardened alike, has told them
    lifecycle.raise_open_files()
    lifecycle.run(WorkerProcess(socket.socket(fileno=descriptor)).run)


if __name__ == "__main__":
    main()
