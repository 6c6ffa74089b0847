"""The KACLS's own RSA key: a signing key of the tenant's, pushed by its agent like any other, so revocable.

1. `/certs` publishes the versions that count: the active one, and deactivated ones whose tokens may still
   live. Withdrawn, suspended, compromised and blocked keys are not published, and what they signed is
   believed no more.
2. Our own tokens are verified with these keys from memory; nobody's HTTP server is asked.
3. A token of ours is RS256, because that is what the other side pins; its `kid` is the key id.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import rsa
from joserfc.jwk import RSAKey

from envelope.base64url import b64u_encode
from envelope.keys import KeyState, SigningAlgorithm
from proxy.encryption_service.access import Caller
from proxy.encryption_service.core import Core, RsaPadding, SignatureScheme, Ticket
from proxy.encryption_service.dialects.kacls_endpoint import CERTS, Kacls
from proxy.encryption_service.errors import KeyNotFound, ServiceError, UsageRefused
from proxy.encryption_service.key_states import KeyVersion
from proxy.encryption_service.model import NamedKey, Op
from proxy.encryption_service.tokens import ALGORITHM, KeySource

_PUBLISHED: Final = frozenset({KeyState.ACTIVE, KeyState.DEACTIVATED})
_SCHEME: Final = SignatureScheme(padding=RsaPadding.PKCS1V15)
_COMPACT: Final = json.JSONEncoder(separators=(",", ":"))


class Identity:
    """Signs as a KACLS, and says by which keys that is verified."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def key_set(self, kacls: Kacls) -> dict[str, object]:
        """The JWK set of `/certs`. KeyNotFound if the endpoint has no signing key."""
        return {"keys": [_jwk(version) for version in self._published(self._key(kacls))]}

    def find(self, kacls: Kacls, kid: str) -> RSAKey | None:
        """The public key *kid*, None if we do not publish it (rule 2)."""
        try:
            published = self._published(self._key(kacls))
        except ServiceError:
            return None
        for version in published:
            if str(version.key_id) == kid and isinstance(version.public_key, rsa.RSAPublicKey):
                return RSAKey.import_key(version.public_key)
        return None

    def sign(self, kacls: Kacls, caller: Caller, claims: Mapping[str, Any]) -> tuple[str, Ticket, KeyVersion]:
        """A token with *claims*, the leave it was signed by, and with which version.

        The errors of `Core.admit` and `Core.sign`. What is not sent at once needs the ticket confirmed.
        """
        key = self._key(kacls)
        ticket = self._core.admit(caller, key, Op.SIGN)
        versions = self._core.states.versions(key)
        active = [version for version in versions if version.state is KeyState.ACTIVE][-1]
        header = {"alg": ALGORITHM, "kid": str(active.key_id), "typ": "JWT"}
        signed = f"{_part(header)}.{_part(claims)}"
        signature = self._core.sign(ticket, signed.encode(), _SCHEME, version=active.version)
        return f"{signed}.{b64u_encode(signature.signature)}", ticket, active

    def _key(self, kacls: Kacls) -> NamedKey:
        name = kacls.endpoint.signing_key
        if name is None:
            raise KeyNotFound("this KACLS has no signing key")
        key = self._core.states.find(kacls.tenant, name)
        if key.algorithm is not SigningAlgorithm.RS256:
            raise UsageRefused("a KACLS signs by RS256, its signing key does not")
        return key

    def _published(self, key: NamedKey) -> list[KeyVersion]:
        if key.blocked:
            return []
        return [version for version in self._core.states.versions(key) if version.state in _PUBLISHED]


class KeysOfCall:
    """Where the tokens of one endpoint's calls find their keys: ours from memory, all others by their URL."""

    def __init__(self, kacls: Kacls, identity: Identity, others: KeySource) -> None:
        self._kacls = kacls
        self._own_url = kacls.url + CERTS
        self._identity = identity
        self._others = others

    def find(self, url: str, kid: str) -> RSAKey | None:
        """As `KeySource.find`."""
        if url == self._own_url:
            return self._identity.find(self._kacls, kid)
        return self._others.find(url, kid)


def _jwk(version: KeyVersion) -> dict[str, str]:
    public = version.public_key
    assert isinstance(public, rsa.RSAPublicKey)  # noqa: S101 - an RS256 key's, by `Identity._key`
    numbers = public.public_numbers()
    return {
        "kty": "RSA",
        "use": "sig",
        "alg": ALGORITHM,
        "kid": str(version.key_id),
        "n": b64u_encode(numbers.n.to_bytes((numbers.n.bit_length() + 7) // 8)),
        "e": b64u_encode(numbers.e.to_bytes((numbers.e.bit_length() + 7) // 8)),
    }


def _part(members: Mapping[str, Any]) -> str:
    return b64u_encode(_COMPACT.encode(members).encode())
