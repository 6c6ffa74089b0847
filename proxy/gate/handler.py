"""The guarded connection handler: whatever goes wrong round a flow ends every socket of that client.

1. A crash below the streams, an exception of a hook that decides, a task that dies: abort, never carry on.
   mitmproxy logs and forwards (hooks), or logs and leaves both sockets open ("mitmproxy has crashed!").
2. A hook of a flow that raises, or halts the others, revokes the permit of that flow; its siblings live.
3. Only protocols on the list below are spoken. What mitmproxy would relay raw is closed instead. A tunnel
   exists only where `tls_clienthello` chose it (`ignore_connection`). One or two bytes that could begin TLS
   decide nothing: more is waited for.
4. No socket outlives its task. mitmproxy leaves it open if a task is cancelled where it does not expect it.
5. A connection that is cut is reset at once; buffered bytes do not make it linger.
6. Log texts carry no payload: mitmproxy's assertions and protocol errors quote what was sent.
7. A client that gets no place (`places`) is reset before a byte is read. Who comes to the end of his time
   (`deadlines`) is closed if nothing was under way, else reset: a body must not seem to end there.
"""

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import logging
import resource
import socket
import struct
import sys
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, cast, override

from mitmproxy import addonmanager, exceptions
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.connection import Client, Connection, ConnectionState
from mitmproxy.flow import Flow
from mitmproxy.http import HTTPFlow
from mitmproxy.master import Master
from mitmproxy.proxy import commands, events, layer, layers
from mitmproxy.proxy.layers import http, modes

from proxy import refusals
from proxy.gate.deadlines import Deadlines, Phase
from proxy.gate.failures import origin_of
from proxy.gate.h2 import BackpressureHandler
from proxy.gate.keeper import Kept, SettleHook, keep
from proxy.gate.permit import permit
from proxy.gate.places import Places
from proxy.limits import ClientLimits
from proxy.refusals import Refusal

TOP_LAYERS: Final = (modes.HttpProxy, modes.HttpUpstreamProxy, modes.ReverseProxy, modes.TransparentProxy)
PROTOCOLS: Final = (*TOP_LAYERS, http.HttpLayer, layers.ClientTLSLayer, layers.ServerTLSLayer)

# Options of mitmproxy under which a promise does not hold, whatever the addon does: nobody is served.
_REQUIRED_OPTIONS: Final[dict[str, object]] = {
    "connection_strategy": "lazy",  # eager connects before there is a decision
    "request_client_cert": False,  # would accept any client certificate, unverified
    "ssl_insecure": False,
    "store_streamed_bodies": False,  # would keep every body in memory
}

# They report what has happened already. Any other hook without a flow decides something of the connection.
_AFTER_THE_FACT: Final = frozenset(
    {
        "client_disconnected",
        "server_connect_error",
        "server_disconnected",
        "tls_failed_client",
        "tls_failed_server",
    }
)
_OPENING: Final = frozenset({"tls_established_client", "tls_clienthello", "http_connected"})
_RECORD_MARK: Final = b"\x16\x03"  # of a TLS handshake; the third byte is a version's
_RECORD_MARK_BYTES: Final = 3
_LOG_LIMIT: Final = 200

type OnRefused = Callable[[HTTPFlow | None, Refusal, bool], None]
"""Called once for each flow the gate refuses or aborts: the flow (None: a protocol that is not spoken, or a
connection without flows), what the client is told, and whether bytes of a response had left, so that it is
not told but cut. If it raises, the answer becomes `refusals.AUDIT_UNAVAILABLE`; the flow stays refused."""

log = logging.getLogger(__name__)

_listeners: Final[weakref.WeakKeyDictionary[Master, OnRefused]] = weakref.WeakKeyDictionary()
_clients: Final[weakref.WeakKeyDictionary[Master, "Clients"]] = weakref.WeakKeyDictionary()


class Clients:
    """Of one Master: the limits of its client connections, and what became of those beyond them."""

    def __init__(self, limits: ClientLimits, *, open_files: int | None = None) -> None:
        """*open_files*: how many the process may have; default: as many as it may have now."""
        if open_files is None:
            open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.limits = limits
        self.total = limits.connections if open_files < 0 else limits.places(open_files)
        """How many connections there can be: fewer than the limit says if files are few."""
        self.places = Places(self.total, limits.connections_per_peer)
        self.expired: Counter[Phase] = Counter()


def limit(master: Master, clients: Clients) -> None:
    """Have client connections of *master* counted and timed by *clients*. Without it: by the defaults."""
    _clients[master] = clients


