"""How long an environment may go on without having heard of what the others decided. Pure: time is an
argument, in seconds on the boot clock.

1. An environment whose registry another one may have overtaken must stop: its keys may be disabled and it
   would not know. It goes on for a lease (300 s; 60 s where a service is strict) from its last *proof*.
2. A proof is to have heard, by answers to own questions, from a majority of the environments that count:
   those that are not withdrawn (healing, retired ...), itself among them. It dates from the oldest question
   of those that make the majority.
3. Half of them are enough if the manager's is one: with two environments, the manager's outlives the other.
4. To have heard from the manager is worth what the manager's own proof is worth: its age is taken off.
5. Nothing counts while somebody is known to have a newer registry than ours: first it is applied.
6. A manager that an election proves (leadership.py) is proven by that too.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final, NamedTuple

NEVER_S: Final = float("-inf")


class Position(NamedTuple):
    """How new a registry is: the term first."""

    term: int
    epoch: int


_NOTHING: Final = Position(0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """Who counts, as the own registry says."""

    own: str
    counted: frozenset[str]
    """Environments that are not withdrawn; the own one only if it is among them."""
    manager: str | None
    """The environment of the agent that holds the newest term."""


@dataclass(frozen=True, slots=True)
class _Heard:
    asked_boot_s: float
    proven_boot_s: float
    """Rule 4: what the sender's own proof is worth, on our clock."""


@dataclass(slots=True)
class RegistryLease:
    """What was heard. `proven_boot_s` of `Members` says what follows from it."""

    own_position: Position = _NOTHING
    _claims: dict[str, Position] = field(default_factory=dict)
    """What each was heard to have."""
    _counts: dict[str, _Heard] = field(default_factory=dict)
    _waits: dict[str, _Heard] = field(default_factory=dict)
    """Heard while the own registry was behind (rule 5)."""
    _elected_boot_s: float = NEVER_S

    def heard(
        self, environment: str, position: Position, *, asked_boot_s: float, proven_ago_s: float | None
    ) -> None:
        """*environment*, which counts, answered the question of *asked_boot_s*; it stands at *position*."""
        proven_boot_s = NEVER_S if proven_ago_s is None else asked_boot_s - max(0.0, proven_ago_s)
        self._waits[environment] = _Heard(asked_boot_s, proven_boot_s)
        self._claims[environment] = position
        self._take()

    def forget(self, environment: str) -> None:
        """It counts no more, or cannot show what it says that it has: one breached environment must not stop
        the others by a lie.
        """
        self._claims.pop(environment, None)
        self._waits.pop(environment, None)
        self._take()

    def applied(self, position: Position) -> None:
        """The own registry stands at *position* now."""
        self.own_position = position
        self._take()

    def elected(self, proven_boot_s: float | None) -> None:
        """When the own leadership was last proven by an election; None: it is not."""
        self._elected_boot_s = NEVER_S if proven_boot_s is None else proven_boot_s

    @property
    def is_behind(self) -> bool:
        return self.own_position < self.newest

    @property
    def newest(self) -> Position:
        """The newest that anybody has, as far as is known."""
        return max(self._claims.values(), default=_NOTHING)

    def _take(self) -> None:
        if not self.is_behind:
            self._counts.update(self._waits)
            self._waits.clear()

    def proven_boot_s(self, members: Members, now_boot_s: float) -> float:
        """The moment of the last proof; NEVER_S without any."""
        if members.own not in members.counted or (self.is_behind and not self._counts):
            return NEVER_S
        others = {
            name: self._counts[name] for name in members.counted - {members.own} if name in self._counts
        }
        proofs = [self._by_majority(members, others, now_boot_s)]
        if members.manager == members.own:
            proofs.append(self._elected_boot_s)
        elif members.manager in members.counted and members.manager in others:
            proofs.append(others[members.manager].proven_boot_s)
        return max(proofs)

    def _by_majority(self, members: Members, others: dict[str, _Heard], now_boot_s: float) -> float:
        size = len(members.counted)
        # The own voice is as new as the own registry is known to be: old while it is behind.
        own_s = NEVER_S if self.is_behind else now_boot_s
        times = {name: heard.asked_boot_s for name, heard in others.items()}
        if size == 1:
            return own_s
        found = _newest(times.values(), size // 2)
        if size % 2 == 0 and members.manager in members.counted:
            if members.manager == members.own:
                found = max(found, _newest(times.values(), size // 2 - 1, none_s=own_s))
            elif members.manager in times:
                manager_s = times.pop(members.manager)
                found = max(found, min(manager_s, _newest(times.values(), size // 2 - 2, none_s=manager_s)))
        return min(found, now_boot_s)


def _newest(times: Collection[float], count: int, *, none_s: float = NEVER_S) -> float:
    """The oldest of the *count* newest; *none_s* if none are needed, NEVER_S if there are not so many."""
    if count <= 0:
        return none_s
    ordered = sorted(times, reverse=True)
    return ordered[count - 1] if len(ordered) >= count else NEVER_S
