"""Azure Storage's SharedKey, the calculation: signing and verifying are the same steps with the same bytes.

1. Source: "Authorize with Shared Key" (Azure Storage REST reference), for Blob, service version 2015-02-21
   and later. SAS tokens sign no header and no body: they are none of this module's business.
2. A key is the account's, and as secret: it is never in a repr, an error or a log.
3. Nothing here judges a request's age or rights; azure_blob/authentication.py does.
4. Fields `x-ms-*` are sorted as the service sorts them: by a culture's rules, for which a hyphen counts only
   where nothing else differs, and an underscore comes before digits.
"""

import base64
import binascii
import hmac
import re
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import unquote_to_bytes

SCHEME: Final = "SharedKey"
KEY_SIZE: Final = 64
_AUTHORIZATION: Final = re.compile(r"SharedKey ([a-z0-9]{3,24}):([A-Za-z0-9+/]{43}=)")
# In the order of the string to sign; Content-Length and Date have rules of their own.
_STANDARD: Final = (
    "content-encoding",
    "content-language",
    "content-length",
    "content-md5",
    "content-type",
    "date",
    "if-modified-since",
    "if-match",
    "if-none-match",
    "if-unmodified-since",
    "range",
)
SIGNED_FIELDS: Final = frozenset(_STANDARD)
"""Those that are signed beside all `x-ms-*`."""
_ORDER: Final = {
    letter: place for place, letter in enumerate("!#$%&*.^_`|~+0123456789abcdefghijklmnopqrstuvwxyz")
}
_SPACES: Final = re.compile(r"[ \t]*\r?\n[ \t]*|[ \t]+")

type Headers = Mapping[str, str]
"""By lower-case name; each came once."""


def parse_authorization(value: str) -> tuple[str, bytes] | None:
    """Account and signature (32 bytes) of a SharedKey credential; None if it is none."""
    match = _AUTHORIZATION.fullmatch(value)
    return None if match is None else (match[1], base64.b64decode(match[2]))


def parse_key(text: str) -> bytes:
    """The account key from its base64 form. ValueError, not quoting it, if it is none."""
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("an account key is base64") from None
    if len(key) != KEY_SIZE:
        raise ValueError(f"an account key has {KEY_SIZE} bytes, not {len(key)}")
    return key


def string_to_sign(method: str, target: str, headers: Headers, account: str) -> bytes:
    """What a request of *account* is signed by. *target*: path and query as they are sent."""
    path, _, query = target.partition("?")
    standard = [_standard(name, headers) for name in _STANDARD]
    lines = [method, *standard, *_canonical_headers(headers)]
    text = "\n".join(lines) + "\n" + _canonical_resource(account, path, query)
    return text.encode("utf-8", "surrogateescape")


def signature(key: bytes, method: str, target: str, headers: Headers, account: str) -> bytes:
    """32 bytes."""
    return hmac.digest(key, string_to_sign(method, target, headers, account), "sha256")


def authorization(key: bytes, method: str, target: str, headers: Headers, account: str) -> str:
    """The Authorization field of a request that is about to leave."""
    made = signature(key, method, target, headers, account)
    return f"{SCHEME} {account}:{base64.b64encode(made).decode()}"


def is_signed(key: bytes, method: str, target: str, headers: Headers) -> bool:
    """Whether the request's own Authorization is right under *key*. Constant time in the signature."""
    given = parse_authorization(headers.get("authorization", ""))
    if given is None:
        return False
    account, shown = given
    return hmac.compare_digest(signature(key, method, target, headers, account), shown)


def _standard(name: str, headers: Headers) -> str:
    value = headers.get(name, "")
    if name == "content-length" and value == "0":
        return ""  # since version 2015-02-21
    if name == "date" and "x-ms-date" in headers:
        return ""
    return value


def _canonical_headers(headers: Headers) -> Iterable[str]:
    for name in sorted((name for name in headers if name.startswith("x-ms-")), key=_place):
        yield f"{name}:{_SPACES.sub(' ', headers[name]).strip()}"


def _place(name: str) -> tuple[list[int], list[bool]]:
    return (
        [_ORDER[letter] for letter in name if letter in _ORDER],
        [letter == "-" for letter in name],
    )


def _canonical_resource(account: str, path: str, query: str) -> str:
    values: dict[str, list[str]] = {}
    for member in filter(None, query.split("&")):
        name, _, value = member.partition("=")
        values.setdefault(_decoded(name).lower(), []).append(_decoded(value))
    lines = [f"{name}:{','.join(sorted(values[name]))}" for name in sorted(values)]
    return "\n".join([f"/{account}{path or '/'}", *lines])


def _decoded(text: str) -> str:
    raw = text.replace("+", " ").encode("utf-8", "surrogateescape")
    return unquote_to_bytes(raw).decode("utf-8", "surrogateescape")
