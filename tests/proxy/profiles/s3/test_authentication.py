"""Signatures by an independent signer (s3_signer.py), and everything that can be wrong in them."""

from dataclasses import replace

import msgspec
import pytest

from proxy import refusals
from proxy.messages.message import Fields, RequestHead
from proxy.profiles.s3.authentication import MAX_EXPIRES_S, Standing, authenticate
from proxy.refusals import Refusal, RefusedError
from proxy.vault.model import Secrets, UpstreamCredential, VaultError
from tests.proxy.profiles.s3.s3_signer import ACCESS_KEY, HOST, SECRET, head, presign, sign, stamp

NOW_S = 1_800_000_000.0


def credential(
    secrets: Secrets | None = None, *, not_after_s: float | None = None, opens: bool = True
) -> UpstreamCredential:
    text = msgspec.json.encode(secrets or Secrets(client_secret=SECRET))
    return UpstreamCredential(
        access_key=ACCESS_KEY,
        upstream_access_key=ACCESS_KEY,
        not_after_s=not_after_s,
        created_at_s=0,
        sealed=text,
        opener=lambda sealed: sealed if opens else None,
    )


VAULT = {ACCESS_KEY: credential()}


def refused(request: RequestHead, *, now_s: float = NOW_S) -> Refusal:
    with pytest.raises(RefusedError) as caught:
        authenticate(request, VAULT, now_s=now_s)
    return caught.value.refusal


def changed(request: RequestHead, **fields: str | None) -> RequestHead:
    """*request* with header fields exchanged, added or (None) removed; `_` in names stands for `-`."""
    wanted = {name.replace("_", "-"): value for name, value in fields.items()}
    kept = [
        (name, value) for name in request.fields for value in request.fields.all(name) if name not in wanted
    ]
    kept += [(name, value) for name, value in wanted.items() if value is not None]
    return replace(request, fields=Fields([(name.encode(), value.encode()) for name, value in kept]))


@pytest.mark.parametrize(
    "target", ["/", "/bucket/a%20b?acl", "/b/k?list-type=2&prefix=a%2Fb&x=%7E", "/b//k/../j"]
)
def test_a_signed_request_is_its_senders(target: str) -> None:
    found = authenticate(sign("GET", target, now_s=NOW_S), VAULT, now_s=NOW_S)
    assert (found.standing, found.region, found.presigned) == (Standing.VERIFIED, "us-east-1", False)
    assert found.path_as_sent
    found = authenticate(presign("GET", target, now_s=NOW_S), VAULT, now_s=NOW_S)
    assert (found.standing, found.presigned, found.payload) == (Standing.VERIFIED, True, None)


def test_a_path_that_was_encoded_for_the_signature_only() -> None:
    request = sign("GET", "/b/a=(1)", now_s=NOW_S, signed_path="/b/a%3D%281%29")
    found = authenticate(request, VAULT, now_s=NOW_S)
    assert (found.standing, found.path_as_sent) == (Standing.VERIFIED, False)
    other = sign("GET", "/b/a=(1)", now_s=NOW_S, signed_path="/b/a%3D%282%29")
    assert refused(other) == refusals.SIGNATURE_MISMATCH


def test_nothing_of_the_secret_is_shown() -> None:
    found = authenticate(sign("GET", "/", now_s=NOW_S), VAULT, now_s=NOW_S)
    assert SECRET not in repr(found)
    assert found.chunks is not None
    assert found.chunks.key.hex() not in repr(found)
    assert repr(found.chunks.key) not in repr(found.chunks)


GOOD = sign("PUT", "/bucket/key?x=1", now_s=NOW_S, headers={"x-amz-acl": "private", "range": "bytes=0-1"})


@pytest.mark.parametrize(
    "request_",
    [
        replace(GOOD, method="DELETE"),
        replace(GOOD, target="/bucket/kez?x=1"),
        replace(GOOD, target="/bucket/key?x=2"),
        replace(GOOD, target="/bucket/key?x=1&y=2"),
        replace(GOOD, target="/bucket/key"),
        replace(GOOD, host="other.example.com"),
        changed(GOOD, x_amz_acl="public-read"),
        changed(GOOD, x_amz_acl="private,public-read"),
        changed(GOOD, range="bytes=0-2"),
        changed(GOOD, range=None),
        changed(GOOD, x_amz_content_sha256="UNSIGNED-PAYLOAD"),
        changed(GOOD, x_amz_date=stamp(NOW_S + 1)),
        sign("PUT", "/bucket/key", now_s=NOW_S, secret=SECRET + "x"),
    ],
)
def test_whatever_was_signed_and_is_changed_is_refused(request_: RequestHead) -> None:
    assert refused(request_) == refusals.SIGNATURE_MISMATCH


