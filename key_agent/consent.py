"""Does the enterprise still consent? One answer for the whole agent, decided by proofs about the KEK.

1. Only `consented` pushes keys, and only a diagnosis `ok` makes it so.
2. A proven revocation is sticky: no later diagnosis undoes it, `reinstate` alone does.
3. An outage withdraws nothing and pushes nothing: the validity runs out by itself.
4. The answer changes in memory first, and listeners hear of it at once; writing it down follows and cannot
   stop it.
5. With several environments the tenant has a second voice: an environment that is breached, or has not heard
   of the others for too long, pushes nothing and takes back what is out there, however well its KEK works.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import structlog

from key_agent.registry.model import KekRow
from key_agent.registry.states import KekState
from key_agent.sources.source import Diagnosis, Kek, Verdict
from key_agent.sources.verdict import NEXT_STEPS
from runtime.clock import Clock

log = structlog.get_logger(__name__)


class Standing(StrEnum):
    NO_KEK = "no-kek"
    UNPROVEN = "unproven"
    """Nobody has looked yet since the agent started."""
    CONSENTED = "consented"
    SILENT = "silent"
    """Nobody can tell (outage, ambiguous KEK): push nothing, withdraw nothing."""
    LOGIN_REFUSED = "login-refused"
    """Like silent, and no further login until the PIN file changes."""
    DENIED = "denied"
    """Like silent: the key server does not let us. Ends by itself once it does."""
    THROTTLED = "throttled"
    """Like silent: the key server wants to be asked less. It works, so callers need not go elsewhere."""
    SUSPENDED = "suspended"
    """The token was emptied or exchanged: withdrawn until it is back."""
    REVOKED = "revoked"
    """Withdrawn until `reinstate`."""

    @property
    def is_withdrawn(self) -> bool:
        return self in (Standing.SUSPENDED, Standing.REVOKED)


class EnvironmentStanding(StrEnum):
    """Whether this environment may serve (rule 5)."""

    SERVES = "serves"
    """Also: it is the only one."""
    UNPROVEN = "unproven"
    """Nobody was heard yet since the agent started: push nothing, withdraw nothing."""
    WITHDRAWN = "withdrawn"
    """Healing, not joined yet, retired, or its registry lease is over."""


_BY_VERDICT: Final[Mapping[Verdict, Standing]] = {
    Verdict.OK: Standing.CONSENTED,
    Verdict.KEK_DESTROYED: Standing.REVOKED,
    Verdict.KEK_DISABLED: Standing.REVOKED,
    Verdict.KEK_EXPIRED: Standing.REVOKED,
    Verdict.KEK_REPLACED: Standing.REVOKED,
    Verdict.TOKEN_CHANGED: Standing.SUSPENDED,
    Verdict.KEK_AMBIGUOUS: Standing.SILENT,
    Verdict.UNREACHABLE: Standing.SILENT,
    Verdict.UNSUPPORTED: Standing.SILENT,
    Verdict.DENIED: Standing.DENIED,
    Verdict.THROTTLED: Standing.THROTTLED,
    Verdict.AUTH_PIN: Standing.LOGIN_REFUSED,
    Verdict.AUTH_LOCKED: Standing.LOGIN_REFUSED,
}
_NOBODY_CAN_TELL: Final = frozenset(
    {Standing.SILENT, Standing.LOGIN_REFUSED, Standing.DENIED, Standing.THROTTLED}
)
_BY_STATE: Final[Mapping[KekState, Standing]] = {
    KekState.ACTIVE: Standing.UNPROVEN,
    KekState.SUSPENDED: Standing.SUSPENDED,
    KekState.REVOKED: Standing.REVOKED,
    KekState.DESTROYED: Standing.REVOKED,
}


def next_standing(standing: Standing, verdict: Verdict) -> Standing:
    """What *verdict* makes of *standing* (rules 1 to 3)."""
    if standing in (Standing.REVOKED, Standing.NO_KEK):
        return standing
    new = _BY_VERDICT[verdict]
    if standing is Standing.SUSPENDED and new in _NOBODY_CAN_TELL:
        # Withdrawn stays withdrawn while nobody can tell.
        return standing
    return new


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A new standing, and the proof of it."""

    old: Standing
    new: Standing
    kek_id: str | None
    diagnosis: Diagnosis | None
    at_ms: int


