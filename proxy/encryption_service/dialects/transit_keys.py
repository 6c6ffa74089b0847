"""How the transit API describes a named key: `GET keys/:name`, and the original's name for its type."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from envelope.keys import KeyState, KeyUse, SigningAlgorithm
from proxy.encryption_service.core import KeyVersion
from proxy.encryption_service.dialects.transit_bodies import encode_base64
from proxy.encryption_service.model import NamedKey, Op

DATA_TYPE: Final = "aes256-gcm96"
"""What clients know; ours is XAES-256-GCM, and the ciphertext is opaque to them."""
_OPENS: Final = frozenset({KeyState.PRE_ACTIVE, KeyState.ACTIVE, KeyState.DEACTIVATED})


def type_of(key: NamedKey, versions: Sequence[KeyVersion]) -> str:
    """The original's name; of an RSA key its size as far as a version of it is here."""
    if key.use is KeyUse.DATA:
        return DATA_TYPE
    match key.algorithm:
        case SigningAlgorithm.ES256:
            return "ecdsa-p256"
        case SigningAlgorithm.EDDSA:
            return "ed25519"
    sizes = [version.public_key.key_size for version in versions if _is_rsa(version)]  # type: ignore[union-attr]
    return f"rsa-{sizes[-1]}" if sizes else "rsa-3072"


def describe(key: NamedKey, versions: Sequence[KeyVersion]) -> dict[str, Any]:
    """The `data` of `GET keys/:name`. A destroyed version is not listed."""
    living = [version for version in versions if version.state is not KeyState.DESTROYED]
    opening = [version.version for version in living if version.state in _OPENS]
    active = [version.version for version in living if version.state is KeyState.ACTIVE]
    is_data = key.use is KeyUse.DATA
    return {
        "allow_plaintext_backup": False,
        "auto_rotate_period": 0,
        "deletion_allowed": False,
        "derived": False,
        "exportable": False,
        "imported_key": False,
        "keys": {
            str(version.version): version.seen_at_s if is_data else _public(version) for version in living
        },
        "latest_version": max((version.version for version in living), default=0),
        "min_available_version": 0,
        "min_decryption_version": min(opening, default=0),
        "min_encryption_version": max(active, default=0),
        "name": key.name,
        "soft_deleted": key.blocked or not opening,
        "supports_decryption": is_data and Op.DECRYPT in key.operations,
        "supports_derivation": is_data,
        "supports_encryption": is_data and Op.ENCRYPT in key.operations,
        "supports_signing": Op.SIGN in key.operations,
        "type": type_of(key, versions),
    }


def rfc3339(unix_s: float) -> str:
    return datetime.fromtimestamp(int(unix_s), UTC).isoformat().replace("+00:00", "Z")


def _is_rsa(version: KeyVersion) -> bool:
    return isinstance(version.public_key, rsa.RSAPublicKey)


def _public(version: KeyVersion) -> dict[str, Any]:
    """Of a signing key's version; without `public_key` where its material may not be kept (suspended)."""
    described: dict[str, Any] = {"certificate_chain": "", "creation_time": rfc3339(version.seen_at_s)}
    match version.public_key:
        case ed25519.Ed25519PublicKey() as public:
            raw = public.public_bytes(Encoding.Raw, PublicFormat.Raw)
            described |= {"name": "ed25519", "public_key": encode_base64(raw)}
        case ec.EllipticCurvePublicKey() as public:
            described |= {"name": "P-256", "public_key": _pem(public)}
        case rsa.RSAPublicKey() as public:
            described |= {"name": f"rsa-{public.key_size}", "public_key": _pem(public)}
    return described


def _pem(public: ec.EllipticCurvePublicKey | rsa.RSAPublicKey) -> str:
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode("ascii")
