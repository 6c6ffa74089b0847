"""Rows of the registry read as values, and how damage of a row is noticed before the HSM is asked.

1. A wrap carries a digest of its bytes: one that does not fit is damaged, whatever the KEK would say of it.
2. A KEK's row carries a digest of all that a diagnosis compares with the HSM: damaged, it would look like a
   revocation. RegistryError then, and nothing is said about the KEK.
"""

import json
from collections.abc import Sequence
from hashlib import sha256
from typing import Any, Final

from sqlalchemy import Row

from envelope.keys import KeyId, KeyUse, NetworkService
from key_agent.registry.database import RegistryError
from key_agent.registry.model import KekRow, Link, Proxy, Rotation, RotationCause
from key_agent.registry.states import KekState, RotationPhase
from key_agent.sources.source import Kek, KekReference, WrapMethod, WrappedKey

EKM_FORMAT: Final = 1
PURPOSE: Final = {KeyUse.DATA: "km", KeyUse.SIGN: "sign"}
"""`key_ring.purpose` by use: each ring has its own versions and its own active key."""


def rotation_row(row: Row[Any]) -> Rotation:
    uses = {purpose: use for use, purpose in PURPOSE.items()}
    late: Sequence[str] = json.loads(row.late_proxies or "[]")
    return Rotation(
        id=row.id,
        owner=NetworkService.parse(row.network_service_id),
        use=uses[row.purpose],
        new_key=KeyId.parse(row.new_dek_id),
        old_key=None if row.old_dek_id is None else KeyId.parse(row.old_dek_id),
        phase=RotationPhase(row.phase),
        cause=RotationCause(row.cause),
        after_sequence=row.after_sequence,
        begun_at_ms=row.created_at_ms,
        since_ms=row.phase_since_ms,
        until_ms=row.phase_until_ms,
        late=tuple(late),
    )


def proxy_row(row: Row[Any]) -> Proxy:
    return Proxy(id=row.id, url=row.url, ca_pem=row.ca_pem, removed=row.removed)


def link_row(row: Row[Any]) -> Link:
    return Link(
        owner=NetworkService.parse(row.network_service_id),
        proxy_id=row.proxy_id,
        certificate_pem=row.certificate_pem,
        withdrawn=row.withdrawn,
        issued_sequence=row.issued_sequence,
        issued_until_ms=row.issued_until_ms,
        accepted_sequence=row.accepted_sequence,
        accepted_at_ms=row.accepted_at_ms,
        valid_until_ms=row.valid_until_ms,
        withdrawn_sequence=row.withdrawn_sequence,
        withdrawn_at_ms=row.withdrawn_at_ms,
        error=row.error,
        error_at_ms=row.error_at_ms,
    )


def kek_row(row: Row[Any]) -> KekRow:
    reference = KekReference(
        kek_id=row.id, label=row.label, object_id=bytes(row.object_id), environment_id=row.environment_id
    )
    made = None
    if row.canary_ciphertext is not None:
        made = Kek(
            reference=reference,
            method=WrapMethod(row.method),
            token_serial=row.token_serial,
            canary_ciphertext=bytes(row.canary_ciphertext),
            canary_sha256=bytes(row.canary_sha256),
            created_at_ms=row.made_at_ms,
            **_attributes(row),
        )
        if kek_checksum(made) != row.made_sha256:
            raise RegistryError(
                f"registry: the row of KEK {row.id} is damaged: restore the registry from a backup "
                "(nothing is said about the KEK in the HSM)"
            )
    return KekRow(
        reference=reference,
        version=row.version,
        kek=made,
        state=KekState(row.state),
        reason=row.state_reason,
        since_ms=row.state_since_ms,
        rotated_to=row.rotated_to,
    )


def _attributes(row: Row[Any]) -> dict[str, Any]:
    """Inverse of `kek_attributes`. RegistryError if that is damaged."""
    try:
        found = json.loads(row.attributes or "{}")
        return {
            "public_key_der": bytes.fromhex(found.get("public_key", "")),
            "valid_from_s": found.get("valid_from_s"),
            "valid_until_s": found.get("valid_until_s"),
            "is_adopted": found.get("adopted", False),
        }
    except (ValueError, TypeError, AttributeError):
        raise RegistryError(
            f"registry: the row of KEK {row.id} is damaged: restore the registry from a backup"
        ) from None


def kek_checksum(made: Kek) -> bytes:
    """Of all that a diagnosis compares with the HSM: damaged, it would look like a revocation."""
    reference = made.reference
    parts: list[str | int] = [
        reference.kek_id,
        reference.environment_id,
        reference.label,
        reference.object_id.hex(),
        made.method,
        made.token_serial,
        made.canary_ciphertext.hex(),
        made.canary_sha256.hex(),
        made.created_at_ms,
    ]
    if attributes := kek_attributes(made):  # of earlier KEKs there are none
        parts.append(json.dumps(attributes, sort_keys=True))
    return sha256(json.dumps(parts).encode()).digest()


def is_sound(row: Row[Any]) -> bool:
    return bool(sha256(row.wrapped).digest() == row.wrapped_sha256 and row.format == EKM_FORMAT)


def wrapped_key(row: Row[Any]) -> WrappedKey:
    return WrappedKey(
        owner=NetworkService.parse(row.network_service_id),
        key_id=KeyId.parse(row.id),
        kek_id=row.kek_id,
        environment_id=row.environment_id,
        method=WrapMethod(row.wrap_alg),
        wrapped=bytes(row.wrapped),
        kcv=bytes(row.kcv),
        token_serial=row.token_serial,
        created_at_ms=row.made_at_ms,
        use=KeyUse(row.key_type),
        algorithm=row.alg,
        version=row.version,
    )


def made_values(made: Kek) -> dict[str, object]:
    """The columns of `kek` that hold a KEK as the HSM made it."""
    return {
        "method": made.method,
        "token_serial": made.token_serial,
        "canary_ciphertext": made.canary_ciphertext,
        "canary_sha256": made.canary_sha256,
        "made_at_ms": made.created_at_ms,
        "made_sha256": kek_checksum(made),
        "attributes": json.dumps(kek_attributes(made)) if kek_attributes(made) else None,
    }


def kek_attributes(made: Kek) -> dict[str, str | int | bool]:
    """What is known of a KEK beyond what every KEK has."""
    found = {
        "public_key": made.public_key_der.hex(),
        "valid_from_s": made.valid_from_s,
        "valid_until_s": made.valid_until_s,
        "adopted": made.is_adopted,
    }
    return {name: value for name, value in found.items() if value not in (None, "", False)}
