"""Every error the shared formats raise.

* SealgateError
  + MisuseError            the caller broke a rule of this API
  + FormatError            the bytes are not in our format
    - UnsupportedVersion   ... or in a version or suite this reader refuses
  + IntegrityError         in our format, but not as it was written
    - TruncatedError       ... the end is missing
  + EnvelopeError          a key-material envelope that must not be believed; `code` names the rule
  + KeyUnavailableError    no usable key right now: refuse, never degrade; `reason` says why
"""

from enum import StrEnum


class SealgateError(Exception):
    """Root of all errors that Sealgate raises on purpose."""


class MisuseError(SealgateError):
    """The caller broke a rule of this API (a bug, not bad input)."""


class FormatError(SealgateError):
    """The bytes are not in our format."""


class UnsupportedVersion(FormatError):  # noqa: N818 - the name in docs/format.md
    """A version, suite or feature of the format that this reader refuses."""


class IntegrityError(SealgateError):
    """In our format, but not as it was written: damaged, exchanged, or sealed under another key."""


class TruncatedError(IntegrityError):
    """The end of the object is missing."""


class EnvelopeError(SealgateError):
    """A key-material envelope that must not be believed.

    `code` is stable and names the rule of docs/format.md section 5 that refused it, for receipts and audit.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Unavailable(StrEnum):
    """Why there is no usable key: decides the answer to the client (docs/format.md 6.3)."""

    UNKNOWN = "unknown"  # no such key id here, or nothing pushed yet
    EXPIRED = "expired"  # validity ran out, the agent is silent
    WITHDRAWN = "withdrawn"  # the enterprise took it back
    NOT_ACTIVE = "not-active"  # no active key to seal with
    SUSPENDED = "suspended"
    COMPROMISED = "compromised"
    DESTROYED = "destroyed"


class KeyUnavailableError(SealgateError):
    """No usable key right now: refuse, never degrade."""

    def __init__(self, reason: Unavailable, message: str) -> None:
        super().__init__(message)
        self.reason = reason
