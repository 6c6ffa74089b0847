"""Proxies as the key agent sees them: they open envelopes for real, hold keys, and fail on demand.

* `FakeProxy` is one proxy's state and judgement, with the order of checks of docs/format.md section 5.
* `FakeProxies` is a `Transport` that reaches such proxies without a network.
* `FakeProxyServer` serves one of them by the push protocol over mutual TLS.
"""

import asyncio
import base64
import json
import os
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import override

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from envelope.certificates import fingerprint
from envelope.errors import EnvelopeError
from envelope.keys import NetworkService
from envelope.material import Claims, Expectation, Signer, open_envelope, recipient_thumbprint
from key_agent.push.transport import (
    Answer,
    EnvironmentInForce,
    EnvironmentWord,
    HeldService,
    Presence,
    Purpose,
    PushError,
    Session,
    Transport,
)
from key_agent.registry.model import Proxy
from runtime.clock import Clock
from tests.pki import ServiceCredential

MAX_VALIDITY_S = 3600


@dataclass
class Held:
    """What a proxy holds of one service."""

    claims: Claims
    deadline_s: float
    """On the boot clock."""


@dataclass
class FakeProxy:
    """One proxy. Its faults: `down`, `hanging`, `refuse`, `restart`, `lose_answers`."""

    id: str
    clock: Clock
    signers: Mapping[bytes, Signer]
    services: dict[NetworkService, ServiceCredential] = field(default_factory=dict)
    held: dict[NetworkService, Held] = field(default_factory=dict)
    accepted: list[Claims] = field(default_factory=list)
    """Every envelope ever accepted, in order."""
    sessions: int = 0
    presences: int = 0
    instance: bytes = field(default_factory=lambda: os.urandom(16))
    words: list[EnvironmentWord] = field(default_factory=list)
    """What it was told of its environment."""
    posts: int = 0
    down: bool = False
    hanging: bool = False
    lose_answers: int = 0
    """So many posts are taken, and then the connection breaks."""
    refuse: dict[NetworkService, str] = field(default_factory=dict)
    _challenge: bytes | None = None
    _sequences: dict[NetworkService, int] = field(default_factory=dict)
    _by_thumbprint: dict[bytes, NetworkService] = field(default_factory=dict)

    def restart(self) -> None:
        """All that is in memory is gone."""
        self.held.clear()
        self.instance = os.urandom(16)
        self._challenge = None
        self._sequences.clear()

    def valid_keys(self, owner: NetworkService) -> list[str]:
        """Ids of the keys it would use for *owner* now."""
        held = self.held.get(owner)
        if held is None or self.clock.boot_s() >= held.deadline_s:
            return []
        return [str(key.key_id) for key in held.claims.keys]

    async def session(self) -> Session:
        await self._reach()
        self.sessions += 1
        self._challenge = os.urandom(16)
        return Session(
            proxy_id=self.id,
            challenge=self._challenge,
            instance=self.instance,
            time_ms=int(self.clock.wall_s() * 1000),
            services=tuple(
                HeldService(
                    owner=owner,
                    certificate_sha256=fingerprint(credential.certificate).hex(),
                    key_ids=tuple(self.valid_keys(owner)),
                )
                for owner, credential in self.services.items()
            ),
        )

    async def presence(self) -> Presence:
        self.presences += 1
        await self._reach()
        return Presence(proxy_id=self.id, instance=self.instance, time_ms=int(self.clock.wall_s() * 1000))

    async def told(self, word: EnvironmentWord) -> EnvironmentInForce:
        await self._reach()
        self.words.append(word)
        return EnvironmentInForce(state=word.state, term=word.term, epoch=word.epoch, instance=self.instance)

    async def envelopes(self, tokens: Sequence[str]) -> list[Answer]:
        await self._reach()
        self.posts += 1
        answers = [self._judge(token) for token in tokens]
        if self.lose_answers:
            self.lose_answers -= 1
            raise PushError("unreachable", "the connection broke after the proxy had taken it")
        return answers

    async def _reach(self) -> None:
        if self.hanging:
            await asyncio.Event().wait()
        if self.down:
            raise PushError("unreachable", "connection refused")

    def _judge(self, token: str) -> Answer:
        owner: NetworkService | None = None
        try:
            owner, credential = self._recipient(token)
            if (code := self.refuse.get(owner)) is not None:
                return Answer(accepted=False, owner=owner, code=code, detail="told to refuse it")
            if self._challenge is None:
                return Answer(accepted=False, owner=owner, code="nonce", detail="no session")
            claims = open_envelope(
                token,
                Expectation(
                    owner=owner,
                    audience=self.id,
                    recipient_certificate=credential.certificate,
                    recipient_key=credential.key,
                    signers=self.signers,
                    now_s=self.clock.wall_s(),
                    validity_s=MAX_VALIDITY_S,
                    nonce=self._challenge,
                    last_sequence=self._sequences.get(owner, 0),
                    seen_token_ids=(),
                ),
            )
        except EnvelopeError as error:
            return Answer(accepted=False, owner=owner, code=error.code, detail=str(error))
        valid_for_s = min(claims.expires_at_s - self.clock.wall_s(), MAX_VALIDITY_S)
        self._sequences[owner] = claims.sequence
        self.accepted.append(claims)
        if claims.keys:
            self.held[owner] = Held(claims, self.clock.boot_s() + valid_for_s)
        else:
            self.held.pop(owner, None)
        return Answer(
            accepted=True,
            owner=owner,
            sequence=claims.sequence,
            keys=len(claims.keys),
            valid_for_s=valid_for_s if claims.keys else 0.0,
        )

    def _recipient(self, token: str) -> tuple[NetworkService, ServiceCredential]:
        thumbprint = recipient_thumbprint(token)
        if len(self._by_thumbprint) != len(self.services) or thumbprint not in self._by_thumbprint:
            self._by_thumbprint = {
                fingerprint(credential.certificate): owner for owner, credential in self.services.items()
            }
        if (owner := self._by_thumbprint.get(thumbprint)) is not None:
            return owner, self.services[owner]
        raise EnvelopeError("recipient", "no network service here has that certificate")


