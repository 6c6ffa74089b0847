"""What the manager changes in the signed rows about keys, rings and services; what there is to do for it.

1. In each ring every environment that serves owns one active key. New ones are made pre-active, and become
   active together with the end of the one before, in one epoch: never none, never two.
2. A key waits for every environment that counts: its wrap proven there, and its proxies told. One that heals
   or joins is not waited for; it gets the key before it serves.
3. A ring gets an environment's first key by itself. A key that was taken away gets its successor by command:
   whoever breached it may still be there.
4. Nothing here does anything but change a draft: all of it can be done again.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from envelope.keys import TRANSITIONS, KeyState, KeyUse, NetworkService
from key_agent.environments.changes.incident_changes import resume
from key_agent.environments.shared.documents import (
    DekBody,
    EncryptPolicy,
    EnvironmentBody,
    Kind,
    RingBody,
    ServiceBody,
)
from key_agent.environments.shared.draft import Draft
from key_agent.environments.shared.shared_view import Shared
from key_agent.environments.states import EnvironmentEvent, EnvironmentState, follow_environment
from key_agent.registry.access import RefusedChangeError
from key_agent.sources.source import WrappedKey

DAY_MS: Final = 86_400_000
LIVE: Final = (KeyState.PRE_ACTIVE, KeyState.ACTIVE, KeyState.SUSPENDED, KeyState.DEACTIVATED)
"""What every environment that serves has to be able to open."""
_LIST: Final = "`key-agent key list SERVICE` shows the keys and their states"


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedKey:
    """A key to be made."""

    ring: str
    owner_environment: str
    predecessor: str | None = None


type Place = tuple[str, str]
"""Ring and owner environment."""


def keys_by_place(shared: Shared) -> dict[Place, dict[str, DekBody]]:
    found: dict[Place, dict[str, DekBody]] = {}
    for key_id, body in shared.deks.items():
        found.setdefault((body.ring, body.owner_environment), {})[key_id] = body
    return found


def serving_environments(shared: Shared, *, joining: bool = False) -> list[str]:
    """Those that count; with *joining* also those on their way for the first time."""
    return sorted(
        name
        for name, body in shared.environments.items()
        if body.state.counts or (joining and body.state is EnvironmentState.JOINING)
    )


def live_rings(shared: Shared) -> dict[str, RingBody]:
    """Rings of services that are not removed."""
    return {
        ring_id: ring
        for ring_id, ring in shared.rings.items()
        if (service := shared.services.get(ring.service)) is not None and not service.removed
    }


def first_keys(shared: Shared) -> list[WantedKey]:
    """Rule 3: places that have no key, and never had one that was not destroyed."""
    places = keys_by_place(shared)
    return [
        WantedKey(ring=ring_id, owner_environment=environment)
        for ring_id in sorted(live_rings(shared))
        for environment in serving_environments(shared, joining=True)
        if all(body.state is KeyState.DESTROYED for body in places.get((ring_id, environment), {}).values())
    ]


def next_keys(
    shared: Shared, *, services: Collection[str] | None = None, use: KeyUse | None = None
) -> list[WantedKey]:
    """Successors of every key that seals or should, for a rotation; not where one is on its way."""
    places = keys_by_place(shared)
    found = []
    for ring_id, ring in sorted(live_rings(shared).items()):
        if (services is not None and ring.service not in services) or use not in (None, ring.use):
            continue
        for environment in serving_environments(shared):
            keys = places.get((ring_id, environment), {})
            if any(body.state is KeyState.PRE_ACTIVE for body in keys.values()):
                continue
            predecessor = max(keys, key=lambda key_id: keys[key_id].version, default=None)
            found.append(WantedKey(ring=ring_id, owner_environment=environment, predecessor=predecessor))
    return found


def due_keys(shared: Shared, *, default_days: int, now_ms: int, limit: int) -> list[WantedKey]:
    """Successors of keys that are older than their service wants, the oldest first."""
    busy = {place for place, keys in keys_by_place(shared).items() if _coming(keys.values())}
    rings = live_rings(shared)
    serving = set(serving_environments(shared))
    due: list[tuple[int, WantedKey]] = []
    for key_id, body in shared.deks.items():
        place = (body.ring, body.owner_environment)
        if body.state is not KeyState.ACTIVE or body.ring not in rings or place in busy:
            continue
        if body.owner_environment not in serving:
            continue
        days = shared.services[body.service].rotate_after_days
        days = default_days if days is None else days
        activated_ms = body.activated_at_ms or body.created_at_ms
        if days > 0 and now_ms - activated_ms >= days * DAY_MS:
            wanted = WantedKey(ring=body.ring, owner_environment=body.owner_environment, predecessor=key_id)
            due.append((activated_ms, wanted))
    due.sort(key=lambda one: (one[0], one[1].ring, one[1].owner_environment))
    return [wanted for _, wanted in due[:limit]]


def _coming(keys: Iterable[DekBody]) -> bool:
    return any(body.state is KeyState.PRE_ACTIVE for body in keys)


def still_wanted(shared: Shared, wanted: Collection[WantedKey]) -> list[WantedKey]:
    """Without those whose place has one on its way already, and one of each place."""
    places = keys_by_place(shared)
    rings = live_rings(shared)
    found: dict[Place, WantedKey] = {}
    for one in wanted:
        place = (one.ring, one.owner_environment)
        if one.ring in rings and not _coming(places.get(place, {}).values()):
            found.setdefault(place, one)
    return list(found.values())


def put_new(draft: Draft, made: Sequence[tuple[WantedKey, WrappedKey]], *, generator: str) -> list[str]:
    """Keys that have just been made, pre-active; which of them are wanted still."""
    shared = draft.shared
    wanted = {id(one) for one in still_wanted(shared, [one for one, _ in made])}
    versions: dict[str, int] = {}
    for body in shared.deks.values():
        versions[body.ring] = max(versions.get(body.ring, 0), body.version)
    placed = []
    for one, key in made:
        ring = shared.rings.get(one.ring)
        if id(one) not in wanted or ring is None or ring.service != str(key.owner):
            continue
        versions[one.ring] = versions.get(one.ring, 0) + 1
        draft.put(
            Kind.DEK,
            str(key.key_id),
            DekBody(
                ring=one.ring,
                service=ring.service,
                owner_environment=one.owner_environment,
                generator_environment=generator,
                use=key.use,
                algorithm=key.algorithm,
                version=versions[one.ring],
                kcv=key.kcv.hex(),
                state=KeyState.PRE_ACTIVE,
                since_ms=draft.now_ms,
                created_at_ms=draft.now_ms,
                predecessor=one.predecessor if one.predecessor in shared.deks else None,
            ),
        )
        placed.append(str(key.key_id))
    return placed


def activate(draft: Draft, key_ids: Collection[str]) -> list[str]:
    """Rule 1. Keys that are not pre-active any more are left out; which became active."""
    active = {
        (body.ring, body.owner_environment): key_id
        for key_id, body in draft.shared.deks.items()
        if body.state is KeyState.ACTIVE
    }
    done = []
    for key_id in sorted(key_ids):
        body = draft.shared.deks.get(key_id)
        if body is None or body.state is not KeyState.PRE_ACTIVE:
            continue
        place = (body.ring, body.owner_environment)
        if (before := active.get(place)) is not None:
            _put(draft, before, state=KeyState.DEACTIVATED, successor=key_id)
        elif (ended := draft.shared.deks.get(body.predecessor or "")) is not None and ended.successor is None:
            draft.put(Kind.DEK, str(body.predecessor), msgspec.structs.replace(ended, successor=key_id))
        _put(draft, key_id, state=KeyState.ACTIVE, activated_at_ms=draft.now_ms)
        active[place] = key_id
        done.append(key_id)
    return done


def give_up(draft: Draft, key_ids: Collection[str], reason: str) -> list[str]:
    """Pre-active keys that will never be: destroyed. Which were."""
    gone = [
        key_id
        for key_id in sorted(key_ids)
        if (body := draft.shared.deks.get(key_id)) is not None and body.state is KeyState.PRE_ACTIVE
    ]
    for key_id in gone:
        _put(draft, key_id, state=KeyState.DESTROYED, reason=reason)
    return gone


def _put(draft: Draft, key_id: str, **changes: object) -> None:
    body = msgspec.structs.replace(draft.shared.deks[key_id], since_ms=draft.now_ms, **changes)
    draft.put(Kind.DEK, key_id, body)


# Commands.


def change_key(draft: Draft, key_id: str, state: KeyState, reason: str | None) -> KeyState:
    """Suspend, deactivate, compromise, or give up a key that never sealed; the state it had.

    RefusedChangeError: the table of states has no such step; or two persons have to decide.
    """
    body = _key(draft.shared, key_id)
    old = body.state
    if old is state:
        return old
    if state is KeyState.DESTROYED and old is not KeyState.PRE_ACTIVE:
        raise RefusedChangeError(
            f"key {key_id} has sealed: with several environments two administrators destroy it",
            "`key-agent keys retire`, with an approval",
        )
    if state not in TRANSITIONS[old]:
        raise RefusedChangeError(f"key {key_id} does not go from {old} to {state}", _LIST)
    _put(
        draft,
        key_id,
        state=state,
        reason=reason,
        suspended_from=old if state is KeyState.SUSPENDED else None,
    )
    return old


def resume_key(draft: Draft, key_id: str) -> KeyState:
    """Undo a suspension by command; the state it has now. RefusedChangeError: it is an incident's."""
    body = _key(draft.shared, key_id)
    if body.state is not KeyState.SUSPENDED:
        raise RefusedChangeError(f"key {key_id} is {body.state}, not suspended", _LIST)
    if body.incident_id is not None:
        raise RefusedChangeError(
            f"{body.incident_id} has suspended key {key_id}: two administrators bring it back",
            f"`key-agent incident cancel {body.incident_id}`, with an approval",
        )
    return resume(draft, key_id, now_ms=draft.now_ms)


