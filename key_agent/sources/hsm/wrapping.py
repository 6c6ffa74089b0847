"""How a KEK wraps key material: the methods, and the proof that a token does one correctly (hsm.md 4).

1. Listing mechanisms proves nothing: a method is used only after this very KEK has shown the round trip and
   has refused a wrong binding, every kind of tampering and a cut.
2. A wrapped key is bound to its place: as AAD (gcm) or as a hash wrapped beside the key (kw), compared in
   constant time.
3. The IV of gcm comes from the HSM's generator, is never zero and never made by a token that was not seen
   to make it.
4. KM in `bytes` is wiped by the caller with `wipe` as soon as it has been used.
"""

import ctypes
import hmac
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any, Final, override

from pkcs11 import Attribute, GCMParams, KeyType, Mechanism, MechanismFlag, ObjectClass, PKCS11Error

from envelope.derive import lp
from envelope.keys import KEY_MATERIAL_SIZE
from key_agent.errors import KeySourceError, UnsupportedError
from key_agent.sources.hsm.session import Token, attribute, find_keys
from key_agent.sources.source import KekReference, WrapMethod

IV_SIZE: Final = 12
TAG_SIZE: Final = 16
CHECKSUM_SIZE: Final = 8  # RFC 3394's integrity register
BINDING_HASH_SIZE: Final = 32
_BYTES_HEADER: Final = bytes.__basicsize__ - 1  # where the content of a bytes object begins in CPython


class WrongBindingError(Exception):
    """The wrapped key opened, and belongs to another place."""


def wipe(secret: bytes) -> None:
    """Overwrite *secret* where it lies (hsm.md 9). Only for bytes longer than 1 that nothing else holds."""
    if len(secret) > 1:
        ctypes.memset(id(secret) + _BYTES_HEADER, 0, len(secret))


def _permitted(kek: Any, operation: str) -> Callable[..., Any]:
    """The method of *kek*; PKCS11Error if the token forbids it (python-pkcs11 leaves the method out then)."""
    method: Callable[..., Any] | None = getattr(kek, operation, None)
    if method is None:
        raise PKCS11Error(f"the token does not permit {operation} with this key")
    return method


class Wrapping(ABC):
    """A wrap method; stateless. `seal` and `open` let pkcs11.PKCS11Error through."""

    method: WrapMethod
    capabilities: MechanismFlag
    """What a KEK of this method may do, and nothing else: no key both unwraps and decrypts."""
    opening: Attribute
    """The attribute that an operator clears to disable the KEK."""
    padded_to: int = 1
    """`open` returns the material with zeros up to a multiple of this many bytes."""

    @abstractmethod
    def sealed_size(self, size: int) -> int:
        """Bytes that *size* bytes of material are wrapped to."""

    @abstractmethod
    def seal(self, session: Any, kek: Any, material: bytes, binding: bytes) -> bytes: ...

    @abstractmethod
    def open(self, session: Any, kek: Any, wrapped: bytes, binding: bytes) -> bytes:
        """WrongBindingError where the method finds that out by itself."""


class GcmWrapping(Wrapping):
    method = WrapMethod.GCM
    capabilities = MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT
    opening = Attribute.DECRYPT

    @override
    def sealed_size(self, size: int) -> int:
        return IV_SIZE + size + TAG_SIZE

    @override
    def seal(self, session: Any, kek: Any, material: bytes, binding: bytes) -> bytes:
        iv: bytes = session.generate_random(8 * IV_SIZE)  # counts bits
        if iv == bytes(IV_SIZE):
            raise KeySourceError("the HSM's random generator returned zeros")
        sealed: bytes = _permitted(kek, "encrypt")(
            material,
            mechanism=Mechanism.AES_GCM,
            mechanism_param=GCMParams(iv, binding, 8 * TAG_SIZE),
        )
        return iv + sealed

    @override
    def open(self, session: Any, kek: Any, wrapped: bytes, binding: bytes) -> bytes:
        opened: bytes = _permitted(kek, "decrypt")(
            wrapped[IV_SIZE:],
            mechanism=Mechanism.AES_GCM,
            mechanism_param=GCMParams(wrapped[:IV_SIZE], binding, 8 * TAG_SIZE),
        )
        return opened


class KeyWrapping(Wrapping):
    method = WrapMethod.KW
    capabilities = MechanismFlag.WRAP | MechanismFlag.UNWRAP
    opening = Attribute.UNWRAP
    padded_to = CHECKSUM_SIZE  # AES_KEY_WRAP pads without a word, and differently on each token (hsm.md 1.12)
    _passing: Final[Mapping[Attribute, Any]] = {
        # A session object in the clear for the length of one call: what is wrapped must be extractable.
        Attribute.SENSITIVE: False,
        Attribute.EXTRACTABLE: True,
        Attribute.PRIVATE: True,
    }

    @override
    def sealed_size(self, size: int) -> int:
        return CHECKSUM_SIZE + BINDING_HASH_SIZE + size + -size % self.padded_to

    @override
    def seal(self, session: Any, kek: Any, material: bytes, binding: bytes) -> bytes:
        content = sha256(binding).digest() + material + bytes(-len(material) % self.padded_to)
        passing = session.create_object(
            {
                Attribute.CLASS: ObjectClass.SECRET_KEY,
                Attribute.KEY_TYPE: KeyType.GENERIC_SECRET,
                Attribute.TOKEN: False,
                Attribute.VALUE: content,
                **self._passing,
            }
        )
        wipe(content)
        try:
            wrapped: bytes = _permitted(kek, "wrap_key")(passing, mechanism=Mechanism.AES_KEY_WRAP)
        finally:
            passing.destroy()
        return wrapped

    @override
    def open(self, session: Any, kek: Any, wrapped: bytes, binding: bytes) -> bytes:
        passing = _permitted(kek, "unwrap_key")(
            ObjectClass.SECRET_KEY,
            KeyType.GENERIC_SECRET,
            wrapped,
            mechanism=Mechanism.AES_KEY_WRAP,
            template=dict(self._passing),
        )
        try:
            content: bytes = passing[Attribute.VALUE]
        finally:
            passing.destroy()
        bound_to, material = content[:BINDING_HASH_SIZE], content[BINDING_HASH_SIZE:]
        wipe(content)
        if not hmac.compare_digest(bound_to, sha256(binding).digest()):
            wipe(material)
            raise WrongBindingError
        return material


