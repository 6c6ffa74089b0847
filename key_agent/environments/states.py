"""What an environment is at this moment, and what may become of it (docs/environments.md, "States").

1. A state says what the environment's proxies, its agent and the load balancer do; nothing else decides it.
2. From `healing` there is one road back: healed, rejoining, active. Nothing that is unreachable changes
   state by that: being unreachable is an observation.
3. In doubt the more restrictive of two states holds (`restrictiveness`).
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from envelope.errors import MisuseError
from envelope.keys import KeyState


class EnvironmentState(StrEnum):
    PROVISIONING = "provisioning"
    """Named by the manager; its agent has not joined yet."""
    JOINING = "joining"
    """Its agent has joined and is getting the keys."""
    ACTIVE = "active"
    DRAINING = "draining"
    """Finishes what it has begun, opens objects, takes no new work."""
    HEALING = "healing"
    """Not to be trusted: nothing is served, nothing pushed."""
    HEALED = "healed"
    """Whoever runs it says that it is sound again."""
    REJOINING = "rejoining"
    """Its keys are being stored and proven anew."""
    RETIRED = "retired"

    @property
    def serves(self) -> bool:
        """Whether its proxies take new requests and its agent pushes keys."""
        return self is EnvironmentState.ACTIVE

    @property
    def pushes(self) -> bool:
        return self in (EnvironmentState.ACTIVE, EnvironmentState.DRAINING)

    @property
    def counts(self) -> bool:
        """Whether it is not withdrawn: keys wait for its proof, and its word counts for a lease."""
        return self in (EnvironmentState.ACTIVE, EnvironmentState.DRAINING)


HAVE_KEYS: Final = frozenset(
    {
        EnvironmentState.JOINING,
        EnvironmentState.ACTIVE,
        EnvironmentState.DRAINING,
        EnvironmentState.REJOINING,
    }
)
"""In these an environment is sent every key, and stores what it is sent."""


class EnvironmentEvent(StrEnum):
    JOINED = "joined"
    KEYS_PROVEN = "keys-proven"
    """Every live key has a verified wrap there, and the canary is open."""
    DRAINED = "drained"
    UNDRAINED = "undrained"
    WITHDRAWN = "withdrawn"
    """An incident, its own word, or keys that could not be proven."""
    ATTESTED = "attested"
    """Its operator's statement, with what the kind of incident demands."""
    ADMITTED = "admitted"
    """Every live load balancer has acknowledged that healing is over (system B, claim 7)."""
    RETIRED = "retired"


_TABLE: Final[Mapping[tuple[EnvironmentState, EnvironmentEvent], EnvironmentState]] = {
    (EnvironmentState.PROVISIONING, EnvironmentEvent.JOINED): EnvironmentState.JOINING,
    (EnvironmentState.JOINING, EnvironmentEvent.JOINED): EnvironmentState.JOINING,
    (EnvironmentState.JOINING, EnvironmentEvent.KEYS_PROVEN): EnvironmentState.ACTIVE,
    (EnvironmentState.ACTIVE, EnvironmentEvent.DRAINED): EnvironmentState.DRAINING,
    (EnvironmentState.DRAINING, EnvironmentEvent.UNDRAINED): EnvironmentState.REJOINING,
    (EnvironmentState.HEALING, EnvironmentEvent.ATTESTED): EnvironmentState.HEALED,
    (EnvironmentState.HEALED, EnvironmentEvent.ADMITTED): EnvironmentState.REJOINING,
    (EnvironmentState.REJOINING, EnvironmentEvent.KEYS_PROVEN): EnvironmentState.ACTIVE,
    **{
        (state, EnvironmentEvent.WITHDRAWN): EnvironmentState.HEALING
        for state in EnvironmentState
        if state is not EnvironmentState.RETIRED
    },
    **{
        (state, EnvironmentEvent.RETIRED): EnvironmentState.RETIRED
        for state in EnvironmentState
        if state is not EnvironmentState.ACTIVE
    },
}


def follow_environment(state: EnvironmentState, event: EnvironmentEvent) -> EnvironmentState:
    """The state after *event*. MisuseError if it has no place there."""
    after = _TABLE.get((state, event))
    if after is None:
        raise MisuseError(f"an environment that is {state} cannot be {event}")
    return after


# Of states that a key can have, the later the more restrictive.
_RESTRICTIVENESS: Final[tuple[KeyState, ...]] = (
    KeyState.PRE_ACTIVE,
    KeyState.ACTIVE,
    KeyState.DEACTIVATED,
    KeyState.SUSPENDED,
    KeyState.COMPROMISED,
    KeyState.DESTROYED,
)


def restrictiveness(state: KeyState) -> int:
    """To compare: in doubt the higher one holds."""
    return _RESTRICTIVENESS.index(state)
