"""A store in memory behind the production interface of re-encryption: objects, their keys, and faults."""

import itertools
from collections.abc import AsyncIterator, Callable
from typing import override

from envelope.keys import KeyId
from key_agent.reencryption.connector import Connector, Found, Rewrite, StoreError


class MemoryStore(Connector):
    """*today*: the key that seals now."""

    def __init__(self, today: KeyId) -> None:
        self.today = today
        self.objects: dict[str, tuple[KeyId | None, int]] = {}
        self.rewrites: dict[str, int] = {}
        """How often each was rewritten."""
        self.refused: dict[str, str] = {}
        self.says: dict[str, tuple[Rewrite, bool]] = {}
        """What is answered to a write, and whether it was done."""
        self.before_write: Callable[[str], None] | None = None
        """Somebody else's hand, between reading and writing."""
        self.silent = False
        self._versions = itertools.count(1)

    def put(self, name: str, key_id: KeyId | None) -> None:
        self.objects[name] = (key_id, next(self._versions))

    @override
    async def names(self, *, after: str) -> AsyncIterator[str]:
        self._speak()
        for name in sorted(self.objects):
            if name > after:
                yield name

    @override
    async def look(self, name: str) -> Found | None:
        self._speak()
        if (kept := self.objects.get(name)) is None:
            return None
        return Found(name=name, key_id=kept[0], version=f'"{kept[1]}"')

    @override
    async def rewrite(self, found: Found) -> tuple[Rewrite, str]:
        self._speak()
        if self.before_write is not None:
            self.before_write(found.name)
        if (why := self.refused.get(found.name)) is not None:
            return Rewrite.REFUSED, why
        if (kept := self.objects.get(found.name)) is None:
            return Rewrite.GONE, "it is gone"
        if f'"{kept[1]}"' != found.version:
            return Rewrite.CHANGED, "it was changed meanwhile"
        says, is_done = self.says.get(found.name, (Rewrite.DONE, True))
        if is_done:
            self.put(found.name, self.today)
            self.rewrites[found.name] = self.rewrites.get(found.name, 0) + 1
        return says, "" if says is Rewrite.DONE else f"it says {says}"

    @override
    async def close(self) -> None:
        """Nothing is held."""

    def _speak(self) -> None:
        if self.silent:
            raise StoreError("the store was told to be silent")
