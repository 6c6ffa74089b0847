"""Making the envelopes of a push: keys by the HSM, withdrawals without it.

1. A sequence is committed before its envelope leaves. (For a withdrawal the commit is tried and not awaited
   for long: no database stops a kill switch.)
2. Proxies that are ready at the same time share one unwrapping in the HSM: who asks while a batch is being
   sealed goes into the next one.
3. Services travel in batches, so that the HSM is free between them and the KEK watch gets its turn.
"""

import asyncio
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import batched
from typing import Final, override

import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from envelope.certificates import CertificateError
from envelope.errors import SealgateError
from envelope.keys import NetworkService
from envelope.material import Claims, Operation, seal_envelope
from key_agent.errors import KeyAgentError, KeySourceError
from key_agent.push.recipients import Recipients, read_chain
from key_agent.push.targets import Targets
from key_agent.push.transport import MAX_ENVELOPES, Session
from key_agent.registry.model import RECEIPT_SLACK_MS, Link, Reservation
from key_agent.registry.store import Registry
from key_agent.sources.source import (
    Diagnosis,
    EnvelopeRequest,
    EnvelopeResult,
    Kek,
    KeySource,
    Recipient,
)
from runtime.clock import Clock

log = structlog.get_logger(__name__)

_COMMIT_PATIENCE_S: Final = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """One envelope, ready to leave; or why there is none."""

    owner: NetworkService
    sequence: int
    expires_at_s: int
    token: str | None = field(default=None, repr=False)
    error: str | None = None
    keys: int = 0


class Sealing(ABC):
    """Makes the envelopes for the proxies of one push."""

    @abstractmethod
    def batches(self, session: Session, owners: frozenset[NetworkService]) -> AsyncIterator[list[Sealed]]:
        """Envelopes of *owners* for the proxy of *session*, in batches.

        KeyAgentError if there can be none: nothing more will come.
        """


@dataclass(eq=False)
class _Ask:
    session: Session
    owners: frozenset[NetworkService]
    batches: asyncio.Queue[list[Sealed] | KeyAgentError | None] = field(default_factory=asyncio.Queue)


