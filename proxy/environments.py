"""What a tenant's key agent says of the environment that this proxy belongs to, and what follows from it.

1. The word of an agent is for its own tenant alone, and comes by its mutual TLS. A newer position of the
   shared registry (term, epoch) replaces an older one; an older one changes nothing.
2. Unless the environment is active or draining, every request of the tenant is refused at once, whether it
   needs a key or not, and its keys are forgotten. No load balancer has to have noticed for that.
3. A proxy that is configured to belong to an environment (`[environment] name`) refuses until it was told of
   it, and takes no word about another one. Without that setting, a tenant of whom nothing was said is one of
   a single environment, and is served.
"""

from collections.abc import Callable, Iterable
from typing import Annotated, Final

import msgspec

from envelope.errors import SealgateError

SERVING: Final = frozenset({"active", "draining"})
RETRY_AFTER_S: Final = 2

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=63, pattern="^[a-z0-9-]*$")]
_Number = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class ForeignEnvironmentError(SealgateError):
    """The word is about an environment that this proxy does not belong to."""


class Word(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an agent says of its environment."""

    environment: _Name
    state: _Name
    reason: Annotated[str, msgspec.Meta(max_length=500)] | None = None
    term: _Number
    epoch: _Number

    @property
    def serves(self) -> bool:
        return self.state in SERVING

    @property
    def position(self) -> tuple[int, int]:
        return (self.term, self.epoch)


class Environments:
    """The words in force, by tenant. One event loop, no threads."""

    def __init__(self, name: str | None = None, *, on_refused: Callable[[str], None] | None = None) -> None:
        """*name*: the environment this proxy belongs to (rule 3). *on_refused*: is told of each tenant that
        stops being served."""
        self.name: Final = name
        self._on_refused = on_refused
        self._words: dict[str, Word] = {}

    def take(self, tenant: str, word: Word) -> Word:
        """The word in force afterwards. ForeignEnvironmentError (rule 3)."""
        if self.name is not None and word.environment != self.name:
            raise ForeignEnvironmentError(
                f"this proxy belongs to environment {self.name}, not to {word.environment}"
            )
        known = self._words.get(tenant)
        if known is not None and word.position < known.position and word.environment == known.environment:
            return known
        self._words[tenant] = word
        if not word.serves and self._on_refused is not None:
            self._on_refused(tenant)
        return word

    def word(self, tenant: str) -> Word | None:
        return self._words.get(tenant)

    def words(self) -> dict[str, Word]:
        """All of them, by tenant."""
        return dict(self._words)

    def refuses(self, tenant: str) -> bool:
        """Whether nothing of *tenant* is served here."""
        word = self._words.get(tenant)
        return self.name is not None if word is None else not word.serves

    def keep(self, tenants: Iterable[str]) -> None:
        """Forget what was said of others: they are not provisioned any more."""
        kept = set(tenants)
        for gone in self._words.keys() - kept:
            del self._words[gone]

    def line(self, tenants: Iterable[str]) -> str:
        """What HAProxy's agent-check is answered: the worst of *tenants* (load_balancing reads the same)."""
        worst = "up ready 100%"
        for tenant in sorted(tenants):
            word = self._words.get(tenant)
            if self.refuses(tenant):
                return f"down #{'untold' if word is None else word.state}\n"
            if word is not None and word.state == "draining":
                worst = "drain"
        return f"{worst}\n"
