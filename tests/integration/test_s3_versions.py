"""S3 beyond objects: versions, tags, locks, settings of buckets, attributes; and what was there before us.

moto has all of it; nothing but objects' content is ours to change, so the same must be seen.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proxy.tenants.model import LegacyPolicy
from tests.integration.s3_rig import VIAS, content, s3_site
from tests.integration.test_s3_core import Calls, store_is_sealed_by, the_same
from tests.referees.moto import moto
from tests.referees.swift import swift

_LOCK = {"ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": 1}}}
_LIFECYCLE = {
    "Rules": [{"ID": "r", "Status": "Enabled", "Filter": {"Prefix": "x"}, "Expiration": {"Days": 9}}]
}
_CORS = {"CORSRules": [{"AllowedMethods": ["GET"], "AllowedOrigins": ["https://a.example"]}]}
_TAGS = {"TagSet": [{"Key": "project", "Value": "a b/ä"}]}
_POLICY = (
    '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Principal":"*",'
    '"Action":"s3:GetObject","Resource":"*"}]}'
)


def settings(bucket: str) -> Calls:
    b = {"Bucket": bucket}
    calls: Calls = [
        ["create_bucket", {**b, "ObjectLockEnabledForBucket": True}],
        ["get_bucket_versioning", b],
        ["put_object_lock_configuration", {**b, "ObjectLockConfiguration": _LOCK}],
        ["get_object_lock_configuration", b],
        ["put_bucket_lifecycle_configuration", {**b, "LifecycleConfiguration": _LIFECYCLE}],
        ["get_bucket_lifecycle_configuration", b],
        ["put_bucket_cors", {**b, "CORSConfiguration": _CORS}],
        ["get_bucket_cors", b],
        ["put_bucket_tagging", {**b, "Tagging": _TAGS}],
        ["get_bucket_tagging", b],
        ["delete_bucket_tagging", b],
        ["put_bucket_policy", {**b, "Policy": _POLICY}],
        ["get_bucket_policy", b],
        ["delete_bucket_policy", b],
        ["get_bucket_acl", b],
        ["get_bucket_encryption", b],
        ["get_public_access_block", b],
        ["list_multipart_uploads", b],
    ]
    return calls


def versions(bucket: str) -> Calls:
    key = {"Bucket": bucket, "Key": "docs/one"}
    first, second = {"use": [0, "VersionId"]}, {"use": [1, "VersionId"]}
    return [
        ["put_object", {**key, "Body": {"bytes": 30_000, "seed": 1}, "Tagging": "a=b&c=d%20e"}],
        ["put_object", {**key, "Body": {"bytes": 10, "seed": 2}, "StorageClass": "STANDARD_IA"}],
        ["get_object", key],
        ["get_object", {**key, "VersionId": first}],
        ["get_object", {**key, "VersionId": first, "Range": "bytes=20000-20009"}],
        ["head_object", {**key, "VersionId": first}],
        ["get_object_tagging", {**key, "VersionId": first}],
        ["put_object_tagging", {**key, "VersionId": second, "Tagging": _TAGS}],
        ["get_object_tagging", key],
        ["delete_object_tagging", key],
        ["put_object_legal_hold", {**key, "LegalHold": {"Status": "ON"}}],
        ["get_object_legal_hold", key],
        ["put_object_legal_hold", {**key, "LegalHold": {"Status": "OFF"}}],
        [
            "get_object_attributes",
            {**key, "ObjectAttributes": ["ETag", "ObjectSize", "StorageClass", "Checksum"]},
        ],
        ["list_object_versions", {"Bucket": bucket}],
        ["delete_object", key],
        ["get_object", key],
        ["list_object_versions", {"Bucket": bucket}],
        ["list_objects_v2", {"Bucket": bucket}],
    ]


async def test_what_is_no_content_is_left_alone(tmp_path: Path) -> None:
    async with s3_site(tmp_path, moto, options={"trailing_checksums": True}) as site:
        through: dict[str, tuple[Sequence[Any], Sequence[Any]]] = {}
        for via in VIAS:
            bucket = f"bucket-{via}"
            through[via] = (
                await site.calls(settings(bucket), via=via),
                await site.calls(versions(bucket), via=via),
            )
        await store_is_sealed_by(site, {30_000: 1, 10: 2})
        bucket = "bucket-direct0"
        set_directly = await site.calls(settings(bucket))
        seen_directly = await site.calls(versions(bucket))
        assert sum(answer["status"] == 200 for answer in seen_directly) > 12
        for via in VIAS:
            the_same(settings(bucket), set_directly, through[via][0])
            the_same(versions(bucket), seen_directly, through[via][1])


async def test_what_was_there_before_us(tmp_path: Path) -> None:
    """Strict: refused, in S3's words. Migrate: passes, with its own size, beside what is sealed."""
    b = {"Bucket": "bucket-1"}
    # 104 bytes are the size of a sealed object, too; 5 of none.
    old = {"five": 5, "like sealed": 104, "long": 50_000}
    before = [["put_object", {**b, "Key": key, "Body": {"bytes": n, "seed": n}}] for key, n in old.items()]
    for legacy in LegacyPolicy:
        directory = tmp_path / legacy.value
        directory.mkdir()
        async with s3_site(directory, moto, legacy=legacy) as site:
            await site.calls([["create_bucket", b], *before])
            sealed = ["put_object", {**b, "Key": "new", "Body": {"bytes": 20_000, "seed": 7}}]
            reads = [["get_object", {**b, "Key": key}] for key in (*old, "new")]
            ranges = [["get_object", {**b, "Key": key, "Range": "bytes=2-3"}] for key in (*old, "new")]
            heads = [["head_object", {**b, "Key": key}] for key in (*old, "new")]
            calls = [sealed, *reads, *ranges, *heads, ["list_objects_v2", b]]
            answers = await site.calls(calls, via="forward")
            assert answers[0]["status"] == answers[4]["status"] == 200
            assert answers[4]["answer"]["Body"] == content(20_000, 7)
            assert answers[8]["status"] == 206
            assert answers[12]["answer"]["ContentLength"] == 20_000
            listed = {item["Key"]: item["Size"] for item in answers[13]["answer"]["Contents"]}
            if legacy is LegacyPolicy.STRICT:
                for answer in answers[1:4]:
                    assert (answer["status"], answer["error"]) == (409, "InvalidObjectState")
                    assert answer["headers"]["sealgate-error"] == "not-sealed"
                assert [answer["status"] for answer in answers[5:8]] == [409] * 3
                # Sizes by arithmetic: what has the length of a sealed object is listed as one.
                assert listed == {"five": 5, "like sealed": 0, "long": 50_000 - 88 - 16 * 4, "new": 20_000}
            else:
                for (_, n), answer in zip(old.items(), answers[1:4], strict=True):
                    assert answer["answer"]["Body"] == content(n, n)
                assert [answer["status"] for answer in answers[5:8]] == [206] * 3
                assert [answer["answer"]["ContentLength"] for answer in answers[9:12]] == [5, 104, 50_000]
                assert listed == {**old, "new": 20_000}


