"""The manager's part of keys: have them made, brought to every environment, proven there, and only then used.

1. What is to be done follows from the signed rows and from what each environment says it has. A manager that
   was killed at any point, or another one that takes over, looks at both and goes on.
2. Every environment is served by a task of its own (bringing.py): one that hangs or is far away holds up
   nobody. Keys wait for it only as long as it counts (key_changes.py, rule 2).
3. What a command asks for is written (key_writing.py) or made (key_making.py) before it returns; the way from
   there to an active key (key_progress.py) is gone by itself, and `settled` waits for its end.
"""

import asyncio
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Final, NoReturn

import msgspec
import structlog

from envelope.errors import SealgateError
from envelope.keys import KeyState, KeyUse, NetworkService
from key_agent.environments.changes import key_changes as changes
from key_agent.environments.changes.key_changes import WantedKey
from key_agent.environments.keys.bringing import LOOK_S, MAX_DELAY_S, Bringing
from key_agent.environments.keys.key_making import KeyMaking
from key_agent.environments.keys.key_progress import KeyProgress
from key_agent.environments.keys.key_writing import KeyWriting
from key_agent.environments.keys.own_wraps import OwnWraps
from key_agent.environments.keys.wrap_messages import Message, Name, read_message
from key_agent.environments.keys.wrapping import Wraps
from key_agent.environments.peers.peer_api import PeerCall, PeerRoute
from key_agent.environments.peers.peering import Peering
from key_agent.environments.shared.documents import EncryptPolicy
from key_agent.environments.shared.draft import Draft
from key_agent.environments.shared.shared_view import Shared, newest_term
from key_agent.environments.states import HAVE_KEYS
from key_agent.journal import Journal
from key_agent.refresh import next_delay, wait_until
from key_agent.registry.access import RefusedChangeError
from runtime.clock import Clock

log = structlog.get_logger(__name__)

SERVICE_PATH: Final = "/v1/env/services"
_PHASES: Final = {KeyState.PRE_ACTIVE: "distributing", KeyState.DESTROYED: "cancelled"}


