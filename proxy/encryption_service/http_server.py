"""The listeners of the encryption service: who gets a connection, for how long, with which certificate.

1. We accept ourselves: places are counted, per listener and per peer, before a byte is read or a handshake is
   begun, so that nobody fills the process with connections that say nothing.
2. TLS 1.2 with the suites AWS KMS asks for, and 1.3. Certificates and client roots are read again when a file
   changes, and what cannot be used changes nothing; each connection gets the context of its moment, sessions
   do not outlive it.
3. A client certificate that does not hang on the listener's roots ends the handshake. One with another
   subject is closed without a word right after it.
4. Stopping: no new connections, answers under way may end within the grace, what is left is reset.
"""

import asyncio
import contextlib
import errno
import functools
import ipaddress
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from email.utils import formatdate
from pathlib import Path
from typing import Final, NoReturn

import structlog

from proxy.encryption_service.call import Peer
from proxy.encryption_service.dialects.dialect import Dialect
from proxy.encryption_service.http_connection import HttpConnection
from proxy.encryption_service.http_site import Site
from proxy.encryption_service.metrics import ServiceMetrics
from proxy.encryption_service.model import DialectName
from proxy.encryption_service.settings import EncryptionServiceSettings, HttpLimits, ListenSettings
from runtime.clock import Clock
from runtime.tls import TlsError, has_common_name, load_certificates, server_context

TICK_S: Final = 0.5
BACKLOG: Final = 1024
ACCEPTED_IN_A_ROW: Final = 64
_CIPHERS: Final = "ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384"
"""Of TLS 1.2. Those of 1.3 are OpenSSL's, TLS_AES_256_GCM_SHA384 first."""
_OUT_OF_MEANS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_DRAIN_STEP_S: Final = 0.02

_log: Final = structlog.get_logger("service.http")


class ListenerTls:
    """The TLS context of one listener, made anew when its files have changed."""

    def __init__(self, certificate_file: Path, key_file: Path, client_roots_file: Path | None) -> None:
        """TlsError if a file cannot be used."""
        self._certificate_file = certificate_file
        self._key_file = key_file
        self._client_roots_file = client_roots_file
        self._seen = self._look()
        self.context = self._made()
        self.failure: str | None = None
        """Why the files as they are now are not in use."""

    def renew_if_changed(self) -> None:
        """Read the files again if one is not what it was; what cannot be used is told once."""
        seen = self._look()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self.context = self._made()
        except TlsError as error:
            self.failure = str(error)
            _log.exception("certificate not renewed; the one before stays in use", cause=str(error))
        else:
            self.failure = None
            _log.info("certificate renewed", file=str(self._certificate_file))

    def _made(self) -> ssl.SSLContext:
        roots = None if self._client_roots_file is None else load_certificates(self._client_roots_file)
        context = server_context(
            self._certificate_file,
            self._key_file,
            client_roots=roots,
            minimum_version=ssl.TLSVersion.TLSv1_2,
            ciphers=_CIPHERS,
        )
        context.set_alpn_protocols(["http/1.1"])
        return context

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        files = (self._certificate_file, self._key_file, self._client_roots_file)
        return tuple(None if file is None else _mark(file) for file in files)


