"""What two persons decide: each signs the same statement with a key of their own; nothing of it counts twice.

1. An administrator is a name with a public key (Ed25519 or EC P-256) in the signed rows. The private key is
   never the agent's: who signs does so on a machine of their own, or with a smart card.
2. What is signed names tenant, approval, action, subject, the payload's SHA-256, who asked, and the end of
   it: a signature fits no other approval, tenant or payload. The payload stands beside it, to be read first.
3. REQUIRED administrators with REQUIRED different keys have to sign, before the end. One approval serves
   once: it is marked as used in the very transaction that does what it allows.
4. The first REQUIRED administrators are made known by whoever controls the agent; from then on every change
   among them takes an approval as well.
"""

import json
from collections.abc import Mapping
from enum import StrEnum
from hashlib import sha256
from typing import Final

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_private_key,
    load_pem_public_key,
)

from envelope.base64url import b64u_decode, b64u_encode
from envelope.errors import FormatError
from key_agent.environments.shared.documents import AdminBody, AdminState, ApprovalBody
from key_agent.errors import KeyAgentError

REQUIRED: Final = 2
VALIDITY_S: Final = 3600
MAX_VALIDITY_S: Final = 7 * 86_400
MAX_PAYLOAD_BYTES: Final = 64 << 10
_DOMAIN: Final = b"sealgate approval v1\n"

type AdminPrivateKey = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey
type AdminPublicKey = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey


class Action(StrEnum):
    """What needs two persons. The subject of each is named beside it."""

    INCIDENT_COMPROMISE = "incident-compromise"
    """An incident: further keys."""
    INCIDENT_CANCEL = "incident-cancel"
    """An incident: a false alarm, its keys come back."""
    KEY_RESUME = "key-resume"
    """A suspended key."""
    KEY_RESCUE = "key-rescue"
    """A compromised key may open objects for a time."""
    KEYS_RETIRE = "keys-retire"
    """Keys are destroyed."""
    ENVIRONMENT_PROMOTE = "environment-promote"
    """An environment becomes the manager's."""
    ENVIRONMENT_RECOVER = "environment-recover"
    """An environment becomes the manager's while none counts (recovery.py)."""
    ENVIRONMENT_RETIRE = "environment-retire"
    ADMIN_ADD = "admin-add"
    ADMIN_REMOVE = "admin-remove"


class ApprovalError(KeyAgentError):
    """An approval that does not allow what is to be done. `code` is stable: unknown, other-action,
    other-payload, expired, used, too-few, admin, signature, key, statement."""

    def __init__(self, code: str, cause: str, next_step: str) -> None:
        super().__init__(cause)
        self.code = code
        self.next_step = next_step


def payload_text(payload: Mapping[str, object]) -> str:
    """The one way to write what is approved: canonical JSON, ASCII."""
    return json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def payload_sha256(text: str) -> str:
    # Of any text: what `payload_text` has not written stands in rows of a breached manager, and can be shown.
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def statement(tenant: str, approval_id: str, asked: ApprovalBody) -> bytes:
    """What an administrator signs (rule 2)."""
    return _DOMAIN + payload_text(
        {
            "action": asked.action,
            "approval": approval_id,
            "expires_at_ms": asked.expires_at_ms,
            "payload_sha256": payload_sha256(asked.payload),
            "requested_at_ms": asked.requested_at_ms,
            "requested_by": asked.requested_by,
            "subject": asked.subject,
            "tenant": tenant,
        }
    ).encode("ascii")


class Statement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `statement` says (rule 2)."""

    action: str
    approval: str
    expires_at_ms: int
    payload_sha256: str
    requested_at_ms: int
    requested_by: str
    subject: str
    tenant: str


def read_statement(signed: bytes) -> Statement:
    """What is about to be signed. ApprovalError "statement": it is none, and an administrator's key signs
    nothing else.
    """
    try:
        said = msgspec.json.decode(signed.removeprefix(_DOMAIN), type=Statement)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        said = None
    if said is None or signed != _DOMAIN + payload_text(msgspec.to_builtins(said)).encode("ascii"):
        raise ApprovalError(
            "statement",
            "that is no statement of an approval",
            "`key-agent approval show ID --statement FILE` writes it",
        )
    return said


def sign_statement(key: AdminPrivateKey, signed: bytes) -> str:
    """base64url: 64 bytes of Ed25519, or ECDSA with SHA-256 in DER, as `openssl dgst -sign` writes it."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return b64u_encode(key.sign(signed))
    return b64u_encode(key.sign(signed, ec.ECDSA(hashes.SHA256())))


