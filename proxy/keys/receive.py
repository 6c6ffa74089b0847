"""From envelopes on the wire to keys in the cache (docs/format.md, "Key-material envelope").

Who may push is decided in sessions.py, what a single envelope is worth in envelopes.py. Here:

1. Between issuers only time orders, and an issuer's sequences may have run ahead of it: they are cut to the
   second in which the envelope was issued, or one agent could lock out the others for ever. A withdrawal by
   a clock that is not ours counts all the same, as the last that can have been issued by ours.
2. Accepting keys is an audit event on disk before the keys are in the cache (push_audit.py). Without it they
   are dropped. A withdrawal works the other way round: first the keys of all that are taken back are gone,
   then it is recorded, and a log that cannot be written makes the receipt an error, never the keys available.
3. Where several processes serve the proxy's clients (relay.py), what is accepted is in force in each of them
   before its receipt is written; a withdrawal is passed on while it is recorded.
4. Thousands at once hold up nobody: the event loop gets its turn after every envelope that is opened or
   installed. (Not in threads: opening holds Python's lock, and a thread keeps it for longer.)
"""

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import structlog
from cryptography.hazmat.primitives.serialization import Encoding
from prometheus_client import Counter

from envelope.errors import EnvelopeError
from envelope.keys import NetworkService
from envelope.material import MAX_AHEAD_S, Claims, Operation
from proxy.keys.cache import KeyCache
from proxy.keys.envelopes import Batch, EnvelopeOpener, Opened, withdraws
from proxy.keys.push_audit import AUDIT_PATIENCE_S, PushAudit
from proxy.keys.relay import Relay, Relayed
from proxy.keys.sessions import Sessions, distrusted
from proxy.tenants.model import Directory
from runtime.audit import AuditLog, AuditUnavailableError
from runtime.clock import Clock
from runtime.observe import NAMESPACE, REGISTRY

INSTANCE_SIZE: Final = 16

_log: Final = structlog.get_logger("keys.receive")
_ENVELOPES: Final = Counter(
    "push_envelopes",
    "Key-material envelopes received, by what became of them",
    ["outcome", "code"],
    namespace=NAMESPACE,
    registry=REGISTRY,
)


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


