"""Where key agents deliver, and ask who is there: over TLS 1.3 with certificates on both sides.

1. OpenSSL lets in whoever hangs on any tenant's root. Who that is, and whether its *own* tenant's root
   certified it for the role agent:tls, is decided here, at every request, by the directory as it is now.
2. What a connection may say is about its own tenant only: what belongs to others does not exist.
3. Every size, count and rate is bounded, per agent and per tenant: no tenant can crowd out another, and no
   agent, another environment's or breached, nor several of them, those of their own tenant (places.py). What
   is sent for another purpose has a rate and places of its own: no refresh, however large or slow, delays a
   withdrawal. Asking who is there waits for no place: slow pushes do not make a proxy look dead.
4. Where one agent speaks for the environment of this proxy (environments.py), no other one brings keys or
   takes them back: it has no session, and none that it had before counts.
5. This layer judges JSON and identities; what an envelope is worth is `Receiver`'s business.
"""

import asyncio
import json
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from enum import StrEnum
from importlib import resources
from typing import Annotated, Final

import msgspec
import structlog
from aiohttp import web
from cachetools import LRUCache
from cryptography import x509

from envelope.base64url import b64u_encode
from envelope.certificates import Identity
from proxy.api.authentication import forbidden, peer_of
from proxy.api.places import Places
from proxy.environments import ForeignAgentError, ForeignEnvironmentError, Word
from proxy.keys.receive import Receiver
from proxy.keys.sessions import MAX_AGENTS_PER_TENANT, HostedService, SessionRefusedError
from runtime.audit import AuditUnavailableError
from runtime.clock import Clock
from runtime.serve import Handler, ProblemError, make_application, openapi_route

MAX_ENVELOPES: Final = 1000
MAX_BODY_BYTES: Final = 8 << 20
MAX_SESSION_BODY_BYTES: Final = 64 << 10
BODY_TIMEOUT_S: Final = 30.0
BURST_FACTOR: Final = 5
ENVIRONMENT_PATH: Final = "/push/v1/environment"
PRESENCE_PATH: Final = "/push/v1/presence"
AGENTS_TOGETHER: Final = 4
"""A tenant's agents together have so many times the rate of one."""

PURPOSE_PARAMETER: Final = "purpose"


class Purpose(StrEnum):
    """What a request is for, as its query says; each has a budget of its own."""

    KEYS = "keys"
    """The default: envelopes of any kind."""
    WITHDRAWAL = "withdrawal"
    """A session, or envelopes, to take keys back: envelopes with keys are refused here."""
    PRESENCE = "presence"


_PEER: Final = web.RequestKey("sealgate.peer", Identity)
_PURPOSE: Final = web.RequestKey("sealgate.purpose", Purpose)
_log: Final = structlog.get_logger("push")


class _SessionRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    agent: Annotated[str, msgspec.Meta(max_length=63)]
    signing_certificate: Annotated[str, msgspec.Meta(max_length=32_768)] | None = None


class _EnvelopesRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    envelopes: Annotated[list[str], msgspec.Meta(max_length=MAX_ENVELOPES)]


class TokenBucket:
    """Modest rate limit on the boot clock: *rate_per_s* sustained, *burst* at once."""

    def __init__(self, clock: Clock, *, rate_per_s: float, burst: float) -> None:
        self._clock = clock
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._left = burst
        self._at_s = clock.boot_s()

    def take(self) -> float:
        """Take one; 0, or the seconds after which there will be one."""
        now_s = self._clock.boot_s()
        self._left = min(self._burst, self._left + (now_s - self._at_s) * self._rate_per_s)
        self._at_s = now_s
        if self._left < 1:
            return (1 - self._left) / self._rate_per_s
        self._left -= 1
        return 0.0


type Told = Callable[[str, str, Word], Awaitable[Word]]
type Entitled = Callable[[str, str], None]
"""Returns if the agent (tenant, id) may push here; else ForeignAgentError."""


def make_push_application(
    receiver: Receiver,
    *,
    clock: Clock,
    requests_per_s: float,
    entitled: Entitled,
    told: Told | None = None,
) -> web.Application:
    """The application to be served with `runtime.tls.ServerTls`, client certificates demanded.

    *entitled*: who may push (rule 4).
    *told*: puts in force what an agent (tenant, id) says of its environment; returns what is in force then.
    """
    api = _PushApi(receiver, clock, requests_per_s, entitled, told)
    application = make_application(client_max_size_bytes=MAX_BODY_BYTES)
    application.middlewares.append(api.identify)
    application.router.add_post("/push/v1/session", api.open_session)
    application.router.add_post("/push/v1/envelopes", api.take_envelopes)
    application.router.add_put(ENVIRONMENT_PATH, api.take_word)
    application.router.add_get(PRESENCE_PATH, api.tell_presence, allow_head=False)
    openapi_route(application, openapi_document())
    return application


