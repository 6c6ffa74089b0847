"""Who has signed a request to S3: AWS Signature Version 4, in a header or in a presigned URL.

1. A request with an access key of the vault is verified before anything else is done for it: form, dates,
   what is signed, and then the signature, compared in constant time. It is refused by S3's own codes.
2. Signed must be the host and every `x-amz-*` header, or the service would do more than was signed.
3. A header's date may differ from now by five minutes, and is the day of its scope; a presigned URL is good
   from its date for as long as it says, seven days at most.
4. SigV2, SigV4A and session tokens are refused: they cannot be verified here.
5. A signature by an access key that is not in the vault is not judged here. Such a request goes on as it was
   signed, or not at all (signing.py rule 4), and the service judges it.
6. A path or query that a client did not encode as it signed it is tried in its canonical form too: the
   service does the same, and it is the same resource.
"""

import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from proxy import refusals
from proxy.messages import sigv4
from proxy.messages.message import RequestHead
from proxy.messages.sigv4 import Headers, Scope
from proxy.profiles.s3.addressing import names_twice, parameters
from proxy.profiles.s3.options import Anonymous, S3Options, UnknownKeys
from proxy.refusals import RefusedError
from proxy.vault.model import Secrets, UpstreamCredential

UNSIGNED: Final = "UNSIGNED-PAYLOAD"
MAX_EXPIRES_S: Final = 7 * 24 * 3600
SERVICE: Final = "s3"
_MAX_AUTHORIZATION: Final = 8192
_CREDENTIAL: Final = (
    r"(?P<key>[!-+\--.0-~]{1,128})/(?P<day>[0-9]{8})/(?P<region>[A-Za-z0-9_-]{1,64})"
    r"/(?P<service>[a-z0-9-]{1,32})/aws4_request"
)
_SIGNED: Final = r"(?P<signed>[!#$%&'*+.^_`|~0-9a-z;-]{1,4096})"
_SIGNATURE: Final = r"(?P<signature>[0-9a-f]{64})"
_PARTS: Final = {
    "Credential": re.compile(_CREDENTIAL),
    "SignedHeaders": re.compile(_SIGNED),
    "Signature": re.compile(_SIGNATURE),
}


class Standing(Enum):
    """What is known of a request's sender."""

    VERIFIED = "verified"  # has signed with a secret of the vault
    UNJUDGED = "unjudged"  # has signed with another: for the service to judge
    ANONYMOUS = "anonymous"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkKey:
    """What the signatures of a body's chunks are made with."""

    key: bytes = field(repr=False)
    amz_date: str
    scope: Scope
    seed: str
    """The signature of the head, from which the first chunk's goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Authenticated:
    standing: Standing
    payload: str | None = None
    """X-Amz-Content-Sha256: what is said, and signed, of the body; None: nothing."""
    presigned: bool = False
    region: str = ""
    credential: UpstreamCredential | None = field(default=None, repr=False)
    secrets: Secrets | None = field(default=None, repr=False)
    chunks: ChunkKey | None = field(default=None, repr=False)
    signed_headers: tuple[str, ...] = ()
    path_as_sent: bool = True
    """Whether the path was signed byte for byte as it was sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Claim:
    """What a request says of its signature."""

    access_key: str
    scope: Scope
    amz_date: str
    signed_headers: str
    signature: str
    presigned: bool
    payload: str | None
    expires_s: int | None = None


def admit(standing: Standing, options: S3Options) -> None:
    """RefusedError for whom the service's options keep out."""
    match standing:
        case Standing.UNJUDGED if options.unknown_keys is UnknownKeys.REFUSE:
            raise RefusedError(refusals.ACCESS_KEY_UNKNOWN)
        case Standing.ANONYMOUS if options.anonymous is Anonymous.REFUSE:
            raise RefusedError(refusals.ANONYMOUS)