class Receiver:
    """Takes envelopes, under the sessions that it has. One per process; one event loop."""

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
        self._cache = cache
        self._audit = PushAudit(audit, patience_s=audit_patience_s, is_durable=is_durable)
        self._clock = clock
        self._directory = directory
        self.sessions: Final = Sessions(cache=cache, audit=audit, clock=clock, directory=directory)
        self._opener = EnvelopeOpener(
            proxy_id=proxy_id,
            sessions=self.sessions,
            cache=cache,
            clock=clock,
            validity_s=validity_s,
            directory=directory,
        )

    @property
    def directory(self) -> Directory:
        return self._directory

    def apply(self, directory: Directory) -> None:
        """Take over a new picture of the directory.

        A service that is gone loses its keys. So does every service of a tenant whose root changed or that
        trusts a signer no more: who pushed them may no longer be entitled to.
        """
        before, self._directory = self._directory, directory
        changed = distrusted(before, directory)
        gone = frozenset(
            owner
            for owner in before.recipients
            if owner not in directory.recipients or owner.tenant in changed
        )
        for owner in gone:
            self._cache.forget(owner)
        self._opener.apply(directory, gone=gone)
        self.sessions.apply(directory, gone=gone, distrusted=changed)

    def forget_past(self) -> None:
        """Be another instance: agents that ask who is there push all they have once more."""
        self.instance = os.urandom(INSTANCE_SIZE)

    async def receive_relayed(self, relayed: Relayed) -> list[Receipt]:
        """As `receive`: envelopes that another process of this proxy has opened, under its session."""
        return await self._received(
            Batch(
                tenant=relayed.tenant,
                agent_id=relayed.agent,
                tokens=relayed.tokens,
                session=self.sessions.relayed(relayed),
                is_challenged=relayed.is_challenged,
                takes_keys=relayed.takes_keys,
            )
        )

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

        *is_challenged* False: they came by a broker and answer no challenge. *takes_keys* False:
        withdrawals are taken and nothing else; keys are refused (code "purpose").
        """
        return await self._received(
            Batch(
                tenant=tenant,
                agent_id=agent_id,
                tokens=tokens,
                session=self.sessions.current(tenant, agent_id),
                is_challenged=is_challenged,
                takes_keys=takes_keys,
            )
        )

    async def _received(self, batch: Batch) -> list[Receipt]:
        receipts: dict[int, Receipt] = {}
        accepted: dict[int, Opened] = {}
        withdrawn: dict[int, Opened] = {}
        tenant, agent_id = batch.tenant, batch.agent_id
        try:
            for index, token in enumerate(batch.tokens):
                if index:
                    await asyncio.sleep(0)  # each costs a fraction of a millisecond; bodies in flight go on
                service: NetworkService | None = None
                try:
                    recipient = self._opener.addressee(tenant, token)
                    service = recipient.owner
                    opened = self._opener.open(recipient, token, batch)
                    if withdraws(opened.claims):
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

    # Taking effect.

    def _withdraw(self, opened: Opened) -> None:
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

    async def _acknowledged(self, withdrawn: Mapping[int, Opened], batch: Batch) -> dict[int, Receipt]:
        """The receipts of what is withdrawn, once that is on disk and every process is blind."""
        if not withdrawn:
            return {}
        relaying = asyncio.create_task(self._relayed(withdrawn, batch), name="push:relay-withdrawal")
        try:
            await self._audit.withdrawn(list(withdrawn.values()))
        except AuditUnavailableError as error:
            await relaying
            return {index: self._audit_refused(opened, error) for index, opened in withdrawn.items()}
        refused = await relaying
        return {
            index: refused.get(index)
            or Receipt(status="accepted", service=opened.claims.owner, sequence=opened.claims.sequence)
            for index, opened in withdrawn.items()
        }

    async def _relayed(self, opened: Mapping[int, Opened], batch: Batch) -> dict[int, Receipt]:
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

    async def _install(self, accepted: dict[int, Opened], receipts: dict[int, Receipt], batch: Batch) -> None:
        """Install *accepted*; each receipt is in *receipts* from the moment that the cache has its keys."""
        if not accepted:
            return
        try:
            await self._audit.accepted(list(accepted.values()))
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

    def _install_one(self, opened: Opened) -> Receipt:
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
        self._opener.installed(opened)
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

    def _refuse_superseded(self, opened: Opened) -> None:
        """What has changed while the event was being written."""
        if opened.claims.owner not in self._directory.recipients:
            raise EnvelopeError("recipient", "the network service was removed meanwhile")
        # The session's, still? It is gone if tenant or service were removed, or the root or signers changed.
        if self.sessions.track(opened.claims.owner, opened.claims.issuer) is not opened.track:
            raise EnvelopeError("nonce", "the session ended meanwhile: ask for a challenge first")
        if opened.track.highest != opened.claims.sequence:
            raise EnvelopeError("sequence", "a later envelope arrived meanwhile")

    def _audit_refused(self, opened: Opened, error: AuditUnavailableError) -> Receipt:
        _log.error("audit log cannot be written", reason=str(error))
        detail = "the proxy cannot write its audit log" + (
            ", but the keys are withdrawn" if withdraws(opened.claims) else ""
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
        self._audit.refused(tenant, agent_id, name, error.code)
        return Receipt(status="refused", service=service, code=error.code, detail=str(error))


def _rank(claims: Claims) -> int:
    """Where *claims* stands among all issuers' envelopes for its service, in Unix milliseconds (rule 1)."""
    return min(claims.sequence, (claims.issued_at_s + 1) * 1000)
