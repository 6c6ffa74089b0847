"""Fan-out: every proxy at once, each with its own deadlines, its own result, its own second chance.

1. One slow, dead or hostile proxy delays nobody: each has a task, each request a deadline, and whatever goes
   wrong there is that proxy's failure, even what nobody thought of: these loops are the kill switch. How many
   are served at once is bounded, of keys and of withdrawals each for itself, and the slow have places apart.
2. A challenge is kept and used until the proxy says `nonce` (it restarted, or somebody opened another
   session); then a new session is opened and what was refused is sealed and sent again at once. The same for
   `sequence`, which only a push that overtook another one can earn, and for `signer`: our certificate was
   renewed since the session was opened, which introduces it. Once: what is refused twice is a failure.
3. Nothing with keys leaves once pushing has stopped; `stop` ends what is on its way.
4. Which start of a proxy last answered a push of keys is remembered: another start has none of them (`meet`).
5. Receipts are values, and kept: memory first, then the registry, those of many proxies together.
6. What a withdrawal can have ready before it is needed is made ready when the keys have arrived.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import Final

import structlog

from envelope.certificates import CertificateError
from envelope.keys import NetworkService
from key_agent.errors import KeyAgentError
from key_agent.push.places import Places
from key_agent.push.recipients import leaf_sha256
from key_agent.push.sealing import KeySealing, Sealed, Sealing, WithdrawalSealing
from key_agent.push.targets import Targets
from key_agent.push.transport import Answer, Purpose, PushError, Session, Transport
from key_agent.registry.model import RECEIPT_SLACK_MS, Proxy, Receipt
from key_agent.registry.store import Registry
from runtime.clock import Clock

log = structlog.get_logger(__name__)

_AGAIN: Final = frozenset({"nonce", "sequence", "signer"})
_SILENCE: Final = frozenset({"timeout", "unreachable"})
_ATTEMPTS: Final = 2
# What is under way at once: proxies, each with a batch of envelopes (rule 1).
_KEYS_AT_ONCE: Final = {"quick": 64, "slow": 192}
_WITHDRAWALS_AT_ONCE: Final = {"quick": 256, "slow": 768}
_RECEIPTS_AT_ONCE: Final = 1000
# While others are on their way receipts wait for theirs: each transaction costs as much as forty receipts.
_GATHER_S: Final = 0.25


class Outcome(StrEnum):
    ACCEPTED = "accepted"
    """Every envelope."""
    PARTIAL = "partial"
    """Some services were refused, or had no envelope."""
    FAILED = "failed"
    """Nothing arrived."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """What became of one proxy in one push."""

    proxy_id: str
    outcome: Outcome
    accepted: int = 0
    refused: int = 0
    """Services whose envelope was refused, never made, or never answered."""
    code: str | None = None
    """Of the first failure."""
    error: str | None = None
    at_ms: int = 0
    receipts: tuple[Receipt, ...] = field(default=(), repr=False)

    @property
    def is_complete(self) -> bool:
        return self.outcome is Outcome.ACCEPTED


type OnDelivery = Callable[[Delivery], None]


class Pusher:
    def __init__(
        self,
        *,
        transport: Transport,
        registry: Registry,
        targets: Targets,
        clock: Clock,
        make_key_sealing: Callable[[], KeySealing],
        withdrawal_sealing: WithdrawalSealing,
        may_push: Callable[[], bool],
        request_timeout_s: float,
    ) -> None:
        self._transport = transport
        self._registry = registry
        self._targets = targets
        self._clock = clock
        self._make_key_sealing = make_key_sealing
        self._withdrawal_sealing = withdrawal_sealing
        self._may_push = may_push
        self._request_timeout_s = request_timeout_s
        self._sessions: dict[str, Session] = {}
        self._served: dict[str, bytes] = {}
        """By proxy: the instance that last answered a push of keys."""
        self._silent: set[str] = set()
        """Proxies that did not answer when they were last spoken to."""
        self._places = {
            Purpose.KEYS: Places(**_KEYS_AT_ONCE),
            Purpose.WITHDRAWAL: Places(**_WITHDRAWALS_AT_ONCE),
        }
        self._running: set[asyncio.Task[Delivery]] = set()
        self._unstored: list[Receipt] = []
        self._storing: asyncio.Task[None] | None = None
        self._under_way = 0
        self._quiet = asyncio.Event()
        """No delivery is under way."""
        self._quiet.set()

    @property
    def sessions(self) -> Mapping[str, Session]:
        """The last session of each proxy: what it said of itself."""
        return self._sessions

    async def push_keys(self, proxies: Iterable[Proxy], on_delivery: OnDelivery) -> list[Delivery]:
        """Every key of every service to *proxies*. What proxies, HSM and registry do is never raised."""
        sealing = self._make_key_sealing()
        async with asyncio.TaskGroup() as group:
            sealer = group.create_task(sealing.run(), name="push:seal")
            tasks = [
                group.create_task(
                    self._deliver_keys(
                        proxy, sealing, frozenset(self._targets.owners_at(proxy.id)), on_delivery
                    ),
                    name=f"push:{proxy.id}",
                )
                for proxy in proxies
            ]
            for task in tasks:
                self._running.add(task)
                task.add_done_callback(self._running.discard)
            if tasks:
                await asyncio.wait(tasks)
            sealer.cancel()
        return [task.result() for task in tasks if not task.cancelled()]

    async def withdraw(
        self, proxy: Proxy, owners: frozenset[NetworkService], on_delivery: OnDelivery
    ) -> Delivery:
        """Take back the keys of these services at this proxy. Works without HSM and registry."""
        return await self._deliver(
            proxy, self._withdrawal_sealing, owners, on_delivery, purpose=Purpose.WITHDRAWAL
        )

    def stop(self) -> None:
        """End the deliveries of keys that are on their way. (`may_push` keeps new ones from beginning.)"""
        for task in self._running:
            task.cancel()

    async def settle(self) -> None:
        """Return when the receipts so far are stored, or could not be."""
        if self._storing is not None:
            await asyncio.wait([self._storing])

    def miss(self, proxy_id: str) -> None:
        """It does not answer: until it does it waits with others of its kind."""
        self._silent.add(proxy_id)

    def meet(self, proxy_id: str, instance: bytes) -> bool:
        """This start of the proxy is there now. True if an earlier one had our pushes and this one none."""
        self._silent.discard(proxy_id)
        known = self._sessions.get(proxy_id)
        if known is not None and known.instance not in (None, instance):
            del self._sessions[proxy_id]  # its challenge is as gone as the process that made it
        return self._served.get(proxy_id, instance) != instance

    async def probe(self, proxy: Proxy) -> Session:
        """Open a session, for `doctor` and to learn what a proxy holds. PushError."""
        session = await self._open_session(proxy, Purpose.KEYS)
        if session.challenge is None:
            raise PushError("unreachable", f"{proxy.url} does not answer; only the broker is left")
        return session

    async def _deliver_keys(
        self,
        proxy: Proxy,
        sealing: Sealing,
        owners: frozenset[NetworkService],
        on_delivery: OnDelivery,
    ) -> Delivery:
        try:
            return await self._deliver(proxy, sealing, owners, on_delivery, purpose=Purpose.KEYS)
        except asyncio.CancelledError:
            if self._may_push():
                raise
            # `stop`: the outcome is told, the group goes on.
            if (task := asyncio.current_task()) is not None:
                task.uncancel()
            delivery = Delivery(
                proxy_id=proxy.id,
                outcome=Outcome.FAILED,
                refused=len(owners),
                code="stopped",
                error="pushing has stopped",
                at_ms=int(self._clock.wall_s() * 1000),
            )
            on_delivery(delivery)
            return delivery

    async def _deliver(
        self,
        proxy: Proxy,
        sealing: Sealing,
        owners: frozenset[NetworkService],
        on_delivery: OnDelivery,
        *,
        purpose: Purpose,
    ) -> Delivery:
        self._under_way += 1
        self._quiet.clear()
        try:
            delivery = await self._attempt(proxy, sealing, owners, on_delivery, purpose)
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._quiet.set()
        if purpose is Purpose.KEYS and delivery.accepted:
            await self._withdrawal_sealing.get_ready(proxy.id)
        return delivery

    async def _attempt(
        self,
        proxy: Proxy,
        sealing: Sealing,
        owners: frozenset[NetworkService],
        on_delivery: OnDelivery,
        purpose: Purpose,
    ) -> Delivery:
        receipts: dict[NetworkService, Receipt] = {}
        failure: PushError | None = None
        try:
            async with self._places[purpose].taken(is_slow=proxy.id in self._silent):
                await self._exchange(proxy, sealing, owners, receipts, purpose)
        except PushError as error:
            if error.code in _SILENCE:
                self._silent.add(proxy.id)  # its challenge is as good as it was
            else:
                self._sessions.pop(proxy.id, None)
            failure = error
        except KeyAgentError as error:
            failure = PushError(type(error).__name__.removesuffix("Error").lower(), str(error))
        except Exception as error:
            log.exception("a delivery failed unexpectedly", proxy=proxy.id)
            self._sessions.pop(proxy.id, None)
            failure = PushError("internal", type(error).__name__)
        delivery = self._sum_up(proxy, owners, receipts, failure)
        self._targets.note_receipts(delivery.receipts)
        on_delivery(delivery)
        self._unstored += delivery.receipts
        if self._storing is None or self._storing.done():
            # Beside: what is told must not be cut off, nor wait for the disk.
            self._storing = asyncio.create_task(self._store(), name="receipts")
        return delivery

    async def _exchange(
        self,
        proxy: Proxy,
        sealing: Sealing,
        owners: frozenset[NetworkService],
        receipts: dict[NetworkService, Receipt],
        purpose: Purpose,
    ) -> None:
        """Sessions and envelopes until each of *owners* has its entry in *receipts*. KeyAgentError."""
        wanted = owners
        is_noted = False
        for attempt in range(_ATTEMPTS):
            session = await self._session(proxy, purpose, anew=attempt > 0)
            again: set[NetworkService] = set()
            async for batch in sealing.batches(session, wanted):
                for receipt, code in await self._send(proxy, session, batch, purpose):
                    receipts[receipt.owner] = receipt
                    if code in _AGAIN:
                        again.add(receipt.owner)
                    elif purpose is Purpose.KEYS and not is_noted and (receipt.accepted or code):
                        # The first: if the proxy restarts halfway, the new start has not all of them.
                        is_noted = True
                        self._note_served(proxy, session)
            wanted = frozenset(again)
            if not wanted:
                break

    def _note_served(self, proxy: Proxy, session: Session) -> None:
        if session.instance is None:
            self._served.pop(proxy.id, None)
        else:
            self._served[proxy.id] = session.instance

    async def _store(self) -> None:
        """All that wait, together: a thousand proxies that answer at once are no thousand transactions."""
        while self._unstored:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GATHER_S):
                    await self._quiet.wait()
            some = list(islice(_until_repeated(self._unstored), _RECEIPTS_AT_ONCE))
            del self._unstored[: len(some)]
            try:
                await self._registry.record_receipts(some)
            except KeyAgentError as error:
                # What is lost is an entry of the status page; the proxy has its keys, or not, all the same.
                log.error("receipts are not stored", count=len(some), error=str(error))  # noqa: TRY400

    def _sum_up(
        self,
        proxy: Proxy,
        owners: frozenset[NetworkService],
        receipts: Mapping[NetworkService, Receipt],
        failure: PushError | None,
    ) -> Delivery:
        accepted = sum(receipt.accepted for receipt in receipts.values())
        first = failure or next((r.error for r in receipts.values() if not r.accepted), None)
        outcome = Outcome.PARTIAL if accepted else Outcome.FAILED
        if first is None:
            outcome = Outcome.ACCEPTED
        return Delivery(
            proxy_id=proxy.id,
            outcome=outcome,
            accepted=accepted,
            refused=len(receipts) - accepted if failure is None else len(owners) - accepted,
            code=None if first is None else str(first).partition(":")[0],
            error=None if first is None else str(first),
            at_ms=int(self._clock.wall_s() * 1000),
            receipts=tuple(receipts.values()),
        )

    async def _session(self, proxy: Proxy, purpose: Purpose, *, anew: bool) -> Session:
        known = self._sessions.get(proxy.id)
        return known if known is not None and not anew else await self._open_session(proxy, purpose)

    async def _open_session(self, proxy: Proxy, purpose: Purpose) -> Session:
        try:
            async with asyncio.timeout(self._request_timeout_s):
                session = await self._transport.open_session(proxy, purpose=purpose)
        except TimeoutError:
            raise PushError(
                "timeout", f"{proxy.url}: no session within {self._request_timeout_s:g} s"
            ) from None
        if session.challenge is not None:  # else it was not asked, and is the next time
            self._silent.discard(proxy.id)
            self._sessions[proxy.id] = session
            self._compare(proxy, session)
        return session

    def _compare(self, proxy: Proxy, session: Session) -> None:
        """Tell early what will be refused: what the proxy hosts against what we believe it hosts."""
        hosted = {service.owner: service.certificate_sha256 for service in session.services}
        for link in self._targets.links_at(proxy.id):
            if link.withdrawn:
                continue
            try:
                ours = leaf_sha256(link.certificate_pem)
            except CertificateError:
                ours = "unreadable"
            if link.owner not in hosted:
                log.warning("the proxy does not host the service", proxy=proxy.id, service=str(link.owner))
            elif hosted[link.owner] != ours:
                log.warning(
                    "the proxy has another certificate for the service",
                    proxy=proxy.id,
                    service=str(link.owner),
                )

    async def _send(
        self, proxy: Proxy, session: Session, batch: list[Sealed], purpose: Purpose
    ) -> list[tuple[Receipt, str]]:
        """Receipts, each with the proxy's refusal code or ""."""
        ready = [sealed for sealed in batch if sealed.token is not None]
        answers: list[Answer] = []
        if ready:
            if purpose is Purpose.KEYS and not self._may_push():
                raise PushError("stopped", "pushing has stopped")
            try:
                async with asyncio.timeout(self._request_timeout_s):
                    answers = await self._transport.send(
                        proxy,
                        [sealed.token or "" for sealed in ready],
                        challenge=session.challenge,
                        purpose=purpose,
                    )
            except TimeoutError:
                raise PushError(
                    "timeout", f"{proxy.url}: no answer within {self._request_timeout_s:g} s"
                ) from None
        at_ms = int(self._clock.wall_s() * 1000)
        made = [
            (self._receipt(proxy, sealed, answer, at_ms), "" if answer.accepted else answer.code)
            for sealed, answer in zip(ready, answers, strict=True)
        ]
        made += [(self._receipt(proxy, sealed, None, at_ms), "") for sealed in batch if sealed.token is None]
        return made

    def _receipt(self, proxy: Proxy, sealed: Sealed, answer: Answer | None, at_ms: int) -> Receipt:
        error: str | None = None
        accepted = False
        if answer is None:
            error = sealed.error
        elif not answer.accepted:
            error = f"{answer.code}: {answer.detail}"
        elif answer.owner != sealed.owner or answer.sequence != sealed.sequence or answer.keys != sealed.keys:
            # It accepted something else than what we sent: believe nothing.
            error = f"bad-receipt: {answer.owner} sequence {answer.sequence} with {answer.keys} keys"
        else:
            accepted = True
        valid_until_ms = None
        if accepted and sealed.keys and answer is not None:
            # What we issued ends then, whatever it says.
            valid_until_ms = min(
                at_ms + int(answer.valid_for_s * 1000), sealed.expires_at_s * 1000 + RECEIPT_SLACK_MS
            )
        return Receipt(
            owner=sealed.owner,
            proxy_id=proxy.id,
            sequence=sealed.sequence,
            accepted=accepted,
            keys=sealed.keys,
            at_ms=at_ms,
            valid_until_ms=valid_until_ms,
            error=error,
        )


def _until_repeated(receipts: Iterable[Receipt]) -> Iterator[Receipt]:
    """Up to the first that is about the same place as one before: the later one is to be written later."""
    seen: set[tuple[NetworkService, str]] = set()
    for receipt in receipts:
        place = (receipt.owner, receipt.proxy_id)
        if place in seen:
            return
        seen.add(place)
        yield receipt