def _key(shared: Shared, key_id: str) -> DekBody:
    if (body := shared.deks.get(key_id)) is None:
        raise RefusedChangeError(f"there is no key {key_id}", _LIST)
    return body


def put_service(draft: Draft, owner: NetworkService) -> None:
    """The service is there, as it was if it was; one that was removed comes back."""
    known = draft.shared.services.get(str(owner))
    if known is None:
        draft.put(Kind.SERVICE, str(owner), ServiceBody())
    elif known.removed:
        draft.put(Kind.SERVICE, str(owner), msgspec.structs.replace(known, removed=False))


def put_ring(draft: Draft, owner: NetworkService, use: KeyUse, algorithm: str | None, *, new_id: str) -> str:
    """The ring's id, *new_id* if there is none yet. RefusedChangeError: it signs by another algorithm."""
    for ring_id, ring in draft.shared.rings.items():
        if (ring.service, ring.use) != (str(owner), use):
            continue
        if ring.algorithm != algorithm:
            raise RefusedChangeError(
                f"{owner} signs by {ring.algorithm}, not by {algorithm}", "give that algorithm"
            )
        return ring_id
    draft.put(Kind.RING, new_id, RingBody(service=str(owner), use=use, algorithm=algorithm))
    return new_id


def remove_service(draft: Draft, owner: NetworkService) -> None:
    """Nothing of it is pushed any more. Its keys stay, to be retired by two persons.

    RefusedChangeError if there is no such service.
    """
    body = _service(draft.shared, owner)
    draft.put(Kind.SERVICE, str(owner), msgspec.structs.replace(body, removed=True))
    reason = "its service was removed"
    for key_id, key in list(draft.shared.deks.items()):
        if key.service != str(owner):
            continue
        if key.state is KeyState.PRE_ACTIVE:
            _put(draft, key_id, state=KeyState.DESTROYED, reason=reason)
        elif key.state is KeyState.ACTIVE:
            _put(draft, key_id, state=KeyState.DEACTIVATED, reason=reason)