class ServiceListener:
    """One open address."""

    def __init__(
        self,
        settings: ListenSettings,
        dialects: Mapping[DialectName, Dialect],
        *,
        limits: HttpLimits,
        metrics: ServiceMetrics,
        clock: Clock,
        reuse_port: bool = False,
    ) -> None:
        """Bound, not yet accepting. OSError: the address cannot be used. TlsError."""
        self._settings = settings
        self._limits = limits
        self._metrics = metrics
        self._subject = settings.client_subject
        self._per_peer: Counter[object] = Counter()
        self._places: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._accepting = False
        self.tls: ListenerTls | None = None
        if settings.certificate_file is not None and settings.key_file is not None:
            self.tls = ListenerTls(settings.certificate_file, settings.key_file, settings.client_roots_file)
        self.site = Site(
            dialects=tuple(dialects[name] for name in settings.dialects),
            scheme="http" if self.tls is None else "https",
            limits=limits,
            metrics=metrics,
            identify=self._identify,
            now_s=clock.boot_s(),
            date=formatdate(clock.wall_s(), usegmt=True),
        )
        self._socket = _bound(settings.address, settings.port, reuse_port=reuse_port)
        self.port: int = self._socket.getsockname()[1]
        self.name = settings.name

    def start(self) -> None:
        if not self._accepting and self._socket.fileno() >= 0:
            self._accepting = True
            self._loop.add_reader(self._socket.fileno(), self._accept)

    def close_unused(self) -> None:
        """Give the address back; nothing was accepted."""
        self._socket.close()

    def tick(self, now_s: float, date: str) -> None:
        """The sweeper's look: time-outs, certificates, and accepting again after a want of descriptors."""
        self.site.tick(now_s, date)
        self._metrics.connections[self.name] = len(self._places)
        if self.tls is not None:
            self.tls.renew_if_changed()
        if not self.site.stopping:
            self.start()

    async def stop(self, clock: Clock, *, grace_s: float) -> None:
        """Rule 4."""
        self._pause()
        self._socket.close()
        self.site.stopping = True
        for connection in list(self.site.connections):
            connection.stop()
        deadline_s = clock.boot_s() + grace_s
        while self.site.connections and clock.boot_s() < deadline_s:  # noqa: ASYNC110 - two conditions
            await asyncio.sleep(_DRAIN_STEP_S)
        for connection in list(self.site.connections):
            connection.abort()
        for place in list(self._places):  # handshakes
            place.cancel()
        await asyncio.gather(*self._places, return_exceptions=True)
        self._metrics.connections.pop(self.name, None)

    # ---- accepting

    def _pause(self) -> None:
        if self._accepting:
            self._accepting = False
            self._loop.remove_reader(self._socket.fileno())

    def _accept(self) -> None:
        for _ in range(ACCEPTED_IN_A_ROW):
            try:
                accepted, address = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in _OUT_OF_MEANS:  # `tick` tries again
                    _log.error("no connection accepted", listener=self.name, cause=error.strerror)
                    self._pause()
                return
            peer, bucket = _peer(address[0])
            if self.tls is None:
                bucket = None
            full = len(self._places) >= self._limits.connections
            if full or (bucket is not None and self._per_peer[bucket] >= self._limits.connections_per_peer):
                self._metrics.refused_connections += 1
                accepted.close()
                continue
            accepted.setblocking(False)
            if bucket is not None:
                self._per_peer[bucket] += 1  # here, not in the task: more are accepted before it begins
            place = self._loop.create_task(self._hold(accepted, peer), name="service:connection")
            self._places.add(place)
            place.add_done_callback(functools.partial(self._give_back, bucket=bucket))

    def _give_back(self, place: asyncio.Task[None], *, bucket: object) -> None:
        self._places.discard(place)
        if bucket is not None:
            self._per_peer[bucket] -= 1
            if not self._per_peer[bucket]:
                del self._per_peer[bucket]

    async def _hold(self, accepted: socket.socket, address: str) -> None:
        """The place of one connection, from before its handshake to its end."""
        context = None if self.tls is None else self.tls.context
        connection = HttpConnection(self.site, address)
        try:
            await self._loop.connect_accepted_socket(
                lambda: connection,  # what uvloop returns in its place is a layer of its own
                accepted,
                ssl=context,
                ssl_handshake_timeout=None if context is None else self._limits.handshake_s,
            )
            await connection.closed
        except (OSError, ssl.SSLError):  # the handshake failed, came too slowly, or its client has gone
            self._metrics.refused_connections += 1
            accepted.close()

    def _identify(self, transport: asyncio.BaseTransport, address: str) -> Peer | None:
        """Who is there, None for nobody we talk to (rule 3)."""
        connection = transport.get_extra_info("ssl_object")
        if connection is None:
            return Peer(address=address) if self.tls is None else None
        der = connection.getpeercert(binary_form=True)
        if self._settings.client_roots_file is not None and not der:
            return None
        if self._subject is not None and not has_common_name(der, self._subject):
            _log.warning("client certificate of another subject", listener=self.name, peer=address)
            self._metrics.refused_connections += 1
            return None
        return Peer(address=address, certificate_der=der or None)


class ServiceServer:
    """All listeners of the service. `serving` once."""

    def __init__(
        self,
        settings: EncryptionServiceSettings,
        dialects: Mapping[DialectName, Dialect],
        *,
        metrics: ServiceMetrics,
        clock: Clock,
        reuse_port: bool = False,
    ) -> None:
        self._settings = settings
        self._dialects = dialects
        self._metrics = metrics
        self._clock = clock
        self._reuse_port = reuse_port
        self.listeners: list[ServiceListener] = []

    @property
    def problems(self) -> list[str]:
        """Why something that should be served is not as it should be."""
        return [
            f"encryption service at {listener.name}: {listener.tls.failure}"
            for listener in self.listeners
            if listener.tls is not None and listener.tls.failure
        ]

    def open(self) -> None:
        """Bind and accept. OSError (with the address in `filename`) or TlsError; then nothing is open."""
        try:
            for listen in self._settings.listen:
                try:
                    listener = ServiceListener(
                        listen,
                        self._dialects,
                        limits=self._settings.limits,
                        metrics=self._metrics,
                        clock=self._clock,
                        reuse_port=self._reuse_port,
                    )
                except OSError as error:
                    error.filename = listen.name
                    raise
                self.listeners.append(listener)
        except BaseException:
            for listener in self.listeners:
                listener.close_unused()
            self.listeners.clear()
            raise
        for listener in self.listeners:
            listener.start()

    async def sweep(self) -> NoReturn:
        """Time-outs, certificates: look at every listener every TICK_S seconds."""
        while True:
            await self._clock.sleep(TICK_S)
            now_s, date = self._clock.boot_s(), formatdate(self._clock.wall_s(), usegmt=True)
            for listener in self.listeners:
                listener.tick(now_s, date)

    async def stop(self, *, grace_s: float) -> None:
        """Stop all listeners side by side. Nothing happens the second time."""
        listeners, self.listeners = self.listeners, []
        await asyncio.gather(*(listener.stop(self._clock, grace_s=grace_s) for listener in listeners))

    @contextlib.asynccontextmanager
    async def serving(self, *, grace_s: float = 5.0) -> AsyncIterator[list[int]]:
        """Serve while the block runs; yields the ports in the settings' order. Errors as `open`."""
        self.open()
        sweeper = asyncio.create_task(self.sweep(), name="service:sweep")
        try:
            yield [listener.port for listener in self.listeners]
        finally:
            await self.stop(grace_s=grace_s)
            sweeper.cancel()
            await asyncio.gather(sweeper, return_exceptions=True)


def _bound(address: str, port: int, *, reuse_port: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit it
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.bind((address, port))
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return listening


def _peer(address: str) -> tuple[str, object]:
    """The address in its shortest form, and what its connections are counted by."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped), ip.ipv4_mapped
        return str(ip), int(ip) >> 64  # whoever has one address of a /64 has all of them
    return str(ip), ip


def _mark(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
