"""Asymmetric KEKs: sealing needs only the public half, opening the HSM (../hybrid.py has the bytes).

1. The private key decrypts (RSA) or agrees (EC) in the HSM. For EC the shared secret crosses into the worker,
   which derives the key and forgets it: SoftHSM2 and NSS derive only without a KDF.
2. Sealed to the *pinned* public key, never to one that the token shows today.
3. An HMAC by a second key in the HSM stands behind everything and is verified first: with the public key and
   write access to the registry anybody could file key material of his own choice otherwise.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Final, override

from pkcs11 import KDF, MGF, Attribute, KeyType, Mechanism, MechanismFlag, ObjectClass

from envelope.memory import wipe
from key_agent.errors import KeySourceError
from key_agent.sources.hsm.key_wrapping import MAC_SIZE, PASSING, authenticated, verified
from key_agent.sources.hsm.wrapping import (
    KekObjects,
    Wrapping,
    WrongBindingError,
    mechanism_of,
    permitted,
    random_bytes,
)
from key_agent.sources.hybrid import (
    CONTENT_KEY_SIZE,
    RSA_SIZE,
    HybridError,
    agreed_content_key,
    ephemeral_point,
    hybrid_size,
    open_sealed,
    seal_to_public_key,
)
from key_agent.sources.source import WrapMethod

SHARED_SECRET_SIZE: Final = 32
_OAEP: Final[Mapping[WrapMethod, tuple[Mechanism, MGF, None]]] = {
    WrapMethod.RSA_OAEP_256: (Mechanism.SHA256, MGF.SHA256, None),  # no label: SoftHSM2 takes none
    WrapMethod.RSA_OAEP_1: (Mechanism.SHA_1, MGF.SHA1, None),
}


class HybridWrapping(Wrapping):
    object_class = ObjectClass.PRIVATE_KEY

    def __init__(self, mechanisms: Mapping[str, int]) -> None:
        self._mac_mechanism = mechanism_of(Mechanism.SHA256_HMAC, mechanisms)

    @override
    def sealed_sizes(self, size: int) -> tuple[int, ...]:
        return (hybrid_size(self.method, size) + MAC_SIZE,)

    @override
    def seal(self, session: Any, kek: KekObjects, material: bytes, binding: bytes) -> bytes:
        content_key = random_bytes(session, CONTENT_KEY_SIZE)
        try:
            sealed = seal_to_public_key(self.method, kek.public_key_der, content_key, material, binding)
        except HybridError as error:
            raise KeySourceError(f"the KEK's pinned public key: {error}") from None
        finally:
            wipe(content_key)
        return authenticated(kek, sealed, binding, self._mac_mechanism)

    @override
    def open(self, session: Any, kek: KekObjects, wrapped: bytes, binding: bytes) -> bytes:
        return self.reveal(session, kek, verified(kek, wrapped, binding, self._mac_mechanism), binding)

    def reveal(self, session: Any, kek: KekObjects, sealed: bytes, binding: bytes) -> bytes:
        """The material in bytes that somebody with the public key has sealed, and nobody vouches for yet.

        WrongBindingError as `open`. The caller compares it with a check value that is vouched for.
        """
        del session
        try:
            content_key = self._content_key(kek, sealed, binding)
            try:
                return open_sealed(self.method, content_key, sealed, binding)
            finally:
                wipe(content_key)
        except HybridError as error:
            raise WrongBindingError(str(error)) from None

    def vouch(self, kek: KekObjects, sealed: bytes, binding: bytes) -> bytes:
        """*sealed*, whose material was compared, as a wrapped key: with our HMAC, which the HSM finds right.

        The private key is not used once more: these very bytes have just been opened by it, and nothing but
        the HMAC is new. WrongBindingError if the HSM does not make the same one twice.
        """
        wrapped = authenticated(kek, sealed, binding, self._mac_mechanism)
        verified(kek, wrapped, binding, self._mac_mechanism)
        return wrapped

    @abstractmethod
    def _content_key(self, kek: KekObjects, sealed: bytes, binding: bytes) -> bytes:
        """What the HSM makes of the head of *sealed*; the caller wipes it."""


class RsaWrapping(HybridWrapping):
    key_type = KeyType.RSA
    capabilities = MechanismFlag.DECRYPT
    opening = Attribute.DECRYPT

    def __init__(self, method: WrapMethod, mechanisms: Mapping[str, int]) -> None:
        super().__init__(mechanisms)
        self.method = method
        self._mechanism = mechanism_of(Mechanism.RSA_PKCS_OAEP, mechanisms)

    @override
    def _content_key(self, kek: KekObjects, sealed: bytes, binding: bytes) -> bytes:
        opened: bytes = permitted(kek.key, "decrypt")(
            sealed[:RSA_SIZE], mechanism=self._mechanism, mechanism_param=_OAEP[self.method]
        )
        if len(opened) != CONTENT_KEY_SIZE:
            raise HybridError("the content key has another size")
        return opened


class EcdhWrapping(HybridWrapping):
    method = WrapMethod.ECDH_ES
    key_type = KeyType.EC
    capabilities = MechanismFlag.DERIVE
    opening = Attribute.DERIVE

    def __init__(self, mechanisms: Mapping[str, int]) -> None:
        super().__init__(mechanisms)
        self._mechanism = mechanism_of(Mechanism.ECDH1_DERIVE, mechanisms)

    @override
    def _content_key(self, kek: KekObjects, sealed: bytes, binding: bytes) -> bytes:
        passing = permitted(kek.key, "derive_key")(
            KeyType.GENERIC_SECRET,
            8 * SHARED_SECRET_SIZE,
            capabilities=0,
            mechanism=self._mechanism,
            mechanism_param=(KDF.NULL, None, ephemeral_point(sealed)),
            template=dict(PASSING),
        )
        try:
            shared_secret: bytes = passing[Attribute.VALUE]
        finally:
            passing.destroy()
        try:
            return agreed_content_key(shared_secret, sealed, binding)
        finally:
            wipe(shared_secret)
