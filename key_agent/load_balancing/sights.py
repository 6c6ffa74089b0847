"""What the companion has to say of the agents that it asks: in the log when it changes, and to whoever asks.

1. Three things can be wrong with an agent: it is not reached, its rows are not believed, or they are old.
   Each has a cause, in words.
2. The log has a line when the word on an agent changes, not one for every look.
3. Nothing here is secret: names, states, positions, causes. `STATUS_QUESTION` can be no server's name.
"""

from collections.abc import Iterable
from enum import StrEnum
from typing import Final

import msgspec
import structlog

log = structlog.get_logger(__name__)

STATUS_QUESTION: Final = "?status"


class Word(StrEnum):
    UNASKED = "unasked"
    """Nothing was heard since this program began."""
    BELIEVED = "believed"
    UNREACHED = "unreached"
    DOUBTED = "doubted"
    """It answers, with rows that count for nothing here."""


class AgentSight(msgspec.Struct, frozen=True, kw_only=True):
    """One agent, as this program sees it."""

    agent: str
    word: Word
    cause: str | None = None
    heard_s: float | None = None
    """So long ago it was asked last with an answer that was believed; None: never."""


class ServerSight(msgspec.Struct, frozen=True, kw_only=True):
    """One server of HAProxy's."""

    server: str
    environment: str
    state: str | None
    """Of the environment, by the newest rows; None: it stands in none."""
    says: str | None
    """The server's own word; None: it is silent."""
    reason: str | None = None
    """Why, as it says."""
    answer: str


class LbStatus(msgspec.Struct, frozen=True, kw_only=True):
    """All of it, as `key-agent lb status` shows it."""

    load_balancer: str
    term: int
    epoch: int
    stale: str | None
    """Why the rows do not count as those of now, so that every server is down; None: they do."""
    agents: tuple[AgentSight, ...]
    servers: tuple[ServerSight, ...]


class AgentSights:
    """The newest word on each agent."""

    def __init__(self, agents: Iterable[str]) -> None:
        self._words: dict[str, tuple[Word, str | None]] = dict.fromkeys(agents, (Word.UNASKED, None))

    def note(self, agent: str, word: Word, cause: str | None = None) -> None:
        """*word* on *agent* from now on; logged if that is new."""
        before = self._words.get(agent)
        self._words[agent] = (word, cause)
        if before == (word, cause):
            return
        match word:
            case Word.DOUBTED:
                log.warning("an agent's rows are not believed", agent=agent, cause=cause)
            case Word.UNREACHED if before is None or before[0] is not Word.UNREACHED:
                log.warning("an agent is not reached", agent=agent, cause=cause)
            case Word.BELIEVED:
                log.info("an agent's rows are believed", agent=agent)
            case _:
                pass

    def word(self, agent: str) -> tuple[Word, str | None]:
        return self._words[agent]
