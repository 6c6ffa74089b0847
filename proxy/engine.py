"""mitmproxy inside our process: its Master, five addons, our options, and listeners that come and go.

1. One engine at a time in a process (mitmproxy keeps its master in a module); one may follow another.
2. No `Master.run()`: it would take over the loop's task factory and exception handler, and it ends processes.
3. Only the addons it needs: each further one is called at every hook.
4. A picture of the directory is applied as a whole: routes first, so that what is gone is refused before its
   listener has closed, then connections it has no place for are reset, then listeners. What cannot be opened
   is a problem that is told and tried again; it takes nobody else down.
5. Stopping: no new connections, bodies in flight may end within the grace, what is left is reset. A body that
   was cut has no proper end on either side.
"""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NoReturn

import certifi
import structlog
from cryptography.hazmat.primitives.hashes import SHA256
from mitmproxy import connection, master, options
from mitmproxy.addons import core, next_layer, proxyserver
from mitmproxy.proxy import mode_specs
from OpenSSL import SSL

from envelope.errors import FormatError, MisuseError, SealgateError
from proxy import gate, refusals
from proxy.addon import SealgateAddon
from proxy.config import EngineSettings
from proxy.gate.handler import GuardedConnectionHandler
from proxy.interception import CIPHERS, InterceptionCa, InterceptionError, TenantTls, own_context
from proxy.limits import ClientLimits
from proxy.metrics import ClientConnections
from proxy.plans.routing import Listener, Routing
from proxy.profiles import PROFILES, Profile
from proxy.tenants.model import Directory, normal_host
from runtime.clock import Clock

CUT_INTERVAL_S: Final = 0.25
"""How often bodies that do not move are looked at: their keys may have ended. The promise is a second."""
RETRY_S: Final = 5.0
"""How often a listener that could not be opened is tried again."""
_DRAIN_STEP_S: Final = 0.05
_ENDED_WITHIN_S: Final = 5.0
"""How long connections that were reset may take to go: no longer than their tasks need for their turn."""

log = structlog.get_logger(__name__)


def upstream_trust(ca_file: Path | None) -> ssl.SSLContext:
    """How prefetch.py verifies services: like the engine does. OSError if *ca_file* cannot be read."""
    context = ssl.create_default_context(cafile=ca_file or certifi.where())
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.set_alpn_protocols(["http/1.1"])
    return context