async def test_a_checksum_of_the_ciphertext_goes_up_where_it_is_asked_for(tmp_path: Path) -> None:
    """Swift verifies trailers: what it stores is what was announced."""
    b = {"Bucket": "bucket-1"}
    sizes = {0: 1, 5: 2, 16_384: 3, 300_000: 4}
    puts = [
        ["put_object", {**b, "Key": str(n), "Body": {"bytes": n, "seed": seed}, "ContentEncoding": "own"}]
        for n, seed in sizes.items()
    ]
    gets = [["get_object", {**b, "Key": str(n)}] for n in sizes]
    wrong = ["put_object", {**b, "Key": "wrong", "Body": "x", "ContentMD5": "A" * 22 + "=="}]
    async with s3_site(tmp_path, swift, options={"trailing_checksums": True}) as site:
        for via in VIAS:
            create = [["create_bucket", b]] if via == "forward" else []
            answers = await site.calls([*create, *puts, *gets, wrong, ["list_objects_v2", b]], via=via)
            assert [answer["status"] for answer in answers[-10:]] == [200] * 8 + [400, 200], answers
            for (n, seed), answer in zip(sizes.items(), answers[-6:-2], strict=True):
                assert answer["answer"]["Body"] == content(n, seed)
                assert answer["answer"]["ContentEncoding"] == "own"
            assert {item["Size"] for item in answers[-1]["answer"]["Contents"]} == set(sizes)
        await store_is_sealed_by(site, sizes)
