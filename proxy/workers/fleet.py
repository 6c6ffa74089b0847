"""The worker processes of one proxy: started, filled with keys, replaced when they die, stopped together.

1. The proxy itself serves no clients then. It takes the agents' pushes, watches the directory, answers health
   and metrics; workers serve, each with its own keys, addon, audit log and share of quotas.
2. An envelope is in force everywhere before its receipt is written (`take`). A worker that does not answer
   within *patience_s* (and PER_ENVELOPE_S for each envelope) is killed, and has ended, before that: what was
   withdrawn no process of ours knows.
3. A worker that ended is started again, at once the first time, then after 1, 2, 4 ... LONGEST_PAUSE_S
   seconds. It opens its listeners when it holds what the others hold. If it cannot be given all of that (the
   envelopes have run out), `on_blind` is called, so that agents push again.
4. Of the others nobody is disturbed: connections belong to the worker that accepted them, new ones go to
   those that listen.
5. A worker that is down is a reason against readiness after TOLERATED_S, or when there is no other.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Final, NoReturn, Self

import msgspec
import structlog
from prometheus_client import CollectorRegistry

from proxy.config import Settings
from proxy.environments import Word
from proxy.keys.relay import Relayed
from proxy.tenants.model import Directory
from proxy.workers import samples, wire
from proxy.workers.latest import LatestEnvelopes
from proxy.workers.link import WorkerLink, WorkerLostError, WorkerStuckError
from runtime.cli import CommandError, ExitCode
from runtime.clock import Clock

PER_ENVELOPE_S: Final = 0.01
START_S: Final = 60.0
RELOAD_S: Final = 30.0
PING_INTERVAL_S: Final = 2.0
PING_S: Final = 10.0
SCRAPE_S: Final = 2.0
STOP_S: Final = 5.0
"""Beyond the grace."""
LONGEST_PAUSE_S: Final = 30.0
TOLERATED_S: Final = 10.0
FILLED_AT_ONCE: Final = 64
STUCK: Final = "worker-stuck"
"""The code of what cannot be promised because a process that was killed does not end."""

_log: Final = structlog.get_logger("workers")


def pause_s(failures: int) -> float:
    """Seconds between the last of *failures* in a row and the next start."""
    return 0.0 if failures < 2 else min(LONGEST_PAUSE_S, 2.0 ** min(failures - 2, 30))


class _Slot:
    """The place of one worker, whoever is in it."""

    def __init__(self, number: int, now_s: float) -> None:
        self.number = number
        self.link: WorkerLink | None = None
        """Takes envelopes; serves clients once `serves`."""
        self.serves = False
        self.failures = 0
        self.up_since_s = now_s
        self.down_since_s = now_s
        self.cause = "it was not started"
        self.ports: tuple[int, ...] = ()


class Fleet:
    """As `DataPlane`, in processes of their own; also the `Relay` of the proxy's receiver."""

    def __init__(
        self, settings: Settings, *, clock: Clock, registry: CollectorRegistry, on_blind: Callable[[], None]
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._registry = registry
        self._on_blind = on_blind
        self._slots = [_Slot(number, clock.boot_s()) for number in range(settings.proxy.workers)]
        self._latest = LatestEnvelopes()
        self._words: dict[str, Word] = {}
        self._taking: set[asyncio.Future[None]] = set()
        self._revision = 0
        self._stopping = False
        self.restarts = 0

    # ---- what the proxy asks of a data plane

    @property
    def problems(self) -> list[str]:
        now_s = self._clock.boot_s()
        nobody = not any(slot.serves for slot in self._slots)
        found = [
            f"worker {slot.number} is not serving: {slot.cause}"
            for slot in self._slots
            if not slot.serves and (nobody or now_s - slot.down_since_s > TOLERATED_S)
        ]
        for slot in self._slots:
            if slot.link is not None:
                found += [f"worker {slot.number}: {problem}" for problem in slot.link.problems]
        return found

    @property
    def service_ports(self) -> list[int]:
        return list(self._slots[0].ports)

    @property
    def pids(self) -> list[int]:
        """Of the workers that live, by number."""
        return [slot.link.pid for slot in self._slots if slot.link is not None]

    def listening(self) -> list[str]:
        return [f"worker {slot.number}" for slot in self._slots if slot.serves]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop(grace_s=0)

    async def start(self, directory: Directory) -> None:
        """Start all workers. CommandError: what one of them cannot do, with its next step."""
        self._revision = directory.revision
        try:
            async with asyncio.TaskGroup() as group:
                for slot in self._slots:
                    group.create_task(self._launch(slot), name=f"worker:{slot.number}:start")
        except* WorkerLostError as lost:
            first = lost.exceptions[0]
            next_step = first.next_step if isinstance(first, WorkerLostError) else ""
            raise CommandError(
                f"a worker process did not start: {first}",
                next_step or "see the log above; `sealgate doctor` checks the installation",
                ExitCode.UNAVAILABLE,
            ) from None

    def tasks(self, group: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        tasks: list[asyncio.Task[None]] = [
            group.create_task(self._tend(slot), name=f"worker:{slot.number}:tend") for slot in self._slots
        ]
        return [*tasks, group.create_task(self._ping(), name="workers:ping")]

    async def apply(self, directory: Directory) -> None:
        """Return when every worker that lives serves *directory*."""
        self._revision = directory.revision
        known = {str(owner) for owner in directory.recipients}
        self._latest.forget(self._latest.services() - known)
        for gone in self._words.keys() - directory.tenants.keys():
            del self._words[gone]
        with contextlib.suppress(WorkerStuckError):  # it was told to die, and serves nobody if it wakes up
            await self._ask_all(wire.Reload(directory.revision), timeout_s=RELOAD_S)

    async def stop(self, *, grace_s: float) -> None:
        self._stopping = True
        with contextlib.suppress(WorkerStuckError):
            await self._ask_all(wire.Stop(grace_s), timeout_s=grace_s + STOP_S)
        links = [slot.link for slot in self._slots if slot.link is not None]
        for slot in self._slots:
            slot.link, slot.serves, slot.cause = None, False, "it was stopped"
        await asyncio.gather(*(link.close(patience_s=STOP_S) for link in links))

    async def scrape(self) -> bytes:
        """The metrics of the whole proxy, as Prometheus text."""
        answers: list[wire.Answer] = []
        with contextlib.suppress(WorkerStuckError):
            answers = await self._ask_all(wire.Scrape(), timeout_s=SCRAPE_S)
        texts = [answer.text for answer in answers if isinstance(answer, wire.Scraped)]
        return await asyncio.to_thread(samples.summed, self._registry, texts)

    # ---- Relay

    async def take(self, envelopes: Relayed) -> tuple[str, ...]:
        """Rule 2."""
        taken = asyncio.get_running_loop().create_future()
        self._taking.add(taken)
        try:
            timeout_s = self._settings.proxy.worker_patience_s + PER_ENVELOPE_S * len(envelopes.tokens)
            codes = [""] * len(envelopes.tokens)
            try:
                answers = await self._ask_all(wire.Take(envelopes), timeout_s=timeout_s)
            except WorkerStuckError as stuck:
                _log.error("a worker cannot be killed", cause=str(stuck))
                return (STUCK,) * len(codes)
            for answer in answers:
                if isinstance(answer, wire.Taken):
                    codes = [ours or theirs for ours, theirs in zip(codes, answer.codes, strict=True)]
            self._latest.keep(envelopes, codes)
        finally:
            self._taking.discard(taken)
            taken.set_result(None)
        return tuple(codes)

    async def tell(self, tenant: str, word: Word) -> None:
        """When it returns, every worker that lives acts on *word*. WorkerStuckError."""
        self._words[tenant] = word
        await self._ask_all(wire.Tell(tenant, word), timeout_s=self._settings.proxy.worker_patience_s)

    async def _ask_all(self, request: wire.Request, *, timeout_s: float) -> list[wire.Answer]:
        """The answers of those that live; who gives none has ended when this returns. WorkerStuckError."""

        async def asked(link: WorkerLink) -> wire.Answer | None:
            try:
                return await link.ask(request, timeout_s=timeout_s)
            except WorkerLostError as lost:
                link.kill(str(lost))
                await link.ended()
                return None

        links = [slot.link for slot in self._slots if slot.link is not None]
        answers = await asyncio.gather(*(asked(link) for link in links))
        return [answer for answer in answers if answer is not None]

    # ---- one worker's life

    async def _launch(self, slot: _Slot) -> None:
        """Start a worker, fill it, have it serve. WorkerLostError."""
        try:
            link = await WorkerLink.start(slot.number)
        except OSError as error:
            raise WorkerLostError(f"no process: {error}") from error
        try:
            settings = msgspec.json.encode(self._settings, enc_hook=str)
            start = wire.Start(slot.number, settings, self._settings.proxy.id)
            await link.ask(start, timeout_s=START_S)
            slot.link = link  # from now on it takes what the others take ...
            await asyncio.gather(*self._taking)  # ... and what began before is kept when this returns
            await self._fill(link)
            if link.lives:
                await link.ask(wire.Reload(self._revision), timeout_s=RELOAD_S)
            for tenant in list(self._words):
                # As it is now: another may have come by `tell` while the one before was under way.
                if (word := self._words.get(tenant)) is not None:
                    await link.ask(wire.Tell(tenant, word), timeout_s=START_S)
            opened = await link.ask(wire.Open(), timeout_s=START_S)
        except BaseException:
            slot.link = None
            await link.close()
            raise
        slot.ports = opened.ports if isinstance(opened, wire.Done) else ()
        slot.serves = True
        _log.info("worker serves", worker=slot.number, pid=link.pid)

    async def _fill(self, link: WorkerLink) -> None:
        """Rule 3."""
        complete = self._latest.is_complete
        by_service: dict[str, list[Relayed]] = {}
        for relayed in self._latest:
            by_service.setdefault(relayed.services[0], []).append(relayed)

        async def fill(services: Sequence[list[Relayed]]) -> bool:
            accepted = True
            for envelopes in services:
                for (
                    envelope
                ) in envelopes:  # one after the other: an addition is nothing without what it adds to
                    answer = await link.ask(wire.Take(envelope), timeout_s=START_S)
                    accepted &= isinstance(answer, wire.Taken) and not any(answer.codes)
            return accepted

        services = list(by_service.values())
        parts = [services[first::FILLED_AT_ONCE] for first in range(FILLED_AT_ONCE)]
        if not all(await asyncio.gather(*(fill(part) for part in parts))) or not complete:
            _log.warning("a worker could not be given all keys; agents are asked to push", worker=link.number)
            self._on_blind()

    async def _tend(self, slot: _Slot) -> NoReturn:
        """Replace the worker whenever it has ended."""
        while True:
            link = slot.link
            if link is not None:
                slot.cause = await link.gone()
                if self._stopping:
                    await asyncio.Event().wait()  # until cancelled
                await link.close()
                slot.link, slot.serves, slot.down_since_s = None, False, self._clock.boot_s()
                served_s = self._clock.boot_s() - slot.up_since_s
                slot.failures = 1 if served_s > LONGEST_PAUSE_S else slot.failures + 1
                self.restarts += 1
                _log.error("worker ended", worker=slot.number, cause=slot.cause)
            await self._clock.sleep(pause_s(slot.failures))
            try:
                await self._launch(slot)
            except WorkerLostError as lost:
                slot.cause = str(lost)
                slot.failures += 1
                _log.error("worker not started", worker=slot.number, cause=slot.cause)
                continue
            slot.up_since_s = self._clock.boot_s()

    async def _ping(self) -> NoReturn:
        while True:
            await self._clock.sleep(PING_INTERVAL_S)
            with contextlib.suppress(WorkerStuckError):
                await self._ask_all(wire.Ping(), timeout_s=PING_S)
