"""Between mitmproxy's hooks and our plans: finds the route, asks the planner, permits what the plan says.

1. It decides in `requestheaders` and `responseheaders` only: later a body would have left.
2. Every hook that can let something through is guarded: what it raises refuses the flow.
3. Every use of a key is in the audit log before a byte it changes moves on; if it cannot be, it is not used.
4. The head of a message is edited after everything that may refuse it, right before the permit.
5. A connection is the tenant's at whose listener it came in; if that becomes another's, it is no one's. Who
   uses a forward proxy is asked before anything else, and again when the directory has changed.
6. It holds no policy: where to is routing.py's, what may be the planner's, how bodies change bodies.py's.
"""

import functools
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, cast

import structlog
from cryptography import x509
from mitmproxy import connection, tls
from mitmproxy.http import Headers, HTTPFlow, Message
from mitmproxy.proxy import server_hooks

from envelope.errors import KeyUnavailableError, SealgateError
from envelope.keys import NetworkService
from envelope.objects import MAGIC, Bind, Header, has_magic, plain_length, sealed_range
from proxy import refusals
from proxy.bodies import (
    CODINGS,
    NoBody,
    OpenBody,
    OpenRangeBody,
    SealBody,
    refusal_for,
    sealing_refusal,
)
from proxy.gate.permit import CLEAR, Clear, Transform, permit
from proxy.keys.cache import DataKey, KeyCache
from proxy.message import AnswerHead, Fields, RequestHead, declared_length
from proxy.metrics import OK, ProxyMetrics
from proxy.plan import (
    AskedRange,
    Edits,
    Forward,
    HeadSize,
    LegacyRange,
    MapSize,
    Open,
    OpenPart,
    OpenRange,
    OpenWhole,
    Pass,
    RangeRefusal,
    Refuse,
    RequestPlan,
    Route,
    Seal,
)
from proxy.planner import plan_answer, plan_request
from proxy.prefetch import Beginning, Prefetch, PrefetchError, Source
from proxy.profiles import profile_named
from proxy.refusals import Refusal, RefusedError
from proxy.routing import Holder, Listener, Routing, Wanted
from proxy.tenants.model import LegacyPolicy
from proxy.users.identification import Identity, Shown, address_of, identify, still_holds
from runtime.audit import AuditLog, AuditUnavailableError
from runtime.clock import Clock, SystemClock

_EXCHANGE: Final = "sealgate.exchange"
_COUNTED: Final = "sealgate.counted"
_IDENTITY_GOOD_S: Final = 10.0
"""While the directory does not change: certificates and passwords end by themselves too."""
_MAX_AUDIT_PATH: Final = 512
MAX_FLOWS: Final = 256
"""Of one client connection. HTTP/2 bounds open streams, not those its client has reset while we wait for a
key or a service on their behalf: each would go on costing memory."""

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class Exchange:
    """What is known of one flow between its hooks."""

    route: Route
    plan: RequestPlan
    method: str
    target: str
    client: str
    user: str | None = None
    """As whom the client was identified, if by more than where it came from."""
    asked: AskedRange | None = None
    beginning: Beginning | None = None
    key: DataKey | None = None

    @property
    def owner(self) -> NetworkService:
        return self.route.service.owner


