"""Which of the keys that another environment delivers are taken in, and where it stands who sent the others.

1. Nothing in a delivery says when it was made: each can be one that was sent before, by whoever once sent or
   saw it. So what is taken in follows from what this environment lacks now, never from what it is sent.
2. It lacks a key of the signed rows that has no sound wrap under the KEK of today, or one that the HSM did
   not open when it was last asked. Where it serves, it lacks live keys alone: one that was compromised is
   taken in by an environment that joins or returns, for a rescue (presented.py, rule 5). A destroyed key
   is taken in by nobody.
3. What is not lacked is not shown to the HSM: a delivery that is played again costs a look at the database.
4. Each refusal is an audit event that names the agent which sent it. The first of an agent and a reason is
   written at once; the same within QUIET_S is counted, and the count written: nobody fills the log.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NoReturn

import structlog

from envelope.keys import KeyState
from key_agent.environments.changes.key_changes import LIVE
from key_agent.environments.shared.documents import DekBody
from key_agent.environments.states import EnvironmentState
from key_agent.journal import Journal, Value
from runtime.clock import Clock

log = structlog.get_logger(__name__)

QUIET_S: Final = 60.0
HELD: Final = "it has a sound wrap there"
"""What a sender is told of a key that is not lacked: an answer to it was lost, or it never asked."""


class Why(StrEnum):
    """Why keys were not taken in."""

    SENDER = "sender"
    """Its environment does not count."""
    STATE = "state"
    """This environment takes none: it heals, or is not one of several."""
    DESTINATION = "destination"
    """For another environment, or another KEK than the one of today."""
    UNKNOWN = "unknown"
    """The signed rows know no such key."""
    KEY_STATE = "key-state"
    """Destroyed; or compromised, and this environment serves."""
    HELD = "held"
    """It is here already."""
    PARCEL = "parcel"
    """It does not open for this key and this place, or is not what the signed rows say."""


def judge(
    key_id: str, body: DekBody | None, *, own: EnvironmentState, held: Collection[str]
) -> tuple[Why, str] | None:
    """Why this key is not lacked here, and in words; None if it is (rule 2).

    *body*: its signed row. *own*: the state of this environment. *held*: keys with a wrap that opens.
    """
    if body is None:
        return Why.UNKNOWN, "the signed rows know no such key"
    if body.state is KeyState.DESTROYED or (own is EnvironmentState.ACTIVE and body.state not in LIVE):
        return Why.KEY_STATE, str(body.state)
    if key_id in held:
        return Why.HELD, HELD
    return None


@dataclass(slots=True)
class _Told:
    """What an agent was refused for one reason."""

    at_boot_s: float
    deliveries: int = 0
    """Not written yet; so are their keys, and what the last one was told."""
    keys: int = 0
    kid: str | None = None
    detail: str = ""


class Refusals:
    """Rule 4."""

    def __init__(self, journal: Journal, clock: Clock) -> None:
        self._journal = journal
        self._clock = clock
        self._told: dict[tuple[str, str | None, Why], _Told] = {}

    def tell(
        self, agent_id: str, environment: str | None, why: Why, detail: str, key_ids: Sequence[str]
    ) -> None:
        """*agent_id*, of that environment or of none, has delivered these in vain."""
        about = (agent_id, environment, why)
        told = self._told.get(about)
        if told is not None and self._clock.boot_s() - told.at_boot_s < QUIET_S:
            told.deliveries += 1
            told.keys += len(key_ids)
            told.kid, told.detail = next(iter(key_ids), None), detail
            return
        self._flush(about)
        now_s, kid = self._clock.boot_s(), next(iter(key_ids), None)
        self._told[about] = _Told(at_boot_s=now_s)
        self._write(about, _Told(now_s, deliveries=1, keys=len(key_ids), kid=kid, detail=detail))

    async def run(self) -> NoReturn:
        """Until cancelled: what was counted is written when its time is over."""
        while True:
            await self._clock.sleep(QUIET_S)
            for about, told in list(self._told.items()):
                if self._clock.boot_s() - told.at_boot_s >= QUIET_S:
                    self._flush(about)

    def _flush(self, about: tuple[str, str | None, Why]) -> None:
        told = self._told.pop(about, None)
        if told is not None and told.deliveries:
            self._write(about, told)

    def _write(self, about: tuple[str, str | None, Why], told: _Told) -> None:
        agent_id, environment, why = about
        facts: dict[str, Value] = {
            "agent": agent_id,
            "environment": environment,
            "reason": why.value,
            "detail": told.detail[:200],
            "deliveries": told.deliveries,
            "wraps": told.keys,
            "kid": told.kid,
        }
        log.warning("keys that were delivered are not taken in", **facts)
        self._journal.note("wraps-refused", outcome="refused", **facts)
