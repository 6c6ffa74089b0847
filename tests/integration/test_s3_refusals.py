"""What is refused of S3's clients before anything is forwarded, and bodies that are not what was signed.

Against moto, which accepts whatever reaches it: what was refused, we have refused; what is not stored, was
not sent to its end.
"""

import hashlib
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from envelope.objects import MAGIC
from proxy.messages.message import RequestHead
from proxy.vault.model import Secrets, UpstreamCredential
from tests.integration.proxy_rig import Answer
from tests.integration.s3_rig import Site, body, credential, leaks, s3_site
from tests.proxy.profiles.s3 import s3_signer
from tests.referees.moto import moto

BUCKET = "bucket-1"
PLAIN = body(150_000, 1)
FIELDS = ("Content-Type: application/octet-stream", "Expect:")


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    """With a client's key that only the vault knows, and a bucket."""

    def vault(_referee: object) -> Mapping[str, UpstreamCredential]:
        secrets = Secrets(client_secret=s3_signer.SECRET)
        return {s3_signer.ACCESS_KEY: credential(s3_signer.ACCESS_KEY, secrets)}

    async with s3_site(tmp_path, moto, credentials=vault, options={"unknown_keys": "refuse"}) as site:
        made = await site.calls([["create_bucket", {"Bucket": BUCKET}]])
        assert made[0]["status"] == 200
        yield site


def sign(site: Site, method: str, target: str, **more: object) -> RequestHead:
    more.setdefault("now_s", time.time())
    return s3_signer.sign(method, target, host=f"localhost:{site.referee.port}", **more)  # type: ignore[arg-type]


async def send(
    site: Site, request: RequestHead, sent: bytes | None = None, *fields: str, mode: str = "forward"
) -> Answer:
    """*request* by curl, as it was signed."""
    own = [
        f"{name}: {value}" for name in request.fields if name != "host" for value in request.fields.all(name)
    ]
    arguments = ["--http1.1", "--path-as-is", "-X", request.method]
    for field in (*own, *FIELDS, *fields):
        arguments += ["-H", field]
    if sent is not None:
        arguments += ["--data-binary", "@-"]
    return await site.rig.ask(site.service, request.target, *arguments, mode=mode, body=sent)


async def names(site: Site) -> set[str]:
    return {name for name, _ in await site.stored()}


def refused(site: Site, answer: Answer, status: int, code: str, ours: str) -> None:
    assert (answer.status, answer.code) == (status, ours), answer
    assert f"<Code>{code}</Code>".encode() in answer.body
    assert s3_signer.SECRET.encode() not in answer.body
    assert any(f'"outcome":"{ours}"' in line for line in site.rig.audit_lines())


async def test_a_request_that_its_access_key_has_not_signed_goes_nowhere(site: Site) -> None:
    now_s = time.time()
    target = f"/{BUCKET}/key"
    sha = hashlib.sha256(PLAIN).hexdigest()
    good = sign(site, "PUT", target, body_hash=sha)
    wrong = sign(site, "PUT", target, body_hash=sha, secret="another-secret-altogether")
    refused(site, await send(site, wrong, PLAIN), 403, "SignatureDoesNotMatch", "signature-mismatch")
    moved = replace(good, target=f"/{BUCKET}/other")
    refused(site, await send(site, moved, PLAIN), 403, "SignatureDoesNotMatch", "signature-mismatch")
    other = sign(site, "PUT", target, body_hash=sha, access_key="AKIDNOBODY")
    refused(site, await send(site, other, PLAIN), 403, "InvalidAccessKeyId", "access-key-unknown")
    old = sign(site, "PUT", target, body_hash=sha, now_s=now_s - 400)
    refused(site, await send(site, old, PLAIN), 403, "RequestTimeTooSkewed", "request-time-skewed")
    early = sign(site, "PUT", target, body_hash=sha, now_s=now_s + 400)
    refused(site, await send(site, early, PLAIN), 403, "RequestTimeTooSkewed", "request-time-skewed")
    more = await send(site, good, PLAIN, "x-amz-acl: public-read")
    refused(site, more, 403, "AccessDenied", "headers-not-signed")
    v2 = s3_signer.head("PUT", target, {"authorization": "AWS AKID:c2lnbmF0dXJl"})
    refused(site, await send(site, v2, PLAIN), 400, "InvalidRequest", "signature-version")
    presigned = s3_signer.presign("PUT", target, now_s=now_s - 100, host=f"localhost:{site.referee.port}")
    refused(site, await send(site, presigned, PLAIN), 403, "AccessDenied", "signature-expired")
    for method, where in (("GET", target), ("DELETE", f"/{BUCKET}"), ("GET", f"/{BUCKET}?list-type=2")):
        answer = await send(site, sign(site, method, where, secret="another-secret-altogether"))
        refused(site, answer, 403, "SignatureDoesNotMatch", "signature-mismatch")
    assert await names(site) == set()
    # The same with the right secret does what it says.
    assert (await send(site, good, PLAIN)).status == 200
    assert await names(site) == {f"{BUCKET}/key"}


async def test_a_body_that_is_not_the_one_that_was_signed_is_not_stored(site: Site) -> None:
    target = f"/{BUCKET}/key"
    request = sign(site, "PUT", target, body_hash=hashlib.sha256(PLAIN).hexdigest())
    refused(
        site,
        await send(site, request, PLAIN[:-1] + b"x"),
        400,
        "XAmzContentSHA256Mismatch",
        "payload-mismatch",
    )
    md5 = sign(site, "PUT", target, body_hash="UNSIGNED-PAYLOAD", headers={"content-md5": "A" * 22 + "=="})
    refused(site, await send(site, md5, PLAIN), 400, "BadDigest", "bad-digest")
    bad = sign(site, "PUT", target, body_hash="UNSIGNED-PAYLOAD", headers={"x-amz-checksum-crc32c": "AAAA"})
    refused(site, await send(site, bad, PLAIN), 400, "InvalidDigest", "invalid-digest")
    chunked = sign(site, "PUT", target, body_hash="UNSIGNED-PAYLOAD")
    answer = await send(site, chunked, PLAIN, "Transfer-Encoding: chunked")
    refused(site, answer, 411, "MissingContentLength", "length-required")
    assert await names(site) == set()