def test_a_second_value_of_a_signed_header_is_refused() -> None:
    fields = [(name.encode(), value.encode()) for name in GOOD.fields for value in GOOD.fields.all(name)]
    doubled = replace(GOOD, fields=Fields([*fields, (b"x-amz-acl", b"public-read")]))
    assert refused(doubled) == refusals.SIGNATURE_MISMATCH


@pytest.mark.parametrize("index", [0, 20, 63])
def test_one_digit_of_the_signature(index: int) -> None:
    text = GOOD.fields.first("authorization") or ""
    at = len(text) - 64 + index
    other = "0" if text[at] != "0" else "1"
    wrong = changed(GOOD, authorization=text[:at] + other + text[at + 1 :])
    assert refused(wrong) == refusals.SIGNATURE_MISMATCH


def test_headers_that_must_be_signed() -> None:
    assert refused(sign("GET", "/", now_s=NOW_S, unsigned={"x-amz-acl": "x"})) == refusals.HEADERS_NOT_SIGNED
    assert (
        refused(presign("GET", "/", now_s=NOW_S, unsigned={"x-amz-acl": "x"})) == refusals.HEADERS_NOT_SIGNED
    )
    fine = presign("GET", "/", now_s=NOW_S, unsigned={"x-amz-content-sha256": "UNSIGNED-PAYLOAD"})
    assert authenticate(fine, VAULT, now_s=NOW_S).standing is Standing.VERIFIED
    text = (sign("GET", "/", now_s=NOW_S).fields.first("authorization") or "").replace("host;", "")
    assert refused(changed(sign("GET", "/", now_s=NOW_S), authorization=text)) == refusals.HEADERS_NOT_SIGNED


@pytest.mark.parametrize("offset_s", [-301, 301, -3600, 3600 * 23])
def test_a_replay_beyond_the_skew(offset_s: int) -> None:
    request = sign("GET", "/", now_s=NOW_S)
    assert refused(request, now_s=NOW_S - offset_s) == refusals.REQUEST_SKEWED
    assert authenticate(request, VAULT, now_s=NOW_S + 300).standing is Standing.VERIFIED
    assert authenticate(request, VAULT, now_s=NOW_S - 300).standing is Standing.VERIFIED


def test_a_presigned_url_ends() -> None:
    url = presign("GET", "/b/k", now_s=NOW_S, expires_s=60)
    assert authenticate(url, VAULT, now_s=NOW_S + 59.9).standing is Standing.VERIFIED
    assert refused(url, now_s=NOW_S + 60) == refusals.SIGNATURE_EXPIRED
    assert refused(url, now_s=NOW_S - 301) == refusals.SIGNATURE_EXPIRED
    week = presign("GET", "/b/k", now_s=NOW_S, expires_s=MAX_EXPIRES_S)
    assert authenticate(week, VAULT, now_s=NOW_S + 600_000).standing is Standing.VERIFIED
    for expires_s in (0, MAX_EXPIRES_S + 1):
        bad = presign("GET", "/b/k", now_s=NOW_S, expires_s=expires_s)
        assert refused(bad) == refusals.AUTHORIZATION_MALFORMED


def test_a_presigned_url_is_changed() -> None:
    url = presign("GET", "/b/k", now_s=NOW_S)
    for target in (
        url.target.replace("/b/k", "/b/l"),
        url.target.replace("Expires=60", "Expires=61"),
        url.target + "&versionId=1",
    ):
        assert refused(replace(url, target=target)) == refusals.SIGNATURE_MISMATCH
    twice = url.target.replace("X-Amz-Expires=60", "X-Amz-Expires=60&x-amz-expires=600")
    assert refused(replace(url, target=twice)) == refusals.AUTHORIZATION_MALFORMED


DAY = stamp(NOW_S)[:8]
V4 = "AWS4-HMAC-SHA256"


