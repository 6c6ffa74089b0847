"""JSON web tokens of other parties: whom we believe, and nothing that a token says about that.

1. RS256, and no other algorithm: the list is ours, never the header's. `none`, HMAC with a public key as its
   secret, and elliptic curves are refused before a key is looked at (RFC 8725 3.1).
2. The issuer has to stand in the caller's list. The list says where that issuer's keys are and which
   audiences count; `jku`, `jwk`, `x5u` and `x5c` in a header are never read. `crit` and `b64` are refused.
3. A key is found by the issuer's own key set and the token's `kid`; there is no trying of keys.
4. Header and claims are JSON objects that name nothing twice, within fixed bounds, in canonical base64url.
5. `exp` and `iat` must be there, `nbf` may; the leeway is for clocks, not for lifetimes. Google's reference
   shows the times as strings, so decimal digits in a string count as the number.
6. No text of this module quotes a token. It is a credential while it lives.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Protocol

from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import RSAKey
from joserfc.jws import JWSRegistry

from envelope.base64url import b64u_decode
from envelope.errors import FormatError, SealgateError

ALGORITHM: Final = "RS256"
MAX_TOKEN_BYTES: Final = 16 * 1024
"""An identity provider's token with some hundred groups fits."""
MAX_HEADER_BYTES: Final = 8 * 1024
MAX_KID_CHARS: Final = 256
MAX_AUDIENCES: Final = 32
LEEWAY_S: Final = 60
_MAX_DEPTH_BYTES: Final = 64
_TYPES: Final = frozenset({"jwt", "application/jwt"})


class TokenFault(StrEnum):
    """Which rule a token broke: for the audit log, and for the person who set up the issuer."""

    TOO_LARGE = "too-large"
    MALFORMED = "malformed"
    ALGORITHM = "algorithm"
    HEADER = "header"
    ISSUER = "issuer"
    KEY = "unknown-key"
    SIGNATURE = "signature"
    AUDIENCE = "audience"
    EXPIRED = "expired"
    NOT_YET = "not-yet-valid"
    LIFETIME = "lifetime"
    CLAIM = "claim"


