"""aws-chunked. The signed bodies are the examples of the S3 API reference, with its own signatures."""

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import refusals
from proxy.messages.sigv4 import Scope, signing_key
from proxy.profiles.s3.authentication import ChunkKey
from proxy.profiles.s3.aws_chunked import MAX_LINE, MAX_TRAILERS, AwsChunked
from proxy.refusals import Refusal, RefusedError

SCOPE = Scope("20130524", "us-east-1", "s3")
KEY = signing_key(b"wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", SCOPE)
DATE = "20130524T000000Z"
PLAIN = b"a" * 66560
NONE: frozenset[str] = frozenset()
CRC32C = frozenset({"x-amz-checksum-crc32c"})


def chunk(data: bytes, signature: str | None = None) -> bytes:
    extension = f";chunk-signature={signature}" if signature is not None else ""
    return f"{len(data):x}{extension}\r\n".encode() + data + (b"\r\n" if data else b"")


def key(seed: str) -> ChunkKey:
    return ChunkKey(key=KEY, amz_date=DATE, scope=SCOPE, seed=seed)


SIGNED = (
    chunk(PLAIN[:65536], "ad80c730a21e5b8d04586a2213dd63b9a0e99e0e2307b0ade35a65485a288648")
    + chunk(PLAIN[65536:], "0055627c9e194cb4542bae2aa5492e3c1575bbb81b612b7d234b86a503ef5497")
    + chunk(b"", "b6c6ea8a5354eaf15b3cb7646744f4275b71ea724fed81ceb9323e279d449df9")
    + b"\r\n"
)
SIGNED_KEY = key("4f232c4386841ef735655705268965c44a0e4690baa4adea153f7db9fa80a0a9")
TRAILER_SIGNATURE = b"d81f82fc3505edab99d459891051a732e8730629a2e4a59689829ca17fe2e435"
WITH_TRAILER = (
    chunk(PLAIN[:65536], "b474d8862b1487a5145d686f57f013e54db672cee1c953b3010fb58501ef5aa2")
    + chunk(PLAIN[65536:], "1c1344b170168f8e65b41376b44b20fe354e373826ccbbe2c1d40a8cae51e5c7")
    + chunk(b"", "2ca2aba2005185cf7159c6277faf83795951dd77a3a99e6e65d5c9f85863f992")
    + b"x-amz-checksum-crc32c:sOO8/Q==\r\nx-amz-trailer-signature:" + TRAILER_SIGNATURE + b"\r\n\r\n"
)  # fmt: skip
TRAILER_KEY = key("106e2a8a18243abcf37539882f36619c00e2dfc72633413f02d3b74544bfeb8e")


def decode(
    body: bytes,
    decoded_bytes: int,
    *,
    announced: frozenset[str] = NONE,
    by: ChunkKey | None = None,
    step: int = 1 << 20,
) -> tuple[bytes, dict[str, str]]:
    decoder = AwsChunked(decoded_bytes=decoded_bytes, announced=announced, key=by)
    made = b"".join(decoder.feed(body[at : at + step]) for at in range(0, len(body), step))
    return made + decoder.finish(), decoder.trailers


def refused(
    body: bytes, decoded_bytes: int, *, announced: frozenset[str] = NONE, by: ChunkKey | None = None
) -> Refusal:
    with pytest.raises(RefusedError) as caught:
        decode(body, decoded_bytes, announced=announced, by=by)
    return caught.value.refusal


@pytest.mark.parametrize("step", [1, 2, 85, 86, 16_384, 65_536, 1 << 20])
def test_the_documented_bodies(step: int) -> None:
    assert decode(SIGNED, 66560, by=SIGNED_KEY, step=step) == (PLAIN, {})
    made = decode(WITH_TRAILER, 66560, announced=CRC32C, by=TRAILER_KEY, step=step)
    assert made == (PLAIN, {"x-amz-checksum-crc32c": "sOO8/Q=="})


def test_the_references_own_line_feed_in_trailers() -> None:
    body = WITH_TRAILER.replace(b"sOO8/Q==\r\n", b"sOO8/Q==\n")
    assert decode(body, 66560, announced=CRC32C, by=TRAILER_KEY)[0] == PLAIN


