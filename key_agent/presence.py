"""Who is there: each proxy is asked every few seconds, so that one that restarted soon has its keys again.

1. A proxy keeps keys in memory alone. Its answer names the start it is (`instance`). Another one than took
   our last push has no keys and is due for a push at once; so is one that is back after a push to it failed.
2. It is a hint and no more: an answer brings forward a push that would come anyway, the lack of one changes
   what `status` shows and nothing else. Without consent nobody is asked, and nothing is pushed.
3. One start brings one push forward; if that fails, the push's own back-off goes on. A proxy that shows ever
   new starts, or comes and goes, waits twice as long each time (`Patience`): none can keep the HSM busy.
4. Nobody waits for it: a question has a deadline and a connection of its own, and proxies that do not answer
   queue apart from those that do.
5. Its answer has the time that it is there. A clock that differs by more than CLOCKS_DIFFER_S is soon one by
   which pushes are refused: it is said before the keys have run out.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final, NoReturn

import structlog

from key_agent import metrics
from key_agent.consent import Consent
from key_agent.push.pusher import Pusher
from key_agent.push.targets import Targets
from key_agent.push.transport import Presence, PushError, Transport
from key_agent.refresh import Schedule, wait_until
from key_agent.registry.model import Proxy
from runtime.clock import Clock

log = structlog.get_logger(__name__)

CONCURRENT: Final = 64
"""Questions under way at once: to proxies that answered last time, and as many to those that did not."""
MAX_QUESTIONS_PER_S: Final = 50
"""More proxies than that in `presence_s` are asked less often: a hint is not worth a core."""
MAX_TIMEOUT_S: Final = 5.0
CLOCKS_DIFFER_S: Final = 15.0
"""Half of what proxies let pass (docs/format.md)."""
GATHER_S: Final = 0.25
"""Proxies seen within this time are pushed to together: they then need one unwrapping in the HSM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """What the last question to a proxy brought; `since_ms` (Unix) is when that began to be so."""

    answers: bool
    since_ms: int
    error: str | None = None


class Patience:
    """How soon a hint may bring forward one more push. Pure: time is an argument (boot clock, seconds)."""

    def __init__(self, *, first_gap_s: float, max_gap_s: float) -> None:
        self._first_gap_s = min(first_gap_s, max_gap_s)
        self._max_gap_s = max_gap_s
        self._last: dict[str, tuple[float, float]] = {}

    def allows(self, name: str, now_s: float) -> bool:
        """Whether now, in which case it counts. Forgiven once nothing happened for twice the last gap."""
        gap_s = self._first_gap_s
        if (last := self._last.get(name)) is not None:
            at_s, last_gap_s = last
            if now_s - at_s < last_gap_s:
                return False
            if now_s - at_s < 2 * last_gap_s:
                gap_s = min(self._max_gap_s, 2 * last_gap_s)
        self._last[name] = (now_s, gap_s)
        return True

    def keep(self, names: Iterable[str]) -> None:
        """Forget all others."""
        for gone in self._last.keys() - set(names):
            del self._last[gone]


