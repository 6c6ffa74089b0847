"""Stored objects that name no key: which of the service's keys it is (docs/format.md 6.4).

1. The keys that may open are those of this tenant and service alone: the active one, then the newest, at most
   MAX_CANDIDATES. Their commitments are compared, all of them, in constant time; no tag is ever tried.
2. An object that names a key is opened by that key. There is no trying for it, nor for parts of a composite.
3. The search is recorded with the number of keys tried, whatever came of it, and so is the use of the key.
"""

from collections.abc import Buffer, Callable
from typing import Final

from envelope.errors import Unavailable
from envelope.keys import NetworkService
from envelope.objects import MAX_CANDIDATES, Candidate, matching
from proxy.keys.cache import KeyCache
from proxy.keys.data_key import DataKey, unavailable

type Tried = Callable[[int], None]
"""Is told how many keys are tried; AuditUnavailableError: they must not be."""
type Use = Callable[[DataKey], None]
"""Is told which key it is, before anything is done with it. AuditUnavailableError."""


class AnonymousKeys:
    """The keys of *owner*, while one object of its is looked at."""

    def __init__(self, keys: KeyCache, owner: NetworkService, *, tried: Tried, use: Use) -> None:
        self._keys: Final = keys
        self._owner: Final = owner
        self._tried: Final = tried
        self._use: Final = use
        self._found: list[DataKey] = []

    def candidates(self) -> list[Candidate]:
        """KeyUnavailableError if there is no key that may open. AuditUnavailableError."""
        self._found = self._keys.candidates(self._owner)[:MAX_CANDIDATES]
        if not self._found:
            self._keys.sealing_key(self._owner)  # says why: withdrawn, suspended, expired
            raise unavailable(Unavailable.EXPIRED, self._owner, None)
        self._tried(len(self._found))
        return [candidate(key) for key in self._found]

    def found(self, place: int) -> DataKey:
        """The candidate at *place*, its use recorded. KeyUnavailableError if it has ended."""
        key = self._found[place]
        key.check()
        self._use(key)
        return key

    def of(self, prefix: Buffer) -> DataKey:
        """The key of the object that begins with *prefix*, 88 bytes; its use recorded.

        IntegrityError, FormatError if it is none's. Others as `candidates`.
        """
        return self.found(matching(prefix, self.candidates()))


def candidate(key: DataKey) -> Candidate:
    """KeyUnavailableError when it has ended."""
    return Candidate(key.owner, key.anonymous_object_key)
