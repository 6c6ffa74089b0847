"""The vectors are the examples of the S3 API reference: header signatures, and query parameters."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.messages.sigv4 import (
    EMPTY_SHA256,
    Scope,
    amz_date,
    canonical_path,
    canonical_query,
    canonical_request,
    collapsed,
    instant_s,
    signature,
    signing_key,
    sorted_once,
    string_to_sign,
)

SECRET = b"wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
SCOPE = Scope("20130524", "us-east-1", "s3")
DATE = "20130524T000000Z"
HOST = ("host", "examplebucket.s3.amazonaws.com")
WHEN = ("x-amz-date", DATE)
NOTHING = ("x-amz-content-sha256", EMPTY_SHA256)

GET_RANGE = (
    "GET", "/test.txt", "", [HOST, ("range", "bytes=0-9"), NOTHING, WHEN],
    "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
)  # fmt: skip
PUT = (
    "PUT", "/test$file.text", "",
    [
        ("date", "Fri, 24 May 2013 00:00:00 GMT"), HOST,
        ("x-amz-content-sha256", hashlib.sha256(b"Welcome to Amazon S3.").hexdigest()), WHEN,
        ("x-amz-storage-class", "REDUCED_REDUNDANCY"),
    ],
    "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
)  # fmt: skip
LIFECYCLE = (
    "GET", "/", "lifecycle", [HOST, NOTHING, WHEN],
    "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
)  # fmt: skip
LISTING = (
    "GET", "/", "prefix=J&max-keys=2", [HOST, NOTHING, WHEN],
    "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
)  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path", "query", "headers", "expected"), [GET_RANGE, PUT, LIFECYCLE, LISTING]
)
def test_the_documented_requests_have_the_documented_signatures(
    method: str, path: str, query: str, headers: list[tuple[str, str]], expected: str
) -> None:
    canonical = canonical_request(
        method=method,
        path=canonical_path(path),
        query=canonical_query(query),
        signed_headers=";".join(name for name, _ in headers),
        headers=headers,
        payload=dict(headers)["x-amz-content-sha256"],
    )
    assert signature(signing_key(SECRET, SCOPE), string_to_sign(DATE, SCOPE, canonical)) == expected


def test_the_documented_presigned_url() -> None:
    key_id = "AKIA" + "IOSFODNN7EXAMPLE"
    query = (
        f"X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential={key_id}%2F20130524%2Fus-east-1%2Fs3%2Faws4_request"
        "&X-Amz-Date=20130524T000000Z&X-Amz-Expires=86400&X-Amz-SignedHeaders=host&X-Amz-Signature=00"
    )
    canonical = canonical_request(
        method="GET",
        path="/test.txt",
        query=canonical_query(query, without=lambda name: name == "X-Amz-Signature"),
        signed_headers="host",
        headers=[HOST],
        payload="UNSIGNED-PAYLOAD",
    )
    assert (
        signature(signing_key(SECRET, SCOPE), string_to_sign(DATE, SCOPE, canonical))
        == "aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"
    )


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/a b", "/a%20b"),
        ("/a%20b", "/a%20b"),
        ("/a+b", "/a%2Bb"),
        ("/%7euser/(x)", "/~user/%28x%29"),
        ("/a//b/../c", "/a//b/../c"),
        ("/\u00e4", "/%C3%A4"),
        ("/\udcff%fe", "/%FF%FE"),
        ("/100%", "/100%25"),
    ],
)
def test_a_path_is_encoded_once_and_not_normalized(path: str, expected: str) -> None:
    assert canonical_path(path) == expected
    assert canonical_path(expected) == expected


@pytest.mark.parametrize(
    ("query", "plus_is_space", "expected"),
    [
        ("b&a", False, "a=&b="),
        ("a=2&a=1&A=3", False, "A=3&a=1&a=2"),
        ("a=b=c", False, "a=b%3Dc"),
        ("a=+", False, "a=%2B"),
        ("a=+", True, "a=%20"),
        ("&&a=1&", False, "a=1"),
        ("a%2Fb=%C3%A4&a/b=x", False, "a%2Fb=%C3%A4&a%2Fb=x"),
        ("", False, ""),
    ],
)
def test_parameters_are_sorted_and_encoded_once(query: str, plus_is_space: bool, expected: str) -> None:
    assert canonical_query(query, plus_is_space=plus_is_space) == expected


def test_parameters_sort_by_name_before_value() -> None:
    # Sorting "name=value" as one string would put a-b before a: "-" is less than "=".
    assert canonical_query("a-b=1&a=2") == "a=2&a-b=1"


def test_a_listed_header_that_is_not_there_is_named() -> None:
    with pytest.raises(KeyError, match="x-amz-acl"):
        canonical_request(
            method="GET", path="/", query="", signed_headers="host;x-amz-acl", headers=[HOST], payload=""
        )


def test_bytes_that_are_no_utf8_are_hashed_as_they_came() -> None:
    canonical = canonical_request(
        method="GET", path="/", query="", signed_headers="x", headers=[("x", "\udcff")], payload="p"
    )
    assert b"x:\xff\n" in canonical


@pytest.mark.parametrize(
    ("value", "expected"), [("  a  b ", "a b"), ("a\t b", "a b"), ("a b", "a b"), ("", "")]
)
def test_blanks_collapse(value: str, expected: str) -> None:
    assert collapsed(value) == expected


@given(st.integers(0, 4_000_000_000))
def test_dates_go_and_come(now_s: int) -> None:
    assert instant_s(amz_date(now_s)) == now_s


@pytest.mark.parametrize("text", ["", "20130524", "20130524T000000", "20131324T000000Z", "20130524T000000Z "])
def test_other_dates_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        instant_s(text)


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["a", "b"], True), (["b", "a"], False), (["a", "a"], False), ([""], False), ([], False)],
)
def test_lists_rise(names: list[str], expected: bool) -> None:
    assert sorted_once(names) is expected
