"""Which key an environment's proxies seal with, of the keys that all environments have.

1. In the signed rows each environment has an active key of its own in every ring. A proxy knows one that
   seals: `own` the environment's own, `origin` that of the service's home environment, `pinned` a named one.
2. Every other active key opens there: to the proxies it is deactivated. States that take away stay as they
   are; none is presented with more than it has.
3. Where the policy's key is not active (compromised, its successor on its way) another environment's active
   key seals rather than none: the environment's own, then the tenant's home environment's, then the first by
   name. So a breach of one key stops no service.
4. Only what has a verified wrap here can be presented; what has none is not asked about.
5. A compromised key that two administrators have let rescue objects opens, until that ends; it never seals.
   A signing key stays compromised whatever its row says: deactivated, its signatures would count again.
"""

from collections.abc import Mapping, Sequence

from envelope.keys import KeyState, KeyUse
from key_agent.environments.shared.documents import EncryptPolicy
from key_agent.environments.shared.shared_view import Shared
from key_agent.registry.model import HeldKey


def present(
    shared: Shared, environment: str, service: str, keys: Sequence[HeldKey]
) -> Mapping[str, KeyState]:
    """The state in which *environment* pushes each of *keys*, all of *service*; by key id."""
    states = {key.key_id: key.state for key in keys}
    active: dict[str, dict[str, str]] = {}
    for key in keys:
        if key.state is KeyState.ACTIVE:
            active.setdefault(key.ring, {})[key.owner_environment] = key.key_id
    for by_owner in active.values():
        sealing = chosen(shared, environment, service, by_owner)
        for key_id in by_owner.values():
            if key_id != sealing:
                states[key_id] = KeyState.DEACTIVATED
    return states


def rescued(shared: Shared, states: Mapping[str, KeyState], *, now_ms: int) -> Mapping[str, KeyState]:
    """*states* with rule 5 applied at *now_ms*."""
    found = dict(states)
    for key_id, state in states.items():
        body = shared.deks.get(key_id)
        if (
            state is KeyState.COMPROMISED
            and body is not None
            and body.state is KeyState.COMPROMISED
            and body.use is KeyUse.DATA
            and now_ms < (body.rescue_until_ms or 0)
        ):
            found[key_id] = KeyState.DEACTIVATED
    return found


def chosen(shared: Shared, environment: str, service: str, by_owner: Mapping[str, str]) -> str:
    """The one of a ring's active keys, at least one, that *environment* seals *service* with (rules 1, 3).

    *by_owner*: their ids by the environment that owns each.
    """
    body = shared.services.get(service)
    home = shared.tenant.home_environment if shared.tenant is not None else environment
    if (
        body is not None
        and body.encrypt_policy is EncryptPolicy.PINNED
        and body.pinned_dek in by_owner.values()
    ):
        return str(body.pinned_dek)
    preferred = [environment, home]
    if body is not None and body.encrypt_policy is EncryptPolicy.ORIGIN:
        preferred = [body.home_environment or home, environment, home]
    for owner in (*preferred, min(by_owner)):
        if owner in by_owner:
            return by_owner[owner]
    raise AssertionError("unreachable: the first by name is one of them")
