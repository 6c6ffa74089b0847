"""Which operation a request is; what is none, and what could be read as another, is refused."""

import random

import pytest

from proxy import refusals
from proxy.messages.message import Fields
from proxy.profiles.gcs.routes import (
    Kind,
    Operation,
    content_target,
    metadata_target,
    operation_of,
    session_id,
)
from proxy.refusals import Refusal, RefusedError

API = "/storage/v1"
UP = "/upload/storage/v1"


def find(method: str, target: str, **fields: str) -> Operation:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()]
    return operation_of(method, target, Fields(raw))


def refused(method: str, target: str, **fields: str) -> Refusal:
    with pytest.raises(RefusedError) as caught:
        find(method, target, **fields)
    return caught.value.refusal


@pytest.mark.parametrize(
    ("method", "target", "kind"),
    [
        ("POST", f"{UP}/b/box/o?uploadType=media&name=a", Kind.MEDIA),
        ("POST", f"{UP}/b/box/o?uploadType=multipart", Kind.RELATED),
        ("POST", f"{UP}/b/box/o?uploadType=resumable&name=a%2Fb", Kind.START),
        ("PUT", f"{UP}/b/box/o?uploadType=resumable&upload_id=x", Kind.SESSION),
        ("POST", f"{UP}/b/box/o?uploadType=resumable&upload_id=x", Kind.SESSION),
        ("PUT", f"{UP}/b/box/o?upload_id=x", Kind.SESSION),
        ("DELETE", f"{UP}/b/box/o?uploadType=resumable&upload_id=x", Kind.CANCEL),
        ("GET", f"{API}/b/box/o/a%2Fb?alt=media", Kind.READ),
        ("HEAD", f"{API}/b/box/o/a?alt=media", Kind.READ),
        ("GET", f"/download{API}/b/box/o/a?alt=media&generation=5", Kind.READ),
        ("GET", f"{API}/b/box/o/a", Kind.OBJECT),
        ("GET", f"{API}/b/box/o/a?alt=json&fields=size", Kind.OBJECT),
        ("GET", f"{API}/b/box/o?prefix=x", Kind.LIST),
        ("PATCH", f"{API}/b/box/o/a", Kind.CHANGE),
        ("PUT", f"{API}/b/box/o/a", Kind.CHANGE),
        ("DELETE", f"{API}/b/box/o/a?ifGenerationMatch=1", Kind.DELETE),
        ("POST", f"{API}/b/box/o/a/copyTo/b/other/o/b", Kind.COPY),
        ("POST", f"{API}/b/box/o/a/rewriteTo/b/other/o/b?rewriteToken=x", Kind.REWRITE),
        ("POST", f"{API}/b/box/o/a/moveTo/o/b", Kind.COPY),
        ("POST", f"{API}/b/box/o/a/restore?generation=3", Kind.COPY),
        ("GET", f"{API}/b", Kind.SETTINGS),
        ("PATCH", f"{API}/b/box", Kind.SETTINGS),
        ("PUT", f"{API}/b/box/iam", Kind.SETTINGS),
        ("GET", f"{API}/b/box/iam/testPermissions?permissions=a&permissions=b", Kind.SETTINGS),
        ("POST", f"{API}/b/box/o/a/acl", Kind.SETTINGS),
        ("GET", f"{API}/projects/p/serviceAccount", Kind.SETTINGS),
        ("OPTIONS", f"{API}/b/box/o", Kind.OPTIONS),
    ],
)
def test_operations(method: str, target: str, kind: Kind) -> None:
    assert find(method, target).kind is kind


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", f"{API}/b/box/o?uploadType=media"),  # the upload's type at the other address
        ("POST", f"{UP}/b/box/o"),
        ("POST", f"{UP}/b/box/o?uploadType=other"),
        ("PUT", f"{UP}/b/box/o?uploadType=media"),
        ("PUT", f"{UP}/b/box/o?uploadType=media&upload_id=x"),
        ("PATCH", f"{UP}/b/box/o?upload_id=x"),
        ("PUT", f"{UP}/b/box/o/a?uploadType=media"),
        ("POST", f"{API}/b/box/o/a/compose"),
        ("POST", f"{API}/b/box/o/watch"),
        ("POST", f"{API}/b/box/o/bulkRestore"),
        ("POST", f"{API}/b/box/o/a"),
        ("GET", f"{API}/b/box/o/a?alt=other"),
        ("GET", f"{API}/b/box/o?alt=media"),
        ("PATCH", f"{API}/b/box/o/a?alt=media"),
        ("GET", f"/download{API}/b/box/o/a"),
        ("GET", f"/download{API}/b/box/o?alt=media"),
        ("GET", f"/download{API}/x/box/o/a?alt=media"),
        ("GET", f"/download{API}/b/box/x/a?alt=media"),
        ("GET", f"/download{API}/b/box/o/a/b?alt=media"),
        ("POST", "/batch/storage/v1"),
        ("POST", "/batch"),
        ("PUT", "/box/a"),
        ("POST", "/box/a?uploads"),
        ("POST", "/resumable/upload/storage/v1/b/box/o?uploadType=resumable"),
        ("POST", "/google.storage.v2.Storage/WriteObject"),
        ("GET", f"{API}/b/box/o/a/b?alt=media"),
        ("GET", f"{API}/b/box/o/../o/a?alt=media"),
        ("GET", f"{API}/b/box/o/%2e%2E?alt=media"),
        ("GET", f"{API}/b/box/o/a%?alt=media"),
        ("GET", f"{API}/b/box/o/a\\b?alt=media"),
        ("GET", f"{API}//b/box/o"),
        ("GET", f"{API}/b/box/o/"[:-1] + "/" + "?alt=media"),
        ("GET", f"{API}/b/box/o/a?$alt=media"),
        ("GET", f"{API}/b/box/o/a?callback=f"),
        ("POST", f"{UP}/b/box/o?uploadType=media&upload_protocol=raw"),
        ("POST", f"{UP}/b/box/o?uploadType=media&Upload_Protocol=raw"),
        ("POST", f"{UP}/b/box/o?uploadType=media&%24httpHeaders=Content-Encoding:gzip"),
        ("POST", f"{UP}/b/box/o?uploadType=media&$uploadType=resumable"),
        ("GET", f"{API}/b/box/o/a?$httpMethod=DELETE"),
        ("POST", f"{UP}/b/box/o?uploadType=media&%24upload_protocol=raw"),
    ],
)
def test_no_operations(method: str, target: str) -> None:
    assert refused(method, target) is refusals.UNKNOWN_ROUTE