class ServiceWish(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An environment that serves needs keys of this service and use."""

    service: Name
    use: KeyUse
    algorithm: Name | None = None


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
        self._peering = peering
        self._journal = journal
        self._clock = clock
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._writing = KeyWriting(peering=peering, clock=clock, written=self.wake)
        self.bringing = Bringing(
            wraps=wraps,
            own_wraps=own_wraps,
            peering=peering,
            journal=journal,
            clock=clock,
            writing=self._writing,
            progressed=self._wake.set,
        )
        self._making = KeyMaking(
            wraps=wraps,
            peering=peering,
            journal=journal,
            writing=self._writing,
            standings=self.bringing.standings,
        )
        self.progress = KeyProgress(
            peering=peering,
            making=self._making,
            writing=self._writing,
            standings=self.bringing.standings,
            journal=journal,
            clock=clock,
            one_at_a_time=one_at_a_time,
            rotate_after_days=rotate_after_days,
        )
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

        await self._writing.write(change)
        await self._making.make(changes.first_keys(self._peering.view), generator=None)

    async def remove_service(self, owner: NetworkService) -> None:
        """In every environment nothing of it is pushed any more; its keys stay until they are retired.

        RefusedChangeError: unknown, or this agent is not the manager.
        """
        await self._writing.write(lambda draft: changes.remove_service(draft, owner))

    async def set_rotate_after(self, owner: NetworkService, days: int | None) -> None:
        """RefusedChangeError: unknown, or this agent is not the manager."""
        await self._writing.write(lambda draft: changes.set_rotate_after(draft, owner, days))
        self.progress.ages_changed()

    async def set_policy(
        self,
        owner: NetworkService,
        policy: EncryptPolicy,
        *,
        pinned_dek: str | None = None,
        home_environment: str | None = None,
    ) -> None:
        """Which environment's key seals. RefusedChangeError."""
        await self._writing.write(
            lambda draft: changes.set_policy(
                draft, owner, policy, pinned_dek=pinned_dek, home_environment=home_environment
            )
        )

    async def change_key(self, key_id: str, state: KeyState, reason: str | None) -> KeyState:
        """Another state in every environment; the one it had. RefusedChangeError."""
        found: list[KeyState] = []
        await self._writing.write(
            lambda draft: found.append(changes.change_key(draft, key_id, state, reason))
        )
        return found[-1]

    async def resume_key(self, key_id: str) -> KeyState:
        """Undo a suspension; the state it has now. RefusedChangeError."""
        found: list[KeyState] = []
        await self._writing.write(lambda draft: found.append(changes.resume_key(draft, key_id)))
        return found[-1]

    async def rotate(self, services: Collection[str] | None, use: KeyUse | None) -> list[str]:
        """The next key of every environment that counts, in these services or in all; their ids.

        RefusedChangeError: there is nothing to rotate, or this agent is not the manager. KeySourceError,
        PeerError, RegistryError: some may have been made.
        """
        self._writing.term()
        wanted = changes.next_keys(self._peering.view, services=services, use=use)
        if not wanted:
            raise RefusedChangeError(
                "there is nothing to rotate, or its next keys are on their way",
                "`key-agent status` shows what they wait for",
            )
        return await self._making.make(wanted, generator=None)

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

        await self._writing.write(change)
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
        return {key_id: self.progress.held.get(key_id, {}) for key_id in self._coming(key_ids)}

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
                "waiting_for": [
                    f"{name}: {why}" for name, why in sorted(self.progress.held.get(key_id, {}).items())
                ],
                "late": [],
                "problem": None,
            }
            for key_id in chosen
        ]

    def _coming(self, key_ids: Collection[str]) -> list[str]:
        deks = self._peering.view.deks
        return [key_id for key_id in key_ids if key_id in deks and deks[key_id].state is KeyState.PRE_ACTIVE]

    # What incidents ask (incidents.KeyMaker).

    async def make_successors(
        self, wanted: Collection[tuple[str, str, str]], *, generator: str | None
    ) -> list[str]:
        """New keys, pre-active, for each (ring, owner, predecessor) that has none on its way; their ids.

        RefusedChangeError, KeySourceError, PeerError, RegistryError: to be repeated.
        """
        self._writing.term()
        return await self._making.make(
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
        return await self.bringing.prove(environment)

    # The loop.

    def _changed(self, _view: Shared) -> None:
        self.wake()

    def wake(self) -> None:
        """Something may have to be done."""
        self._wake.set()
        self.bringing.wake()
        settled, self._settled = self._settled, asyncio.Event()
        settled.set()

    async def run(self) -> NoReturn:
        """Until cancelled; a bug ends it. Does nothing while this agent is not the manager."""
        async with asyncio.TaskGroup() as group:
            serving: dict[str, asyncio.Task[NoReturn]] = {}
            failures = 0
            while True:
                wanted = self.bringing.recipients() if self._acts() else set()
                for name in serving.keys() - wanted:
                    serving.pop(name).cancel()
                    self.bringing.end(name)
                for name in wanted - serving.keys():
                    self.bringing.begin(name)
                    serving[name] = group.create_task(
                        self.bringing.keep_serving(name), name=f"manager:{name}"
                    )
                delay_s = LOOK_S
                if self._acts():
                    try:
                        delay_s = await self.progress.advance()
                        failures = 0
                    except SealgateError as error:  # HSM, registry, peer, audit log: all of it is repeated
                        failures += 1
                        log.error("keys of the environments", cause=str(error))  # noqa: TRY400 - expected
                        delay_s = next_delay(interval_s=MAX_DELAY_S, failures=failures, jitter=0)
                await wait_until(self._clock, self._wake, self._clock.boot_s() + delay_s)
        raise AssertionError("unreachable: the loop above does not end")

    def _acts(self) -> bool:
        own = self._peering.view.environments.get(self._peering.environment)
        return self._peering.leads and self._peering.tampered is None and own is not None and own.state.counts

    # Asked by another environment.

    async def _answer_service(self, call: PeerCall) -> bytes:
        wish = read_message(call, ServiceWish)
        owner = NetworkService.parse(wish.service)
        caller = self._peering.environment_of(call.agent_id)
        body = None if caller is None else self._peering.view.environments.get(caller)
        if owner.tenant != self._peering.tenant or body is None or body.state not in HAVE_KEYS:
            raise RefusedChangeError(f"{call.agent_id} may not ask for keys of {owner}", "see `env list`")
        self._writing.term()
        await self._journal.record(
            "service-wish", service=str(owner), use=wish.use, environment=caller, agent=call.agent_id
        )
        await self.ensure_service(owner, wish.use, wish.algorithm)
        return b"{}"
