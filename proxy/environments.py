"""What a tenant's key agent says of the environment that this proxy belongs to, and what follows from it.

1. The word of an agent is for its own tenant alone, and comes by its mutual TLS. One agent speaks for the
   environment: the one that the settings name for the tenant, or the first that did since the start. Another
   environment's agent, breached or not, says nothing here.
2. A word that restricts is in force at once. One that frees must not be older (term, epoch of the shared
   registry) than what was said in the last STICKS_S: requests can overtake each other, not for longer. So no
   position, however high, is in the way of what the same agent says a minute later.
3. Unless the environment is active or draining, every request of the tenant is refused at once, whether it
   needs a key or not, and its keys are forgotten. No load balancer has to have noticed for that.
4. A proxy that is configured to belong to an environment (`[environment] name`) refuses until it was told of
   it, and takes no word about another one. Without that setting, a tenant of whom nothing was said is one of
   a single environment, and is served.
5. With that setting keys come from the agent that speaks, and from no other one: the agent of a breached
   environment has certificates that are good, and could bring keys that it knows, or take all back.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec

from envelope.errors import SealgateError

SERVING: Final = frozenset({"active", "draining"})
RETRY_AFTER_S: Final = 2
STICKS_S: Final = 60.0
"""Longer than any request of an agent can be under way."""

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=63, pattern="^[a-z0-9-]*$")]
_Number = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class ForeignEnvironmentError(SealgateError):
    """The word is about an environment that this proxy does not belong to."""


class ForeignAgentError(SealgateError):
    """The word is of an agent that does not speak for this proxy's environment."""


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


@dataclass(frozen=True, slots=True)
class _Said:
    """Who speaks for a tenant's environment, and how new the newest was that it has said."""

    agent: str
    position: tuple[int, int]
    at_boot_s: float


class Environments:
    """The words in force, by tenant. One event loop, no threads."""

    def __init__(
        self,
        name: str | None = None,
        *,
        agents: Mapping[str, str] | None = None,
        on_refused: Callable[[str], None] | None = None,
    ) -> None:
        """*name*: the environment this proxy belongs to (rule 4). *agents*: by tenant, who speaks for it.
        *on_refused*: is told of each tenant that stops being served."""
        self.name: Final = name
        self._agents: Final = dict(agents or {})
        self._on_refused = on_refused
        self._words: dict[str, Word] = {}
        self._said: dict[str, _Said] = {}

    def take(self, tenant: str, word: Word, *, agent: str, now_boot_s: float) -> Word:
        """*agent* says so; the word in force afterwards. ForeignEnvironmentError, ForeignAgentError."""
        if self.name is not None and word.environment != self.name:
            raise ForeignEnvironmentError(
                f"this proxy belongs to environment {self.name}, not to {word.environment}"
            )
        self._check_speaker(tenant, agent)
        said = self._said.get(tenant)
        known = self._words.get(tenant)
        counts = said is not None and now_boot_s - said.at_boot_s <= STICKS_S
        if said is not None and counts and word.position < said.position:
            if word.serves and known is not None:
                return known
        else:
            self._said[tenant] = _Said(agent, word.position, now_boot_s)
        self.put(tenant, word)
        return word

    def check_entitled(self, tenant: str, agent: str) -> None:
        """Return if *agent* may bring or take back keys here (rule 5), else ForeignAgentError."""
        if self.name is not None:
            self._check_speaker(tenant, agent)

    def _check_speaker(self, tenant: str, agent: str) -> None:
        """ForeignAgentError if another one speaks for *tenant*'s environment (rule 1)."""
        said = self._said.get(tenant)
        speaker = self._agents.get(tenant) or (agent if said is None else said.agent)
        if agent != speaker:
            raise ForeignAgentError(f"{speaker} speaks for this proxy's environment, not {agent}")

    def put(self, tenant: str, word: Word) -> None:
        """*word* is in force: `take` has said so, here or in the process that tells this one."""
        self._words[tenant] = word
        if not word.serves and self._on_refused is not None:
            self._on_refused(tenant)

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
            self._said.pop(gone, None)

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
