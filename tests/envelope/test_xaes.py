"""XAES-256-GCM against the vectors of c2sp.org/XAES-256-GCM, and against whoever changes a message."""

import hashlib
import os

import pytest

from envelope.errors import IntegrityError, MisuseError
from envelope.xaes import KEY_SIZE, NONCE_SIZE, TAG_SIZE, Xaes256Gcm

NONCE = b"ABCDEFGHIJKLMNOPQRSTUVWX"
PLAIN = b"XAES-256-GCM"


class Shake:
    """SHAKE128 as a stream of bytes; hashlib gives prefixes only."""

    def __init__(self, size: int) -> None:
        self._bytes = memoryview(hashlib.shake_128(b"").digest(size))
        self._at = 0

    def read(self, size: int) -> bytes:
        piece = bytes(self._bytes[self._at : self._at + size])
        assert len(piece) == size, "the stream was made too short"
        self._at += size
        return piece


@pytest.mark.parametrize(
    ("key", "aad", "sealed"),
    [
        (b"\x01" * 32, b"", "ce546ef63c9cc60765923609b33a9a1974e96e52daf2fcf7075e2271"),
        (b"\x03" * 32, b"c2sp.org/XAES-256-GCM", "986ec1832593df5443a179437fd083bf3fdb41abd740a21f71eb769d"),
    ],
    ids=["msb0", "msb1"],  # of AES(key, 0): with and without the polynomial
)
def test_vectors_of_the_specification(key: bytes, aad: bytes, sealed: str) -> None:
    cipher = Xaes256Gcm(key)
    assert cipher.encrypt(NONCE, PLAIN, aad).hex() == sealed
    assert cipher.decrypt(NONCE, bytes.fromhex(sealed), aad) == PLAIN


def test_ten_thousand_random_messages_of_the_specification() -> None:
    """Every length of plaintext and AAD from 0 to 255; the million of the longer vector add only time."""
    stream, digest = Shake(4_000_000), hashlib.shake_128()
    for _ in range(10_000):
        key, nonce = stream.read(32), stream.read(24)
        plain = stream.read(stream.read(1)[0])
        aad = stream.read(stream.read(1)[0])
        cipher = Xaes256Gcm(key)
        sealed = cipher.encrypt(nonce, plain, aad)
        assert cipher.decrypt(nonce, sealed, aad) == plain
        digest.update(sealed)
    expected = "e6b9edf2df6cec60c8cbd864e2211b597fb69a529160cd040d56c0c210081939"
    assert digest.hexdigest(32) == expected


def test_every_flipped_bit_is_refused() -> None:
    cipher = Xaes256Gcm(os.urandom(KEY_SIZE))
    aad = b"associated"
    nonce, sealed = cipher.seal(PLAIN, aad)
    assert cipher.decrypt(nonce, sealed, aad) == PLAIN
    whole = nonce + sealed + aad
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError):
            cipher.decrypt(
                bytes(changed[:NONCE_SIZE]),
                bytes(changed[NONCE_SIZE : NONCE_SIZE + len(sealed)]),
                bytes(changed[NONCE_SIZE + len(sealed) :]),
            )


def test_every_cut_and_moved_boundary_is_refused() -> None:
    cipher = Xaes256Gcm(os.urandom(KEY_SIZE))
    nonce, sealed = cipher.seal(PLAIN, b"aad")
    for end in range(len(sealed)):
        with pytest.raises(IntegrityError):
            cipher.decrypt(nonce, sealed[:end], b"aad")
    for wrong in (sealed + b"\0", b"\0" + sealed, sealed[1:], sealed[TAG_SIZE:] + sealed[:TAG_SIZE]):
        with pytest.raises(IntegrityError):
            cipher.decrypt(nonce, wrong, b"aad")
    for wrong_nonce in (b"", nonce[:-1], nonce + b"\0", nonce[12:] + nonce[:12]):
        with pytest.raises(IntegrityError):
            cipher.decrypt(wrong_nonce, sealed, b"aad")


def test_another_key_opens_nothing() -> None:
    nonce, sealed = Xaes256Gcm(os.urandom(KEY_SIZE)).seal(PLAIN, b"")
    with pytest.raises(IntegrityError):
        Xaes256Gcm(os.urandom(KEY_SIZE)).decrypt(nonce, sealed, b"")


def test_each_half_of_the_nonce_counts() -> None:
    """The first half by another message key, the second by another nonce under the same one."""
    cipher = Xaes256Gcm(bytes(32))
    first, second = bytes(23) + b"\1", b"\1" + bytes(23)
    texts = {cipher.encrypt(nonce, bytes(64), b"") for nonce in (bytes(24), first, second)}
    assert len(texts) == 3


def test_nonces_are_fresh() -> None:
    cipher = Xaes256Gcm(os.urandom(KEY_SIZE))
    assert len({cipher.seal(b"", b"")[0] for _ in range(10_000)}) == 10_000


def test_many_at_once_are_the_same_as_one_by_one() -> None:
    cipher = Xaes256Gcm(os.urandom(KEY_SIZE))
    messages = [(os.urandom(number), os.urandom(number % 5)) for number in range(200)]
    sealed = cipher.seal_all(messages)
    nonces = {one[:NONCE_SIZE] for one in sealed}
    assert len(nonces) == len(messages)
    for one, (plaintext, aad) in zip(sealed, messages, strict=True):
        assert one[NONCE_SIZE:] == cipher.encrypt(one[:NONCE_SIZE], plaintext, aad)
        assert cipher.decrypt(one[:NONCE_SIZE], one[NONCE_SIZE:], aad) == plaintext
    assert cipher.seal_all([]) == []


def test_wrong_sizes_are_a_bug_of_the_caller() -> None:
    for size in (0, 16, 31, 33):
        with pytest.raises(MisuseError):
            Xaes256Gcm(bytes(size))
    for size in (0, 12, 23, 25):
        with pytest.raises(MisuseError):
            Xaes256Gcm(bytes(32)).encrypt(bytes(size), b"", b"")


def test_nothing_is_shown() -> None:
    key = bytes(range(32))
    assert key.hex() not in repr(Xaes256Gcm(key))
    assert repr(Xaes256Gcm(key)) == "<Xaes256Gcm>"
