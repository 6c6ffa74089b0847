"""The bodies of the AWS KMS XKS proxy API v1 (specification 1.0.3): what is read, written, bound and hashed.

1. Reading has two steps, because the specification's errors have an order: `read_*` takes the JSON and the
   `requestMetadata`; the other fields are judged by `encrypt_input` and `decrypt_input`, after the key.
2. Absent and `null` are the same. Unknown fields are accepted everywhere: more are announced.
3. Base64 is the standard alphabet with padding, and each value has one spelling.
4. AAD of the cipher, both directions: `len16be(aad) ‖ aad ‖ len8(metadata) ‖ metadata`. The lengths keep a
   decrypt that passes the metadata as AAD from succeeding.
5. `ciphertextMetadata` is `format(1) ‖ key version(4, big endian) ‖ nonce prefix(12)`; with the 12 bytes of
   `initializationVector` behind it the prefix is the 24-byte nonce of XAES-256-GCM. 96 random bits alone
   would end at 2^32 messages under one key (NIST SP 800-38D), at AWS's default rate within a month.
6. CDIV is SHA-256 of `aad ‖ metadata ‖ iv ‖ ciphertext ‖ tag`, without lengths: against bit flips, not
   against people.
"""

import binascii
import hashlib
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from envelope.errors import SealgateError
from proxy.encryption_service.core import Sealed

MAX_FIELD_BYTES: Final = 0xFFFF
"""Of plaintext, ciphertext and AAD each (rule 4 has 16 bits); the specification wants 4,300 and 8,192."""
IV_SIZE: Final = 12
TAG_SIZE: Final = 16
METADATA_FORMAT: Final = 1
METADATA_SIZE: Final = 17
MAX_METADATA_SIZE: Final = 20
_IV_SIZES: Final = (12, 16)
_VERSION_END: Final = 5


class ValidationError(SealgateError):
    """Missing, mistyped, not base64, another algorithm: ValidationException."""


class CiphertextError(SealgateError):
    """Nothing this proxy has ever written: InvalidCiphertextException."""


class SizeError(SealgateError):
    """More than we take, and more than the specification wants taken: UnsupportedOperationException."""


# What is read.


class Metadata(msgspec.Struct, frozen=True, rename="camel", gc=False):
    """`requestMetadata` of GetKeyMetadata; every value is opaque and may be of any length."""

    aws_principal_arn: str
    kms_operation: str
    kms_request_id: str
    kms_key_arn: str | None = None
    aws_source_vpc: str | None = None
    aws_source_vpce: str | None = None
    kms_via_service: str | None = None


class KeyUseMetadata(Metadata, frozen=True, rename="camel", gc=False, kw_only=True):
    """... of Encrypt and Decrypt: the KMS key is there."""

    kms_key_arn: str


class HealthMetadata(msgspec.Struct, frozen=True, rename="camel", gc=False):
    """... of GetHealthStatus, where nobody asks for anything."""

    kms_operation: str
    kms_request_id: str


class MetadataRequest(msgspec.Struct, frozen=True, rename="camel"):
    request_metadata: Metadata


class HealthRequest(msgspec.Struct, frozen=True, rename="camel"):
    request_metadata: HealthMetadata


class EncryptRequest(msgspec.Struct, frozen=True, rename="camel"):
    """Values behind `request_metadata` are whatever JSON they are, until `encrypt_input`."""

    request_metadata: KeyUseMetadata
    plaintext: Any = None
    encryption_algorithm: Any = None
    additional_authenticated_data: Any = None
    ciphertext_data_integrity_value_algorithm: Any = None


class DecryptRequest(msgspec.Struct, frozen=True, rename="camel"):
    """Values behind `request_metadata` are whatever JSON they are, until `decrypt_input`."""

    request_metadata: KeyUseMetadata
    ciphertext: Any = None
    encryption_algorithm: Any = None
    initialization_vector: Any = None
    authentication_tag: Any = None
    ciphertext_metadata: Any = None
    additional_authenticated_data: Any = None


type Request = MetadataRequest | HealthRequest | EncryptRequest | DecryptRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class EncryptInput:
    plaintext: bytes = field(repr=False)
    aad: bytes = field(repr=False)
    wants_cdiv: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DecryptInput:
    version: int
    nonce: bytes
    """24 bytes: the prefix from the metadata, then the initialization vector."""
    ciphertext: bytes = field(repr=False)
    tag: bytes
    aad: bytes = field(repr=False)
    """As the cipher takes it: `bound`."""


class Reader[R: Request]:
    """Reads one kind of request."""

    def __init__(self, kind: type[R]) -> None:
        self._decoder: Final[msgspec.json.Decoder[R]] = msgspec.json.Decoder(kind)

    def read(self, body: bytes) -> R:
        """ValidationError: no JSON object in UTF-8, or a `requestMetadata` without what it must hold."""
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValidationError(f"the request is not as specified: {error}") from None


def encrypt_input(request: EncryptRequest) -> EncryptInput:
    """ValidationError, SizeError."""
    _check_algorithm(request.encryption_algorithm)
    wanted = request.ciphertext_data_integrity_value_algorithm
    if wanted is not None and wanted != "SHA_256":
        raise ValidationError("ciphertextDataIntegrityValueAlgorithm must be SHA_256")
    return EncryptInput(
        plaintext=_sized("plaintext", unbase64("plaintext", request.plaintext)),
        aad=_aad(request.additional_authenticated_data),
        wants_cdiv=wanted is not None,
    )