@pytest.mark.parametrize("at", [100, 65_000, 65_900, 66_700])
def test_a_flipped_bit_is_found(at: int) -> None:
    body = bytearray(SIGNED)
    body[at] ^= 1
    assert refused(bytes(body), 66560, by=SIGNED_KEY) == refusals.SIGNATURE_MISMATCH


def test_a_bad_chunk_is_found_when_it_ends_and_nothing_is_taken_after() -> None:
    body = bytearray(SIGNED)
    body[50_000] ^= 1
    decoder = AwsChunked(decoded_bytes=66560, announced=NONE, key=SIGNED_KEY)
    with pytest.raises(RefusedError):
        decoder.feed(bytes(body[:65_700]))
    with pytest.raises(RefusedError):
        decoder.feed(b"x")
    with pytest.raises(RefusedError):
        decoder.finish()


def test_other_signatures_seeds_and_keys() -> None:
    other_seed = key("0" * 64)
    other_key = ChunkKey(key=bytes(32), amz_date=DATE, scope=SCOPE, seed=SIGNED_KEY.seed)
    for by in (other_seed, other_key, TRAILER_KEY):
        assert refused(SIGNED, 66560, by=by) == refusals.SIGNATURE_MISMATCH
    swapped = (
        chunk(PLAIN[65536:], "0055627c9e194cb4542bae2aa5492e3c1575bbb81b612b7d234b86a503ef5497") + SIGNED
    )
    assert refused(swapped, 67584, by=SIGNED_KEY) == refusals.SIGNATURE_MISMATCH


def test_trailers_are_what_was_signed() -> None:
    changed = WITH_TRAILER.replace(b"sOO8/Q==", b"sOO8/R==")
    assert refused(changed, 66560, announced=CRC32C, by=TRAILER_KEY) == refusals.SIGNATURE_MISMATCH
    unsigned = WITH_TRAILER.replace(b"x-amz-trailer-signature:" + TRAILER_SIGNATURE + b"\r\n", b"")
    assert refused(unsigned, 66560, announced=CRC32C, by=TRAILER_KEY) == refusals.SIGNATURE_MISMATCH


def test_signed_and_unsigned_are_not_taken_for_each_other() -> None:
    assert refused(SIGNED, 66560) == refusals.BAD_MESSAGE
    assert refused(b"1\r\na\r\n0\r\n\r\n", 1, by=SIGNED_KEY) == refusals.BAD_MESSAGE


SHORT = b"5\r\nhello\r\n6\r\n world\r\n0\r\nx-amz-checksum-crc32:DUoRhQ==\r\n\r\n"
CRC32 = frozenset({"x-amz-checksum-crc32"})


@pytest.mark.parametrize("step", [1, 3, 100])
def test_unsigned(step: int) -> None:
    made = decode(SHORT, 11, announced=CRC32, step=step)
    assert made == (b"hello world", {"x-amz-checksum-crc32": "DUoRhQ=="})
    assert decode(b"0\r\n\r\n", 0, step=step) == (b"", {})


