"""Every environment has every key: what one lacks is brought there, and what it has is proven there.

1. What an environment has is asked again every LOOK_S: a wrap that is lost or damaged there is brought anew.
2. An environment that joins, or returns from draining, is active in one epoch once its HSM has opened every
   live key. After an incident that is healing.py's to decide.
3. What was proven under one KEK of an environment says nothing about its next one.
4. A key comes from here; what is not here, or does not open here, from whoever has it.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NoReturn

import structlog

from envelope.errors import SealgateError
from envelope.keys import KeyState
from key_agent.environments.changes import key_changes as changes
from key_agent.environments.changes.key_changes import LIVE
from key_agent.environments.keys.deliveries import HELD
from key_agent.environments.keys.key_writing import KeyWriting
from key_agent.environments.keys.own_wraps import OwnWraps
from key_agent.environments.keys.wrap_messages import NOTHING_STORED, Look, Stored
from key_agent.environments.keys.wrapping import Wraps
from key_agent.environments.peers.peer_transport import PeerError
from key_agent.environments.peers.peering import Peering
from key_agent.environments.shared.draft import Draft
from key_agent.environments.states import HAVE_KEYS, EnvironmentState
from key_agent.journal import Journal
from key_agent.refresh import next_delay, wait_until
from runtime.clock import Clock

log = structlog.get_logger(__name__)

LOOK_S: Final = 30.0
"""Between two looks at what an environment has."""
SOON_S: Final = 0.25
"""The same, while something is under way."""
MAX_DELAY_S: Final = 10.0
"""After failures."""
_CATCH_UP_S: Final = 5.0


@dataclass(slots=True)
class Standing:
    """What is known of one environment's keys."""

    kek_id: str | None = None
    proven: set[str] = field(default_factory=set)
    """Keys whose wraps under that KEK it has verified."""
    waiting: dict[str, str] | None = None
    """What pre-active keys wait for there; None: it has not answered."""
    failed: dict[str, str] = field(default_factory=dict)
    """Keys that could not be brought, and why."""
    looked_boot_s: float | None = None
    error: str | None = None
    """Why it was not served the last time."""


