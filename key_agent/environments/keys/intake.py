"""What other environments deliver: taken in, proven by the HSM, and looked at again when that is asked for.

1. The receiving agent takes the check value from its own copy of the signed rows, has its HSM open what it
   has wrapped, and only then says `verified`. What it says is asked for again: a wrap that is lost or damaged
   later is noticed and brought once more.
2. A healing environment stores nothing that it is given (system B, claim 7).
3. What does not fit the check value is no key, and what is not lacked is not taken in (deliveries.py).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from envelope.keys import NetworkService
from key_agent.environments.keys.deliveries import Refusals, Why, judge
from key_agent.environments.keys.proofs import Proofs
from key_agent.environments.keys.wrap_messages import Delivery, Look, SealedKey, Stored, parcel_of
from key_agent.environments.peers.peering import Peering
from key_agent.environments.shared.documents import DekBody
from key_agent.environments.shared.shared_view import Shared
from key_agent.environments.states import HAVE_KEYS, EnvironmentState
from key_agent.journal import Journal
from key_agent.registry.access import RefusedChangeError
from key_agent.registry.states import KekState
from key_agent.registry.store import Registry
from key_agent.registry.wrap_rows import sound_among, sound_wraps, store_wraps, takes_keys
from key_agent.sources.source import Arrival, Kek, KeySource, Route, WrappedKey
from runtime.clock import Clock


class Intake:
    def __init__(
        self,
        *,
        peering: Peering,
        registry: Registry,
        source: KeySource,
        proofs: Proofs,
        transport_key_file: Path,
        push: Callable[[Collection[NetworkService]], None],
        journal: Journal,
        clock: Clock,
    ) -> None:
        """*push*: the proxies of these services get what is new, now."""
        self._peering = peering
        self._registry = registry
        self._source = source
        self._proofs = proofs
        self._transport_key_file = transport_key_file
        self._push = push
        self._clock = clock
        self.refusals = Refusals(journal, clock)
        self._unopenable: tuple[str, frozenset[str]] = ("", frozenset())
        """A KEK, and the keys that the HSM has not opened with it when it was last asked."""

    async def store(self, delivery: Delivery, *, sender: str) -> Stored:
        """Take in what is for us and lacked here, from the agent *sender*.

        RefusedChangeError: this environment takes none. KeySourceError.
        """
        shared = await self._peering.shared.snapshot()
        own = shared.environments.get(self._peering.environment)
        if own is None or own.state not in HAVE_KEYS:
            state = "not one of several" if own is None else own.state
            why = f"{self._peering.environment} is {state}: it stores no keys"
            self.refuse(sender, {Why.STATE: all_of(delivery, why)})
            raise RefusedChangeError(why, "wait")
        try:
            kek = await self._registry.active_kek()
        except RefusedChangeError as error:
            self.refuse(sender, {Why.STATE: all_of(delivery, str(error))})
            raise
        if (delivery.environment, delivery.kek_id) != (self._peering.environment, kek.reference.kek_id):
            why = (
                f"it is for KEK {delivery.kek_id} of {delivery.environment}, "
                f"the one of today is {kek.reference.kek_id} of {self._peering.environment}"
            )
            failed = {Why.DESTINATION: all_of(delivery, why)}
            self.refuse(sender, failed)
            return Stored(verified=(), failed=failed[Why.DESTINATION])
        return await self._take(kek, delivery, shared, own.state, sender)

    async def _take(
        self, kek: Kek, delivery: Delivery, shared: Shared, state: EnvironmentState, sender: str
    ) -> Stored:
        refused: dict[Why, dict[str, str]] = {}
        held = await self._held(kek.reference.kek_id, [key.key_id for key in delivery.keys])
        arrivals: dict[Route, list[Arrival]] = {Route.PUBLIC: [], Route.PEER: []}
        for sealed in delivery.keys:
            body = shared.deks.get(sealed.key_id)
            if (found := judge(sealed.key_id, body, own=state, held=held)) is not None:
                refused.setdefault(found[0], {})[sealed.key_id] = found[1]
            elif body is not None:
                arrivals[sealed.route].append(_arrival(sealed, body, delivery))
        self.refuse(sender, refused)
        failed = {key_id: why for keys in refused.values() for key_id, why in keys.items()}
        verified: list[str] = []
        for route, some in arrivals.items():
            if not some:
                continue
            made = await self._source.import_keys(kek, some, transport_key_file=self._transport_key_file)
            self._proofs.opened(made.keys)
            bad = {str(key_id): why for key_id, why in made.failed_keys.items()}
            self.refuse(sender, {Why.PARCEL: bad})
            failed |= bad
            stored = await self._keep(kek, made.keys, route)
            verified += stored
            left = {str(key.key_id) for key in made.keys} - set(stored)
            failed |= dict.fromkeys(left, "the signed rows have changed meanwhile")
        if verified:
            self._unopenable = (self._unopenable[0], self._unopenable[1] - set(verified))
            self._push({NetworkService.parse(shared.deks[key_id].service) for key_id in verified})
        return Stored(verified=tuple(verified), failed=failed)

    async def _held(self, kek_id: str, key_ids: Sequence[str]) -> set[str]:
        """Those with a sound wrap that the HSM has not failed to open."""
        sound = await self._registry.transact(lambda c: sound_among(c, kek_id, key_ids))
        return sound - (self._unopenable[1] if self._unopenable[0] == kek_id else frozenset())

    def refuse(self, sender: str, refused: Mapping[Why, Mapping[str, str]]) -> None:
        """*sender* has delivered these keys in vain, by reason: key and words."""
        for why, keys in refused.items():
            if keys:
                environment = self._peering.environment_of(sender)
                self.refusals.tell(sender, environment, why, next(iter(keys.values())), list(keys))

    async def _keep(self, kek: Kek, keys: Sequence[WrappedKey], route: Route) -> list[str]:
        now_ms = int(self._clock.wall_s() * 1000)
        own, kek_id = self._peering.environment, kek.reference.kek_id
        return await self._registry.transact(
            lambda c: (
                store_wraps(c, keys, route=route.value, now_ms=now_ms)
                if takes_keys(c, own, kek_id, HAVE_KEYS)  # not withdrawn meanwhile (rule 2)
                else []
            )
        )

    async def missing(self, look: Look) -> dict[str, str]:
        """Which keys have no sound wrap here, and why. KeySourceError: it cannot be told."""
        row = await self._registry.current_kek()
        if row is None or row.kek is None or row.reference.kek_id != look.kek_id:
            return dict.fromkeys(look.keys, f"{look.kek_id} is not the KEK of today")
        if row.state is not KekState.ACTIVE:
            return dict.fromkeys(look.keys, f"the KEK is {row.state}")
        sound = await self._registry.transact(lambda c: sound_wraps(c, look.kek_id))
        missing = {key_id: "there is no sound wrap" for key_id in look.keys if key_id not in sound}
        if look.prove:
            wanted = set(look.keys) - missing.keys()
            held = [
                key for key in await self._registry.wrapped_keys(look.kek_id) if str(key.key_id) in wanted
            ]
            failed = await self._proofs.unopenable(self._source, row.kek, held)
            missing |= {str(key_id): why for key_id, why in failed.items()}
            opened = wanted - {str(key_id) for key_id in failed}
            before = self._unopenable[1] if self._unopenable[0] == look.kek_id else frozenset[str]()
            self._unopenable = (look.kek_id, (before - opened) | {str(key_id) for key_id in failed})
        return missing


def all_of(delivery: Delivery, why: str) -> dict[str, str]:
    return {key.key_id: why for key in delivery.keys}


def _arrival(sealed: SealedKey, body: DekBody, delivery: Delivery) -> Arrival:
    owner = NetworkService.parse(body.service)
    return Arrival(
        parcel=parcel_of(sealed, owner, delivery.kek_id, delivery.environment),
        kcv=bytes.fromhex(body.kcv),
        use=body.use,
        algorithm=body.algorithm,
        version=body.version,
    )
