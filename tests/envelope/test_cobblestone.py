"""The message layer: lifecycle, counters, and what stays in buffers. Published vectors: test_vectors.py."""

import tracemalloc
from typing import Final, cast

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.utils import Buffer

from envelope.cobblestone import (
    CHUNK_LIMIT,
    CHUNK_SIZE,
    RECORD_SIZE,
    ChunkOpener,
    MessageKeys,
    MessageOpener,
    MessageSealer,
    derive_message_keys,
)
from envelope.errors import FormatError, IntegrityError, MisuseError, TruncatedError
from tests.envelope.samples import cut, pattern, refused, run

KEY: Final = bytes(range(100, 132))
CONTEXT: Final = b"context"


def _sealed(plain: bytes) -> bytes:
    return run(MessageSealer(KEY, CONTEXT), [plain])


def _keys(message: bytes) -> MessageKeys:
    return derive_message_keys(KEY, message[:24], CONTEXT)


class _SpyingCipher:
    """An AESGCM that remembers the buffers it was told to decrypt into."""

    def __init__(self, cipher: AESGCM) -> None:
        self._cipher = cipher
        self.targets: list[bytearray] = []

    def decrypt_into(self, nonce: Buffer, data: Buffer, aad: Buffer | None, buf: Buffer) -> int:
        # The object behind the view: a view kept here would pin the buffer.
        self.targets.append(memoryview(buf).obj)  # type: ignore[arg-type]
        return self._cipher.decrypt_into(nonce, data, aad, buf)


def test_a_failed_buffer_keeps_nothing() -> None:
    """`decrypt_into` writes plaintext before it checks the tag; nor are the good chunks before it kept."""
    message = bytearray(_sealed(pattern(4 * CHUNK_SIZE)))
    message[56 + 3 * RECORD_SIZE - 1] ^= 1
    keys = _keys(bytes(message))
    spy = _SpyingCipher(keys.aead)
    opener = ChunkOpener(MessageKeys(cast("AESGCM", spy), keys.base_nonce, keys.commitment))
    with pytest.raises(IntegrityError):
        opener.update(message[56:])
    assert len(spy.targets) == 3
    assert all(target is spy.targets[0] for target in spy.targets)
    assert len(spy.targets[0]) == 4 * CHUNK_SIZE
    assert not any(spy.targets[0])


def test_that_decrypt_into_is_the_trap_we_take_it_for() -> None:
    """If this fails the library has changed, and the wiping above tests nothing any more."""
    cipher, target = AESGCM(KEY), bytearray(5)
    sealed = bytearray(cipher.encrypt(bytes(12), b"hello", None))
    sealed[-1] ^= 1
    with pytest.raises(InvalidTag):
        cipher.decrypt_into(bytes(12), sealed, None, target)
    assert target == b"hello"


@pytest.mark.parametrize("step", [1, 100, RECORD_SIZE, 10**6])
def test_at_most_k_chunks_come_out_before_bad_chunk_k(step: int) -> None:
    plain = pattern(3 * CHUNK_SIZE + 10)
    message = _sealed(plain)
    for number in range(4):
        damaged = bytearray(message)
        damaged[56 + number * RECORD_SIZE] ^= 0x80
        out = refused(MessageOpener((KEY,), CONTEXT), cut(bytes(damaged), step), IntegrityError)
        assert len(out) <= number * CHUNK_SIZE
        assert plain.startswith(out)


def test_nothing_comes_out_before_the_commitment_was_compared() -> None:
    message = bytearray(_sealed(pattern(3 * CHUNK_SIZE)))
    message[30] ^= 1
    opener = MessageOpener((KEY,), CONTEXT)
    assert opener.update(message[:55]) == b""
    with pytest.raises(IntegrityError):
        opener.update(message[55:56])


@pytest.mark.parametrize("number", [0, 0xFE, 0xFF, 0x100, 0xFFFF, 0x10000, 2**32 - 1, 2**32, CHUNK_LIMIT - 2])
def test_the_nonce_is_base_xor_number(number: int) -> None:
    """Both ways against a cipher of our own, over byte boundaries no test could reach by writing."""
    sealer = MessageSealer(KEY, CONTEXT)
    head = bytes(sealer.update(b""))
    keys = derive_message_keys(KEY, head[:24], CONTEXT)
    sealer._number = number
    plain = pattern(CHUNK_SIZE + 5)
    sealed = sealer.update(plain) + sealer.finalize()
    expected = b""
    for index, piece in enumerate(cut(plain, CHUNK_SIZE)):
        nonce = (keys.base_nonce ^ (number + index)).to_bytes(12)
        expected += keys.aead.encrypt(nonce, piece, None)
    assert sealed == expected
    assert run(ChunkOpener(keys, first=number), [bytes(sealed)]) == plain
    refused(ChunkOpener(keys, first=number + 1), [bytes(sealed)], IntegrityError)