class Bringing:
    def __init__(
        self,
        *,
        wraps: Wraps,
        own_wraps: OwnWraps,
        peering: Peering,
        journal: Journal,
        clock: Clock,
        writing: KeyWriting,
        progressed: Callable[[], None],
    ) -> None:
        """*progressed*: called when an environment has more than before, or waits for something else."""
        self._wraps = wraps
        self._own_wraps = own_wraps
        self._peering = peering
        self._journal = journal
        self._clock = clock
        self._writing = writing
        self._progressed = progressed
        self._wakes: dict[str, asyncio.Event] = {}
        self.standings: dict[str, Standing] = {}
        """By environment, the own one included; for people too."""

    def recipients(self) -> set[str]:
        """Environments that are to have keys."""
        return {
            name
            for name, body in self._peering.view.environments.items()
            if body.state in HAVE_KEYS
            # After an incident nothing is stored there before healing.py says so.
            and (body.state is not EnvironmentState.REJOINING or changes.may_enter(body))
        }

    def begin(self, name: str) -> None:
        """*name* is a recipient from now on: nothing is known of it. Then its `keep_serving` runs."""
        self._wakes[name] = asyncio.Event()
        self.standings[name] = Standing()

    def end(self, name: str) -> None:
        """It is none any more."""
        self._wakes.pop(name, None)
        self.standings.pop(name, None)

    def wake(self) -> None:
        """Every environment is looked at now."""
        for wake in self._wakes.values():
            wake.set()

    async def keep_serving(self, name: str) -> NoReturn:
        """Until cancelled; a bug ends it. Between `begin` and `end`."""
        failures = 0
        while True:
            wake = self._wakes[name]
            delay_s = LOOK_S
            try:
                if await self.serve(name):
                    delay_s = SOON_S
                failures = 0
            except SealgateError as error:
                failures += 1
                standing = self.standings[name]
                if standing.error is None:
                    log.warning("an environment does not get its keys", environment=name, cause=str(error))
                standing.error, standing.waiting = str(error), None
                delay_s = next_delay(interval_s=MAX_DELAY_S, failures=failures, jitter=0)
            await wait_until(self._clock, wake, self._clock.boot_s() + delay_s)

    async def serve(self, name: str) -> bool:
        """Bring what *name* lacks, ask what it waits for; whether to look again soon. SealgateError."""
        view = self._peering.view
        body = view.environments.get(name)
        if body is None or body.kek_id is None:
            return False
        standing = self._standing(name, body.kek_id)
        keys = [key_id for key_id, dek in view.deks.items() if dek.state in LIVE]
        now_s = self._clock.boot_s()
        if standing.looked_boot_s is None or now_s - standing.looked_boot_s >= LOOK_S:
            missing = await self._wraps.ask_missing(name, Look(kek_id=body.kek_id, keys=tuple(keys)))
            # What was made and proven while it was asked is none of its answer.
            standing.proven = (standing.proven - set(keys)) | (set(keys) - missing.keys())
            standing.looked_boot_s = now_s
        wanted = [key_id for key_id in keys if key_id not in standing.proven]
        before = (len(standing.proven), standing.waiting)
        if wanted:
            if name != self._peering.environment:
                await self._peering.spread([name], timeout_s=_CATCH_UP_S)
            stored = await self._bring(name, wanted)
            standing.proven |= set(stored.verified)
            standing.failed = {key_id: why for key_id, why in stored.failed.items() if why != HELD}
            if HELD in stored.failed.values():  # an answer was lost: what it has is asked, not assumed
                standing.looked_boot_s = None
        else:
            standing.failed = {}
        coming = [key_id for key_id in keys if view.deks[key_id].state is KeyState.PRE_ACTIVE]
        standing.waiting = await self._wraps.ask_waiting(name, coming) if coming else {}
        standing.error = None
        if before != (len(standing.proven), standing.waiting):
            self._progressed()
        if changes.may_enter(body) and not changes.first_keys(view):  # its own keys come first
            await self._enter(name, keys)
        return bool(coming or wanted or changes.may_enter(body))

    async def _enter(self, name: str, keys: Collection[str]) -> None:
        """Rule 2."""
        if not set(keys) <= self.standings[name].proven:
            return
        if problems := await self.prove(name):
            log.warning("an environment does not open every key", environment=name, keys=len(problems))
            return
        await self._journal.record("env-enter", environment=name, keys=len(keys))

        def change(draft: Draft) -> None:
            live = {key_id for key_id, dek in draft.shared.deks.items() if dek.state in LIVE}
            if live <= set(keys):  # nothing came that was not proven
                changes.enter(draft, name)

        await self._writing.write(change)

    def _standing(self, name: str, kek_id: str) -> Standing:
        """Of today's KEK there: what was under another one says nothing about this one."""
        standing = self.standings.setdefault(name, Standing())
        if standing.kek_id != kek_id:
            standing = self.standings[name] = Standing(kek_id=kek_id)
        return standing

    async def _bring(self, name: str, key_ids: Sequence[str]) -> Stored:
        """From here, and what is not here from whoever has it."""
        own = self._peering.environment
        done = NOTHING_STORED
        if name == own:
            done = await self._own_wraps.take(key_ids)
        else:
            done = await self._wraps.bring(name, key_ids)
        for other in changes.serving_environments(self._peering.view):
            if not done.failed or other in (own, name):
                continue
            theirs = self.standings.get(other)
            wanted = [
                key_id
                for key_id, why in done.failed.items()
                if why != HELD and (theirs is None or key_id in theirs.proven)
            ]
            if wanted:
                try:
                    done |= await self._wraps.ask_to_bring(other, name, wanted)
                except PeerError as error:
                    log.warning("an environment sends no keys", environment=other, cause=str(error))
        return done

    async def prove(self, environment: str) -> Mapping[str, str]:
        """Every key that is not destroyed is brought there, and opened there; what failed of those that have
        to be, and why. RefusedChangeError, PeerError, RegistryError.
        """
        await self._peering.spread([environment], timeout_s=_CATCH_UP_S)
        view = self._peering.view
        to = self._wraps.destination(environment)
        keys = [key_id for key_id, dek in view.deks.items() if dek.state is not KeyState.DESTROYED]
        missing = await self._wraps.ask_missing(
            environment, Look(kek_id=to.kek_id, keys=tuple(keys), prove=True)
        )
        stored = await self._bring(environment, sorted(missing)) if missing else NOTHING_STORED
        left = {key_id: why for key_id, why in missing.items() if key_id not in stored.verified}
        left |= stored.failed
        standing = self._standing(environment, to.kek_id)
        standing.proven = set(keys) - left.keys()
        standing.failed = dict(left)
        # One that was compromised is wanted for a rescue alone: it holds up nobody.
        return {key_id: why for key_id, why in left.items() if view.deks[key_id].state in LIVE}
