"""The administrator's commands on data keys: their states, and the next key.

1. A state changes in the registry first, then every proxy of the service is pushed at once, and the command
   returns when they have acknowledged it or could not be reached: the answer names each.
2. `destroy` wants the key id twice. Only what is deactivated or compromised can be destroyed, and
   `key_loss` shows before what becomes unreadable.
3. `rotate` returns when the new key seals everywhere, or with what it waits for; the agent goes on with it
   (rotation.py).
"""

import asyncio
from collections.abc import Collection
from dataclasses import dataclass
from itertools import batched
from typing import Final

from envelope.errors import FormatError
from envelope.keys import KeyId, KeyState, KeyUse, NetworkService
from key_agent.environments.keys.manager import Manager
from key_agent.operations.commands import DELIVERY_PATIENCE_S, Commands, Json
from key_agent.push.pusher import Outcome
from key_agent.registry.model import DataKeyRow, DueRing, RotationCause
from key_agent.registry.store import RefusedChangeError
from key_agent.rotation import hosts_of, places
from key_agent.sources.source import NewKey

_BATCH: Final = 500
"""Keys made and committed at once when all services rotate."""


@dataclass(frozen=True, slots=True)
class _Change:
    """A command that gives one key another state."""

    state: KeyState
    action: str


_CHANGES: Final = {
    "suspend": _Change(KeyState.SUSPENDED, "key-suspend"),
    "deactivate": _Change(KeyState.DEACTIVATED, "key-deactivate"),
    "compromise": _Change(KeyState.COMPROMISED, "key-compromise"),
    "destroy": _Change(KeyState.DESTROYED, "key-destroy"),
}


