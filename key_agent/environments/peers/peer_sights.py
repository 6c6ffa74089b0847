"""What is known of the agents of other environments, for people and load balancers."""

from dataclasses import dataclass, replace
from typing import Final

import structlog

from key_agent.environments.peers.heartbeats import Heartbeat
from key_agent.environments.peers.peer_transport import PeerError
from key_agent.environments.shared.registry_lease import Position

log = structlog.get_logger(__name__)

_NEW_SHARE: Final = 0.3
"""Of the last answer's time in the time that is shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What is known of another environment's agent."""

    answers: bool
    since_ms: int
    position: Position | None = None
    digest: str | None = None
    state: str | None = None
    """As it acts itself."""
    latency_s: float | None = None
    error: str | None = None


class Sights(dict[str, Sight]):
    """By environment."""

    def heard(self, name: str, beat: Heartbeat, *, latency_s: float, now_ms: int) -> None:
        """It has answered."""
        before, since_ms = self.get(name), now_ms
        if before is not None and before.answers:
            since_ms = before.since_ms
        else:
            log.info("an environment answers", peer=name)
        if before is not None and before.latency_s is not None:
            latency_s = (1 - _NEW_SHARE) * before.latency_s + _NEW_SHARE * latency_s
        self[name] = Sight(
            answers=True,
            since_ms=since_ms,
            position=Position(beat.term, beat.epoch),
            digest=beat.digest,
            state=beat.state,
            latency_s=latency_s,
        )

    def failed(self, name: str, error: PeerError, *, now_ms: int) -> None:
        """It does not answer, or does not do what it was asked."""
        before = self.get(name)
        if before is None or before.answers:
            log.warning("an environment does not answer", peer=name, cause=str(error))
        known = before or Sight(answers=False, since_ms=now_ms)
        self[name] = replace(
            known,
            answers=False,
            since_ms=known.since_ms if not known.answers else now_ms,
            latency_s=None,
            error=str(error),
        )

    def stands(self, name: str, position: Position) -> None:
        """It has acknowledged that it is there."""
        if (known := self.get(name)) is not None:
            self[name] = replace(known, answers=True, position=position, error=None)
