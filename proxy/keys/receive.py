"""From an envelope on the wire to keys in the cache (docs/format.md, "Key-material envelope").

1. Which network service an envelope is for is looked up by the certificate it names, among the services of
   the tenant whose agent sent it. That is a guess until `open_envelope` has checked everything.
2. Only the connected agent's own envelopes are believed: issuer and TLS identity are one agent of one tenant.
3. Sequence and token ids are remembered per issuer and network service. They count from the moment an
   envelope has verified, before it is installed, so that two connections cannot install out of order.
   Between issuers only time orders, and an issuer's sequences may have run ahead of it: they are cut to the
   second in which the envelope was issued, or one agent could lock out the others for ever. A withdrawal by
   a clock that is not ours counts all the same, as the last that can have been issued by ours.
4. Accepting keys is an audit event on disk before the keys are in the cache. Without it they are dropped.
   A withdrawal works the other way round: first the keys of all that are taken back are gone, then it is
   recorded, and a log that cannot be written makes the receipt an error, never the keys available. One that
   hangs is one that cannot be written: a push API with all its places waiting for a disk would take no
   withdrawal.
5. The challenge is ours and random; an agent without one is told to open a session (code "nonce"). What came
   by a broker may answer no challenge: then it counts above a sequence that was accepted under one only.
6. Where several processes serve the proxy's clients (relay.py), what is accepted is in force in each of them
   before its receipt is written; a withdrawal is passed on while it is recorded.
7. Sealed to the certificate that a service had before its renewal, keys count until the agent uses the new
   one, and withdrawals for one validity longer (former.py).
8. Thousands at once hold up nobody: the event loop gets its turn after every envelope that is opened or
   installed. (Not in threads: opening holds Python's lock, and a thread keeps it for longer.)
"""

import asyncio
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, Literal

import structlog
from cachetools import LRUCache, TLRUCache
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from prometheus_client import Counter

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
from envelope.material import (
    MAX_AHEAD_S,
    NONCE_SIZE,
    Claims,
    Expectation,
    Operation,
    Signer,
    open_envelope,
    recipient_thumbprint,
)
from proxy.keys.cache import KeyCache
from proxy.keys.former import FormerCertificates
from proxy.keys.relay import Relay, Relayed
from proxy.keys.slot import ServiceStatus
from proxy.tenants.certificates import CredentialError, PrivateKey, read_private_key
from proxy.tenants.model import Directory, Recipient, TenantEntry
from runtime.audit import AuditLog, AuditUnavailableError
from runtime.clock import Clock
from runtime.observe import NAMESPACE, REGISTRY

MAX_AGENTS_PER_TENANT: Final = 64
"""A tenant can certify any number of agents; who is pushed out opens a new session."""
INSTANCE_SIZE: Final = 16
AUDIT_PATIENCE_S: Final = 5.0
"""For one event on disk. Less than an agent waits for its answer (10 s)."""
MAX_LIVE_TOKENS: Final = 4096
"""Per issuer and network service; the sequence alone already refuses a replay."""

_log: Final = structlog.get_logger("keys.receive")
_ENVELOPES: Final = Counter(
    "push_envelopes",
    "Key-material envelopes received, by what became of them",
    ["outcome", "code"],
    namespace=NAMESPACE,
    registry=REGISTRY,
)


class SessionRefusedError(SealgateError):
    """An agent may not open a push session. `code` is stable."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What became of one envelope. `valid_for_s` counts from now; refused ones carry `code` and `detail`."""

    status: Literal["accepted", "refused"]
    service: NetworkService | None
    sequence: int = 0
    keys: int = 0
    valid_for_s: float = 0.0
    code: str = ""
    detail: str = ""

    def as_json(self) -> dict[str, object]:
        service = None if self.service is None else str(self.service)
        if self.status == "refused":
            return {"status": self.status, "service": service, "code": self.code, "detail": self.detail}
        return {
            "status": self.status,
            "service": service,
            "sequence": self.sequence,
            "keys": self.keys,
            "valid_for_s": round(self.valid_for_s, 3),
        }


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