class TokenError(SealgateError):
    """A token that must not be believed; `fault` names the rule."""

    def __init__(self, fault: TokenFault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuer:
    """Whose tokens count: its `iss`, the `aud` of which one must be named, where its keys are (HTTPS)."""

    issuer: str
    audiences: frozenset[str]
    jwks_url: str


class KeySource(Protocol):
    """Public keys by the URL of a key set and the key's id; `proxy.encryption_service.jwks.KeySets`."""

    def find(self, url: str, kid: str) -> RSAKey | None:
        """The key; None if the set, as new as may be had, has none.

        KeysNeededError: the set has to be fetched first. KeysUnavailableError: it cannot be had now.
        """


class KeysNeededError(SealgateError):
    """Nothing is wrong yet: fetch the key set at `url`, then ask again. `patient`: nothing else will do."""

    def __init__(self, url: str, *, patient: bool) -> None:
        super().__init__(f"the keys at {url} have to be fetched")
        self.url = url
        self.patient = patient


class KeysUnavailableError(SealgateError):
    """An issuer's keys cannot be had now: nobody's fault who calls, and worth a retry."""


@dataclass(frozen=True, slots=True)
class Claims:
    """The verified claims of one token."""

    issuer: Issuer
    members: Mapping[str, Any] = field(repr=False)
    issued_at_s: float
    expires_at_s: float

    def text(self, name: str) -> str | None:
        """The claim as text, None if it is absent or null. TokenError if it is something else."""
        value = self.members.get(name)
        if value is None or isinstance(value, str):
            return value
        raise TokenError(TokenFault.CLAIM, f"the claim {name} is not a string")

    def needed(self, name: str) -> str:
        """The claim as text that is not empty. TokenError otherwise."""
        value = self.text(name)
        if not value:
            raise TokenError(TokenFault.CLAIM, f"the claim {name} is missing")
        return value


_REGISTRY: Final = JWSRegistry(algorithms=[ALGORITHM], strict_check_header=False)
_REGISTRY.max_header_length = MAX_HEADER_BYTES
_REGISTRY.max_payload_length = MAX_TOKEN_BYTES


def verify(
    token: str,
    *,
    issuers: Mapping[str, Issuer],
    keys: KeySource,
    now_s: float,
    leeway_s: float = LEEWAY_S,
    max_lifetime_s: float = math.inf,
) -> Claims:
    """The claims of *token*, if one of *issuers* (by `iss`) signed it for one of its audiences, and it lives.

    TokenError: it must not be believed. KeysNeededError, KeysUnavailableError as `KeySource.find`.
    Costs one RSA verification, and only for a token of a listed issuer with a known `kid`.
    """
    if len(token) > MAX_TOKEN_BYTES:
        raise TokenError(TokenFault.TOO_LARGE, f"the token has more than {MAX_TOKEN_BYTES} bytes")
    header, members = _parts(token)
    kid = _checked_header(header)
    issuer = _issuer(members, issuers)
    key = keys.find(issuer.jwks_url, kid)
    if key is None:
        raise TokenError(TokenFault.KEY, "the token names a key that its issuer does not publish")
    try:
        verified = jws.deserialize_compact(token, key, registry=_REGISTRY)
    except (JoseError, ValueError, TypeError, UnicodeError):
        raise TokenError(TokenFault.SIGNATURE, "the token's signature does not verify") from None
    if verified.headers().get("alg") != ALGORITHM:  # what was verified is what was looked at
        raise TokenError(TokenFault.ALGORITHM, f"the token is not signed by {ALGORITHM}")
    _check_audience(members.get("aud"), issuer)
    return _timely(issuer, members, now_s=now_s, leeway_s=leeway_s, max_lifetime_s=max_lifetime_s)


def unverified_issuer(token: str) -> str | None:
    """What *token* says its `iss` is; only to choose the list that applies. None if it says nothing."""
    if len(token) > MAX_TOKEN_BYTES:
        return None
    try:
        issuer = _parts(token)[1].get("iss")
    except TokenError:
        return None
    return issuer if isinstance(issuer, str) else None


def json_object(data: bytes) -> dict[str, Any]:
    """A JSON object of which no member is named twice. ValueError for anything else."""
    # json.loads recurses; a token is small, but a thousand brackets are smaller.
    if data.count(b"[") + data.count(b"{") > _MAX_DEPTH_BYTES * 8:
        raise ValueError("too many arrays and objects")
    value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    if not isinstance(value, dict):
        raise ValueError("not an object")  # noqa: TRY004 - one error for every kind of wrong JSON
    return value


def _parts(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        header, payload, signature = token.split(".")
        b64u_decode(signature)  # one spelling only: the same token is the same text
        return json_object(b64u_decode(header)), json_object(b64u_decode(payload))
    except (ValueError, FormatError, RecursionError):
        raise TokenError(TokenFault.MALFORMED, "not a signed JSON web token") from None


def _checked_header(header: Mapping[str, Any]) -> str:
    """The key's id. TokenError for a header that asks for anything but RS256 by a key of the issuer's."""
    if header.get("alg") != ALGORITHM:
        raise TokenError(TokenFault.ALGORITHM, f"the token is not signed by {ALGORITHM}")
    if "crit" in header or "b64" in header or "zip" in header or "enc" in header:
        raise TokenError(TokenFault.HEADER, "the token's header asks for an extension")
    kind = header.get("typ", "JWT")
    if not isinstance(kind, str) or kind.lower() not in _TYPES:
        raise TokenError(TokenFault.HEADER, "the token is of another type than JWT")
    kid = header.get("kid")
    if not isinstance(kid, str) or not 0 < len(kid) <= MAX_KID_CHARS:
        raise TokenError(TokenFault.HEADER, "the token does not name its key")
    return kid


def _issuer(members: Mapping[str, Any], issuers: Mapping[str, Issuer]) -> Issuer:
    name = members.get("iss")
    found = issuers.get(name) if isinstance(name, str) else None
    if found is None:
        raise TokenError(TokenFault.ISSUER, "the token's issuer is not one of those that count here")
    return found


def _check_audience(audience: Any, issuer: Issuer) -> None:
    named = [audience] if isinstance(audience, str) else audience
    if (
        not isinstance(named, list)
        or not 0 < len(named) <= MAX_AUDIENCES
        or not all(isinstance(one, str) for one in named)
        or issuer.audiences.isdisjoint(named)
    ):
        raise TokenError(TokenFault.AUDIENCE, "the token is for another audience")


def _timely(
    issuer: Issuer, members: Mapping[str, Any], *, now_s: float, leeway_s: float, max_lifetime_s: float
) -> Claims:
    issued_at_s, expires_at_s = _time(members, "iat"), _time(members, "exp")
    if now_s >= expires_at_s + leeway_s:
        raise TokenError(TokenFault.EXPIRED, "the token has expired")
    not_before_s = max(issued_at_s, _time(members, "nbf")) if "nbf" in members else issued_at_s
    if now_s < not_before_s - leeway_s:
        raise TokenError(TokenFault.NOT_YET, "the token is not valid yet: check both clocks")
    if not issued_at_s <= expires_at_s <= issued_at_s + max_lifetime_s:
        raise TokenError(TokenFault.LIFETIME, "the token lives longer than such a token may")
    return Claims(issuer, members, issued_at_s, expires_at_s)


def _time(members: Mapping[str, Any], name: str) -> float:
    value = members.get(name)
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 12:
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise TokenError(TokenFault.CLAIM, f"the claim {name} is not a time")
    return float(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member is named twice")
    return members


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