def on_refused(master: Master, callback: OnRefused) -> None:
    """Have *callback* told of every refusal and abort of the gate, for connections of *master*."""
    _listeners[master] = callback


class DenyLayer(layer.Layer):
    """Closes the client and listens to nothing."""

    @override
    def _handle_event(self, event: events.Event) -> layer.CommandGenerator[None]:
        self._handle_event = self._done  # type: ignore[method-assign,assignment]
        yield commands.CloseConnection(self.context.client)

    def _done(self, _event: events.Event) -> layer.CommandGenerator[None]:
        yield from ()


class GuardedConnectionHandler(BackpressureHandler):
    """Stands in for `mitmproxy.proxy.mode_servers.ProxyConnectionHandler`."""

    def __init__(self, master: Master, *args: Any) -> None:
        super().__init__(master, *args)
        self._aborted = False
        self._crashed = False
        self._cut: set[Connection] = set()
        self._held: dict[str, int] = {}  # by id: hashing a Connection is a call of Python
        self._released = asyncio.Event()
        self._begun: dict[commands.StartHook, asyncio.Task[None]] = {}
        self._streams: weakref.WeakSet[Kept] = weakref.WeakSet()
        clients = _clients.get(master)
        if clients is None:
            clients = _clients[master] = Clients(ClientLimits())
        self._clients = clients
        self._deadlines = Deadlines(
            clients.limits,
            is_busy=self._is_busy,
            expired=self._expired,
            now_s=asyncio.get_running_loop().time,
        )
        self.timeout_watchdog = cast("Any", self._deadlines)
        keep(self.client.id, self)

    # ---- what streams ask of their handler

    def adopt(self, stream: Kept) -> None:
        self._streams.add(stream)
        self._deadlines.requested()

    def head_begins(self) -> None:
        self._deadlines.head_begins()

    def hold(self, connection: Connection) -> None:
        self._held[connection.id] = self._held.get(connection.id, 0) + 1

    def release(self, connection: Connection) -> None:
        if (left := self._held.pop(connection.id) - 1) > 0:
            self._held[connection.id] = left
        else:
            self._released.set()

    def cut_on_close(self, connection: Connection) -> None:
        self._cut.add(connection)

    def begin(self, hook: commands.StartHook) -> bool:
        # Eager: it runs here, up to where it has to wait, in a task of its own as asyncio.timeout needs one.
        task = asyncio.Task(self._run_hook(hook), loop=asyncio.get_running_loop(), eager_start=True)
        if task.done() and not self._aborted and not task.cancelled() and task.exception() is None:
            return True
        self._begun[hook] = task  # `hook_task` is asked for it next
        return False

    def has_finished(self, connection: Connection) -> bool:
        io = self.transports.get(connection)
        # A cancelled task may have lost what it had read; and an abort of our own looks like an EOF.
        if io is None or io.handler is not asyncio.current_task() or _is_being_cancelled():
            return False
        reader = io.reader
        return isinstance(reader, asyncio.StreamReader) and reader.at_eof() and reader.exception() is None

    def report(self, flow: HTTPFlow | None, refusal: Refusal, *, bytes_sent: bool) -> None:
        if callback := _listeners.get(self.master):
            callback(flow, refusal, bytes_sent)

    # ---- places and deadlines

    @property
    def is_waiting(self) -> bool:
        phase, _ = self._deadlines.phase()
        return phase not in (Phase.BUSY, Phase.TUNNEL)

    def displace(self) -> None:
        self._close_quietly()

    def _is_busy(self) -> bool:
        return any(stream.is_under_way for stream in self._streams)

    def _expired(self, phase: Phase) -> bool:
        """Returns whether the connection goes on."""
        self._clients.expired[phase] += 1
        under_way = [stream for stream in self._streams if stream.is_under_way]
        if phase is Phase.BUSY and all(stream.waits_for_service for stream in under_way):
            for stream in under_way:
                stream.give_up()
            for connection, io in list(self.transports.items()):
                if connection is not self.client and io.handler is not None:
                    io.handler.cancel("the service does not answer")
            return True
        if phase in (Phase.BUSY, Phase.TUNNEL):
            self.abort_all(refusals.IDLE)
        else:
            self._close_quietly()
        return False

    def _close_quietly(self) -> None:
        io = self.transports.get(self.client)
        if io is None:
            return
        if io.handler is None:  # accepted just now
            _reset(io.writer)
        else:
            self.close_connection(self.client)

    def _opening(self, hook: str, data: Any) -> None:
        """What a hook that has run says about the opening of this connection, or of one inside of it."""
        match hook:
            case "tls_established_client":
                self._deadlines.opened()
            case "http_connected":
                self._deadlines.opens()
            case "tls_clienthello" if data.ignore_connection:
                self._deadlines.tunnelled()

    # ---- the end of everything

    def abort_all(self, refusal: Refusal = refusals.INTERNAL) -> None:
        """Reset every socket of this client; its flows are reported as *refusal*."""
        self._aborted = True
        for stream in list(self._streams):
            stream.abandon(refusal)
        for io in list(self.transports.values()):
            _reset(io.writer)
            if io.handler is not None:
                io.handler.cancel("aborted by the gate")
        for timer in list(self.wakeup_timer):
            timer.cancel("aborted by the gate")

    def _crash(self, where: str, error: BaseException | None) -> None:
        if not self._aborted:
            log.error("aborting a client's connections: %s: %s", where, origin_of(error) if error else "")
            self.abort_all()

    @override
    def log(self, message: str, level: int = logging.INFO, exc_info: Any = None) -> None:
        if exc_info and level >= logging.ERROR:
            self._crashed = True
            error = exc_info[1] if isinstance(exc_info, tuple) else sys.exc_info()[1]
            message = message.partition(":")[0]
            if error is not None:
                message = f"{message}: {origin_of(error)}"
        super().log(message[:_LOG_LIMIT], level)

    # ---- tasks

    @override
    async def handle_client(self) -> None:
        try:
            if self._clients.places.take(self, self.client.peername[0]) is not None:
                pass
            elif (unsafe := self._unsafe_options()) or self.client.transport_protocol != "tcp":
                self._deny(unsafe or self.client.transport_protocol)
            elif not isinstance(self.layer, TOP_LAYERS):
                self._deny(type(self.layer).__name__)
            else:
                await super().handle_client()
        finally:
            self._deadlines.stop()
            self._clients.places.give_back(self)
            for timer in self.wakeup_timer:
                timer.cancel()
            for io in self.transports.values():
                _reset(io.writer)

    def _unsafe_options(self) -> str:
        """Names of the options that are not as they must be."""
        given = self.layer.context.options
        return ", ".join(name for name, wanted in _REQUIRED_OPTIONS.items() if getattr(given, name) != wanted)

    @override
    async def handle_connection(self, connection: Connection) -> None:
        try:
            if not self._aborted:  # else it would wait for somebody to close what is closed
                await super().handle_connection(connection)
        finally:
            await self._forget(connection)

    @override
    async def open_connection(self, command: commands.OpenConnection) -> None:
        try:
            await super().open_connection(command)
        finally:
            await self._forget(command.connection)

    async def _forget(self, connection: Connection) -> None:
        """The task of *connection* is over. If it was cancelled in the middle of an event, tidy up."""
        io = self.transports.get(connection)
        if io is None or io.handler is not asyncio.current_task():
            return
        connection.state = ConnectionState.CLOSED
        _reset(io.writer)
        if not self._aborted and io.writer is not None:
            await self.server_event(events.ConnectionClosed(connection))
        self.transports.pop(connection, None)

    @override
    async def server_event(self, event: events.Event) -> None:
        if self._aborted:
            return
        try:
            await super().server_event(event)
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and _is_being_cancelled():
                raise
            self._crash("a layer", error)
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
        if self._crashed:
            self._crash("a layer", None)

    @override
    def close_connection(self, connection: Connection, half_close: bool = False) -> None:
        super().close_connection(connection, half_close)
        if connection in self._cut and (io := self.transports.get(connection)) is not None:
            _reset(io.writer)

    @override
    async def drain_writers(self) -> None:
        await super().drain_writers()
        if not self._held:
            return
        task = asyncio.current_task()
        source = next((c for c, io in self.transports.items() if io.handler is task), None)
        while source is not None and source.id in self._held and source in self.transports:
            self._released.clear()
            await self._released.wait()

    # ---- hooks

    @override
    async def hook_task(self, hook: commands.StartHook) -> None:
        try:
            if (begun := self._begun.pop(hook, None)) is None:
                await super().hook_task(hook)
            else:
                with self.timeout_watchdog.disarm():
                    await begun
                await self.server_event(events.HookCompleted(hook))
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and _is_being_cancelled():
                raise
            self._crash(f"the hook {hook.name}", error)
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise

    @override
    async def handle_hook(self, hook: commands.StartHook) -> None:
        with self.timeout_watchdog.disarm():
            await self._run_hook(hook)

    async def _run_hook(self, hook: commands.StartHook) -> None:
        if isinstance(hook, SettleHook):
            try:
                await hook.transform.settle()
            except Exception as error:  # noqa: BLE001 - the stream raises it where the flow ends by it
                hook.failure = error
            return
        if isinstance(hook, layer.NextLayerHook) and _may_become_tls(hook.data.data_client()):  # type: ignore[no-untyped-call]
            return  # it is asked again with the next byte
        kind: Any = type(hook)  # mypy does not take it for hashable
        data = getattr(hook, _argument_name(kind))
        try:
            failure = await self._call_addons(hook.name, data)
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and _is_being_cancelled():
                raise  # the connection is going away, and this task with it
            self._crash(f"the hook {hook.name}", error)
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            return
        if isinstance(data, Flow) and data.intercepted:
            await data.wait_for_resume()  # type: ignore[no-untyped-call]
        if failure is not None:
            if isinstance(data, HTTPFlow):
                permit(data).revoke(refusals.INTERNAL)
            elif hook.name not in _AFTER_THE_FACT:
                self._crash(f"the hook {hook.name}", failure)
        if isinstance(data, layer.NextLayer):
            self._check_protocol(data)
        elif hook.name in _OPENING:
            self._opening(hook.name, data)

    async def _call_addons(self, name: str, data: Any) -> Exception | None:
        """Call every addon that has the hook *name*; return the last exception of them.

        In place of `AddonManager.handle_lifecycle`, which swallows it, and which after each hook of a flow
        tells all addons of an `update` that only user interfaces listen to.
        """
        failure: Exception | None = None
        for addon in addonmanager.traverse(self.master.addons.chain):  # type: ignore[no-untyped-call]
            function = getattr(addon, name, None)
            if function is None or not callable(function):
                continue
            try:
                result = function(data)
                if result is not None and inspect.isawaitable(result):
                    await result
            except exceptions.AddonHalt as halt:
                return halt
            except Exception as error:  # noqa: BLE001 - an addon's
                log.error("the hook %s failed: %s", name, origin_of(error))  # noqa: TRY400
                failure = error
        return failure

    def _check_protocol(self, chosen: layer.NextLayer) -> None:
        below = chosen.layer
        while below is not None and not isinstance(below, layer.NextLayer):
            if self.client.transport_protocol != "tcp" or not isinstance(below, PROTOCOLS):
                self._deny(type(below).__name__)
                for given in list(chosen.context.layers):
                    if given is below or given is chosen.layer:
                        chosen.context.layers.remove(given)
                chosen.layer = DenyLayer(chosen.context)
                return
            below = getattr(below, "child_layer", None)

    def _deny(self, what: str) -> None:
        log.warning("refused a connection: %s", what)
        try:
            self.report(None, refusals.UPGRADE, bytes_sent=False)
        except Exception as error:  # noqa: BLE001 - it is refused already, and stays so
            log.error("refusal not recorded: %s", origin_of(error))  # noqa: TRY400


