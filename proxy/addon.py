"""Between mitmproxy's hooks and our plans: finds the route, asks the planner, permits what the plan says.

1. It decides in `requestheaders` and `responseheaders` only: later a body would have left.
2. Every hook that can let something through is guarded: what it raises refuses the flow.
3. What is collected is decided in `request` and `response`, and leaves as what was approved there, or not.
4. Every use of a key is in the audit log before a byte it changes moves on; if it cannot be, it is not used.
5. A connection is the tenant's at whose listener it came in; if that becomes another's, it is no one's. Who
   uses a forward proxy is asked before anything else, and again when the directory has changed. Each request
   outside of a tunnel is judged by what it shows itself: a proxy in front may send several users' requests
   on one connection. It stays one tenant's all the same: the connections to services are that tenant's.
6. It holds no policy: where to is routing.py's, what may be the planner's and the profiles', how it is
   carried out that of `exchange`.
"""

import functools
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
from cryptography import x509
from mitmproxy import connection, tls
from mitmproxy.http import HTTPFlow
from mitmproxy.proxy import server_hooks

from envelope.errors import SealgateError
from proxy import refusals
from proxy.asking import host_field
from proxy.bodies.bodies import refusal_for
from proxy.bodies.collecting import Collecting
from proxy.bodies.prefetch import Prefetch
from proxy.bodies.spool import Spools
from proxy.environments import Environments
from proxy.exchange.answering import Answering
from proxy.exchange.exchange import ClientBody, Exchange, Means, ended, exchange_of, source_of
from proxy.exchange.sending import Sending
from proxy.gate.permit import Collect, permit
from proxy.keys.cache import KeyCache
from proxy.messages.message import Fields, RequestHead
from proxy.metrics import OK, ProxyMetrics
from proxy.plans.planner import planned
from proxy.plans.request import Mode, Route
from proxy.plans.routing import Holder, Listener, Routing, Wanted
from proxy.recording import Recorder, Trail, path_of
from proxy.refusals import Refusal, RefusedError
from proxy.uploads import UploadStore
from proxy.users.identification import Identity, Shown, address_of, identify, still_holds
from runtime.audit import AuditLog
from runtime.clock import Clock, SystemClock

_COUNTED: Final = "sealgate.counted"
_IDENTITY_GOOD_S: Final = 10.0
"""While the directory does not change: certificates and passwords end by themselves too."""
MAX_FLOWS: Final = 256
"""Of one client connection. HTTP/2 bounds open streams, not those its client has reset while we wait for a
key or a service on their behalf: each would go on costing memory."""

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Client:
    """One client connection: whose it is, what CONNECT asked for, and the bodies under way."""

    connection: connection.Client
    holder: Holder | None
    """Whose the listener was when the client came, then whose the client is; None: nobody's yet."""
    identity: Identity | None = None
    """Of the request that came last, or of the CONNECT; None: not asked yet, for want of a request."""
    checked: tuple[int, float] = (0, 0.0)
    """The directory's revision and the time when the identity was last found to hold."""
    certificates: tuple[x509.Certificate, ...] = ()
    """Of the TLS connection to the proxy itself: the client's, then those it sent along."""
    connected: tuple[str, int] | None = None
    tunnel: tuple[str, int, str | None] | None = None
    """Host, port and server name of what is passed through unread."""
    flows: dict[str, list[ClientBody]] = field(default_factory=dict)

    def bodies(self) -> Iterator[ClientBody]:
        for bodies in self.flows.values():
            yield from bodies


type _FlowHook = Callable[["SealgateAddon", HTTPFlow], Coroutine[Any, Any, None]]


def fail_closed(hook: _FlowHook) -> _FlowHook:
    """Turn what a hook raises into the refusal it means; the gate refuses whatever this lets through."""

    @functools.wraps(hook)
    async def guarded(self: "SealgateAddon", flow: HTTPFlow) -> None:
        try:
            await hook(self, flow)
        except RefusedError as refused:
            permit(flow).revoke(refused.refusal)
        except SealgateError as error:
            permit(flow).revoke(refusal_for(error))
        except BaseException as error:
            permit(flow).revoke(refusals.INTERNAL)
            if not isinstance(error, Exception):
                raise
            # Not the text: it may quote what the client sent.
            log.exception("hook failed", hook=hook.__name__, error=type(error).__name__)

    return guarded