def set_rotate_after(draft: Draft, owner: NetworkService, days: int | None) -> None:
    """RefusedChangeError if there is no such service."""
    body = _service(draft.shared, owner)
    draft.put(Kind.SERVICE, str(owner), msgspec.structs.replace(body, rotate_after_days=days))


def set_policy(
    draft: Draft,
    owner: NetworkService,
    policy: EncryptPolicy,
    *,
    pinned_dek: str | None = None,
    home_environment: str | None = None,
) -> None:
    """Which environment's key seals (presented.py).

    RefusedChangeError: there is no such service, key or environment, or the key is none that seals data.
    """
    body = _service(draft.shared, owner)
    if (policy is EncryptPolicy.PINNED) != (pinned_dek is not None):
        raise RefusedChangeError("the policy `pinned`, and only that, names a key", "--key KID")
    if pinned_dek is not None:
        key = _key(draft.shared, pinned_dek)
        if key.service != str(owner) or key.state is not KeyState.ACTIVE:
            raise RefusedChangeError(f"key {pinned_dek} is no active key of {owner}", _LIST)
    if home_environment is not None and home_environment not in draft.shared.environments:
        raise RefusedChangeError(f"there is no environment {home_environment}", "`key-agent env list`")
    draft.put(
        Kind.SERVICE,
        str(owner),
        msgspec.structs.replace(
            body, encrypt_policy=policy, pinned_dek=pinned_dek, home_environment=home_environment
        ),
    )


