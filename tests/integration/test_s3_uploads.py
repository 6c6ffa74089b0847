"""Uploads in parts across proxies, restarts and failures: nothing is lost, nothing half is an object.

Real Swift where it can show the case; a scripted S3 where a service has to fail on purpose.
"""

import asyncio
import base64
import contextlib
import os
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests import pki
from tests.integration.boto3_program import boto3, text
from tests.integration.proxy_rig import proxy
from tests.integration.s3_site import HOST, Site, Way, provisioned, site
from tests.ports import free_port
from tests.referees.moto import Moto

MIB = 1024 * 1024


async def begun(way: Way, *, bucket: bool = True) -> str:
    make = "s3.create_bucket(Bucket='bucket')\n" if bucket else ""
    code = make + "out = s3.create_multipart_upload(Bucket='bucket', Key='key')['UploadId']"
    return str(await boto3(way, code))


async def content(way: Way) -> bytes:
    code = "out = base64.b64encode(s3.get_object(Bucket='bucket', Key='key')['Body'].read()).decode()"
    return base64.b64decode(await boto3(way, code))


async def test_an_upload_goes_on_at_another_proxy_and_after_a_restart(tmp_path: Path) -> None:
    """Parts through one proxy, which then is gone; the rest, the list and the end through another."""
    first, last = os.urandom(5 * MIB), os.urandom(70_000)
    async with site(tmp_path, "swift") as one:
        way = one.ways["reverse"]
        upload = await begun(way)
        code = "out = [part(2, given['last']), part(1, given['first'])]"
        tags = await boto3(way, code, upload=upload, first=text(first), last=text(last))
        await one.rig.engine.stop(grace_s=0)
        (tmp_path / "two").mkdir()
        async with proxy(tmp_path / "two", one.ca_file, database_dir=tmp_path / "uploads") as rig:
            two = await provisioned(rig, one.server, one.ca_file, like=one)
            code = """
listed = s3.list_parts(Bucket='bucket', Key='key', UploadId=given['upload'])['Parts']
done = complete([(p['PartNumber'], p['ETag']) for p in listed])
out = [[(p['PartNumber'], p['Size'], p['ETag']) for p in listed], done]
"""
            listed, _etag = await boto3(two.ways["forward"], code, upload=upload)
            assert listed == [[1, len(first), tags[1]], [2, len(last), tags[0]]]
            assert await content(two.ways["reverse"]) == first + last
            direct = await content(two.ways["direct"])
            assert two.opened(direct) == first + last


async def test_a_proxy_that_does_not_share_the_database_completes_nothing(tmp_path: Path) -> None:
    first = os.urandom(5 * MIB)
    async with site(tmp_path, "swift") as one:
        upload = await begun(one.ways["reverse"])
        tag = await boto3(
            one.ways["reverse"], "out = part(1, given['first'])", upload=upload, first=text(first)
        )
        await one.rig.engine.stop(grace_s=0)  # a process has one engine
        (tmp_path / "two").mkdir()
        async with proxy(tmp_path / "two", one.ca_file) as rig:
            two = await provisioned(rig, one.server, one.ca_file, like=one)
            code = "out = told(lambda: complete([(1, given['tag'])]))"
            answer = await boto3(two.ways["reverse"], code, upload=upload, tag=tag)
            assert answer == [400, "InvalidPart", "part-unknown"]
        (tmp_path / "three").mkdir()
        async with proxy(tmp_path / "three", one.ca_file, database_dir=tmp_path / "uploads") as rig:
            three = await provisioned(rig, one.server, one.ca_file, like=one)
            done = await boto3(
                three.ways["reverse"], "out = complete([(1, given['tag'])])", upload=upload, tag=tag
            )
            assert done.strip('"').endswith("-2")
            assert await content(three.ways["reverse"]) == first


async def test_what_was_uploaded_in_the_clear_cannot_be_completed_through_the_proxy(tmp_path: Path) -> None:
    """A part that went round the proxy is in no manifest: plaintext never becomes part of a sealed object."""
    async with site(tmp_path, "swift") as place:
        upload = await begun(place.ways["direct"])
        tag = await boto3(
            place.ways["direct"], "out = part(1, given['p'])", upload=upload, p=text(b"x" * 5 * MIB)
        )
        code = "out = told(lambda: complete([(1, given['tag'])]))"
        answer = await boto3(place.ways["reverse"], code, upload=upload, tag=tag)
        assert answer == [400, "InvalidPart", "part-unknown"]
        gone = await boto3(
            place.ways["reverse"], "out = told(lambda: s3.head_object(Bucket='bucket', Key='key'))"
        )
        assert gone[0] == 404


