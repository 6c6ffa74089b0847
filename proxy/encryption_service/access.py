"""Who calls, and what the caller may do.

1. Unknown id, wrong secret, ended, other dialect, other network: one path, one error, no difference in time
   that depends on which it was. An unknown bearer id is compared with a digest that no token has, an
   unknown access key id is verified with a random secret.
2. A caller is believed for the picture of the directory it was found in, and is looked up again before its
   answer leaves (`Core.confirm`): revoking a credential ends also what is under way.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from proxy.encryption_service.call import Peer
from proxy.encryption_service.model import (
    CredentialEntry,
    DialectName,
    NamedKey,
    Op,
    ServiceDirectory,
)
from runtime.clock import Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who was authenticated. Holds no secret."""

    tenant: str
    dialect: DialectName
    name: str
    """For the audit record: the credential's label, or the e-mail address of a KACLS token."""
    credential_id: str | None = None
    """None: authenticated by tokens of an identity provider (KACLS), which the dialect has verified."""
    endpoint: str | None = None
    """What the credential is bound to (XKS prefix, transit mount); None: nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SigV4Candidate:
    """Verify the signature with `secret`, whoever it is, then ask `admit`."""

    secret: bytes = field(repr=False)
    caller: Caller | None = field(repr=False)

    def admit(self, *, matches: bool) -> Caller:
        """The caller, if the signature *matches* and the access key id is a live credential's.

        NotAuthenticated otherwise.
        """
        raise NotImplementedError


class Access:
    """Authentication by credential, and authorization. Synchronous, microseconds."""

    def __init__(self, directory: Callable[[], ServiceDirectory], clock: Clock) -> None:
        self._directory = directory
        self._clock = clock

    def bearer(self, token: str, *, dialect: DialectName, peer: Peer) -> Caller:
        """The caller who knows *token*. NotAuthenticated."""
        raise NotImplementedError

    def sigv4(self, access_key_id: str, *, dialect: DialectName, endpoint: str, peer: Peer) -> SigV4Candidate:
        """The secret to verify a signature with; for an unknown id a random one (rule 1)."""
        raise NotImplementedError

    def authorize(self, caller: Caller, key: NamedKey, op: Op) -> None:
        """AccessDenied unless the caller's credential is for this key and operation, now.

        NotAuthenticated if the credential has ended meanwhile. KeyNotFound for another tenant's key.
        """
        raise NotImplementedError

    def is_live(self, entry: CredentialEntry) -> bool:
        raise NotImplementedError
