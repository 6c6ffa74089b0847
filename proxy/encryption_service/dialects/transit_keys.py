"""The transit API's `keys`: listed and described; all that would change one is the key agent's alone."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import parse_qsl

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from envelope.keys import KeyState, KeyUse, SigningAlgorithm
from proxy.encryption_service.call import Answer
from proxy.encryption_service.dialects.bearer import BearerCalls
from proxy.encryption_service.dialects.transit_bodies import encode_base64
from proxy.encryption_service.dialects.transit_call import READING, WRITING, TransitRequest, success
from proxy.encryption_service.dialects.transit_errors import (
    AGENT_ALONE,
    DENIED,
    UNSUPPORTED_OPERATION,
    UNSUPPORTED_PATH,
    VaultError,
)
from proxy.encryption_service.errors import KeyNotFound, Revoked, Stale
from proxy.encryption_service.key_states import KeyVersion, Standing
from proxy.encryption_service.model import NamedKey, Op

DATA_TYPE: Final = "aes256-gcm96"
"""What clients know; ours is XAES-256-GCM, and the ciphertext is opaque to them."""
_OPENS: Final = frozenset({KeyState.PRE_ACTIVE, KeyState.ACTIVE, KeyState.DEACTIVATED})


class KeyCalls:
    """`keys`, `keys/:name` and what stands below."""

    def __init__(self, calls: BearerCalls) -> None:
        self._calls = calls
        self._core = calls.core

    def serve(self, request: TransitRequest) -> Answer:
        method, name, work = request.call.method, request.name, request.work
        query = dict(parse_qsl(request.call.query, keep_blank_values=True))
        if "list" in query and query["list"].lower() not in {"true", "1", "t", "false", "0", "f"}:
            raise VaultError(400)
        is_list = method == "LIST" or query.get("list", "").lower() in {"true", "1", "t"}
        if not name:
            if not is_list or method not in READING:
                raise VaultError(405, UNSUPPORTED_OPERATION)
            work.operation = "list-keys"
            return self._list_keys(request, query)
        name, slash, action = name.partition("/")
        if is_list or (slash and not action):
            raise VaultError(404, UNSUPPORTED_PATH)
        if method in READING and not slash:
            work.operation = "read-key"
            return self._read_key(request, name)
        if method in WRITING or (method == "DELETE" and not slash):
            work.operation = f"{action or ('delete' if method == 'DELETE' else 'create')}-key"
            work.key = name
            raise VaultError(403, DENIED, AGENT_ALONE)
        raise VaultError(405, UNSUPPORTED_OPERATION)

    def _list_keys(self, request: TransitRequest, query: Mapping[str, str]) -> Answer:
        names = [key.name for key in self._calls.visible(request.caller)]
        after = query.get("after", "")
        names = [name for name in names if name > after]
        limit = query.get("limit", "")
        if limit.isascii() and limit.isdecimal() and int(limit[:9]) > 0:
            names = names[: int(limit[:9])]
        if not names:
            raise VaultError(404)
        self._calls.record(request.work)
        return success(request, {"keys": names})

    def _read_key(self, request: TransitRequest, name: str) -> Answer:
        try:
            key = self._calls.describable(request.work, request.caller, name)
        except KeyNotFound:
            raise VaultError(404) from None
        described = describe(key, self._core.states.versions(key))
        standing = self._core.states.standing(key.tenant, key)
        if standing is Standing.REVOKED:
            raise Revoked("the keys were withdrawn by their owner")
        if standing is Standing.STALE:
            raise Stale("no valid key is here at the moment")
        self._calls.record(request.work)
        return success(request, described)


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
