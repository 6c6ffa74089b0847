"""What every wrap method has in common; the methods stand in gcm.py, key_wrapping.py, hybrid_wrapping.py.

1. A wrapped key is bound to its place: as AAD, under an HMAC, or as a hash wrapped beside the key.
2. A method is stateless. What it needs of the token are a session, the KEK's objects on that session, and the
   numbers of its mechanisms, which some vendors chose themselves.
3. KM in `bytes` is wiped by the caller with `wipe` as soon as it has been used.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag, ObjectClass, PKCS11Error

from envelope.derive import lp
from key_agent.errors import KeySourceError
from key_agent.sources.source import KekReference, WrapMethod


class WrongBindingError(Exception):
    """The wrapped key belongs to another place or was changed: found by the worker, not by the token."""


@dataclass(frozen=True, slots=True)
class KekObjects:
    """The objects of one KEK on one session."""

    key: Any
    """The secret key, or the private key of an asymmetric KEK."""
    mac: Any = None
    """The HMAC key of methods that have one."""
    public_key_der: bytes = b""
    """SubjectPublicKeyInfo of an asymmetric KEK."""


class Wrapping(ABC):
    """A wrap method. `seal` and `open` let pkcs11.PKCS11Error through."""

    method: WrapMethod
    object_class: ObjectClass = ObjectClass.SECRET_KEY
    key_type: KeyType = KeyType.AES
    capabilities: MechanismFlag
    """What a KEK of this method may do, and nothing else: no key both unwraps and decrypts."""
    opening: Attribute
    """The attribute that an operator clears to disable the KEK."""
    padded_to: int = 1
    """`open` returns the material with zeros up to a multiple of this many bytes."""

    @abstractmethod
    def sealed_sizes(self, size: int) -> tuple[int, ...]:
        """Bytes that *size* bytes of material may be wrapped to."""

    @abstractmethod
    def seal(self, session: Any, kek: KekObjects, material: bytes, binding: bytes) -> bytes:
        """UnsupportedError where the token does not do what the method is named for."""

    @abstractmethod
    def open(self, session: Any, kek: KekObjects, wrapped: bytes, binding: bytes) -> bytes:
        """WrongBindingError where the method finds that out by itself."""

    def iv_of(self, wrapped: bytes) -> bytes | None:
        """The IV in *wrapped*, of methods that have one."""
        del wrapped
        return None


def permitted(key: Any, operation: str) -> Callable[..., Any]:
    """The method of *key*; PKCS11Error if the token forbids it (python-pkcs11 leaves the method out then)."""
    method: Callable[..., Any] | None = getattr(key, operation, None)
    if method is None:
        raise PKCS11Error(f"the token does not permit {operation} with this key")
    return method


def mechanism_of(standard: Mechanism, numbers: Mapping[str, int]) -> Mechanism:
    """*standard*, or the number that a vendor gave its own kind of it."""
    number = numbers.get(standard.name)
    if number is None:
        return standard
    # python-pkcs11 takes only members of its enumeration; this is one that it does not list.
    made: Mechanism = int.__new__(Mechanism, number)
    made._name_, made._value_ = f"{standard.name}@{number:#x}", number
    return made


def random_bytes(session: Any, size: int) -> bytes:
    """From the HSM's generator. KeySourceError if that is dead."""
    made: bytes = session.generate_random(8 * size)  # counts bits
    if len(made) != size or made == bytes(size):
        raise KeySourceError("the HSM's random generator returned zeros")
    return made


def canary_binding(reference: KekReference) -> bytes:
    """The canary is bound like a wrapped key, under a label that no wrapped key has."""
    return lp(b"sealgate/v1 canary") + lp(reference.kek_id.encode()) + lp(reference.environment_id.encode())
