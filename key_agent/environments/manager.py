"""The manager's part of keys: have them made, brought to every environment, proven there, and only then used.

1. What is to be done follows from the signed rows and from what each environment says it has. A manager that
   was killed at any point, or another one that takes over, looks at both and goes on.
2. A key's row and its first wrap are written in one transaction. So there is no row of a key that nobody has;
   should that one wrap be lost before the key went anywhere else, the key is given up and made again.
3. Every environment is served by a task of its own: one that hangs or is far away holds up nobody. Keys wait
   for it only as long as it counts (key_changes.py, rule 2).
4. What an environment has is asked again every LOOK_S: a wrap that is lost or damaged there is brought anew.
5. An environment that joins, or returns from draining, is active in one epoch once its HSM has opened every
   live key. After an incident that is healing.py's to decide.
"""

import asyncio
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import batched
from typing import Final, NoReturn

import msgspec
import structlog

from envelope.errors import SealgateError
from envelope.keys import KeyState, KeyUse, NetworkService
from key_agent.environments import key_changes as changes
from key_agent.environments.deliveries import HELD
from key_agent.environments.documents import EncryptPolicy
from key_agent.environments.draft import Draft
from key_agent.environments.key_changes import LIVE, WantedKey
from key_agent.environments.own_wraps import OwnWraps
from key_agent.environments.peer_api import PeerCall, PeerRoute
from key_agent.environments.peer_transport import PeerError
from key_agent.environments.peering import Peering
from key_agent.environments.shared import AlsoWrite
from key_agent.environments.shared_view import Shared, newest_term
from key_agent.environments.states import EnvironmentState
from key_agent.environments.wrapping import (
    BATCH,
    HAVE_KEYS,
    NOTHING_STORED,
    Look,
    Message,
    Name,
    Stored,
    Wraps,
    read_message,
)
from key_agent.journal import Journal
from key_agent.refresh import next_delay, wait_until
from key_agent.registry.access import RefusedChangeError
from key_agent.registry.wrap_rows import store_wraps
from key_agent.sources.source import NewKey, WrappedKey
from runtime.clock import Clock

log = structlog.get_logger(__name__)

SERVICE_PATH: Final = "/v1/env/services"
LOOK_S: Final = 30.0
"""Between two looks at what an environment has."""
DUE_S: Final = 60.0
"""Between two looks for keys that are old enough."""
MAX_SCHEDULED: Final = 100
_SOON_S: Final = 0.25
_MAX_DELAY_S: Final = 10.0
_CATCH_UP_S: Final = 5.0
_PHASES: Final = {KeyState.PRE_ACTIVE: "distributing", KeyState.DESTROYED: "cancelled"}