class FakeProxies(Transport):
    """The production interface, straight to `FakeProxy` objects."""

    def __init__(self, *proxies: FakeProxy) -> None:
        self.proxies = {proxy.id: proxy for proxy in proxies}
        self.closed = False

    @override
    async def open_session(self, proxy: Proxy, *, purpose: Purpose = Purpose.KEYS) -> Session:
        return await self.proxies[proxy.id].session()

    @override
    async def presence(self, proxy: Proxy) -> Presence:
        return await self.proxies[proxy.id].presence()

    @override
    async def tell_environment(self, proxy: Proxy, word: EnvironmentWord) -> EnvironmentInForce:
        return await self.proxies[proxy.id].told(word)

    @override
    async def send(
        self,
        proxy: Proxy,
        tokens: Sequence[str],
        *,
        challenge: bytes | None = None,
        purpose: Purpose = Purpose.KEYS,
    ) -> list[Answer]:
        return await self.proxies[proxy.id].envelopes(tokens)

    @override
    async def close(self) -> None:
        self.closed = True


@dataclass
class FakeProxyServer:
    """One proxy by HTTPS. `fault` replaces an answer; `clients` are the certificates that came."""

    proxy: FakeProxy
    port: int = 0
    fault: web.Response | None = None
    clients: list[bytes] = field(default_factory=list)
    connections: int = 0
    _seen: set[int] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    @asynccontextmanager
    async def serving(self, context: ssl.SSLContext, *, port: int = 0) -> AsyncIterator[None]:
        """Listen with *context*, which asks for client certificates."""
        application = web.Application(client_max_size=8 << 20)
        application.router.add_post("/push/v1/session", self._session)
        application.router.add_post("/push/v1/envelopes", self._envelopes)
        application.router.add_get("/push/v1/presence", self._presence)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", port, ssl_context=context, reuse_address=True).start()
            self.port = runner.addresses[0][1]
            yield
        finally:
            await runner.cleanup()

    async def _session(self, request: web.Request) -> web.Response:
        self._note_client(request)
        if self.fault is not None:
            return self.fault
        body = await request.json()
        assert isinstance(body["agent"], str)
        try:
            session = await self.proxy.session()
        except PushError as error:
            return _problem(error)
        assert session.challenge is not None
        return web.json_response(
            {
                "proxy": session.proxy_id,
                "instance": base64.urlsafe_b64encode(self.proxy.instance).rstrip(b"=").decode(),
                "challenge": base64.urlsafe_b64encode(session.challenge).rstrip(b"=").decode(),
                "time_ms": session.time_ms,
                "services": [
                    {
                        "service": str(held.owner),
                        "certificate_sha256": held.certificate_sha256,
                        "holds": [
                            {"kid": kid, "state": "active", "valid_for_s": 1.0} for kid in held.key_ids
                        ],
                    }
                    for held in session.services
                ],
            }
        )

    async def _presence(self, request: web.Request) -> web.Response:
        self._note_client(request)
        if self.fault is not None:
            return self.fault
        try:
            presence = await self.proxy.presence()
        except PushError as error:
            return _problem(error)
        return web.json_response(
            {
                "proxy": presence.proxy_id,
                "instance": base64.urlsafe_b64encode(presence.instance).rstrip(b"=").decode(),
                "time_ms": presence.time_ms,
            }
        )

    async def _envelopes(self, request: web.Request) -> web.Response:
        self._note_client(request)
        if self.fault is not None:
            return self.fault
        body = json.loads(await request.read())
        try:
            answers = await self.proxy.envelopes(body["envelopes"])
        except PushError as error:
            return _problem(error)
        return web.json_response({"receipts": [_receipt(answer) for answer in answers]})

    def _note_client(self, request: web.Request) -> None:
        assert request.transport is not None
        if id(request.transport) not in self._seen:
            self._seen.add(id(request.transport))
            self.connections += 1
        tls = request.transport.get_extra_info("ssl_object")
        certificate = tls.getpeercert(binary_form=True)
        assert certificate is not None
        self.clients.append(sha256(certificate).digest())


def _problem(error: PushError) -> web.Response:
    return web.json_response(
        {"code": error.code, "detail": error.detail}, status=503, content_type="application/problem+json"
    )


def _receipt(answer: Answer) -> dict[str, object]:
    service = None if answer.owner is None else str(answer.owner)
    if answer.accepted:
        return {
            "status": "accepted",
            "service": service,
            "sequence": answer.sequence,
            "keys": answer.keys,
            "valid_for_s": answer.valid_for_s,
        }
    return {"status": "refused", "service": service, "code": answer.code, "detail": answer.detail}


def pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()
