"""What leaves is verified by the other half (authentication.py), which has its own independent judge."""

from dataclasses import replace
from urllib.parse import urlsplit

import pytest

from proxy import refusals
from proxy.asking import Outgoing
from proxy.messages.message import Fields, RequestHead
from proxy.messages.sigv4 import EMPTY_SHA256
from proxy.profiles.s3.addressing import Address
from proxy.profiles.s3.authentication import Standing, authenticate
from proxy.profiles.s3.signing import Resigner, Unchanged, without_authentication
from proxy.refusals import RefusedError
from proxy.vault.model import Secrets
from tests.proxy.profiles.s3.s3_signer import ACCESS_KEY, SECRET, head, presign, sign
from tests.proxy.profiles.s3.test_authentication import NOW_S, credential

UPSTREAM = "upstream.example.com:8443"
LATER_S = NOW_S + 4000
PATH_STYLE = Address(bucket="b", key="k", virtual_host=False)
VIRTUAL = Address(bucket="b", key="k", virtual_host=True)
GATEWAY = replace(
    credential(Secrets(client_secret=SECRET, upstream_secret="the-upstream-secret", session_token="TOKEN")),
    upstream_access_key="AKID",
)


def resigner(
    request: RequestHead, *, address: Address = PATH_STYLE, gateway: bool = False, region: str | None = None
) -> Resigner:
    vault = {ACCESS_KEY: GATEWAY if gateway else credential()}
    return Resigner(
        authenticated=authenticate(request, vault, now_s=NOW_S),
        address=address,
        host=UPSTREAM,
        region=region,
        wall_s=lambda: LATER_S,
    )


def leaving(request: RequestHead, **put: str) -> Outgoing:
    fields = [
        (name.encode(), value.encode()) for name in request.fields for value in request.fields.all(name)
    ]
    fields += [(name.replace("_", "-").encode(), value.encode()) for name, value in put.items()]
    return Outgoing(method=request.method, target=request.target, fields=tuple(fields))


def arrived(outgoing: Outgoing) -> RequestHead:
    fields = Fields(outgoing.fields)
    return RequestHead(
        method=outgoing.method, target=outgoing.target, fields=fields, host=fields.sole("host") or ""
    )


PUT = sign(
    "PUT", "/b/k%20k?tagging&x=a%2Fb", now_s=NOW_S, body_hash="STREAMING-UNSIGNED-PAYLOAD-TRAILER",
    headers={
        "x-amz-meta-a": "  b   c ", "x-amz-decoded-content-length": "5",
        "x-amz-trailer": "x-amz-checksum-crc32",
    },
    unsigned={"content-type": "text/plain", "range": "bytes=0-1"},
)  # fmt: skip


@pytest.mark.parametrize("address", [PATH_STYLE, VIRTUAL])
def test_what_leaves_is_signed_for_where_it_goes_and_when(address: Address) -> None:
    made = arrived(resigner(PUT, address=address)(leaving(PUT, content_length="109")))
    found = authenticate(made, {ACCESS_KEY: credential()}, now_s=LATER_S)
    assert found.standing is Standing.VERIFIED
    assert made.host == (UPSTREAM if address is PATH_STYLE else f"b.{UPSTREAM}")
    assert made.target == PUT.target
    assert found.payload == "UNSIGNED-PAYLOAD"
    assert {"host", "content-type", "x-amz-meta-a", "x-amz-date", "x-amz-content-sha256"} == set(
        found.signed_headers
    )
    assert "x-amz-decoded-content-length" not in made.fields
    assert "x-amz-trailer" not in made.fields


def test_a_request_without_a_body_signs_that() -> None:
    request = sign("GET", "/b/k", now_s=NOW_S)
    assert arrived(resigner(request)(leaving(request))).fields.sole("x-amz-content-sha256") == EMPTY_SHA256
    empty = leaving(request, content_length="0")
    assert arrived(resigner(request)(empty)).fields.sole("x-amz-content-sha256") == EMPTY_SHA256
    chunked = leaving(request, transfer_encoding="chunked")
    assert arrived(resigner(request)(chunked)).fields.sole("x-amz-content-sha256") == "UNSIGNED-PAYLOAD"


def test_a_gateway_key_becomes_the_upstream_one() -> None:
    made = arrived(resigner(PUT, gateway=True, region="eu-central-1")(leaving(PUT, content_length="1")))
    text = made.fields.sole("authorization") or ""
    assert "Credential=AKID/20270115/eu-central-1/s3/aws4_request" in text
    assert made.fields.sole("x-amz-security-token") == "TOKEN"
    assert "x-amz-security-token" in text
    assert ACCESS_KEY not in text
    for part in made.fields:
        assert SECRET not in str(made.fields.all(part))
    plain = replace(
        made, fields=Fields([(n.encode(), v.encode()) for n in made.fields for v in made.fields.all(n)])
    )
    upstream_vault = {
        "AKID": replace(credential(Secrets(client_secret="the-upstream-secret")), access_key="AKID")
    }
    # Its own token is what a verifier of ours refuses: take the signature's judge for what it is.
    with pytest.raises(RefusedError) as caught:
        authenticate(plain, upstream_vault, now_s=LATER_S)
    assert caught.value.refusal == refusals.SESSION_TOKEN


