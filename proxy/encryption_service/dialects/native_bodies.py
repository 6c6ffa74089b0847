"""Bodies of the native API: one type per request and answer; the OpenAPI document is made of these.

1. Strict: unknown names, other types, base64 without padding or of another alphabet, NaN are refused. Of a
   name that stands twice the last counts.
2. Binary values are base64 in JSON, `bytes` here.
3. A ciphertext is opaque to callers: format(1) ‖ version(4, big-endian) ‖ nonce(24) ‖ ciphertext ‖ tag(16).
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, Self

import msgspec
from msgspec import Meta

from proxy.encryption_service.signatures import HashName, Marshaling, RsaPadding

MAX_ITEMS: Final = 1000
MAX_REFERENCE_CHARS: Final = 256
MAX_DATA_KEY_BYTES: Final = 1024
NONCE_SIZE: Final = 24
TAG_SIZE: Final = 16
FORMAT: Final = b"\x01"
_HEAD_SIZE: Final = 1 + 4
_MIN_SIZE: Final = _HEAD_SIZE + NONCE_SIZE + TAG_SIZE

_BASE64: Final = {
    "contentEncoding": "base64",
    "pattern": "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$",
}

type Binary = Annotated[bytes, Meta(extra_json_schema=_BASE64)]
type Name = Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9-]{0,62}$")]
type Version = Annotated[int, Meta(ge=1, le=0xFFFFFFFF)]
type Reference = Annotated[str, Meta(max_length=MAX_REFERENCE_CHARS, description="repeated in the result")]


type KeyIdText = Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]


class _Strict(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class EncryptRequest(_Strict, kw_only=True):
    plaintext: Binary
    aad: Binary = b""
    """Must be given again to decrypt."""
    context: Binary = b""
    """Makes a key of its own; must be given again to decrypt."""


class EncryptItem(EncryptRequest, kw_only=True):
    reference: Reference = ""


class DecryptRequest(_Strict, kw_only=True):
    ciphertext: Binary
    aad: Binary = b""
    context: Binary = b""


class DecryptItem(DecryptRequest, kw_only=True):
    reference: Reference = ""


class ReencryptRequest(DecryptRequest, kw_only=True):
    source_key: Name | None = None
    """The key it is encrypted under, if another one: the caller needs the operation `rewrap` on both."""


class ReencryptItem(ReencryptRequest, kw_only=True):
    reference: Reference = ""


class GenerateDataKeyRequest(_Strict, kw_only=True):
    size_bytes: Annotated[int, Meta(ge=1, le=MAX_DATA_KEY_BYTES)] = 32
    wrapped_only: bool = False
    """Leave the data key itself out of the answer."""
    aad: Binary = b""
    context: Binary = b""


class SignRequest(_Strict, kw_only=True):
    message: Binary | None = None
    """One of `message` and `digest`."""
    digest: Binary | None = None
    hash: HashName = HashName.SHA256
    padding: RsaPadding | None = None
    """RSA keys only."""
    salt_length: Annotated[int, Meta(ge=0, le=512)] | None = None
    """PSS only; absent: the hash's length."""
    marshaling: Marshaling | None = None
    """ECDSA keys only; absent: asn1."""


class SignItem(SignRequest, kw_only=True):
    reference: Reference = ""


class VerifyRequest(SignRequest, kw_only=True):
    signature: Binary
    version: Version


class VerifyItem(VerifyRequest, kw_only=True):
    reference: Reference = ""


class TenantEncryptRequest(_Strict, kw_only=True):
    key: Name
    """The ring: its active key is used."""
    plaintext: Binary
    aad: Binary = b""
    """Must be given again to decrypt; at most 65,535 bytes."""
    anonymous: bool = False
    """The ciphertext names no key. Whoever decrypts it names one, or has all tried."""


class TenantDecryptRequest(_Strict, kw_only=True):
    ciphertext: Binary
    aad: Binary = b""
    key_id: KeyIdText | None = None
    """Only this key. Not needed where the ciphertext names it."""
    ring: Name | None = None
    """Only the keys of this name."""


MAX_TOKEN_CHARS: Final = 16 * 1024
MAX_TOKEN_LIFETIME_S: Final = 86_400
MAX_CLAIMS: Final = 32

type TokenText = Annotated[str, Meta(min_length=1, max_length=256)]
type Claim = (
    bool
    | int
    | Annotated[str, Meta(max_length=512)]
    | Annotated[list[Annotated[str, Meta(max_length=256)]], Meta(max_length=64)]
)


class TokenRequest(_Strict, kw_only=True):
    key: Name
    """A signing key; its active version signs."""
    subject: TokenText
    audience: TokenText
    lifetime_s: Annotated[int, Meta(ge=1, le=MAX_TOKEN_LIFETIME_S)] = 900
    claims: Annotated[dict[str, Claim], Meta(max_length=MAX_CLAIMS)] = {}
    """What else it says; no registered name of RFC 7519."""


