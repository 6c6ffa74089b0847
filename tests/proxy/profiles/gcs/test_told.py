"""What clients tell of objects: what passes, what does not go up, and the mark."""

import json
from typing import Any

import pytest

from proxy import refusals
from proxy.profiles.gcs.told import (
    MARK,
    UNKNOWN_SIZE,
    changes_metadata,
    is_coded,
    marked_size,
    settings_document,
    told_metadata,
)
from proxy.refusals import RefusedError


def told(document: dict[str, Any], **more: Any) -> Any:
    return json.loads(told_metadata(json.dumps(document).encode(), **more).document)


def test_what_is_of_ciphertext_does_not_go_up() -> None:
    document = {"name": "o", "size": "5", "crc32c": "AAAAAA==", "md5Hash": None, "contentType": "a/b"}
    assert told(document) == {"name": "o", "contentType": "a/b"}
    assert told_metadata(json.dumps(document).encode()).said.crc32c == bytes(4)


@pytest.mark.parametrize(
    ("document", "refusal"),
    [
        (b"[]", refusals.MALFORMED_DOCUMENT),
        (b"x", refusals.MALFORMED_DOCUMENT),
        (b'{"name": "o"} x', refusals.MALFORMED_DOCUMENT),
        (b'{"name": "o", "name": "p"}', refusals.MALFORMED_DOCUMENT),
        (b'{"content": "secret"}', refusals.MALFORMED_DOCUMENT),
        (b'{"metadata": "secret"}', refusals.MALFORMED_DOCUMENT),
        (b'{"metadata": ["a"]}', refusals.MALFORMED_DOCUMENT),
        (b'{"contentEncoding": "gzip"}', refusals.CONTENT_CODING),
        (b'{"contentEncoding": 5}', refusals.CONTENT_CODING),
        (b'{"crc32c": "x"}', refusals.INVALID_DIGEST),
    ],
)
def test_what_is_refused(document: bytes, refusal: refusals.Refusal) -> None:
    with pytest.raises(RefusedError) as caught:
        told_metadata(document)
    assert caught.value.refusal is refusal


@pytest.mark.parametrize("nothing", [b"", b"  ", b"null", b" null\n"])
def test_nothing_stays_nothing(nothing: bytes) -> None:
    assert told_metadata(nothing).document == nothing
    assert json.loads(told_metadata(nothing, mark="5").document) == {"metadata": {MARK: "5"}}


def test_the_mark_is_ours_alone() -> None:
    assert told({"metadata": {"a": "b", MARK: "9"}}) == {"metadata": {"a": "b"}}
    assert told({"metadata": {MARK: "9"}}, mark="5") == {"metadata": {MARK: "5"}}
    assert told({"name": "o"}, mark=UNKNOWN_SIZE) == {"name": "o", "metadata": {MARK: "?"}}
    assert told({"metadata": {"a": None}}, mark="5") == {"metadata": {"a": None, MARK: "5"}}


def test_what_is_cleared_is_cleared_but_for_the_mark() -> None:
    assert told({"metadata": None}) == {"metadata": None}
    assert told({"metadata": None}, mark="5", entries=("a", "b")) == {
        "metadata": {"a": None, "b": None, MARK: "5"}
    }
    # What the client does not speak of it does not clear.
    assert told({"name": "o"}, mark="5", entries=("a", "b")) == {"name": "o", "metadata": {MARK: "5"}}


def test_what_changes_metadata() -> None:
    assert changes_metadata(b'{"metadata": {}}', merges=True)
    assert changes_metadata(b'{"metadata": null}', merges=True)
    assert not changes_metadata(b'{"contentType": "a/b"}', merges=True)
    assert changes_metadata(b'{"contentType": "a/b"}', merges=False)
    assert not changes_metadata(b'{"name": "o", "bucket": "b"}', merges=False)
    assert not changes_metadata(b"{}", merges=False)


def test_settings_and_marks() -> None:
    assert list(settings_document(b'{"anything": {"goes": [1]}}').names()) == ["anything"]
    with pytest.raises(RefusedError):
        settings_document(b"null")
    assert [marked_size(mark) for mark in (None, "", "?", "5", "0", "-1", "5 ", "9" * 16)] == [
        None, None, None, 5, 0, None, None, None,
    ]  # fmt: skip
    assert [is_coded(one) for one in (None, "", "identity", " Identity ", "gzip", 0)] == [
        False, False, False, False, True, True,
    ]  # fmt: skip