@pytest.mark.parametrize(
    ("authorization", "refusal"),
    [
        ("AWS AKID:c2lnbmF0dXJl", refusals.SIGNATURE_VERSION),
        ("AWS4-ECDSA-P256-SHA256 Credential=a/b/c", refusals.SIGNATURE_VERSION),
        ("Basic dGVzdA==", refusals.SIGNATURE_VERSION),
        ("", refusals.SIGNATURE_VERSION),
        ("AWS4-HMAC-SHA256", refusals.AUTHORIZATION_MALFORMED),
        (V4 + " " + "Credential=a" * 2000, refusals.AUTHORIZATION_MALFORMED),
        (
            f"{V4} Credential=k/{DAY}/r/s3/aws4_request, SignedHeaders=host",
            refusals.AUTHORIZATION_MALFORMED,
        ),
        (
            f"{V4} Credential=k/{DAY}/r/ec2/aws4_request, SignedHeaders=host, Signature={'0' * 64}",
            refusals.AUTHORIZATION_MALFORMED,
        ),
        (
            f"{V4} Credential=k/20200101/r/s3/aws4_request, SignedHeaders=host, Signature={'0' * 64}",
            refusals.AUTHORIZATION_MALFORMED,
        ),
        (
            f"{V4} Credential=k/{DAY}/r/s3/aws4_request, SignedHeaders=x;host, Signature={'0' * 64}",
            refusals.AUTHORIZATION_MALFORMED,
        ),
        (
            f"{V4} Credential=k/{DAY}/r/s3/aws4_request, SignedHeaders=host, Signature={'0' * 63}",
            refusals.AUTHORIZATION_MALFORMED,
        ),
        (
            f"{V4} Credential=k/{DAY}/r/s3/aws4_request, SignedHeaders=host, SignedHeaders=host",
            refusals.AUTHORIZATION_MALFORMED,
        ),
    ],
)
def test_other_authorizations(authorization: str, refusal: Refusal) -> None:
    assert refused(changed(GOOD, authorization=authorization)) == refusal


def test_other_presignatures() -> None:
    assert (
        refused(head("GET", "/b/k?AWSAccessKeyId=a&Signature=b&Expires=1", {})) == refusals.SIGNATURE_VERSION
    )
    url = presign("GET", "/b/k", now_s=NOW_S)
    v4a = replace(url, target=url.target.replace("AWS4-HMAC-SHA256", "AWS4-ECDSA-P256-SHA256"))
    assert refused(v4a) == refusals.SIGNATURE_VERSION
    for gone in ("X-Amz-Credential", "X-Amz-Date", "X-Amz-Expires", "X-Amz-SignedHeaders", "X-Amz-Signature"):
        rest = "&".join(
            part for part in url.target.split("?")[1].split("&") if not part.startswith(gone + "=")
        )
        assert refused(replace(url, target="/b/k?" + rest)) == refusals.AUTHORIZATION_MALFORMED, gone


def test_two_kinds_of_signature_at_once() -> None:
    both = changed(presign("GET", "/b/k", now_s=NOW_S), authorization=GOOD.fields.first("authorization"))
    assert refused(both) == refusals.AUTHORIZATION_MALFORMED


@pytest.mark.parametrize("gone", ["x_amz_date", "x_amz_content_sha256"])
def test_what_a_header_signature_needs(gone: str) -> None:
    assert refused(changed(GOOD, **{gone: None})) == refusals.AUTHORIZATION_MALFORMED


def test_session_tokens_cannot_be_verified() -> None:
    with_token = sign("GET", "/", now_s=NOW_S, headers={"x-amz-security-token": "t"})
    assert refused(with_token) == refusals.SESSION_TOKEN
    url = presign("GET", "/?X-Amz-Security-Token=t", now_s=NOW_S)
    assert refused(url) == refusals.SESSION_TOKEN


def test_who_is_not_in_the_vault_is_not_judged() -> None:
    for request in (
        GOOD,
        presign("GET", "/b/k", now_s=0),
        sign("GET", "/", now_s=NOW_S, secret="wrong-secret"),
    ):
        found = authenticate(request, {}, now_s=NOW_S)
        assert (found.standing, found.credential, found.chunks) == (Standing.UNJUDGED, None, None)
    assert authenticate(head("GET", "/b/k", {}), VAULT, now_s=NOW_S).standing is Standing.ANONYMOUS


def test_a_credential_that_has_ended_or_does_not_open() -> None:
    with pytest.raises(RefusedError) as caught:
        authenticate(GOOD, {ACCESS_KEY: credential(not_after_s=NOW_S)}, now_s=NOW_S)
    assert caught.value.refusal == refusals.ACCESS_KEY_UNKNOWN
    with pytest.raises(VaultError):
        authenticate(GOOD, {ACCESS_KEY: credential(opens=False)}, now_s=NOW_S)


def test_the_host_is_what_the_client_sent() -> None:
    request = sign("GET", "/b/k", now_s=NOW_S, host="proxy.corp.example:8443")
    assert authenticate(request, VAULT, now_s=NOW_S).standing is Standing.VERIFIED
    assert refused(replace(request, host=HOST)) == refusals.SIGNATURE_MISMATCH
