"""AES-256-GCM, and who makes the IV: we from the HSM's generator, or the HSM itself.

1. An IV is never zero. One that the HSM was to make counts only if the HSM was seen to make it: SoftHSM2
   takes the zeros, or none at all, for the caller's IV, and two messages under one IV give GCM's key away.
2. Opening is the same for all: the stored IV, the ciphertext, the tag, the binding as AAD.
3. The parameters are our own structure in writable memory: python-pkcs11's refuses IVs above 12 bytes, and an
   HSM that writes the IV back would change immutable bytes.
"""

import ctypes
import struct
from collections.abc import Mapping
from typing import Any, Final, override

from pkcs11 import Attribute, Mechanism, MechanismFlag

from key_agent.errors import UnsupportedError
from key_agent.sources.hsm.wrapping import (
    KekObjects,
    Wrapping,
    WrongBindingError,
    mechanism_of,
    permitted,
    random_bytes,
)
from key_agent.sources.source import WrapMethod

IV_SIZE: Final = 12
APPENDED_IV_SIZES: Final = (12, 16)
TAG_SIZE: Final = 16
# CK_GCM_PARAMS: pIv, ulIvLen, ulIvBits, pAAD, ulAADLen, ulTagBits.
_PARAMETERS: Final = struct.Struct("@PLLPLL")


class GcmParameters:
    """CK_GCM_PARAMS. Its pointers are raw: keep this object as long as the call that uses `packed`."""

    def __init__(self, iv: bytes, binding: bytes) -> None:
        self._size = len(iv)
        self._iv = ctypes.create_string_buffer(iv, len(iv) or 1)
        self._binding = ctypes.create_string_buffer(binding, len(binding))
        self.packed = _PARAMETERS.pack(
            ctypes.addressof(self._iv) if iv else 0,
            len(iv),
            8 * len(iv),
            ctypes.addressof(self._binding),
            len(binding),
            8 * TAG_SIZE,
        )

    @property
    def iv(self) -> bytes:
        """As the token left it."""
        return self._iv.raw[: self._size]


class GcmWrapping(Wrapping):
    """The IV comes from the HSM's generator by way of us."""

    method = WrapMethod.GCM
    capabilities = MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT
    opening = Attribute.DECRYPT

    def __init__(self, mechanisms: Mapping[str, int]) -> None:
        self._mechanism = mechanism_of(Mechanism.AES_GCM, mechanisms)

    @override
    def sealed_sizes(self, size: int) -> tuple[int, ...]:
        return (IV_SIZE + size + TAG_SIZE,)

    @override
    def seal(self, session: Any, kek: KekObjects, material: bytes, binding: bytes) -> bytes:
        iv = random_bytes(session, IV_SIZE)
        sealed, _ = self._encrypt(kek, material, iv, binding)
        return iv + sealed

    @override
    def open(self, session: Any, kek: KekObjects, wrapped: bytes, binding: bytes) -> bytes:
        return self._decrypt(kek, wrapped[:IV_SIZE], wrapped[IV_SIZE:], binding)

    @override
    def iv_of(self, wrapped: bytes) -> bytes | None:
        return wrapped[:IV_SIZE]

    def _encrypt(self, kek: KekObjects, material: bytes, iv: bytes, binding: bytes) -> tuple[bytes, bytes]:
        """What the token returned, and the IV as it left it."""
        parameters = GcmParameters(iv, binding)
        sealed: bytes = permitted(kek.key, "encrypt")(
            material, mechanism=self._mechanism, mechanism_param=parameters.packed
        )
        return sealed, parameters.iv

    def _decrypt(self, kek: KekObjects, iv: bytes, sealed: bytes, binding: bytes) -> bytes:
        parameters = GcmParameters(iv, binding)
        opened: bytes = permitted(kek.key, "decrypt")(
            sealed, mechanism=self._mechanism, mechanism_param=parameters.packed
        )
        del parameters  # alive until here
        return opened


class GcmInPlaceWrapping(GcmWrapping):
    """The HSM writes the IV over the zeros that it was given: AWS CloudHSM, Google, ProtectServer."""

    method = WrapMethod.GCM_IN_PLACE

    @override
    def seal(self, session: Any, kek: KekObjects, material: bytes, binding: bytes) -> bytes:
        sealed, iv = self._encrypt(kek, material, bytes(IV_SIZE), binding)
        if iv == bytes(IV_SIZE):
            raise UnsupportedError("the token left the IV zero")
        return iv + sealed


class GcmAppendedWrapping(GcmWrapping):
    """The HSM is given no IV and appends its own to the tag: Thales Luna in FIPS mode."""

    method = WrapMethod.GCM_APPENDED

    @override
    def sealed_sizes(self, size: int) -> tuple[int, ...]:
        return tuple(1 + iv_size + size + TAG_SIZE for iv_size in APPENDED_IV_SIZES)

    @override
    def seal(self, session: Any, kek: KekObjects, material: bytes, binding: bytes) -> bytes:
        answer, _ = self._encrypt(kek, material, b"", binding)
        body = len(material) + TAG_SIZE
        iv = answer[body:]
        if len(iv) not in APPENDED_IV_SIZES or iv == bytes(len(iv)):
            raise UnsupportedError(f"the token appended no IV ({len(iv)} bytes after the tag)")
        return bytes([len(iv)]) + iv + answer[:body]

    @override
    def open(self, session: Any, kek: KekObjects, wrapped: bytes, binding: bytes) -> bytes:
        size = wrapped[0] if wrapped else 0
        if size not in APPENDED_IV_SIZES:
            raise WrongBindingError("no IV size stands at the beginning")
        return self._decrypt(kek, wrapped[1 : 1 + size], wrapped[1 + size :], binding)

    @override
    def iv_of(self, wrapped: bytes) -> bytes | None:
        return wrapped[1 : 1 + wrapped[0]]