class TokenVerifyRequest(_Strict, kw_only=True):
    key: Name
    token: Annotated[str, Meta(min_length=1, max_length=MAX_TOKEN_CHARS)]
    audience: TokenText


class Batch[I](_Strict, kw_only=True):
    items: Annotated[list[I], Meta(min_length=1, max_length=MAX_ITEMS)]


# Answers.


class Encrypted(msgspec.Struct, kw_only=True):
    key: str
    version: Version
    ciphertext: Binary


class Decrypted(msgspec.Struct, kw_only=True):
    key: str
    version: Version
    plaintext: Binary


class DataKey(msgspec.Struct, kw_only=True, omit_defaults=True):
    key: str
    version: Version
    ciphertext: Binary
    plaintext: Binary | None = None


class Signed(msgspec.Struct, kw_only=True):
    key: str
    version: Version
    algorithm: str
    signature: Binary


class Verified(msgspec.Struct, kw_only=True):
    key: str
    version: Version
    valid: bool


class TenantEncrypted(msgspec.Struct, kw_only=True):
    key: str
    version: Version
    key_id: str
    """Hex. An anonymous ciphertext does not say it."""
    ciphertext: Binary


class TenantDecrypted(msgspec.Struct, kw_only=True):
    key: str
    version: Version
    key_id: str
    candidates: int
    """How many keys were tried; 0 if it was named."""
    plaintext: Binary


class Token(msgspec.Struct, kw_only=True):
    key: str
    version: Version
    key_id: str
    """Hex; `kid` in the token and in the key set."""
    token: str
    expires_at_s: int


class TokenVerified(msgspec.Struct, kw_only=True):
    key: str
    version: Version
    key_id: str
    subject: str
    audience: str
    expires_at_s: int
    claims: dict[str, Any]


class ItemError(msgspec.Struct, kw_only=True):
    code: str
    detail: str


class Result[A](msgspec.Struct, kw_only=True, omit_defaults=True):
    """Of one item: `result`, or `error`."""

    result: A | None = None
    error: ItemError | None = None
    reference: str = ""


class BatchAnswer[A](msgspec.Struct, kw_only=True):
    results: list[Result[A]]
    """In the order of the items."""
    failed: int
    """How many of them are errors."""


class VersionDescription(msgspec.Struct, kw_only=True, omit_defaults=True):
    version: int
    key_id: str
    state: Literal["pre-active", "active", "suspended", "deactivated", "compromised", "destroyed"]
    public_key: str | None = None
    """PEM, of a signing key."""


class KeyDescription(msgspec.Struct, kw_only=True, omit_defaults=True):
    name: str
    use: Literal["data", "sign"]
    algorithm: str
    operations: list[str]
    """What the tenant allows and this caller may do."""
    blocked: bool
    standing: Literal["serving", "degraded", "stale", "revoked"]
    versions: list[VersionDescription]


class KeyList(msgspec.Struct, kw_only=True):
    keys: list[KeyDescription]


class Status(msgspec.Struct, kw_only=True):
    tenant: str
    standing: Literal["serving", "degraded", "stale", "revoked"]


class Problem(msgspec.Struct, kw_only=True):
    """RFC 9457. `code` is stable; `detail` names the cause, `next_step` what to do."""

    type: Literal["about:blank"] = "about:blank"
    title: str
    status: int
    code: str
    detail: str
    next_step: str


class MalformedError(Exception):
    """The body is not what the call takes; the text is the client's."""


class Reader[B]:
    """Reads bodies of one kind."""

    def __init__(self, kind: Any) -> None:
        self._decode = msgspec.json.Decoder(kind).decode

    def read(self, body: bytes) -> B:
        """MalformedError."""
        try:
            read: B = self._decode(body)
        except RecursionError:
            raise MalformedError("the body is nested too deeply") from None
        except msgspec.MsgspecError as error:
            raise MalformedError(str(error)[:512]) from None
        except ValueError:  # a UnicodeDecodeError would quote the body
            raise MalformedError("the body is not valid UTF-8") from None
        return read


@dataclass(frozen=True, slots=True)
class Ciphertext:
    """Rule 3, taken apart."""

    version: int
    nonce: bytes
    ciphertext: bytes = field(repr=False)
    tag: bytes

    @classmethod
    def parse(cls, packed: bytes) -> Self | None:
        """None if it is not one of ours."""
        if len(packed) < _MIN_SIZE or packed[:1] != FORMAT:
            return None
        body = packed[_HEAD_SIZE:]
        return cls(
            version=int.from_bytes(packed[1:_HEAD_SIZE]),
            nonce=body[:NONCE_SIZE],
            ciphertext=body[NONCE_SIZE:-TAG_SIZE],
            tag=body[-TAG_SIZE:],
        )


def pack(version: int, nonce: bytes, ciphertext: bytes, tag: bytes) -> bytes:
    return FORMAT + version.to_bytes(4) + nonce + ciphertext + tag
