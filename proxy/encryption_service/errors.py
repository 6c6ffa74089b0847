"""Why the encryption service does not do what it was asked; each dialect maps these with one table.

* ServiceError
  + NotAuthenticated   nobody, or nobody we know: one text for all causes
  + AccessDenied       known, but not for this key, operation, network
  + QuotaExceeded      too much; `retry_after_s`
  + KeyNotFound        no such named key of this tenant
  + KeyRefused         the key exists and may not do this now; `why` is a `Refusal`
  + UsageRefused       the key is not for this operation at all
  + Revoked            the tenant has withdrawn its keys: final, do not retry
  + Stale              no word from the tenant's agent, the keys' validity is over: retry
    - Withdrawn        ... or this environment is withdrawn: another one serves
  + DoesNotVerify      not what this key made, or not any more what it was; one text for all causes
  + TooLarge           more than the service takes in one call
  + InputRefused       a parameter of the call that no key of this kind takes
  + NotRecorded        the audit log cannot be written: what was done must not be answered
"""

# ruff: noqa: N818 - the names of the service's contract; `except Revoked` reads as what has happened

from enum import StrEnum
from typing import Final

from envelope.errors import SealgateError


class Refusal(StrEnum):
    """Why a key that exists may not be used (docs/encryption-service.md, "States")."""

    BLOCKED = "blocked"  # by the proxy's operator or the tenant's admin, here
    NOT_ACTIVE = "not-active"  # pre-active, or no version is active: nothing to encrypt or sign with
    DEACTIVATED = "deactivated"  # this version decrypts and verifies only
    SUSPENDED = "suspended"
    COMPROMISED = "compromised"
    VERSION_GONE = "version-gone"  # a destroyed version of a key that lives
    VERSION_UNKNOWN = "version-unknown"  # no such version was ever pushed here
    DESTROYED = "destroyed"  # every version


class ServiceError(SealgateError):
    """Root of this tree. `code` is stable: for audit, metrics and the dialects' tables."""

    code: str = "refused"


class NotAuthenticated(ServiceError):
    code = "not-authenticated"

    def __init__(self) -> None:
        super().__init__("not authenticated")


class AccessDenied(ServiceError):
    code = "access-denied"


class QuotaExceeded(ServiceError):
    code = "quota"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s: Final = retry_after_s


class KeyNotFound(ServiceError):
    code = "key-not-found"


class KeyRefused(ServiceError):
    code = "key-refused"

    def __init__(self, why: Refusal, message: str) -> None:
        super().__init__(message)
        self.why: Final = why


class UsageRefused(ServiceError):
    code = "usage-refused"


class Revoked(ServiceError):
    code = "revoked"


class Stale(ServiceError):
    code = "stale"


class Withdrawn(Stale):
    code = "env-healing"


class DoesNotVerify(ServiceError):
    code = "does-not-verify"

    def __init__(self) -> None:
        super().__init__("authentication failed")


class TooLarge(ServiceError):
    code = "too-large"


class InputRefused(ServiceError):
    code = "input-refused"


class NotRecorded(ServiceError):
    code = "not-recorded"
