import asyncio
import itertools
import re
import subprocess
import time
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.encryption_service.sigv4 import (
    Cause,
    Claim,
    NotSignedError,
    canonical_request,
    read_claim,
    signature,
    verify,
)
from proxy.messages.sigv4 import MAX_SKEW_S
from tests.proxy.encryption_service.aws_signer import Credentials, amz_date, authorization, signed_headers

NOW_S = 1_800_000_000.0
CREDENTIALS = Credentials(
    access_key_id="BETWWMIXBPRLU3ZQHDEIA5TZ", secret="FYtE5EFA5FT0mCc3DrGUe2sti527BitkQ0Zr9MO9fvE="
)
SECRET = CREDENTIALS.secret.encode()
PATH = "/tenants/9pXq/kms/xks/v1/keys/k1/encrypt"
BODY = b'{"requestMetadata":{}}'
SERVICE = "kms-xks-proxy"

type Headers = tuple[tuple[str, str], ...]


def check(
    headers: Headers,
    *,
    body: bytes = BODY,
    path: str = PATH,
    method: str = "POST",
    now_s: float = NOW_S,
    secret: bytes = SECRET,
    region: str | None = None,
) -> Claim:
    claim = read_claim(headers, now_s=now_s, service=SERVICE, region=region)
    verify(claim, secret, method=method, path=path, headers=headers, body=body)
    return claim


def refused(headers: Headers, *, body: bytes = BODY, path: str = PATH, **others: object) -> Cause:
    with pytest.raises(NotSignedError) as caught:
        check(headers, body=body, path=path, **others)  # type: ignore[arg-type]
    assert CREDENTIALS.secret not in str(caught.value)
    return caught.value.cause


def good(*, body: bytes = BODY, path: str = PATH, now_s: float = NOW_S) -> Headers:
    return signed_headers(CREDENTIALS, path=path, body=body, now_s=now_s)


def with_header(headers: Headers, name: str, value: str) -> Headers:
    return tuple((n, value if n == name else v) for n, v in headers)


def without(headers: Headers, name: str) -> Headers:
    return tuple((n, v) for n, v in headers if n != name)


# The published suite: `aws-sig-v4-test-suite` of AWS (awslabs/aws-c-auth), its cases without a query whose
# path needs no encoding. Its service is "service", its clock 2015-08-30T12:36:00Z.