def check_signature(admin: AdminBody, signed: bytes, signature: str) -> None:
    """ApprovalError "signature" unless *admin* has signed *signed*."""
    public = _public_key(b64u_decode(admin.public_key))
    try:
        raw = b64u_decode(signature)
        if isinstance(public, ed25519.Ed25519PublicKey):
            public.verify(raw, signed)
        else:
            public.verify(raw, signed, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, FormatError):
        raise ApprovalError(
            "signature",
            f"not a signature of {admin.name} under this approval",
            "sign what `key-agent approval show` prints, with the key that is registered under that name",
        ) from None


def check_granted(
    tenant: str,
    approval_id: str,
    asked: ApprovalBody | None,
    admins: Mapping[str, AdminBody],
    *,
    action: Action,
    subject: str,
    payload: Mapping[str, object],
    now_ms: int,
) -> tuple[str, ...]:
    """The administrators who allow *payload*; ApprovalError for everything that falls short of rule 3."""
    if asked is None:
        raise ApprovalError("unknown", f"there is no approval {approval_id}", "`key-agent approval list`")
    text = payload_text(payload)
    if (asked.action, asked.subject) != (action, subject):
        raise ApprovalError(
            "other-action",
            f"approval {approval_id} allows {asked.action} of {asked.subject}, not {action} of {subject}",
            f"`key-agent approval request {action} {subject}`",
        )
    if asked.payload != text or asked.payload_sha256 != payload_sha256(text):
        raise ApprovalError(
            "other-payload",
            f"approval {approval_id} allows {asked.payload}, what is to be done is {text}",
            "ask for an approval of exactly that",
        )
    if asked.used_at_ms is not None:
        raise ApprovalError("used", f"approval {approval_id} is used up", "ask for another one")
    check_open(approval_id, asked, now_ms=now_ms)
    signed = statement(tenant, approval_id, asked)
    found: dict[str, str] = {}
    strangers: list[str] = []
    for name, signature in sorted(asked.signatures.items()):
        admin = admins.get(name)
        if admin is None or admin.state is not AdminState.ACTIVE:
            strangers.append(name)  # removed since, or not known yet: their word does not count
            continue
        check_signature(admin, signed, signature)
        found.setdefault(admin.public_key, name)
    if len(found) < REQUIRED:
        also = (
            f"; {', '.join(strangers)}: no administrator by the rows that this environment has"
            if strangers
            else ""
        )
        raise ApprovalError(
            "too-few",
            f"approval {approval_id} has {len(found)} of {REQUIRED} signatures{also}",
            f"`key-agent approval sign {approval_id}` by another administrator",
        )
    return tuple(sorted(found.values()))


def unused(asked: ApprovalBody) -> ApprovalBody:
    """As it was before it was used: to judge it as at that moment."""
    return msgspec.structs.replace(asked, used_at_ms=None, used_for=None)


def check_open(approval_id: str, asked: ApprovalBody, *, now_ms: int) -> None:
    """ApprovalError "expired" if its time is over, or lies in the future."""
    if not asked.requested_at_ms <= now_ms < asked.expires_at_ms:
        raise ApprovalError("expired", f"the time of approval {approval_id} is over", "ask for another one")


def read_public_key(pem: str) -> str:
    """The public key of an administrator as the rows hold it. ApprovalError "key": it is none we take."""
    try:
        public = load_pem_public_key(pem.encode("ascii"))
    except (ValueError, UnicodeEncodeError, UnsupportedAlgorithm):
        raise _no_key("not a public key in PEM form") from None
    encoded = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    _public_key(encoded)
    return b64u_encode(encoded)


def read_private_key(pem: bytes | bytearray, password: bytes | None) -> AdminPrivateKey:
    """ApprovalError "key": not a private key of a kind that we take, or another passphrase."""
    try:
        key = load_pem_private_key(bytes(pem), password=password)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _no_key(f"not a private key in PEM form that opens so ({type(error).__name__})") from None
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    raise _no_key("neither Ed25519 nor EC P-256")


def _public_key(der: bytes) -> AdminPublicKey:
    try:
        public = load_der_public_key(der)
    except (ValueError, UnsupportedAlgorithm):
        raise _no_key("not a public key") from None
    if isinstance(public, ed25519.Ed25519PublicKey):
        return public
    if isinstance(public, ec.EllipticCurvePublicKey) and isinstance(public.curve, ec.SECP256R1):
        return public
    raise _no_key("neither Ed25519 nor EC P-256")


def _no_key(cause: str) -> ApprovalError:
    return ApprovalError(
        "key", cause, "`openssl genpkey -algorithm ed25519` makes one; `openssl pkey -pubout` its public half"
    )