def openapi_document() -> Mapping[str, object]:
    text = resources.files("proxy.api").joinpath("push.openapi.json").read_text(encoding="utf-8")
    document: Mapping[str, object] = json.loads(text)
    return document


class _PushApi:
    def __init__(
        self,
        receiver: Receiver,
        clock: Clock,
        requests_per_s: float,
        entitled: Entitled,
        told: Told | None,
    ) -> None:
        self._receiver = receiver
        self._told = told
        self._entitled = entitled
        self._clock = clock
        self._requests_per_s = requests_per_s
        # Bounded: only tenants of the directory come so far.
        self._places: defaultdict[tuple[str, Purpose], Places] = defaultdict(Places)
        self._of_tenants: dict[tuple[str, Purpose], TokenBucket] = {}
        self._of_agents: dict[tuple[str, Purpose], LRUCache[str, TokenBucket]] = {}

    @web.middleware
    async def identify(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        now_s = self._clock.wall_s()
        purpose = _purpose(request)
        try:
            peer = peer_of(request.transport, self._receiver.directory, now_s=now_s)
        except ProblemError as error:
            if (
                purpose is not Purpose.PRESENCE
            ):  # who is refused there asks again in five seconds; its sessions are logged
                _log.warning("agent refused", code=error.code, remote=request.remote)
            raise
        request[_PEER], request[_PURPOSE] = peer, purpose
        for rate in self._rates(peer, purpose):  # the first that is spent spares the other
            _count(rate)
        if purpose is Purpose.PRESENCE:
            return await handler(request)
        async with self._places[peer.tenant, purpose].of(peer.name):
            return await handler(request)

    def _rates(self, peer: Identity, purpose: Purpose) -> tuple[TokenBucket, TokenBucket]:
        """The agent's own, and that of all of its tenant."""
        known = self._of_agents.setdefault((peer.tenant, purpose), LRUCache(maxsize=MAX_AGENTS_PER_TENANT))
        if (mine := known.get(peer.name)) is None:
            mine = known[peer.name] = self._rate(1)
        if (all_of_them := self._of_tenants.get((peer.tenant, purpose))) is None:
            all_of_them = self._of_tenants[peer.tenant, purpose] = self._rate(AGENTS_TOGETHER)
        return mine, all_of_them

    def _rate(self, times: int) -> TokenBucket:
        rate_per_s = times * self._requests_per_s
        return TokenBucket(self._clock, rate_per_s=rate_per_s, burst=BURST_FACTOR * rate_per_s)

    def _check_entitled(self, peer: Identity) -> None:
        """ProblemError 403 (rule 4)."""
        try:
            self._entitled(peer.tenant, peer.name)
        except ForeignAgentError as error:
            raise _foreign(peer, error) from None

    async def _read_entitled[T](
        self, request: web.Request, peer: Identity, shape: type[T], *, limit_bytes: int
    ) -> T:
        """What *peer* sends. Asked before, for no body of others is waited for, and after: a body may take
        half a minute, in which another agent may have spoken."""
        self._check_entitled(peer)
        asked = await _read(request, shape, limit_bytes=limit_bytes)
        self._check_entitled(peer)
        return asked

    async def open_session(self, request: web.Request) -> web.Response:
        peer = request[_PEER]
        asked = await self._read_entitled(request, peer, _SessionRequest, limit_bytes=MAX_SESSION_BODY_BYTES)
        if asked.agent != peer.name:
            raise forbidden("agent", "The client certificate is another agent's than the one named.")
        certificate = None
        if asked.signing_certificate is not None:
            try:
                certificate = x509.load_pem_x509_certificate(asked.signing_certificate.encode())
            except (ValueError, x509.InvalidVersion):
                raise _malformed("signing_certificate is not a PEM certificate") from None
        try:
            session = self._receiver.sessions.open(peer.tenant, peer.name, signing_certificate=certificate)
        except SessionRefusedError as error:
            raise forbidden(error.code, f"No session: {error}.") from None
        except AuditUnavailableError as error:
            raise ProblemError(
                503, "audit-unavailable", "The audit log cannot be written.", error.next_step
            ) from None
        return web.json_response(
            {
                "proxy": self._receiver.proxy_id,
                "instance": b64u_encode(self._receiver.instance),
                "challenge": b64u_encode(session.challenge),
                "time_ms": session.time_ms,
                "services": [_service_json(service) for service in session.services],
            },
            headers={"Cache-Control": "no-store"},
        )

    async def tell_presence(self, _request: web.Request) -> web.Response:
        """Who is here, and since which start: another `instance` has none of the keys of the one before."""
        return web.json_response(
            {
                "proxy": self._receiver.proxy_id,
                "instance": b64u_encode(self._receiver.instance),
                "time_ms": int(self._clock.wall_s() * 1000),
            },
            headers={"Cache-Control": "no-store"},
        )

    async def take_word(self, request: web.Request) -> web.Response:
        """What an agent says of its environment; answered once it is in force."""
        peer = request[_PEER]
        word = await _read(request, Word, limit_bytes=MAX_SESSION_BODY_BYTES)
        if self._told is None:
            raise _malformed("this proxy takes no word on environments")
        try:
            in_force = await self._told(peer.tenant, peer.name, word)
        except ForeignEnvironmentError as error:
            raise ProblemError(
                409, "environment", f"{error}.", "Add this proxy at the agent of its own environment."
            ) from None
        except ForeignAgentError as error:
            raise _foreign(peer, error) from None
        return web.json_response(
            msgspec.to_builtins(in_force) | {"instance": b64u_encode(self._receiver.instance)},
            headers={"Cache-Control": "no-store"},
        )

    async def take_envelopes(self, request: web.Request) -> web.Response:
        peer = request[_PEER]
        asked = await self._read_entitled(request, peer, _EnvelopesRequest, limit_bytes=MAX_BODY_BYTES)
        receipts = await self._receiver.receive(
            peer.tenant,
            peer.name,
            asked.envelopes,
            takes_keys=request[_PURPOSE] is not Purpose.WITHDRAWAL,
        )
        return web.json_response(
            {"receipts": [receipt.as_json() for receipt in receipts]}, headers={"Cache-Control": "no-store"}
        )


def _foreign(peer: Identity, error: ForeignAgentError) -> ProblemError:
    _log.warning("an agent speaks for another environment", agent=peer.name, tenant=peer.tenant)
    next_step = "Name the environment's agent in the proxy's settings: [environment.agents]."
    return ProblemError(403, "agent", f"{error}.", next_step)


def _count(rate: TokenBucket) -> None:
    """ProblemError 429 if this is one request too many."""
    if wait_s := rate.take():
        raise ProblemError(
            429,
            "rate-limited",
            "Too many requests of this agent, or of all agents of its tenant.",
            "Wait as long as Retry-After says.",
            headers={"Retry-After": str(max(1, round(wait_s)))},
        )


def _purpose(request: web.Request) -> Purpose:
    """ProblemError 400 for a purpose that there is not."""
    if request.path == PRESENCE_PATH:
        return Purpose.PRESENCE
    if request.path == ENVIRONMENT_PATH:
        return Purpose.WITHDRAWAL  # it may be one, and must not queue behind keys
    told = request.query.get(PURPOSE_PARAMETER, Purpose.KEYS)
    if told not in (Purpose.KEYS, Purpose.WITHDRAWAL):
        raise _malformed(f"{PURPOSE_PARAMETER} is neither {Purpose.KEYS} nor {Purpose.WITHDRAWAL}")
    return Purpose(told)


def _service_json(service: HostedService) -> dict[str, object]:
    return {
        "service": str(service.owner),
        "certificate_sha256": service.certificate_sha256.hex(),
        "holds": [
            {"kid": str(held.key_id), "state": held.state.value, "valid_for_s": round(held.valid_for_s, 3)}
            for held in service.status.holds
        ],
    }


async def _read[T](request: web.Request, shape: type[T], *, limit_bytes: int) -> T:
    """The request's body as *shape*. ProblemError 400, 408, 413 or 415."""
    if request.content_type != "application/json":
        raise ProblemError(415, "unsupported-media-type", "The body is not JSON.", "Send application/json.")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in request.content.iter_any():
                body += piece
                if len(body) > limit_bytes:
                    raise ProblemError(
                        413, "too-large", f"The body has more than {limit_bytes} bytes.", "Send less at once."
                    )
    except TimeoutError:
        raise ProblemError(408, "slow-body", "The body did not arrive in time.", "Send it again.") from None
    try:
        return msgspec.json.decode(body, type=shape)
    except msgspec.ValidationError as error:
        raise _malformed(str(error)) from None  # names the place and the type, not the content
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise _malformed("the body is not JSON") from None


def _malformed(cause: str) -> ProblemError:
    return ProblemError(400, "malformed", f"The request is not understood: {cause}.", "See /openapi.json.")
