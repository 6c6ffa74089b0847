"""Who has signed a request to Azure Storage, and the signature of what leaves in its place.

1. SharedKey by an account of the vault is verified before anything else is done: form, date, and the
   signature, in constant time. What leaves is signed anew, last, over the head as it leaves, with the time
   at which it does.
2. SharedKey by another account is not judged here: such a request goes on as it was signed, or not at all.
3. Tokens (Bearer, shared access signatures) sign no header and no body: they go on as they came.
4. SharedKeyLite is refused: no client of today uses it for blobs.
5. A date may differ from now by fifteen minutes, as at Azure.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime
from enum import Enum
from typing import Final

from proxy import refusals
from proxy.asking import Outgoing
from proxy.messages.message import Fields, RequestHead
from proxy.profiles.azure_blob.addressing import Target
from proxy.profiles.azure_signatures import (
    SIGNED_FIELDS,
    Headers,
    authorization,
    is_signed,
    parse_authorization,
    parse_key,
    string_to_sign,
)
from proxy.refusals import RefusedError
from proxy.vault.model import UpstreamCredential, VaultError

MAX_SKEW_S: Final = 900
_PREFIX: Final = "x-ms-"
_REPLACED: Final = frozenset({"authorization", "date", "host", "x-ms-date"})


class Standing(Enum):
    """What is known of a request's sender."""

    VERIFIED = "verified"  # has signed with the key of an account of the vault
    UNJUDGED = "unjudged"  # has signed with another: for the service to judge
    TOKEN = "token"  # noqa: S105 - shows a token, which the service judges
    ANONYMOUS = "anonymous"


@dataclass(frozen=True, slots=True, kw_only=True)
class Authenticated:
    standing: Standing
    account: str = ""
    upstream_key: bytes = field(default=b"", repr=False)


def authenticate(
    head: RequestHead, target: Target, credentials: Mapping[str, UpstreamCredential], *, now_s: float
) -> Authenticated:
    """RefusedError for a request that is not what its account's key has signed. VaultError."""
    values = head.fields.all("authorization")
    if len(values) > 1:
        raise RefusedError(refusals.AUTHORIZATION_MALFORMED)
    if not values:
        has_token = "sig" in target.parameters and "sv" in target.parameters
        return Authenticated(standing=Standing.TOKEN if has_token else Standing.ANONYMOUS)
    scheme = values[0].partition(" ")[0].lower()
    if scheme == "bearer":
        return Authenticated(standing=Standing.TOKEN)
    if scheme == "sharedkeylite":
        raise RefusedError(refusals.SHARED_KEY_LITE)
    claim = parse_authorization(values[0])
    if claim is None or "sig" in target.parameters:
        raise RefusedError(refusals.AUTHORIZATION_MALFORMED)
    account = claim[0]
    if target.account and target.account.removesuffix("-secondary") != account:
        raise RefusedError(refusals.AUTHORIZATION_MALFORMED)
    credential = credentials.get(account)
    if credential is None:
        return Authenticated(standing=Standing.UNJUDGED, account=account)
    if credential.has_ended(now_s):
        raise RefusedError(refusals.ACCESS_KEY_UNKNOWN)
    headers = signing_headers(head.fields)
    _check_date(headers, now_s)
    secrets = credential.open()
    try:
        key = parse_key(secrets.client_secret)
        upstream_key = parse_key(secrets.signs_with.decode("ascii", "replace"))
    except ValueError:
        raise VaultError("a stored account key is none") from None
    if not is_signed(key, head.method, head.target, headers):
        raise RefusedError(refusals.SIGNATURE_MISMATCH)
    return Authenticated(standing=Standing.VERIFIED, account=account, upstream_key=upstream_key)


def signing_headers(fields: Fields) -> Headers:
    """RefusedError if one that is signed came more than once: it has no one value."""
    found: dict[str, str] = {}
    for name in fields:
        value = fields.sole(name)
        if value is not None:
            found[name] = value
        elif name.startswith(_PREFIX) or name in SIGNED_FIELDS:
            raise RefusedError(refusals.BAD_MESSAGE)
    return found


def drops_what_is_signed(head: RequestHead) -> bool:
    """Whether Connection, which nobody signs, takes away what a signature or this profile counts on."""
    return any(name.startswith(_PREFIX) or name in SIGNED_FIELDS for name in head.fields.tokens("connection"))


def _check_date(headers: Headers, now_s: float) -> None:
    text = headers.get("x-ms-date") or headers.get("date")
    try:
        at = parsedate_to_datetime(text or "")
        # Without a zone it is GMT (RFC 9110 5.6.7).
        signed_s = (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise RefusedError(refusals.AUTHORIZATION_MALFORMED) from None
    if abs(now_s - signed_s) > MAX_SKEW_S:
        raise RefusedError(refusals.REQUEST_SKEWED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resigner:
    """Signs in the name of a verified account (rule 1)."""

    account: str
    key: bytes = field(repr=False)
    host: str
    """The service's, as its Host field names it."""
    wall_s: Callable[[], float]

    def __call__(self, outgoing: Outgoing) -> Outgoing:
        date = format_datetime(datetime.fromtimestamp(self.wall_s(), UTC), usegmt=True)
        fields = _with(outgoing, _REPLACED, ("Host", self.host), ("x-ms-date", date))
        headers = signing_headers(Fields(fields))
        made = authorization(self.key, outgoing.method, outgoing.target, headers, self.account)
        return Outgoing(
            method=outgoing.method,
            target=outgoing.target,
            fields=(*fields, (b"Authorization", made.encode())),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Unchanged:
    """Lets pass what is still as its client has signed it (rule 2)."""

    account: str
    head: RequestHead
    host: str
    same_body: bool = False
    """Whether a body that leaves is the one that came. Its length is signed, its content is not."""

    def __call__(self, outgoing: Outgoing) -> Outgoing:
        """RefusedError(CANNOT_SIGN) if something differs that was signed."""
        fields = _with(outgoing, {"host"}, ("Host", self.host))
        theirs, ours = signing_headers(self.head.fields), signing_headers(Fields(fields))
        signed = string_to_sign(self.head.method, self.head.target, theirs, self.account)
        leaving = string_to_sign(outgoing.method, outgoing.target, ours, self.account)
        has_body = ours.get("content-length", "0") != "0" or "transfer-encoding" in ours
        if signed != leaving or (has_body and not self.same_body):
            raise RefusedError(refusals.CANNOT_SIGN)
        return Outgoing(method=outgoing.method, target=outgoing.target, fields=fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class AsItCame:
    """Tokens sign nothing that is changed here (rule 3)."""

    host: str

    def __call__(self, outgoing: Outgoing) -> Outgoing:
        fields = _with(outgoing, {"host"}, ("Host", self.host))
        return Outgoing(method=outgoing.method, target=outgoing.target, fields=fields)


def _with(
    outgoing: Outgoing, without: "frozenset[str] | set[str]", *ours: tuple[str, str]
) -> tuple[tuple[bytes, bytes], ...]:
    kept = [item for item in outgoing.fields if item[0].decode("latin-1").lower() not in without]
    return (*kept, *((name.encode(), value.encode()) for name, value in ours))