class KeyCommands(Commands):
    # States.

    async def key_list(self, *, service: str) -> Json:
        """Every key a service ever had, newest last, and which proxies hold it now."""
        owner = self._owner(service)
        keys = await self._keys_of(owner)
        return {"service": str(owner), "keys": [self._key_json(key) for key in keys]}

    async def key_suspend(self, *, service: str, kid: str, reason: str | None = None) -> Json:
        """It opens and seals nothing until it is resumed."""
        return await self._change(service, kid, _CHANGES["suspend"], reason)

    async def key_resume(self, *, service: str, kid: str) -> Json:
        """Undo a suspension: as before, but to open only if another key is active now."""
        async with self._one_at_a_time:
            owner, key = await self._key(service, kid)
            await self._record("key-resume", owner, key, outcome="begun")
            if (manager := self._manager()) is not None:
                state = await manager.resume_key(str(key.key_id))
            else:
                state = await self._agent.registry.resume_key(owner, key.key_id, now_ms=self._agent.now_ms())
            await self._record("key-resume", owner, key, state=state)
            return await self._changed(owner, key, state)

    async def key_deactivate(self, *, service: str, kid: str, reason: str | None = None) -> Json:
        """It opens what it sealed, and seals no more."""
        return await self._change(service, kid, _CHANGES["deactivate"], reason)

    async def key_compromise(self, *, service: str, kid: str, reason: str | None = None) -> Json:
        """Others may know it: it opens and seals nothing, for good."""
        return await self._change(service, kid, _CHANGES["compromise"], reason)

    async def key_loss(self, *, service: str, kid: str) -> Json:
        """What `key_destroy` would make unreadable. Changes nothing."""
        owner, key = await self._key(service, kid)
        if key.state not in (KeyState.DEACTIVATED, KeyState.COMPROMISED, KeyState.DESTROYED):
            raise RefusedChangeError(
                f"key {kid} of {owner} is {key.state}: only a deactivated or compromised key is destroyed",
                f"`key-agent rotate {owner}` makes another one active",
            )
        return self._key_json(key) | {
            "service": str(owner),
            "unreadable": f"every object and field of {owner} that key {key.key_id} sealed",
        }

    async def key_destroy(self, *, service: str, kid: str, confirm: str, reason: str | None = None) -> Json:
        """Erase the key's wraps: what it sealed is unreadable for ever. *confirm* repeats the key id."""
        if confirm != kid:
            raise RefusedChangeError(
                f"not confirmed: {confirm!r} is not the key id {kid}", "give the key id a second time"
            )
        return await self._change(service, kid, _CHANGES["destroy"], reason)

    async def _change(self, service: str, kid: str, change: _Change, reason: str | None) -> Json:
        async with self._one_at_a_time:
            owner, key = await self._key(service, kid)
            await self._record(change.action, owner, key, outcome="begun", reason=reason)
            if (manager := self._manager()) is not None:
                old = await manager.change_key(str(key.key_id), change.state, reason)
            else:
                old = await self._agent.registry.change_key(
                    owner, key.key_id, change.state, reason, now_ms=self._agent.now_ms()
                )
            await self._record(change.action, owner, key, before=old)
            return await self._changed(owner, key, change.state)

    async def _changed(self, owner: NetworkService, key: DataKeyRow, state: KeyState) -> Json:
        agent = self._agent
        await agent.reload()
        agent.rotations.wake()
        pushed = await self._pushed(hosts_of(agent.targets, {owner}))
        keys = await self._keys_of(owner)
        seals = any(other.state is KeyState.ACTIVE and other.use is key.use for other in keys)
        return {
            "service": str(owner),
            "kid": str(key.key_id),
            "before": key.state,
            "state": state,
            "another_seals": seals,
            "running": agent.is_running,
            "proxies": pushed,
        }

    async def _key(self, service: str, kid: str) -> tuple[NetworkService, DataKeyRow]:
        owner = self._owner(service)
        try:
            key_id = KeyId.parse(kid)
        except FormatError as error:
            raise RefusedChangeError(str(error), f"`key-agent key list {owner}` shows them") from None
        for key in await self._keys_of(owner):
            if key.key_id == key_id:
                return owner, key
        raise RefusedChangeError(f"{owner} has no key {kid}", f"`key-agent key list {owner}` shows them")

    async def _keys_of(self, owner: NetworkService) -> list[DataKeyRow]:
        return [key for key in await self._agent.registry.data_keys() if key.owner == owner]

    async def _record(
        self,
        action: str,
        owner: NetworkService,
        key: DataKeyRow,
        *,
        outcome: str = "ok",
        **fields: str | None,
    ) -> None:
        await self._agent.journal.record(
            action,
            outcome=outcome,
            service=str(owner),
            kid=str(key.key_id),
            **{name: None if value is None else str(value) for name, value in fields.items()},
        )

    def _key_json(self, key: DataKeyRow) -> Json:
        return {
            "kid": str(key.key_id),
            "use": key.use,
            "algorithm": key.algorithm,
            "version": key.version,
            "state": key.state,
            "since_ms": key.since_ms,
            "reason": key.reason,
            "created_at_ms": key.created_at_ms,
            "activated_at_ms": key.activated_at_ms,
            "keks": key.wrapped_by,
            "held_by": self._holders(key),
        }

    def _holders(self, key: DataKeyRow) -> list[str]:
        """Proxies that acknowledged a push with it, which is still valid.

        One that the KEK of today does not wrap was in no push of today: it was withdrawn with its own KEK.
        """
        now_ms = self._agent.now_ms()
        kek = self._agent.consent.kek
        if key.state is KeyState.DESTROYED or self._agent.consent.standing.is_withdrawn:
            return []
        if kek is None or kek.reference.kek_id not in key.wrapped_by:
            return []
        return sorted(
            link.proxy_id
            for link in places(self._agent.targets, {key.owner})[key.owner]
            if link.accepted_sequence > key.after_sequence and (link.valid_until_ms or 0) > now_ms
        )

    # Rotation.

    async def rotate(
        self, *, service: str | None = None, everything: bool = False, use: str | None = None
    ) -> Json:
        """The next key of a service, or of all, in two phases."""
        if (service is None) is not everything:
            raise RefusedChangeError("rotate one service or all of them", "name a service, or use --all")
        async with self._one_at_a_time:
            agent = self._agent
            kek = await self._usable_kek()
            if (manager := self._manager()) is not None:
                return await self._rotate_everywhere(manager, service, use)
            wanted = await self._rings(None if service is None else self._owner(service), use)
            begun: list[str] = []
            for some in batched(wanted, _BATCH):
                new = [NewKey(owner=ring.owner, use=ring.use, algorithm=ring.algorithm) for ring in some]
                begun += await agent.rotations.begin(kek, new, RotationCause.COMMAND)
            return await self._rotated({ring.owner for ring in wanted}, begun)

    async def _rotate_everywhere(self, manager: Manager, service: str | None, use: str | None) -> Json:
        """The next key of every environment; it waits for all of them."""
        agent = self._agent
        owners = None if service is None else {str(self._owner(service))}
        try:
            only = None if use is None else KeyUse(use)
        except ValueError:
            raise RefusedChangeError(f"no key has the use {use!r}", "data or sign") from None
        await agent.journal.record("key-rotate", outcome="begun", service=service, use=use)
        made = await manager.rotate(owners, only)
        if agent.is_running:
            await manager.settled(made, timeout_s=DELIVERY_PATIENCE_S)
        await agent.reload()
        return {
            "rotations": await self._rotation_rows(made),
            "running": agent.is_running,
            "proxies": await self._pushed(None if service is None else self._hosts(service)),
        }

    def _hosts(self, service: str) -> list[str]:
        return hosts_of(self._agent.targets, {self._owner(service)})

    async def rotate_cancel(self, *, service: str) -> Json:
        """Give up a rotation that has not activated its new key."""
        async with self._one_at_a_time:
            agent = self._agent
            owner = self._owner(service)
            await agent.journal.record("key-rotate", outcome="cancelling", service=str(owner))
            if (manager := self._manager()) is not None:
                given_up = await manager.give_up(owner)
            else:
                rotations = await agent.registry.cancel_rotations(owner, now_ms=agent.now_ms())
                given_up = [str(rotation.new_key) for rotation in rotations]
            await agent.reload()
            for key_id in given_up:
                await agent.journal.record("key-rotate", outcome="cancelled", service=str(owner), kid=key_id)
            return {
                "service": str(owner),
                "cancelled": given_up,
                "proxies": await self._pushed(hosts_of(agent.targets, {owner})),
            }

    async def service_set(self, *, service: str, rotate_after_days: int | None) -> Json:
        """At what age a service's keys are followed by new ones."""
        async with self._one_at_a_time:
            agent = self._agent
            owner = self._owner(service)
            await agent.journal.record("service-set", service=str(owner), rotate_after_days=rotate_after_days)
            if (manager := self._manager()) is not None:
                await manager.set_rotate_after(owner, rotate_after_days)
            else:
                await agent.registry.set_rotate_after(owner, rotate_after_days, now_ms=agent.now_ms())
            agent.rotations.look_soon()
            return {"service": str(owner), "rotate_after_days": rotate_after_days}

    async def _rings(self, owner: NetworkService | None, use: str | None) -> list[DueRing]:
        """What *owner*, or every service, gets new keys for. RefusedChangeError if that is nothing."""
        agent = self._agent
        known = set((await agent.registry.book()).services)
        if owner is not None and owner not in known:
            raise RefusedChangeError(f"no network service {owner}", "`key-agent service list` shows them")
        busy = {(r.owner, r.use) for r in await agent.registry.open_rotations()}
        newest: dict[tuple[NetworkService, KeyUse], DataKeyRow] = {}
        for key in await agent.registry.data_keys():
            if key.owner in (known if owner is None else {owner}) and use in (None, key.use):
                newest[key.owner, key.use] = key
        if owner is not None and busy & newest.keys():
            raise RefusedChangeError(
                f"a rotation of {owner} is under way",
                f"`key-agent status` shows what it waits for; "
                f"`key-agent rotate {owner} --cancel` gives it up",
            )
        found = [
            DueRing(owner=place[0], use=key.use, algorithm=key.algorithm)
            for place, key in sorted(newest.items())
            if place not in busy
        ]
        if not found:
            raise RefusedChangeError("there is nothing to rotate", "`key-agent service list` shows the keys")
        return found

    async def _rotated(self, owners: Collection[NetworkService], begun: Collection[str]) -> Json:
        """Push, wait for what the loop makes of it, and tell."""
        agent = self._agent
        pushed = await self._pushed(hosts_of(agent.targets, set(owners)))
        await self._carried_on(begun, pushed)
        rows = await self._rotation_rows(begun)
        return {"rotations": rows, "running": agent.is_running, "proxies": pushed}

    async def _carried_on(self, ids: Collection[str], pushed: Collection[Json]) -> None:
        """Return when these rotations are over, or when nothing more is to be expected of them soon."""
        agent = self._agent
        try:
            async with asyncio.timeout(DELIVERY_PATIENCE_S):
                while pushed and all(row["outcome"] == Outcome.ACCEPTED for row in pushed):
                    changed = agent.rotations.changed
                    mine = {r.id for r in await agent.registry.open_rotations()} & set(ids)
                    if not mine or agent.rotations.problems.keys() & mine or not agent.consent.may_push:
                        break
                    await changed.wait()
        except TimeoutError:
            pass  # the agent goes on with it; the answer says what it waits for

    async def _rotation_rows(self, ids: Collection[str] | None = None) -> list[Json]:
        """Of these, or of all that are open."""
        agent = self._agent
        if (manager := self._manager()) is not None:
            return manager.rotation_rows(ids)
        if ids is None:
            found = await agent.registry.open_rotations()
        else:
            found = [rotation for rotation in await agent.registry.rotations() if rotation.id in ids]
        waiting = agent.rotations.waiting_for(found)
        return [
            {
                "service": str(rotation.owner),
                "use": rotation.use,
                "new_kid": str(rotation.new_key),
                "old_kid": None if rotation.old_key is None else str(rotation.old_key),
                "phase": rotation.phase,
                "cause": rotation.cause,
                "begun_at_ms": rotation.begun_at_ms,
                "since_ms": rotation.since_ms,
                "until_ms": rotation.until_ms if rotation.phase.is_open else None,
                "waiting_for": list(waiting.get(rotation.id, ())),
                "late": list(rotation.late),
                "problem": agent.rotations.problems.get(rotation.id),
            }
            for rotation in found
        ]