class _Track:
    """What one issuer has sent for one network service."""

    __slots__ = ("highest", "live_tokens")

    def __init__(self, clock: Clock) -> None:
        self.highest = 0
        self.live_tokens: TLRUCache[bytes, float] = TLRUCache(
            maxsize=MAX_LIVE_TOKENS, ttu=lambda _token, end_s, _now: end_s, timer=clock.boot_s
        )


@dataclass(slots=True)
class _Agent:
    """One agent's session, and its tracks, which outlive sessions. Forgotten together only."""

    challenge: bytes
    signer: Signer | None
    tracks: dict[NetworkService, _Track] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    claims: Claims
    deadline_boot_s: float
    lost_s: float
    """`KeyCache.lost_s` when the deadline was set: a machine may be paused until the keys are installed."""
    track: _Track
    is_former: bool = False
    """Sealed to the certificate before the one of today."""

    def wipe(self) -> None:
        for key in self.claims.keys:
            key.wipe()


@dataclass(frozen=True, slots=True)
class _Addressee:
    """Whom an envelope says it is for."""

    owner: NetworkService
    certificate: x509.Certificate
    find_key: Callable[[], PrivateKey]
    """EnvelopeError `recipient-key`."""
    is_former: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """What came at once, and under which session."""

    tenant: str
    agent_id: str
    tokens: Sequence[str]
    session: _Agent | None
    """As it was when they came; its tracks are the agent's."""
    is_challenged: bool
    takes_keys: bool