@dataclass(slots=True, eq=False)
class _Client:
    """One client connection: whose it is, what CONNECT asked for, and the bodies under way."""

    connection: connection.Client
    holder: Holder | None
    """Whose the listener was when the client came, then whose the client is; None: nobody's yet."""
    identity: Identity | None = None
    """None: not asked yet, for want of a request."""
    checked: tuple[int, float] = (0, 0.0)
    """The directory's revision and the time when the identity was last found to hold."""
    certificates: tuple[x509.Certificate, ...] = ()
    """Of the TLS connection to the proxy itself: the client's, then those it sent along."""
    connected: tuple[str, int] | None = None
    tunnel: tuple[str, int, str | None] | None = None
    """Host, port and server name of what is passed through unread."""
    flows: dict[str, list[SealBody | OpenBody | OpenRangeBody]] = field(default_factory=dict)

    def bodies(self) -> Iterator[SealBody | OpenBody | OpenRangeBody]:
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
    """The only addon of ours in the engine. *wait_s*: how long an upload waits for a key that is late."""

    def __init__(
        self,
        *,
        keys: KeyCache,
        audit: AuditLog,
        prefetch: Prefetch,
        metrics: ProxyMetrics,
        wait_s: float,
        clock: Clock | None = None,
    ) -> None:
        self._keys = keys
        self._audit = audit
        self._prefetch = prefetch
        self._metrics = metrics
        self._wait_s = wait_s
        self._clock = clock or SystemClock()
        self._clients: dict[str, _Client] = {}
        self.audit_trouble: str | None = None
        """Why the last event could not be written; None if it was."""
        self.routing: Routing | None = None
        """The current picture; the engine exchanges it. None: nothing is routed."""

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
            self._record(
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
        identity = self._identified(client, Fields(flow.request.headers.fields))
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
        head = RequestHead(method=request.method, target=request.path, fields=fields, http2=request.is_http2)
        plan = plan_request(head, route, profile_named(route.service.profile))
        exchange = Exchange(
            route,
            plan,
            request.method,
            request.path,
            _peer(flow.client_conn),
            client.identity.name if client.identity is not None else None,
        )
        flow.metadata[_EXCHANGE] = exchange
        client.flows[flow.id] = []
        self._metrics.active.inc()
        if not request.is_http2:
            request.authority = ""  # origin form: Host says the rest
        permit(flow).request = await self._permitted_request(flow, exchange, client)

    async def _permitted_request(
        self, flow: HTTPFlow, exchange: Exchange, client: _Client
    ) -> Clear | Transform:
        plan = exchange.plan
        match plan:
            case Refuse():
                raise RefusedError(plan.refusal)
            case Seal():
                body = await self._sealing(exchange, plan)
                client.flows[flow.id].append(body)
                _edit(flow.request.headers, plan.edits)
                _stream(flow.request, body)
                return body
            case OpenRange():
                _edit(flow.request.headers, await self._range(flow, exchange, plan))
            case Forward() | Open() | LegacyRange() | HeadSize():
                _edit(flow.request.headers, plan.edits)
        if not plan.body_may_come:
            return CLEAR
        flow.request.headers["content-length"] = "0"
        nothing = NoBody()
        _stream(flow.request, nothing)
        return nothing

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
        )
        identity = self._identified(client, fields)
        return self._routing().route(flow.client_conn.proxy_mode.full_spec, wanted, tenant=identity.tenant)

    def _identified(self, client: _Client, fields: Fields) -> Identity:
        """Whose user the client is. RefusedError if that cannot be told, or not any more."""
        listener = self._listener(client.connection)
        if listener is None:
            raise RefusedError(refusals.UNMANAGED_HOST)
        if client.identity is not None:
            return client.identity
        found = identify(
            {entry.tenant: entry.access for entry in listener.tenants},
            Shown(
                address=address_of(_peer(client.connection)),
                certificate=client.certificates[0] if client.certificates else None,
                intermediates=client.certificates[1:],
                authorization=tuple(fields.all("proxy-authorization")),
            ),
            self._routing().directory.users,
            now_s=self._clock.wall_s(),
        )
        client.identity, client.holder = found, listener.holder(found.tenant)
        return found

    async def _sealing(self, exchange: Exchange, plan: Seal) -> SealBody:
        try:
            key = self._keys.sealing_key(exchange.owner)
        except KeyUnavailableError:
            key = await self._late_key(exchange.owner)
        body = SealBody(
            key,
            plain_bytes=plan.plain_bytes,
            empty=plan.empty,
            digests=plan.digests,
            meter=self._metrics.of(exchange.owner).sealed,
        )
        self._record_use("object-seal", exchange, key, size_bytes=plan.plain_bytes)
        exchange.key = key
        return body

    async def _late_key(self, owner: NetworkService) -> DataKey:
        """A push may be on its way. The gate reads nothing of the body meanwhile."""
        try:
            return await self._keys.wait_for_sealing_key(owner, timeout_s=self._wait_s)
        except KeyUnavailableError as error:
            raise RefusedError(sealing_refusal(error)) from error

    # ---- ranges: docs/profiles.md tells what is asked of the service

    async def _range(self, flow: HTTPFlow, exchange: Exchange, plan: OpenRange) -> Edits:
        """What to send up for a read of one range; `plan.edits` alone reads the whole object."""
        source = self._source(flow, exchange)
        try:
            begin = await self._prefetch.beginning(source)
            if begin is None or not _same_version(plan.if_range, begin):
                return plan.edits
            if not has_magic(begin.data):
                return self._legacy_range(flow, exchange, plan, begin)
            return await self._sealed_range(flow, exchange, plan, begin, source)
        except PrefetchError as error:
            # The client's own request meets the same trouble and brings the true answer.
            log.info("range not prepared", service=str(exchange.owner), cause=str(error))
            return plan.edits

    async def _sealed_range(
        self, flow: HTTPFlow, exchange: Exchange, plan: OpenRange, begin: Beginning, source: Source
    ) -> Edits:
        header = Header.parse(begin.data)
        if header.bind is not Bind.NOTHING:
            raise RefusedError(refusals.OBJECT_INVALID)
        plain_bytes = plain_length(begin.stored_bytes)
        key = self._keys.opening_key(exchange.owner, header.key_id)
        span = plan.wanted.resolve(plain_bytes)
        self._record_use("object-open", exchange, key, size_bytes=begin.stored_bytes, span=span)
        if not await self._prefetch.proven_size(source, begin, key, plain_bytes):
            raise RefusedError(refusals.UPSTREAM_CHANGED)
        if span is None:
            raise RefusedError(RangeRefusal.of(plain_bytes))
        stored = sealed_range(*span, plain_bytes=plain_bytes)
        pin = _pin(flow.request.headers, begin.etag)
        exchange.asked = AskedRange(
            stored=stored,
            stored_bytes=begin.stored_bytes,
            plain=span,
            plain_bytes=plain_bytes,
            pinned=bool(pin) and "if-match" not in flow.request.headers,
            etag=begin.etag,
        )
        exchange.beginning = begin
        exchange.key = key
        return plan.edits.also(put=(("range", f"bytes={stored[0]}-{stored[1] - 1}"), *pin))

    def _legacy_range(self, flow: HTTPFlow, exchange: Exchange, plan: OpenRange, begin: Beginning) -> Edits:
        """A range of what was there before us. Only where it can be pinned to what was looked at."""
        if exchange.route.service.legacy is LegacyPolicy.STRICT:
            raise RefusedError(refusals.NOT_SEALED if begin.data else refusals.OBJECT_INVALID)
        pin = _pin(flow.request.headers, begin.etag)
        if not pin:
            return plan.edits
        self._legacy_passed(exchange)
        exchange.plan = LegacyRange(
            edits=plan.edits, etag=pin[0][1], pinned="if-match" not in flow.request.headers
        )
        wanted = flow.request.headers["range"]
        return plan.edits.also(put=(("range", wanted), *pin))

    # ---- answers

    @fail_closed
    async def responseheaders(self, flow: HTTPFlow) -> None:
        exchange = _exchange_of(flow)
        response = flow.response
        if exchange is None or response is None:
            raise RefusedError(refusals.NO_PERMIT)
        answer = AnswerHead(status=response.status_code, fields=Fields(response.headers.fields))
        if isinstance(exchange.plan, Seal) and 200 <= answer.status < 300 and not _has_left(flow):
            raise RefusedError(refusals.ANSWER_REFUSED)
        plan = plan_answer(exchange.plan, answer, exchange.route, asked=exchange.asked)
        granted: Clear | OpenBody | OpenRangeBody = CLEAR
        match plan:
            case Refuse():
                raise RefusedError(plan.refusal)
            case Pass():
                if not plan.may_be_sealed:
                    granted = self._not_sealed(exchange, answer)
                _edit(response.headers, plan.edits)
            case MapSize():
                await self._map_size(flow, exchange, plan, answer)
                _edit(response.headers, plan.edits)
            case OpenPart():
                granted = self._open_part(exchange)
                _edit(response.headers, plan.edits)
            case OpenWhole():
                granted = await self._open_whole(flow, exchange, plan, answer)
                _edit(response.headers, _declared(plan.edits, answer, granted.expected_out_bytes))
        if isinstance(granted, Transform):
            _stream(response, granted)
            self._client_of(flow).flows.setdefault(flow.id, []).append(granted)
        else:
            response.stream = True
        permit(flow).response = granted

    def _not_sealed(self, exchange: Exchange, answer: AnswerHead) -> Clear | OpenBody:
        """Passes anything but what begins like an object."""
        length = declared_length(answer.fields)
        if answer.status == 204 or (length is not None and length < len(MAGIC)):
            return CLEAR
        return OpenBody(
            exchange.owner,
            lambda header: self._keys.opening_key(exchange.owner, header.key_id),
            out_bytes=length,
            may_be_sealed=False,
            may_be_legacy=True,
            meter=self._metrics.of(exchange.owner).opened,
        )

    def _open_part(self, exchange: Exchange) -> OpenRangeBody:
        asked, begin, key = exchange.asked, exchange.beginning, exchange.key
        if asked is None or begin is None or key is None:
            raise RefusedError(refusals.INTERNAL)
        return OpenRangeBody(key, begin.data, asked, meter=self._metrics.of(exchange.owner).opened)

    async def _open_whole(
        self, flow: HTTPFlow, exchange: Exchange, plan: OpenWhole, answer: AnswerHead
    ) -> OpenBody:
        def find_key(header: Header) -> DataKey:
            key = self._keys.opening_key(exchange.owner, header.key_id)
            self._record_use("object-open", exchange, key, size_bytes=plan.stored_bytes)
            exchange.key = key
            return key

        codings = [coding for coding in answer.fields.tokens("content-encoding") if coding != "identity"]
        out_bytes = plan.plain_bytes
        may_be_sealed, may_be_legacy = plan.stored_bytes is None or plan.plain_bytes is not None, False
        if exchange.route.service.legacy is LegacyPolicy.MIGRATE:
            # What it is has to be known before its length is declared; a second look costs a request.
            known = (
                await self._is_sealed(flow, exchange, answer)
                if may_be_sealed and out_bytes is not None
                else None
            )
            # A coding that cannot be looked through may hide what is sealed.
            may_be_legacy = not known and CODINGS.issuperset(codings) and len(codings) <= 1
            may_be_sealed = may_be_sealed and known is not False
            if may_be_legacy:
                out_bytes = None if may_be_sealed else plan.stored_bytes
        return OpenBody(
            exchange.owner,
            find_key,
            out_bytes=out_bytes,
            may_be_sealed=may_be_sealed,
            may_be_legacy=may_be_legacy,
            on_legacy=lambda: self._legacy_passed(exchange),
            coding=codings[0] if codings else None,
            meter=self._metrics.of(exchange.owner).opened,
        )

    async def _map_size(self, flow: HTTPFlow, exchange: Exchange, plan: MapSize, answer: AnswerHead) -> None:
        if not plan.probe:
            return
        response = flow.response
        sealed = await self._is_sealed(flow, exchange, answer)
        if response is None or sealed is False:
            return  # the length is the plaintext's already
        if sealed is None:
            response.headers.pop("content-length", None)  # better no size than a wrong one
        else:
            response.headers["content-length"] = str(plan.plain_bytes)

    async def _is_sealed(self, flow: HTTPFlow, exchange: Exchange, answer: AnswerHead) -> bool | None:
        etag = answer.fields.sole("etag")
        try:
            return await self._prefetch.is_sealed(
                self._source(flow, exchange), None if etag is None or etag.startswith("W/") else etag
            )
        except PrefetchError as error:
            log.info("object not probed", service=str(exchange.owner), cause=str(error))
            return None

    # ---- ends

    def response(self, flow: HTTPFlow) -> None:
        self._end(flow, OK)

    def error(self, flow: HTTPFlow) -> None:
        self._end(flow, "aborted")

    def on_refused(self, flow: HTTPFlow | None, refusal: Refusal, bytes_sent: bool) -> None:
        """The gate has ended *flow* (None: a connection). AuditUnavailableError if it is not recorded."""
        if flow is None:
            self._metrics.count(None, "none", refusal.code)
            self._record("connection-refused", outcome=refusal.code)
            return
        exchange = _exchange_of(flow)
        owner = exchange.owner if exchange is not None else None
        self._count(flow, exchange, refusal.code)
        self._record(
            "request-refused",
            outcome=refusal.code,
            service=str(owner) if owner else None,
            key_id=str(exchange.key.key_id) if exchange is not None and exchange.key is not None else None,
            method=flow.request.method[:32],
            host=flow.request.host[:255],
            path=_path_of(flow.request.path),
            client=_peer(flow.client_conn),
            user=exchange.user if exchange is not None else None,
            bytes_sent="yes" if bytes_sent else "no",
        )

    def ended_keys(self) -> list[tuple[connection.Client, Refusal]]:
        """The clients that have a body under way whose key has ended though nothing moves it, and why."""
        ended: list[tuple[connection.Client, Refusal]] = []
        for client in self._clients.values():
            refusal = next(filter(None, map(_ended, client.bodies())), None)
            if refusal is not None:
                ended.append((client.connection, refusal))
        return ended

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
        client = self._clients.get(flow.client_conn.id)
        if client is not None and client.flows.pop(flow.id, None) is not None:
            self._metrics.active.dec()
        if flow.request.method != "CONNECT":
            self._count(flow, _exchange_of(flow), outcome)

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

    def _source(self, flow: HTTPFlow, exchange: Exchange) -> Source:
        plan = exchange.plan
        dropped = frozenset[str]() if isinstance(plan, Refuse) else plan.edits.drop
        fields = flow.request.headers.fields
        return Source(
            service=exchange.route.service,
            target=exchange.target,
            fields=tuple(field for field in fields if field[0].decode("latin-1").lower() not in dropped),
        )

    def _legacy_passed(self, exchange: Exchange) -> None:
        self._record(
            "object-passed-unsealed",
            service=str(exchange.owner),
            method=exchange.method,
            path=_path_of(exchange.target),
            client=exchange.client,
        )
        self._metrics.of(exchange.owner).legacy()

    def _record_use(
        self,
        action: str,
        exchange: Exchange,
        key: DataKey,
        *,
        size_bytes: int | None,
        span: tuple[int, int] | None = None,
    ) -> None:
        """*size_bytes*: what is declared, of plaintext going up or of the object coming down."""
        self._record(
            action,
            service=str(exchange.owner),
            key_id=str(key.key_id),
            method=exchange.method,
            path=_path_of(exchange.target),
            client=exchange.client,
            user=exchange.user,
            size_bytes=size_bytes,
            start=span[0] if span else None,
            stop=span[1] if span else None,
        )

    def _record(self, action: str, *, outcome: str = OK, **fields: str | int | None) -> None:
        """One event of the data path. AuditUnavailableError: what it stands for must not happen."""
        try:
            self._audit.append(action, outcome=outcome, durable=False, **fields)
        except AuditUnavailableError as error:
            self.audit_trouble = str(error)
            raise
        self.audit_trouble = None