def test_a_presigned_url_leaves_as_a_header() -> None:
    url = presign("GET", "/b/k?versionId=3&response-content-type=text%2Fplain", now_s=NOW_S)
    made = arrived(resigner(url)(leaving(url)))
    assert made.target == "/b/k?versionId=3&response-content-type=text%2Fplain"
    assert authenticate(made, {ACCESS_KEY: credential()}, now_s=LATER_S).standing is Standing.VERIFIED


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/a?X-Amz-Signature=x", "/a"),
        ("/a?b&X-Amz-Date=1&c=%20", "/a?b&c=%20"),
        ("/a?", "/a?"),
        ("/a", "/a"),
        ("/a?x-amz-acl=b", "/a?x-amz-acl=b"),
    ],
)
def test_parameters_of_the_signature_go(target: str, expected: str) -> None:
    assert without_authentication(target) == expected


def test_another_target_is_signed_as_what_it_is() -> None:
    request = sign("PUT", "/b/k", now_s=NOW_S)
    made = arrived(
        resigner(request)(replace(leaving(request), method="GET", target="/b/other%20key?attributes"))
    )
    assert authenticate(made, {ACCESS_KEY: credential()}, now_s=LATER_S).standing is Standing.VERIFIED


# Without a secret.


def unchanged(request: RequestHead, *, address: Address = PATH_STYLE) -> Unchanged:
    host = urlsplit(f"//{request.host}").netloc
    return Unchanged(
        authenticated=authenticate(request, {}, now_s=NOW_S),
        head=request,
        address=address,
        host=host.removeprefix("b.") if address.virtual_host else host,
    )


UNSIGNED = "UNSIGNED-PAYLOAD"


def test_what_is_as_it_was_signed_passes() -> None:
    for request in (
        sign("GET", "/b/k", now_s=NOW_S, headers={"range": "bytes=0-1"}),
        sign("PUT", "/b/k", now_s=NOW_S, body_hash=UNSIGNED, unsigned={"content-length": "5"}),
        presign("PUT", "/b/k", now_s=NOW_S, unsigned={"content-length": "5"}),
        head("GET", "/b/k", {}),
    ):
        made = unchanged(request)(leaving(request))
        assert made.target == request.target
        assert Fields(made.fields).all("authorization") == request.fields.all("authorization")
    virtual = sign("GET", "/k", now_s=NOW_S, host="b.s3.example.com")
    assert (
        Fields(unchanged(virtual, address=VIRTUAL)(leaving(virtual)).fields).sole("host")
        == "b.s3.example.com"
    )


SIGNED_RANGE = sign("GET", "/b/k", now_s=NOW_S, headers={"range": "bytes=0-1"})
HASHED = sign("PUT", "/b/k", now_s=NOW_S, body_hash="0" * 64, unsigned={"content-length": "5"})
LENGTH = sign("PUT", "/b/k", now_s=NOW_S, body_hash=UNSIGNED, headers={"content-length": "5"})


@pytest.mark.parametrize(
    ("request_", "outgoing"),
    [
        (SIGNED_RANGE, leaving(sign("GET", "/b/k", now_s=NOW_S, headers={"range": "bytes=0-16399"}))),
        (SIGNED_RANGE, replace(leaving(SIGNED_RANGE), method="PUT")),
        (SIGNED_RANGE, replace(leaving(SIGNED_RANGE), target="/b/k2")),
        (HASHED, leaving(HASHED)),
        (
            LENGTH,
            leaving(sign("PUT", "/b/k", now_s=NOW_S, body_hash=UNSIGNED, headers={"content-length": "109"})),
        ),
    ],
)
def test_what_would_need_another_signature_does_not_leave(request_: RequestHead, outgoing: Outgoing) -> None:
    with pytest.raises(RefusedError) as caught:
        unchanged(request_)(outgoing)
    assert caught.value.refusal == refusals.CANNOT_SIGN


def test_another_host_does_not_leave() -> None:
    request = sign("GET", "/b/k", now_s=NOW_S, host="proxy.corp.example")
    signer = Unchanged(
        authenticated=authenticate(request, {}, now_s=NOW_S), head=request, address=PATH_STYLE, host=UPSTREAM
    )
    with pytest.raises(RefusedError):
        signer(leaving(request))
