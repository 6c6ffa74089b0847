"""Key material on its way from one environment's worker to another's: sealed, and bound to where it goes.

1. Two routes. `public`: the other environment's KEK has a public half; the parcel is what its registry will
   store, but for the HMAC that only its own HSM can add (hybrid.py, rule 3). `peer`: it has none; the parcel
   is sealed to the environment's transport key (environments/transport_key.py) and wrapped there.
2. Both are ECDH-ES or RSA-OAEP of a fresh content key and AES-256-GCM, bound to tenant, service, key id, KEK
   and environment of the *destination*. A parcel fits no other place and no other key.
3. Nobody's signature is on a parcel, and none is needed: whoever opens it compares the key check value that
   the signed rows hold. Material that fits it is that key, whoever sent it.
4. KM is here in `bytes` that the caller wipes.
"""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_private_key,
)

from envelope.derive import ekm_binding, lp
from envelope.keys import KeyId, NetworkService
from envelope.memory import wipe
from key_agent.errors import KeySourceError
from key_agent.sources.envelopes import WrappedKeyError
from key_agent.sources.hybrid import (
    HybridError,
    agreed_content_key,
    ephemeral_point,
    open_sealed,
    seal_to_public_key,
)
from key_agent.sources.source import Destination, Parcel, Route, WrapMethod, WrappedKey
from runtime.settings import SettingsError, read_secret_file


def seal_parcel(material: bytes, row: WrappedKey, to: Destination, content_key: bytes) -> Parcel:
    """*material*, which is *row*'s, for *to*. *content_key*: 32 random bytes, for this once.

    KeySourceError if the destination's public key is no good.
    """
    method = to.method if to.route is Route.PUBLIC else WrapMethod.ECDH_ES
    public_der = to.public_key_der if to.route is Route.PUBLIC else to.transport_key_der
    binding = parcel_binding(
        row.owner, row.key_id, to.route, kek_id=to.kek_id, environment_id=to.environment_id
    )
    try:
        sealed = seal_to_public_key(method, public_der, content_key, material, binding)
    except (HybridError, ValueError) as error:
        raise KeySourceError(f"the public key of environment {to.environment_id}: {error}") from None
    return Parcel(
        owner=row.owner,
        key_id=row.key_id,
        kek_id=to.kek_id,
        environment_id=to.environment_id,
        route=to.route,
        sealed=sealed,
    )


def parcel_binding(
    owner: NetworkService, key_id: KeyId, route: Route, *, kek_id: str, environment_id: str
) -> bytes:
    """That of the wrap itself where the parcel becomes one, else under a label that no wrap has."""
    binding = ekm_binding(owner, key_id, kek_id=kek_id, environment_id=environment_id)
    return binding if route is Route.PUBLIC else lp(b"sealgate/v1 parcel") + lp(binding)


def open_peer_parcel(parcel: Parcel, key: ec.EllipticCurvePrivateKey) -> bytes:
    """KM, for the caller to wipe. WrappedKeyError: for another key or place, or changed."""
    binding = parcel_binding(
        parcel.owner, parcel.key_id, Route.PEER, kek_id=parcel.kek_id, environment_id=parcel.environment_id
    )
    try:
        public = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), ephemeral_point(parcel.sealed))
        shared_secret = key.exchange(ec.ECDH(), public)
        try:
            content_key = agreed_content_key(shared_secret, parcel.sealed, binding)
        finally:
            wipe(shared_secret)
        try:
            return open_sealed(WrapMethod.ECDH_ES, content_key, parcel.sealed, binding)
        finally:
            wipe(content_key)
    except (HybridError, ValueError) as error:
        raise WrappedKeyError(f"the parcel does not open ({type(error).__name__})") from None


def transport_public_der(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def check_transport_key(der: bytes) -> bool:
    """Whether parcels can be sealed to it: a P-256 key."""
    try:
        key = load_der_public_key(der)
    except ValueError:
        return False
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)


def load_transport_key(file: Path) -> ec.EllipticCurvePrivateKey:
    """KeySourceError if there is none, or it is open to others."""
    try:
        secret = read_secret_file(file)
    except SettingsError as error:
        raise KeySourceError(f"the transport key: {error}") from None
    try:
        key = load_pem_private_key(bytes(secret), password=None)
    except (ValueError, TypeError) as error:
        raise KeySourceError(f"the transport key {file}: {type(error).__name__}") from None
    finally:
        secret[:] = bytes(len(secret))
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise KeySourceError(f"the transport key {file} is no P-256 key")
    return key