async def test_copies_between_buckets_that_stand_in_the_host_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects put at once, in parts, and ranges, from another bucket and from the same."""
    real = socket.getaddrinfo
    name = "store.test"

    def resolve(host: Any, *arguments: Any, **more: Any) -> Any:
        return real("127.0.0.1" if host in (name, name.encode()) else host, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    code = """
s3 = boto3.client('s3', endpoint_url=sys.argv[1],
    config=Config(s3={'addressing_style': 'virtual'}, retries={'total_max_attempts': 1}))
for bucket in ('bucket', 'other'):
    s3.create_bucket(Bucket=bucket)
body = base64.b64decode(given['body'])
s3.put_object(Bucket='bucket', Key='a b', Body=body[:1000], Metadata={'m': '1'})
upload = s3.create_multipart_upload(Bucket='bucket', Key='in parts', Metadata={'m': '2'})['UploadId']
tag = s3.upload_part(Bucket='bucket', Key='in parts', UploadId=upload, PartNumber=1, Body=body)['ETag']
s3.complete_multipart_upload(Bucket='bucket', Key='in parts', UploadId=upload,
    MultipartUpload={'Parts': [{'PartNumber': 1, 'ETag': tag}]})
out = []
for bucket in ('bucket', 'other'):
    for key in ('a b', 'in parts'):
        s3.copy_object(Bucket=bucket, Key='copy of ' + key, CopySource={'Bucket': 'bucket', 'Key': key})
        got = s3.get_object(Bucket=bucket, Key='copy of ' + key)
        out.append([got['Body'].read() == (body if key == 'in parts' else body[:1000]), got['Metadata']])
    upload = s3.create_multipart_upload(Bucket=bucket, Key='part')['UploadId']
    copied = s3.upload_part_copy(Bucket=bucket, Key='part', UploadId=upload, PartNumber=1,
        CopySource={'Bucket': 'bucket', 'Key': 'in parts'}, CopySourceRange='bytes=5-20004')
    tag = copied['CopyPartResult']['ETag']
    s3.complete_multipart_upload(Bucket=bucket, Key='part', UploadId=upload,
        MultipartUpload={'Parts': [{'PartNumber': 1, 'ETag': tag}]})
    out.append([s3.get_object(Bucket=bucket, Key='part')['Body'].read() == body[5:20005], None])
    listed = s3.list_objects_v2(Bucket=bucket)['Contents']
    out.append({item['Key']: item['Size'] for item in listed})
