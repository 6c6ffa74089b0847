"""Requests and answers of the KACLS API (Google Workspace client-side encryption API, reference).

1. Unknown members are passed over, as Google adds some; known ones have their type and their size, or 400.
2. base64 is the standard alphabet with padding, in its one spelling. A digest may lack the padding, of which
   the reference says "this value is unpadded" and shows the contrary.
3. An error is {code, message, details}: the HTTP status, a sentence, and what kind of case it is.
"""

import base64
import binascii
from typing import Final

import msgspec

from envelope.errors import SealgateError

MAX_BODY_BYTES: Final = 64 * 1024
MAX_KEY_BYTES: Final = 128
MAX_WRAPPED_KEY_CHARS: Final = 1024
MAX_WRAPPED_PRIVATE_KEY_CHARS: Final = 8 * 1024
MAX_REASON_BYTES: Final = 1024
MAX_RESOURCE_BYTES: Final = 512
"""Google's bound is 128, and 512 in Gmail."""
MAX_PERIMETER_BYTES: Final = 128
MAX_DIGEST_BYTES: Final = 128
MAX_ENCRYPTED_KEY_BYTES: Final = 1024
MAX_LABEL_BYTES: Final = 1024


class MalformedError(SealgateError):
    """The request is not what the reference asks for: 400."""


class Request(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What every call may say about why it is made."""

    reason: str = ""


class Wrap(Request, frozen=True, kw_only=True, gc=False):
    authentication: str
    authorization: str
    key: str


class Unwrap(Request, frozen=True, kw_only=True, gc=False):
    authentication: str
    authorization: str
    wrapped_key: str


class Digest(Request, frozen=True, kw_only=True, gc=False):
    authorization: str
    wrapped_key: str


class Rewrap(Request, frozen=True, kw_only=True, gc=False):
    authorization: str
    original_kacls_url: str
    wrapped_key: str


class PrivilegedWrap(Request, frozen=True, kw_only=True, gc=False):
    authentication: str
    key: str
    resource_name: str
    perimeter_id: str = ""


class PrivilegedUnwrap(Request, frozen=True, kw_only=True, gc=False):
    authentication: str
    resource_name: str
    wrapped_key: str


class PrivateKeyDecrypt(Request, frozen=True, kw_only=True, gc=False):
    authentication: str
    authorization: str
    algorithm: str
    encrypted_data_encryption_key: str
    rsa_oaep_label: str = ""
    wrapped_private_key: str


class PrivateKeySign(Request, frozen=True, kw_only=True, gc=False):
    authentication: str
    authorization: str
    algorithm: str
    digest: str
    rsa_pss_salt_length: int | None = None
    wrapped_private_key: str


class PrivilegedPrivateKeyDecrypt(Request, frozen=True, kw_only=True, gc=False):
    authentication: str
    algorithm: str
    encrypted_data_encryption_key: str
    rsa_oaep_label: str = ""
    spki_hash: str
    spki_hash_algorithm: str
    wrapped_private_key: str


class WrapPrivateKey(Request, frozen=True, kw_only=True, gc=False):
    authentication: str
    perimeter_id: str = ""
    private_key: str


class Delegate(Request, frozen=True, kw_only=True, gc=False):
    authentication: str
    authorization: str


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    code: int
    message: str
    details: str


_encoder: Final = msgspec.json.Encoder()


class Reader[R: Request]:
    """Reads one kind of request."""

    def __init__(self, kind: type[R]) -> None:
        self._decoder: Final[msgspec.json.Decoder[R]] = msgspec.json.Decoder(kind)

    def read(self, body: bytes) -> R:
        """MalformedError if *body* is not such a request, or its reason is too long."""
        try:
            request = self._decoder.decode(body)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            # msgspec's texts name members and types, never values.
            cause = str(error) if isinstance(error, msgspec.ValidationError) else "not JSON"
            raise MalformedError(f"the body is not such a request: {cause}") from None
        bounded("reason", request.reason, MAX_REASON_BYTES)
        return request


def written(members: dict[str, object]) -> bytes:
    """One line of JSON."""
    return _encoder.encode(members)


def error_body(status: int, message: str, details: str) -> bytes:
    return _encoder.encode(ErrorBody(code=status, message=message, details=details))


def bounded(name: str, text: str, max_bytes: int, *, empty: bool = True) -> str:
    """*text* if it fits. MalformedError."""
    if (not text and not empty) or len(text.encode()) > max_bytes:
        raise MalformedError(f"{name} has {'' if empty else '1 to '}at most {max_bytes} bytes")
    return text


def decoded(name: str, text: str, max_bytes: int, *, unpadded: bool = False) -> bytes:
    """The bytes of a base64 member, at least one. MalformedError (rule 2)."""
    if unpadded:
        text += "=" * (-len(text) % 4)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise MalformedError(f"{name} is not base64") from None
    if base64.b64encode(data).decode() != text:
        raise MalformedError(f"{name} is not base64 in its one spelling")
    if not 0 < len(data) <= max_bytes:
        raise MalformedError(f"{name} has 1 to {max_bytes} bytes")
    return data


def wrapped(name: str, text: str, max_chars: int) -> bytes:
    """The bytes of a blob, whose size counts as text. MalformedError."""
    if len(text) > max_chars:
        raise MalformedError(f"{name} has at most {max_chars} characters")
    return decoded(name, text, max_chars)


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()