SUITE_SECRET = b"wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
SUITE_AT_S = 1_440_938_160.0
HOST = ("host", "example.amazonaws.com")
DATE = ("x-amz-date", "20150830T123600Z")
TOKEN = ("x-amz-security-token", "6e86291e8372ff2a2260956d9b8aae1d763fbf315fa00fa31553b73ebf194267")
SUITE = {
    "get-vanilla": (
        "GET", "/", [HOST, DATE], b"", "host;x-amz-date",
        "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
    ),
    "post-vanilla": (
        "POST", "/", [HOST, DATE], b"", "host;x-amz-date",
        "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b",
    ),
    "get-header-value-trim": (
        "GET", "/", [HOST, ("my-header1", "  value1  "), ("my-header2", '  "a   b   c"  '), DATE], b"",
        "host;my-header1;my-header2;x-amz-date",
        "acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736",
    ),
    "get-header-value-multiline": (
        "GET", "/", [HOST, ("my-header1", "value1\n  value2\n     value3"), DATE], b"",
        "host;my-header1;x-amz-date",
        "cfd34249e4b1c8d6b91ef74165d41a32e5fab3306300901bb65a51a73575eefd",
    ),
    "post-header-value-case": (
        "POST", "/", [HOST, ("my-header1", "VALUE1"), DATE], b"", "host;my-header1;x-amz-date",
        "cdbc9802e29d2942e5e10b5bccfdd67c5f22c7c4e8ae67b53629efa58b974b7d",
    ),
    "post-header-key-sort": (
        "POST", "/", [DATE, ("my-header1", "value1"), HOST], b"", "host;my-header1;x-amz-date",
        "c5410059b04c1ee005303aed430f6e6645f61f4dc9e1461ec8f8916fdf18852c",
    ),
    "get-unreserved": (
        "GET", "/-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", [HOST, DATE], b"",
        "host;x-amz-date",
        "07ef7494c76fa4850883e2b006601f940f8a34d404d0cfa977f52a65bbf5f24f",
    ),
    "get-vanilla-with-session-token": (
        "GET", "/", [HOST, DATE, TOKEN], b"", "host;x-amz-date;x-amz-security-token",
        "07ec1639c89043aa0e3e2de82b96708f198cceab042d4a97044c66dd9f74e7f8",
    ),
    "post-x-www-form-urlencoded": (
        "POST", "/", [("content-type", "application/x-www-form-urlencoded"), HOST, DATE], b"Param1=value1",
        "content-type;host;x-amz-date",
        "ff11897932ad3f4e8b18135d722051e5ac45fc38421b1da7b9d196a0fe09473a",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SUITE)
def test_the_published_suite(case: str) -> None:
    method, path, headers, body, names, expected = SUITE[case]
    value = (
        "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, "
        f"SignedHeaders={names}, Signature={expected}"
    )
    received = (*headers, ("authorization", value))
    claim = read_claim(received, now_s=SUITE_AT_S, service="service")
    verify(claim, SUITE_SECRET, method=method, path=path, headers=received, body=body)
    with pytest.raises(NotSignedError):
        verify(claim, SUITE_SECRET, method=method, path=path, headers=received, body=body + b"x")


def test_the_suites_string_to_sign_is_reached_through_its_canonical_request() -> None:
    canonical = canonical_request("host;x-amz-date", method="GET", path="/", headers=[HOST, DATE], body=b"")
    assert canonical == (
        b"GET\n/\n\nhost:example.amazonaws.com\nx-amz-date:20150830T123600Z\n\nhost;x-amz-date\n"
        b"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    )


# What is accepted.


def test_a_claim_says_who_and_where() -> None:
    claim = check(good())
    assert claim.access_key_id == CREDENTIALS.access_key_id
    assert (claim.region, claim.service, claim.day) == ("us-east-1", "kms-xks-proxy", "20270115")
    assert str(claim.scope) == "20270115/us-east-1/kms-xks-proxy/aws4_request"


def test_a_retry_with_the_same_signature_is_accepted() -> None:
    headers = good()
    check(headers)
    check(headers, now_s=NOW_S + 30)


@pytest.mark.parametrize("skew_s", [-MAX_SKEW_S, 0, MAX_SKEW_S])
def test_five_minutes_are_still_recent(skew_s: int) -> None:
    check(good(now_s=NOW_S + skew_s))


def test_any_list_of_headers_that_holds_the_two_is_honoured() -> None:
    extra = [("x-b", "2"), ("x-a", " one   two "), ("x-a", "three"), ("content-type", "application/json")]
    headers = [("host", "h"), ("x-amz-date", amz_date(NOW_S)), *extra]
    value = authorization(
        CREDENTIALS,
        headers=headers,
        body=BODY,
        path=PATH,
        signed=["host", "x-amz-date", "x-a", "x-b", "content-type"],
    )
    received = (*headers, ("authorization", value))
    check(received)
    assert refused(with_header(received, "x-b", "3")) is Cause.SIGNATURE


def test_a_header_that_is_not_signed_may_be_anything() -> None:
    check((*good(), ("x-amz-content-sha256", "UNSIGNED-PAYLOAD"), ("via", "é"), ("via", "twice")))


@pytest.mark.parametrize("separator", [",", ", ", " , ", ",   "])
def test_the_parts_may_stand_apart_as_clients_like(separator: str) -> None:
    headers = good()
    value = dict(headers)["authorization"].replace(", ", separator)
    check(with_header(headers, "authorization", value))


# What is refused.


def test_the_body_counts_as_it_was_received() -> None:
    assert refused(good(), body=BODY + b" ") is Cause.SIGNATURE
    unsigned = (*good(body=b"UNSIGNED-PAYLOAD"), ("x-amz-content-sha256", "UNSIGNED-PAYLOAD"))
    assert refused(unsigned) is Cause.SIGNATURE


def test_the_path_and_the_method_count_as_they_were_received() -> None:
    assert refused(good(), path=PATH.replace("encrypt", "decrypt")) is Cause.SIGNATURE
    assert refused(good(), path=PATH.replace("9pXq", "other")) is Cause.SIGNATURE
    assert refused(good(), path=PATH + "/") is Cause.SIGNATURE
    assert refused(good(), method="PUT") is Cause.SIGNATURE


def test_the_signed_headers_count() -> None:
    assert refused(with_header(good(), "host", "other.example.com")) is Cause.SIGNATURE
    assert refused(with_header(good(), "x-amz-date", amz_date(NOW_S + 1))) is Cause.SIGNATURE


@pytest.mark.parametrize("skew_s", [-MAX_SKEW_S - 1, MAX_SKEW_S + 1, -86_400, 86_400 * 365])
def test_more_than_five_minutes_are_too_much(skew_s: int) -> None:
    assert refused(good(now_s=NOW_S + skew_s)) is Cause.SKEW


def test_the_scope_is_of_the_same_day() -> None:
    headers = [("host", "h"), ("x-amz-date", amz_date(NOW_S))]
    for day in ("20270114", "20270116", "00000000"):
        value = authorization(CREDENTIALS, headers=headers, body=BODY, path=PATH, day=day)
        assert refused((*headers, ("authorization", value))) is Cause.SCOPE_DATE


def test_the_day_changes_at_midnight_utc() -> None:
    midnight_s = 1_800_057_600.0
    assert amz_date(midnight_s) == "20270116T000000Z"
    check(good(now_s=midnight_s - 1), now_s=midnight_s + 2)
    check(good(now_s=midnight_s), now_s=midnight_s - 2)


def test_a_signature_for_another_service_or_region_is_refused() -> None:
    headers = [("host", "h"), ("x-amz-date", amz_date(NOW_S))]
    value = authorization(CREDENTIALS, headers=headers, body=BODY, path=PATH, service="kms")
    assert refused((*headers, ("authorization", value))) is Cause.SERVICE
    check(good(), region="us-east-1")
    assert refused(good(), region="eu-central-1") is Cause.REGION
    moved = with_header(
        good(), "authorization", dict(good())["authorization"].replace("us-east-1", "eu-west-1")
    )
    assert refused(moved) is Cause.SIGNATURE


@pytest.mark.parametrize("name", ["authorization", "host", "x-amz-date"])
def test_each_of_the_three_stands_there_once(name: str) -> None:
    headers = good()
    assert refused(without(headers, name)) is Cause.MISSING
    assert refused((*headers, (name, dict(headers)[name]))) is Cause.DUPLICATE
    assert refused(((name, "x"), *headers)) is Cause.DUPLICATE


@pytest.mark.parametrize(
    "names",
    [
        "host",
        "x-amz-date",
        "content-type",
        "x-amz-date;host",
        "host;host;x-amz-date",
        "host;x-amz-date;",
        ";host;x-amz-date",
        "host;;x-amz-date",
        "host;x-amz-date;x-not-there",
        ";".join(["host", "x-amz-date", *(f"y{n:03}" for n in range(80))]),
    ],
)
def test_the_list_of_signed_headers_is_sorted_complete_and_holds_the_two(names: str) -> None:
    headers = [("host", "h"), ("x-amz-date", amz_date(NOW_S)), ("content-type", "application/json")]
    value = authorization(CREDENTIALS, headers=headers, body=BODY, path=PATH)
    value = re.sub("SignedHeaders=[^,]*", f"SignedHeaders={names}", value)
    assert refused((*headers, ("authorization", value))) is Cause.SIGNED_HEADERS


def test_a_signed_value_beyond_ascii_is_refused() -> None:
    headers = [("host", "h"), ("x-amz-date", amz_date(NOW_S)), ("x-a", "é")]
    value = authorization(
        CREDENTIALS, headers=headers, body=BODY, path=PATH, signed=["host", "x-a", "x-amz-date"]
    )
    assert refused((*headers, ("authorization", value))) is Cause.SIGNED_HEADERS


def test_another_secret_is_refused() -> None:
    for secret in (b"another", b"", SECRET[:-1], SECRET + b"="):
        assert refused(good(), secret=secret) is Cause.SIGNATURE


def _spellings() -> dict[str, str]:
    value = dict(good())["authorization"]
    signature_hex = value[-64:]
    return {
        "empty": "",
        "another scheme": value.replace("AWS4-HMAC-SHA256", "Bearer"),
        "another algorithm": value.replace("AWS4-HMAC-SHA256", "AWS4-ECDSA-P256-SHA256"),
        "lower case": value.lower(),
        "upper-case signature": value.replace(signature_hex, signature_hex.upper()),
        "short signature": value[:-1],
        "long signature": value + "0",
        "a newline behind": value + "\n",
        "a blank behind": value + " ",
        "another part": value + ", Extra=1",
        "two signatures": value + f", Signature={signature_hex}",
        "another order": re.sub("(SignedHeaders=[^,]*), (Signature=.*)", r"\2, \1", value),
        "no commas": value.replace(",", ""),
        "another terminator": value.replace("aws4_request", "aws5_request"),
        "no access key": value.replace(CREDENTIALS.access_key_id, ""),
        "a slash too many": value.replace("/us-east-1/", "/us/east-1/"),
        "digits of another script": value.replace("20270115", "２０２７０１１５"),
        "very long": value.replace("SignedHeaders=", "SignedHeaders=" + "a;" * 5000),
    }


@pytest.mark.parametrize("how", _spellings())
def test_the_header_has_one_form(how: str) -> None:
    assert refused(with_header(good(), "authorization", _spellings()[how])) is Cause.MALFORMED


@pytest.mark.parametrize(
    "date",
    [
        "",
        "20270115",
        "20270115T080000",
        "2027-01-15T08:00:00Z",
        "20270115T080000Z ",
        "20270115t080000z",
        "20271315T080000Z",
        "20270230T080000Z",
        "20270115T240000Z",
        "20270115T080060Z",
        "00000115T080000Z",
        "Fri, 15 Jan 2027 08:00:00 GMT",
        "２０２７0115T080000Z",
    ],
)
def test_the_date_has_one_form(date: str) -> None:
    assert refused(with_header(good(), "x-amz-date", date)) is Cause.MALFORMED


# Fuzzed.

_TEXTS = st.lists(
    st.sampled_from(
        [*"AWS4-,/=; \n\0é0129abz", "Credential=", "SignedHeaders=", "Signature=", "/aws4_request", "a" * 64]
    ),
    max_size=30,
).map("".join)


@given(
    _TEXTS,
    st.text(max_size=30),
    st.lists(st.tuples(st.sampled_from(["host", "x-amz-date", "x"]), st.text(max_size=20)), max_size=4),
)
@example("", "20270115T080000Z", [])
def test_whatever_comes_is_refused_and_never_anything_else(
    value: str, date: str, others: Sequence[tuple[str, str]]
) -> None:
    for text in (value, "AWS4-HMAC-SHA256 " + value):
        headers = (("authorization", text), ("x-amz-date", date), ("host", "h"), *others)
        with pytest.raises(NotSignedError):
            check(headers)


_GOOD_VALUE = dict(good())["authorization"]


@given(st.integers(0, len(_GOOD_VALUE) - 1), st.sampled_from(["", *"aA0/;, \n~é"]))
def test_one_changed_character_breaks_a_good_header(at: int, replacement: str) -> None:
    changed = _GOOD_VALUE[:at] + replacement + _GOOD_VALUE[at + 1 :]
    # Blanks between the parts are the one thing that may vary.
    if re.sub(" *, *", ",", re.sub("256 +", "256 ", changed)) == re.sub(" *, *", ",", _GOOD_VALUE):
        return
    headers = with_header(good(), "authorization", changed)
    # The access key id is not itself signed: another one has another secret.
    known = f"={CREDENTIALS.access_key_id}/" in changed
    refused(headers, secret=SECRET if known else b"another")


@given(
    st.binary(max_size=200),
    st.binary(min_size=1, max_size=64),
    st.from_regex(r"/[A-Za-z0-9/_.-]{0,40}", fullmatch=True),
)
def test_our_signature_is_the_independent_signers(body: bytes, secret: bytes, path: str) -> None:
    credentials = Credentials(access_key_id="A" * 20, secret=secret.hex())
    headers = signed_headers(credentials, path=path, body=body, now_s=NOW_S)
    claim = read_claim(headers, now_s=NOW_S, service=SERVICE)
    canonical = canonical_request(claim.signed_headers, method="POST", path=path, headers=headers, body=body)
    assert signature(claim, credentials.secret.encode(), canonical) == claim.signature


# A third judge: what curl sends is verified from the bytes on the socket.


async def test_curl_signs_what_we_verify() -> None:
    received: asyncio.Future[tuple[str, Headers, bytes]] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = tuple(
            (name.lower(), value.strip())
            for name, _, value in (line.partition(":") for line in head[1:] if line)
        )
        body = await reader.readexactly(int(dict(headers)["content-length"]))
        received.set_result((head[0], headers, body))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        done = await asyncio.to_thread(
            subprocess.run,
            [
                "curl", "--silent", "--show-error", "--fail",
                "--aws-sigv4", "aws:amz:us-east-1:kms-xks-proxy",
                "--user", f"{CREDENTIALS.access_key_id}:{CREDENTIALS.secret}",
                "-H", "Content-Type:application/json",
                "--data-binary", BODY.decode(),
                f"http://127.0.0.1:{port}{PATH}",
            ],
            check=False, capture_output=True, timeout=30,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        request_line, headers, body = await received
    assert request_line == f"POST {PATH} HTTP/1.1"
    claim = check(headers, body=body, now_s=time.time())
    assert claim.signed_headers.split(";")[-2:] == ["host", "x-amz-date"]
    assert refused(headers, body=body + b" ", now_s=time.time()) is Cause.SIGNATURE


def test_a_permuted_list_is_never_taken_for_the_sorted_one() -> None:
    headers = good()
    value = dict(headers)["authorization"]
    for order in itertools.permutations(["content-type", "host", "x-amz-date"]):
        text = value.replace("host;x-amz-date", ";".join(order))
        assert refused(with_header(headers, "authorization", text)) in {Cause.SIGNED_HEADERS, Cause.SIGNATURE}