"""
    body = os.urandom(30_000)
    async with site(tmp_path, "swift", server_host=name) as place:
        out = await boto3(place.ways["forward"], code, body=text(body))
        sizes = {"a b": 1000, "in parts": 30_000}
        copied = {"copy of a b": 1000, "copy of in parts": 30_000, "part": 20_000}
        right = [[True, {"m": "1"}], [True, {"m": "2"}], [True, None]]
        assert out == [*right, {**sizes, **copied}, *right, copied]
        assert body[5:21] not in b"".join(content for _, content in place.server.stored())


async def test_an_object_of_another_network_service_is_not_copied(tmp_path: Path) -> None:
    """Its key is not here: what would be copied could not be read."""
    async with site(tmp_path, "swift") as place:
        way = place.ways["reverse"]
        put = "out = s3.put_object(Bucket='bucket', Key='key', Body=b'x')['ETag']"
        await boto3(way, f"s3.create_bucket(Bucket='bucket')\n{put}")
        place.rig.keys.close()  # as if it had been sealed for somebody else
        place.rig.push(place.service.owner)
        copy = "s3.copy_object(Bucket='bucket', Key='copy', CopySource={'Bucket': 'bucket', 'Key': 'key'})"
        answer = await boto3(way, f"out = told(lambda: {copy}['CopyObjectResult']['ETag'])")
        assert answer[0] == 503
        assert answer[2] in ("key-unknown", "key-withdrawn", "key-expired")
        there = await boto3(way, "out = told(lambda: s3.head_object(Bucket='bucket', Key='copy'))")
        assert there[0] == 404


# A service that fails on purpose.


@dataclass
class Scripted:
    """An S3 of one upload, in memory. `completions`: what to answer to each, in turn."""

    parts: dict[int, bytes] = field(default_factory=dict)
    asked: list[bytes] = field(default_factory=list)
    completions: list[Callable[[web.Request], Awaitable[web.StreamResponse]]] = field(default_factory=list)
    part_status: int = 200
    aborts: list[tuple[int, bytes]] = field(default_factory=list)
    """What to answer to each, in turn."""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        number = request.query.get("partNumber")
        if request.method == "PUT" and number is not None:
            body = await request.read()
            if self.part_status != 200:
                return web.Response(status=self.part_status, body=b"<Error><Code>SlowDown</Code></Error>")
            self.parts[int(number)] = body
            return web.Response(headers={"ETag": f'"{len(self.parts):032x}"'})
        if request.method == "POST" and "uploadId" in request.query:
            self.asked.append(await request.read())
            return await self.completions.pop(0)(request)
        if request.method == "GET" and "uploadId" in request.query:
            return web.Response(body=b"<ListPartsResult/>")
        if request.method == "DELETE":
            status, body = self.aborts.pop(0)
            return web.Response(status=status, body=body, content_type="application/xml")
        return web.Response(status=404, body=b"<Error><Code>NoSuchKey</Code></Error>")

    def assembled(self) -> bytes:
        """What the last completion has made."""
        numbers = [int(found) for found in re.findall(rb"<PartNumber>([0-9]+)<", self.asked[-1])]
        return b"".join(self.parts[number] for number in numbers)


@contextlib.asynccontextmanager
async def scripted(directory: Path) -> AsyncIterator[tuple[Site, Scripted]]:
    server_ca = pki.make_server_ca()
    ca_file, _ = pki.write_credential(server_ca, directory, "server-ca")
    certificate, key = pki.write_credential(pki.issue_server(server_ca, [HOST]), directory, "server")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    service = Scripted()
    app = web.Application(client_max_size=64 * MIB)
    app.router.add_route("*", "/{tail:.*}", service.handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port, ssl_context=context).start()
    try:
        async with proxy(directory, ca_file) as rig:
            yield await provisioned(rig, Moto(f"https://{HOST}:{port}", port, 0), ca_file), service
    finally:
        await runner.cleanup()


def answering(status: int, body: bytes) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=body, content_type="application/xml")

    return answer


RESULT = (
    b"<CompleteMultipartUploadResult><Bucket>bucket</Bucket><Key>key</Key>"
    b'<ETag>"0123456789abcdef0123456789abcdef-2"</ETag></CompleteMultipartUploadResult>'
)
FAILED = b"<Error><Code>InternalError</Code><Message>try again</Message></Error>"
UPLOAD_ONE = "out = part(1, given['body'])"
COMPLETE_ONE = "out = told(lambda: complete([(1, given['tag'])]))"


def until_there(mark: Path) -> None:
    deadline_s = time.monotonic() + 60
    while not mark.exists() and time.monotonic() < deadline_s:
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (200, FAILED, [200, "InternalError", None]),
        (500, FAILED, [500, "InternalError", None]),
        (503, b"<Error><Code>SlowDown</Code></Error>", [503, "SlowDown", None]),
    ],
)
async def test_a_completion_that_failed_is_asked_again_the_same(
    tmp_path: Path, status: int, body: bytes, told: list[Any]
) -> None:
    async with scripted(tmp_path) as (place, service):
        way, secret = place.ways["reverse"], os.urandom(100_000)
        tag = await boto3(way, UPLOAD_ONE, upload="u", body=text(secret))
        service.completions = [answering(status, body), answering(200, RESULT), answering(200, RESULT)]
        answer = await boto3(way, COMPLETE_ONE, upload="u", tag=tag)
        assert answer[1] == told[1]
        assert answer[2] is None  # the service's own answer
        parts = dict(service.parts)
        assert await boto3(way, COMPLETE_ONE, upload="u", tag=tag) == '"0123456789abcdef0123456789abcdef-2"'
        # A client that got no answer asks once more, though all is done.
        assert await boto3(way, COMPLETE_ONE, upload="u", tag=tag) == '"0123456789abcdef0123456789abcdef-2"'
        assert service.asked[0] == service.asked[1] == service.asked[2]
        assert service.parts == parts
        assert place.opened(service.assembled()) == secret


async def test_a_completion_that_was_refused_is_made_anew(tmp_path: Path) -> None:
    async with scripted(tmp_path) as (place, service):
        way, secret = place.ways["reverse"], os.urandom(1000)
        tag = await boto3(way, UPLOAD_ONE, upload="u", body=text(secret))
        refused = answering(400, b"<Error><Code>InvalidPart</Code></Error>")
        service.completions = [refused, answering(200, RESULT)]
        assert (await boto3(way, COMPLETE_ONE, upload="u", tag=tag))[:2] == [400, "InvalidPart"]
        before = service.parts[1]
        assert await boto3(way, COMPLETE_ONE, upload="u", tag=tag) == '"0123456789abcdef0123456789abcdef-2"'
        assert service.parts[1] != before
        assert place.opened(service.assembled()) == secret


GONE = b"<Error><Code>NoSuchUpload</Code></Error>"
DENIED = b"<Error><Code>AccessDenied</Code></Error>"
NO_BUCKET = b"<Error><Code>NoSuchBucket</Code></Error>"
DONE = '"0123456789abcdef0123456789abcdef-2"'
ABORT = """
out = [told(lambda: s3.abort_multipart_upload(Bucket=bucket, Key=key, UploadId='u')) and None
       for bucket, key in given['objects']]
