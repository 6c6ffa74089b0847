"""Keys of the first environment that comes back when none counts: from its own wraps, under its new KEK.

1. Nobody can bring keys then. Two administrators have named this environment and both KEKs (recovery.py); it
   has healed, the load balancers have confirmed that, and it rejoins. Without all of that nothing is opened,
   and where it ends halfway nothing more is, or stored.
2. The KEK of before unwraps for this alone. What it opens is compared with the check values of the signed
   rows, wrapped by the KEK of now, opened again there and compared; only then it is stored, as verified.
3. What was stored stays: killed at any point, `env rejoin` goes on with what is missing.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import batched
from typing import Final

from key_agent.environments.keys.proofs import Proofs
from key_agent.environments.keys.wrap_messages import BATCH, Stored
from key_agent.environments.peers.peering import Peering
from key_agent.environments.shared.recovery import Recovery, appointed, none_counts
from key_agent.environments.shared.shared_view import Shared
from key_agent.environments.states import EnvironmentState
from key_agent.journal import Journal
from key_agent.registry.access import RefusedChangeError
from key_agent.registry.states import KekState
from key_agent.registry.store import Registry
from key_agent.registry.wrap_rows import store_wraps, takes_keys
from key_agent.sources.source import Kek, KeySource, WrappedKey
from runtime.clock import Clock

NO_WRAP: Final = "it has no wrap here"
_CHANGED: Final = "the signed rows have changed meanwhile"
_TAKES: Final = frozenset({EnvironmentState.REJOINING})
_ROUTE: Final = "kms"
"""Wrapped by the environment's own HSM, from a key that it has opened."""


class OwnWraps:
    def __init__(
        self,
        *,
        peering: Peering,
        registry: Registry,
        source: KeySource,
        proofs: Proofs,
        journal: Journal,
        clock: Clock,
    ) -> None:
        self._peering = peering
        self._registry = registry
        self._source = source
        self._proofs = proofs
        self._journal = journal
        self._clock = clock

    async def take(self, key_ids: Collection[str]) -> Stored:
        """What became of these keys, which have no sound wrap under the KEK of now.

        KeySourceError: one of both KEKs does not open; what was stored before stays. RegistryError.
        """
        shared = await self._peering.shared.snapshot()
        recovery = self._approved(shared)
        old_kek_id = None if recovery is None else recovery.succession.old_kek
        if recovery is None or old_kek_id is None:
            why = (
                f"{NO_WRAP}: `key-agent env recovery`"
                if recovery is None and none_counts(shared)
                else NO_WRAP
            )
            return Stored(verified=(), failed=dict.fromkeys(key_ids, why))
        old, new = await self._keks(recovery, old_kek_id)
        await self._journal.record(
            "env-recover",
            outcome="rewrapping",
            environment=recovery.environment,
            old_kek=old_kek_id,
            kek=new.reference.kek_id,
            keys=len(key_ids),
            approval=recovery.approval,
        )
        held = {
            str(key.key_id): replace(key, kcv=bytes.fromhex(shared.deks[str(key.key_id)].kcv))
            for key in await self._registry.wrapped_keys(old_kek_id)
            if str(key.key_id) in shared.deks
        }
        done = Stored(verified=(), failed={key_id: NO_WRAP for key_id in key_ids if key_id not in held})
        for some in batched([held[key_id] for key_id in key_ids if key_id in held], BATCH):
            if self._approved(await self._peering.shared.snapshot()) != recovery:
                done |= Stored(verified=(), failed=dict.fromkeys((str(key.key_id) for key in some), _CHANGED))
                continue
            made = await self._source.rewrap(old, new, some)
            self._proofs.opened(made.keys)
            stored = await self._store(new, made.keys)
            failed = {str(key_id): why for key_id, why in made.failed_keys.items()}
            left = {str(key.key_id) for key in made.keys} - set(stored)
            failed |= dict.fromkeys(left, _CHANGED)
            done |= Stored(verified=tuple(stored), failed=failed)
        return done

    async def _store(self, new: Kek, keys: Sequence[WrappedKey]) -> list[str]:
        now_ms = int(self._clock.wall_s() * 1000)
        own, kek_id = self._peering.environment, new.reference.kek_id
        return await self._registry.transact(
            lambda c: (
                store_wraps(c, keys, route=_ROUTE, now_ms=now_ms)
                if takes_keys(c, own, kek_id, _TAKES)
                else []
            )
        )

    def _approved(self, shared: Shared) -> Recovery | None:
        """Rule 1."""
        recovery, own = appointed(shared), shared.environments.get(self._peering.environment)
        if recovery is None or own is None or recovery.environment != self._peering.environment:
            return None
        return recovery if own.state is EnvironmentState.REJOINING else None

    async def _keks(self, recovery: Recovery, old_kek_id: str) -> tuple[Kek, Kek]:
        """The KEK of before and that of now. RefusedChangeError: they are not those that were approved."""
        rows = {row.reference.kek_id: row for row in await self._registry.keks()}
        current = await self._registry.current_kek()
        old = rows.get(old_kek_id)
        if old is None or old.kek is None:
            raise RefusedChangeError(
                f"this registry has no KEK {old_kek_id}", "`key-agent env recovery` with another one"
            )
        if (
            current is None
            or current.kek is None
            or current.state is not KekState.ACTIVE
            or current.reference.kek_id != recovery.succession.new_kek
        ):
            raise RefusedChangeError(
                f"KEK {recovery.succession.new_kek} was approved, and is not the one of now",
                "`key-agent env recovery` with the one of now",
            )
        return old.kek, current.kek
