"""The loops that keep the promise: refresh every five minutes, look at the KEK every five seconds, withdraw
at once.

1. *When* is a pure function of what happened (`next_delay`, `Schedule`); the loops only wait and act.
2. Each proxy has its own schedule: a failed one is tried again after 1, 2, 4 ... s, the others keep their
   interval. Many that begin together are spread by jitter, a few together, so that the HSM is not asked for
   everything in one go for ever.
3. The watch keeps its pace whatever a diagnosis costs. Every other looks at the KEK feed the same `Consent`.
4. Withdrawals go on until each proxy has confirmed, or nothing that was issued to it can be valid any more.
5. A loop ends by a bug or by cancellation alone: what proxies, the HSM and the registry do is expected.
"""

import asyncio
import math
from collections.abc import Callable, Iterable
from itertools import batched
from typing import Any, Final, NoReturn

import structlog

from envelope.keys import NetworkService
from key_agent import metrics
from key_agent.consent import Consent
from key_agent.journal import Journal
from key_agent.push.pusher import Delivery, Pusher
from key_agent.push.targets import Targets
from key_agent.sources.source import KeySource
from runtime.audit import AuditUnavailableError
from runtime.clock import Clock

log = structlog.get_logger(__name__)

MAX_WITHDRAWAL_DELAY_S: Final = 5.0
TOGETHER: Final = 32
"""Proxies that keep the same jitter: as long as they stay together they need one unwrapping."""
LOOK_AGAIN_S: Final = 1.0
"""What is to be withdrawn is looked through no more often than this without a cause."""


def next_delay(*, interval_s: float, failures: int, jitter: float) -> float:
    """Seconds to the next push: the interval, by *jitter* 0 to 1 a tenth early; after failures 1, 2, 4 ..."""
    if failures == 0:
        return interval_s * (1 - jitter / 10)
    # The exponent is bounded: days of failures would overflow the float.
    return min(interval_s, 2.0 ** min(failures - 1, 30))


class Schedule:
    """When each proxy is due next. Pure: time is an argument, in seconds on the boot clock."""

    def __init__(self) -> None:
        self._due_s: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._in_flight: set[str] = set()
        self._again: set[str] = set()

    def keep(self, names: Iterable[str], now_s: float) -> None:
        """Exactly these: a new one is due at once, one that is gone is forgotten."""
        wanted = set(names)
        for name in self._due_s.keys() - wanted:
            self.forget(name)
        for name in wanted - self._due_s.keys():
            self._due_s[name] = now_s

    def forget(self, name: str) -> None:
        self._due_s.pop(name, None)
        self._failures.pop(name, None)
        self._again.discard(name)

    def take_due(self, now_s: float) -> list[str]:
        """The due ones; each is in flight until `done`."""
        due = sorted(
            name for name, due_s in self._due_s.items() if due_s <= now_s and name not in self._in_flight
        )
        self._in_flight.update(due)
        return due

    def done(self, name: str, next_s: Callable[[int], float], *, succeeded: bool) -> None:
        """Its push has ended; *next_s* tells when the next is due, from the number of failures in a row."""
        self._in_flight.discard(name)
        if name not in self._due_s:
            return
        failures = 0 if succeeded else self._failures.get(name, 0) + 1
        self._failures[name] = failures
        self._due_s[name] = next_s(failures)
        if name in self._again:
            self._again.discard(name)
            self._due_s[name] = -math.inf

    def at_once(self, now_s: float, names: Iterable[str] | None = None) -> None:
        """These, or all: due now. One in flight goes again when it is back."""
        for name in self._due_s.keys() if names is None else self._due_s.keys() & set(names):
            self._failures.pop(name, None)
            self._due_s[name] = now_s
            if name in self._in_flight:
                self._again.add(name)

    def is_in_flight(self, name: str) -> bool:
        return name in self._in_flight

    def failures(self, name: str) -> int:
        return self._failures.get(name, 0)

    def next_due_s(self) -> float | None:
        """When the next one that is not in flight is due; None if there is none."""
        waiting = [due_s for name, due_s in self._due_s.items() if name not in self._in_flight]
        return min(waiting, default=None)


