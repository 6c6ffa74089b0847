"""Life of a KEK and of a rotation in the registry. (A data key's life is `envelope.keys.TRANSITIONS`.)

1. Only an active KEK's keys are pushed.
2. `suspended` ends by itself when the token is back; `revoked` and `destroyed` end by `reinstate` alone.
3. `deactivated` gave way to a newer KEK. Its wraps stay: if the key returns to the HSM, `reinstate
   --restore` moves them to the KEK of today.
4. `retired` gave its keys to another KEK, and is gone from the HSM for good.
5. A KEK that follows one that works is `staged` until every key is wrapped by it as well; then both change
   places in one transaction. So there is always exactly one KEK that pushes.
6. A rotation ends `done` or `cancelled`; only one that has activated nothing yet can be cancelled.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from envelope.errors import MisuseError

REVOKED_BY_COMMAND: Final = "revoked by the administrator"
"""Why a KEK is revoked, if not by a proof from the HSM."""


class KekState(StrEnum):
    PRE_ACTIVE = "pre-active"
    """Named, maybe half-made in the HSM; a crash leaves at most this."""
    STAGED = "staged"
    """Made, and taking over: keys are being wrapped by it beside the current KEK."""
    ACTIVE = "active"
    SUSPENDED = "suspended"
    """The token was emptied or exchanged: withdrawn, resumes once it is back."""
    REVOKED = "revoked"
    """Proven disabled, destroyed, expired or replaced in the HSM, or taken back by an operator: sticky."""
    DEACTIVATED = "deactivated"
    RETIRED = "retired"
    """Nothing is wrapped by it any more, and the HSM showed no such key: the end."""
    DESTROYED = "destroyed"
    """Destroyed by this agent's own command, and the HSM showed no such key afterwards."""

    @property
    def is_withdrawn(self) -> bool:
        """The enterprise took it back: no key under it may be at any proxy."""
        return self in (KekState.SUSPENDED, KekState.REVOKED, KekState.DESTROYED)

    @property
    def is_sticky(self) -> bool:
        """Ends by `reinstate` alone."""
        return self in (KekState.REVOKED, KekState.DESTROYED)


_S = KekState
TRANSITIONS: Final[Mapping[KekState, frozenset[KekState]]] = {
    _S.PRE_ACTIVE: frozenset({_S.ACTIVE, _S.STAGED, _S.RETIRED, _S.DESTROYED}),
    # To retired: the rotation was given up, or the KEK before it was taken back meanwhile.
    _S.STAGED: frozenset({_S.ACTIVE, _S.RETIRED}),
    # To deactivated: a staged one took over.
    _S.ACTIVE: frozenset({_S.SUSPENDED, _S.REVOKED, _S.DEACTIVATED, _S.DESTROYED}),
    # To deactivated: the token will not come back, the operator said `reinstate`.
    _S.SUSPENDED: frozenset({_S.ACTIVE, _S.REVOKED, _S.DEACTIVATED, _S.DESTROYED}),
    # To active: the key returned to the HSM, proven, and the operator said `reinstate --restore`.
    _S.REVOKED: frozenset({_S.ACTIVE, _S.DEACTIVATED, _S.DESTROYED}),
    _S.DESTROYED: frozenset({_S.ACTIVE, _S.DEACTIVATED}),
    _S.DEACTIVATED: frozenset({_S.RETIRED}),
    _S.RETIRED: frozenset(),
}


def check_transition(old: KekState, new: KekState) -> None:
    """MisuseError if a KEK may not go from *old* to *new*."""
    if new not in TRANSITIONS[old]:
        raise MisuseError(f"a KEK does not go from {old} to {new}")


class RotationPhase(StrEnum):
    DISTRIBUTING = "distributing"
    """The new key is pushed pre-active: it opens, and seals nothing yet."""
    ACTIVATED = "activated"
    """The new key seals, the old one only opens; that is being pushed."""
    DONE = "done"
    CANCELLED = "cancelled"
    """Before anything was sealed by the new key; it is destroyed."""

    @property
    def is_open(self) -> bool:
        return self in (RotationPhase.DISTRIBUTING, RotationPhase.ACTIVATED)


_P = RotationPhase
ROTATION_TRANSITIONS: Final[Mapping[RotationPhase, frozenset[RotationPhase]]] = {
    _P.DISTRIBUTING: frozenset({_P.ACTIVATED, _P.CANCELLED}),
    _P.ACTIVATED: frozenset({_P.DONE}),
    _P.DONE: frozenset(),
    _P.CANCELLED: frozenset(),
}