def authenticate(
    head: RequestHead, credentials: Mapping[str, UpstreamCredential], *, now_s: float
) -> Authenticated:
    """RefusedError for a request that is not what its access key has signed. VaultError."""
    claim = _claim(head)
    if claim is None:
        return Authenticated(standing=Standing.ANONYMOUS, payload=head.fields.sole("x-amz-content-sha256"))
    _check_form(claim)
    signed = tuple(claim.signed_headers.split(";"))
    credential = credentials.get(claim.access_key)
    if credential is None:
        return Authenticated(
            standing=Standing.UNJUDGED,
            payload=claim.payload,
            presigned=claim.presigned,
            region=claim.scope.region,
            signed_headers=signed,
        )
    if "x-amz-security-token" in head.fields or _parameter(head, "x-amz-security-token") is not None:
        raise RefusedError(refusals.SESSION_TOKEN)
    if credential.has_ended(now_s):
        raise RefusedError(refusals.ACCESS_KEY_UNKNOWN)
    _check_time(claim, now_s)
    _check_signed(signed, head, claim)
    secrets = credential.open()
    key = sigv4.signing_key(secrets.client_secret.encode(), claim.scope)
    path_as_sent = _verify(claim, key, head)
    return Authenticated(
        standing=Standing.VERIFIED,
        payload=claim.payload,
        presigned=claim.presigned,
        region=claim.scope.region,
        credential=credential,
        secrets=secrets,
        chunks=ChunkKey(key=key, amz_date=claim.amz_date, scope=claim.scope, seed=claim.signature),
        signed_headers=signed,
        path_as_sent=path_as_sent,
    )


def _claim(head: RequestHead) -> _Claim | None:
    """None: the request bears no signature. RefusedError for one of another kind, or two."""
    authorization = head.fields.all("authorization")
    query = {name.lower(): value for name, value in parameters(head.target).items()}
    in_query = "x-amz-signature" in query or "x-amz-algorithm" in query or "x-amz-credential" in query
    if "awsaccesskeyid" in query and "signature" in query:
        raise RefusedError(refusals.SIGNATURE_VERSION)
    if authorization and (in_query or len(authorization) > 1):
        raise RefusedError(refusals.AUTHORIZATION_MALFORMED)
    if authorization:
        return _header_claim(authorization[0], head)
    return _query_claim(query, head) if in_query else None


def _header_claim(text: str, head: RequestHead) -> _Claim:
    algorithm, _, rest = text.partition(" ")
    if algorithm != sigv4.ALGORITHM:
        raise RefusedError(refusals.SIGNATURE_VERSION)
    if len(text) > _MAX_AUTHORIZATION:
        raise RefusedError(refusals.AUTHORIZATION_MALFORMED)
    found: dict[str, re.Match[str]] = {}
    for part in rest.split(","):
        name, _, value = part.strip(" ").partition("=")
        pattern = _PARTS.get(name)
        match = pattern.fullmatch(value) if pattern is not None else None
        if match is None or name in found:
            raise RefusedError(refusals.AUTHORIZATION_MALFORMED)
        found[name] = match
    amz_date, payload = head.fields.sole("x-amz-date"), head.fields.sole("x-amz-content-sha256")
    if len(found) < len(_PARTS) or amz_date is None or payload is None:
        raise RefusedError(refusals.AUTHORIZATION_MALFORMED)
    credential = found["Credential"]
    return _Claim(
        access_key=credential["key"],
        scope=Scope(credential["day"], credential["region"], credential["service"]),
        amz_date=amz_date,
        signed_headers=found["SignedHeaders"]["signed"],
        signature=found["Signature"]["signature"],
        presigned=False,
        payload=payload,
    )