def test_the_last_chunk_number() -> None:
    """Number 2^38 - 1 may only be the last, shorter chunk; 2^38 is an error both ways."""
    sealer = MessageSealer(KEY, CONTEXT)
    head = bytes(sealer.update(b""))
    sealer._number = CHUNK_LIMIT - 1
    last = bytes(sealer.update(b"end")) + sealer.finalize()
    keys = derive_message_keys(KEY, head[:24], CONTEXT)
    assert run(ChunkOpener(keys, first=CHUNK_LIMIT - 1), [last]) == b"end"

    sealer = MessageSealer(KEY, CONTEXT)
    sealer._number = CHUNK_LIMIT - 1
    refused(sealer, [bytes(CHUNK_SIZE)], FormatError)

    sealer = MessageSealer(KEY, CONTEXT)
    sealer._number = CHUNK_LIMIT - 1
    refused(sealer, [bytes(2 * CHUNK_SIZE)], FormatError)

    nonce = (keys.base_nonce ^ CHUNK_LIMIT).to_bytes(12)
    for plain in (bytes(CHUNK_SIZE), b""):
        record = keys.aead.encrypt(nonce, plain, None)
        refused(ChunkOpener(keys, first=CHUNK_LIMIT), [record], FormatError)


@pytest.mark.parametrize("key", [b"", bytes(16), b"k" * 31, b"k" * 33, bytes(32)])
def test_keys_that_are_none(key: bytes) -> None:
    with pytest.raises(MisuseError):
        MessageSealer(key, CONTEXT)
    refused(MessageOpener((key,), CONTEXT), [_sealed(b"hello")], MisuseError)


def test_a_finished_stream_is_finished() -> None:
    sealer = MessageSealer(KEY, CONTEXT)
    message = bytes(sealer.update(b"hello")) + sealer.finalize()
    opener = MessageOpener((KEY,), CONTEXT)
    assert opener.update(message) + opener.finalize() == b"hello"
    for stream in (sealer, opener):
        with pytest.raises(MisuseError, match="finished"):
            stream.finalize()
        with pytest.raises(MisuseError, match="finished"):
            stream.update(b"more")


def test_a_stream_that_broke_stays_broken() -> None:
    """Whatever went wrong, half a chunk may be staged: going on could repeat a nonce."""
    sealer = MessageSealer(KEY, CONTEXT)
    with pytest.raises(TypeError):
        sealer.update("text")  # type: ignore[arg-type]
    with pytest.raises(MisuseError, match="failed earlier: TypeError"):
        sealer.finalize()


def test_staged_plaintext_is_wiped() -> None:
    sealer = MessageSealer(KEY, CONTEXT)
    sealer.update(b"secret")
    stage = sealer._stage
    assert bytes(stage).startswith(b"secret")
    sealer.finalize()
    assert not any(stage)


def test_pieces_may_be_any_buffer() -> None:
    message = _sealed(pattern(20_000))
    words = memoryview(bytearray(pattern(20_000))).cast("I")
    opener = MessageOpener((KEY,), CONTEXT)
    sealer = MessageSealer(KEY, CONTEXT)
    again = bytes(sealer.update(words)) + sealer.finalize()
    assert len(again) == len(message)
    assert run(opener, [again]) == pattern(20_000)


def test_output_belongs_to_the_caller() -> None:
    """No view of it is kept: it can be resized, and changing it changes nothing of what follows."""
    sealer = MessageSealer(KEY, CONTEXT)
    first = sealer.update(pattern(CHUNK_SIZE))
    kept = bytes(first)
    first.clear()
    rest = sealer.finalize()
    assert run(MessageOpener((KEY,), CONTEXT), [kept, rest]) == pattern(CHUNK_SIZE)


def test_memory_does_not_grow_with_the_message() -> None:
    sealer, opener = MessageSealer(KEY, CONTEXT), MessageOpener((KEY,), CONTEXT)
    piece = bytes(65536)
    tracemalloc.start()
    try:
        for _ in range(200):
            opener.update(sealer.update(piece))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1_000_000


def test_keys_do_not_show_themselves() -> None:
    keys = derive_message_keys(KEY, bytes(24), CONTEXT)
    assert str(keys.base_nonce) not in repr(keys)
    assert KEY.hex() not in repr(MessageSealer(KEY, CONTEXT))


def test_empty_input_is_truncated_input() -> None:
    refused(MessageOpener((KEY,), CONTEXT), [], TruncatedError)
    refused(MessageOpener((KEY,), CONTEXT), [_sealed(b"")[:-1]], TruncatedError)