def test_what_could_be_read_in_two_ways() -> None:
    for query in (
        "alt=json&alt=media",
        "uploadType=media&uploadType=resumable",
        "name=a&name=b",
        "alt=media;alt=json",
        "upload_id=a&upload_id=b",
        "uploadtype=resumable",
        "uploadType=media&UPLOADTYPE=resumable",
    ):
        assert refused("POST", f"{UP}/b/box/o?{query}") is refusals.BAD_MESSAGE, query
    for name in ("x_http_method_override", "x_http_method", "x_method_override"):
        assert refused("GET", f"{API}/b/box/o", **{name: "DELETE"}) is refusals.UNKNOWN_ROUTE
    assert (
        refused("POST", f"{UP}/b/box/o?uploadType=media", x_goog_upload_protocol="resumable")
        is refusals.UNKNOWN_ROUTE
    )


def test_names_in_targets() -> None:
    assert content_target("box", "a b/\u00e4?", None) == f"{API}/b/box/o/a%20b%2F%C3%A4%3F?alt=media"
    assert content_target("box", "o", "5").endswith("?alt=media&generation=5")
    assert metadata_target(find("PATCH", f"{API}/b/box/o/a%2Fb?generation=7&fields=x&userProject=p%26q")) == (
        f"{API}/b/box/o/a%2Fb?generation=7&userProject=p%26q&fields=metadata"
    )
    copied = find("POST", f"{API}/b/box/o/a/rewriteTo/b/c/o/d?sourceGeneration=8&generation=9")
    assert metadata_target(copied) == f"{API}/b/box/o/a?generation=8&fields=metadata"


def test_ids_of_sessions() -> None:
    place = f"{UP}/b/box/o"
    assert session_id(f"{place}?uploadType=resumable&upload_id=A-_b", "box") == "A-_b"
    for target in (
        f"{place}?uploadType=resumable",
        f"{place}?upload_id=",
        f"{place}/x?upload_id=a",
        f"{API}/b/box/o?upload_id=a",
        f"{place}?upload_id=a&upload_id=b",
    ):
        assert session_id(target, "box") is None, target
    assert session_id(f"{place}?upload_id=a", "other") is None


def test_any_target_is_an_operation_or_is_refused() -> None:
    """And no upload is taken for something whose body passes."""
    dice = random.Random(2)
    pieces = (
        API,
        UP,
        "/download",
        "/b",
        "/box",
        "/o",
        "/a",
        "?",
        "&",
        "alt=media",
        "uploadType=media",
        "upload_id=x",
        "/acl",
        "%2F",
        "..",
        "=",
        "/iam",
        ";",
    )
    for _ in range(20_000):
        target = "/" + "".join(dice.choice(pieces) for _ in range(dice.randrange(1, 9))).lstrip("/")
        try:
            found = find(dice.choice(("GET", "POST", "PUT", "PATCH", "DELETE")), target)
        except RefusedError:
            continue
        assert found.kind in Kind
        if "uploadType" in target.partition("?")[2] and "uploadType" in found.parameters:
            assert found.kind in {Kind.MEDIA, Kind.RELATED, Kind.START, Kind.SESSION, Kind.CANCEL}