def framed(site: Site, request: RequestHead, *, flip: int | None = None, stop: int | None = None) -> bytes:
    """PLAIN in signed chunks of 64 KiB. *flip*: change this chunk; *stop*: leave out from this one."""
    authorization = request.fields.first("authorization") or ""
    date = request.fields.first("x-amz-date") or ""
    before = authorization.rpartition("Signature=")[2]
    key = s3_signer.derive(s3_signer.SECRET, date[:8])
    made = b""
    pieces = [PLAIN[at : at + 65536] for at in range(0, len(PLAIN), 65536)]
    for number, piece in enumerate([*pieces, b""]):
        if number == stop:
            return made
        before = s3_signer.chunk_signature(key, date, before, piece)
        sent = bytes([piece[0] ^ 1]) + piece[1:] if number == flip else piece
        made += f"{len(piece):x};chunk-signature={before}\r\n".encode() + sent + b"\r\n"
    return made


async def test_chunks_are_verified_before_the_end_goes_up(site: Site) -> None:
    streaming = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"

    def request(key: str, decoded: int = len(PLAIN)) -> RequestHead:
        return sign(
            site, "PUT", f"/{BUCKET}/{key}", body_hash=streaming,
            headers={"x-amz-decoded-content-length": str(decoded), "content-encoding": "aws-chunked"},
        )  # fmt: skip

    for flip in (0, 1, 2):
        bad = request("flipped")
        answer = await send(site, bad, framed(site, bad, flip=flip))
        refused(site, answer, 403, "SignatureDoesNotMatch", "signature-mismatch")
    for stop in (1, 3):
        bad = request("cut")
        answer = await send(site, bad, framed(site, bad, stop=stop))
        refused(site, answer, 400, "IncompleteBody", "bad-length")
    for decoded in (0, 1, len(PLAIN) - 1, len(PLAIN) + 1, 1 << 40):
        bad = request("lie", decoded)
        answer = await send(site, bad, framed(site, bad))
        refused(site, answer, 400, "IncompleteBody", "bad-length")
    assert await names(site) == set()
    good = request("good")
    answer = await send(site, good, framed(site, good))
    assert answer.status == 200, answer
    ((name, stored),) = await site.stored()
    assert name == f"{BUCKET}/good"
    assert stored.startswith(MAGIC)
    assert site.open(stored) == PLAIN
    assert not leaks(PLAIN, stored)
    read = await send(site, sign(site, "GET", f"/{BUCKET}/good"), mode="forward")
    assert (read.status, read.body) == (200, PLAIN)
    assert "content-encoding" not in read.headers


async def test_what_is_not_in_the_table_of_operations_goes_nowhere(site: Site) -> None:
    for method, target in (
        ("POST", f"/{BUCKET}/key"),
        ("PUT", f"/{BUCKET}/key?append&position=0"),
        ("POST", f"/{BUCKET}/key?select&select-type=2"),
        ("PUT", f"/{BUCKET}/key?unheard-of"),
        ("PATCH", f"/{BUCKET}/key"),
        ("GET", f"/{BUCKET}/key?torrent"),
    ):
        sent = PLAIN if method != "GET" else None
        answer = await send(site, sign(site, method, target, body_hash="UNSIGNED-PAYLOAD"), sent)
        refused(site, answer, 501, "NotImplemented", "unknown-route")
    head = sign(
        site, "PUT", f"/{BUCKET}/key", body_hash="UNSIGNED-PAYLOAD",
        headers={"x-amz-write-offset-bytes": "10"},
    )  # fmt: skip
    refused(site, await send(site, head, PLAIN), 501, "NotImplemented", "unknown-route")
    # A body where the operation has none.
    answer = await send(site, sign(site, "DELETE", f"/{BUCKET}/key", body_hash="UNSIGNED-PAYLOAD"), PLAIN)
    refused(site, answer, 501, "NotImplemented", "unknown-route")
    assert await names(site) == set()


async def test_a_document_is_bounded_and_checked(site: Site) -> None:
    tags = b"<Tagging><TagSet><Tag><Key>a</Key><Value>b</Value></Tag></TagSet></Tagging>"
    sha = hashlib.sha256(tags).hexdigest()
    good = sign(site, "PUT", f"/{BUCKET}?tagging", body_hash=sha)
    refused(site, await send(site, good, tags + b" "), 400, "XAmzContentSHA256Mismatch", "payload-mismatch")
    huge = sign(site, "PUT", f"/{BUCKET}?tagging", body_hash="UNSIGNED-PAYLOAD")
    refused(site, await send(site, huge, bytes(4 << 20)), 413, "EntityTooLarge", "too-large")
    assert (await send(site, good, tags)).status in (200, 204)
    read = await send(site, sign(site, "GET", f"/{BUCKET}?tagging"))
    assert b"<Key>a</Key>" in read.body


async def test_header_bombs_are_refused(site: Site) -> None:
    many = {f"x-amz-meta-{number}": "v" * 1000 for number in range(200)}
    answer = await send(
        site, sign(site, "PUT", f"/{BUCKET}/key", body_hash="UNSIGNED-PAYLOAD", headers=many), PLAIN
    )
    assert answer.status in (0, 400, 403, 413, 431)
    assert await names(site) == set()
