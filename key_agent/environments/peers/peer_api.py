"""What an agent answers the agents of other environments: mutual TLS, one table of routes, bounded bodies.

1. Nobody is answered whose certificate is not an agent's of this tenant, at this moment (peer_trust.py).
   What only members may do is refused to everybody else of the tenant.
2. A handshake, a body and an answer each have their time, large ones as long as they take at a decent rate;
   a peer has so many requests at once, and all together so many, until the answer is gone: one environment
   that hangs, dribbles or floods takes nothing from the others.
3. A refusal is a problem document with a stable code; what it tells can be seen by whoever is a member.
4. A renewed certificate is shown to every connection a second after its files changed, without a restart.
"""

import asyncio
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, cast

import structlog
from aiohttp import web
from cryptography import x509

from envelope.certificates import CertificateError, Role, read_identity
from envelope.errors import SealgateError
from key_agent.environments.peers.peer_transport import allowed_s, version_of
from key_agent.environments.peers.peer_trust import PeerTrust
from runtime.clock import Clock
from runtime.serve import GRACE_S, Handler, ProblemError, make_application, running
from runtime.tls import ServerTls, TlsError, peer_certificate

log = structlog.get_logger(__name__)

MAX_BODY_BYTES: Final = 64 << 20
"""A whole registry, of some 30,000 keys."""
BODY_TIMEOUT_S: Final = 30.0
AT_MOST_S: Final = 150.0
"""For a body, or an answer, of any size: half of the usual registry lease."""
_PIECE_BYTES: Final = 1 << 16
HANDSHAKE_TIMEOUT_S: Final = 5.0
AT_ONCE_PER_AGENT: Final = 8
AT_ONCE: Final = 64
_BUSY_RETRY_S: Final = 1
LOOK_AT_FILES_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class PeerCall:
    """What an agent asks."""

    agent_id: str
    """Proven by its certificate."""
    body: bytes
    query: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class PeerRoute:
    """One thing that peers may ask. What *handle* returns is the body of the answer 200."""

    method: str
    path: str
    handle: Callable[[PeerCall], Awaitable[bytes]]
    members_only: bool = True
    roles: frozenset[Role] = frozenset({Role.AGENT_TLS})
    """Whose certificates are taken. The id of a load balancer's companion is no agent's, whatever it is."""
    limit_bytes: int = MAX_BODY_BYTES


type Refusal = tuple[int, str, str]
"""Status, code and next step of an error that handlers raise."""


def make_api(
    routes: Sequence[PeerRoute],
    *,
    trust: PeerTrust,
    is_member: Callable[[str], bool],
    refusals: Mapping[type[SealgateError], Refusal],
    body_timeout_s: float = BODY_TIMEOUT_S,
) -> web.Application:
    """*is_member*: whether an agent id stands in the registry. *refusals*: errors that are answers."""
    application = make_application(client_max_size_bytes=MAX_BODY_BYTES)
    door = _Door(trust, is_member, refusals, body_timeout_s)
    for route in routes:
        application.router.add_route(route.method, route.path, door.handler(route))
    return application


class _Places:
    def __init__(self) -> None:
        self._taken: Counter[str] = Counter()

    def take(self, agent_id: str) -> bool:
        if self._taken[agent_id] >= AT_ONCE_PER_AGENT or self._taken.total() >= AT_ONCE:
            return False
        self._taken[agent_id] += 1
        return True

    def leave(self, agent_id: str) -> None:
        self._taken[agent_id] -= 1
        if not self._taken[agent_id]:
            del self._taken[agent_id]


