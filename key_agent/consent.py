"""Does the enterprise still consent? One answer for the whole agent, decided by proofs about the KEK.

1. Only `consented` pushes keys, and only a diagnosis `ok` makes it so.
2. A proven revocation is sticky: no later diagnosis undoes it, `reinstate` alone does.
3. An outage withdraws nothing and pushes nothing: the validity runs out by itself.
4. The answer changes in memory first, and listeners hear of it at once; writing it down follows and cannot
   stop it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import structlog

from key_agent.registry.model import KekRow
from key_agent.registry.states import KekState
from key_agent.sources.source import Diagnosis, Kek, Verdict
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
    SUSPENDED = "suspended"
    """The token was emptied or exchanged: withdrawn until it is back."""
    REVOKED = "revoked"
    """Withdrawn until `reinstate`."""

    @property
    def is_withdrawn(self) -> bool:
        return self in (Standing.SUSPENDED, Standing.REVOKED)


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
    Verdict.AUTH_PIN: Standing.LOGIN_REFUSED,
    Verdict.AUTH_LOCKED: Standing.LOGIN_REFUSED,
}
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
    if standing is Standing.SUSPENDED and new in (Standing.SILENT, Standing.LOGIN_REFUSED):
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

    @property
    def may_push(self) -> bool:
        return self.standing is Standing.CONSENTED

    def listen(self, listener: Callable[[Change], None]) -> None:
        """Call *listener* at every change, at once; it must not wait and must not raise."""
        self._listeners.append(listener)

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
        detail = None if self.diagnosis is None else self.diagnosis.detail
        report = log.info if new in (Standing.CONSENTED, Standing.UNPROVEN, Standing.NO_KEK) else log.error
        report("consent", standing=new, before=old, detail=detail)
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