WRAPPINGS: Final[Mapping[WrapMethod, Wrapping]] = {
    wrapping.method: wrapping for wrapping in (GcmWrapping(), KeyWrapping())
}


def wrapping_of(method: WrapMethod) -> Wrapping:
    """UnsupportedError for a method that this version does not have."""
    try:
        return WRAPPINGS[method]
    except KeyError:
        raise UnsupportedError(f"wrap method {method} is not implemented") from None


def canary_binding(reference: KekReference) -> bytes:
    """The canary is bound like a wrapped key, under a label that no wrapped key has."""
    return lp(b"sealgate/v1 canary") + lp(reference.kek_id.encode()) + lp(reference.environment_id.encode())


def check_attributes(kek: Any, wrapping: Wrapping) -> None:
    """UnsupportedError if the token has weakened the KEK: templates may be changed silently (hsm.md 2.2)."""
    demanded = {
        Attribute.KEY_TYPE: KeyType.AES,
        Attribute.VALUE_LEN: 32,
        Attribute.TOKEN: True,
        Attribute.PRIVATE: True,
        Attribute.SENSITIVE: True,
        Attribute.EXTRACTABLE: False,
    }
    flags = {
        Attribute.ENCRYPT: MechanismFlag.ENCRYPT,
        Attribute.DECRYPT: MechanismFlag.DECRYPT,
        Attribute.WRAP: MechanismFlag.WRAP,
        Attribute.UNWRAP: MechanismFlag.UNWRAP,
    }
    demanded |= {name: bool(flag & wrapping.capabilities) for name, flag in flags.items()}
    # Not every token has these; one that has them must not deny them. (CKA_LOCAL is not among them: NSS says
    # false of keys that it has just generated.)
    welcome = {Attribute.ALWAYS_SENSITIVE: True, Attribute.NEVER_EXTRACTABLE: True}
    wrong = [name.name for name, value in demanded.items() if attribute(kek, name) != value]
    wrong += [name.name for name, value in welcome.items() if attribute(kek, name) not in (None, value)]
    if wrong:
        raise UnsupportedError(f"the token weakened the KEK: {', '.join(wrong)} not as demanded")


def prove(token: Token, label: str, object_id: bytes, wrapping: Wrapping) -> None:
    """Have the KEK of that name show that *wrapping* works. UnsupportedError, PKCS11Error: it does not.

    Each refusal is tested on a session of its own: a session with a failed operation is not to be trusted.
    """
    session, kek = _fresh(token, label, object_id)
    material: bytes = session.generate_random(8 * KEY_MATERIAL_SIZE)
    binding, other_binding = b"sealgate proof", b"sealgate prooF"
    sealed = wrapping.seal(session, kek, material, binding)
    again = wrapping.seal(session, kek, material, binding)
    if len(sealed) != wrapping.sealed_size(len(material)):
        raise UnsupportedError(f"{len(sealed)} bytes sealed, not {wrapping.sealed_size(len(material))}")
    if wrapping.method is WrapMethod.GCM and sealed == again:
        raise UnsupportedError("two seals are equal: the IV repeats")
    if material in sealed:
        raise UnsupportedError("the sealed bytes hold the plaintext")
    if wrapping.open(session, kek, sealed, binding) != material:
        raise UnsupportedError("opened bytes differ from the sealed ones")
    tampered = {
        "a wrong binding": (sealed, other_binding),
        "a flipped first bit": (_flip(sealed, 0), binding),
        "a flipped middle bit": (_flip(sealed, len(sealed) // 2), binding),
        "a flipped last bit": (_flip(sealed, len(sealed) - 1), binding),
        "a cut": (sealed[:-8], binding),
    }
    for what, (bad, its_binding) in tampered.items():
        session, kek = _fresh(token, label, object_id)
        try:
            wrapping.open(session, kek, bad, its_binding)
        except (PKCS11Error, WrongBindingError):
            continue
        raise UnsupportedError(f"the token accepts {what}")
    session, kek = _fresh(token, label, object_id)
    if wrapping.open(session, kek, sealed, binding) != material:
        raise UnsupportedError("the KEK stopped working during its proof")


def _fresh(token: Token, label: str, object_id: bytes) -> tuple[Any, Any]:
    session = token.renew()
    found = find_keys(session, label, object_id)
    if len(found) != 1:
        raise UnsupportedError(f"{len(found)} keys named {label!r} after creating one")
    return session, found[0]


def _flip(data: bytes, index: int) -> bytes:
    return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]
