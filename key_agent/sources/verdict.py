"""What a diagnosis of a KEK can find, and what may follow from it (hsm.md section 5).

1. "Key not found" alone proves nothing: destroyed, logged out, re-initialised and unmounted look alike.
2. Only a proven revocation withdraws keys. An outage never does: there the validity runs out.
3. Only `ok` pushes keys.
"""

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    OK = "ok"
    KEK_DESTROYED = "kek_destroyed"
    KEK_DISABLED = "kek_disabled"
    KEK_EXPIRED = "kek_expired"
    KEK_REPLACED = "kek_replaced"
    TOKEN_CHANGED = "token_changed"  # noqa: S105 - a verdict, no password
    KEK_AMBIGUOUS = "kek_ambiguous"
    UNREACHABLE = "unreachable"
    AUTH_PIN = "auth_pin"
    AUTH_LOCKED = "auth_locked"
    UNSUPPORTED = "unsupported"

    @property
    def is_revocation(self) -> bool:
        """The enterprise's own act, proven: withdraw at once, and stay withdrawn until `reinstate`."""
        return self in (
            Verdict.KEK_DESTROYED,
            Verdict.KEK_DISABLED,
            Verdict.KEK_EXPIRED,
            Verdict.KEK_REPLACED,
        )

    @property
    def withdraws(self) -> bool:
        """Withdraw at once: every revocation, and an emptied or exchanged token.

        `token_changed` is not sticky: pushing resumes when a later diagnosis is `ok` again.
        """
        return self.is_revocation or self is Verdict.TOKEN_CHANGED

    @property
    def is_login_refusal(self) -> bool:
        """No further login until the operator supplies another PIN: retrying locks real tokens."""
        return self in (Verdict.AUTH_PIN, Verdict.AUTH_LOCKED)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    verdict: Verdict
    detail: str
    """One line for people: what was found. Holds no secret."""
