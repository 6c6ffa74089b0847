"""The rows that all environments share: typed bodies, one way to write them, and who has signed them.

1. A row is (kind, id, term, epoch, signer, body). The body is canonical JSON: sorted, no spaces, ASCII.
   Bytes that are not what we would write ourselves are refused, so a row has one form only.
2. It is signed by its writer's registry key (Ed25519) over a domain and all of that; it fits no other
   row, kind, epoch or tenant.
3. A head is term, epoch and the digest of all rows as they are then, signed by whoever holds the term. A
   delta is what changed after an epoch, with the head it leads to: rows that do not lead there are found by
   the digest, whoever has relayed them. It is bounded before memory is spent on it.
4. A term's row says on what it was begun (`Grounds`): terms.py judges that.
5. Nothing here is secret: keys stand as ids, check values and states.
6. No value here refers to another that refers back: the garbage collector leaves them out (`gc=False`), or
   tens of thousands of rows would hold the event loop up each time it looks at everything.
"""

import functools
from collections.abc import Iterable, Mapping
from enum import StrEnum
from hashlib import sha256
from typing import Annotated, Any, Final, cast

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from envelope.base64url import b64u_decode
from envelope.errors import FormatError, IntegrityError
from envelope.keys import KeyState, KeyUse
from key_agent.environments.breaches import Disposition, IncidentKind, IncidentState
from key_agent.environments.states import EnvironmentState

MAX_BODY_BYTES: Final = 64 << 10
MAX_DELTA_BYTES: Final = 64 << 20
MAX_ROWS: Final = 200_000
MAX_EPOCHS_AHEAD: Final = 2**28
"""Between what somebody knows and what is new: one a second for eight years."""
LAST_EPOCH: Final = 2**53 - 2**32
"""There is room behind it: JSON's numbers end at 2**53."""
_ROW_DOMAIN: Final = b"sealgate/v1 shared row\0"
_HEAD_DOMAIN: Final = b"sealgate/v1 registry head\0"
_DIGEST_DOMAIN: Final = b"sealgate/v1 registry digest\0"

type Name = Annotated[str, msgspec.Meta(min_length=1, max_length=127)]
type Text = Annotated[str, msgspec.Meta(max_length=2000)]
type Ms = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
type Number = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
type Hex = Annotated[str, msgspec.Meta(pattern="^(?:[0-9a-f]{2})*$", max_length=2048)]


class Kind(StrEnum):
    TENANT = "tenant"
    TERM = "term"
    ENVIRONMENT = "environment"
    KEK = "kek"
    SERVICE = "service"
    RING = "ring"
    DEK = "dek"
    INCIDENT = "incident"
    INCIDENT_KEY = "incident-key"
    ADMIN = "admin"
    APPROVAL = "approval"


class EncryptPolicy(StrEnum):
    """Which of the environments' active keys seals."""

    OWN = "own"
    """Each environment's own."""
    ORIGIN = "origin"
    """That of the service's home environment, everywhere."""
    PINNED = "pinned"
    """The one that is named, everywhere."""


class AdminState(StrEnum):
    ACTIVE = "active"
    REMOVED = "removed"


