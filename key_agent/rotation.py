"""A new key takes over from the old one, in two phases, without a moment in which a proxy seals what another
cannot open.

1. First the new key is pushed `pre-active`: it opens, and seals nothing. Once every proxy of the service has
   acknowledged a push that carried it, it becomes `active` and the old one `deactivated`.
2. Whether a proxy has it is told by sequences: a key is written together with the highest sequence that any
   envelope of its service had, and every later envelope carries it (registry/pushes.py, rule 2).
3. A proxy that does not acknowledge is named, and waited for until two refreshes have passed: by then nothing
   it was pushed before is valid any more, so it can neither seal nor open. Where nothing seals meanwhile
   (after `reinstate`, or when the active key was taken back) it is waited for 15 s. This time passes on the
   boot clock, as validity does at the proxy: a wall clock that is set ends no validity and begins none.
4. Where a rotation stands is in the registry, never in memory alone: whoever is killed at any step finds it
   there, and the loop goes on with it.
5. Before a key becomes active it is opened in the HSM once more. One that does not open is not activated; nor
   is one that did not open for a push: who acknowledged that does not have it, and has to be asked again.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum
from typing import Final, NoReturn

import structlog

from envelope.errors import SealgateError
from envelope.keys import KeyId, KeyState, NetworkService
from key_agent import metrics
from key_agent.consent import Consent
from key_agent.journal import Journal
from key_agent.push.targets import Targets
from key_agent.refresh import next_delay, wait_until
from key_agent.registry.model import UNSERVED_MS, Link, Patience, Rotation, RotationCause
from key_agent.registry.states import RotationPhase
from key_agent.registry.store import Registry
from key_agent.sources.source import EnvelopeRequest, Kek, KeySource, NewKey, WrappedKey
from runtime.clock import Clock

log = structlog.get_logger(__name__)

LOOK_S: Final = 60.0
"""Between two looks for keys that are old enough."""
MAX_SCHEDULED: Final = 100
"""Rotations begun at one look: 10,000 keys of one age do not load HSM and proxies in one burst."""
_MAX_DELAY_S: Final = 30.0


class Step(Enum):
    WAIT = "wait"
    ACTIVATE = "activate"
    FINISH = "finish"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    step: Step
    waiting_for: tuple[str, ...]
    """Proxies that have not acknowledged this phase."""


def decide(rotation: Rotation, links: Iterable[Link], *, left_s: float) -> Decision:
    """What comes next for an open *rotation*; *links* are the places its service's keys go to.

    Proxies that are late are waited for while any of *left_s*, the rest of its phase, is left.
    """
    waiting = tuple(
        sorted(link.proxy_id for link in links if link.accepted_sequence <= rotation.after_sequence)
    )
    if waiting and left_s > 0:
        return Decision(step=Step.WAIT, waiting_for=waiting)
    step = Step.ACTIVATE if rotation.phase is RotationPhase.DISTRIBUTING else Step.FINISH
    return Decision(step=step, waiting_for=waiting)


async def unopenable(source: KeySource, kek: Kek, keys: Iterable[WrappedKey]) -> Mapping[KeyId, str]:
    """Those of *keys* that the HSM does not open, or not as what they should be, and why.

    Envelopes are asked for that go to nobody: the source opens every key for them and compares check values.
    KeySourceError if it cannot tell.
    """
    requests = [
        EnvelopeRequest(
            owner=key.owner,
            keys=((key, KeyState.PRE_ACTIVE),),
            recipients=(),
            issued_at_s=0,
            expires_at_s=0,
        )
        for key in keys
    ]
    results = await source.seal_envelopes(kek, requests) if requests else []
    return {key_id: reason for result in results for key_id, reason in result.failed_keys.items()}


class RotationLoop:
    """Carries rotations on, and begins those that are due. One per agent, while it leads."""

    def __init__(
        self,
        *,
        source: KeySource,
        registry: Registry,
        targets: Targets,
        consent: Consent,
        journal: Journal,
        clock: Clock,
        interval_s: int,
        rotate_after_days: int,
        one_at_a_time: asyncio.Lock,
        push_at_once: Callable[[Iterable[str]], None],
        is_alone: Callable[[], bool] = lambda: True,
    ) -> None:
        """*is_alone*: there is no other environment, whose manager would do all this (environments/)."""
        self._source = source
        self._registry = registry
        self._targets = targets
        self._consent = consent
        self._journal = journal
        self._clock = clock
        self._rotate_after_days = rotate_after_days
        self._one_at_a_time = one_at_a_time
        self._push_at_once = push_at_once
        self._is_alone = is_alone
        self.patience = Patience(usual_ms=2 * interval_s * 1000)
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._open: tuple[Rotation, ...] = ()
        self._patient: tuple[Rotation, ...] = ()
        """Those of them that wait for somebody."""
        self._looked_at_s: float | None = None
        self._not_before_s = 0.0
        """On the boot clock, as these:"""
        self._ends_s: dict[tuple[str, int], float] = {}
        """By rotation and the end of its phase in the registry: when that is."""
        self._left_out: set[KeyId] = set()
        self._problems: dict[str, str] = {}
        self._waiting: dict[str, set[str]] = {}
        """By rotation: proxies that had not acknowledged when it was looked at, nor delivered since."""
        self._awaited: dict[str, list[str]] = {}
        """The same by proxy: a thousand deliveries must not cost a thousand looks at everything."""

    @property
    def problems(self) -> Mapping[str, str]:
        """By rotation: why its new key is not activated though every proxy has it."""
        return self._problems

    def resume(self) -> None:
        """Consent is there, or there again: nobody could acknowledge anything before."""
        self._not_before_s = self._clock.boot_s() + UNSERVED_MS / 1000
        self._wake.set()

    def wake(self) -> None:
        """A rotation has begun, or somebody acknowledged something."""
        self._wake.set()

    def delivered(self, proxy_id: str) -> None:
        """Keys were delivered there. Looked at closely once nobody is left that a rotation waits for."""
        for name in self._awaited.pop(proxy_id, ()):
            left = self._waiting[name]
            left.discard(proxy_id)
            if not left:
                self._wake.set()

    def _note_waiting(self, decided: Iterable[tuple[Rotation, "Decision"]]) -> None:
        self._waiting = {rotation.id: set(decision.waiting_for) for rotation, decision in decided}
        self._awaited = {}
        for name, proxies in self._waiting.items():
            for proxy_id in proxies:
                self._awaited.setdefault(proxy_id, []).append(name)

    def left_out(self, keys: AbstractSet[KeyId]) -> None:
        """They did not open for a push that is about to leave without them (rule 5)."""
        self._left_out |= keys

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next step of any rotation; to be fetched before looking at where they are."""
        return self._changed

    def look_soon(self) -> None:
        """What is due may be different now."""
        self._looked_at_s = None
        self._wake.set()

    async def run(self) -> NoReturn:
        failures = 0
        clock = self._clock
        while True:
            delay_s = LOOK_S
            if self._consent.may_push and self._is_alone():
                try:
                    await self._carry_on()
                    await self._begin_due()
                    failures = 0
                    delay_s = self._next_look_s()
                except SealgateError as error:  # registry, HSM or audit log: all of it can be repeated
                    failures += 1
                    log.error("rotation", error=str(error))  # noqa: TRY400 - expected
                    delay_s = next_delay(interval_s=_MAX_DELAY_S, failures=failures, jitter=0)
            metrics.ROTATIONS_OPEN.set(len(self._open))
            metrics.ROTATIONS_STUCK.set(len(self._problems))
            await wait_until(clock, self._wake, clock.boot_s() + delay_s)

    async def begin(self, kek: Kek, wanted: Sequence[NewKey], cause: RotationCause) -> list[str]:
        """Make new keys under *kek* and begin their rotations; the rotations' ids.

        The caller holds `one_at_a_time`. RefusedChangeError, KeySourceError, AuditUnavailableError: nothing
        has begun.
        """
        for new in wanted:
            await self._journal.record(
                "key-rotate", outcome="begun", service=str(new.owner), use=new.use, cause=cause
            )
        keys = await self._source.generate(kek, wanted)
        begun = await self._registry.begin_rotations(keys, cause, self.patience, now_ms=self._now_ms())
        self._targets.load(await self._registry.book())
        self._wake.set()
        self._push_at_once(hosts_of(self._targets, {new.owner for new in wanted}))
        return begun

    def waiting_for(self, rotations: Iterable[Rotation]) -> dict[str, tuple[str, ...]]:
        """By rotation: proxies that have not acknowledged what its phase is about."""
        return {rotation.id: decision.waiting_for for rotation, decision in self._decided(rotations)}

    def _decided(self, rotations: Iterable[Rotation]) -> list[tuple[Rotation, Decision]]:
        mine = [rotation for rotation in rotations if rotation.phase.is_open]
        links = places(self._targets, {rotation.owner for rotation in mine})
        return [
            (rotation, decide(rotation, links[rotation.owner], left_s=self._left_s(rotation)))
            for rotation in mine
        ]

    def _left_s(self, rotation: Rotation) -> float:
        """Of its phase, 0 or less: it is over. Counted from when it was first seen (rule 3)."""
        now_s = self._clock.boot_s()
        phase = (rotation.id, rotation.until_ms)
        if (ends_s := self._ends_s.get(phase)) is None:
            # The registry has it in wall-clock time, of another life perhaps: no phase is longer than usual.
            left_ms = min(rotation.until_ms - self._now_ms(), max(self.patience.usual_ms, UNSERVED_MS))
            ends_s = self._ends_s[phase] = now_s + left_ms / 1000
        return max(ends_s, self._not_before_s) - now_s

    def _next_look_s(self) -> float:
        """Until the first phase runs out, a minute at most."""
        # One that was over when it was looked at has a problem, or is carried on: a minute is soon enough.
        # One that has run out since is looked at again at once.
        left_s = map(self._left_s, self._patient)
        return min([LOOK_S, *(some_s + 0.001 if some_s > 0 else 0.0 for some_s in left_s)])

    def _now_ms(self) -> int:
        return int(self._clock.wall_s() * 1000)

    async def _carry_on(self) -> None:
        self._open = tuple(await self._registry.open_rotations())
        self._problems = {name: why for name, why in self._problems.items() if name in self._ids()}
        phases = {(rotation.id, rotation.until_ms) for rotation in self._open}
        self._left_out &= {rotation.new_key for rotation in self._open}
        self._ends_s = {phase: ends_s for phase, ends_s in self._ends_s.items() if phase in phases}
        decided = self._decided(self._open)
        self._note_waiting(decided)
        self._patient = tuple(rotation for rotation, decision in decided if decision.step is Step.WAIT)
        to_activate = [(r, d.waiting_for) for r, d in decided if d.step is Step.ACTIVATE]
        to_finish = [(r, d.waiting_for) for r, d in decided if d.step is Step.FINISH]
        activated = await self._activate(to_activate)
        for rotation, late in to_finish:
            await self._journal.record("key-rotate", outcome="done", **_fields(rotation), late=_names(late))
            await self._registry.finish_rotation(rotation.id, now_ms=self._now_ms())
        if to_activate or to_finish:
            self._wake.set()  # what follows from that
            self._changed.set()
            self._changed = asyncio.Event()
        if activated:
            self._push_at_once(hosts_of(self._targets, set(activated)))

    def _ids(self) -> set[str]:
        return {rotation.id for rotation in self._open}

    async def _activate(self, wanted: list[tuple[Rotation, tuple[str, ...]]]) -> list[NetworkService]:
        """Owners of the keys that became active."""
        kek = self._consent.kek
        if not wanted or kek is None:
            return []
        new = {rotation.new_key for rotation, _ in wanted}
        held = await self._registry.wrapped_keys(kek.reference.kek_id)
        keys = {key.key_id: key for key in held if key.key_id in new}
        failed = dict.fromkeys(new - keys.keys(), "its wrap is missing or damaged")
        failed |= await unopenable(self._source, kek, keys.values())
        failed = dict.fromkeys(self._left_out & new, "did not open for a push") | failed
        activated = []
        for rotation, late in wanted:
            if (why := failed.get(rotation.new_key)) is not None:
                self._problems[rotation.id] = why
                log.error("a new key is not activated", **_fields(rotation), reason=why)
                # It may have been left out of what was acknowledged, and of a push that begins meanwhile.
                told = self._left_out & {rotation.new_key}
                self._left_out -= told
                try:
                    await self._registry.distribute_again(rotation.id, self.patience, now_ms=self._now_ms())
                except BaseException:
                    self._left_out |= told
                    raise
                continue
            self._problems.pop(rotation.id, None)
            if late:
                log.warning("activated without proxies that are late", **_fields(rotation), late=_names(late))
            await self._journal.record(
                "key-rotate", outcome="activated", **_fields(rotation), late=_names(late)
            )
            await self._registry.activate_rotation(rotation.id, late, self.patience, now_ms=self._now_ms())
            activated.append(rotation.owner)
        return activated

    async def _begin_due(self) -> None:
        now_s = self._clock.boot_s()
        if self._looked_at_s is not None and now_s - self._looked_at_s < LOOK_S:
            return
        self._looked_at_s = now_s
        due = await self._registry.due_rings(
            self._rotate_after_days, now_ms=self._now_ms(), limit=MAX_SCHEDULED
        )
        if not due:
            return
        async with self._one_at_a_time:
            kek = self._consent.kek
            if kek is None or not self._consent.may_push:
                return
            wanted = [NewKey(owner=ring.owner, use=ring.use, algorithm=ring.algorithm) for ring in due]
            await self.begin(kek, wanted, RotationCause.SCHEDULE)


def places(targets: Targets, owners: AbstractSet[NetworkService]) -> Mapping[NetworkService, list[Link]]:
    """Where the keys of each of *owners* go."""
    found: dict[NetworkService, list[Link]] = {owner: [] for owner in owners}
    fed = targets.fed() if owners else {}
    for link in targets.links if owners else ():
        if link.owner in found and not link.withdrawn and link.proxy_id in fed:
            found[link.owner].append(link)
    return found


def hosts_of(targets: Targets, owners: AbstractSet[NetworkService]) -> list[str]:
    """The proxies that keys of *owners* go to."""
    return sorted({link.proxy_id for links in places(targets, owners).values() for link in links})


def _fields(rotation: Rotation) -> dict[str, str]:
    return {
        "service": str(rotation.owner),
        "kid": str(rotation.new_key),
        "use": str(rotation.use),
    }


def _names(proxies: Iterable[str]) -> str | None:
    return ",".join(proxies) or None