async def wait_until(clock: Clock, wake: asyncio.Event, at_s: float | None) -> None:
    """Return at *at_s* on the boot clock, or as soon as *wake* is set, which is then cleared."""
    waiting: list[asyncio.Future[Any]] = [asyncio.ensure_future(wake.wait())]
    if at_s is not None:
        waiting.append(asyncio.ensure_future(clock.sleep(max(0.0, at_s - clock.boot_s()))))
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
    wake.clear()


class KekWatch:
    def __init__(self, *, source: KeySource, consent: Consent, clock: Clock, watch_s: float) -> None:
        self._source = source
        self._consent = consent
        self._clock = clock
        self._watch_s = watch_s
        self._wake = asyncio.Event()
        self.looked_at_s: float | None = None
        """When the last look ended, on the boot clock: a watch that stands still is no watch."""

    def wake(self) -> None:
        """Look now."""
        self._wake.set()

    async def run(self) -> NoReturn:
        while True:
            began_s = self._clock.boot_s()
            await self.look()
            await wait_until(self._clock, self._wake, began_s + self._watch_s)

    async def look(self) -> None:
        """One diagnosis, unless there is nothing to find out."""
        kek = self._consent.kek
        if kek is not None:
            diagnosis = await self._source.diagnose(kek)
            metrics.DIAGNOSES.labels(diagnosis.verdict).inc()
            self._consent.observe(kek, diagnosis)
        self.looked_at_s = self._clock.boot_s()


class RefreshLoop:
    """Keys to every proxy that should have them, for as long as the enterprise consents."""

    def __init__(
        self,
        *,
        pusher: Pusher,
        targets: Targets,
        consent: Consent,
        clock: Clock,
        interval_s: float,
        jitter: Callable[[], float],
        journal: Journal,
        on_delivery: Callable[[Delivery], None],
    ) -> None:
        self._pusher = pusher
        self._targets = targets
        self._consent = consent
        self._clock = clock
        self.interval_s = interval_s
        """May become another one; from the next push of each proxy on."""
        self._jitter = jitter
        self._journal = journal
        self._on_delivery = on_delivery
        self._wake = asyncio.Event()
        self.schedule = Schedule()

    def at_once(self, names: Iterable[str] | None = None) -> None:
        """Push to these proxies, or to all, as soon as consent allows."""
        now_s = self._clock.boot_s()
        self.schedule.keep(self._targets.fed(), now_s)
        self.schedule.at_once(now_s, names)
        self._wake.set()

    async def run(self) -> NoReturn:
        async with asyncio.TaskGroup() as group:
            while True:
                now_s = self._clock.boot_s()
                fed = self._targets.fed()
                self.schedule.keep(fed, now_s)
                if self._consent.may_push and (due := self.schedule.take_due(now_s)):
                    group.create_task(self._round(due), name=f"refresh:{','.join(due)[:80]}")
                await wait_until(
                    self._clock, self._wake, self.schedule.next_due_s() if self._consent.may_push else None
                )
        raise AssertionError("unreachable: the loop above does not end")

    async def _round(self, names: list[str]) -> None:
        began_s = self._clock.boot_s()
        jitter = {
            name: value for some in batched(names, TOGETHER) for value in [self._jitter()] for name in some
        }

        def done(name: str, *, succeeded: bool) -> None:
            def next_s(failures: int) -> float:
                delay_s = next_delay(interval_s=self.interval_s, failures=failures, jitter=jitter[name])
                return (began_s if failures == 0 else self._clock.boot_s()) + delay_s

            self.schedule.done(name, next_s, succeeded=succeeded)

        def delivered(delivery: Delivery) -> None:
            left.discard(delivery.proxy_id)
            done(delivery.proxy_id, succeeded=delivery.is_complete)
            self._wake.set()
            self._on_delivery(delivery)

        left = set(names)
        try:
            # Keys are about to be used: if that cannot be audited, they are not.
            await self._journal.record("keys-refresh", proxies=len(names))
            proxies = [proxy for name, proxy in self._targets.fed().items() if name in left]
            await self._pusher.push_keys(proxies, delivered)
        except AuditUnavailableError as error:
            log.error("no refresh without an audit log", error=str(error))  # noqa: TRY400 - expected
        for name in left:  # never begun: no audit, or no longer among the targets
            done(name, succeeded=False)
        self._wake.set()


