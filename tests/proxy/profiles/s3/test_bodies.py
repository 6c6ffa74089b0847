"""What an upload has to match, by all the ways in which S3's clients say it."""

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest

from envelope.keys import NetworkService
from proxy import refusals
from proxy.messages.checksums import new_checksum
from proxy.messages.message import RequestHead, body_frame
from proxy.plans.request import Edits, Mode, Request, Route
from proxy.profiles.s3.authentication import Authenticated, Standing
from proxy.profiles.s3.bodies import Incoming, read_document, read_head
from proxy.refusals import Refusal, RefusedError
from proxy.tenants.model import LegacyPolicy, ServiceEntry, Upstream
from tests.proxy.profiles.s3.s3_signer import head
from tests.proxy.profiles.s3.test_aws_chunked import PLAIN, SIGNED, SIGNED_KEY, TRAILER_KEY, WITH_TRAILER

BODY = b"hello world"
UNSIGNED = "UNSIGNED-PAYLOAD"
TRAILED = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
LENGTH = "x-amz-decoded-content-length"
TRAILER = "x-amz-trailer"


def service() -> ServiceEntry:
    return ServiceEntry(
        owner=NetworkService("acme", "s3"),
        upstream=Upstream("https", "s3.example.com", 443),
        profile="s3",
        legacy=LegacyPolicy.STRICT,
        reverse_listen=None,
        certificate=None,
        key_file=Path("unused"),
    )


def request_of(head_: RequestHead) -> Request:
    return Request(
        head=head_,
        frame=body_frame(head_),
        edits=Edits(),
        route=Route(service=service(), mode=Mode.FORWARD),
        now_s=0,
    )


def incoming(
    payload: str = UNSIGNED,
    fields: Mapping[str, str] | None = None,
    *,
    target: str = "/b/k",
    authenticated: Authenticated | None = None,
) -> Incoming:
    named = dict(fields or {})
    if "content-length" not in named and "transfer-encoding" not in named:
        named["content-length"] = str(len(BODY))
    found = authenticated or Authenticated(standing=Standing.VERIFIED, payload=payload, chunks=SIGNED_KEY)
    return read_head(request_of(head("PUT", target, named)), found)


def accepts(upload: Incoming, body: bytes) -> bytes:
    assert upload.content.decoder is not None
    decoder = upload.content.decoder()
    return b"".join(decoder.feed(body[at : at + 7]) for at in range(0, len(body), 7)) + decoder.finish()


def refused(upload: Incoming, body: bytes) -> Refusal:
    with pytest.raises(RefusedError) as caught:
        accepts(upload, body)
    return caught.value.refusal


def value(algorithm: str, body: bytes = BODY) -> str:
    checksum = new_checksum(algorithm)
    checksum.update(body)
    return base64.b64encode(checksum.digest()).decode()


def chunked(body: bytes, trailers: str = "") -> bytes:
    return f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n" + trailers.encode() + b"\r\n"


def test_a_plain_body_needs_no_decoder() -> None:
    upload = incoming()
    assert (upload.content.plain_bytes, upload.content.decoder) == (11, None)


@pytest.mark.parametrize("algorithm", ["crc32", "crc32c", "crc64nvme", "sha1", "sha256"])
def test_every_checksum_in_a_header_the_query_and_a_trailer(algorithm: str) -> None:
    name = f"x-amz-checksum-{algorithm}"
    in_header = incoming(UNSIGNED, {name: value(algorithm)})
    in_query = incoming(target=f"/b/k?{name}={value(algorithm).replace('+', '%2B')}&x-id=PutObject")
    for upload in (in_header, in_query):
        assert accepts(upload, BODY) == BODY
        assert refused(upload, b"hello worle") == refusals.BAD_DIGEST
    trailed = incoming(TRAILED, {LENGTH: "11", TRAILER: name})
    assert trailed.content.plain_bytes == 11
    good = chunked(BODY, f"{name}:{value(algorithm)}\r\n")
    assert accepts(trailed, good) == BODY
    assert refused(trailed, good.replace(b"world", b"worle")) == refusals.BAD_DIGEST
    for upload in (in_header, trailed):
        assert name in upload.edits.drop or upload is trailed


def test_content_md5_and_the_signed_hash() -> None:
    upload = incoming(UNSIGNED, {"content-md5": value("md5")})
    assert accepts(upload, BODY) == BODY
    assert refused(upload, b"x" * 11) == refusals.BAD_DIGEST
    upload = incoming(hashlib.sha256(BODY).hexdigest())
    assert accepts(upload, BODY) == BODY
    assert refused(upload, b"x" * 11) == refusals.PAYLOAD_MISMATCH