class KeySealing(Sealing):
    """Envelopes with keys. One per push; `run` seals until it is cancelled."""

    def __init__(
        self,
        *,
        source: KeySource,
        registry: Registry,
        targets: Targets,
        recipients: Recipients,
        clock: Clock,
        validity_s: int,
        batch_size: int,
        on_diagnosis: Callable[[Kek, Diagnosis], None],
        may_push: Callable[[], bool],
    ) -> None:
        self._source = source
        self._registry = registry
        self._targets = targets
        self._recipients = recipients
        self._clock = clock
        self._validity_s = validity_s
        self._batch_size = batch_size
        self._on_diagnosis = on_diagnosis
        self._may_push = may_push
        self._asks: list[_Ask] = []
        self._asked = asyncio.Event()

    @override
    async def batches(
        self, session: Session, owners: frozenset[NetworkService]
    ) -> AsyncIterator[list[Sealed]]:
        ask = _Ask(session, owners)
        self._asks.append(ask)
        self._asked.set()
        while (batch := await ask.batches.get()) is not None:
            if isinstance(batch, KeyAgentError):
                raise batch
            yield batch

    async def run(self) -> None:
        """Serve the asks, until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            asks, self._asks = self._asks, []
            try:
                await self._serve(asks)
            except KeyAgentError as error:
                for ask in asks:
                    ask.batches.put_nowait(error)
            else:
                for ask in asks:
                    ask.batches.put_nowait(None)

    async def _serve(self, asks: Sequence[_Ask]) -> None:
        owners = sorted(frozenset[NetworkService]().union(*(ask.owners for ask in asks)))
        for some in batched(owners, self._batch_size):
            if not self._may_push():
                raise KeyAgentError("pushing has stopped")
            made = await self._seal(asks, some)
            for ask in asks:
                mine = [sealed for sealed in made[ask.session.proxy_id] if sealed.owner in ask.owners]
                ask.batches.put_nowait(mine)

    async def _seal(
        self, asks: Sequence[_Ask], owners: Sequence[NetworkService]
    ) -> Mapping[str, list[Sealed]]:
        now_s = self._clock.wall_s()
        issued_at_s = int(now_s)
        expires_at_s = issued_at_s + self._validity_s
        sessions = {ask.session.proxy_id: ask.session for ask in asks}
        kek, reservations = await self._registry.reserve(
            owners, sessions, now_ms=int(now_s * 1000), until_ms=expires_at_s * 1000
        )
        self._targets.note_issued(
            reservations,
            expires_at_s * 1000,
            until_boot_s=self._clock.boot_s() + self._validity_s + RECEIPT_SLACK_MS / 1000,
        )
        if not self._may_push():
            raise KeyAgentError("pushing has stopped")
        made: dict[str, list[Sealed]] = {name: [] for name in sessions}
        requests = []
        for reservation in reservations:
            for key_id in reservation.damaged:
                log.error(
                    "a wrapped key is damaged in the registry",
                    service=str(reservation.owner),
                    kid=str(key_id),
                )
            fit: list[Recipient] = []
            for link in reservation.links:
                try:
                    leaf = self._recipients.check(link.owner, link.certificate_pem, now_s=now_s)
                except CertificateError as error:
                    made[link.proxy_id].append(
                        _failed(reservation, expires_at_s, f"certificate-{error.code}: {error}")
                    )
                    continue
                fit.append(_recipient(leaf, sessions[link.proxy_id], reservation.sequence))
            requests.append(
                EnvelopeRequest(
                    owner=reservation.owner,
                    keys=reservation.keys,
                    recipients=tuple(fit),
                    issued_at_s=issued_at_s,
                    expires_at_s=expires_at_s,
                )
            )
        try:
            results = await self._source.seal_envelopes(kek, requests) if requests else []
        except KeySourceError as error:
            self._on_diagnosis(kek, error.diagnosis)
            raise
        for reservation, request, result in zip(reservations, requests, results, strict=True):
            for recipient in request.recipients:
                made[recipient.audience].append(_outcome(reservation, recipient, result, expires_at_s))
        return made


def _recipient(leaf: x509.Certificate, session: Session, sequence: int) -> Recipient:
    return Recipient(
        audience=session.proxy_id,
        nonce=session.challenge,
        certificate_der=leaf.public_bytes(Encoding.DER),
        sequence=sequence,
    )


def _failed(reservation: Reservation, expires_at_s: int, error: str) -> Sealed:
    return Sealed(
        owner=reservation.owner, sequence=reservation.sequence, expires_at_s=expires_at_s, error=error
    )


def _outcome(
    reservation: Reservation, recipient: Recipient, result: EnvelopeResult, expires_at_s: int
) -> Sealed:
    for key_id, reason in result.failed_keys.items():
        log.error(
            "a key does not open and is left out", service=str(result.owner), kid=str(key_id), reason=reason
        )
    token = result.tokens.get(recipient.audience)
    if token is None:
        reason = result.failed_recipients.get(recipient.audience, "no key opened")
        return _failed(reservation, expires_at_s, f"not-sealed: {reason}")
    return Sealed(
        owner=reservation.owner,
        sequence=reservation.sequence,
        expires_at_s=expires_at_s,
        token=token,
        keys=len(reservation.keys) - len(result.failed_keys),
    )


class WithdrawalSealing(Sealing):
    """Envelopes without keys take back all that a proxy holds of a service. They need no HSM."""

    def __init__(
        self,
        *,
        agent_id: str,
        signing_key: ec.EllipticCurvePrivateKey,
        signing_certificate: x509.Certificate,
        registry: Registry,
        targets: Targets,
        clock: Clock,
        validity_s: int,
        batch_size: int,
    ) -> None:
        self._agent_id = agent_id
        self._signing_key = signing_key
        self._signing_certificate = signing_certificate
        self._registry = registry
        self._targets = targets
        self._clock = clock
        self._validity_s = validity_s
        self._batch_size = min(batch_size, MAX_ENVELOPES)
        # They outlive the push that began them; somebody must hold them.
        self._commits: set[asyncio.Task[None]] = set()

    @override
    async def batches(
        self, session: Session, owners: frozenset[NetworkService]
    ) -> AsyncIterator[list[Sealed]]:
        links = [
            link for link in self._targets.links if link.proxy_id == session.proxy_id and link.owner in owners
        ]
        # The next batch is made while this one travels.
        ahead: deque[asyncio.Task[list[Sealed]]] = deque()
        try:
            for some in batched(links, self._batch_size):
                ahead.append(asyncio.create_task(self._make(session, some), name="withdraw:seal"))
                if len(ahead) > 1:
                    yield await ahead.popleft()
            while ahead:
                yield await ahead.popleft()
        finally:
            for task in ahead:
                task.cancel()

    async def _make(self, session: Session, links: Sequence[Link]) -> list[Sealed]:
        now_s = self._clock.wall_s()
        sequences = self._targets.next_sequences((link.owner for link in links), int(now_s * 1000))
        commit = asyncio.create_task(self._commit(sequences), name="withdraw:commit")
        self._commits.add(commit)
        commit.add_done_callback(self._commits.discard)
        # Off the loop: a thousand of them are a quarter of a second of arithmetic.
        sealed = await asyncio.to_thread(self._seal_all, session, links, sequences, now_s)
        if len(self._commits) == 1:  # else one is late already, and nobody waits for a late database twice
            await asyncio.wait([commit], timeout=_COMMIT_PATIENCE_S)
        return sealed

    async def _commit(self, sequences: Mapping[NetworkService, int]) -> None:
        try:
            await self._registry.spend_sequences(sequences)
        except KeyAgentError as error:
            # The next ones follow the clock, so they still rise.
            log.error("withdrawal sequences are not stored", error=str(error))  # noqa: TRY400

    def _seal_all(
        self,
        session: Session,
        links: Iterable[Link],
        sequences: Mapping[NetworkService, int],
        now_s: float,
    ) -> list[Sealed]:
        return [self._seal(session, link, sequences[link.owner], now_s) for link in links]

    def _seal(self, session: Session, link: Link, sequence: int, now_s: float) -> Sealed:
        issued_at_s = int(now_s)
        expires_at_s = issued_at_s + self._validity_s
        claims = Claims(
            issuer=self._agent_id,
            audience=session.proxy_id,
            owner=link.owner,
            issued_at_s=issued_at_s,
            expires_at_s=expires_at_s,
            sequence=sequence,
            token_id=os.urandom(16),
            nonce=session.challenge,
            operation=Operation.SET,
            keys=(),
        )
        try:
            # It was checked when it was added. It may have expired since: a withdrawal tells no secret.
            token = seal_envelope(
                claims,
                recipient=read_chain(link.certificate_pem)[0],
                signing_key=self._signing_key,
                signing_certificate=self._signing_certificate,
            )
        except (SealgateError, ValueError) as error:
            return Sealed(
                owner=link.owner, sequence=sequence, expires_at_s=expires_at_s, error=f"not-sealed: {error}"
            )
        return Sealed(owner=link.owner, sequence=sequence, expires_at_s=expires_at_s, token=token)
