"""The signature of what leaves: made anew with the vault's secret, or the client's own where nothing changed.

1. It is made last, over the head as it will leave, with the time at which it leaves: each request of a long
   conversation has a signature of its own.
2. The body is not signed (`UNSIGNED-PAYLOAD`): it is sealed, authenticated by its seal, and goes by TLS. A
   request without a body signs that.
3. What the client signed with goes: Authorization, the parameters of a presigned URL, its dates, its words
   for the body; so do parameters that stand for header fields and do not go up (hoisted.py). Every
   `x-amz-*` header that stays is signed.
4. Without a secret nothing may change that the client has signed: method, path, query, Host, signed headers,
   and the body unless it was said not to be signed. It is compared here, and refused if it differs.
5. The host is the service's, with the bucket before it where the client had it there.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from proxy import refusals
from proxy.asking import Outgoing
from proxy.messages import sigv4
from proxy.messages.message import Fields, RequestHead
from proxy.messages.sigv4 import Headers, Scope
from proxy.profiles.s3.addressing import Address, without_parameters
from proxy.profiles.s3.authentication import SERVICE, UNSIGNED, Authenticated, signing_headers
from proxy.profiles.s3.routes import is_authentication
from proxy.refusals import RefusedError

# What the client signed with, and its words for a body that is not sent as it came.
_REPLACED: Final = frozenset(
    {
        "authorization",
        "date",
        "host",
        "x-amz-content-sha256",
        "x-amz-date",
        "x-amz-decoded-content-length",
        "x-amz-security-token",
        "x-amz-trailer",
    }
)
_FRAMING: Final = frozenset({"x-amz-decoded-content-length", "x-amz-trailer"})
_ALSO_SIGNED: Final = frozenset({"content-md5", "content-type"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Resigner:
    """Signs in the name of a verified client (rules 1 to 3, 5)."""

    authenticated: Authenticated = field(repr=False)
    address: Address
    host: str
    """The service's, as its Host field names it."""
    region: str | None
    """The one to sign for; None: the client's."""
    wall_s: Callable[[], float]
    payload: str | None = None
    """What is said of the body; None: that it is not signed, or that there is none."""
    gone: frozenset[str] = frozenset()
    """Parameters, decoded and in lower case, that do not go up."""

    def __call__(self, outgoing: Outgoing) -> Outgoing:
        """RefusedError(CANNOT_SIGN) if there is nothing to sign with."""
        credential, secrets = self.authenticated.credential, self.authenticated.secrets
        if credential is None or secrets is None:
            raise RefusedError(refusals.CANNOT_SIGN)
        path, mark, query = without_authentication(outgoing.target, self.gone).partition("?")
        gone = _REPLACED if self.payload is None else _REPLACED - _FRAMING
        kept = [item for item in outgoing.fields if item[0].decode("latin-1").lower() not in gone]
        amz_date = sigv4.amz_date(self.wall_s())
        scope = Scope(amz_date[:8], self.region or self.authenticated.region, SERVICE)
        payload = self.payload or (UNSIGNED if _has_body(kept) else sigv4.EMPTY_SHA256)
        host = upstream_host(self.address, self.host)
        ours = [("Host", host), ("X-Amz-Date", amz_date), ("X-Amz-Content-Sha256", payload)]
        if secrets.session_token is not None:
            ours.append(("X-Amz-Security-Token", secrets.session_token))
        fields = (*kept, *((name.encode(), value.encode()) for name, value in ours))
        headers = _headers(fields)
        names = sorted({name for name, _ in headers if _is_signed(name)})
        canonical = sigv4.canonical_request(
            method=outgoing.method,
            path=path if self.authenticated.path_as_sent else sigv4.canonical_path(path),
            query=sigv4.canonical_query(query),
            signed_headers=";".join(names),
            headers=headers,
            payload=payload,
        )
        key = sigv4.signing_key(secrets.signs_with, scope)
        signature = sigv4.signature(key, sigv4.string_to_sign(amz_date, scope, canonical))
        authorization = (
            f"{sigv4.ALGORITHM} Credential={credential.upstream_access_key}/{scope}, "
            f"SignedHeaders={';'.join(names)}, Signature={signature}"
        )
        return Outgoing(
            method=outgoing.method,
            target=path + mark + query,
            fields=(*fields, (b"Authorization", authorization.encode())),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Unchanged:
    """Lets pass what is still as its client has signed it, or has not signed at all (rules 4, 5)."""

    authenticated: Authenticated = field(repr=False)
    head: RequestHead
    address: Address
    host: str
    same_body: bool = False
    """Whether the body that leaves is the one that came."""
    gone: frozenset[str] = frozenset()
    """Parameters, decoded and in lower case, that do not go up."""

    def __call__(self, outgoing: Outgoing) -> Outgoing:
        """RefusedError(CANNOT_SIGN) if something differs that was signed."""
        host = upstream_host(self.address, self.host)
        fields = tuple(item for item in outgoing.fields if item[0].lower() != b"host")
        fields = (*fields, (b"Host", host.encode()))
        if self.gone:
            target = without_parameters(outgoing.target, lambda name: name.lower() in self.gone)
            outgoing = replace(outgoing, target=target)
        if self.authenticated.signed_headers:
            self._compare(outgoing, _headers(fields))
        return Outgoing(method=outgoing.method, target=outgoing.target, fields=fields)

    def _compare(self, outgoing: Outgoing, headers: Headers) -> None:
        theirs = signing_headers(self.head)
        same = (outgoing.method, outgoing.target) == (self.head.method, self.head.target) and all(
            _values(headers, name) == _values(theirs, name) for name in self.authenticated.signed_headers
        )
        is_changed = _has_body(outgoing.fields) and not self.same_body
        if not same or (is_changed and self.authenticated.payload not in (None, UNSIGNED)):
            raise RefusedError(refusals.CANNOT_SIGN)


def upstream_host(address: Address, host: str) -> str:
    return f"{address.bucket}.{host}" if address.virtual_host else host


def without_authentication(target: str, gone: frozenset[str] = frozenset()) -> str:
    """*target* without the parameters of a presigned URL and those *gone*, every other byte as it was."""
    return without_parameters(target, lambda name: is_authentication(name) or name.lower() in gone)


def _is_signed(name: str) -> bool:
    return name == "host" or name in _ALSO_SIGNED or name.startswith("x-amz-")


def _headers(fields: tuple[tuple[bytes, bytes], ...]) -> Headers:
    mapping = Fields(fields)
    return [(name, value) for name in mapping for value in mapping.all(name)]


def _values(headers: Headers, name: str) -> list[str]:
    return [value for its_name, value in headers if its_name == name]


def _has_body(fields: Iterable[tuple[bytes, bytes]]) -> bool:
    for name, value in fields:
        lower = name.lower()
        if lower == b"transfer-encoding" or (lower == b"content-length" and value.strip() != b"0"):
            return True
    return False