def _service(shared: Shared, owner: NetworkService) -> ServiceBody:
    body = shared.services.get(str(owner))
    if body is None or body.removed:
        raise RefusedChangeError(f"no network service {owner}", "`key-agent service list` shows them")
    return body


# Environments on their way without an incident.


def may_enter(body: EnvironmentBody) -> bool:
    """Whether it becomes active as soon as its keys are proven; after an incident healing.py decides."""
    return body.state is EnvironmentState.JOINING or (
        body.state is EnvironmentState.REJOINING and body.incident_id is None
    )


def enter(draft: Draft, environment: str) -> bool:
    """Everything is proven there: it is active. False if it is not on its way any more."""
    body = draft.shared.environments.get(environment)
    if body is None or not may_enter(body):
        return False
    draft.put(
        Kind.ENVIRONMENT,
        environment,
        msgspec.structs.replace(
            body,
            state=follow_environment(body.state, EnvironmentEvent.KEYS_PROVEN),
            reason=None,
            since_ms=draft.now_ms,
        ),
    )
    return True


def ready(
    shared: Shared, waiting: Mapping[str, Mapping[str, str]], proven: Mapping[str, Collection[str]]
) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Pre-active keys that may become active now; and what the others wait for, by key and environment.

    *waiting*: by environment that has answered, what each key waits for there. *proven*: by environment, keys
    whose wraps it has verified (rule 2).
    """
    counted = serving_environments(shared)
    least = 1 if shared.tenant is None else shared.tenant.min_wraps
    may, held = [], {}
    for key_id, body in sorted(shared.deks.items()):
        if body.state is not KeyState.PRE_ACTIVE:
            continue
        reasons: dict[str, str] = {}
        for environment in counted:
            if environment not in waiting:
                reasons[environment] = "it does not answer"
            elif key_id not in proven.get(environment, ()):
                reasons[environment] = "its wrap"
            elif (why := waiting[environment].get(key_id)) is not None:
                reasons[environment] = why
        enough = sum(key_id in keys for keys in proven.values())
        if counted and not reasons and enough < least:
            reasons["*"] = f"{least} verified wraps, there are {enough}"
        if counted and not reasons:
            may.append(key_id)
        else:
            held[key_id] = reasons
    return may, held
