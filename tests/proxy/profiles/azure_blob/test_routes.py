"""Operations: what is in the table, and what is made another operation by a field or a parameter."""

import pytest

from proxy.profiles.azure_blob.addressing import read_target
from proxy.profiles.azure_blob.routes import COPY, ROUTES, Kind, Operation, find_operation, is_block_blob
from tests.proxy.profiles.azure_blob.azure_signer import TOKEN


def operation(method: str, target: str, *fields: str) -> Operation | None:
    return find_operation(method, read_target(target, account_in_path=False), frozenset(fields))


@pytest.mark.parametrize(
    ("method", "target", "kind"),
    [
        ("PUT", "/box/b", Kind.WRITE),
        ("PUT", "/box/b?comp=block&blockid=QQ", Kind.BLOCK),
        ("PUT", "/box/b?comp=BlockList", Kind.COMMIT),
        ("GET", "/box/b?comp=blocklist&blocklisttype=all", Kind.BLOCK_LIST),
        ("GET", "/box/b?snapshot=2026", Kind.READ),
        ("HEAD", "/box/b?versionid=2026", Kind.HEAD),
        ("GET", "/box?restype=container&comp=list&prefix=a&include=copy", Kind.LIST),
        ("PUT", "/box/b?comp=properties", Kind.PROPERTIES),
        ("PUT", "/box/b?comp=tags", Kind.DOCUMENT),
        ("PUT", "/box?restype=container&comp=acl", Kind.DOCUMENT),
        ("DELETE", "/box/b", Kind.FORWARD),
        ("PUT", "/box/b?comp=snapshot", Kind.FORWARD),
        ("GET", "/?comp=list", Kind.FORWARD),
    ],
)
def test_the_table(method: str, target: str, kind: Kind) -> None:
    mark = "&" if "?" in target else "?"
    for given in (target, f"{target}{mark}timeout=30", f"{target}{mark}{TOKEN}"):
        found = operation(method, given)
        assert found is not None, given
        assert found.kind is kind


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("PUT", "/box/b?comp=page"),
        ("PUT", "/box/b?comp=appendblock"),
        ("PUT", "/box/b?comp=incrementalcopy"),
        ("POST", "/box/b?comp=query"),
        ("POST", "/?comp=batch"),
        ("POST", "/box?restype=container&comp=batch"),
        ("GET", "/box/b?comp=pagelist"),
        ("PUT", "/box/b?comp=seal"),
        ("PUT", "/box/b?comp=anything-new"),
        ("PUT", "/blob-in-the-root"),
        ("GET", "/blob-in-the-root"),
        ("PATCH", "/box/b"),
        ("POST", "/box/b"),
        ("PUT", "/box/b?action=append&position=0"),
        ("PUT", "/box/b?resource=file"),
        ("GET", "/box/b?anything=1"),
        ("PUT", "/box/b?restype=container"),
        ("PUT", "/box/b?comp=block&blockid=QQ&snapshot=2026"),
    ],
)
def test_what_is_refused(method: str, target: str) -> None:
    assert operation(method, target) is None


def test_a_copy_is_a_put_without_a_type() -> None:
    assert operation("PUT", "/box/b", "x-ms-copy-source") is COPY
    assert operation("PUT", "/box/b", "x-ms-copy-source", "x-ms-requires-sync") is COPY
    assert operation("PUT", "/box/b", "x-ms-copy-source", "x-ms-blob-type") is None, "Put Blob From URL"
    assert operation("PUT", "/box/b?comp=block&blockid=QQ", "x-ms-copy-source") is None
    assert operation("PUT", "/box/b?comp=blocklist", "x-ms-copy-source") is None


@pytest.mark.parametrize(
    "field",
    ["x-ms-structured-body", "x-ms-page-write", "x-ms-blob-content-length", "x-ms-source-range",
     "x-ms-copy-source-authorization", "x-ms-source-content-md5"],
)  # fmt: skip
def test_fields_that_make_it_another_operation(field: str) -> None:
    for method, target in (("PUT", "/box/b"), ("GET", "/box/b"), ("PUT", "/box/b?comp=block&blockid=QQ")):
        assert operation(method, target) is not None
        assert operation(method, target, field) is None


def test_documents_have_a_root_and_nothing_else_has() -> None:
    assert all(bool(found.root) == (found.kind is Kind.DOCUMENT) for found in ROUTES.values())


def test_block_blobs() -> None:
    assert is_block_blob("BlockBlob")
    assert is_block_blob("blockblob")
    assert not any(map(is_block_blob, (None, "", "PageBlob", "AppendBlob")))