class SealgateAddon:
    """The only addon of ours in the engine. *wait_s*: how long an upload waits for a key that is late.

    Without *uploads* nothing that takes several requests is taken.
    """

    def __init__(
        self,
        *,
        keys: KeyCache,
        audit: AuditLog,
        prefetch: Prefetch,
        metrics: ProxyMetrics,
        wait_s: float,
        uploads: UploadStore | None = None,
        spools: Spools | None = None,
        collecting: Collecting | None = None,
        clock: Clock | None = None,
        environments: Environments | None = None,
    ) -> None:
        means = Means(keys, prefetch, uploads=uploads, wait_s=wait_s, spools=spools, collecting=collecting)
        self._sending = Sending(means)
        self._answering = Answering(means)
        self._recorder = Recorder(audit, metrics)
        self._metrics = metrics
        self._clock = clock or SystemClock()
        self._environments = environments or Environments()
        self._clients: dict[str, _Client] = {}
        self.routing: Routing | None = None
        """The current picture; the engine exchanges it. None: nothing is routed."""

    @property
    def audit_trouble(self) -> str | None:
        """Why the last event could not be written; None if it was."""
        return self._recorder.trouble

    # ---- connections

    def client_connected(self, client: connection.Client) -> None:
        listener = self._listener(client)
        known = _Client(client, None if listener is None else listener.holder())
        if listener is not None and listener.service is not None:
            known.identity = Identity(tenant=listener.tenants[0].tenant, address=address_of(_peer(client)))
        self._clients[client.id] = known

    def tls_established_client(self, data: tls.TlsData) -> None:
        """Keep the certificate shown to the proxy itself: the handshake inside a CONNECT wipes it."""
        try:
            known = self._clients.get(data.context.client.id)
            if known is not None and data.context.server.address is None:
                shown = data.context.client.certificate_list
                known.certificates = tuple(certificate.to_cryptography() for certificate in shown)
        except BaseException:
            self._clients.pop(data.context.client.id, None)  # nobody's from now on
            raise

    def client_disconnected(self, client: connection.Client) -> None:
        gone = self._clients.pop(client.id, None)
        if gone is not None:
            self._metrics.active.dec(len(gone.flows))

    def server_connect(self, data: server_hooks.ServerConnectionHookData) -> None:
        """The last look before a socket is opened: only addresses of the picture."""
        try:
            address = data.server.address
            if address is None or not self._routing().may_connect(
                data.client.proxy_mode.full_spec, address[0], address[1], tenant=self.tenant_of(data.client)
            ):
                data.server.error = "not an address of this tenant"
        except BaseException:
            data.server.error = "the proxy failed while checking the address"
            raise

    def tls_clienthello(self, data: tls.ClientHelloData) -> None:
        """Pass through unread what the tenant has listed, and nothing else."""
        data.ignore_connection = False
        address = data.context.server.address
        if address is None:
            return  # TLS to the proxy itself
        client = data.context.client
        spec = client.proxy_mode.full_spec
        routing = self.routing
        known = self._clients.get(client.id)
        if routing is None or known is None or known.identity is None or self._is_stray(known):
            return
        tunnel = (address[0], address[1], data.client_hello.sni)
        tenant = known.identity.tenant
        if routing.tunnels(spec, *tunnel, tenant=tenant):
            self._recorder.event(
                "tunnel-opened",
                tenant=tenant,
                user=known.identity.name,
                host=address[0],
                port=address[1],
                client=_peer(client),
            )
            self._metrics.tunnelled.labels(tenant).inc()
            known.tunnel = tunnel
            data.ignore_connection = True

    @fail_closed
    async def http_connect(self, flow: HTTPFlow) -> None:
        host, port = flow.request.host, flow.request.port
        client = self._client_of(flow)
        if client.connected is not None:
            raise RefusedError(refusals.BAD_MESSAGE)  # it is a tunnel already
        identity = self._identified(client, Fields(flow.request.headers.fields))
        self._refuse_healing(identity)
        spec = flow.client_conn.proxy_mode.full_spec
        self._routing().check_connect(spec, host, port, tenant=identity.tenant)
        client.connected = (host, port)

    # ---- requests

    @fail_closed
    async def requestheaders(self, flow: HTTPFlow) -> None:
        if flow.error is not None:
            return  # invalid: shown to us, and refused by the gate
        client = self._client_of(flow)
        if len(client.flows) >= MAX_FLOWS:
            raise RefusedError(refusals.TOO_MANY)
        request = flow.request
        if request.is_http2 and "transfer-encoding" in request.headers:
            raise RefusedError(refusals.BAD_MESSAGE)
        fields = Fields(request.headers.fields)
        route = self._route(flow, client, fields)
        head = RequestHead(
            method=request.method,
            target=request.path,
            fields=fields,
            http2=request.is_http2,
            host=request.host_header or "",
        )
        if not request.is_http2:
            request.authority = ""  # origin form: Host says the rest
        if route.mode is Mode.REVERSE:
            request.host_header = host_field(route.service)
        elif request.host != (own := route.service.upstream.host):
            request.host = own  # from a name below it: one service, one address
        exchange = self._exchange(flow, client, head, route)
        bodies: list[ClientBody] = []
        client.flows[flow.id] = bodies
        self._metrics.active.inc()
        permit(flow).request = await self._sending.permit(flow, exchange, bodies)
        if flow.response is not None:
            self._end(flow, OK)  # no hook follows where a body that comes is not read

    def _exchange(self, flow: HTTPFlow, client: _Client, head: RequestHead, route: Route) -> Exchange:
        profile = self._routing().profile(route.service)
        user = client.identity.name if client.identity is not None else None
        peer = _peer(flow.client_conn)
        trail = Trail(self._recorder, route, method=head.method, target=head.target, client=peer, user=user)
        request, plan = planned(
            head, route, profile, now_s=self._clock.wall_s(), directory=self._routing().directory
        )
        source = source_of(request, plan, flow.request.headers.fields)
        return Exchange(request=request, profile=profile, plan=plan, trail=trail, source=source)

    def request(self, flow: HTTPFlow) -> Coroutine[Any, Any, None] | None:
        """The body is here. Only what was to be collected has still to be decided."""
        try:
            return self._decided(flow) if isinstance(permit(flow).request, Collect) else None
        except BaseException:
            permit(flow).revoke(refusals.INTERNAL)
            raise

    @fail_closed
    async def _decided(self, flow: HTTPFlow) -> None:
        exchange, collected = exchange_of(flow), permit(flow).request
        if exchange is None or not isinstance(collected, Collect):
            raise RefusedError(refusals.NO_PERMIT)
        await self._sending.decide(flow, exchange, collected)

    def _route(self, flow: HTTPFlow, client: _Client, fields: Fields) -> Route:
        request = flow.request
        wanted = Wanted(
            scheme=request.scheme,
            host=request.host,
            port=request.port,
            names=tuple(name for name in (request.authority, *fields.all("host")) if name),
            server_name=flow.client_conn.sni,
            connected=client.connected,
            in_clear=not flow.client_conn.tls_established,
            target=request.path,
        )
        identity = self._identified(client, fields)
        self._refuse_healing(identity)
        return self._routing().route(flow.client_conn.proxy_mode.full_spec, wanted, tenant=identity.tenant)

    def _refuse_healing(self, identity: Identity) -> None:
        if self._environments.refuses(identity.tenant):
            raise RefusedError(refusals.ENV_HEALING)

    def _identified(self, client: _Client, fields: Fields) -> Identity:
        """Whose user asks. RefusedError if that cannot be told, or it is another tenant's than before."""
        listener = self._listener(client.connection)
        if listener is None:
            raise RefusedError(refusals.UNMANAGED_HOST)
        before = client.identity
        if before is not None and (listener.service is not None or client.connected is not None):
            return before
        now_s = self._clock.wall_s()
        found = identify(
            {entry.tenant: entry.access for entry in listener.tenants},
            Shown(
                address=address_of(_peer(client.connection)),
                certificate=client.certificates[0] if client.certificates else None,
                intermediates=client.certificates[1:],
                authorization=tuple(fields.all("proxy-authorization")),
            ),
            self._routing().directory.users,
            now_s=now_s,
        )
        if before is not None and found.tenant != before.tenant:
            raise RefusedError(refusals.USER_MISMATCH)
        client.identity, client.holder = found, listener.holder(found.tenant)
        client.checked = (self._routing().directory.revision, now_s)
        return found

    # ---- answers

    @fail_closed
    async def responseheaders(self, flow: HTTPFlow) -> None:
        exchange, response = exchange_of(flow), flow.response
        if exchange is None or response is None:
            raise RefusedError(refusals.NO_PERMIT)
        if exchange.is_answered_here:
            return
        client = self._clients.get(flow.client_conn.id)
        bodies = client.flows.setdefault(flow.id, []) if client is not None else []
        permit(flow).response = await self._answering.permit(flow, response, exchange, bodies)

    def response(self, flow: HTTPFlow) -> Coroutine[Any, Any, None] | None:
        """The answer's body is here. What was to be collected has still to be replaced."""
        try:
            if isinstance(permit(flow).response, Collect):
                return self._replaced(flow)
            self._end(flow, OK)
        except BaseException:
            permit(flow).revoke(refusals.INTERNAL)
            raise
        else:
            return None

    @fail_closed
    async def _replaced(self, flow: HTTPFlow) -> None:
        exchange, response, collected = exchange_of(flow), flow.response, permit(flow).response
        if exchange is None or response is None or not isinstance(collected, Collect):
            raise RefusedError(refusals.NO_PERMIT)
        await self._answering.replace(response, exchange, collected)
        self._end(flow, OK)

    # ---- ends

    def error(self, flow: HTTPFlow) -> None:
        self._end(flow, "aborted")

    def on_refused(self, flow: HTTPFlow | None, refusal: Refusal, bytes_sent: bool) -> None:
        """The gate has ended *flow* (None: a connection). AuditUnavailableError if it is not recorded."""
        if flow is None:
            self._metrics.count(None, "none", refusal.code)
            self._recorder.event("connection-refused", outcome=refusal.code)
            return
        exchange = exchange_of(flow)
        owner = exchange.owner if exchange is not None else None
        key = exchange.key_in_use if exchange is not None else None
        self._count(flow, exchange, refusal.code)
        self._recorder.event(
            "request-refused",
            outcome=refusal.code,
            service=str(owner) if owner else None,
            key_id=str(key.key_id) if key is not None else None,
            method=flow.request.method[:32],
            host=flow.request.host[:255],
            path=path_of(flow.request.path),
            client=_peer(flow.client_conn),
            user=exchange.trail.user if exchange is not None else None,
            bytes_sent="yes" if bytes_sent else "no",
        )

    def ended_keys(self) -> list[tuple[connection.Client, Refusal]]:
        """The clients that have a body under way whose key has ended though nothing moves it, and why."""
        found: list[tuple[connection.Client, Refusal]] = []
        for client in self._clients.values():
            refusal = next(filter(None, map(ended, client.bodies())), None)
            if refusal is not None:
                found.append((client.connection, refusal))
        return found

    def is_busy(self, client: connection.Client) -> bool:
        """Whether a request of *client* is in flight."""
        known = self._clients.get(client.id)
        return known is not None and bool(known.flows)

    def count_cut(self) -> None:
        self._metrics.cut.inc()

    def strays(self) -> list[connection.Client]:
        """The clients that the current picture has no place for: whose listener is gone or is another's by
        now, or who are passed through unread to where that is no longer permitted."""
        return [client.connection for client in self._clients.values() if self._is_stray(client)]

    def _is_stray(self, client: _Client) -> bool:
        listener = self._listener(client.connection)
        if listener is None or self.routing is None:
            return True
        identity = client.identity
        if identity is None:
            return client.holder != listener.holder()
        if client.holder is None or client.holder != listener.holder(identity.tenant):
            return True
        if listener.service is None and not self._still_holds(client, identity, listener):
            return True
        if client.tunnel is None:
            return False
        spec = client.connection.proxy_mode.full_spec
        return not self.routing.tunnels(spec, *client.tunnel, tenant=identity.tenant)

    def _still_holds(self, client: _Client, identity: Identity, listener: Listener) -> bool:
        directory, now_s = self._routing().directory, self._clock.wall_s()
        revision, at_s = client.checked
        if revision == directory.revision and 0 <= now_s - at_s < _IDENTITY_GOOD_S:
            return True
        holds = still_holds(identity, listener.tenant(identity.tenant).access, directory.users, now_s=now_s)
        if holds:
            client.checked = (directory.revision, now_s)
        return holds

    def tenant_of(self, client: connection.Client) -> str | None:
        """The tenant that *client* is known to belong to; None: not known, or the listener's only one."""
        known = self._clients.get(client.id)
        return known.identity.tenant if known is not None and known.identity is not None else None

    def _listener(self, client: connection.Client) -> Listener | None:
        return self.routing.listeners.get(client.proxy_mode.full_spec) if self.routing is not None else None

    def _end(self, flow: HTTPFlow, outcome: str) -> None:
        if (exchange := exchange_of(flow)) is not None:
            exchange.let_go()
        client = self._clients.get(flow.client_conn.id)
        if client is not None and client.flows.pop(flow.id, None) is not None:
            self._metrics.active.dec()
        if flow.request.method != "CONNECT":
            self._count(flow, exchange, outcome)

    def _count(self, flow: HTTPFlow, exchange: Exchange | None, outcome: str) -> None:
        if _COUNTED in flow.metadata:
            return
        flow.metadata[_COUNTED] = True
        if exchange is None:
            self._metrics.count(None, "none", outcome)
        else:
            self._metrics.count(exchange.owner, type(exchange.plan).__name__.lower(), outcome)

    # ---- what the hooks share

    def _routing(self) -> Routing:
        if self.routing is None:
            raise RefusedError(refusals.UNMANAGED_HOST)
        return self.routing

    def _client_of(self, flow: HTTPFlow) -> _Client:
        client = self._clients.get(flow.client_conn.id)
        if client is None:
            raise RefusedError(refusals.INTERNAL)
        if self._is_stray(client):
            raise RefusedError(refusals.UNMANAGED_HOST)
        return client


def _peer(client: connection.Client) -> str:
    return str(client.peername[0])
