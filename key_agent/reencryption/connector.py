"""Where stored objects are found and rewritten under today's key: one interface before every kind of store.

1. The plaintext passes through memory only. A connector reads and writes through the enterprise's own proxy,
   as any client does: what opens and what seals is decided there.
2. Nobody's change is lost: an object is replaced only if it still is the one that was read.
3. What cannot be done now is an error of the store; what is wrong with one object is a value.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum

from envelope.keys import KeyId
from key_agent.errors import KeyAgentError


class StoreError(KeyAgentError):
    """The store or the proxy gives no answer that helps: try again later, from where it stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An object as the store has it."""

    name: str
    key_id: KeyId | None
    """The key that sealed it; None: nobody of ours did."""
    version: str
    """Of exactly these bytes: a strong entity tag."""


class Rewrite(StrEnum):
    DONE = "done"
    CHANGED = "changed"
    """Somebody else wrote it meanwhile: look again."""
    UNANSWERED = "unanswered"
    """It was sent, and no answer came: look again whether it was written."""
    GONE = "gone"
    REFUSED = "refused"
    """It cannot be read, or not be written, as it is."""


class Connector(ABC):
    @abstractmethod
    def names(self, *, after: str) -> AsyncIterator[str]:
        """Names of the store's objects in ascending order, those after *after* alone; none is left out.

        StoreError, also where one cannot be named.
        """

    @abstractmethod
    async def look(self, name: str) -> Found | None:
        """The object; None: it is gone. StoreError."""

    @abstractmethod
    async def rewrite(self, found: Found) -> tuple[Rewrite, str]:
        """Read it and write it again, if it still is *found*; and why, where that was refused. StoreError."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of the store. Idempotent."""
