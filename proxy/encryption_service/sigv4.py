"""AWS Signature Version 4, the verifying half, for requests without a query (XKS specification, appendix A).

1. `read_claim` judges what needs no secret: one Authorization header in the one form there is, one host, one
   X-Amz-Date within MAX_SKEW_S of now and of the scope's day, the service, the region if it is pinned.
   `verify` then judges the signature, over what was received: path and body as they came, byte for byte.
2. `host` and `x-amz-date` must be signed; any further headers may be. What is listed must be there, in order,
   each once; values are joined, trimmed and their inner blanks collapsed, as the signer did.
3. The body counts as it was received: an `X-Amz-Content-Sha256` of any value, `UNSIGNED-PAYLOAD` too, is no
   more than another header.
4. Who the access key is, is not asked here: an unknown one is verified with a secret that nobody has
   (access.py), so that it takes the same work and time as a wrong signature.
5. `Cause` is for the log of the one who runs the proxy; every cause gets the same answer.
6. A signature that comes again within the window is accepted: the retry of a request may carry it.
"""

import hashlib
import hmac
import re
from enum import StrEnum
from typing import Final, NamedTuple

from envelope.errors import SealgateError
from proxy.messages import sigv4
from proxy.messages.sigv4 import MAX_SIGNED_HEADERS, MAX_SKEW_S, TERMINATOR, Headers, Scope

MAX_AUTHORIZATION_LENGTH: Final = 4096

_REQUIRED: Final = ("host", "x-amz-date")
_DECIDING: Final = frozenset({"authorization", *_REQUIRED})
# The access key id may be anything here: what is malformed is unknown, and answered like it.
_AUTHORIZATION: Final = re.compile(
    r"AWS4-HMAC-SHA256 +"
    r"Credential=([!-+\--.0-~]{1,128})/([0-9]{8})/([a-z0-9-]{1,64})/([a-z0-9-]{1,64})/"
    + TERMINATOR
    + r" *, *"
    r"SignedHeaders=([!#$%&'*+.^_`|~0-9a-z;-]{1,2048}) *, *"
    r"Signature=([0-9a-f]{64})"
)


class Cause(StrEnum):
    """Why a request was not authenticated; for the log, never for the caller."""

    MISSING = "missing"  # no Authorization, Host or X-Amz-Date header
    DUPLICATE = "duplicate"  # one of them twice
    MALFORMED = "malformed"
    SERVICE = "service"
    REGION = "region"
    SKEW = "skew"
    SCOPE_DATE = "scope-date"
    SIGNED_HEADERS = "signed-headers"
    SIGNATURE = "signature"


class NotSignedError(SealgateError):
    """The request does not prove to come from the holder of the secret."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(f"AWS signature refused: {cause}")
        self.cause: Final = cause


class Claim(NamedTuple):
    """What a request says of its signature. Nothing is believed before `verify`."""

    access_key_id: str
    region: str
    service: str
    day: str
    """yyyymmdd, of the scope and of X-Amz-Date."""
    amz_date: str
    signed_headers: str
    """As it was received, which is as it was signed: sorted, separated by semicolons."""
    signature: str
    """64 lower-case hexadecimal digits."""

    @property
    def scope(self) -> Scope:
        return Scope(self.day, self.region, self.service)


def read_claim(headers: Headers, *, now_s: float, service: str, region: str | None = None) -> Claim:
    """Judge everything but the signature itself. NotSignedError.

    *now_s*: seconds since the Unix epoch. *region*: the only one to accept; None accepts any.
    """
    deciding: dict[str, str] = {}
    for name, value in headers:
        if name in _DECIDING:
            if name in deciding:
                raise NotSignedError(Cause.DUPLICATE)
            deciding[name] = value
    if len(deciding) < len(_DECIDING):
        raise NotSignedError(Cause.MISSING)
    authorization, amz_date = deciding["authorization"], deciding["x-amz-date"]
    if len(authorization) > MAX_AUTHORIZATION_LENGTH:
        raise NotSignedError(Cause.MALFORMED)
    match = _AUTHORIZATION.fullmatch(authorization)
    if match is None:
        raise NotSignedError(Cause.MALFORMED)
    access_key_id, day, its_region, its_service, signed_headers, signature = match.groups()
    if its_service != service:
        raise NotSignedError(Cause.SERVICE)
    if region is not None and its_region != region:
        raise NotSignedError(Cause.REGION)
    if abs(now_s - _instant_s(amz_date)) > MAX_SKEW_S:
        raise NotSignedError(Cause.SKEW)
    if amz_date[:8] != day:
        raise NotSignedError(Cause.SCOPE_DATE)
    _check_list(signed_headers)
    return Claim(
        access_key_id=access_key_id,
        region=its_region,
        service=its_service,
        day=day,
        amz_date=amz_date,
        signed_headers=signed_headers,
        signature=signature,
    )


def verify(claim: Claim, secret: bytes, *, method: str, path: str, headers: Headers, body: bytes) -> None:
    """Return if *claim* was signed with *secret*, else NotSignedError.

    *path*: as received, without a query; the caller has refused queries.
    """
    expected = signature(
        claim,
        secret,
        canonical_request(claim.signed_headers, method=method, path=path, headers=headers, body=body),
    )
    if not hmac.compare_digest(expected, claim.signature):  # both ASCII: the pattern has seen to it
        raise NotSignedError(Cause.SIGNATURE)


def canonical_request(signed_headers: str, *, method: str, path: str, headers: Headers, body: bytes) -> bytes:
    """What is signed of a request without a query. NotSignedError if a listed header is not there."""
    try:
        canonical = sigv4.canonical_request(
            method=method,
            path=path,
            query="",
            signed_headers=signed_headers,
            headers=headers,
            payload=hashlib.sha256(body).hexdigest(),
        )
    except (KeyError, UnicodeEncodeError):
        raise NotSignedError(Cause.SIGNED_HEADERS) from None
    if not canonical.isascii():
        # What a signer made of such a value is anybody's guess, and no client of this service sends one.
        raise NotSignedError(Cause.SIGNED_HEADERS)
    return canonical


def signature(claim: Claim, secret: bytes, canonical: bytes) -> str:
    """The signature of *canonical* under *secret*, date and scope of *claim*: 64 hexadecimal digits."""
    text = sigv4.string_to_sign(claim.amz_date, claim.scope, canonical)
    return sigv4.signature(sigv4.signing_key(secret, claim.scope), text)


def _instant_s(amz_date: str) -> float:
    try:
        return sigv4.instant_s(amz_date)
    except ValueError:
        raise NotSignedError(Cause.MALFORMED) from None


def _check_list(signed_headers: str) -> None:
    names = signed_headers.split(";")
    if len(names) > MAX_SIGNED_HEADERS or not sigv4.sorted_once(names):
        raise NotSignedError(Cause.SIGNED_HEADERS)  # too many, out of order, twice, or empty
    if any(name not in names for name in _REQUIRED):
        raise NotSignedError(Cause.SIGNED_HEADERS)
