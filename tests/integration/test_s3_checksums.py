"""Checksums of objects that are uploaded in parts: what boto3 and its transfer manager say of the whole.

OpenStack Swift is asked without them, and has no such thing; the proxy compares, as Amazon would.
"""

import base64
import contextlib
import hashlib
import os
import sqlite3
import zlib
from pathlib import Path
from typing import Any

from proxy.messages.checksums import new_checksum
from proxy.profiles.s3 import etags
from proxy.profiles.s3.multipart import ListedPart, asked_for
from tests.integration.boto3_program import boto3, text
from tests.integration.proxy_rig import proxy
from tests.integration.s3_site import Way, provisioned, site

MIB = 1024 * 1024
TRANSFER = """
import io
from boto3.s3.transfer import TransferConfig
def sent(key, crc):
    s3.upload_fileobj(io.BytesIO(base64.b64decode(given['body'])), 'bucket', key,
        ExtraArgs={'ChecksumCRC32': crc},
        Config=TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20))
    return s3.get_object(Bucket='bucket', Key=key)['ContentLength']
"""
PARTS = """
def uploaded(key, name, values):
    algorithm = name.removeprefix('Checksum')
    made = s3.create_multipart_upload(Bucket='bucket', Key=key, ChecksumAlgorithm=algorithm)
    parts = []
    for number, (body, value) in enumerate(zip(given['bodies'], values), 1):
        said = {name: value} if value else {}
        parts.append({'PartNumber': number, 'ETag': s3.upload_part(Bucket='bucket', Key=key,
            UploadId=made['UploadId'], PartNumber=number, Body=base64.b64decode(body), **said)['ETag']})
    return made['UploadId'], parts
def completed(key, upload, parts, **said):
    return s3.complete_multipart_upload(Bucket='bucket', Key=key, UploadId=upload,
        MultipartUpload={'Parts': parts}, **said)['ETag'][-3:]
"""


def value_of(algorithm: str, data: bytes) -> str:
    checksum = new_checksum(algorithm)
    checksum.update(data)
    return text(checksum.digest())


async def stored(direct: Way, key: str) -> bytes:
    code = "out = base64.b64encode(s3.get_object(Bucket='bucket', Key=given['key'])['Body'].read()).decode()"
    return base64.b64decode(await boto3(direct, code, key=key))


async def test_the_transfer_manager_says_the_crc_of_the_whole(tmp_path: Path) -> None:
    """boto3's own: type FULL_OBJECT, every part with its CRC-32 behind it."""
    body = os.urandom(11 * MIB)
    right = text(zlib.crc32(body).to_bytes(4))
    async with site(tmp_path, "swift") as place:
        code = f"""{TRANSFER}
def failing(key, crc):
    from boto3.exceptions import S3UploadFailedError
    try:
        sent(key, crc)
    except (S3UploadFailedError, ClientError) as error:
        return str(error)
out = [sent('right', given['right']), failing('wrong', 'AAAAAA=='),
    told(lambda: s3.head_object(Bucket='bucket', Key='wrong'))[0],
    s3.list_multipart_uploads(Bucket='bucket').get('Uploads')]
"""
        await boto3(place.ways["direct"], "out = bool(s3.create_bucket(Bucket='bucket'))")
        for name in ("forward", "reverse"):
            length, failed, absent, left = await boto3(place.ways[name], code, body=text(body), right=right)
            assert (length, absent, left) == (len(body), 404, None)
            assert "BadDigest" in failed
        assert place.opened(await stored(place.ways["direct"], "right")) == body


