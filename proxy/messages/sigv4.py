"""AWS Signature Version 4, the calculation: signing and verifying are the same steps with the same bytes.

1. Source: "Signature Version 4 for AWS API requests" (IAM user guide) and, for what S3 does otherwise,
   "Authenticating Requests (AWS Signature Version 4)" (S3 API reference): a path is encoded once, nothing in
   it is normalized.
2. Nothing here judges a request: what must be signed, how old it may be and whose key it is, each service's
   own module says (encryption_service/sigv4.py, profiles/s3/authentication.py).
3. Text stands for the bytes of the message: UTF-8, what is no UTF-8 as surrogates (message.Fields), and goes
   into the hash as the same bytes again.
"""

import hashlib
import hmac
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple, override
from urllib.parse import quote_from_bytes, unquote_to_bytes

ALGORITHM: Final = "AWS4-HMAC-SHA256"
TERMINATOR: Final = "aws4_request"
MAX_SKEW_S: Final = 300
"""Five minutes: what is dated further in the past, or in the future, is refused."""
MAX_SIGNED_HEADERS: Final = 64
EMPTY_SHA256: Final = hashlib.sha256().hexdigest()

_AMZ_DATE: Final = re.compile(r"([0-9]{4})([0-9]{2})([0-9]{2})T([0-9]{2})([0-9]{2})([0-9]{2})Z")
_UNRESERVED: Final = "-_.~"

type Headers = Sequence[tuple[str, str]]
"""(name in lower case, value) in the order received, duplicates kept."""


class Scope(NamedTuple):
    """What a signing key is good for."""

    day: str
    """yyyymmdd, UTC."""
    region: str
    service: str

    @override
    def __str__(self) -> str:
        return f"{self.day}/{self.region}/{self.service}/{TERMINATOR}"


def signing_key(secret: bytes, scope: Scope) -> bytes:
    """Derived from the secret access key; as secret as that is, for its scope."""
    key = hmac.digest(b"AWS4" + secret, scope.day.encode(), "sha256")
    for step in (scope.region, scope.service, TERMINATOR):
        key = hmac.digest(key, step.encode(), "sha256")
    return key


def string_to_sign(amz_date: str, scope: Scope, canonical: bytes) -> str:
    """For a request whose canonical form is *canonical*."""
    return "\n".join((ALGORITHM, amz_date, str(scope), hashlib.sha256(canonical).hexdigest()))


def signature(key: bytes, text: str) -> str:
    """Of *text*, a string to sign: 64 lower-case hexadecimal digits."""
    return hmac.digest(key, text.encode(), "sha256").hex()


def canonical_request(
    *,
    method: str,
    path: str,
    query: str,
    signed_headers: str,
    headers: Headers,
    payload: str,
) -> bytes:
    """What is signed of a request. KeyError, with its name, if a header that is listed is not there.

    *path*, *query*: in canonical form already. *payload*: the hash of the body, or the word in its place.
    """
    lines = [method, path, query]
    for name in signed_headers.split(";"):
        values = [value for its_name, value in headers if its_name == name]
        if not values:
            raise KeyError(name)
        lines.append(f"{name}:{','.join(collapsed(value) for value in values)}")
    lines += ["", signed_headers, payload]
    return "\n".join(lines).encode("utf-8", "surrogateescape")


def canonical_path(path: str) -> str:
    """*path* as S3 signs it: decoded, and each byte but unreserved ones and `/` encoded again."""
    return quote_from_bytes(unquote_to_bytes(_octets(path)), safe="/" + _UNRESERVED)


def canonical_query(
    query: str, *, without: Callable[[str], bool] = lambda _name: False, plus_is_space: bool = False
) -> str:
    """The parameters, each decoded and encoded again, in order of name and value.

    *without*: true for the names (decoded) to leave out. *plus_is_space*: as HTML forms mean it.
    """
    pairs: list[tuple[str, str]] = []
    for part in query.split("&"):
        if not part:
            continue
        name, _, value = part.partition("=")
        if plus_is_space:
            name, value = name.replace("+", " "), value.replace("+", " ")
        name_octets = unquote_to_bytes(_octets(name))
        if without(name_octets.decode("utf-8", "surrogateescape")):
            continue
        pairs.append(
            (
                quote_from_bytes(name_octets, safe=_UNRESERVED),
                quote_from_bytes(unquote_to_bytes(_octets(value)), safe=_UNRESERVED),
            )
        )
    return "&".join(f"{name}={value}" for name, value in sorted(pairs))


def collapsed(value: str) -> str:
    """Without the blanks round *value*, and with one for every run of them inside."""
    if "  " in value or "\t" in value or "\n" in value:
        return " ".join(re.split(r"[ \t\r\n]+", value.strip(" \t\r\n")))
    return value.strip(" ")


def instant_s(amz_date: str) -> float:
    """Seconds since the Unix epoch of `yyyymmddThhmmssZ`; ValueError for anything else."""
    match = _AMZ_DATE.fullmatch(amz_date)
    if match is None:
        raise ValueError("no X-Amz-Date")
    year, month, day, hour, minute, second = map(int, match.groups())
    return datetime(year, month, day, hour, minute, second, tzinfo=UTC).timestamp()


def amz_date(now_s: float) -> str:
    """The inverse of `instant_s`."""
    return datetime.fromtimestamp(now_s, UTC).strftime("%Y%m%dT%H%M%SZ")


def sorted_once(names: Iterable[str]) -> bool:
    """Whether *names* rise: in order, and none twice. False for an empty name or none at all."""
    before = ""
    for name in names:
        if name <= before:
            return False
        before = name
    return bool(before)


def _octets(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