def _query_claim(query: Mapping[str, str], head: RequestHead) -> _Claim:
    if query.get("x-amz-algorithm") != sigv4.ALGORITHM:
        raise RefusedError(refusals.SIGNATURE_VERSION)
    credential = re.fullmatch(_CREDENTIAL, query.get("x-amz-credential", ""))
    signed = re.fullmatch(_SIGNED, query.get("x-amz-signedheaders", ""))
    signature = re.fullmatch(_SIGNATURE, query.get("x-amz-signature", ""))
    expires = re.fullmatch(r"[0-9]{1,7}", query.get("x-amz-expires", ""))
    if credential is None or signed is None or signature is None or expires is None:
        raise RefusedError(refusals.AUTHORIZATION_MALFORMED)
    if not 1 <= int(expires[0]) <= MAX_EXPIRES_S or names_twice(head.target):
        raise RefusedError(refusals.AUTHORIZATION_MALFORMED)
    return _Claim(
        access_key=credential["key"],
        scope=Scope(credential["day"], credential["region"], credential["service"]),
        amz_date=query.get("x-amz-date", ""),
        signed_headers=signed[0],
        signature=signature[0],
        presigned=True,
        payload=query.get("x-amz-content-sha256") or head.fields.sole("x-amz-content-sha256"),
        expires_s=int(expires[0]),
    )


def _parameter(head: RequestHead, name: str) -> str | None:
    return {key.lower(): value for key, value in parameters(head.target).items()}.get(name)


def _check_form(claim: _Claim) -> None:
    if claim.scope.service != SERVICE or claim.amz_date[:8] != claim.scope.day:
        raise RefusedError(refusals.AUTHORIZATION_MALFORMED)
    names = claim.signed_headers.split(";")
    if len(names) > sigv4.MAX_SIGNED_HEADERS or not sigv4.sorted_once(names):
        raise RefusedError(refusals.AUTHORIZATION_MALFORMED)
    try:
        sigv4.instant_s(claim.amz_date)
    except ValueError:
        raise RefusedError(refusals.AUTHORIZATION_MALFORMED) from None


def _check_time(claim: _Claim, now_s: float) -> None:
    signed_s = sigv4.instant_s(claim.amz_date)
    if claim.expires_s is None:
        if abs(now_s - signed_s) > sigv4.MAX_SKEW_S:
            raise RefusedError(refusals.REQUEST_SKEWED)
    elif not signed_s - sigv4.MAX_SKEW_S <= now_s < signed_s + claim.expires_s:
        raise RefusedError(refusals.SIGNATURE_EXPIRED)


def _check_signed(signed: Iterable[str], head: RequestHead, claim: _Claim) -> None:
    needed = {name for name in head.fields if name.startswith("x-amz-")} | {"host"}
    if claim.presigned and head.fields.sole("x-amz-content-sha256") == UNSIGNED:
        needed.discard("x-amz-content-sha256")
    if not needed.issubset(signed):
        raise RefusedError(refusals.HEADERS_NOT_SIGNED)


def _verify(claim: _Claim, key: bytes, head: RequestHead) -> bool:
    """Whether the path was signed as it was sent (else: in canonical form). RefusedError if nothing fits."""
    headers = signing_headers(head)
    path, _, query = head.target.partition("?")
    for its_path in dict.fromkeys((path, sigv4.canonical_path(path))):
        for plus_is_space in (False, True) if "+" in query else (False,):
            canonical_query = sigv4.canonical_query(
                query, without=lambda name: name.lower() == "x-amz-signature", plus_is_space=plus_is_space
            )
            try:
                canonical = sigv4.canonical_request(
                    method=head.method,
                    path=its_path,
                    query=canonical_query,
                    signed_headers=claim.signed_headers,
                    headers=headers,
                    payload=claim.payload or UNSIGNED,
                )
            except KeyError:
                raise RefusedError(refusals.SIGNATURE_MISMATCH) from None
            expected = sigv4.signature(key, sigv4.string_to_sign(claim.amz_date, claim.scope, canonical))
            if hmac.compare_digest(expected, claim.signature):
                return its_path == path
    raise RefusedError(refusals.SIGNATURE_MISMATCH)


def signing_headers(head: RequestHead) -> Headers:
    """The headers as the client has signed them."""
    found = [(name, value) for name in head.fields if name != "host" for value in head.fields.all(name)]
    found.append(("host", head.host))
    return found
