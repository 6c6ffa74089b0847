"""Bodies of the transit dialect: what Vault's clients send, read as OpenBao reads it. Pure.

1. Two roads, one result. A body that is well typed goes through msgspec alone; whatever that refuses is read
   again, slowly, the way the original's weak typing does, to serve it or to say in its words what is wrong.
2. Stricter than the original, on purpose: a string is never made of a number, a version is written in one
   way only, `null` counts as absent, and bodies are JSON.
3. An item of a batch is strictly typed, as in the original.
4. What a body can make of memory is bounded before it is read: by commas, which bound its values.
"""

import binascii
import re
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

CIPHERTEXT_FORMAT: Final = 1
"""First byte of the opaque part: format(1) ‖ nonce(24) ‖ ciphertext ‖ tag(16)."""
PREFIX: Final = "vault:v"
NONCE_SIZE: Final = 24
TAG_SIZE: Final = 16
_OVERHEAD: Final = 1 + NONCE_SIZE + TAG_SIZE
MAX_VERSION: Final = 0xFFFFFFFF
TOO_OLD: Final = "ciphertext or signature version is disallowed by policy (too old)"

_BIG_BODY_BYTES: Final = 64 * 1024
_COMMAS_PER_ITEM: Final = 32
_ENCRYPTING: Final = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+/"
_ALPHABET: Final = frozenset(_ENCRYPTING)
_VERSION: Final = re.compile(r"[1-9][0-9]{0,9}")
_WHOLE: Final = re.compile(r"[+-]?[0-9]{1,18}")
_TRUE: Final = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE: Final = frozenset({"0", "f", "F", "FALSE", "false", "False", ""})


class BodyError(Exception):
    """The body, or an item of it, is not what the call takes. The text is the client's; status 400 or 413."""

    def __init__(self, text: str, *, status: int = 400) -> None:
        super().__init__(text)
        self.text = text
        self.status = status


class EncryptItem(msgspec.Struct, kw_only=True):
    plaintext: str
    context: str = ""
    associated_data: str = ""
    key_version: int = 0
    reference: str = ""


class CiphertextItem(msgspec.Struct, kw_only=True):
    """Of decrypt and rewrap."""

    ciphertext: str = ""
    context: str = ""
    associated_data: str = ""
    key_version: int = 0
    reference: str = ""


class SignItem(msgspec.Struct, kw_only=True):
    input: str | None = None
    context: str = ""
    reference: str = ""


class VerifyItem(msgspec.Struct, kw_only=True):
    input: str | None = None
    signature: str | None = None
    hmac: str | None = None
    context: str = ""
    reference: str = ""


class EncryptBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    plaintext: str | None = None
    context: str = ""
    associated_data: str = ""
    key_version: int = 0
    batch_input: list[EncryptItem] | None = None
    partial_failure_response_code: int = 0
    type: str = ""
    convergent_encryption: bool = False


class DecryptBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    ciphertext: str = ""
    context: str = ""
    associated_data: str = ""
    batch_input: list[CiphertextItem] | None = None
    partial_failure_response_code: int = 0


class RewrapBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    ciphertext: str = ""
    context: str = ""
    associated_data: str = ""
    key_version: int = 0
    batch_input: list[CiphertextItem] | None = None


class DataKeyBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    bits: int = 256
    context: str = ""
    associated_data: str = ""
    key_version: int = 0


class SignBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    input: str = ""
    context: str = ""
    hash_algorithm: str = ""
    algorithm: str = ""
    key_version: int = 0
    prehashed: bool = False
    signature_algorithm: str = ""
    marshaling_algorithm: str = "asn1"
    salt_length: str | int = "auto"
    batch_input: list[SignItem] | None = None


class VerifyBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    input: str = ""
    signature: str = ""
    hmac: str = ""
    context: str = ""
    hash_algorithm: str = ""
    algorithm: str = ""
    prehashed: bool = False
    signature_algorithm: str = ""
    marshaling_algorithm: str = "asn1"
    salt_length: str | int = "auto"
    batch_input: list[VerifyItem] | None = None


class NoBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Of calls that take nothing; what is sent all the same is ignored, and said to be."""


class Reader[B: msgspec.Struct]:
    """Reads bodies of one kind. *ignored* of `read` are the names nobody knows, sorted, for a warning."""

    def __init__(self, kind: type[B], *, max_items: int) -> None:
        self._kind: Final = kind
        self._max_items: Final = max_items
        self._decode: Final = msgspec.json.Decoder(kind).decode
        self._fields: Final = {f.name: f for f in msgspec.structs.fields(kind)}

    def read(self, body: bytes) -> tuple[B, list[str]]:
        """BodyError: not JSON, not an object, a value of a wrong type, too many values or items."""
        if not body:
            return self._kind(), []
        if len(body) > _BIG_BODY_BYTES and body.count(b",") > _COMMAS_PER_ITEM * self._max_items:
            raise BodyError("refused JSON input due to high complexity: exceeded maximum number of values")
        try:
            read, ignored = self._decode(body), list[str]()
        except (msgspec.MsgspecError, ValueError, RecursionError):
            read, ignored = self._read_slowly(body)
        items = getattr(read, "batch_input", None)
        if items is not None:
            if not items:
                raise BodyError("missing batch input to process")
            if len(items) > self._max_items:
                raise BodyError(
                    f"batch_input has {len(items)} items, more than the {self._max_items} of one request"
                )
        return read, ignored

    def _read_slowly(self, body: bytes) -> tuple[B, list[str]]:
        given = read_json(body)
        if given is None:
            return self._kind(), []
        if not isinstance(given, dict):
            raise BodyError(f"failed to decode JSON input: expected an object, got {_go_type(given)}")
        values = {
            name: _weakly(name, value, self._fields[name].type)
            for name, value in given.items()
            if name in self._fields and value is not None
        }
        return self._kind(**values), sorted(name for name in given if name not in self._fields)


def read_json(body: bytes) -> Any:
    """Any JSON value. BodyError."""
    try:
        return msgspec.json.decode(body)
    except RecursionError:
        raise BodyError("failed to decode JSON input: nested too deeply") from None
    except (msgspec.MsgspecError, ValueError) as error:
        # Of a UnicodeDecodeError the text would quote the body.
        reason = str(error) if isinstance(error, msgspec.MsgspecError) else "not valid UTF-8"
        raise BodyError(f"failed to decode JSON input: {reason}") from None


def _weakly(name: str, value: Any, kind: Any) -> Any:
    """*value* as the original's weak typing takes it for field *name*. BodyError."""
    if name == "batch_input":
        return _items(value, kind)
    if kind is int:
        return _whole(name, value)
    if kind is bool:
        return _truth(name, value)
    if isinstance(value, str):
        return value
    if name == "salt_length" and isinstance(value, int) and not isinstance(value, bool):
        return value
    raise _unconvertible(name, "string", value)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        if -(1 << 63) <= value < 1 << 63:
            return value
        raise _unparsable(name, "int", "strconv.ParseInt: value out of range")
    if isinstance(value, str):
        if not value:
            return 0
        if _WHOLE.fullmatch(value):
            return int(value)
    if isinstance(value, str | float):
        raise _unparsable(name, "int", "strconv.ParseInt: invalid syntax")
    raise _unconvertible(name, "int", value)


def _truth(name: str, value: Any) -> bool:
    text = str(value).lower() if isinstance(value, bool | int) else value
    if isinstance(text, str):
        if text in _TRUE:
            return True
        if text in _FALSE:
            return False
        raise _unparsable(name, "bool", "strconv.ParseBool: invalid syntax")
    raise _unconvertible(name, "bool", value)


def _items(value: Any, kind: Any) -> Any:
    if not isinstance(value, list):
        raise _bad_batch(f"source data must be an array or slice, got {_go_type(value)}")
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _bad_batch(_item_problem(value, str(error))) from None


def _item_problem(items: list[Any], problem: str) -> str:
    """What is wrong with the first bad item, in the original's words where it has some."""
    found = re.search(r"at `\$\[(\d+)\](?:\.(\w+))?`", problem)
    at, name = (int(found[1]), found[2]) if found else (0, None)
    item = items[at]
    if not isinstance(item, dict):
        return f"[{at}] expected a map, got '{_go_type(item)}'"
    if name is None:  # the one required field
        return f"'[{at}].plaintext' missing plaintext to encrypt"
    expected = "int" if name == "key_version" else "string"
    return f"'[{at}].{name}' expected type '{expected}', got unconvertible type '{_go_type(item[name])}'"


def _bad_batch(problem: str) -> BodyError:
    return BodyError(f"1 error occurred:\n\t* failed to parse batch input: {problem}\n\n")


def _unparsable(name: str, kind: str, why: str) -> BodyError:
    return BodyError(f"error converting input for field \"{name}\": '' cannot parse value as '{kind}': {why}")


def _unconvertible(name: str, kind: str, value: Any) -> BodyError:
    return BodyError(
        f"error converting input for field \"{name}\": '' expected type '{kind}', "
        f"got unconvertible type '{_go_type(value)}'"
    )


def _go_type(value: Any) -> str:
    match value:
        case None:
            return "<nil>"
        case bool():
            return "bool"
        case int() | float():
            return "json.Number"
        case str():
            return "string"
        case list():
            return "[]interface {}"
    return "map[string]interface {}"


