"""Push sessions of key agents, and whose signature counts (docs/format.md, "Key-material envelope").

1. A session's challenge is ours and random. Another session of the agent voids it.
2. An agent's envelopes are signed by a certificate that names this very agent, under its tenant's root: one
   of those that are pinned in the directory, or the one that was introduced when the session was opened.
   Where the tenant has pins, none but they can be introduced.
3. What an agent has sent outlives its sessions, or a new one would let old envelopes in. It is forgotten with
   the network service, or with all trust in its tenant's agents.
4. Agents per tenant and what is remembered of each are bounded.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import structlog
from cachetools import LRUCache, TLRUCache
from cryptography import x509

from envelope.broker import agent_tag
from envelope.certificates import (
    CertificateError,
    Identity,
    Role,
    fingerprint,
    read_identity,
    verify_certificate,
)
from envelope.errors import EnvelopeError, SealgateError
from envelope.keys import NetworkService
from envelope.material import NONCE_SIZE, Signer
from proxy.keys.cache import KeyCache
from proxy.keys.relay import Relayed
from proxy.keys.slot import ServiceStatus
from proxy.tenants.model import Directory, TenantEntry
from runtime.audit import AuditLog
from runtime.clock import Clock

MAX_AGENTS_PER_TENANT: Final = 64
"""A tenant can certify any number of agents; who is pushed out opens a new session."""
MAX_LIVE_TOKENS: Final = 4096
"""Per issuer and network service; the sequence alone already refuses a replay."""

_log: Final = structlog.get_logger("keys.sessions")


class SessionRefusedError(SealgateError):
    """An agent may not open a push session. `code` is stable."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedService:
    """A network service of the agent's tenant on this proxy, with what it holds."""

    owner: NetworkService
    certificate_sha256: bytes
    status: ServiceStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    challenge: bytes
    time_ms: int
    services: tuple[HostedService, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSession:
    """Whose session is open, with the challenge it has now."""

    tenant: str
    agent_id: str
    challenge: bytes = field(repr=False)


class Track:
    """What one issuer has sent for one network service."""

    __slots__ = ("highest", "live_tokens")

    def __init__(self, clock: Clock) -> None:
        self.highest = 0
        self.live_tokens: TLRUCache[bytes, float] = TLRUCache(
            maxsize=MAX_LIVE_TOKENS, ttu=lambda _token, end_s, _now: end_s, timer=clock.boot_s
        )


@dataclass(slots=True)
class Agent:
    """One agent's session, and its tracks, which outlive sessions. Forgotten together only."""

    challenge: bytes
    signer: Signer | None
    tracks: dict[NetworkService, Track] = field(default_factory=dict)


class Sessions:
    """One per process; one event loop."""

    def __init__(self, *, cache: KeyCache, audit: AuditLog, clock: Clock, directory: Directory) -> None:
        self._cache = cache
        self._audit = audit
        self._clock = clock
        self._directory = directory
        self._agents: dict[str, LRUCache[str, Agent]] = {}
        self._pinned: dict[str, dict[bytes, Signer]] = {}
        self.apply(directory, gone=frozenset(), distrusted=frozenset())

    def apply(
        self, directory: Directory, *, gone: frozenset[NetworkService], distrusted: frozenset[str]
    ) -> None:
        """Take over a new picture of the directory: no track for *gone*, no session for *distrusted*."""
        self._directory = directory
        for owner in gone:
            for agent in self._agents.get(owner.tenant, {}).values():
                agent.tracks.pop(owner, None)
        for tenant in distrusted:
            self._agents.pop(tenant, None)
        self._pinned = {tenant: self._verified_pins(entry) for tenant, entry in directory.tenants.items()}

    def open(
        self, tenant: str, agent_id: str, *, signing_certificate: x509.Certificate | None = None
    ) -> Session:
        """A new challenge for this agent; the one before is void.

        *signing_certificate* introduces the certificate its envelopes are signed by, unless the tenant's are
        pinned in the directory. SessionRefusedError if it is not one of this agent under the tenant's root.
        AuditUnavailableError if the event cannot be written.
        """
        entry = self._directory.tenants.get(tenant)
        if entry is None:
            raise SessionRefusedError("tenant", f"tenant {tenant} is not provisioned on this proxy")
        signer = None if signing_certificate is None else self._signer(entry, agent_id, signing_certificate)
        self._audit.append("push-session-opened", durable=False, tenant=tenant, agent=agent_id)
        agents = self._agents.setdefault(tenant, LRUCache(maxsize=MAX_AGENTS_PER_TENANT))
        challenge = os.urandom(NONCE_SIZE)
        known = agents.get(agent_id)
        if known is None:
            agents[agent_id] = Agent(challenge, signer)
        else:
            known.challenge, known.signer = challenge, signer
        return Session(
            challenge=challenge,
            time_ms=int(self._clock.wall_s() * 1000),
            # One that waits for its certificate can receive nothing yet.
            services=tuple(
                self._hosted(service.owner, service.certificate)
                for service in self._directory.recipients_of(tenant)
                if service.certificate is not None
            ),
        )

    def of_tag(self, tag: bytes) -> OpenSession | None:
        """The session of the agent with this tag (envelope/broker.py); None if it has none here."""
        for tenant, agents in self._agents.items():
            for agent_id, agent in agents.items():
                if agent_tag(tenant, agent_id) == tag:
                    return OpenSession(tenant=tenant, agent_id=agent_id, challenge=agent.challenge)
        return None

    def current(self, tenant: str, agent_id: str) -> Agent | None:
        """The session as it is now, which another one does not change; its tracks are the agent's."""
        agents = self._agents.get(tenant)
        known = None if agents is None else agents.get(agent_id)
        return None if known is None else Agent(known.challenge, known.signer, known.tracks)

    def relayed(self, relayed: Relayed) -> Agent:
        """The session that *relayed* was sent under, in the process that it came to."""
        entry = self._directory.tenants.get(relayed.tenant)
        signer = None
        try:
            if entry is not None and relayed.signing_certificate_der is not None:
                certificate = x509.load_der_x509_certificate(relayed.signing_certificate_der)
                signer = self._signer(entry, relayed.agent, certificate)
        except (SessionRefusedError, ValueError) as error:
            _log.warning("relayed session refused", tenant=relayed.tenant, cause=str(error))
        agents = self._agents.setdefault(relayed.tenant, LRUCache(maxsize=MAX_AGENTS_PER_TENANT))
        known = agents.get(relayed.agent)
        if known is None:  # nobody was given this challenge: here, no envelope counts but by relay
            known = agents[relayed.agent] = Agent(os.urandom(NONCE_SIZE), None)
        return Agent(relayed.challenge, signer, known.tracks)

    def track(self, owner: NetworkService, agent_id: str) -> Track | None:
        """What this agent has sent for *owner*, as far as that is remembered."""
        agents = self._agents.get(owner.tenant)
        agent = None if agents is None else agents.get(agent_id)
        return None if agent is None else agent.tracks.get(owner)

    def signers(self, tenant: str, agent_id: str, session: Agent) -> Mapping[bytes, Signer]:
        """By fingerprint, those that sign for this agent. EnvelopeError "signer" if there are none."""
        pinned = self._pinned.get(tenant, {})
        own = {name: signer for name, signer in pinned.items() if signer.agent_id == agent_id}
        if session.signer is not None:
            own[fingerprint(session.signer.certificate)] = session.signer
        if not own:
            raise EnvelopeError("signer", "no signing certificate of this agent is known here")
        return own

    def _signer(self, entry: TenantEntry, agent_id: str, certificate: x509.Certificate) -> Signer:
        try:
            verify_certificate(
                certificate,
                root=entry.root_certificate,
                expected=Identity(entry.tenant, Role.AGENT_SIGNING, agent_id),
                now_s=self._clock.wall_s(),
            )
        except CertificateError as error:
            raise SessionRefusedError("signer", f"the signing certificate is refused: {error}") from None
        if entry.signers and fingerprint(certificate) not in {fingerprint(pin) for pin in entry.signers}:
            raise SessionRefusedError(
                "signer", "the signing certificate is not one of those pinned for this tenant"
            )
        return Signer(certificate, agent_id)

    def _verified_pins(self, entry: TenantEntry) -> dict[bytes, Signer]:
        found: dict[bytes, Signer] = {}
        for certificate in entry.signers:
            try:
                agent_id = read_identity(certificate).name
                verify_certificate(
                    certificate,
                    root=entry.root_certificate,
                    expected=Identity(entry.tenant, Role.AGENT_SIGNING, agent_id),
                    now_s=self._clock.wall_s(),
                )
            except CertificateError as error:
                _log.warning("pinned signer refused", tenant=entry.tenant, reason=str(error))
            else:
                found[fingerprint(certificate)] = Signer(certificate, agent_id)
        return found

    def _hosted(self, owner: NetworkService, certificate: x509.Certificate) -> HostedService:
        (status,) = self._cache.status([owner])
        return HostedService(owner=owner, certificate_sha256=fingerprint(certificate), status=status)


def distrusted(before: Directory, now: Directory) -> frozenset[str]:
    """Tenants that are gone, whose root changed or that trust a signer no more: who pushed their keys may no
    longer be entitled to."""
    return frozenset(
        tenant
        for tenant, entry in before.tenants.items()
        if (found := now.tenants.get(tenant)) is None
        or found.root_certificate != entry.root_certificate
        or _trusts_fewer(found, entry)
    )


def _trusts_fewer(now: TenantEntry, before: TenantEntry) -> bool:
    """Whether a signer that could push before is no longer named. No pins: whomever the root certified.

    Removing the last pin lets any certified agent in, but whoever removes one distrusts it: that counts.
    """
    if not before.signers:
        return bool(now.signers)
    pinned = {fingerprint(signer) for signer in now.signers}
    return any(fingerprint(signer) not in pinned for signer in before.signers)
