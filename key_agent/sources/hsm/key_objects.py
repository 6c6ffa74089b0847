"""The objects that make up one KEK in the token: found by name on a session, or told missing or ambiguous.

1. A KEK is a secret key; or a private key, with a public one beside it. Methods that authenticate by HMAC
   have a second secret key, `<label>-mac`. One of them gone, the KEK is gone; one twice, it is ambiguous.
2. The public key that is sealed to is the registry's; the token's is read when the KEK is made, and when a
   diagnosis asks whether another key took its place.
"""

from dataclasses import dataclass
from typing import Any, Final, Self

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pkcs11 import Attribute, KeyType, ObjectClass, PKCS11Error

from key_agent.errors import KeySourceError
from key_agent.sources.hsm.session import attribute, find_keys, find_mac_keys
from key_agent.sources.hsm.wrapping import KekObjects, Wrapping
from key_agent.sources.source import Kek, KekReference

_OCTET_STRING: Final = 0x04
_POINT_SIZE: Final = 65


@dataclass(frozen=True, slots=True)
class KekName:
    """What a KEK's objects are found by."""

    label: str
    object_id: bytes
    serial: str | None = None
    """Of its token, once it is pinned."""
    public_key_der: bytes = b""
    """As pinned in the registry; empty while the KEK is being made: then the token's is taken."""

    @classmethod
    def of(cls, kek: Kek) -> Self:
        reference = kek.reference
        return cls(reference.label, reference.object_id, kek.token_serial, kek.public_key_der)

    @classmethod
    def new(cls, reference: KekReference) -> Self:
        return cls(reference.label, reference.object_id)


@dataclass(frozen=True, slots=True)
class Found:
    """How many objects there are, and the KEK if there is exactly one of each."""

    keys: int
    macs: int | None
    kek: KekObjects | None

    @property
    def is_missing(self) -> bool:
        return self.keys == 0 or self.macs == 0

    @property
    def what(self) -> str:
        """For people."""
        return f"{self.keys} keys" if self.macs is None else f"{self.keys} keys and {self.macs} HMAC keys"


def look_for_kek(session: Any, name: KekName, wrapping: Wrapping) -> Found:
    """What of that name and class this login can see."""
    keys = find_keys(session, name.label, name.object_id, object_class=wrapping.object_class)
    macs = None
    if wrapping.method.has_mac_key:
        macs = find_mac_keys(session, name.label, name.object_id)
    if len(keys) != 1 or (macs is not None and len(macs) != 1):
        return Found(len(keys), None if macs is None else len(macs), None)
    public_key_der = name.public_key_der
    if wrapping.object_class is ObjectClass.PRIVATE_KEY and not public_key_der:
        [public_key_der, *others] = public_keys_in_token(session, keys[0], name)
        if others:
            raise KeySourceError(f"{1 + len(others)} public keys are named {name.label!r}")
    kek = KekObjects(keys[0], None if macs is None else macs[0], public_key_der)
    return Found(1, None if macs is None else 1, kek)


def find_kek(session: Any, name: KekName, wrapping: Wrapping) -> KekObjects:
    """The one KEK of that name. KeySourceError if there is none, or several; that alone proves nothing."""
    found = look_for_kek(session, name, wrapping)
    if found.kek is None:
        raise KeySourceError(f"{found.what} named {name.label!r} in the token, not one")
    return found.kek


def public_keys_in_token(session: Any, private: Any, name: KekName) -> list[bytes]:
    """SubjectPublicKeyInfo of what the token shows as the public half, the likeliest first; at least one.

    An EC private key does not tell its point, and several public keys may bear the name. KeySourceError if
    the token shows no public half, or one that is no key.
    """
    public = find_keys(session, name.label, name.object_id, object_class=ObjectClass.PUBLIC_KEY)
    try:
        if attribute(private, Attribute.KEY_TYPE) == KeyType.RSA:
            [modulus, *_] = _values(Attribute.MODULUS, private, *public)
            [exponent, *_] = _values(Attribute.PUBLIC_EXPONENT, private, *public)
            numbers = rsa.RSAPublicNumbers(int.from_bytes(exponent), int.from_bytes(modulus))
            made: list[Any] = [numbers.public_key()]
        else:
            points = _values(Attribute.EC_POINT, private, *public)
            made = [ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), _bare(p)) for p in points]
    except ValueError as error:
        raise KeySourceError(f"the public key of {name.label!r} is no key ({error})") from None
    return [key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) for key in made]


def _bare(point: bytes) -> bytes:
    """CKA_EC_POINT is a DER OCTET STRING by the standard, the point itself with some vendors."""
    return point[2:] if len(point) == _POINT_SIZE + 2 and point[0] == _OCTET_STRING else point


def _values(wanted: Attribute, *keys: Any) -> list[bytes]:
    """The attribute of all *keys* that have it, each value once."""
    found: dict[bytes, None] = {}
    for key in keys:
        try:
            value = attribute(key, wanted)
        except PKCS11Error:
            continue
        if value:
            found[bytes(value)] = None
    if not found:
        raise KeySourceError(f"the token shows no {wanted.name} of the key pair")
    return list(found)
