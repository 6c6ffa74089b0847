"""S3 through the proxy: boto3 against OpenStack Swift, which verifies everything, and moto, which shows much.

Zero difference: what boto3 is told directly and through us is the same, but for what `declared` takes out.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from envelope.objects import MAGIC, sealed_length
from tests.integration.s3_rig import VIAS, Site, StartReferee, body, content, leaks, s3_site
from tests.referees.moto import moto
from tests.referees.swift import swift

REFEREES = [pytest.param(swift, id="swift"), pytest.param(moto, id="moto")]
SIZES = [0, 1, 16383, 16384, 100_000, (1 << 20) + 1]

OCTETS = {"Content-Type": "application/octet-stream"}

type Calls = list[list[Any]]

_TAG = re.compile(r"\b[0-9a-f]{32}(?:-0*1)?(?![0-9a-f-])")
_UNLIKE = frozenset(
    {
        "LastModified", "CreationDate", "RequestId", "HostId", "VersionId", "DeleteMarkerVersionId",
        "NextVersionIdMarker", "VersionIdMarker", "Date", "NextContinuationToken", "ContinuationToken",
        "ChecksumCRC32", "ChecksumCRC32C", "ChecksumCRC64NVME", "ChecksumSHA1", "ChecksumSHA256",
        "ChecksumType", "ChecksumAlgorithm", "Checksum", "CacheControl", "ObjectLockRetainUntilDate",
    }
)  # fmt: skip
"""What is anew in each answer; and declared: digests of ciphertext are dropped, what is opened is private."""


def declared(value: Any) -> Any:
    """*value* without what a client may see differently through the proxy."""
    if isinstance(value, dict):
        return {name: declared(item) for name, item in value.items() if name not in _UNLIKE and item != []}
    if isinstance(value, list):
        # Swift deletes in parallel, and tells in the order in which it was done.
        return sorted((declared(item) for item in value), key=str)
    if isinstance(value, str):
        return _TAG.sub("TAG", re.sub(r"bucket-(?:direct0|forward|reverse)", "BUCKET", value))
    return value


def seen(answer: dict[str, Any]) -> dict[str, Any]:
    """Of one call: status, error, and the parsed answer."""
    return {name: declared(answer.get(name)) for name in ("status", "error", "answer")}


def the_same(calls: Calls, direct: Sequence[Any], through: Sequence[Any]) -> None:
    assert len(calls) == len(direct) == len(through)
    different = [
        (index, call, seen(one), seen(two), two.get("message"))
        for index, (call, one, two) in enumerate(zip(calls, direct, through, strict=True))
        if seen(one) != seen(two)
    ]
    assert different == [], "\n".join(map(repr, different))


def storing(bucket: str) -> Calls:
    """Every way of putting and reading one object."""
    b = {"Bucket": bucket}

    def put(key: str, size: int, **more: Any) -> list[Any]:
        return ["put_object", {**b, "Key": key, "Body": {"bytes": size, "seed": size}, **more}]

    fields = {
        "ContentType": "text/x-test", "ContentDisposition": 'attachment; filename="a b.txt"',
        "ContentEncoding": "x-own", "ContentLanguage": "de", "Metadata": {"author": "me", "x-y": "a  b"},
    }  # fmt: skip
    calls: Calls = [["create_bucket", b], ["head_bucket", b], ["get_bucket_location", b]]
    for size in SIZES:
        calls += [
            put(f"a b/{size}+\u00e4", size, **fields),
            ["get_object", {**b, "Key": f"a b/{size}+\u00e4"}],
            ["head_object", {**b, "Key": f"a b/{size}+\u00e4"}],
        ]
    for algorithm in ("CRC32", "SHA1", "SHA256"):
        calls.append(put(f"sum-{algorithm}", 20_000, ChecksumAlgorithm=algorithm))
    calls += [
        ["get_object", {**b, "Key": "sum-SHA256", "ChecksumMode": "ENABLED"}],
        put("folder/", 0),
        ["head_object", {**b, "Key": "folder/"}],
        put("..", 5),
        ["get_object", {**b, "Key": ".."}],
        put("a//b/../c", 6),
        ["get_object", {**b, "Key": "a//b/../c"}],
        ["get_object", {**b, "Key": "missing"}],
        ["head_object", {**b, "Key": "missing"}],
        ["get_object", {"Bucket": bucket + "-missing", "Key": "x"}],
        ["delete_bucket", b],
    ]
    return calls


def reading(bucket: str) -> Calls:
    """Ranges, conditions and lists, over what `storing` has stored."""
    b = {"Bucket": bucket}
    key = {**b, "Key": "a b/100000+\u00e4"}
    calls: Calls = [["head_object", key]]
    tag = {"use": [0, "ETag"]}
    for span in ("0-0", "0-16383", "16383-16384", "99999-", "5-4000000", "-1", "-200000", "50000-60000"):
        calls.append(["get_object", {**key, "Range": f"bytes={span}"}])
    for span in ("100000-", "200000-300000"):
        calls.append(["get_object", {**key, "Range": f"bytes={span}"}])
    calls += [
        ["get_object", {**b, "Key": "a b/0+\u00e4", "Range": "bytes=0-1"}],
        ["get_object", {**key, "IfMatch": tag}],
        ["get_object", {**key, "IfMatch": '"0123456789abcdef0123456789abcdef"'}],
        ["get_object", {**key, "IfNoneMatch": tag}],
        ["head_object", {**key, "IfNoneMatch": tag}],
        ["get_object", {**key, "IfNoneMatch": '"0123456789abcdef0123456789abcdef"'}],
        ["get_object", {**key, "IfMatch": tag, "Range": "bytes=10-19"}],
        ["get_object", {**key, "IfNoneMatch": tag, "Range": "bytes=10-19"}],
        ["get_object", {**key, "IfModifiedSince": "2099-01-01T00:00:00Z"}],
        ["get_object", {**key, "IfUnmodifiedSince": "2000-01-01T00:00:00Z"}],
        ["put_object", {**key, "Body": "x", "IfNoneMatch": "*"}],
        ["put_object", {**b, "Key": "new", "Body": "x", "IfNoneMatch": "*"}],
        ["list_objects", b],
        ["list_objects_v2", b],
        ["list_objects_v2", {**b, "Prefix": "a b/"}],
        ["list_objects_v2", {**b, "Delimiter": "/"}],
        ["list_objects_v2", {**b, "MaxKeys": 2, "FetchOwner": True}],
        ["list_objects_v2", {**b, "StartAfter": "a b/16383"}],
        ["list_objects", {**b, "Prefix": "none"}],
        ["get_object_acl", key],
        ["presign", ["get_object", key]],
        ["presign", ["head_object", key]],
        ["presign", ["get_object", {**key, "headers": {"Range": "bytes=100-199"}}]],
        [
            "presign",
            ["put_object", {**b, "Key": "by url", "body": {"bytes": 5000, "seed": 9}, "headers": OCTETS}],
        ],
        ["get_object", {**b, "Key": "by url"}],
        ["delete_object", {**b, "Key": "new"}],
        ["delete_object", {**b, "Key": "never was"}],
        ["delete_objects", {**b, "Delete": {"Objects": [{"Key": "sum-SHA1"}, {"Key": "by url"}]}}],
        ["list_objects_v2", b],
    ]  # fmt: skip
    return calls


def judged(bucket: str) -> Calls:
    """What only a referee that verifies refuses."""
    key = {"Bucket": bucket, "Key": "a b/100000+\u00e4"}
    return [
        ["put_object", {**key, "Body": "x", "ContentMD5": "AAAAAAAAAAAAAAAAAAAAAA=="}],
        ["put_object", {**key, "Body": "x", "ChecksumSHA256": "A" * 43 + "="}],
        ["put_object", {**key, "Body": "x", "ChecksumCRC32": "AAAAAA=="}],
        ["get_object", {**key, "Range": "lines=0-1"}],
        ["get_object", {**key, "Range": "bytes=9-1"}],
    ]


@pytest.mark.parametrize("start", REFEREES)
async def test_boto3_sees_no_difference_and_the_store_no_plaintext(
    tmp_path: Path, start: StartReferee
) -> None:
    def readings(bucket: str) -> Calls:
        # Behind the first, whose answer others use.
        first, *others = reading(bucket)
        return [first, *(judged(bucket) if start is swift else []), *others]

    async with s3_site(tmp_path, start) as site:
        through = {}
        for via in VIAS:
            calls = [*storing(f"bucket-{via}")]
            answers = await site.calls(calls, via=via)
            more = await site.calls(readings(f"bucket-{via}"), via=via)
            through[via] = (answers, more)
            sizes = [item["Size"] for item in more[-1]["answer"]["Contents"]]
            assert set(sizes) == {*SIZES, 5, 6, 20_000}
        await store_is_sealed_by(site, {size: size for size in (*SIZES, 20_000)})
        calls, more_calls = storing("bucket-direct0"), readings("bucket-direct0")
        direct, more = await site.calls(calls), await site.calls(more_calls)
        for size, answer in zip(SIZES, direct[4::3], strict=False):
            assert answer["answer"]["Body"] == content(size, size), "the calls are what they should be"
        for via in VIAS:
            the_same(calls, direct, through[via][0])
            the_same(more_calls, more, through[via][1])


async def store_is_sealed_by(site: Site, seeds: Mapping[int, int]) -> None:
    """All that lies in the store opens by the independent decoder, and shows no plaintext.

    *seeds*: of bodies that must be there, by their length.
    """
    plains = [body(size, seed) for size, seed in seeds.items()]
    opened = []
    for name, stored in await site.stored():
        assert stored.startswith(MAGIC), name
        plain = site.open(stored)
        assert len(stored) == sealed_length(len(plain))
        assert not any(leaks(known, stored) for known in plains), name
        opened.append(plain)
    assert all(plain in opened for plain in plains)