def _exchange_of(flow: HTTPFlow) -> Exchange | None:
    exchange = flow.metadata.get(_EXCHANGE)
    return exchange if isinstance(exchange, Exchange) else None


def _ended(body: SealBody | OpenBody | OpenRangeBody) -> Refusal | None:
    if body.finished or body.failure is not None or body.key is None:
        return None
    try:
        body.key.check()
    except KeyUnavailableError as error:
        return refusal_for(error)
    return None


def _has_left(flow: HTTPFlow) -> bool:
    """Whether the last of the upload is on its way: before that no service can have it."""
    upload = permit(flow).request
    return isinstance(upload, Transform) and upload.finished


def _stream(message: Message, transform: Transform) -> None:
    # Its pieces are any buffers; mitmproxy's annotation says bytes, its code only passes them on.
    message.stream = cast("Any", transform)


def _edit(headers: Headers, edits: Edits) -> None:
    """In one pass: mitmproxy's mapping looks through all fields for each name."""
    gone = edits.drop.union(name for name, _ in edits.put)
    kept = [field for field in headers.fields if field[0].decode("latin-1").lower() not in gone]
    kept += [(name.encode(), value.encode("utf-8", "surrogateescape")) for name, value in edits.put]
    headers.fields = tuple(kept)


def _declared(edits: Edits, answer: AnswerHead, out_bytes: int | None) -> Edits:
    """*edits*, and the length of what will leave in place of what came."""
    if "content-length" not in answer.fields:
        return edits
    if out_bytes is None:
        return edits.also(drop=("content-length",))
    return edits.also(put=(("content-length", str(out_bytes)),))


def _same_version(if_range: str | None, begin: Beginning) -> bool:
    """Whether the range may be served (RFC 9110 13.1.5): no condition, or exactly this version."""
    if if_range is None:
        return True
    if if_range.startswith(('"', "W/")):
        return begin.etag is not None and if_range == begin.etag
    return begin.last_modified is not None and if_range == begin.last_modified


def _pin(headers: Headers, etag: str | None) -> tuple[tuple[str, str], ...]:
    """If-Match for the version that was looked at; nothing where it has no strong ETag.

    A condition of the client's that does not name this version stays as it is, for the service to judge.
    """
    if etag is None:
        return ()
    theirs = headers.get("if-match")
    if theirs is not None and theirs.strip() != "*" and etag not in theirs:
        return ()
    return (("if-match", etag),)


def _path_of(target: str) -> str:
    """Without the query, which may hold credentials."""
    return target.partition("?")[0][:_MAX_AUDIT_PATH]


def _peer(client: connection.Client) -> str:
    return str(client.peername[0])
