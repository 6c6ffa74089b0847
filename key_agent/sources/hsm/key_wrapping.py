"""AES key wrap, and AES-CBC under an HMAC: for tokens whose GCM cannot be used (docs/hsm.md).

1. `kw` has no AAD: the hash of the binding is wrapped beside the key and compared in constant time.
2. `cbc+hmac` verifies the HMAC before anything is decrypted, so the padding is nobody's oracle. It needs two
   keys in the HSM; one gone, the KEK is gone.
3. Both pad with zeros themselves: AES_KEY_WRAP and CBC_PAD pad differently on each token.
"""

import hmac
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final, override

from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag, ObjectClass

from envelope.derive import lp
from envelope.memory import wipe
from key_agent.sources.hsm.wrapping import (
    KekObjects,
    Wrapping,
    WrongBindingError,
    mechanism_of,
    permitted,
    random_bytes,
)
from key_agent.sources.source import WrapMethod

CHECKSUM_SIZE: Final = 8  # RFC 3394's integrity register
BINDING_HASH_SIZE: Final = 32
CBC_BLOCK: Final = 16
MAC_SIZE: Final = 32
# A session object in the clear for the length of one call: what is wrapped must be extractable.
PASSING: Final[Mapping[Attribute, Any]] = {
    Attribute.SENSITIVE: False,
    Attribute.EXTRACTABLE: True,
    Attribute.PRIVATE: True,
}


class KeyWrapping(Wrapping):
    method = WrapMethod.KW
    capabilities = MechanismFlag.WRAP | MechanismFlag.UNWRAP
    opening = Attribute.UNWRAP
    padded_to = CHECKSUM_SIZE

    def __init__(self, mechanisms: Mapping[str, int]) -> None:
        self._mechanism = mechanism_of(Mechanism.AES_KEY_WRAP, mechanisms)

    @override
    def sealed_sizes(self, size: int) -> tuple[int, ...]:
        return (CHECKSUM_SIZE + BINDING_HASH_SIZE + size + -size % self.padded_to,)

    @override
    def seal(self, session: Any, kek: KekObjects, material: bytes, binding: bytes) -> bytes:
        content = sha256(binding).digest() + material + bytes(-len(material) % self.padded_to)
        try:
            passing = session.create_object(
                {
                    Attribute.CLASS: ObjectClass.SECRET_KEY,
                    Attribute.KEY_TYPE: KeyType.GENERIC_SECRET,
                    Attribute.TOKEN: False,
                    Attribute.VALUE: content,
                    **PASSING,
                }
            )
        finally:
            wipe(content)
        try:
            wrapped: bytes = permitted(kek.key, "wrap_key")(passing, mechanism=self._mechanism)
        finally:
            passing.destroy()
        return wrapped

    @override
    def open(self, session: Any, kek: KekObjects, wrapped: bytes, binding: bytes) -> bytes:
        passing = permitted(kek.key, "unwrap_key")(
            ObjectClass.SECRET_KEY,
            KeyType.GENERIC_SECRET,
            wrapped,
            mechanism=self._mechanism,
            template=dict(PASSING),
        )
        try:
            content: bytes = passing[Attribute.VALUE]
        finally:
            passing.destroy()
        bound_to, material = content[:BINDING_HASH_SIZE], content[BINDING_HASH_SIZE:]
        wipe(content)
        if not hmac.compare_digest(bound_to, sha256(binding).digest()):
            wipe(material)
            raise WrongBindingError("is bound to another place")
        return material


class CbcHmacWrapping(Wrapping):
    method = WrapMethod.CBC_HMAC
    capabilities = MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT
    opening = Attribute.DECRYPT
    padded_to = CBC_BLOCK

    def __init__(self, mechanisms: Mapping[str, int]) -> None:
        self._mechanism = mechanism_of(Mechanism.AES_CBC, mechanisms)
        self._mac_mechanism = mechanism_of(Mechanism.SHA256_HMAC, mechanisms)

    @override
    def sealed_sizes(self, size: int) -> tuple[int, ...]:
        return (CBC_BLOCK + size + -size % CBC_BLOCK + MAC_SIZE,)

    @override
    def seal(self, session: Any, kek: KekObjects, material: bytes, binding: bytes) -> bytes:
        iv = random_bytes(session, CBC_BLOCK)
        padded = material + bytes(-len(material) % CBC_BLOCK)
        sealed: bytes = permitted(kek.key, "encrypt")(padded, mechanism=self._mechanism, mechanism_param=iv)
        if padded is not material:
            wipe(padded)
        return authenticated(kek, iv + sealed, binding, self._mac_mechanism)

    @override
    def open(self, session: Any, kek: KekObjects, wrapped: bytes, binding: bytes) -> bytes:
        sealed = verified(kek, wrapped, binding, self._mac_mechanism)
        opened: bytes = permitted(kek.key, "decrypt")(
            sealed[CBC_BLOCK:], mechanism=self._mechanism, mechanism_param=sealed[:CBC_BLOCK]
        )
        return opened

    @override
    def iv_of(self, wrapped: bytes) -> bytes | None:
        return wrapped[:CBC_BLOCK]


def authenticated(kek: KekObjects, sealed: bytes, binding: bytes, mechanism: Mechanism) -> bytes:
    """*sealed* ‖ HMAC-SHA-256 by the HSM over lp(binding) ‖ *sealed*."""
    return sealed + _mac(kek, sealed, binding, mechanism)


def verified(kek: KekObjects, wrapped: bytes, binding: bytes, mechanism: Mechanism) -> bytes:
    """What stands before the HMAC. WrongBindingError unless that is right."""
    sealed, stated = wrapped[:-MAC_SIZE], wrapped[-MAC_SIZE:]
    if not sealed or not hmac.compare_digest(_mac(kek, sealed, binding, mechanism), stated):
        raise WrongBindingError("its HMAC differs")
    return sealed


def _mac(kek: KekObjects, sealed: bytes, binding: bytes, mechanism: Mechanism) -> bytes:
    made: bytes = permitted(kek.mac, "sign")(lp(binding) + sealed, mechanism=mechanism)
    return made
