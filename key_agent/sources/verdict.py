"""What a diagnosis of a KEK can find, and what may follow from it (docs/hsm.md, docs/key-servers.md).

1. "Key not found" alone proves nothing: destroyed, logged out, re-initialised and unmounted look alike.
2. Only a proven revocation withdraws keys. An outage never does: there the validity runs out. Nor does a
   server that refuses us (`denied`): that says something of our credentials, and nothing of the key.
3. Only `ok` pushes keys.
4. `throttled` is an answer of a server that works, and wants to be asked less: it is, from then on
   (sources/worker_source.py), and nothing else follows from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Verdict(StrEnum):
    OK = "ok"
    KEK_DESTROYED = "kek_destroyed"
    KEK_DISABLED = "kek_disabled"
    KEK_EXPIRED = "kek_expired"
    KEK_REPLACED = "kek_replaced"
    TOKEN_CHANGED = "token_changed"  # noqa: S105 - a verdict, no password
    KEK_AMBIGUOUS = "kek_ambiguous"
    UNREACHABLE = "unreachable"
    DENIED = "denied"
    """The key server knows us no more, or lets us do no more what we ask."""
    THROTTLED = "throttled"
    """The key server has had more requests than it allows; it says when it takes the next."""
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
    retry_after_s: float = 0.0
    """`throttled`: how long the server is to be left alone, as it says; 0: it does not say."""


NEXT_STEPS: Final[Mapping[Verdict, str]] = {
    Verdict.KEK_DESTROYED: (
        "key-agent reinstate; or restore the HSM's backup and key-agent reinstate --restore"
    ),
    Verdict.KEK_DISABLED: "enable it in the HSM, then key-agent reinstate --restore",
    Verdict.KEK_EXPIRED: "key-agent reinstate",
    Verdict.KEK_REPLACED: "find out who made a key of the same name; key-agent reinstate",
    Verdict.KEK_AMBIGUOUS: "remove the other keys of the same name from the token",
    Verdict.TOKEN_CHANGED: "bring the token back; if it is lost: key-agent reinstate",
    Verdict.UNREACHABLE: "switch the HSM on, check its network and its client's configuration",
    Verdict.DENIED: "give the agent its rights at the key server back, or its file a token that has them",
    Verdict.THROTTLED: "raise the key server's rate limit for this agent; it goes on by itself",
    Verdict.AUTH_PIN: "write the right PIN into pkcs11.pin_file",
    Verdict.AUTH_LOCKED: "unlock the token with its security officer's PIN, then write the PIN file anew",
}
"""What mends it, by verdict."""