class Consent:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._listeners: list[Callable[[Change], None]] = []
        self.kek: Kek | None = None
        self.standing = Standing.NO_KEK
        self.diagnosis: Diagnosis | None = None
        """The last one, of whatever verdict."""
        self.diagnosed_at_ms: int | None = None
        self.since_ms = self._now_ms()
        self.environment = EnvironmentStanding.SERVES
        self.environment_reason: str | None = None
        self._environment_listeners: list[Callable[[EnvironmentStanding], None]] = []

    @property
    def may_push(self) -> bool:
        return self.standing is Standing.CONSENTED and self.environment is EnvironmentStanding.SERVES

    @property
    def is_withdrawn(self) -> bool:
        """What is out there is taken back."""
        return self.standing.is_withdrawn or self.environment is EnvironmentStanding.WITHDRAWN

    def listen(self, listener: Callable[[Change], None]) -> None:
        """Call *listener* at every change, at once; it must not wait and must not raise."""
        self._listeners.append(listener)

    def listen_environment(self, listener: Callable[[EnvironmentStanding], None]) -> None:
        """Call *listener* with each new standing of the environment; it must not wait and must not raise."""
        self._environment_listeners.append(listener)

    def set_environment(self, new: EnvironmentStanding, reason: str | None) -> None:
        """What the tenant's other environments, or a breach of this one, make of it (rule 5)."""
        old, self.environment, self.environment_reason = self.environment, new, reason
        if old is new:
            return
        report = log.info if new is EnvironmentStanding.SERVES else log.error
        report("environment", standing=new, before=old, reason=reason)
        for listener in self._environment_listeners:
            listener(new)

    def adopt(self, row: KekRow | None) -> None:
        """Start over from the registry: at start-up, and after the KEK was made or reinstated."""
        self.kek = None if row is None else row.kek
        self.diagnosis = None
        self.diagnosed_at_ms = None
        self._enter(Standing.NO_KEK if row is None else _BY_STATE[row.state])

    def succeed(self, row: KekRow, diagnosis: Diagnosis) -> None:
        """The keys have moved to another KEK, proven to work: consent goes on if there was consent.

        Whatever else there was (an outage, a refused PIN) has to be looked at anew. What was withdrawn while
        they changed places stays so: the keys were taken back, whichever KEK they are under.
        """
        if self.standing.is_withdrawn:
            self.kek = row.kek
            self._tell(self.standing)
            return
        if self.standing is not Standing.CONSENTED or diagnosis.verdict is not Verdict.OK:
            self.adopt(row)
            return
        self.kek = row.kek
        self.diagnosis = diagnosis
        self.diagnosed_at_ms = self._now_ms()

    def observe(self, kek: Kek, diagnosis: Diagnosis) -> None:
        """A diagnosis of *kek* was made. One of another KEK than today's is old news."""
        if self.kek is None or kek.reference != self.kek.reference:
            return
        self.diagnosis = diagnosis
        self.diagnosed_at_ms = self._now_ms()
        self._enter(next_standing(self.standing, diagnosis.verdict))

    def revoke(self, reason: str) -> None:
        """An operator's word instead of a proof."""
        if self.kek is not None and self.standing is not Standing.REVOKED:
            self.diagnosis = Diagnosis(Verdict.KEK_DESTROYED, reason)
            self._enter(Standing.REVOKED)

    def _enter(self, new: Standing) -> None:
        old, self.standing = self.standing, new
        if old is new:
            return
        self.since_ms = self._now_ms()
        found = self.diagnosis
        detail, next_step = (None, None) if found is None else (found.detail, NEXT_STEPS.get(found.verdict))
        report = log.info if new in (Standing.CONSENTED, Standing.UNPROVEN, Standing.NO_KEK) else log.error
        report("consent", standing=new, before=old, detail=detail, next_step=next_step)
        self._tell(old)

    def _tell(self, old: Standing) -> None:
        change = Change(
            old=old,
            new=self.standing,
            kek_id=None if self.kek is None else self.kek.reference.kek_id,
            diagnosis=self.diagnosis,
            at_ms=self.since_ms,
        )
        for listener in self._listeners:
            listener(change)

    def _now_ms(self) -> int:
        return int(self._clock.wall_s() * 1000)