async def test_parts_are_remembered_with_their_checksums(tmp_path: Path) -> None:
    """Completed through another proxy with the same database: full and composite, right, wrong, unknown."""
    bodies = [os.urandom(5 * MIB), os.urandom(5 * MIB), b"the end"]
    whole = b"".join(bodies)
    uploads: dict[str, Any] = {}
    full = {name: f"Checksum{name.upper()}" for name in ("crc32", "crc32c", "crc64nvme")}
    sha256 = [hashlib.sha256(body).digest() for body in bodies]
    composite = text(hashlib.sha256(b"".join(sha256)).digest())
    async with site(tmp_path, "swift") as one:
        code = PARTS + "s3.create_bucket(Bucket='bucket')\n"
        code += "out = {key: uploaded(key, name, values) for key, (name, values) in given['uploads'].items()}"
        asked: dict[str, tuple[str, list[str | None]]] = {
            algorithm: (name, [value_of(algorithm, body) for body in bodies])
            for algorithm, name in full.items()
        }
        asked["sha256"] = ("ChecksumSHA256", [text(value) for value in sha256])
        asked["gap"] = (
            "ChecksumCRC32C",
            [value_of("crc32c", bodies[0]), None, value_of("crc32c", bodies[2])],
        )
        uploads = await boto3(
            one.ways["reverse"], code, bodies=[text(body) for body in bodies], uploads=asked
        )
        (tmp_path / "two").mkdir()
        async with proxy(tmp_path / "two", one.ca_file, database_dir=tmp_path / "uploads") as rig:
            two = await provisioned(rig, one.server, one.ca_file, like=one)
            code = (
                PARTS
                + """
out = [told(lambda: completed(key, *given['uploads'][key], **said)) for key, said in given['steps']]
"""
            )
            steps: list[tuple[str, dict[str, str]]] = []
            expected: list[Any] = []
            for algorithm, name in full.items():
                wrong = base64.b64encode(bytes(len(base64.b64decode(value_of(algorithm, b""))))).decode()
                full_object = {"ChecksumType": "FULL_OBJECT"}
                steps += [
                    (algorithm, {name: wrong, **full_object}),
                    (algorithm, {name: value_of(algorithm, whole), **full_object}),
                    (algorithm, {name: value_of(algorithm, whole), **full_object}),  # who got no answer
                ]
                expected += [[400, "BadDigest", "bad-digest"], '-3"', '-3"']
            steps += [
                ("sha256", {"ChecksumSHA256": f"{composite}-2", "ChecksumType": "COMPOSITE"}),
                ("sha256", {"ChecksumSHA256": f"{composite}-3", "ChecksumType": "COMPOSITE"}),
                ("gap", {"ChecksumCRC32C": value_of("crc32c", whole), "ChecksumType": "FULL_OBJECT"}),
                ("gap", {"ChecksumSHA256": composite, "ChecksumType": "FULL_OBJECT"}),
                ("gap", {}),
            ]
            expected += [
                [400, "BadDigest", "bad-digest"],
                '-3"',
                [501, "NotImplemented", "checksum-of-parts"],
                [400, "InvalidDigest", "invalid-digest"],
                '-3"',
            ]
            found = await boto3(two.ways["forward"], code, uploads=uploads, steps=steps)
            assert found == expected
            for key in asked:
                assert two.opened(await stored(one.ways["direct"], key)) == whole, key


async def test_no_checksum_of_a_part_lies_in_the_database(tmp_path: Path) -> None:
    body = os.urandom(5 * MIB)
    async with site(tmp_path, "swift") as place:
        code = (
            PARTS
            + "s3.create_bucket(Bucket='bucket')\nout = uploaded('key', 'ChecksumSHA256', given['values'])"
        )
        value = hashlib.sha256(body).digest()
        await boto3(place.ways["reverse"], code, bodies=[text(body)], values=[text(value)])
        database = b"".join(path.read_bytes() for path in (tmp_path / "uploads").iterdir())
        assert b"SGT" in database  # what is sealed of it
        for shown in (value, value.hex().encode(), base64.b64encode(value)):
            assert shown not in database


async def test_what_a_completion_asked_confirms_no_contents(tmp_path: Path) -> None:
    """Who reads the database knows the parts' tags, and may guess what was uploaded."""
    body = os.urandom(5 * MIB)
    value = text(hashlib.sha256(body).digest())
    code = (
        PARTS
        + """
s3.create_bucket(Bucket='bucket')
upload, parts = uploaded('key', 'ChecksumSHA256', given['values'])
parts[0]['ChecksumSHA256'] = given['values'][0]
out = [parts[0]['ETag'], *[completed('key', upload, parts) for _ in range(2)]]
"""
    )
    async with site(tmp_path, "swift") as place:
        tag, *ends = await boto3(place.ways["reverse"], code, bodies=[text(body)], values=[value])
        assert ends[0] == ends[1], "asked again, it is the same"
    with contextlib.closing(sqlite3.connect(next((tmp_path / "uploads").glob("*.db")))) as database:
        (asked,) = [bytes(row[0]) for row in database.execute("SELECT asked FROM upload_completion")]
    guessed = ListedPart(number=1, tag=etags.to_service(tag.strip('"')), checksums={"ChecksumSHA256": value})
    assert asked != asked_for([guessed])