class Body(msgspec.Struct, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """Of a row."""


class TenantBody(Body, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """One row, id = the tenant's. Settings of all environments together."""

    home_environment: Name
    registry_lease_s: Annotated[int, msgspec.Meta(ge=10, le=3600)] = 300
    min_wraps: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    """A key becomes active with at least so many verified wraps."""


class FormerKey(Body, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """A registry key that an environment had, and until when."""

    agent_id: Name
    registry_key: Text
    until_epoch: Number


class EnvironmentBody(Body, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    name: Name
    agent_id: Name
    api_url: Text
    """https://host:port of the agent's peering listener."""
    region: Text = ""
    geo: Text = ""
    kms_type: Text = ""
    registry_key: Text = ""
    """base64url of the agent's Ed25519 public key; empty while it has not joined."""
    transport_certificate_pem: Annotated[str, msgspec.Meta(max_length=16384)] = ""
    """What key material on its way there is sealed to, where its KEK has no public half."""
    kek_id: Name | None = None
    state: EnvironmentState
    reason: Text | None = None
    since_ms: Ms
    incident_id: Name | None = None
    load_balancer_name: Text = ""
    """Of its server lines in the load balancer."""
    address: Text = ""
    """host:port of its data plane, as the load balancer reaches it."""
    former_keys: Annotated[tuple[FormerKey, ...], msgspec.Meta(max_length=32)] = ()
    """Kept by the shared registry itself, for people: rows are judged by their term's key."""
    registry_key_exposed: bool = False
    """Somebody else may have it since a breach of the agent: no term can begin with it."""


class KekBody(Body, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    environment: Name
    version: Number
    method: Name
    kek_type: Name
    public_key: Text | None = None
    """base64url of the SubjectPublicKeyInfo of an asymmetric KEK."""
    state: Name
    since_ms: Ms
    """Dated by the manager that wrote the row; in what an environment says of itself, by that."""
    created_at_ms: Ms = 0
    """Of the KEK itself: healing may demand one that is younger than an incident."""


class ServiceBody(Body, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """id: tenant/service."""

    removed: bool = False
    encrypt_policy: EncryptPolicy = EncryptPolicy.OWN
    pinned_dek: Hex | None = None
    home_environment: Name | None = None
    """Of policy `origin`; None: the tenant's."""
    max_try_all: Annotated[int, msgspec.Meta(ge=1, le=64)] = 64
    rotate_after_days: Number | None = None


class RingBody(Body, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """Keys of one service and use. id: 32 hex digits."""

    service: Name
    use: KeyUse
    algorithm: Name | None = None


class DekBody(Body, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """One key. id: its key id in hex."""

    ring: Name
    service: Name
    owner_environment: Name
    generator_environment: Name
    use: KeyUse
    algorithm: Name | None = None
    version: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
    kcv: Hex
    state: KeyState
    reason: Text | None = None
    since_ms: Ms
    created_at_ms: Ms
    activated_at_ms: Ms | None = None
    predecessor: Hex | None = None
    successor: Hex | None = None
    incident_id: Name | None = None
    suspended_from: KeyState | None = None
    decrypt_until_ms: Ms | None = None
    rescue_until_ms: Ms | None = None
    rescue_approval: Name | None = None
    public_jwk: Annotated[str, msgspec.Meta(max_length=4096)] | None = None
    """Of a signing key, JSON."""


class IncidentBody(Body, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """id: inc-N."""

    number: Number
    environment: Name
    kind: IncidentKind
    state: IncidentState
    reason: Text
    since_ms: Ms
    opened_at_ms: Ms
    opened_by: Text
    opened_epoch: Number
    idempotency_key: Text
    keep_keys: bool = False
    declared_keys: tuple[Hex, ...] = ()
    declared_service: Name | None = None
    generator: Name | None = None
    attestation: Text | None = None
    new_kek_id: Name | None = None
    steps: dict[str, Ms]


class IncidentKeyBody(Body, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """id: incident/key id. What an incident means for one key."""

    incident_id: Name
    dek_id: Hex
    previous_state: KeyState
    disposition: Disposition
    decided_by: Text
    at_ms: Ms
    replaced_by: Hex | None = None


class AdminBody(Body, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """id: the administrator's name."""

    name: Name
    public_key: Text
    """base64url of the SubjectPublicKeyInfo, Ed25519 or EC P-256."""
    state: AdminState
    added_at_ms: Ms
    added_by: Text


class ApprovalBody(Body, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """id: a- and 16 hex digits."""

    action: Name
    subject: Text
    payload: Annotated[str, msgspec.Meta(max_length=65536)]
    payload_sha256: Hex
    requested_by: Text
    requested_at_ms: Ms
    expires_at_ms: Ms
    signatures: dict[str, str]
    used_at_ms: Ms | None = None
    used_for: Text | None = None


class SharedRow(msgspec.Struct, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    kind: Kind
    id: Name
    term: Number
    epoch: Number
    signer: Name
    """The agent that wrote it."""
    body: Annotated[str, msgspec.Meta(max_length=MAX_BODY_BYTES)]
    signature: Hex

    @property
    def key(self) -> tuple[Kind, str]:
        return (self.kind, self.id)


class Head(msgspec.Struct, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """Where a registry stands, by the word of whoever holds that term."""

    term: Number
    epoch: Number
    digest: Hex
    signature: Hex = ""


class Grounds(msgspec.Struct, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """Why a term that is not the first may begin: for agents that know nothing newer than the one before."""

    built_on: Head
    """The registry it goes on from, by the word of the term before."""
    approval: Name | None = None
    """What two administrators have signed; None: it was elected."""
    asked: ApprovalBody | None = None
    rows: tuple[SharedRow, ...] = ()
    """As they stood there: the environment that begins the term, and the administrators who have signed."""


class TermBody(Body, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """id: the term in 20 digits. Who is the manager as long as it is the newest."""

    agent: Name
    environment: Name
    registry_key: Text
    """What the rows and heads of this term are signed with, and no others are."""
    since_ms: Ms
    cause: Text
    previous: Hex = ""
    """Digest of the row of the term before: who believes this one knows all before it."""
    grounds: Grounds | None = None
    """None: it is the first."""


BODIES: Final[Mapping[Kind, type[Body]]] = {
    Kind.TENANT: TenantBody,
    Kind.TERM: TermBody,
    Kind.ENVIRONMENT: EnvironmentBody,
    Kind.KEK: KekBody,
    Kind.SERVICE: ServiceBody,
    Kind.RING: RingBody,
    Kind.DEK: DekBody,
    Kind.INCIDENT: IncidentBody,
    Kind.INCIDENT_KEY: IncidentKeyBody,
    Kind.ADMIN: AdminBody,
    Kind.APPROVAL: ApprovalBody,
}


class Delta(msgspec.Struct, frozen=True, gc=False, kw_only=True, forbid_unknown_fields=True):
    """All rows that changed after `epoch_from`, as they are at `epoch_to`."""

    tenant: Name
    term: Number
    epoch_from: Number
    epoch_to: Number
    rows: Annotated[tuple[SharedRow, ...], msgspec.Meta(max_length=MAX_ROWS)]
    digest: Hex
    """Of all rows at `epoch_to`."""
    signer: Name
    """The agent that holds `term`."""
    signature: Hex = ""
    """Its own under the head, whoever has relayed the rows."""

    @property
    def head(self) -> Head:
        return Head(term=self.term, epoch=self.epoch_to, digest=self.digest, signature=self.signature)


_ENCODER: Final = msgspec.json.Encoder(order="sorted")
_DECODERS: Final = {kind: msgspec.json.Decoder(body) for kind, body in BODIES.items()}
_DELTA_DECODER: Final = msgspec.json.Decoder(Delta)


def body_text(body: Body) -> str:
    """The canonical form. FormatError if it is too long."""
    text = _ascii(_ENCODER.encode(body))
    if len(text) > MAX_BODY_BYTES:
        raise FormatError(f"a row of {len(text)} bytes is longer than {MAX_BODY_BYTES}")
    return text


def read_body(kind: Kind, text: str) -> Body:
    """The inverse of `body_text`; FormatError for anything that it would not have written."""
    try:
        body = _DECODERS[kind].decode(text)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise FormatError(f"a row of kind {kind} holds something else ({type(error).__name__})") from error
    if body_text(body) != text:
        raise FormatError(f"a row of kind {kind} is not in its canonical form")
    return body


def _ascii(encoded: bytes) -> str:
    """Escaped beyond ASCII: a form that no database, editor or collation changes."""
    text = encoded.decode()
    if text.isascii():
        return text
    return "".join(char if char.isascii() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    units = char.encode("utf-16-be")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


def row_bytes(tenant: str, row: SharedRow) -> bytes:
    """What its signature is over."""
    return _ROW_DOMAIN + _framed(
        tenant, row.kind, row.id, str(row.term), str(row.epoch), row.signer, row.body
    )


def _framed(*parts: str) -> bytes:
    encoded = (part.encode() for part in parts)
    return b"".join(len(part).to_bytes(4) + part for part in encoded)


def sign_row(
    key: Ed25519PrivateKey,
    *,
    tenant: str,
    kind: Kind,
    row_id: str,
    body: Body,
    term: int,
    epoch: int,
    signer: str,
) -> SharedRow:
    unsigned = SharedRow(
        kind=kind, id=row_id, term=term, epoch=epoch, signer=signer, body=body_text(body), signature=""
    )
    return msgspec.structs.replace(unsigned, signature=key.sign(row_bytes(tenant, unsigned)).hex())


def check_row(tenant: str, row: SharedRow, keys: Mapping[str, Ed25519PublicKey]) -> None:
    """IntegrityError unless it is signed by its signer's key, which has to be one of *keys* (by agent)."""
    key = keys.get(row.signer)
    if key is None:
        raise IntegrityError(f"row {row.kind} {row.id} is signed by {row.signer}, whom nobody knows")
    try:
        key.verify(bytes.fromhex(row.signature), row_bytes(tenant, row))
    except (InvalidSignature, ValueError):
        raise IntegrityError(f"row {row.kind} {row.id} does not bear {row.signer}'s signature") from None


def row_digest(row: SharedRow) -> bytes:
    """32 bytes that stand for the whole row, signature included."""
    parts = (row.kind, row.id, str(row.term), str(row.epoch), row.signer, row.body, row.signature)
    return sha256(_framed(*parts)).digest()


def digest_of(rows: Iterable[tuple[tuple[Kind, str], bytes]]) -> str:
    """Of a whole registry: *rows* are (kind, id) and `row_digest` of each, in any order."""
    digest = sha256(_DIGEST_DOMAIN)
    for (kind, row_id), value in sorted(rows):
        digest.update(_framed(kind, row_id) + value)
    return digest.hexdigest()


def sign_head(key: Ed25519PrivateKey, *, tenant: str, term: int, epoch: int, digest: str) -> Head:
    unsigned = Head(term=term, epoch=epoch, digest=digest)
    return msgspec.structs.replace(unsigned, signature=key.sign(_head_bytes(tenant, unsigned)).hex())


def check_head(tenant: str, head: Head, key: Ed25519PublicKey) -> None:
    """IntegrityError unless *key* has signed it."""
    try:
        key.verify(bytes.fromhex(head.signature), _head_bytes(tenant, head))
    except (InvalidSignature, ValueError):
        raise IntegrityError(
            f"epoch {head.epoch} of term {head.term} does not bear the signature of who holds that term"
        ) from None


def _head_bytes(tenant: str, head: Head) -> bytes:
    return _HEAD_DOMAIN + _framed(tenant, str(head.term), str(head.epoch), head.digest)


def check_shape(delta: Delta) -> None:
    """FormatError if its epochs make no sense. What its rows are worth its head says."""
    if delta.epoch_to < delta.epoch_from:
        raise FormatError("a delta leads back")
    if len({row.key for row in delta.rows}) != len(delta.rows):
        raise FormatError("a delta holds a row twice")
    if any(not delta.epoch_from < row.epoch <= delta.epoch_to for row in delta.rows):
        raise FormatError("a delta holds a row that did not change in it")


def check_step(delta: Delta, known_epoch: int) -> None:
    """IntegrityError if it leads further from *known_epoch* than a manager comes in a lifetime.

    A number has an end, and the next term begins one behind the last epoch of the one before: a breached
    manager that jumped there would have left no room for anybody to follow it. Who knows nothing yet (0)
    cannot tell a jump from a long life, and must not be left out after one: it is held to the end alone.
    """
    if delta.epoch_to > (known_epoch + MAX_EPOCHS_AHEAD if known_epoch else LAST_EPOCH):
        raise IntegrityError(f"a delta leads from epoch {known_epoch} to {delta.epoch_to}")


def encode_delta(delta: Delta) -> bytes:
    return msgspec.json.encode(delta)


def decode_delta(data: bytes) -> Delta:
    """FormatError for what is none, or too long."""
    if len(data) > MAX_DELTA_BYTES:
        raise FormatError(f"a delta of {len(data)} bytes is longer than {MAX_DELTA_BYTES}")
    try:
        return _DELTA_DECODER.decode(data)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise FormatError(f"not a delta ({type(error).__name__})") from error


@functools.lru_cache(maxsize=256)
def read_registry_key(text: str) -> Ed25519PublicKey:
    """Of an environment's row. FormatError if it is none."""
    try:
        return Ed25519PublicKey.from_public_bytes(b64u_decode(text))
    except (FormatError, ValueError) as error:
        raise FormatError("a registry key is not an Ed25519 public key") from error


def fields_of(body: Body) -> dict[str, Any]:
    """For people and JSON."""
    return cast("dict[str, Any]", msgspec.to_builtins(body))