"""


async def test_who_names_an_upload_does_not_end_it(tmp_path: Path) -> None:
    """As one of another object, or without the right to end it."""
    async with scripted(tmp_path) as (place, service):
        way, secret = place.ways["reverse"], os.urandom(1000)
        tag = await boto3(way, UPLOAD_ONE, upload="u", body=text(secret))
        attempts = [
            ("bucket", "other", 404, GONE),
            ("another", "key", 404, GONE),
            ("bucket", "other", 204, b""),
            ("bucket", "key", 403, DENIED),
            ("bucket", "key", 404, NO_BUCKET),
            ("bucket", "key", 404, b"<html>NoSuchUpload</html>"),
            ("bucket", "key", 500, GONE),
        ]
        service.aborts = [attempt[2:] for attempt in attempts]
        await boto3(way, ABORT, objects=[attempt[:2] for attempt in attempts])
        assert service.aborts == []
        service.completions = [answering(200, RESULT)]
        assert await boto3(way, COMPLETE_ONE, upload="u", tag=tag) == DONE
        assert place.opened(service.assembled()) == secret


async def test_an_upload_that_is_no_more_is_forgotten(tmp_path: Path) -> None:
    async with scripted(tmp_path) as (place, service):
        way = place.ways["reverse"]
        for answer in ((204, b""), (404, GONE)):
            tag = await boto3(way, UPLOAD_ONE, upload="u", body=text(b"x" * 1000))
            service.aborts = [answer]
            code = f"{ABORT}\n{COMPLETE_ONE}"
            told = await boto3(way, code, upload="u", tag=tag, objects=[("bucket", "key")])
            assert told == [400, "InvalidPart", "part-unknown"]
        assert service.asked == []


async def test_who_may_not_complete_an_upload_does_not_keep_others_from_it(tmp_path: Path) -> None:
    """A client got no answer; strangers ask the same; then the client asks again."""
    async with scripted(tmp_path) as (place, service):
        way, secret = place.ways["reverse"], os.urandom(1000)
        tag = await boto3(way, UPLOAD_ONE, upload="u", body=text(secret))
        service.completions = [
            answering(503, FAILED),
            answering(403, DENIED),
            answering(404, NO_BUCKET),
            answering(200, RESULT),
            answering(404, GONE),
            answering(200, RESULT),
        ]
        code = "out = [told(lambda: complete([(1, given['tag'])])) for _ in range(6)]"
        answers = await boto3(way, code, upload="u", tag=tag)
        assert [answer if answer == DONE else answer[0] for answer in answers] == [
            503,
            403,
            404,
            DONE,
            404,
            DONE,
        ]
        assert len(set(service.asked)) == 1, (
            "the manifest went up once; and done is done, whatever comes then"
        )
        assert place.opened(service.assembled()) == secret


async def test_a_completion_that_takes_its_time_keeps_the_client_waiting_with_white_space(
    tmp_path: Path,
) -> None:
    seen = asyncio.Event()

    async def slowly(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "application/xml"})
        await answer.prepare(request)
        await answer.write(b'<?xml version="1.0" encoding="UTF-8"?>\n')
        while not seen.is_set():
            await answer.write(b" ")
            await asyncio.sleep(0.02)
        await answer.write(RESULT)
        return answer

    async with scripted(tmp_path) as (place, service):
        way, secret = place.ways["reverse"], os.urandom(1000)
        tag = await boto3(way, UPLOAD_ONE, upload="u", body=text(secret))
        service.completions = [slowly]
        code = """