class PresenceLoop:
    def __init__(
        self,
        *,
        transport: Transport,
        pusher: Pusher,
        targets: Targets,
        consent: Consent,
        clock: Clock,
        presence_s: float,
        timeout_s: float,
        interval_s: float,
        jitter: Callable[[], float],
        failures: Callable[[str], int],
        push_at_once: Callable[[Iterable[str]], None],
    ) -> None:
        """*failures*: pushes to a proxy that failed in a row. *push_at_once* must not wait and not raise."""
        self._transport = transport
        self._pusher = pusher
        self._targets = targets
        self._consent = consent
        self._clock = clock
        self._presence_s = presence_s
        self._timeout_s = min(timeout_s, MAX_TIMEOUT_S)
        self._jitter = jitter
        self._failures = failures
        self._push_at_once = push_at_once
        self._wake = asyncio.Event()
        self._schedule = Schedule()
        self._patience = Patience(first_gap_s=presence_s, max_gap_s=interval_s)
        self._places = {answers: asyncio.Semaphore(CONCURRENT) for answers in (True, False)}
        self._returned: set[str] = set()
        self._noticed: dict[str, bytes] = {}
        """The instance of each proxy that a push was last brought forward for."""
        self._differing: set[str] = set()
        """Proxies whose clock was said to differ."""
        self._sightings: dict[str, Sighting] = {}

    def sighting(self, proxy_id: str) -> Sighting | None:
        """None: it was not asked yet, or nobody is asked now."""
        return self._sightings.get(proxy_id)

    def wake(self) -> None:
        """Consent has changed."""
        self._wake.set()

    async def run(self) -> NoReturn:
        async with asyncio.TaskGroup() as group:
            while True:
                next_s: float | None = None
                if self._consent.may_push:
                    self._ask_due(group)
                    if (due_s := self._schedule.next_due_s()) is not None:
                        next_s = due_s - GATHER_S
                else:
                    self._sightings.clear()
                    self._returned.clear()
                await wait_until(self._clock, self._wake, next_s)
                await self._clock.sleep(GATHER_S)  # at most four rounds a second, however many answer
        raise AssertionError("unreachable: the loop above does not end")

    def _ask_due(self, group: asyncio.TaskGroup) -> None:
        fed = self._targets.fed()
        if self._returned:
            self._push_at_once(self._returned & fed.keys())
            self._returned.clear()
        self._patience.keep(fed)
        for gone in self._sightings.keys() - fed.keys():
            del self._sightings[gone]
            self._noticed.pop(gone, None)
            self._differing.discard(gone)
        now_s = self._clock.boot_s()
        self._schedule.keep(fed, now_s)
        for name in self._schedule.take_due(now_s):
            group.create_task(self._ask(fed[name]), name=f"presence:{name}")

    async def _ask(self, proxy: Proxy) -> None:
        began_s = self._clock.boot_s()
        before = self._sightings.get(proxy.id)
        try:
            async with self._places[before is None or before.answers]:
                found = await self._answer(proxy)
            if self._consent.may_push and proxy.id in self._targets.proxies:
                self._take(proxy, before, found)
        finally:
            # Up to a fifth early, so that the questions of many proxies do not come in one burst for ever.
            pace_s = max(self._presence_s, len(self._targets.fed()) / MAX_QUESTIONS_PER_S)
            next_s = began_s + pace_s * (1 - self._jitter() / 5)
            self._schedule.done(proxy.id, lambda _: next_s, succeeded=True)
            self._wake.set()

    async def _answer(self, proxy: Proxy) -> Presence | PushError:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._transport.presence(proxy)
        except TimeoutError:
            return PushError("timeout", f"{proxy.url}: no answer within {self._timeout_s:g} s")
        except PushError as error:
            return error
        except Exception as error:  # noqa: BLE001 - whatever one proxy does stops no loop; told by its name
            return PushError("internal", type(error).__name__)

    def _take(self, proxy: Proxy, before: Sighting | None, found: Presence | PushError) -> None:
        now_ms = int(self._clock.wall_s() * 1000)
        metrics.PROXY_ANSWERS.labels(proxy.id).set(isinstance(found, Presence))
        if isinstance(found, PushError):
            self._pusher.miss(proxy.id)
            if before is not None and not before.answers:
                self._sightings[proxy.id] = replace(before, error=str(found))
                return
            self._sightings[proxy.id] = Sighting(answers=False, since_ms=now_ms, error=str(found))
            log.warning("a proxy does not answer", proxy=proxy.id, error=str(found))
            return
        self._compare_clocks(proxy.id, (found.time_ms - now_ms) / 1000)
        is_back = before is not None and not before.answers
        if before is None or is_back:
            self._sightings[proxy.id] = Sighting(answers=True, since_ms=now_ms)
        if is_back:
            log.info("a proxy answers again", proxy=proxy.id)
        is_another = (
            self._pusher.meet(proxy.id, found.instance) and self._noticed.get(proxy.id) != found.instance
        )
        is_due = is_another or (is_back and self._failures(proxy.id) > 0)
        if is_due and self._patience.allows(proxy.id, self._clock.boot_s()):
            log.info("keys are due at once", proxy=proxy.id, restarted=is_another)
            self._noticed[proxy.id] = found.instance
            metrics.RETURNS.labels(proxy.id).inc()
            self._returned.add(proxy.id)

    def _compare_clocks(self, proxy_id: str, ahead_s: float) -> None:
        """Rule 5. The answer's way here is in *ahead_s*, at most MAX_TIMEOUT_S."""
        metrics.PROXY_CLOCK.labels(proxy_id).set(ahead_s)
        differs = abs(ahead_s) > CLOCKS_DIFFER_S
        if differs == (proxy_id in self._differing):
            return
        if differs:
            self._differing.add(proxy_id)
            log.error("a proxy's clock differs: it will refuse keys", proxy=proxy_id, ahead_s=round(ahead_s))
        else:
            self._differing.discard(proxy_id)
            log.info("a proxy's clock is as ours again", proxy=proxy_id)