# Base64.


def decode_base64(text: str) -> bytes:
    """Standard alphabet, padded; line ends are skipped, as Go's decoder does. BodyError names the byte."""
    try:
        return _strictly_decoded(text)
    except ValueError:  # binascii.Error is one
        at = illegal_base64_at(text)
        if at is None:
            return _strictly_decoded(text.replace("\r", "").replace("\n", ""))
        raise BodyError(f"illegal base64 data at input byte {at}") from None


def _strictly_decoded(text: str) -> bytes:
    """ValueError also for padding behind a whole group, which Python 3.13 refuses itself, 3.12 does not."""
    data = binascii.a2b_base64(text, strict_mode=True)
    if text.endswith("=") and len(data) % 3 == 0:
        raise ValueError("excess padding")
    return data


def illegal_base64_at(text: str) -> int | None:
    """Where Go's `base64.StdEncoding` stops in *text*, in bytes; None if it decodes (encoding/base64)."""
    raw = text.encode("utf-8", "surrogatepass")
    at, size = 0, len(raw)

    def skip_line_ends() -> None:
        nonlocal at
        while at < size and raw[at] in b"\r\n":
            at += 1

    while True:
        digits = 0
        while digits < 4:
            skip_line_ends()
            if at == size:
                return None if digits == 0 else size - digits
            byte = raw[at]
            at += 1
            if chr(byte) in _ALPHABET:
                digits += 1
                continue
            if byte != ord("=") or digits < 2:
                return at - 1
            if digits == 2:
                skip_line_ends()
                if at == size:
                    return size
                if raw[at] != ord("="):
                    return at - 1
                at += 1
            skip_line_ends()
            return at if at < size else None


def encode_base64(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode("ascii")


# What we hand out.


@dataclass(frozen=True, slots=True)
class Ciphertext:
    """`vault:v<version>:<base64>`, taken apart."""

    version: int
    nonce: bytes
    ciphertext: bytes = field(repr=False)
    tag: bytes


def format_ciphertext(version: int, nonce: bytes, ciphertext: bytes, tag: bytes) -> str:
    return format_message(version, nonce + ciphertext + tag)


def format_message(version: int, message: bytes) -> str:
    """*message*: nonce, ciphertext and tag."""
    packed = binascii.b2a_base64(b"\x01" + message, newline=False)
    return f"{PREFIX}{version}:{packed.decode('ascii')}"


def parse_ciphertext(text: str) -> Ciphertext:
    """BodyError for anything that `format_ciphertext` does not make."""
    if not text:
        raise BodyError("missing ciphertext to decrypt")
    version, rest = _versioned(text, "ciphertext")
    try:
        packed = binascii.a2b_base64(rest, strict_mode=True)
    except ValueError:
        raise BodyError("invalid ciphertext: could not decode base64") from None
    if len(packed) < _OVERHEAD:
        raise BodyError("invalid ciphertext length")
    if packed[0] != CIPHERTEXT_FORMAT or binascii.b2a_base64(packed, newline=False) != rest.encode():
        raise BodyError("cipher: message authentication failed")
    return Ciphertext(version, packed[1:25], packed[25:-TAG_SIZE], packed[-TAG_SIZE:])


def format_signature(version: int, signature: bytes, *, jws: bool) -> str:
    text = encode_base64(signature)
    if jws:
        text = text.rstrip("=").translate(_TO_URL)
    return f"{PREFIX}{version}:{text}"


def parse_signature(text: str, *, jws: bool) -> tuple[int, bytes]:
    """Version and signature. BodyError."""
    version, rest = _versioned(text, "signature")
    if jws:
        # `translate` alone would take the standard alphabet too: `+` and `/` become what is in no alphabet.
        rest = rest.translate(_FROM_URL) + "=" * (-len(rest) % 4)
    try:
        return version, _strictly_decoded(rest)
    except ValueError:
        raise BodyError("invalid base64 signature value") from None


_TO_URL: Final = str.maketrans("+/", "-_")
_FROM_URL: Final = str.maketrans("-_+/=", "+/???")


def _versioned(text: str, what: str) -> tuple[int, str]:
    if not text.startswith(PREFIX):
        raise BodyError(f"invalid {what}: no prefix")
    number, colon, rest = text[len(PREFIX) :].partition(":")
    if not colon:
        raise BodyError(f"invalid {what}: wrong number of fields")
    if not _VERSION.fullmatch(number):
        if number == "0":
            raise BodyError(TOO_OLD)
        raise BodyError(f"invalid {what}: version number could not be decoded")
    version = int(number)
    if version > MAX_VERSION:
        raise BodyError(f"invalid {what}: version is too new")
    return version, rest
