"""What becomes of each request, from its head alone, and of the head of its answer."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from envelope.errors import FormatError
from envelope.objects import sealed_length
from proxy import refusals
from proxy.messages.message import AnswerHead, ByteRange, Fields, RequestHead
from proxy.plans.answer_plan import AnswerPlan, MapBody, Pass
from proxy.plans.plan import Converse, Forward, Going, HeadSize, Open, OpenRange, Refuse, RequestPlan, Seal
from proxy.plans.planner import plan_answer, plan_request
from proxy.plans.request import Mode, Route
from proxy.profiles import PROFILES
from proxy.profiles.azure_blob.authentication import AsItCame, Resigner, Unchanged
from proxy.profiles.azure_blob.block_names import size_mark
from proxy.profiles.azure_blob.options import AzureBlobOptions
from proxy.profiles.azure_blob.profile import AzureBlobProfile
from proxy.refusals import Refusal, RefusedError
from tests.fakes.clock import ManualClock
from tests.proxy.profiles.azure_blob.azure_signer import (
    HOST,
    TOKEN,
    head,
    request,
    route,
    signed,
    without_vault,
)

PROFILE = AzureBlobProfile(ManualClock())
BLOCK_BLOB = {"x-ms-blob-type": "BlockBlob"}
MD5 = "AAAAAAAAAAAAAAAAAAAAAA=="


def planned(its: RequestHead, to: Route | None = None) -> RequestPlan:
    return PROFILE.plan(request(its, to))


def refused(its: RequestHead, to: Route | None = None) -> Refusal:
    try:
        plan = planned(its, to)
    except RefusedError as error:
        return error.refusal
    assert isinstance(plan, Refuse), plan
    return plan.refusal


def put_of(plan: Any, name: str) -> str | None:
    return dict(plan.edits.put).get(name)


def answer_of(status: int, fields: Mapping[str, str]) -> AnswerHead:
    raw = [(name.encode(), value.encode()) for name, value in fields.items()]
    return AnswerHead(status=status, fields=Fields(raw))


def answered(
    its: RequestHead, to: Route, fields: Mapping[str, str] | None = None, *, status: int = 200
) -> AnswerPlan:
    plan, answer = planned(its, to), answer_of(status, fields or {})
    composites = PROFILE.may_be_composite(request(its, to), answer)
    proposed = plan_answer(plan, answer, to, composites=isinstance(plan, HeadSize) and composites)
    assert isinstance(plan, Going)
    return PROFILE.plan_answer(request(its, to), plan, answer, proposed)


# ---- uploads


def test_a_block_blob_is_sealed_and_signed_anew() -> None:
    plan = planned(
        signed(
            "PUT",
            "/box/b",
            {**BLOCK_BLOB, "content-length": "20000", "content-md5": MD5, "x-ms-blob-content-md5": MD5},
        )
    )
    assert isinstance(plan, Seal)
    assert isinstance(plan.sign, Resigner)
    assert (plan.plain_bytes, put_of(plan, "content-length")) == (20_000, str(sealed_length(20_000)))
    assert {"content-md5", "x-ms-blob-content-md5"} <= plan.edits.drop
    assert [digest.algorithm for digest in plan.digests] == ["md5"]
    assert (plan.part, plan.target) == (None, None)


def test_a_crc_stands_before_the_sealer() -> None:
    fields = {**BLOCK_BLOB, "content-length": "5", "x-ms-content-crc64": "AAAAAAAAAAA="}
    plan = planned(signed("PUT", "/box/b", fields))
    assert isinstance(plan, Seal)
    assert plan.decoder is not None
    assert "x-ms-content-crc64" in plan.edits.drop


def test_a_block_is_a_part_under_a_name_of_its_own() -> None:
    its = signed("PUT", "/box/b?comp=block&blockid=QUFB", {"content-length": "100"})
    one, two = planned(its), planned(its)
    assert isinstance(one, Seal)
    assert isinstance(two, Seal)
    assert one.part is not None
    assert one.part == two.part
    assert one.after is not None
    assert one.target != two.target, "sent twice, it is two"
    assert (one.target or "").startswith("/box/b?comp=block&blockid=QUFB")
    other = planned(signed("PUT", "/box/c?comp=block&blockid=QUFB", {"content-length": "100"}))
    assert isinstance(other, Seal)
    assert other.part is not None
    assert other.part.upload_ref != one.part.upload_ref


@pytest.mark.parametrize("target", ["/box/b", "/box/b?comp=block&blockid=QUFB"])
def test_uploads_need_a_length(target: str) -> None:
    fields = {**BLOCK_BLOB, "transfer-encoding": "chunked"}
    assert refused(signed("PUT", target, fields)) == refusals.LENGTH_REQUIRED
    assert refused(
        head("PUT", f"{target}{'&' if '?' in target else '?'}{TOKEN}", BLOCK_BLOB, http2=True)
    ) == (refusals.LENGTH_REQUIRED)


@pytest.mark.parametrize("kind", [None, "PageBlob", "AppendBlob", "Blob"])
def test_other_types_of_blobs(kind: str | None) -> None:
    fields = {"content-length": "512"} | ({} if kind is None else {"x-ms-blob-type": kind})
    assert refused(signed("PUT", "/box/b", fields)) == refusals.UNKNOWN_ROUTE


def test_a_block_without_a_name() -> None:
    for target in ("/box/b?comp=block", "/box/b?comp=block&blockid=%21"):
        assert refused(signed("PUT", target, {"content-length": "5"})) == refusals.BLOCK_ID


def test_a_list_of_blocks_is_collected_and_asks_with_little() -> None:
    fields = {
        "content-length": "100", "x-ms-meta-a": "1", "x-ms-blob-content-type": "text/x", "x-ms-lease-id": "l",
        "if-match": "*", "x-ms-tags": "a=b", "x-ms-access-tier": "Cool",
    }  # fmt: skip
    plan = planned(signed("PUT", "/box/b?comp=blocklist", fields))
    assert isinstance(plan, Converse)
    assert {"x-ms-meta-a", "x-ms-blob-content-type", "x-ms-tags", "x-ms-access-tier"} <= plan.edits.drop
    assert "x-ms-lease-id" not in plan.edits.drop


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("PUT", "/box/b?comp=metadata"),
        ("PUT", "/box/b?comp=properties"),
        ("PUT", "/box/b?comp=snapshot"),
        ("GET", "/box/b"),
        ("HEAD", "/box/b"),
        ("DELETE", "/box/b"),
        ("GET", "/box/b?comp=blocklist"),
        ("PUT", "/box?restype=container"),
        ("PUT", "/box/b?comp=page"),
        ("POST", "/?comp=batch"),
        ("PUT", "/box/b?comp=appendblock"),
        ("OPTIONS", "/box/b"),
    ],
)
def test_a_body_where_none_belongs(method: str, target: str) -> None:
    assert refused(signed(method, target, {"content-length": "5"})) == refusals.UNKNOWN_ROUTE


def test_a_copy_with_a_body() -> None:
    fields = {"content-length": "5", "x-ms-copy-source": f"https://{HOST}/box/a"}
    assert refused(signed("PUT", "/box/b", fields)) == refusals.UNKNOWN_ROUTE


def test_a_copy_goes_on() -> None:
    plan = planned(signed("PUT", "/box/b", {"x-ms-copy-source": f"https://{HOST}/box/a"}))
    assert isinstance(plan, Forward)
    assert put_of(plan, "x-ms-copy-source") == f"https://{HOST}/box/a"


# ---- reads


def test_reads() -> None:
    whole = planned(signed("GET", "/box/b", {"x-ms-range-get-content-md5": "true"}))
    assert isinstance(whole, Open)
    assert "x-ms-range-get-content-md5" in whole.edits.drop
    part = planned(signed("GET", "/box/b", {"x-ms-range": "bytes=5-9", "range": "bytes=0-1"}))
    assert isinstance(part, OpenRange)
    assert part.wanted == ByteRange(first=5, last=9), "Azure's own field counts"
    assert {"range", "x-ms-range"} <= part.edits.drop
    part = planned(signed("GET", "/box/b", {"range": "bytes=7-"}))
    assert isinstance(part, OpenRange)
    assert isinstance(planned(signed("HEAD", "/box/b")), HeadSize)


def test_composites_are_told_by_their_md5() -> None:
    its, to = signed("HEAD", "/box/b"), route()

    def may_be(fields: Mapping[str, str]) -> bool:
        return PROFILE.may_be_composite(request(its, to), answer_of(200, fields))

    assert not may_be({"content-md5": MD5})
    assert may_be({"content-md5": size_mark(5)})
    assert may_be({})


def test_answers_have_no_digests_of_ciphertext() -> None:
    to = route()
    for its in (signed("GET", "/box/b"), signed("HEAD", "/box/b")):
        fields = {
            "content-length": str(sealed_length(5)), "content-md5": MD5, "x-ms-blob-content-md5": MD5,
            "x-ms-content-crc64": "AAAAAAAAAAA=", "etag": '"0x8D"',
        }  # fmt: skip
        made = answered(its, to, fields)
        assert not isinstance(made, Refuse)
        assert {"content-md5", "x-ms-blob-content-md5", "x-ms-content-crc64"} <= made.edits.drop
        assert "etag" not in dict(made.edits.put)


def test_an_upload_is_answered_with_what_its_client_has_said() -> None:
    to = route()
    for fields, shown in (({"content-md5": MD5}, MD5), ({}, None)):
        its = signed("PUT", "/box/b", {**BLOCK_BLOB, "content-length": "5", **fields})
        made = answered(its, to, {"content-md5": "x" * 22 + "=="}, status=201)
        assert isinstance(made, Pass)
        assert dict(made.edits.put).get("content-md5") == shown
        assert "content-md5" in made.edits.drop


def test_lists_are_mapped_and_errors_are_not() -> None:
    to, its = route(), signed("GET", "/box?restype=container&comp=list")
    made = answered(its, to)
    assert isinstance(made, Pass)
    assert isinstance(made.body, MapBody)
    made = answered(its, to, status=403)
    assert isinstance(made, Pass)
    assert made.body is None


def test_directories_of_accounts_with_a_hierarchy() -> None:
    """By option alone: else the service could show any blob as an empty one."""
    to = route(directories=True)
    ranged = signed("GET", "/box/d", {"x-ms-range": "bytes=0-99"})
    for mark in ({"x-ms-meta-hdi_isfolder": "true"}, {"x-ms-resource-type": "directory"}):
        empty = {"content-length": "0", **mark}
        for its in (signed("GET", "/box/d"), signed("HEAD", "/box/d")):
            assert isinstance(answered(its, to, empty), Pass)
            assert not isinstance(answered(its, to, empty, status=206), Pass)
            assert not isinstance(answered(its, to, {"content-length": "50", **mark}), Pass)
            assert not isinstance(answered(its, to, {"content-length": "0"}), Pass)
            assert not isinstance(answered(its, route(), empty), Pass)
        for status in (200, 206):  # by then the object is known
            assert not isinstance(answered(ranged, to, empty, status=status), Pass)


def test_sources_of_copies_are_ours_in_reverse_mode() -> None:
    to, its = route(mode=Mode.REVERSE), signed("HEAD", "/box/b", host="us.example")
    fields = {
        "content-length": str(sealed_length(5)), "content-md5": MD5,
        "x-ms-copy-source": f"https://{HOST}/box/a",
    }  # fmt: skip
    made = answered(its, to, fields)
    assert not isinstance(made, Refuse)
    assert dict(made.edits.put)["x-ms-copy-source"] == "https://us.example/box/a"


# ---- who


def test_tokens_need_no_vault() -> None:
    to = route(entry=without_vault())
    plan = planned(head("PUT", f"/box/b?{TOKEN}", {**BLOCK_BLOB, "content-length": "5"}), to)
    assert isinstance(plan, Seal)
    assert isinstance(plan.sign, AsItCame)


def test_other_accounts_and_nobody() -> None:
    to = route(entry=without_vault())
    plan = planned(signed("GET", "/box/b"), to)
    assert isinstance(plan, Open)
    assert isinstance(plan.sign, Unchanged)
    strict = route(entry=without_vault(), unknown_keys="refuse", anonymous="refuse")
    assert refused(signed("GET", "/box/b"), strict) == refusals.ACCESS_KEY_UNKNOWN
    assert refused(head("GET", "/box/b"), strict) == refusals.ANONYMOUS
    assert isinstance(planned(head("GET", "/box/b")), Open)
    assert isinstance(planned(head("OPTIONS", "/box/b"), strict), Forward)


def test_a_signature_comes_first() -> None:
    wrong = signed("POST", "/?comp=batch", {"content-length": "5"}, key=bytes(64))
    assert refused(wrong) == refusals.SIGNATURE_MISMATCH


def test_what_connection_takes_away() -> None:
    its = signed("PUT", "/box/b", {**BLOCK_BLOB, "content-length": "5", "connection": "x-ms-lease-id"})
    assert refused(its) == refusals.BAD_MESSAGE


# ---- what is said of it


def test_options() -> None:
    assert AzureBlobOptions.of({"account_in_path": True}).account_in_path
    for given in ({"account_in_path": "perhaps"}, {"unknown_keys": "allow"}, {"other": 1}):
        with pytest.raises(FormatError):
            AzureBlobOptions.of(given)


def test_refusals_have_azures_shape() -> None:
    made = PROFILE.shape(refusals.BLOCK_UNKNOWN, head("PUT", "/box/b"))
    assert made is not None
    assert made.content_type == "application/xml"
    assert b"<Code>InvalidBlockList</Code>" in made.body
    assert made.fields == (("x-ms-error-code", "InvalidBlockList"),)


def test_it_is_listed_and_says_what_stops_working() -> None:
    text = PROFILES["azure-blob"].text()
    for word in ("append blobs", "batches", "From URL", "account_in_path"):
        assert word in text


def test_whatever_comes_gives_a_plan() -> None:
    for target in ("/box/%ff", "/box/b?a=1&a=2", "/%2F", "//", "/box/b?comp=block&blockid=%ff"):
        for method in ("GET", "PUT", "POST", "HEAD", "DELETE"):
            assert plan_request(head(method, target), replace(route()), PROFILE) is not None