class ServiceWish(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An environment that serves needs keys of this service and use."""

    service: Name
    use: KeyUse
    algorithm: Name | None = None


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


class Manager:
    def __init__(
        self,
        *,
        wraps: Wraps,
        own_wraps: OwnWraps,
        peering: Peering,
        journal: Journal,
        clock: Clock,
        one_at_a_time: asyncio.Lock,
        rotate_after_days: int,
    ) -> None:
        """*one_at_a_time*: held by whoever makes keys or KEKs at this agent."""
        self._wraps = wraps
        self._own_wraps = own_wraps
        self._peering = peering
        self._journal = journal
        self._clock = clock
        self._one_at_a_time = one_at_a_time
        self._rotate_after_days = rotate_after_days
        self._making = asyncio.Lock()
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._wakes: dict[str, asyncio.Event] = {}
        self._due_boot_s: float | None = None
        self.standings: dict[str, Standing] = {}
        """By environment, the own one included; for people too."""
        self.held: Mapping[str, Mapping[str, str]] = {}
        """What pre-active keys wait for, by key and environment."""
        peering.listen(self._changed)

    def routes(self) -> Sequence[PeerRoute]:
        return (PeerRoute("POST", SERVICE_PATH, self._answer_service, limit_bytes=64 << 10),)

    # Commands.

    async def ensure_service(self, owner: NetworkService, use: KeyUse, algorithm: str | None) -> None:
        """The service and its ring of that use are in the rows, here too, and its keys on their way.

        In any environment: the manager is asked for it. RefusedChangeError, PeerError, RegistryError,
        KeySourceError.
        """
        if not self._peering.leads:
            manager = newest_term(self._peering.view)
            if manager is None or manager[1].environment == self._peering.environment:
                raise RefusedChangeError("no manager is known", "`key-agent env list` shows who it was")
            wish = ServiceWish(service=str(owner), use=use, algorithm=algorithm)
            await self._peering.peers.post(manager[1].environment, SERVICE_PATH, msgspec.json.encode(wish))
            await self._peering.ask(manager[1].environment)  # and take over what that changed
            if str(owner) not in self._peering.view.services:
                raise RefusedChangeError(f"{owner} has not arrived here yet", "repeat the command")
            return

        def change(draft: Draft) -> None:
            changes.put_service(draft, owner)
            changes.put_ring(draft, owner, use, algorithm, new_id=os.urandom(16).hex())

        await self._write(change)
        await self._make(changes.first_keys(self._peering.view), generator=None)

    async def remove_service(self, owner: NetworkService) -> None:
        """In every environment nothing of it is pushed any more; its keys stay until they are retired.

        RefusedChangeError: unknown, or this agent is not the manager.
        """
        await self._write(lambda draft: changes.remove_service(draft, owner))

    async def set_rotate_after(self, owner: NetworkService, days: int | None) -> None:
        """RefusedChangeError: unknown, or this agent is not the manager."""
        await self._write(lambda draft: changes.set_rotate_after(draft, owner, days))
        self._due_boot_s = None

    async def set_policy(
        self,
        owner: NetworkService,
        policy: EncryptPolicy,
        *,
        pinned_dek: str | None = None,
        home_environment: str | None = None,
    ) -> None:
        """Which environment's key seals. RefusedChangeError."""
        await self._write(
            lambda draft: changes.set_policy(
                draft, owner, policy, pinned_dek=pinned_dek, home_environment=home_environment
            )
        )

    async def change_key(self, key_id: str, state: KeyState, reason: str | None) -> KeyState:
        """Another state in every environment; the one it had. RefusedChangeError."""
        found: list[KeyState] = []
        await self._write(lambda draft: found.append(changes.change_key(draft, key_id, state, reason)))
        return found[-1]

    async def resume_key(self, key_id: str) -> KeyState:
        """Undo a suspension; the state it has now. RefusedChangeError."""
        found: list[KeyState] = []
        await self._write(lambda draft: found.append(changes.resume_key(draft, key_id)))
        return found[-1]

    async def rotate(self, services: Collection[str] | None, use: KeyUse | None) -> list[str]:
        """The next key of every environment that counts, in these services or in all; their ids.

        RefusedChangeError: there is nothing to rotate, or this agent is not the manager. KeySourceError,
        PeerError, RegistryError: some may have been made.
        """
        self._term()
        wanted = changes.next_keys(self._peering.view, services=services, use=use)
        if not wanted:
            raise RefusedChangeError(
                "there is nothing to rotate, or its next keys are on their way",
                "`key-agent status` shows what they wait for",
            )
        return await self._make(wanted, generator=None)

    async def give_up(self, owner: NetworkService) -> list[str]:
        """Destroy keys of a service that are not active yet; which were. RefusedChangeError."""
        gone: list[str] = []

        def change(draft: Draft) -> None:
            coming = [
                key_id
                for key_id, body in draft.shared.deks.items()
                if body.service == str(owner) and body.state is KeyState.PRE_ACTIVE
            ]
            gone[:] = changes.give_up(draft, coming, "its rotation was cancelled")

        await self._write(change)
        return gone

    async def settled(self, key_ids: Collection[str], *, timeout_s: float) -> Mapping[str, Mapping[str, str]]:
        """Return when none of these keys is pre-active any more; else after *timeout_s*, with what they wait
        for.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while self._coming(key_ids):
                    settled = self._settled
                    await settled.wait()
        except TimeoutError:
            pass
        return {key_id: self.held.get(key_id, {}) for key_id in self._coming(key_ids)}

    def rotation_rows(self, key_ids: Collection[str] | None) -> list[dict[str, object]]:
        """These keys, or all that are not active yet, as `key-agent status` shows rotations."""
        deks = self._peering.view.deks
        chosen = [
            key_id
            for key_id, body in deks.items()
            if (body.state is KeyState.PRE_ACTIVE if key_ids is None else key_id in key_ids)
        ]
        return [
            {
                "service": deks[key_id].service,
                "use": deks[key_id].use,
                "environment": deks[key_id].owner_environment,
                "new_kid": key_id,
                "old_kid": deks[key_id].predecessor,
                "phase": _PHASES.get(deks[key_id].state, "done"),
                "cause": "command",
                "begun_at_ms": deks[key_id].created_at_ms,
                "since_ms": deks[key_id].since_ms,
                "until_ms": None,
                "waiting_for": [f"{name}: {why}" for name, why in sorted(self.held.get(key_id, {}).items())],
                "late": [],
                "problem": None,
            }
            for key_id in chosen
        ]

    def _coming(self, key_ids: Collection[str]) -> list[str]:
        deks = self._peering.view.deks
        return [key_id for key_id in key_ids if key_id in deks and deks[key_id].state is KeyState.PRE_ACTIVE]

    # What incidents ask (incidents.KeyMaker).

    async def exposed(self, environment: str) -> frozenset[str]:
        """Keys that *environment* could open. Its own word is not asked for: it may be the breached one's.

        Every key is brought to every environment, so it is all of them but what never went there.
        """
        view = self._peering.view
        body = view.environments.get(environment)
        if body is None or body.state is EnvironmentState.PROVISIONING:
            return frozenset()
        return frozenset(key_id for key_id, dek in view.deks.items() if dek.state is not KeyState.DESTROYED)

    async def make_successors(
        self, wanted: Collection[tuple[str, str, str]], *, generator: str | None
    ) -> list[str]:
        """New keys, pre-active, for each (ring, owner, predecessor) that has none on its way; their ids.

        RefusedChangeError, KeySourceError, PeerError, RegistryError: to be repeated.
        """
        self._term()
        return await self._make(
            [
                WantedKey(ring=ring, owner_environment=owner, predecessor=predecessor)
                for ring, owner, predecessor in wanted
            ],
            generator=generator,
        )

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

    # The loop.

    def _changed(self, _view: Shared) -> None:
        self.wake()

    def wake(self) -> None:
        """Something may have to be done."""
        self._wake.set()
        for wake in self._wakes.values():
            wake.set()
        settled, self._settled = self._settled, asyncio.Event()
        settled.set()

    async def run(self) -> NoReturn:
        """Until cancelled; a bug ends it. Does nothing while this agent is not the manager."""
        async with asyncio.TaskGroup() as group:
            serving: dict[str, asyncio.Task[NoReturn]] = {}
            failures = 0
            while True:
                wanted = self._recipients() if self._acts() else set()
                for name in serving.keys() - wanted:
                    serving.pop(name).cancel()
                    self._wakes.pop(name, None)
                    self.standings.pop(name, None)
                for name in wanted - serving.keys():
                    self._wakes[name] = asyncio.Event()
                    self.standings[name] = Standing()
                    serving[name] = group.create_task(self._serve(name), name=f"manager:{name}")
                delay_s = LOOK_S
                if self._acts():
                    try:
                        delay_s = await self.advance()
                        failures = 0
                    except SealgateError as error:  # HSM, registry, peer, audit log: all of it is repeated
                        failures += 1
                        log.error("keys of the environments", cause=str(error))  # noqa: TRY400 - expected
                        delay_s = next_delay(interval_s=_MAX_DELAY_S, failures=failures, jitter=0)
                await wait_until(self._clock, self._wake, self._clock.boot_s() + delay_s)
        raise AssertionError("unreachable: the loop above does not end")

    def _acts(self) -> bool:
        own = self._peering.view.environments.get(self._peering.environment)
        return self._peering.leads and self._peering.tampered is None and own is not None and own.state.counts

    def _recipients(self) -> set[str]:
        return {
            name
            for name, body in self._peering.view.environments.items()
            if body.state in HAVE_KEYS
            # After an incident nothing is stored there before healing.py says so.
            and (body.state is not EnvironmentState.REJOINING or changes.may_enter(body))
        }

    async def advance(self) -> float:
        """Do what can be done now; seconds until it is worth while to look again. SealgateError."""
        await self._make_first()
        await self._make_due()
        await self._replace_lost()
        await self._activate()
        view = self._peering.view
        is_open = any(body.state is KeyState.PRE_ACTIVE for body in view.deks.values()) or any(
            changes.may_enter(body) for body in view.environments.values()
        )
        return _SOON_S if is_open or self._a_command_runs else LOOK_S

    @property
    def _a_command_runs(self) -> bool:
        """It makes the keys that it needs and may wait until they seal: it is not waited for in turn."""
        return self._one_at_a_time.locked()

    async def _make_first(self) -> None:
        wanted = changes.first_keys(self._peering.view)
        if wanted and not self._a_command_runs:
            async with self._one_at_a_time:
                await self._make(wanted, generator=None)

    async def _make_due(self) -> None:
        now_s = self._clock.boot_s()
        if self._due_boot_s is not None and now_s - self._due_boot_s < DUE_S:
            return
        wanted = changes.due_keys(
            self._peering.view,
            default_days=self._rotate_after_days,
            now_ms=self._now_ms(),
            limit=MAX_SCHEDULED,
        )
        if wanted and self._a_command_runs:
            return
        if wanted:
            async with self._one_at_a_time:
                await self._make(wanted, generator=None)
        self._due_boot_s = now_s

    async def _replace_lost(self) -> None:
        """Rule 2: who is new and nowhere any more is given up; its place then has none, and gets one."""
        view = self._peering.view
        counted = changes.serving_environments(view)
        if any(
            (standing := self.standings.get(name)) is None or standing.looked_boot_s is None
            for name in counted
        ):
            return  # somebody has not said yet what it has
        known = set[str]().union(*(standing.proven for standing in self.standings.values()))
        own = self.standings[self._peering.environment]
        lost = [
            key_id
            for key_id, body in view.deks.items()
            if body.state is KeyState.PRE_ACTIVE and key_id not in known and key_id in own.failed
        ]
        if not lost:
            return
        wanted = [
            WantedKey(
                ring=view.deks[key_id].ring,
                owner_environment=view.deks[key_id].owner_environment,
                predecessor=view.deks[key_id].predecessor,
            )
            for key_id in lost
        ]
        log.error("new keys are lost and made again", keys=len(lost))
        await self._journal.record("key-create", outcome="lost", keys=len(lost))
        await self._write(lambda draft: changes.give_up(draft, lost, "its only wrap was lost"))
        await self._make(wanted, generator=None)

    async def _activate(self) -> None:
        view = self._peering.view
        waiting = {
            name: standing.waiting
            for name, standing in self.standings.items()
            if standing.waiting is not None
        }
        proven = {name: standing.proven for name, standing in self.standings.items()}
        may, self.held = changes.ready(view, waiting, proven)
        if not may:
            return
        for key_id in may:
            body = view.deks[key_id]
            await self._journal.record(
                "key-rotate",
                outcome="activated",
                service=body.service,
                kid=key_id,
                use=body.use,
                environment=body.owner_environment,
                deferred=",".join(self._without(key_id)) or None,
            )

        def change(draft: Draft) -> None:
            # What the environments have said counts for the rows of then: those of now decide.
            still, _ = changes.ready(draft.shared, waiting, proven)
            changes.activate(draft, [key_id for key_id in may if key_id in still])

        await self._write(change)

    def _without(self, key_id: str) -> list[str]:
        """Environments that have no proven wrap of it: it is deferred there."""
        return [
            name
            for name in sorted(self._peering.view.environments)
            if (standing := self.standings.get(name)) is None or key_id not in standing.proven
        ]

    # One environment.

    async def _serve(self, name: str) -> NoReturn:
        failures = 0
        while True:
            wake = self._wakes[name]
            delay_s = LOOK_S
            try:
                if await self.serve(name):
                    delay_s = _SOON_S
                failures = 0
            except SealgateError as error:
                failures += 1
                standing = self.standings[name]
                if standing.error is None:
                    log.warning("an environment does not get its keys", environment=name, cause=str(error))
                standing.error, standing.waiting = str(error), None
                delay_s = next_delay(interval_s=_MAX_DELAY_S, failures=failures, jitter=0)
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
            self._wake.set()
        if changes.may_enter(body) and not changes.first_keys(view):  # its own keys come first
            await self._enter(name, keys)
        return bool(coming or wanted or changes.may_enter(body))

    async def _enter(self, name: str, keys: Collection[str]) -> None:
        """Rule 5."""
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

        await self._write(change)

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

    # Making.

    async def _make(self, wanted: Collection[WantedKey], *, generator: str | None) -> list[str]:
        """Keys for those of *wanted* that have none on its way; the ids of the new ones."""
        made: list[str] = []
        async with self._making:
            by = self._generator(generator)
            for some in batched(changes.still_wanted(self._peering.view, wanted), BATCH):
                made += await self._make_some(some, by)
        return made

    def _generator(self, named: str | None) -> str:
        """Rule: one that heals makes no keys."""
        counted = changes.serving_environments(self._peering.view)
        if named is not None and named not in counted:
            raise RefusedChangeError(
                f"{named} makes no keys now", "leave the generator out, or name one that serves"
            )
        if named is not None:
            return named
        if not counted:
            raise RefusedChangeError(
                "no environment counts: none makes keys now", "`key-agent env recovery` where it is to begin"
            )
        own = self._peering.environment
        return own if own in counted else counted[0]

    async def _make_some(self, wanted: Sequence[WantedKey], generator: str) -> list[str]:
        view, own = self._peering.view, self._peering.environment
        rings = [view.rings[one.ring] for one in wanted]
        await self._journal.record("key-create", outcome="begun", keys=len(wanted), generator=generator)
        new = [
            NewKey(owner=NetworkService.parse(ring.service), use=ring.use, algorithm=ring.algorithm)
            for ring in rings
        ]
        keys = (
            await self._wraps.make(new)
            if generator == own
            else await self._wraps.made_elsewhere(generator, new)
        )
        made: list[tuple[WantedKey, WrappedKey]] = list(zip(wanted, keys, strict=True))
        placed: list[str] = []

        def change(draft: Draft) -> None:
            placed[:] = changes.put_new(draft, made, generator=generator)

        route, now_ms = "kms" if generator == own else "peer", self._now_ms()
        await self._write(
            change,
            also=lambda c: store_wraps(
                c, [key for key in keys if str(key.key_id) in placed], route=route, now_ms=now_ms
            ),
        )
        if (standing := self.standings.get(own)) is not None:
            standing.proven |= set(placed)
        for key_id in placed:
            body = self._peering.view.deks[key_id]
            await self._journal.record(
                "key-create",
                service=body.service,
                kid=key_id,
                use=body.use,
                environment=body.owner_environment,
                generator=generator,
            )
        return placed

    # Writing.

    def _term(self) -> int:
        """RefusedChangeError unless this agent is the manager."""
        leadership = self._peering.leadership
        term = None if leadership is None else leadership.term
        if term is None:
            manager = newest_term(self._peering.view)
            where = "none is" if manager is None else f"it is {manager[1].agent} of {manager[1].environment}"
            raise RefusedChangeError(
                f"this agent is not the manager: {where}",
                "give the command there, or `key-agent env promote` this one",
            )
        return term

    async def _write(self, change: Callable[[Draft], object], *, also: AlsoWrite | None = None) -> None:
        await self._peering.shared.write(change, term=self._term(), now_ms=self._now_ms(), also=also)
        await self._peering.changed()
        self.wake()

    def _now_ms(self) -> int:
        return int(self._clock.wall_s() * 1000)

    async def _answer_service(self, call: PeerCall) -> bytes:
        wish = read_message(call, ServiceWish)
        owner = NetworkService.parse(wish.service)
        caller = self._peering.environment_of(call.agent_id)
        body = None if caller is None else self._peering.view.environments.get(caller)
        if owner.tenant != self._peering.tenant or body is None or body.state not in HAVE_KEYS:
            raise RefusedChangeError(f"{call.agent_id} may not ask for keys of {owner}", "see `env list`")
        self._term()
        await self._journal.record(
            "service-wish", service=str(owner), use=wish.use, environment=caller, agent=call.agent_id
        )
        await self.ensure_service(owner, wish.use, wish.algorithm)
        return b"{}"