def decrypt_input(request: DecryptRequest) -> DecryptInput:
    """ValidationError, SizeError; CiphertextError for what no encryption of ours has returned."""
    _check_algorithm(request.encryption_algorithm)
    ciphertext = _sized("ciphertext", unbase64("ciphertext", request.ciphertext))
    iv = unbase64("initializationVector", request.initialization_vector)
    tag = unbase64("authenticationTag", request.authentication_tag)
    aad = _aad(request.additional_authenticated_data)
    if request.ciphertext_metadata is None:
        raise CiphertextError("ciphertextMetadata is missing")
    metadata = unbase64("ciphertextMetadata", request.ciphertext_metadata)
    if len(iv) not in _IV_SIZES or len(tag) != TAG_SIZE or len(metadata) > MAX_METADATA_SIZE:
        raise CiphertextError("a length is not one that AES_GCM has here")
    if len(metadata) != METADATA_SIZE or metadata[0] != METADATA_FORMAT or len(iv) != IV_SIZE:
        raise CiphertextError("ciphertextMetadata is unknown here")
    return DecryptInput(
        version=int.from_bytes(metadata[1:_VERSION_END]),
        nonce=nonce_of(metadata, iv),
        ciphertext=ciphertext,
        tag=tag,
        aad=bound(aad, metadata),
    )


# What is bound and hashed.


def metadata_of(version: int, nonce: bytes) -> bytes:
    """The 17 bytes of `ciphertextMetadata` for the 24 bytes of *nonce* (rule 5)."""
    return b"%c%b%b" % (METADATA_FORMAT, version.to_bytes(4), nonce[:-IV_SIZE])


def nonce_of(metadata: bytes, iv: bytes) -> bytes:
    """The 24 bytes of nonce that *metadata* and *iv* hold together (rule 5)."""
    return metadata[_VERSION_END:] + iv


def bound(aad: bytes, metadata: bytes) -> bytes:
    """The AAD of the cipher (rule 4)."""
    return b"%b%b%c%b" % (len(aad).to_bytes(2), aad, len(metadata), metadata)


def integrity_value(*, aad: bytes, metadata: bytes, iv: bytes, ciphertext: bytes, tag: bytes) -> bytes:
    """CDIV, 32 bytes (rule 6)."""
    return hashlib.sha256(b"".join((aad, metadata, iv, ciphertext, tag))).digest()


# What is written: each on one line. `bytes` become standard base64 with padding.


class EncryptResponse(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True, gc=False):
    ciphertext: bytes
    ciphertext_metadata: bytes
    initialization_vector: bytes
    authentication_tag: bytes
    ciphertext_data_integrity_value: bytes | None = None


class DecryptResponse(msgspec.Struct, frozen=True, rename="camel", gc=False):
    plaintext: bytes


class MetadataResponse(msgspec.Struct, frozen=True, rename="camel"):
    key_usage: tuple[str, ...]
    key_status: str
    key_spec: str = "AES_256"


class Manager(msgspec.Struct, frozen=True, rename="camel"):
    """One external key manager: a tenant's environment."""

    id: str
    model: str
    health_status: str


class HealthResponse(msgspec.Struct, frozen=True, rename="camel"):
    xks_proxy_fleet_size: int
    xks_proxy_vendor: str
    xks_proxy_model: str
    ekm_vendor: str
    ekm_fleet_details: tuple[Manager, ...]


type Response = EncryptResponse | DecryptResponse | MetadataResponse | HealthResponse

_encoder: Final = msgspec.json.Encoder()


def response_of(sealed: Sealed, given: EncryptInput) -> EncryptResponse:
    """What Encrypt returns, with the CDIV if it was asked for."""
    metadata = metadata_of(sealed.version, sealed.nonce)
    iv = sealed.nonce[-IV_SIZE:]
    cdiv = None
    if given.wants_cdiv:
        cdiv = integrity_value(
            aad=given.aad, metadata=metadata, iv=iv, ciphertext=sealed.ciphertext, tag=sealed.tag
        )
    return EncryptResponse(
        ciphertext=sealed.ciphertext,
        ciphertext_metadata=metadata,
        initialization_vector=iv,
        authentication_tag=sealed.tag,
        ciphertext_data_integrity_value=cdiv,
    )


def written(response: Response) -> bytes:
    """One line of JSON."""
    return _encoder.encode(response)


def unbase64(name: str, value: object) -> bytes:
    """The bytes of the field *name*. ValidationError also for a second spelling of the same bytes."""
    if not isinstance(value, str):
        raise ValidationError(f"{name} is missing" if value is None else f"{name} is not a string")
    try:
        data = binascii.a2b_base64(value, strict_mode=True)
    except ValueError:
        raise ValidationError(f"{name} is not base64") from None
    rest = len(data) % 3
    if not rest and value.endswith("="):  # Python 3.13 refuses that itself
        raise ValidationError(f"{name} is not base64")
    if rest and binascii.b2a_base64(data[-rest:], newline=False) != value[-4:].encode():
        raise ValidationError(f"{name} is not base64 as it is written")
    return data


def _check_algorithm(value: object) -> None:
    if value != "AES_GCM":
        raise ValidationError("encryptionAlgorithm must be AES_GCM")


def _aad(value: object) -> bytes:
    name = "additionalAuthenticatedData"
    return b"" if value is None else _sized(name, unbase64(name, value))


def _sized(name: str, data: bytes) -> bytes:
    if len(data) > MAX_FIELD_BYTES:
        raise SizeError(f"{name} has {len(data)} bytes, which is more than {MAX_FIELD_BYTES}")
    return data
