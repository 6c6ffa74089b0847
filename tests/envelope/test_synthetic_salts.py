"""Salts made of the content (docs/format.md 2.4): the same again is the same message, all else another."""

import hashlib
import hmac
import os
from collections.abc import Callable

import pytest

from envelope.cobblestone import SALT_SIZE, MessageSealer
from envelope.errors import MisuseError
from envelope.keys import KeyId, NetworkService
from envelope.multipart import Manifest, Part, open_ending, part_sealer, seal_ending
from envelope.objects import CHUNK_SIZE, Bind, Opener, Sealer, sealed_length
from tests.envelope.samples import KEY_ID, OBJECT_KEY, OWNER

REF = bytes(range(16))
EDGES = (0, 1, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 3 * CHUNK_SIZE + 7)


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def part(plain: bytes, *, upload: bytes = REF, number: int = 1, key: bytes = OBJECT_KEY) -> bytes:
    sealer = part_sealer(key, OWNER, KEY_ID, upload=upload, number=number, content_sha256=sha256(plain))
    return bytes(sealer.update(plain)) + sealer.finalize()


def salt_of(stored: bytes) -> bytes:
    return stored[32 : 32 + SALT_SIZE]


@pytest.mark.parametrize("size", EDGES)
def test_the_same_content_gives_the_same_message_that_any_reader_opens(size: int) -> None:
    plain = os.urandom(size)
    first, again = part(plain), part(plain)
    assert first == again
    assert len(first) == sealed_length(size)
    opener = Opener(OWNER, lambda _header: OBJECT_KEY, bind=Bind.PART, name=REF + (1).to_bytes(4))
    assert bytes(opener.update(first)) + opener.finalize() == plain


def test_whatever_differs_gives_another_salt() -> None:
    plain = b"content"
    salts = {
        salt_of(stored)
        for stored in (
            part(plain),
            part(b"Content"),
            part(plain + b"\0"),
            part(b""),
            part(plain, number=2),
            part(plain, upload=bytes(16)),
            part(plain, key=bytes(31) + b"k"),
        )
    }
    sealer = Sealer(OBJECT_KEY, OWNER, KEY_ID, content_sha256=sha256(plain))
    salts.add(salt_of(bytes(sealer.update(plain)) + sealer.finalize()))
    other = Sealer(OBJECT_KEY, OWNER, KeyId(bytes(15) + b"k"), content_sha256=sha256(plain))
    salts.add(salt_of(bytes(other.update(plain)) + other.finalize()))
    elsewhere = Sealer(OBJECT_KEY, NetworkService("t", "s"), KEY_ID, content_sha256=sha256(plain))
    salts.add(salt_of(bytes(elsewhere.update(plain)) + elsewhere.finalize()))
    assert len(salts) == 10


def test_the_salt_is_what_the_format_says() -> None:
    """HKDF-Expand of one block is one HMAC (RFC 5869 2.3)."""
    context, digest = b"context", sha256(b"content")
    info = b"sealgate/v1 synthetic salt\0" + digest + context
    made = hmac.digest(OBJECT_KEY, info + b"\x01", "sha512")[:SALT_SIZE]
    sealer = MessageSealer(OBJECT_KEY, context, content_sha256=digest)
    assert bytes(sealer.update(b"content") + sealer.finalize())[:SALT_SIZE] == made


@pytest.mark.parametrize("size", EDGES)
def test_what_is_not_the_content_gets_no_last_record(size: int) -> None:
    """Nothing that was sealed by mistake opens."""
    said = os.urandom(size)
    for wrong in (said + b"\0", said[:-1] + bytes([said[-1] ^ 1]) if said else b"?"):
        sealer = part_sealer(OBJECT_KEY, OWNER, KEY_ID, upload=REF, number=1, content_sha256=sha256(said))
        sealer.update(wrong)
        with pytest.raises(MisuseError):
            sealer.finalize()
        with pytest.raises(MisuseError):
            sealer.finalize()


@pytest.mark.parametrize("step", [1, CHUNK_SIZE - 1, CHUNK_SIZE + 1])
def test_pieces_do_not_matter(step: int) -> None:
    plain = os.urandom(CHUNK_SIZE + 100)
    sealer = part_sealer(OBJECT_KEY, OWNER, KEY_ID, upload=REF, number=1, content_sha256=sha256(plain))
    made = b"".join(bytes(sealer.update(plain[at : at + step])) for at in range(0, len(plain), step))
    assert made + sealer.finalize() == part(plain)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MessageSealer(OBJECT_KEY, b"", content_sha256=bytes(31)),
        lambda: MessageSealer(OBJECT_KEY, b"", content_sha256=b""),
        lambda: MessageSealer(bytes(32), b"", content_sha256=bytes(32)),
        lambda: MessageSealer(bytes(31), b"", content_sha256=bytes(32)),
    ],
    ids=["short digest", "no digest", "wiped key", "short key"],
)
def test_no_other_digest_and_no_wiped_key(make: Callable[[], object]) -> None:
    with pytest.raises(MisuseError):
        make()


def test_an_ending_can_be_made_again() -> None:
    manifest = Manifest(REF, (Part(1, sealed_length(5), bytes(32)), Part(2, sealed_length(0), bytes(32))))
    first, again = (seal_ending(OBJECT_KEY, OWNER, KEY_ID, manifest, is_synthetic=True) for _ in range(2))
    fresh = seal_ending(OBJECT_KEY, OWNER, KEY_ID, manifest)
    assert first == again
    assert salt_of(first) != salt_of(fresh)
    stored_bytes = manifest.parts_bytes + len(first)
    opened = open_ending(OWNER, lambda _header: OBJECT_KEY, first, stored_bytes=stored_bytes)
    assert opened.manifest == manifest
