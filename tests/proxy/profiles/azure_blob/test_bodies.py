"""What a body has to match: checksums of plaintext, as Azure's clients write them."""

import base64
import hashlib

import pytest

from proxy import refusals
from proxy.messages.checksums import new_checksum
from proxy.messages.message import BodyFrame, ExpectedDigest, Fields, Framing
from proxy.profiles.azure_blob.bodies import CheckedCrc64, Checksums, plain_length_of
from proxy.refusals import RefusedError

BODY = bytes(range(256)) * 100


def crc64(body: bytes) -> bytes:
    checksum = new_checksum("crc64nvme")
    checksum.update(body)
    return checksum.digest()[::-1]


def fields(**given: bytes) -> Fields:
    names = {"md5": b"Content-MD5", "crc64": b"x-ms-content-crc64"}
    return Fields([(names[name], base64.b64encode(value)) for name, value in given.items()])


def md5(body: bytes) -> bytes:
    return hashlib.md5(body, usedforsecurity=False).digest()


def test_the_crc_is_azures() -> None:
    """CRC-64/NVME of "123456789" is AE8B14860A799888 (its catalogue); Azure writes the lowest byte first."""
    assert crc64(b"123456789").hex() == "8898790a86148bae"


def test_what_is_said_of_a_body() -> None:
    nothing = Checksums.of(Fields([]))
    assert (nothing.digests, nothing.decoder, nothing.named) == ((), None, ())
    nothing.check(BODY)
    both = Checksums.of(fields(md5=md5(BODY), crc64=crc64(BODY)))
    assert both.digests == (ExpectedDigest(algorithm="md5", value=md5(BODY)),)
    assert [name for name, _ in both.named] == ["content-md5", "x-ms-content-crc64"]
    both.check(BODY)


def test_what_does_not_match() -> None:
    for given, refusal in (
        ({"md5": md5(b"x")}, refusals.BAD_DIGEST),
        ({"crc64": crc64(b"x")}, refusals.BAD_CHECKSUM),
    ):
        with pytest.raises(RefusedError) as caught:
            Checksums.of(fields(**given)).check(BODY)
        assert caught.value.refusal == refusal


def test_a_crc_is_compared_at_the_end_of_a_stream() -> None:
    checked = CheckedCrc64(crc64(BODY))
    assert b"".join(checked.feed(BODY[at : at + 1000]) for at in range(0, len(BODY), 1000)) == BODY
    assert checked.finish() == b""
    checked = CheckedCrc64(crc64(BODY))
    checked.feed(BODY[:-1])
    with pytest.raises(RefusedError):
        checked.finish()


@pytest.mark.parametrize(
    "raw",
    [
        [(b"content-md5", b"x")],
        [(b"content-md5", b"")],
        [(b"content-md5", base64.b64encode(bytes(8)))],
        [(b"x-ms-content-crc64", base64.b64encode(bytes(16)))],
        [(b"content-md5", base64.b64encode(bytes(16)))] * 2,
    ],
)
def test_what_is_no_checksum(raw: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(RefusedError) as caught:
        Checksums.of(Fields(raw))
    assert caught.value.refusal == refusals.INVALID_DIGEST


def test_lengths() -> None:
    assert plain_length_of(BodyFrame(framing=Framing.NONE)) == 0
    assert plain_length_of(BodyFrame(framing=Framing.LENGTH, length_bytes=7)) == 7
    for framing in (Framing.CHUNKED, Framing.STREAM):
        with pytest.raises(RefusedError) as caught:
            plain_length_of(BodyFrame(framing=framing))
        assert caught.value.refusal == refusals.LENGTH_REQUIRED
