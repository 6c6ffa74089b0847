"""Who calls, and what the caller may do.

1. Unknown id, wrong secret, ended, other dialect, other network: one path, one error, and no step that is
   taken for one of them only. An unknown bearer id is compared with a digest that no token has; for an
   unknown access key id a signature is verified with a secret that nobody has.
2. A caller is believed for the picture of the directory it was found in, and is looked up again before its
   answer leaves (`Core.confirm`): revoking a credential ends also what is under way.
3. Who was authenticated by tokens of an identity provider (KACLS) has no credential here; the dialect has
   verified the tokens, and the tenant's entry for the dialect is what it is bound to.
"""

import functools
import hmac
import ipaddress
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final

from proxy.encryption_service.call import Peer
from proxy.encryption_service.credentials import SecretSealer, parse_bearer, random_secret
from proxy.encryption_service.errors import AccessDenied, KeyNotFound, NotAuthenticated
from proxy.encryption_service.model import (
    CredentialEntry,
    CredentialKind,
    DialectName,
    NamedKey,
    Network,
    Op,
    ServiceDirectory,
)
from runtime.clock import Clock

type Compare = Callable[[bytes, bytes], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who was authenticated. Holds no secret."""

    tenant: str
    dialect: DialectName
    name: str
    """For the audit record: the credential's label, or the e-mail address of a KACLS token."""
    credential_id: str | None = None
    """None: authenticated by tokens (rule 3)."""
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
        if self.caller is None or not matches:
            raise NotAuthenticated
        return self.caller


class Access:
    """Authentication by credential, and authorization. Synchronous, microseconds."""

    def __init__(
        self,
        directory: Callable[[], ServiceDirectory],
        clock: Clock,
        sealer: SecretSealer | None = None,
        *,
        compare: Compare = hmac.compare_digest,
    ) -> None:
        """*sealer* opens the stored secrets of SigV4 credentials; without it there are none."""
        self._directory = directory
        self._clock = clock
        self._sealer = sealer
        self._compare = compare
        self._no_digest: Final = secrets.token_bytes(32)
        self._no_secret: Final = random_secret().encode()

    def bearer(self, token: str, *, dialect: DialectName, peer: Peer) -> Caller:
        """The caller who knows *token*. NotAuthenticated."""
        entry = self._directory().credentials.get(parse_bearer(token))
        is_bearer = entry is not None and entry.kind is CredentialKind.BEARER
        verifier = entry.verifier if entry is not None and is_bearer else self._no_digest
        digest = sha256(token.encode("utf-8", "surrogatepass")).digest()
        matches = self._compare(digest, verifier)
        welcome = self._is_welcome(entry, dialect, peer)
        if entry is None or not (matches & is_bearer & welcome):
            raise NotAuthenticated
        return _caller(entry)

    def sigv4(self, access_key_id: str, *, dialect: DialectName, endpoint: str, peer: Peer) -> SigV4Candidate:
        """The secret to verify a signature with; for an unknown id one that nobody has (rule 1)."""
        entry = self._directory().credentials.get(access_key_id)
        secret = None
        if entry is not None and entry.kind is CredentialKind.SIGV4 and self._sealer is not None:
            secret = self._sealer.open(entry.verifier, entry.id, entry.tenant)
        elif self._sealer is not None:
            self._sealer.pretend_to_open()
        welcome = self._is_welcome(entry, dialect, peer)
        known = secret is not None and welcome and entry is not None and entry.endpoint == endpoint
        return SigV4Candidate(
            secret=secret if secret is not None else self._no_secret,
            caller=_caller(entry) if known and entry is not None else None,
        )

    def authorize(self, caller: Caller, key: NamedKey, op: Op) -> None:
        """AccessDenied unless the caller's credential is for this key and operation, now.

        NotAuthenticated if the credential has ended meanwhile. KeyNotFound for another tenant's key.
        """
        if key.owner.tenant != caller.tenant:
            raise KeyNotFound("there is no such key")
        directory = self._directory()
        if directory.dialect(caller.tenant, caller.dialect) is None:
            raise NotAuthenticated
        if caller.credential_id is None:
            if caller.dialect is not DialectName.KACLS:
                raise NotAuthenticated
            return
        entry = self._live_entry(directory, caller)
        if entry.keys is not None and key.owner.service not in entry.keys:
            raise AccessDenied("the credential is not for this key")
        if op not in entry.operations:
            raise AccessDenied(f"the credential is not for this operation: {op}")

    def check_live(self, caller: Caller) -> None:
        """NotAuthenticated if the caller's credential has ended meanwhile."""
        if caller.credential_id is not None:
            self._live_entry(self._directory(), caller)

    def _live_entry(self, directory: ServiceDirectory, caller: Caller) -> CredentialEntry:
        entry = directory.credentials.get(caller.credential_id or "")
        if entry is None or entry.tenant != caller.tenant or not self._is_live(entry):
            raise NotAuthenticated
        return entry

    def _is_live(self, entry: CredentialEntry) -> bool:
        return entry.not_after_s is None or self._clock.wall_s() < entry.not_after_s

    def _is_welcome(self, entry: CredentialEntry | None, dialect: DialectName, peer: Peer) -> bool:
        """Rule 1: every question is asked, whatever the answers to the others."""
        address = _address(peer.address)
        end_s = entry.not_after_s if entry is not None and entry.not_after_s is not None else float("inf")
        networks = entry.networks if entry is not None else ()
        tenant = entry.tenant if entry is not None else ""
        is_live = self._clock.wall_s() < end_s
        is_near = not networks or _is_within(address, networks)
        is_on = self._directory().dialect(tenant, dialect) is not None
        return (
            (entry is not None) & is_live & is_near & is_on & (entry is not None and entry.dialect is dialect)
        )


def _caller(entry: CredentialEntry) -> Caller:
    return Caller(
        tenant=entry.tenant,
        dialect=entry.dialect,
        name=entry.label,
        credential_id=entry.id,
        endpoint=entry.endpoint,
    )


@functools.lru_cache(maxsize=4096)
def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An IPv4 address is one, also where the socket writes it in IPv6."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _is_within(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address | None, networks: tuple[Network, ...]
) -> bool:
    return address is not None and any(
        address.version == network.version and address in network for network in networks
    )
