"""What stands in the query for a header field goes by the rules for header fields."""

from typing import Final
from urllib.parse import quote

import pytest

from proxy.profiles.s3.hoisted import gone_of, hoisted
from proxy.profiles.s3.routes import Kind
from proxy.refusals import RefusedError

NONE: Final = frozenset[str]()


def gone(kind: Kind, *names: str, keeps: bool = False) -> frozenset[str]:
    return gone_of(dict.fromkeys(names, "v"), kind, keeps_metadata=keeps)


def test_what_is_hoisted_is_told_by_its_name_in_any_case() -> None:
    given = {"X-Amz-Acl": "private", "X-Amz-Signature": "s", "x-id": "PutObject", "x-amz-META-a": "1"}
    assert hoisted(given) == {"x-amz-acl": "private", "x-amz-meta-a": "1"}


@pytest.mark.parametrize("kind", [Kind.WRITE, Kind.WRITE_PART, Kind.CREATE_UPLOAD, Kind.READ, Kind.HEAD])
@pytest.mark.parametrize(
    "name",
    [
        "x-amz-checksum-crc32",
        "x-amz-checksum-of-a-kind-to-come",
        "x-amz-checksum-algorithm",
        "x-amz-checksum-mode",
        "x-amz-sdk-checksum-algorithm",
    ],
)
def test_checksums_never_go_up(kind: Kind, name: str) -> None:
    assert gone(kind, name, "x-amz-acl") == {name}


@pytest.mark.parametrize(
    "name",
    [
        "x-amz-acl",
        "x-amz-grant-read",
        "x-amz-meta-anything",
        "x-amz-request-payer",
        "x-amz-storage-class",
        "x-amz-tagging",
        "x-amz-user-agent",
    ],
)
def test_settings_and_metadata_stay(name: str) -> None:
    assert gone(Kind.WRITE, name) == NONE


@pytest.mark.parametrize(
    "name",
    [
        "x-amz-copy-source",
        "x-amz-copy-source-range",
        "x-amz-decoded-content-length",
        "x-amz-metadata-directive",
        "x-amz-mp-object-size",
        "x-amz-rename-source",
        "x-amz-server-side-encryption-customer-key",
        "x-amz-something-to-come",
        "x-amz-trailer",
        "x-amz-write-offset-bytes",
    ],
)
@pytest.mark.parametrize("kind", list(Kind))
def test_what_changes_a_request_or_is_not_known_is_refused(name: str, kind: Kind) -> None:
    with pytest.raises(RefusedError, match="unknown-route"):
        gone(kind, name)


@pytest.mark.parametrize("kind", [Kind.COPY, Kind.COPY_PART])
def test_copies_take_nothing_from_the_query(kind: Kind) -> None:
    assert gone(kind) == NONE
    with pytest.raises(RefusedError, match="unknown-route"):
        gone(kind, "x-amz-acl")


@pytest.mark.parametrize("kind", [Kind.COMPLETE_UPLOAD, Kind.DOCUMENT, Kind.FORM])
def test_a_checksum_that_nobody_would_compare_is_refused(kind: Kind) -> None:
    with pytest.raises(RefusedError, match="unknown-route"):
        gone(kind, "x-amz-checksum-sha256")


def test_digests_in_metadata_are_taken_out_unless_they_are_to_stay() -> None:
    assert gone(Kind.WRITE, "x-amz-meta-md5chksum", "x-amz-meta-mtime") == {"x-amz-meta-md5chksum"}
    assert gone(Kind.WRITE, "x-amz-meta-md5chksum", keeps=True) == NONE
    assert gone(Kind.WRITE, "x-amz-meta-" + quote("é") + "-sha256") != NONE