@pytest.mark.parametrize(
    ("body", "decoded_bytes", "refusal"),
    [
        (SHORT, 10, refusals.BAD_LENGTH),
        (SHORT, 12, refusals.BAD_LENGTH),
        (SHORT, 0, refusals.BAD_LENGTH),
        (SHORT[:-2], 11, refusals.BAD_LENGTH),
        (SHORT[:20], 11, refusals.BAD_LENGTH),
        (b"", 0, refusals.BAD_LENGTH),
        (b"5\r\nhello\r\n", 5, refusals.BAD_LENGTH),
        (SHORT + b"x", 11, refusals.BAD_MESSAGE),
        (SHORT + SHORT, 22, refusals.BAD_MESSAGE),
        (b"5\r\nhelloX\r\n0\r\n\r\n", 5, refusals.BAD_MESSAGE),
        (b"5\nhello\r\n0\r\n\r\n", 5, refusals.BAD_MESSAGE),
        (b"-5\r\nhello\r\n0\r\n\r\n", 5, refusals.BAD_MESSAGE),
        (b"0x5\r\nhello\r\n0\r\n\r\n", 5, refusals.BAD_MESSAGE),
        (b" 5\r\nhello\r\n0\r\n\r\n", 5, refusals.BAD_MESSAGE),
        (b"5;ext=1\r\nhello\r\n0\r\n\r\n", 5, refusals.BAD_MESSAGE),
        (b"\r\nhello\r\n0\r\n\r\n", 5, refusals.BAD_MESSAGE),
        (b"ffffffffffffffff\r\nhello", 5, refusals.BAD_LENGTH),
        (b"1" * 17 + b"\r\nhello", 5, refusals.BAD_MESSAGE),
        (b"1" * (MAX_LINE + 1), 5, refusals.BAD_MESSAGE),
        (b"0\r\n\r\n", 0, refusals.INVALID_DIGEST),
        (b"0\r\nx-amz-checksum-crc32: a\r\nx-amz-checksum-crc32: a\r\n\r\n", 0, refusals.BAD_MESSAGE),
        (b"0\r\nx-amz-checksum-sha1: a\r\n\r\n", 0, refusals.INVALID_DIGEST),
        (b"0\r\nno trailer\r\n\r\n", 0, refusals.BAD_MESSAGE),
        (b"0\r\nx-amz-checksum-crc32: \xff\r\n\r\n", 0, refusals.BAD_MESSAGE),
        (b"0\r\nx-amz-checksum-crc32:a\r\nx-amz-trailer-signature:0\r\n\r\n", 0, refusals.BAD_MESSAGE),
    ],
)  # fmt: skip
def test_what_is_not_well_formed(body: bytes, decoded_bytes: int, refusal: Refusal) -> None:
    assert refused(body, decoded_bytes, announced=CRC32) == refusal


def test_values_of_trailers_are_without_the_blanks_around_them() -> None:
    body = chunk(b"abc") + b"0\r\nx-amz-checksum-crc32c: \t a b \t\r\n\r\n"
    assert decode(body, 3, announced=CRC32C) == (b"abc", {"x-amz-checksum-crc32c": "a b"})


def test_a_trailer_of_blanks_takes_no_longer_than_another() -> None:
    """Work that grows by their cube takes six seconds for each of these."""
    line = b"x-amz-checksum-crc32c:".ljust(MAX_LINE - 3) + b"\x01\r\n"
    for _ in range(50):
        with pytest.raises(RefusedError):
            decode(b"0\r\n" + line + b"\r\n", 0, announced=CRC32C)


def test_trailers_are_bounded() -> None:
    names = frozenset(f"x-amz-checksum-{number}" for number in range(MAX_TRAILERS + 1))
    body = b"0\r\n" + b"".join(name.encode() + b":a\r\n" for name in sorted(names)) + b"\r\n"
    assert refused(body, 0, announced=names) == refusals.BAD_MESSAGE


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=6), st.integers(1, 400))
def test_any_chunks_in_any_pieces(chunks: list[bytes], step: int) -> None:
    signature, body = "0" * 64, b""
    for data in [*chunks, b""]:
        text = "\n".join(
            ["AWS4-HMAC-SHA256-PAYLOAD", DATE, str(SCOPE), signature, hashlib.sha256().hexdigest(),
             hashlib.sha256(data).hexdigest()]
        )  # fmt: skip
        signature = hmac.new(KEY, text.encode(), "sha256").hexdigest()
        body += chunk(data, signature)
    plain = b"".join(chunks)
    assert decode(body + b"\r\n", len(plain), by=key("0" * 64), step=step) == (plain, {})


@given(st.binary(max_size=200), st.integers(0, 50))
def test_noise_is_refused_and_never_raises_anything_else(noise: bytes, decoded_bytes: int) -> None:
    decoder = AwsChunked(decoded_bytes=decoded_bytes, announced=NONE, key=None)
    try:
        made = decoder.feed(noise) + decoder.finish()
    except RefusedError:
        return
    assert len(made) == decoded_bytes