import urllib3, os
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
part = f'<Part><PartNumber>1</PartNumber><ETag>{given["tag"]}</ETag></Part>'
body = f'<CompleteMultipartUpload>{part}</CompleteMultipartUpload>'
url = sys.argv[1] + '/bucket/key?uploadId=u'
request = AWSRequest('POST', url, data=body)
keys = Credentials(os.environ['AWS_ACCESS_KEY_ID'], os.environ['AWS_SECRET_ACCESS_KEY'])
S3SigV4Auth(keys, 's3', 'us-east-1').add_auth(request)
pool = urllib3.PoolManager(ca_certs=os.environ['AWS_CA_BUNDLE'])
answer = pool.urlopen('POST', url, body=body, headers=dict(request.headers), preload_content=False)
early = b''
while not early.endswith(b'     '):
    early += answer.read1(1)
open(given['file'], 'w').close()
out = [answer.status, early.decode(), (early + answer.read()).decode()]
"""
        mark = tmp_path / "seen"

        async def watch() -> None:
            await asyncio.to_thread(until_there, mark)
            seen.set()

        async with asyncio.TaskGroup() as group:
            group.create_task(watch(), name="watch")
            status, early, whole = await boto3(way, code, tag=tag, file=str(mark))
        assert status == 200
        assert early.startswith("<?xml")
        assert whole.endswith("</CompleteMultipartUploadResult>")
        assert place.opened(service.assembled()) == secret


async def test_a_part_that_the_service_refuses_is_not_remembered(tmp_path: Path) -> None:
    async with scripted(tmp_path) as (place, service):
        way = place.ways["reverse"]
        for body in (b"x" * 1000, b"x" * 6 * MIB):
            service.part_status = 503
            code = "out = told(lambda: part(1, given['body']))"
            assert (await boto3(way, code, upload="u", body=text(body)))[:2] == [503, "SlowDown"]
        service.part_status = 200
        answer = await boto3(way, COMPLETE_ONE, upload="u", tag="0" * 32)
        assert answer == [400, "InvalidPart", "part-unknown"]
        assert service.asked == []


async def test_a_small_part_is_led_nowhere_else(tmp_path: Path) -> None:
    async with scripted(tmp_path) as (place, service):
        service.part_status = 307
        code = "out = told(lambda: part(1, given['body']))"
        answer = await boto3(place.ways["reverse"], code, upload="u", body=text(b"x" * 1000))
        assert (answer[0], answer[2]) == (502, "answer-refused")


async def test_without_its_database_nothing_is_acknowledged(tmp_path: Path) -> None:
    async with scripted(tmp_path) as (place, service):
        way = place.ways["reverse"]
        for name in ("", "-wal", "-shm"):
            (tmp_path / "uploads" / f"directory.db{name}").unlink(missing_ok=True)
        for size in (1000, 6 * MIB):
            code = "out = told(lambda: part(1, given['body']))"
            answer = await boto3(way, code, upload="u", body=text(b"x" * size))
            assert answer[0] == 503, answer
            assert answer[1:] == ["ServiceUnavailable", "uploads-unavailable"]
        assert len(service.parts) == 1  # stored, but nobody was told that it is
        answer = await boto3(way, COMPLETE_ONE, upload="u", tag="0" * 32)
        assert answer[2] == "uploads-unavailable"
        assert service.asked == []


async def test_sizes_of_uploads_are_compared_before_they_are_completed(tmp_path: Path) -> None:
    async with scripted(tmp_path) as (place, service):
        way = place.ways["reverse"]
        tag = await boto3(way, UPLOAD_ONE, upload="u", body=text(b"x" * 1000))
        service.completions = [answering(200, RESULT)]
        code = """
def sized(n):
    return s3.complete_multipart_upload(Bucket='bucket', Key='key', UploadId='u', MpuObjectSize=n,
        MultipartUpload={'Parts': [{'PartNumber': 1, 'ETag': given['tag']}]})['ETag']
out = [told(lambda: sized(1001)), told(lambda: sized(1000))]
"""
        wrong, right = await boto3(way, code, tag=tag)
        assert wrong == [400, "InvalidRequest", "upload-size"]
        assert right == '"0123456789abcdef0123456789abcdef-2"'
        assert len(service.asked) == 1


async def test_a_part_whose_checksum_is_wrong_is_not_stored(tmp_path: Path) -> None:
    async with scripted(tmp_path) as (place, service):
        way = place.ways["reverse"]
        for size in (1000, 6 * MIB):
            code = """
out = told(lambda: s3.upload_part(Bucket='bucket', Key='key', UploadId='u', PartNumber=1,
    Body=base64.b64decode(given['body']), ChecksumCRC32='AAAAAA=='))
"""
            answer = await boto3(way, code, body=text(b"x" * size))
            assert answer == [400, "BadDigest", "bad-digest"]
        assert service.parts == {}
