"""Making the envelopes of a push: keys by the HSM, withdrawals without it.

1. A sequence is committed before its envelope leaves. (For a withdrawal the commit is tried and not awaited
   for long: no database stops a kill switch.)
2. Proxies that are ready at the same time share one unwrapping in the HSM: who asks while a batch is being
   sealed goes into the next one.
3. Services travel in batches, so that the HSM is free between them and the KEK watch gets its turn.
4. A batch is made when its proxy is ready for it: what waits to be sent is one batch of each proxy that is
   being served, however many services and proxies there are.
"""

import asyncio
import contextlib
import functools
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import batched
from typing import Final, override

import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from envelope.certificates import CertificateError
from envelope.keys import KeyId, NetworkService
from envelope.material import Claims, Operation, know_recipient, seal_envelope
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
_COMMIT_AT_ONCE: Final = 1000
# One service at many proxies is one unwrapping, but as many envelopes: so many are made before any leaves.
_ENVELOPES_AT_ONCE: Final = 1000
# Withdrawals that are sealed before the event loop gets its turn: about a millisecond.
_SEALED_PER_TURN: Final = 4


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
    """One batch for one proxy, that is ready for it."""

    session: Session
    owners: frozenset[NetworkService]
    made: asyncio.Future[list[Sealed]]


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
        on_left_out: Callable[[AbstractSet[KeyId]], None] = lambda _: None,
        may_hold_s: Callable[[], float | None] = lambda: None,
    ) -> None:
        """*on_left_out*: keys that did not open, and are in no envelope of their service this time.

        *may_hold_s*: for how long what is sealed now may be valid at most; None: for the validity.
        """
        self._source = source
        self._registry = registry
        self._targets = targets
        self._recipients = recipients
        self._clock = clock
        self._validity_s = validity_s
        self._batch_size = batch_size
        self._on_diagnosis = on_diagnosis
        self._may_push = may_push
        self._on_left_out = on_left_out
        self._may_hold_s = may_hold_s
        self._asks: list[_Ask] = []
        self._asked = asyncio.Event()

    @override
    async def batches(
        self, session: Session, owners: frozenset[NetworkService]
    ) -> AsyncIterator[list[Sealed]]:
        for some in batched(sorted(owners), self._batch_size):
            ask = _Ask(session, frozenset(some), asyncio.get_running_loop().create_future())
            self._asks.append(ask)
            self._asked.set()
            yield await ask.made

    async def run(self) -> None:
        """Serve the asks, until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            asks, self._asks = self._asks, []
            for some in self._together(asks):
                try:
                    await self._serve(some)
                except KeyAgentError as error:
                    for ask in some:
                        if not ask.made.done():  # its proxy's task was cancelled
                            ask.made.set_exception(error)

    def _together(self, asks: Sequence[_Ask]) -> Iterator[list[_Ask]]:
        """*asks*, first come, first served, in parts of at most a batch of services."""
        part: list[_Ask] = []
        owners: set[NetworkService] = set()
        envelopes = 0
        for ask in asks:
            envelopes += len(ask.owners)
            if part and (len(owners | ask.owners) > self._batch_size or envelopes > _ENVELOPES_AT_ONCE):
                yield part
                part, owners, envelopes = [], set(), len(ask.owners)
            part.append(ask)
            owners |= ask.owners
        if part:
            yield part

    async def _serve(self, asks: Sequence[_Ask]) -> None:
        if not self._may_push():
            raise KeyAgentError("pushing has stopped")
        made = await self._seal(
            asks, sorted(frozenset[NetworkService]().union(*(ask.owners for ask in asks)))
        )
        for ask in asks:
            if not ask.made.done():
                ask.made.set_result(made[ask.session.proxy_id])

    def _expires_at_s(self, now_s: float) -> int:
        """Unix seconds. KeyAgentError if nothing sealed now would be valid at all."""
        expires_at_s = int(now_s) + self._validity_s
        if (left_s := self._may_hold_s()) is not None:
            expires_at_s = min(expires_at_s, int(now_s + left_s))
        if expires_at_s <= int(now_s):
            raise KeyAgentError("pushing has stopped: the registry lease is over")
        return expires_at_s

    async def _seal(
        self, asks: Sequence[_Ask], owners: Sequence[NetworkService]
    ) -> Mapping[str, list[Sealed]]:
        now_s = self._clock.wall_s()
        issued_at_s = int(now_s)
        expires_at_s = self._expires_at_s(now_s)
        sessions = {ask.session.proxy_id: ask.session for ask in asks}
        wanted = {ask.session.proxy_id: ask.owners for ask in asks}
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
                if link.owner not in wanted[link.proxy_id]:
                    continue  # another batch's
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
            # Told before any of it leaves: whoever accepts it does not have them.
            if left_out := result.failed_keys.keys() | set(reservation.damaged):
                self._on_left_out(left_out)
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
        self._signing = (signing_key, signing_certificate)
        self._registry = registry
        self._targets = targets
        self._clock = clock
        self._validity_s = validity_s
        self._batch_size = min(batch_size, MAX_ENVELOPES)
        self._uncommitted: dict[NetworkService, int] = {}
        # It outlives the push that began it; somebody must hold it.
        self._commit: asyncio.Task[None] | None = None

    def renew(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        """The agent signs by these from now on."""
        self._signing = (key, certificate)

    @override
    async def batches(
        self, session: Session, owners: frozenset[NetworkService]
    ) -> AsyncIterator[list[Sealed]]:
        links = [link for link in self._targets.links_at(session.proxy_id) if link.owner in owners]
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

    async def get_ready(self, proxy_id: str) -> None:
        """What is slow about the certificates of a proxy's services is done before they are needed."""
        for some in batched(self._targets.links_at(proxy_id), _SEALED_PER_TURN):
            for link in some:
                # Whatever is wrong with one is told when it is used, and ends no push.
                with contextlib.suppress(Exception):
                    know_recipient(_leaf(link.certificate_pem))
            await asyncio.sleep(0)

    async def _make(self, session: Session, links: Sequence[Link]) -> list[Sealed]:
        now_s = self._clock.wall_s()
        sequences = self._targets.next_sequences((link.owner for link in links), int(now_s * 1000))
        begun = self._commit_soon(sequences)
        sealed: list[Sealed] = []
        for some in batched(links, _SEALED_PER_TURN):
            if sealed:
                await asyncio.sleep(0)
            sealed += [self._seal(session, link, sequences[link.owner], now_s) for link in some]
        if begun is not None:
            await asyncio.wait([begun], timeout=_COMMIT_PATIENCE_S)
        return sealed

    def _commit_soon(self, sequences: Mapping[NetworkService, int]) -> asyncio.Task[None] | None:
        """Have *sequences* stored, with all others that wait. The task, if this call began it.

        Whoever finds one begun waits for none: the database is late already, or busy with the first.
        """
        self._uncommitted |= sequences
        if self._commit is not None and not self._commit.done():
            return None
        self._commit = asyncio.create_task(self._commit_all(), name="withdraw:commit")
        return self._commit

    async def _commit_all(self) -> None:
        while self._uncommitted:
            some = dict(list(self._uncommitted.items())[:_COMMIT_AT_ONCE])
            for owner in some:
                del self._uncommitted[owner]
            try:
                await self._registry.spend_sequences(some)
            except KeyAgentError as error:
                # The next ones follow the clock, so they still rise.
                log.error("withdrawal sequences are not stored", error=str(error))  # noqa: TRY400

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
        signing_key, signing_certificate = self._signing  # both at once: it runs in a thread
        try:
            # It was checked when it was added. It may have expired since: a withdrawal tells no secret.
            token = seal_envelope(
                claims,
                recipient=_leaf(link.certificate_pem),
                signing_key=signing_key,
                signing_certificate=signing_certificate,
            )
        except Exception as error:  # noqa: BLE001 - one row that is no good keeps no other's keys out there
            reason = str(error) or type(error).__name__
            return Sealed(
                owner=link.owner, sequence=sequence, expires_at_s=expires_at_s, error=f"not-sealed: {reason}"
            )
        return Sealed(owner=link.owner, sequence=sequence, expires_at_s=expires_at_s, token=token)


@functools.lru_cache(maxsize=1 << 14)
def _leaf(chain_pem: str) -> x509.Certificate:
    """CertificateError if there is none."""
    return read_chain(chain_pem)[0]