class WithdrawalLoop:
    """Takes back what should no longer be out there, as long as it may be valid."""

    def __init__(
        self,
        *,
        pusher: Pusher,
        targets: Targets,
        consent: Consent,
        clock: Clock,
        on_delivery: Callable[[Delivery], None],
    ) -> None:
        self._pusher = pusher
        self._targets = targets
        self._consent = consent
        self._clock = clock
        self._on_delivery = on_delivery
        self._wake = asyncio.Event()
        self._known: dict[str, frozenset[NetworkService]] = {}
        """What was pending when it was last looked at, at that proxy or everywhere."""
        self._count = 0
        """How many services those are, at all proxies."""
        self._looked_s = -math.inf
        self.schedule = Schedule()

    def pending(self) -> dict[str, frozenset[NetworkService]]:
        """By proxy id: services whose keys may be valid there though they should not be."""
        found = self._targets.to_withdraw(
            int(self._clock.wall_s() * 1000),
            self._clock.boot_s(),
            everything=self._consent.is_withdrawn,
        )
        return {name: frozenset(link.owner for link in links) for name, links in found.items()}

    def is_done(self) -> bool:
        """Nothing is pending. Cheap while something is."""
        return not any(map(self._pending_at, list(self._known))) and not self.pending()

    def count(self) -> int:
        """How many services at how many proxies; as of the last look there, which is cheap."""
        return self._count

    def at_once(self) -> None:
        """Something is to be withdrawn: do not wait for any back-off."""
        now_s = self._clock.boot_s()
        self._look(now_s)
        self.schedule.at_once(now_s)
        self._wake.set()

    async def run(self) -> NoReturn:
        async with asyncio.TaskGroup() as group:
            while True:
                now_s = self._clock.boot_s()
                if now_s >= self._looked_s + LOOK_AGAIN_S:
                    self._look(now_s)
                for name in self.schedule.take_due(now_s):
                    group.create_task(self._withdraw(name, self._known[name]), name=f"withdraw:{name}")
                await wait_until(self._clock, self._wake, self.schedule.next_due_s())
        raise AssertionError("unreachable: the loop above does not end")

    def _look(self, now_s: float) -> None:
        self._looked_s = now_s
        self._known = self.pending()
        self._count = sum(map(len, self._known.values()))
        self.schedule.keep(self._known, now_s)

    def _pending_at(self, name: str) -> frozenset[NetworkService]:
        links = self._targets.to_withdraw_at(
            name,
            int(self._clock.wall_s() * 1000),
            self._clock.boot_s(),
            everything=self._consent.is_withdrawn,
        )
        return frozenset(link.owner for link in links)

    async def _withdraw(self, name: str, owners: frozenset[NetworkService]) -> None:
        def next_s(failures: int) -> float:
            delay_s = next_delay(interval_s=MAX_WITHDRAWAL_DELAY_S, failures=failures, jitter=0)
            return self._clock.boot_s() + delay_s

        def delivered(delivery: Delivery) -> None:
            self.schedule.done(name, next_s, succeeded=delivery.is_complete)
            left = self._pending_at(name)
            self._count += len(left) - len(self._known.get(name, ()))
            if left:
                self._known[name] = left
                self.schedule.keep(self._known, self._clock.boot_s())
            else:
                self._known.pop(name, None)
                self.schedule.forget(name)
            self._wake.set()
            self._on_delivery(delivery)

        await self._pusher.withdraw(self._targets.proxies[name], owners, delivered)