@functools.cache
def _argument_name(kind: Any) -> str:
    """Of the one field that every kind of hook has; `hook.args()` looks for it each time."""
    (field,) = dataclasses.fields(kind)
    return field.name


def _may_become_tls(begin: bytes) -> bool:
    """Too few bytes to tell; mitmproxy would take them for HTTP."""
    return begin != b"" and len(begin) < _RECORD_MARK_BYTES and _RECORD_MARK.startswith(begin)


def _is_being_cancelled() -> bool:
    """True if somebody asked for this task's end, rather than an addon raising CancelledError."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _reset(writer: Any) -> None:
    """Close at once, by RST: what is buffered is dropped, and the peer sees no proper end."""
    transport = getattr(writer, "transport", None)
    if transport is None:
        if writer is not None:
            writer.close()  # a datagram "stream": nothing lingers
        return
    if (raw := transport.get_extra_info("socket")) is not None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: uvloop's, of one that is closed already
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


@contextlib.asynccontextmanager
async def hold_reading(proxyserver: Proxyserver, client: Client) -> AsyncIterator[None]:
    """Do not read from an HTTP/1 client meanwhile. On HTTP/2 the back-pressure withholds credit by itself.

    The gate holds every connection of a flow whose hook is awaited; this is for waiting at other places. It
    nests. A client that has gone is no error.
    """
    handler = proxyserver.connections.get(client.id)
    if not isinstance(handler, GuardedConnectionHandler) or client.alpn == b"h2":
        yield
        return
    handler.hold(client)
    try:
        yield
    finally:
        handler.release(client)


def abort_all_connections(proxyserver: Proxyserver) -> None:
    """Reset every socket of every client, upstream ones included: no body gets a proper end."""
    for handler in list(proxyserver.connections.values()):
        if isinstance(handler, GuardedConnectionHandler):
            handler.abort_all()
