"""XAES-256-GCM: AES-256-GCM with a nonce long enough to be drawn at random (c2sp.org/XAES-256-GCM).

1. Each message has a key of its own, made of the first 12 bytes of its nonce by a KDF of NIST SP 800-108r1
   in counter mode over CMAC-AES-256: two calls of the block cipher. The last 12 bytes are AES-GCM's nonce.
2. 24 random bytes collide with probability 2^-32 after 2^80 messages; AES-256-GCM's 12 bytes after 2^32.
3. AES-GCM does not commit to its key. It is used where the caller names the one key; keys are never tried.
4. An object belongs to one thread: it keeps one context of the block cipher.
"""

import os
from collections.abc import Sequence
from typing import Final, override

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

from envelope.errors import IntegrityError, MisuseError

KEY_SIZE: Final = 32
NONCE_SIZE: Final = 24
TAG_SIZE: Final = 16
MAX_PLAINTEXT_SIZE: Final = 2**31 - 1 - TAG_SIZE
"""One call of `cryptography` takes no more; the specification would allow about 64 GiB."""

_BLOCK: Final = 16
_SPLIT: Final = 12  # of the nonce: this much makes the key, the rest is AES-GCM's nonce
_LOW_128: Final = 2**128 - 1
_POLYNOMIAL: Final = 0b10000111  # CMAC's doubling in GF(2^128)
# Counter (2 bytes), label "X", separator; the context that follows is the nonce's first half.
_FIRST: Final = int.from_bytes(b"\x00\x01X\x00") << 96
_SECOND: Final = int.from_bytes(b"\x00\x02X\x00") << 96


class Xaes256Gcm:
    """A key of 32 bytes, ready for use. MisuseError for another length."""

    __slots__ = ("_blocks", "_mask")

    def __init__(self, key: bytes | bytearray) -> None:
        if len(key) != KEY_SIZE:
            raise MisuseError(f"a key of XAES-256-GCM has {KEY_SIZE} bytes, not {len(key)}")
        # ECB is the bare block cipher, the brick that CMAC is built of; nothing is encrypted with it.
        self._blocks = Cipher(AES(key), ECB()).encryptor()  # noqa: S305
        zero = int.from_bytes(self._blocks.update(bytes(_BLOCK)))
        k1 = ((zero << 1) & _LOW_128) ^ (_POLYNOMIAL if zero >> 127 else 0)
        self._mask = ((_FIRST ^ k1) << 128) | (_SECOND ^ k1)

    @override
    def __repr__(self) -> str:
        return "<Xaes256Gcm>"

    def encrypt(self, nonce: bytes, plaintext: bytes, aad: bytes) -> bytes:
        """Ciphertext and tag: 16 bytes more than *plaintext*. A *nonce* of 24 bytes is used once: see `seal`.

        MisuseError for a nonce of another length or too long a plaintext.
        """
        if len(plaintext) > MAX_PLAINTEXT_SIZE:
            raise MisuseError(f"{len(plaintext)} bytes are too many for one message")
        return AESGCM(self._message_key(nonce)).encrypt(nonce[_SPLIT:], plaintext, aad)

    def seal(self, plaintext: bytes, aad: bytes) -> tuple[bytes, bytes]:
        """A fresh nonce, and what `encrypt` makes under it."""
        nonce = os.urandom(NONCE_SIZE)
        return nonce, self.encrypt(nonce, plaintext, aad)

    def seal_all(self, messages: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """For each (plaintext, aad) a fresh nonce, ciphertext and tag, in one piece: 40 bytes more.

        The same as `seal` for each, for half the time: all message keys come of one call of the block cipher.
        """
        nonces = os.urandom(NONCE_SIZE * len(messages))
        mask, blocks = self._mask, []
        for start in range(0, len(nonces), NONCE_SIZE):
            context = int.from_bytes(nonces[start : start + _SPLIT])
            blocks.append((mask ^ context ^ (context << 128)).to_bytes(2 * _BLOCK))
        keys = self._blocks.update(b"".join(blocks))
        sealed, start = [], 0
        for number, (plaintext, aad) in enumerate(messages):
            if len(plaintext) > MAX_PLAINTEXT_SIZE:
                raise MisuseError(f"{len(plaintext)} bytes are too many for one message")
            nonce = nonces[start : start + NONCE_SIZE]
            key = keys[number * KEY_SIZE : (number + 1) * KEY_SIZE]
            sealed.append(nonce + AESGCM(key).encrypt(nonce[_SPLIT:], plaintext, aad))
            start += NONCE_SIZE
        return sealed

    def decrypt(self, nonce: bytes, sealed: bytes, aad: bytes) -> bytes:
        """The plaintext of ciphertext and tag. IntegrityError if key, nonce or *aad* are not theirs."""
        if len(nonce) != NONCE_SIZE or len(sealed) < TAG_SIZE:
            raise IntegrityError("not a message of XAES-256-GCM")
        try:
            return AESGCM(self._message_key(nonce)).decrypt(nonce[_SPLIT:], sealed, aad)
        except InvalidTag:
            raise IntegrityError("the message does not verify") from None

    def _message_key(self, nonce: bytes) -> bytes:
        if len(nonce) != NONCE_SIZE:
            raise MisuseError(f"a nonce of XAES-256-GCM has {NONCE_SIZE} bytes, not {len(nonce)}")
        context = int.from_bytes(nonce[:_SPLIT])
        return self._blocks.update((self._mask ^ context ^ (context << 128)).to_bytes(2 * _BLOCK))