class Engine:
    """The data plane. `start`, `apply` as often as the directory changes, `stop`; one event loop."""

    def __init__(
        self,
        settings: EngineSettings,
        addon: SealgateAddon,
        clock: Clock,
        *,
        limits: ClientLimits | None = None,
        reuse_port: bool = False,
        profiles: Mapping[str, Profile] = PROFILES,
    ) -> None:
        """*reuse_port*: other processes of ours listen at the same addresses."""
        self._settings = settings
        self._clients = gate.Clients(limits or ClientLimits())
        self._reuse_port = reuse_port
        self._addon = addon
        self._clock = clock
        self._profiles = profiles
        self._authorities: dict[str, InterceptionCa] = {}
        self._served: frozenset[str] = frozenset()
        """The specs of the listeners that lead somewhere."""
        self._outer: dict[tuple[bytes, ...], SSL.Context] = {}
        """Of TLS to this proxy itself, by the digests of the clients' authorities."""
        self._levers = gate.ALL if settings.levers else frozenset[gate.Lever]()
        self._prepared = False
        self._directory: Directory | None = None
        self._problems: list[str] = []
        self._master: master.Master | None = None
        self._server: proxyserver.Proxyserver | None = None

    @property
    def problems(self) -> list[str]:
        """Why something that should be served is not; empty when all is well."""
        return list(self._problems)

    @property
    def connections(self) -> int:
        return len(self._server.connections) if self._server is not None else 0

    @property
    def clients(self) -> gate.Clients:
        """How many client connections there may be, and what became of those beyond that."""
        return self._clients

    def meters(self) -> ClientConnections:
        """For a registry; good for as long as the engine is."""
        clients = self._clients
        return ClientConnections(
            lambda: len(clients.places),
            refused=lambda: {reason: clients.places.refused[reason] for reason in gate.Refused},
            expired=lambda: {phase: clients.expired[phase] for phase in gate.Phase},
        )

    def listening(self) -> list[str]:
        """The specs of the listeners that are open."""
        if self._server is None:
            return []
        return [instance.mode.full_spec for instance in self._server.servers if instance.is_running]

    async def prepare(self) -> None:
        """Put the gate in place and rehearse it. UnknownEngineError, SelfTestError: do not go on."""
        gate.check_versions()
        gate.install(levers=self._levers, reuse_port=self._reuse_port)
        await gate.self_test()
        self._prepared = True

    async def start(self, directory: Directory) -> None:
        """Open the listeners of *directory*, after `prepare`; `problems` says which could not be."""
        if self._master is not None or not self._prepared:
            raise MisuseError("the engine is running, or was not prepared")
        self._master = running = master.Master(options.Options(), asyncio.get_running_loop())
        self._server = proxyserver.Proxyserver()  # type: ignore[no-untyped-call]
        tls = TenantTls(
            self._authority_of,
            http2=self._settings.http2,
            outer_of=self._outer_context,
            is_served=self._is_served,
        )
        running.addons.add(  # type: ignore[no-untyped-call]
            core.Core(), self._server, next_layer.NextLayer(), tls, self._addon
        )
        running.options.update(**self._options())  # type: ignore[no-untyped-call]
        gate.on_refused(running, self._addon.on_refused)
        gate.limit(running, self._clients)
        gate.warmed_up(self._levers)
        await running.running()
        await self.apply(directory)

    async def apply(self, directory: Directory) -> None:
        """Serve *directory* from now on; `problems` says what could not be done of it."""
        if self._server is None:
            raise MisuseError("the engine is not running")
        self._directory = directory
        routing = Routing(directory, self._profiles)
        problems: list[str] = []
        self._load_authorities(directory, problems)
        problems += [f"{owner}: {cause}" for owner, cause in routing.broken.items()]
        wanted = [listener for listener in routing.listeners.values() if self._can_serve(listener, routing)]
        self._served = frozenset(listener.spec for listener in wanted)
        self._outer.clear()
        self._addon.routing = routing
        self._abort_strays()
        await self._listen([listener.spec for listener in wanted], problems)
        self._abort_strays()  # who came in the meantime
        before, self._problems = self._problems, problems
        for problem in problems:
            if problem not in before:  # told once, however often it is tried
                log.error("not served", cause=problem)
        if before and not problems:
            log.info("all is served again")

    async def retry_problems(self) -> NoReturn:
        """Try again what could not be served though the directory says so."""
        while True:
            await self._clock.sleep(RETRY_S)
            if self._problems and self._directory is not None and self._server is not None:
                with _muted(proxyserver.__name__):
                    await self.apply(self._directory)

    async def cut_ended(self) -> NoReturn:
        """Cut clients whose body is under way but does not move, once its key has ended."""
        while True:
            await self._clock.sleep(CUT_INTERVAL_S)
            for client, refusal in self._addon.ended_keys():
                self._abort(client, refusal)

    async def stop(self, *, grace_s: float) -> None:
        """Close the listeners, let bodies in flight end within *grace_s* seconds, reset the rest."""
        running, server = self._master, self._server
        if running is None or server is None:
            return
        await server.servers.update([])
        deadline_s = self._clock.boot_s() + grace_s
        while server.connections and self._clock.boot_s() < deadline_s:
            self._close_idle(server)
            await asyncio.sleep(_DRAIN_STEP_S)
        gate.abort_all_connections(server)
        # The handlers' tasks see their cancellation before the addons are told of the end.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ENDED_WITHIN_S):
                while server.connections:  # noqa: ASYNC110 - mitmproxy has no event for it
                    await asyncio.sleep(_DRAIN_STEP_S)
        await running.done()
        self._master = self._server = None
        self._addon.routing = None

    # ---- listeners

    def _can_serve(self, listener: Listener, routing: Routing) -> bool:
        """Why not is told already."""
        if not any(entry.tenant in self._authorities for entry in listener.tenants):
            return False
        return listener.service is None or listener.service.owner not in routing.broken

    def _load_authorities(self, directory: Directory, problems: list[str]) -> None:
        """Keep the CAs (with their leaves) that have not changed."""
        authorities: dict[str, InterceptionCa] = {}
        for tenant in directory.tenants.values():
            try:
                fresh = InterceptionCa.load(tenant.interception_ca, self._clock)
            except SealgateError as error:
                problems.append(f"{tenant.tenant}: {error}")
                continue
            known = self._authorities.get(tenant.tenant)
            unchanged = known is not None and known.certificate == fresh.certificate
            authorities[tenant.tenant] = known if known is not None and unchanged else fresh
        self._authorities = authorities

    def _listener_of(self, client: connection.Client) -> Listener:
        spec = client.proxy_mode.full_spec
        routing = self._addon.routing
        if routing is None or spec not in self._served:
            raise InterceptionError("nothing is served at this listener any more")
        return routing.listener(spec)

    def _authority_of(self, client: connection.Client) -> InterceptionCa:
        listener = self._listener_of(client)
        try:
            return self._authorities[listener.tenant(self._addon.tenant_of(client)).tenant]
        except (KeyError, refusals.RefusedError):
            raise InterceptionError("it is not known whose client this is") from None

    def _is_served(self, client: connection.Client) -> bool:
        """Whether a certificate is shown for the name that *client* asks for."""
        service, routing = self._listener_of(client).service, self._addon.routing
        if service is None:
            return True  # what CONNECT asked for has been checked
        try:
            name = None if client.sni is None else normal_host(client.sni)
        except FormatError:
            return False
        return routing is not None and routing.is_served_as(service, name)

    def _outer_context(self, client: connection.Client, name: str) -> SSL.Context:
        """Of TLS to this proxy itself: whose user the client is will be asked inside."""
        listener, files = self._listener_of(client), self._settings.proxy_certificate
        roots = [root for entry in listener.tenants for root in entry.access.client_roots]
        if files is None:
            if listener.sole is None:
                raise InterceptionError("tenants share this listener: it needs engine.proxy_certificate_file")
            return self._authority_of(client).context_for(name, http2=False, client_roots=roots)
        kind = tuple(root.fingerprint(SHA256()) for root in roots)
        if kind not in self._outer:
            self._outer[kind] = own_context(files, roots)
        return self._outer[kind]

    async def _listen(self, specs: list[str], problems: list[str]) -> None:
        server = self._running_server()
        modes = [_mode(spec) for spec in specs]
        await server.servers.update(modes)
        failed = [instance for instance in server.servers if not instance.is_running]
        problems += [
            f"{instance.mode.full_spec}: {instance.last_exception or 'not listening'}" for instance in failed
        ]
        if failed:
            # mitmproxy tries a listener once; forgotten, it is tried again with the next picture.
            dead = {instance.mode.full_spec for instance in failed}
            await server.servers.update([mode for mode in modes if mode.full_spec not in dead])

    def _options(self) -> dict[str, object]:
        return {
            "mode": [],
            "connection_strategy": "lazy",  # no connection before a decision
            "rawtcp": False,
            "websocket": False,
            "http3": False,
            "http2": self._settings.http2,
            "ssl_insecure": False,
            "ssl_verify_upstream_trusted_ca": str(self._settings.upstream_ca_file or certifi.where()),
            "upstream_cert": False,
            "keep_host_header": True,  # the addon sets it: a client may have signed what it sent
            "validate_inbound_headers": True,
            "ciphers_server": CIPHERS,
            "allow_hosts": [],
            "ignore_hosts": [],
            "tcp_hosts": [],
            "udp_hosts": [],
            "stream_large_bodies": None,
            "store_streamed_bodies": False,
        }

    # ---- connections

    def _running_server(self) -> proxyserver.Proxyserver:
        if self._server is None:
            raise MisuseError("the engine is not running")
        return self._server

    def _abort(self, client: connection.Client, refusal: refusals.Refusal) -> None:
        handler = self._running_server().connections.get(client.id)
        if isinstance(handler, GuardedConnectionHandler):
            self._addon.count_cut()
            handler.abort_all(refusal)

    def _abort_strays(self) -> None:
        for client in self._addon.strays():
            self._abort(client, refusals.UNMANAGED_HOST)

    def _close_idle(self, server: proxyserver.Proxyserver) -> None:
        """Close, properly, the connections without a request in flight."""
        for handler in list(server.connections.values()):
            client = handler.client
            if client in handler.transports and not self._addon.is_busy(client):
                handler.close_connection(client)


@contextlib.contextmanager
def _muted(name: str) -> Iterator[None]:
    """Without the words of the logger *name*: mitmproxy tells of each try what `problems` tells once."""
    logger = logging.getLogger(name)
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False


def _mode(spec: str) -> mode_specs.ProxyMode:
    mode = mode_specs.ProxyMode.parse(spec)
    # `reverse:https` would also listen for QUIC, on UDP, whatever the options say.
    mode.transport_protocol = "tcp"  # type: ignore[misc]
    return mode