class _Door:
    """What every request passes (rules 1 and 2)."""

    def __init__(
        self,
        trust: PeerTrust,
        is_member: Callable[[str], bool],
        refusals: Mapping[type[SealgateError], Refusal],
        body_timeout_s: float,
    ) -> None:
        self._trust = trust
        self._is_member = is_member
        self._refusals = refusals
        self._body_timeout_s = body_timeout_s
        self._places = _Places()

    def handler(self, route: PeerRoute) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            caller = self._caller(request, route)
            if not self._places.take(caller):
                raise ProblemError(
                    503,
                    "busy",
                    "Too many requests at once.",
                    "Try again in a second.",
                    headers={"Retry-After": str(_BUSY_RETRY_S)},
                )
            try:
                body = await _body(request, route.limit_bytes, self._body_timeout_s)
                answer = await route.handle(PeerCall(caller, body, request.query))
                return await _answered(request, answer, self._body_timeout_s)
            except SealgateError as error:
                raise self._refusal(error) from error
            finally:
                self._places.leave(caller)

        return handle

    def _caller(self, request: web.Request, route: PeerRoute) -> str:
        try:
            caller = self._identified(peer_certificate(request.transport), route)
        except CertificateError as error:
            raise ProblemError(
                403, "identity", str(error), "Show a TLS certificate of an agent of this tenant."
            ) from None
        if route.members_only and not self._is_member(caller):
            raise ProblemError(
                403, "not-a-member", f"Agent {caller} is of no environment.", "`key-agent env join` there."
            )
        return caller

    def _identified(self, leaf: x509.Certificate | None, route: PeerRoute) -> str:
        role = Role.AGENT_TLS if leaf is None else read_identity(leaf).role
        if role not in route.roles:
            raise CertificateError("role", f"the role {role} does not ask for this")
        return self._trust.identify(leaf, role=role)

    def _refusal(self, error: SealgateError) -> Exception:
        for kind, (status, code, next_step) in self._refusals.items():
            if isinstance(error, kind):
                return ProblemError(status, code, str(error), next_step)
        return error


async def _body(request: web.Request, limit_bytes: int, timeout_s: float) -> bytes:
    content = bytearray()
    began_s = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            async for piece in request.content.iter_chunked(_PIECE_BYTES):
                content += piece
                patience_s = allowed_s(len(content), timeout_s=timeout_s, at_most_s=AT_MOST_S)
                deadline.reschedule(began_s + patience_s)
                if len(content) > limit_bytes:
                    raise ProblemError(
                        413, "too-large", f"More than {limit_bytes} bytes.", "Send it in several requests."
                    )
    except TimeoutError:
        raise ProblemError(
            408, "slow", f"The body took more than {timeout_s:g} s.", "Send it faster."
        ) from None
    return bytes(content)


async def _answered(request: web.Request, answer: bytes, timeout_s: float) -> web.StreamResponse:
    """*answer*; a large one is on its way when this returns, or was not taken in time."""
    headers = {"Cache-Control": "no-store", "Content-Type": "application/json"}
    if len(answer) <= _PIECE_BYTES:
        return web.Response(body=answer, headers=headers)
    response = web.StreamResponse(headers=headers)
    response.content_length = len(answer)
    began_s = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            await response.prepare(request)
            for at in range(0, len(answer), _PIECE_BYTES):
                await response.write(answer[at : at + _PIECE_BYTES])
                deadline.reschedule(began_s + allowed_s(at, timeout_s=timeout_s, at_most_s=AT_MOST_S))
    except (TimeoutError, ConnectionError):
        if request.transport is not None:
            request.transport.abort()
    return response


@asynccontextmanager
async def listening(
    application: web.Application, *, host: str, port: int, ssl_context: ssl.SSLContext
) -> AsyncIterator[int]:
    """Serve *application* while the block runs; yields the bound port. OSError: it cannot be bound."""
    # As runtime.serve.serving, but with a short time for handshakes: this port is open to whole networks.
    async with running(application, grace_s=GRACE_S) as runner:
        server = await asyncio.get_running_loop().create_server(
            cast("web.Server", runner.server),  # there is one while it runs
            host,
            port,
            ssl=ssl_context,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
            ssl_shutdown_timeout=HANDSHAKE_TIMEOUT_S,
            backlog=128,
            reuse_address=True,
        )
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()


async def keep_current(
    tls: ServerTls, *files: Path, client_roots: Sequence[x509.Certificate], clock: Clock
) -> NoReturn:
    """Rule 4: have *tls* read its *files* again when they changed. What cannot be used is logged, and the old
    goes on: the two files of a renewal are not written in one moment."""
    looked_at: tuple[int, ...] | None = None
    while True:
        if (version := version_of(*files)) != looked_at:
            looked_at = version
            try:
                tls.renew(client_roots=client_roots)
            except TlsError as error:
                log.error("peers are shown the old certificate", error=str(error))  # noqa: TRY400 - expected
        await clock.sleep(LOOK_AT_FILES_S)
