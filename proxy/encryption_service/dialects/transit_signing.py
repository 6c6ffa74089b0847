"""Sign and verify of the transit API: its parameters as a `SignatureScheme`.

1. As the original does, what a key's algorithm has no use for is ignored (an RSA padding asked of an ECDSA
   key, `prehashed` of Ed25519), while unknown values are refused whatever the key.
2. SHA-1, SHA-224, SHA-3 and `none` are not served: nobody should begin to sign with them.
3. `jws` writes every signature in base64url; of ECDSA it also means fixed-length r and s.
"""

from typing import Final

from envelope.keys import SigningAlgorithm
from proxy.encryption_service.dialects.transit_bodies import BodyError, SignBody, VerifyBody
from proxy.encryption_service.model import NamedKey
from proxy.encryption_service.signatures import (
    ANY_SALT,
    HashName,
    Marshaling,
    RsaPadding,
    SignatureScheme,
)

_RSA: Final = frozenset({SigningAlgorithm.RS256, SigningAlgorithm.PS256})
_MARSHALINGS: Final = frozenset({"asn1", "jws"})


def wants_jws(body: SignBody | VerifyBody) -> bool:
    return body.marshaling_algorithm == Marshaling.JWS


def chosen_scheme(
    key: NamedKey, body: SignBody | VerifyBody, hash_in_path: str, *, verifies: bool
) -> SignatureScheme:
    """BodyError for a hash, padding, salt or marshaling that is not served."""
    hash_name = _hash(hash_in_path or body.hash_algorithm or body.algorithm or HashName.SHA256)
    if body.marshaling_algorithm not in _MARSHALINGS:
        raise BodyError(f'invalid marshaling type "{body.marshaling_algorithm}"')
    salt_length = _salt(body.salt_length, verifies=verifies)
    if key.algorithm in _RSA:
        padding = _padding(body.signature_algorithm)
        is_pss = padding is RsaPadding.PSS
        return SignatureScheme(
            hash_name=hash_name,
            prehashed=body.prehashed,
            padding=padding,
            salt_length=salt_length if is_pss else None,
        )
    if key.algorithm is SigningAlgorithm.EDDSA:
        return SignatureScheme()
    return SignatureScheme(
        hash_name=hash_name,
        prehashed=body.prehashed,
        marshaling=Marshaling(body.marshaling_algorithm),
    )


def _hash(name: str) -> HashName:
    if name == "none":
        raise BodyError(
            "hash_algorithm=none requires both prehashed=true and signature_algorithm=pkcs1v15, "
            "and is not supported"
        )
    try:
        return HashName(name)
    except ValueError:
        raise BodyError(f'invalid hash algorithm "{name}"') from None


def _padding(name: str) -> RsaPadding:
    try:
        return RsaPadding(name or RsaPadding.PSS)
    except ValueError:
        raise BodyError(f"1 error occurred:\n\t* unsupported rsa signature algorithm {name}\n\n") from None


def _salt(length: str | int, *, verifies: bool) -> int | None:
    """`auto` verifies any salt, and signs with one of the hash's length; so does 0, as in the original."""
    if length == "hash":
        return None
    if length == "auto":
        return ANY_SALT if verifies else None
    try:
        number = int(length)
    except ValueError:
        raise BodyError(f"salt length neither 'auto', 'hash', nor an int: {length}") from None
    if number < 0:
        raise BodyError(f"salt length is invalid: {number}")
    if number == 0:
        return ANY_SALT if verifies else None
    return number