def test_signed_chunks() -> None:
    coded = {LENGTH: "66560", "content-encoding": "aws-chunked"}
    upload = incoming("STREAMING-AWS4-HMAC-SHA256-PAYLOAD", coded)
    assert accepts(upload, SIGNED) == PLAIN
    assert "content-encoding" in upload.edits.drop
    trailed = incoming(
        fields={**coded, TRAILER: "x-amz-checksum-crc32c"},
        authenticated=Authenticated(
            standing=Standing.VERIFIED,
            payload="STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER",
            chunks=TRAILER_KEY,
        ),
    )
    assert accepts(trailed, WITH_TRAILER) == PLAIN


def test_only_the_one_token_of_content_encoding_goes() -> None:
    upload = incoming(TRAILED, {"content-encoding": "gzip,aws-chunked", LENGTH: "11"})
    assert ("content-encoding", "gzip") in upload.edits.put
    plain = incoming(UNSIGNED, {"content-encoding": "gzip"})
    assert "content-encoding" not in plain.edits.drop
    assert plain.edits.put == ()


def test_the_token_alone_means_coded() -> None:
    upload = incoming(UNSIGNED, {"content-encoding": "aws-chunked", LENGTH: "11"})
    assert accepts(upload, chunked(BODY)) == BODY
    upload = incoming(UNSIGNED, {LENGTH: "11"})
    assert accepts(upload, chunked(BODY)) == BODY


@pytest.mark.parametrize(
    ("payload", "fields", "refusal"),
    [
        (UNSIGNED, {"transfer-encoding": "chunked"}, refusals.LENGTH_REQUIRED),
        (TRAILED, {}, refusals.LENGTH_REQUIRED),
        (UNSIGNED, {"content-encoding": "aws-chunked"}, refusals.LENGTH_REQUIRED),
        (TRAILED, {LENGTH: "x"}, refusals.BAD_MESSAGE),
        (TRAILED, {LENGTH: "9" * 19}, refusals.BAD_MESSAGE),
        ("STREAMING-SOMETHING-NEW", {LENGTH: "1"}, refusals.UNKNOWN_ROUTE),
        (
            "STREAMING-AWS4-ECDSA-P256-SHA256-PAYLOAD",
            {LENGTH: "1"},
            refusals.SIGNATURE_VERSION,
        ),
        ("0" * 64, {LENGTH: "1"}, refusals.BAD_MESSAGE),
        ("nonsense", {}, refusals.AUTHORIZATION_MALFORMED),
        (UNSIGNED, {"content-md5": "x"}, refusals.INVALID_DIGEST),
        (UNSIGNED, {"content-md5": "AAAA"}, refusals.INVALID_DIGEST),
        (UNSIGNED, {"x-amz-checksum-crc32": "AAAAAAAA"}, refusals.INVALID_DIGEST),
        (UNSIGNED, {"x-amz-checksum-xxhash64": "AAAA"}, refusals.UNKNOWN_ROUTE),
        (
            TRAILED,
            {LENGTH: "1", TRAILER: "x-amz-meta-secret"},
            refusals.UNKNOWN_ROUTE,
        ),
        (
            UNSIGNED,
            {LENGTH: "1", TRAILER: "x-amz-checksum-crc32"},
            refusals.BAD_MESSAGE,
        ),
        (
            TRAILED,
            {
                LENGTH: "1",
                TRAILER: "x-amz-checksum-crc32,x-amz-checksum-crc32",
            },
            refusals.BAD_MESSAGE,
        ),
    ],
)
def test_heads_that_cannot_be_served(payload: str, fields: dict[str, str], refusal: Refusal) -> None:
    with pytest.raises(RefusedError) as caught:
        incoming(payload, fields)
    assert caught.value.refusal == refusal


def test_signed_chunks_of_whom_we_cannot_verify() -> None:
    unjudged = Authenticated(standing=Standing.UNJUDGED, payload="STREAMING-AWS4-HMAC-SHA256-PAYLOAD")
    with pytest.raises(RefusedError) as caught:
        incoming(fields={LENGTH: "1"}, authenticated=unjudged)
    assert caught.value.refusal == refusals.CANNOT_SIGN


def test_documents() -> None:
    sha = hashlib.sha256(BODY).hexdigest()
    verified = Authenticated(standing=Standing.VERIFIED, payload=sha)
    fields = head(
        "POST", "/b?delete", {"content-md5": value("md5"), "x-amz-checksum-crc32": value("crc32")}
    ).fields
    assert read_document(verified, fields, BODY) == BODY
    for wrong in (b"", b"hello worle"):
        with pytest.raises(RefusedError):
            read_document(verified, fields, wrong)
    trailed = Authenticated(standing=Standing.VERIFIED, payload=TRAILED)
    fields = head("POST", "/b?delete", {"x-amz-decoded-content-length": "11"}).fields
    assert read_document(trailed, fields, chunked(BODY)) == BODY
