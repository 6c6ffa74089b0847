import itertools

import pytest

from proxy.profiles.s3.addressing import Level
from proxy.profiles.s3.routes import ROUTES, Kind, find_operation

S, B, O = Level.SERVICE, Level.BUCKET, Level.OBJECT  # noqa: E741 - columns of a table


def found(method: str, level: Level, query: str = "", *fields: str) -> str | None:
    parameters = dict(pair.partition("=")[::2] for pair in query.split("&") if pair)
    operation = find_operation(method, level, parameters, frozenset(fields))
    return None if operation is None else operation.name


@pytest.mark.parametrize(
    ("method", "level", "query", "name"),
    [
        ("GET", S, "", "ListBuckets"),
        ("PUT", B, "", "CreateBucket"),
        ("GET", B, "", "ListObjects"),
        ("GET", B, "prefix=a&delimiter=/&max-keys=3&marker=x&encoding-type=url", "ListObjects"),
        ("GET", B, "list-type=2&fetch-owner=true&start-after=a&continuation-token=t", "ListObjectsV2"),
        ("GET", B, "versions&key-marker=a&version-id-marker=b", "ListObjectVersions"),
        ("GET", B, "location", "GetBucketLocation"),
        ("PUT", B, "lifecycle", "PutBucketLifecycleConfiguration"),
        ("DELETE", B, "policy", "DeleteBucketPolicy"),
        ("GET", B, "inventory&id=1", "GetBucketInventoryConfiguration"),
        ("POST", B, "delete", "DeleteObjects"),
        ("POST", B, "", "PostObject"),
        ("PUT", O, "x-id=PutObject", "PutObject"),
        ("PUT", O, "X-Amz-Algorithm=a&X-Amz-Signature=b&x-amz-acl=private", "PutObject"),
        ("GET", O, "versionId=1&response-content-type=text/plain", "GetObject"),
        ("GET", O, "partNumber=2", "GetObject"),
        ("GET", O, "attributes", "GetObjectAttributes"),
        ("PUT", O, "partNumber=1&uploadId=x", "UploadPart"),
        ("POST", O, "uploads", "CreateMultipartUpload"),
        ("POST", O, "uploadId=x", "CompleteMultipartUpload"),
        ("GET", O, "uploadId=x&max-parts=3", "ListParts"),
        ("POST", O, "select&select-type=2", "SelectObjectContent"),
    ],
)  # fmt: skip
def test_operations(method: str, level: Level, query: str, name: str) -> None:
    assert found(method, level, query) == name


@pytest.mark.parametrize(
    ("method", "level", "query"),
    [
        ("POST", O, ""),
        ("PATCH", O, ""),
        ("PUT", S, ""),
        ("GET", O, "unknown"),
        ("PUT", O, "append&position=0"),
        ("PUT", O, "uploadId=x"),
        ("PUT", O, "partNumber=1"),
        ("GET", B, "list-type=3"),
        ("GET", B, "acl&policy"),
        ("PUT", O, "acl&uploadId=x"),
        ("PUT", O, "legal-hold&tagging"),
        ("PUT", B, "metadataTable"),
        ("PUT", O, "renameObject"),
        ("get", B, ""),
        ("POST", B, "WriteGetObjectResponse"),
        ("GET", B, "session"),
        ("PUT", O, "ACL"),
    ],
)
def test_what_is_not_in_the_table_is_no_operation(method: str, level: Level, query: str) -> None:
    assert found(method, level, query) is None


def test_copies_are_told_by_their_source() -> None:
    assert found("PUT", O, "", "x-amz-copy-source") == "CopyObject"
    assert found("PUT", O, "partNumber=1&uploadId=x", "x-amz-copy-source") == "UploadPartCopy"
    assert found("PUT", O, "tagging", "x-amz-copy-source") is None
    assert found("GET", O, "", "x-amz-copy-source") is None


@pytest.mark.parametrize("field", ["x-amz-write-offset-bytes", "x-amz-request-route", "x-amz-rename-source"])
def test_writes_in_place_are_no_operation(field: str) -> None:
    assert found("PUT", O, "", field) is None


def test_only_writes_take_content() -> None:
    """A body that is content goes to these operations and no other."""
    writing = {op.name for op in ROUTES.values() if op.kind in {Kind.WRITE, Kind.WRITE_PART, Kind.FORM}}
    assert writing == {"PutObject", "UploadPart", "PostObject"}


def test_two_subresources_are_never_one_operation() -> None:
    names = sorted({subresource for _, _, subresource in ROUTES if subresource})
    for one, two in itertools.combinations(names, 2):
        for method in ("GET", "PUT", "POST", "DELETE"):
            for level in (B, O):
                assert found(method, level, f"{one}&{two}") is None