class Receiver:
    """Opens push sessions and takes envelopes. One per process; one event loop."""

    def __init__(
        self,
        *,
        proxy_id: str,
        cache: KeyCache,
        audit: AuditLog,
        clock: Clock,
        validity_s: int,
        directory: Directory,
        audit_patience_s: float = AUDIT_PATIENCE_S,
        relay: Relay | None = None,
        is_durable: bool = True,
    ) -> None:
        """*relay*: to other processes that must hold what this one holds.

        *is_durable* False: another process has put the same events on disk, ours may follow.
        """
        self.proxy_id: Final = proxy_id
        self.instance = os.urandom(INSTANCE_SIZE)
        """This process, told from the ones before it: keys and challenges live as long as it does."""
        self._relay = relay
        self._is_durable = is_durable
        self._audit_patience_s = audit_patience_s
        # Of its own: were the disk to hang, nobody else's work waits behind these events.
        self._recorder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push-audit")
        self._cache = cache
        self._audit = audit
        self._clock = clock
        self._validity_s = validity_s
        self._directory = directory
        self._agents: dict[str, LRUCache[str, _Agent]] = {}
        self._recipient_keys: dict[bytes, PrivateKey] = {}
        self._former = FormerCertificates(clock, validity_s=validity_s)
        self._pinned: dict[str, dict[bytes, Signer]] = {}
        self.apply(directory)

    @property
    def directory(self) -> Directory:
        return self._directory

    def apply(self, directory: Directory) -> None:
        """Take over a new picture of the directory.

        A service that is gone loses its keys. So does every service of a tenant whose root changed or that
        trusts a signer no more: who pushed them may no longer be entitled to.
        """
        before, self._directory = self._directory, directory
        changed = {
            tenant
            for tenant, entry in before.tenants.items()
            if (now := directory.tenants.get(tenant)) is None
            or now.root_certificate != entry.root_certificate
            or _trusts_fewer(now, entry)
        }
        for owner in before.recipients:
            if owner not in directory.recipients or owner.tenant in changed:
                self._cache.forget(owner)
                self._former.forget(owner)
                for agent in self._agents.get(owner.tenant, {}).values():
                    agent.tracks.pop(owner, None)
            else:
                self._keep_former(before.recipients[owner], directory.recipients[owner])
        for tenant in changed:
            self._agents.pop(tenant, None)
        used = {
            fingerprint(entry.certificate) for entry in directory.recipients.values() if entry.certificate
        }
        self._recipient_keys = {name: key for name, key in self._recipient_keys.items() if name in used}
        self._pinned = {tenant: self._verified_pins(entry) for tenant, entry in directory.tenants.items()}

    def forget_past(self) -> None:
        """Be another instance: agents that ask who is there push all they have once more."""
        self.instance = os.urandom(INSTANCE_SIZE)

    async def receive_relayed(self, relayed: Relayed) -> list[Receipt]:
        """As `receive`: envelopes that another process of this proxy has opened, under its session."""
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
            known = agents[relayed.agent] = _Agent(os.urandom(NONCE_SIZE), None)
        return await self._received(
            _Batch(
                tenant=relayed.tenant,
                agent_id=relayed.agent,
                tokens=relayed.tokens,
                session=_Agent(relayed.challenge, signer, known.tracks),
                is_challenged=relayed.is_challenged,
                takes_keys=relayed.takes_keys,
            )
        )

    def open_session(
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
            agents[agent_id] = _Agent(challenge, signer)
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

    def session_of(self, tag: bytes) -> OpenSession | None:
        """The session of the agent with this tag (envelope/broker.py); None if it has none here."""
        for tenant, agents in self._agents.items():
            for agent_id, agent in agents.items():
                if agent_tag(tenant, agent_id) == tag:
                    return OpenSession(tenant=tenant, agent_id=agent_id, challenge=agent.challenge)
        return None

    async def receive(
        self,
        tenant: str,
        agent_id: str,
        tokens: Sequence[str],
        *,
        is_challenged: bool = True,
        takes_keys: bool = True,
    ) -> list[Receipt]:
        """Check *tokens*, install what holds, withdraw what is withdrawn. One receipt each, in order.

        *is_challenged* False: they came by a broker and answer no challenge (rule 5). *takes_keys* False:
        withdrawals are taken and nothing else; keys are refused (code "purpose").
        """
        agents = self._agents.get(tenant)
        known = None if agents is None else agents.get(agent_id)
        session = None if known is None else _Agent(known.challenge, known.signer, known.tracks)
        return await self._received(
            _Batch(
                tenant=tenant,
                agent_id=agent_id,
                tokens=tokens,
                session=session,
                is_challenged=is_challenged,
                takes_keys=takes_keys,
            )
        )

    async def _received(self, batch: _Batch) -> list[Receipt]:
        receipts: dict[int, Receipt] = {}
        accepted: dict[int, _Opened] = {}
        withdrawn: dict[int, _Opened] = {}
        tenant, agent_id = batch.tenant, batch.agent_id
        try:
            for index, token in enumerate(batch.tokens):
                if index:
                    await asyncio.sleep(0)  # each costs a fraction of a millisecond; bodies in flight go on
                service: NetworkService | None = None
                try:
                    recipient = self._addressee(tenant, token)
                    service = recipient.owner
                    opened = self._open(recipient, token, batch)
                    if _withdraws(opened.claims):
                        self._withdraw(opened)
                        withdrawn[index] = opened
                    else:
                        accepted[index] = opened
                except EnvelopeError as error:
                    receipts[index] = self._refused(tenant, agent_id, service, error)
            receipts |= await self._acknowledged(withdrawn, batch)
            await self._install(accepted, receipts, batch)
        finally:
            for index, opened in accepted.items():
                if index not in receipts:  # cancelled before they were installed
                    opened.wipe()
        for receipt in receipts.values():
            _ENVELOPES.labels(outcome=receipt.status, code=receipt.code or "none").inc()
        return [receipts[index] for index in range(len(batch.tokens))]

    # Opening.

    def _addressee(self, tenant: str, token: str) -> _Addressee:
        thumbprint = recipient_thumbprint(token)
        entry = self._directory.recipient_of_certificate(thumbprint)
        # Another tenant's service is answered as one that does not exist.
        if entry is not None and entry.owner.tenant == tenant and entry.certificate is not None:
            return _Addressee(
                entry.owner,
                entry.certificate,
                functools.partial(self._recipient_key, entry, entry.certificate),
            )
        former = self._former.find(thumbprint)
        if former is not None and former.owner.tenant == tenant:
            return _Addressee(former.owner, former.certificate, lambda: former.key, is_former=True)
        raise EnvelopeError(
            "recipient", "none of your network services here has the certificate it is sealed to"
        )

    def _open(self, recipient: _Addressee, token: str, batch: _Batch) -> _Opened:
        owner, agent = recipient.owner, batch.session
        if agent is None:
            raise EnvelopeError("nonce", "no session is open here: ask for a challenge first")
        track = agent.tracks.setdefault(owner, _Track(self._clock))
        self._cache.take_off_lost_time()
        received_boot_s, now_s = self._clock.boot_s(), self._clock.wall_s()
        claims = open_envelope(
            token,
            Expectation(
                owner=owner,
                audience=self.proxy_id,
                recipient_certificate=recipient.certificate,
                recipient_key=recipient.find_key(),
                signers=self._signers(owner.tenant, batch.agent_id, agent),
                now_s=now_s,
                validity_s=self._validity_s,
                nonce=agent.challenge if batch.is_challenged else None,
                last_sequence=track.highest,
                seen_token_ids=track.live_tokens,
            ),
        )
        is_replaced = recipient.is_former and not self._former.takes_keys(fingerprint(recipient.certificate))
        if (is_replaced or not batch.takes_keys) and not _withdraws(claims):
            for key in claims.keys:
                key.wipe()
            if is_replaced:
                raise EnvelopeError(
                    "recipient", "the certificate it is sealed to was replaced: withdrawals only"
                )
            raise EnvelopeError("purpose", "it came as a withdrawal and is none")
        # The wall clock may be set back: it never adds to the validity.
        valid_for_s = max(0.0, min(claims.expires_at_s - now_s, self._validity_s))
        track.highest = claims.sequence
        track.live_tokens[claims.token_id] = received_boot_s + valid_for_s
        return _Opened(
            claims=claims,
            deadline_boot_s=received_boot_s + valid_for_s,
            lost_s=self._cache.lost_s,
            track=track,
            is_former=recipient.is_former,
        )

    def _recipient_key(self, entry: Recipient, certificate: x509.Certificate) -> PrivateKey:
        name = fingerprint(certificate)
        key = self._recipient_keys.get(name)
        if key is None:
            try:
                key = read_private_key(entry.key_file)
            except CredentialError as error:
                _log.exception("private key unusable", service=str(entry.owner), reason=str(error))
                raise EnvelopeError(
                    "recipient-key", "the proxy cannot use its private key for this service"
                ) from None
            if key.public_key() != certificate.public_key():
                raise EnvelopeError(
                    "recipient-key", "the proxy's private key is not the one of its certificate"
                )
            self._recipient_keys[name] = key
        return key

    def _keep_former(self, before: Recipient, now: Recipient) -> None:
        """Rule 7, if *before* was renewed and its private key is in memory, or still in its file."""
        if before.certificate is None or before.certificate == now.certificate:
            return
        try:
            key = self._recipient_key(before, before.certificate)
        except EnvelopeError:  # never used, and gone: then no keys were pushed under it either
            return
        self._former.keep(before.owner, before.certificate, key)

    def _signers(self, tenant: str, agent_id: str, agent: _Agent) -> Mapping[bytes, Signer]:
        pinned = self._pinned.get(tenant, {})
        own = {name: signer for name, signer in pinned.items() if signer.agent_id == agent_id}
        if agent.signer is not None:
            own[fingerprint(agent.signer.certificate)] = agent.signer
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

    # Taking effect.

    def _withdraw(self, opened: _Opened) -> None:
        claims = opened.claims
        now_s = self._clock.wall_s()
        if claims.issued_at_s - MAX_AHEAD_S <= now_s < claims.expires_at_s:
            rank = _rank(claims)
        else:
            rank = int(now_s + MAX_AHEAD_S + 1) * 1000
        self._cache.withdraw(claims.owner, sequence=rank)
        _log.warning(
            "keys withdrawn", service=str(claims.owner), agent=claims.issuer, sequence=claims.sequence
        )

    async def _acknowledged(self, withdrawn: Mapping[int, _Opened], batch: _Batch) -> dict[int, Receipt]:
        """The receipts of what is withdrawn, once that is on disk and every process is blind."""
        if not withdrawn:
            return {}
        relaying = asyncio.create_task(self._relayed(withdrawn, batch), name="push:relay-withdrawal")
        try:
            await self._recorded(functools.partial(self._record_withdrawals, list(withdrawn.values())))
        except AuditUnavailableError as error:
            await relaying
            return {index: self._audit_refused(opened, error) for index, opened in withdrawn.items()}
        refused = await relaying
        return {
            index: refused.get(index)
            or Receipt(status="accepted", service=opened.claims.owner, sequence=opened.claims.sequence)
            for index, opened in withdrawn.items()
        }

    async def _relayed(self, opened: Mapping[int, _Opened], batch: _Batch) -> dict[int, Receipt]:
        """Have the other processes take the same envelopes; the receipts of what one of them refused."""
        session = batch.session
        if self._relay is None or session is None:
            return {}
        claims = [one.claims for one in opened.values()]
        certificate = None if session.signer is None else session.signer.certificate
        codes = await self._relay.take(
            Relayed(
                tenant=batch.tenant,
                agent=batch.agent_id,
                challenge=session.challenge,
                signing_certificate_der=None
                if certificate is None
                else certificate.public_bytes(Encoding.DER),
                tokens=tuple(batch.tokens[index] for index in opened),
                services=tuple(str(one.owner) for one in claims),
                replaces=tuple(one.operation is Operation.SET for one in claims),
                is_challenged=batch.is_challenged,
                takes_keys=batch.takes_keys,
            )
        )
        return {
            index: self._refused(
                batch.tenant,
                batch.agent_id,
                one.claims.owner,
                EnvelopeError(code, "a worker process of this proxy refused it"),
            )
            for (index, one), code in zip(opened.items(), codes, strict=True)
            if code
        }

    async def _install(
        self, accepted: dict[int, _Opened], receipts: dict[int, Receipt], batch: _Batch
    ) -> None:
        """Install *accepted*; each receipt is in *receipts* from the moment that the cache has its keys."""
        if not accepted:
            return
        try:
            await self._recorded(functools.partial(self._record, list(accepted.values())))
        except AuditUnavailableError as error:
            for index, opened in accepted.items():
                opened.wipe()
                receipts[index] = self._audit_refused(opened, error)
            return
        refused = await self._relayed(accepted, batch)
        for number, (index, opened) in enumerate(accepted.items()):
            if number:
                await asyncio.sleep(0)
            if index in refused:
                opened.wipe()
                receipts[index] = refused[index]
                continue
            receipts[index] = self._install_one(opened)

    async def _recorded(self, work: Callable[[], None]) -> None:
        """Return when *work* has its events on disk. AuditUnavailableError if it fails or takes too long."""
        try:
            async with asyncio.timeout(self._audit_patience_s):
                await asyncio.get_running_loop().run_in_executor(self._recorder, work)
        except TimeoutError:
            raise AuditUnavailableError(
                f"{self._audit.path} did not take an event within {self._audit_patience_s:g} s",
                "find out what the disk waits for",
            ) from None

    def _record_withdrawals(self, withdrawn: Sequence[_Opened]) -> None:
        """As `_record`."""
        for number, opened in enumerate(withdrawn, start=1):
            claims = opened.claims
            self._audit.append(
                "keys-withdrawn",
                durable=self._is_durable and number == len(withdrawn),
                service=str(claims.owner),
                agent=claims.issuer,
                sequence=claims.sequence,
            )

    def _record(self, accepted: Sequence[_Opened]) -> None:
        """One event each; the last one's sync puts all of them on disk."""
        for number, opened in enumerate(accepted, start=1):
            claims = opened.claims
            self._audit.append(
                "keys-accepted",
                durable=self._is_durable and number == len(accepted),
                service=str(claims.owner),
                agent=claims.issuer,
                sequence=claims.sequence,
                operation=claims.operation.value,
                keys=len(claims.keys),
                expires_at_s=claims.expires_at_s,
            )

    def _install_one(self, opened: _Opened) -> Receipt:
        claims = opened.claims
        self._cache.take_off_lost_time()
        deadline_boot_s = opened.deadline_boot_s - (self._cache.lost_s - opened.lost_s)
        try:
            self._refuse_superseded(opened)
            self._cache.install(
                claims.owner,
                claims.keys,
                deadline_boot_s=deadline_boot_s,
                operation=claims.operation,
                sequence=_rank(claims),
            )
        except EnvelopeError as error:
            opened.wipe()
            return self._refused(claims.owner.tenant, claims.issuer, claims.owner, error)
        if not opened.is_former:
            self._former.supersede(claims.owner)
        valid_for_s = max(0.0, deadline_boot_s - self._clock.boot_s())
        _log.info(
            "keys accepted",
            service=str(claims.owner),
            agent=claims.issuer,
            count=len(claims.keys),
            valid_for_s=valid_for_s,
        )
        return Receipt(
            status="accepted",
            service=claims.owner,
            sequence=claims.sequence,
            keys=len(claims.keys),
            valid_for_s=valid_for_s,
        )

    def _refuse_superseded(self, opened: _Opened) -> None:
        """What has changed while the event was being written."""
        if opened.claims.owner not in self._directory.recipients:
            raise EnvelopeError("recipient", "the network service was removed meanwhile")
        # The session's, still? It is gone if tenant or service were removed, or the root or signers changed.
        agents = self._agents.get(opened.claims.owner.tenant)
        agent = None if agents is None else agents.get(opened.claims.issuer)
        if agent is None or agent.tracks.get(opened.claims.owner) is not opened.track:
            raise EnvelopeError("nonce", "the session ended meanwhile: ask for a challenge first")
        if opened.track.highest != opened.claims.sequence:
            raise EnvelopeError("sequence", "a later envelope arrived meanwhile")

    def _audit_refused(self, opened: _Opened, error: AuditUnavailableError) -> Receipt:
        _log.error("audit log cannot be written", reason=str(error))
        detail = "the proxy cannot write its audit log" + (
            ", but the keys are withdrawn" if _withdraws(opened.claims) else ""
        )
        return Receipt(status="refused", service=opened.claims.owner, code="audit-unavailable", detail=detail)

    def _refused(
        self, tenant: str, agent_id: str, service: NetworkService | None, error: EnvelopeError
    ) -> Receipt:
        name = None if service is None else str(service)
        _log.warning(
            "envelope refused",
            tenant=tenant,
            agent=agent_id,
            service=name,
            code=error.code,
            reason=str(error),
        )
        try:
            self._audit.append(
                "envelope-refused",
                outcome="refused",
                durable=False,
                tenant=tenant,
                agent=agent_id,
                service=name,
                code=error.code,
            )
        except AuditUnavailableError as unwritten:
            _log.error("audit log cannot be written", reason=str(unwritten))  # it is refused already
        return Receipt(status="refused", service=service, code=error.code, detail=str(error))

    def _hosted(self, owner: NetworkService, certificate: x509.Certificate) -> HostedService:
        (status,) = self._cache.status([owner])
        return HostedService(owner=owner, certificate_sha256=fingerprint(certificate), status=status)


def _withdraws(claims: Claims) -> bool:
    return claims.operation is Operation.SET and not claims.keys


def _trusts_fewer(now: TenantEntry, before: TenantEntry) -> bool:
    """Whether a signer that could push before is no longer named. No pins: whomever the root certified.

    Removing the last pin lets any certified agent in, but whoever removes one distrusts it: that counts.
    """
    if not before.signers:
        return bool(now.signers)
    pinned = {fingerprint(signer) for signer in now.signers}
    return any(fingerprint(signer) not in pinned for signer in before.signers)


def _rank(claims: Claims) -> int:
    """Where *claims* stands among all issuers' envelopes for its service, in Unix milliseconds (rule 3)."""
    return min(claims.sequence, (claims.issued_at_s + 1) * 1000)
