"""Plans of uploads in parts: lengths to the last byte, also of what no test could send.

And what goes with requests of our own. The handlers are driven by real clients: test_s3_uploads.py and
test_s3_clients.py in tests/integration.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from envelope.keys import NetworkService
from envelope.multipart import upload_ref
from envelope.objects import sealed_length
from proxy.messages.message import BodyFrame, Fields, Framing, RequestHead
from proxy.plans.plan import Converse, Forward, Seal
from proxy.plans.request import Edits, Mode, Request, Route
from proxy.profiles.s3.addressing import Address, Level
from proxy.profiles.s3.authentication import Authenticated, Standing
from proxy.profiles.s3.call import Call, Content
from proxy.profiles.s3.multipart import PartRules
from proxy.profiles.s3.routes import find_operation
from proxy.profiles.s3.signing import Unchanged
from proxy.profiles.s3.uploading import plan_complete, plan_create, plan_part
from proxy.refusals import RefusedError
from proxy.tenants.model import LegacyPolicy, ServiceEntry, Upstream

GIB = 1 << 30
MIB = 1 << 20


def call(method: str, parameters: dict[str, str], *, plain_bytes: int | None = None, **fields: str) -> Call:
    service = ServiceEntry(
        owner=NetworkService("tenant-a", "store"),
        upstream=Upstream(scheme="https", host="s3.example", port=443),
        profile="s3",
        legacy=LegacyPolicy.STRICT,
        reverse_listen=None,
        certificate=None,
        key_file=Path("key.pem"),
    )
    named = Fields((name.replace("_", "-").encode(), value.encode()) for name, value in fields.items())
    query = "&".join(f"{name}={value}" for name, value in parameters.items())
    head = RequestHead(method=method, target=f"/bucket/a%20b?{query}", fields=named, host="s3.example")
    frame = BodyFrame(framing=Framing.LENGTH, length_bytes=plain_bytes or 0)
    edits = Edits(drop=frozenset({"proxy-connection"}))
    route = Route(service=service, mode=Mode.FORWARD)
    request = Request(head=head, frame=frame, edits=edits, route=route)
    operation = find_operation(method, Level.OBJECT, parameters, frozenset(named))
    assert operation is not None
    return Call(
        request=request,
        operation=operation,
        address=Address(bucket="bucket", key="a%20b", virtual_host=False),
        parameters=parameters,
        edits=edits,
        sign=None,
        rules=PartRules(),
        content=None if plain_bytes is None else Content(plain_bytes=plain_bytes, sent_bytes=plain_bytes),
    )


@pytest.mark.parametrize(
    "plain_bytes", [5 * MIB, 64 * MIB + 1, 5_363_471_256, 5 * GIB, 6 * GIB + 12_345, 48 * 1024 * GIB]
)
def test_a_part_of_any_length_is_announced_to_the_byte(plain_bytes: int) -> None:
    plan = plan_part(call("PUT", {"partNumber": "3", "uploadId": "u"}, plain_bytes=plain_bytes))
    assert isinstance(plan, Seal)
    assert dict(plan.edits.put)["content-length"] == str(sealed_length(plain_bytes))
    assert plan.part is not None
    assert (plan.part.upload_ref, plan.part.number) == (upload_ref("u"), 3)
    assert plan.after is not None


def test_a_part_that_may_be_the_last_one_is_collected() -> None:
    plan = plan_part(call("PUT", {"partNumber": "3", "uploadId": "u"}, plain_bytes=1000))
    assert isinstance(plan, Converse)
    assert plan.limit_bytes == 1000
    assert isinstance(plan.spool, Seal)
    assert plan.spool.part is not None
    coded = call("PUT", {"partNumber": "3", "uploadId": "u"}, plain_bytes=1000)
    coded = replace(coded, content=Content(plain_bytes=1000))
    framed = plan_part(coded)
    assert isinstance(framed, Converse)
    assert 1000 < framed.limit_bytes < 100_000


def test_a_part_without_a_length_is_refused() -> None:
    asked = call("PUT", {"partNumber": "3", "uploadId": "u"})
    for content in (None, Content(plain_bytes=None)):
        with pytest.raises(RefusedError, match="length-required"):
            plan_part(replace(asked, content=content))


def test_no_checksum_of_ciphertext_is_asked_of_parts() -> None:
    asked = call(
        "POST",
        {"uploads": ""},
        x_amz_checksum_algorithm="CRC32",
        x_amz_checksum_type="FULL_OBJECT",
        x_amz_meta_a="1",
    )
    plan = plan_create(asked)
    assert isinstance(plan, Forward)
    assert {"x-amz-checksum-algorithm", "x-amz-checksum-type"} <= plan.edits.drop
    assert "x-amz-meta-a" not in plan.edits.drop


def test_no_upload_is_begun_that_could_not_be_completed() -> None:
    """Completing takes a request of our own, for which a secret of the vault is needed."""
    asked = call("POST", {"uploads": ""})
    for signed, code in ((("host",), "cannot-sign-anew"), ((), None)):
        standing = Standing.UNJUDGED if signed else Standing.ANONYMOUS
        who = Authenticated(standing=standing, signed_headers=signed)
        sign = Unchanged(authenticated=who, head=asked.request.head, address=asked.address, host="s3.example")
        if code is None:
            assert isinstance(plan_create(replace(asked, sign=sign)), Forward)
            continue
        with pytest.raises(RefusedError, match=code):
            plan_create(replace(asked, sign=sign))


def test_what_goes_with_requests_of_our_own_is_not_what_the_client_asks() -> None:
    asked = call(
        "POST",
        {"uploadId": "u"},
        x_amz_mp_object_size="5",
        x_amz_meta_a="1",
        x_amz_acl="private",
        x_amz_request_payer="requester",
        x_amz_expected_bucket_owner="1",
        cache_control="no-cache",
        user_agent="x",
    )
    plan = plan_complete(asked)
    assert isinstance(plan, Converse)
    dropped = {"x-amz-mp-object-size", "x-amz-meta-a", "x-amz-acl", "cache-control", "proxy-connection"}
    assert dropped <= plan.edits.drop
    assert plan.edits.drop.isdisjoint({"x-amz-request-payer", "x-amz-expected-bucket-owner", "user-agent"})


@pytest.mark.parametrize(
    "name", ["x_amz_checksum_crc16", "x_amz_checksum_crc64nvme", "x_amz_checksum_sha256"]
)
def test_a_checksum_of_the_whole_that_is_none_is_refused_and_not_ignored(name: str) -> None:
    with pytest.raises(RefusedError, match="invalid-digest"):
        plan_complete(call("POST", {"uploadId": "u"}, plain_bytes=None, **{name: "AAAAAA=="}))


def test_targets_of_our_own_keep_the_path_byte_for_byte() -> None:
    asked = call("POST", {"uploadId": "a/b+c"})
    assert asked.target(partNumber=7, uploadId="a/b+c") == "/bucket/a%20b?partNumber=7&uploadId=a%2Fb%2Bc"
    assert asked.target(uploads="") == "/bucket/a%20b?uploads"
    assert asked.target() == "/bucket/a%20b"
