"""CRC-32C and MD5 of uploads: read in three places, computed, compared, named."""

import base64
import hashlib
import json

import pytest

from proxy import refusals
from proxy.messages.message import Fields
from proxy.profiles.gcs.digests import Digests, Tally
from proxy.profiles.json_rewriting import JsonObject
from proxy.refusals import Refusal, RefusedError

CRC = base64.b64encode(bytes.fromhex("e3069283")).decode()  # of 123456789, RFC 3720
MD5_RAW = hashlib.md5(b"123456789", usedforsecurity=False).digest()
MD5 = base64.b64encode(MD5_RAW).decode()


def fields(*pairs: tuple[str, str]) -> Fields:
    return Fields([(name.encode(), value.encode()) for name, value in pairs])


def refused(*pairs: tuple[str, str]) -> Refusal:
    with pytest.raises(RefusedError) as caught:
        Digests.of_fields(fields(*pairs))
    return caught.value.refusal


def test_header_fields() -> None:
    assert Digests.of_fields(fields()) == Digests()
    both = Digests(crc32c=bytes.fromhex("e3069283"), md5=MD5_RAW)
    assert Digests.of_fields(fields(("x-goog-hash", f"crc32c={CRC}, md5={MD5}"))) == both
    assert Digests.of_fields(fields(("x-goog-hash", f"crc32c={CRC}"), ("x-goog-hash", f"md5={MD5}"))) == both
    assert Digests.of_fields(fields(("x-goog-hash", f"crc32c={CRC},"), ("content-md5", MD5))) == both
    assert Digests.of_fields(fields(("content-md5", MD5)), body=False) == Digests()


def test_what_is_no_digest() -> None:
    for value in (
        f"sha1={CRC}",
        f"crc32c={MD5}",
        "crc32c=",
        "crc32c",
        f"crc32c={CRC}x",
        "md5=AAAA",
        f"CRC32C={CRC}",
    ):
        assert refused(("x-goog-hash", value)) is refusals.INVALID_DIGEST, value
    assert refused(("x-goog-hash", f"crc32c={CRC},crc32c=AAAAAA==")) is refusals.BAD_DIGEST
    assert (
        refused(("x-goog-hash", f"md5={MD5}"), ("content-md5", "AAAAAAAAAAAAAAAAAAAAAA=="))
        is refusals.BAD_DIGEST
    )


def test_metadata() -> None:
    document = json.dumps({"crc32c": CRC, "md5Hash": MD5, "name": "o"})
    assert Digests.of_resource(JsonObject(document)).in_resource() == {"crc32c": CRC, "md5Hash": MD5}
    assert Digests.of_resource(JsonObject('{"crc32c": null, "md5Hash": ""}')) == Digests()
    for wrong in ('{"crc32c": 5}', '{"crc32c": "x"}', '{"md5Hash": ["a"]}', '{"md5Hash": "AAAA"}'):
        with pytest.raises(RefusedError) as caught:
            Digests.of_resource(JsonObject(wrong))
        assert caught.value.refusal is refusals.INVALID_DIGEST


@pytest.mark.parametrize("step", [1, 4, 9])
def test_content_that_passes_is_compared_at_its_end(step: int) -> None:
    said = Digests(crc32c=bytes.fromhex("e3069283"), md5=MD5_RAW)
    for tally in (Tally(), Tally(said), Tally(Digests(md5=MD5_RAW), said)):
        made = b"".join(tally.feed(b"123456789"[at : at + step]) for at in range(0, 9, step)) + tally.finish()
        assert made == b"123456789"
        assert tally.uploaded.digests == said
        assert tally.uploaded.plain_bytes == 9
    for wrong in (Digests(crc32c=bytes(4)), Digests(md5=bytes(16))):
        tally = Tally(said, wrong)
        tally.feed(b"123456789")
        with pytest.raises(RefusedError) as caught:
            tally.finish()
        assert caught.value.refusal is refusals.BAD_DIGEST


def test_what_is_not_known_is_not_compared() -> None:
    Digests().check(Digests(md5=bytes(16)))
    Digests(md5=MD5_RAW).check(Digests())
