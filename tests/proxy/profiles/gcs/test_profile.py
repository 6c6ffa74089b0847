"""What becomes of each request, from its head alone, and of the head of its answer."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from envelope.objects import sealed_length
from proxy import refusals
from proxy.messages.message import AnswerHead, ByteRange, Fields, RequestHead
from proxy.plans.answer_plan import AnswerPlan, MapBody, MapSize, MapWhole, OpenWhole, Pass
from proxy.plans.conversing import Conversation
from proxy.plans.plan import (
    Converse,
    EmptyBody,
    Forward,
    Going,
    HeadSize,
    Open,
    OpenRange,
    Proceed,
    Refuse,
    RequestPlan,
    Reshape,
    Seal,
)
from proxy.plans.planner import plan_answer
from proxy.profiles import PROFILES
from proxy.profiles.gcs.profile import GcsProfile
from proxy.profiles.gcs.told import MARK
from proxy.refusals import Refusal, RefusedError
from tests.proxy.profiles.gcs.upload_world import Answered, Talk, World, head, request, route

PROFILE = GcsProfile()
API = "/storage/v1/b/box/o"
UP = "/upload/storage/v1/b/box/o"
MD5 = "AAAAAAAAAAAAAAAAAAAAAA=="


def planned(its: RequestHead) -> RequestPlan:
    return PROFILE.plan(request(its))


def refused(its: RequestHead) -> Refusal:
    try:
        plan = planned(its)
    except RefusedError as error:
        return error.refusal
    assert isinstance(plan, Refuse), plan
    return plan.refusal


def answered(its: RequestHead, fields: Mapping[str, str] | None = None, *, status: int = 200) -> AnswerPlan:
    plan = planned(its)
    raw = [(name.encode(), value.encode()) for name, value in (fields or {}).items()]
    answer = AnswerHead(status=status, fields=Fields(raw))
    composites = isinstance(plan, HeadSize) and PROFILE.may_be_composite(request(its), answer)
    proposed = plan_answer(plan, answer, route(), composites=composites)
    assert isinstance(plan, Going)
    return PROFILE.plan_answer(request(its), plan, answer, proposed)


# ---- requests


def test_it_is_registered_and_says_what_stops_working() -> None:
    assert isinstance(PROFILES["gcs"], GcsProfile)
    assert "compose" in PROFILE.text()
    assert "legacy" in PROFILE.describe()["options"]  # type: ignore[operator]


def test_a_simple_upload_is_sealed_as_it_streams() -> None:
    fields = {"content-length": "20000", "x-goog-hash": f"md5={MD5}", "content-md5": MD5}
    plan = planned(head("POST", f"{UP}?uploadType=media&name=a&ifGenerationMatch=0", fields))
    assert isinstance(plan, Seal)
    assert (plan.plain_bytes, plan.empty, plan.target) == (20_000, EmptyBody.SEAL, None)
    assert dict(plan.edits.put)["content-length"] == str(sealed_length(20_000))
    assert {"x-goog-hash", "content-md5"} <= plan.edits.drop
    assert plan.decoder is not None
    unsized = planned(head("POST", f"{UP}?uploadType=media&name=a", {"transfer-encoding": "chunked"}))
    assert isinstance(unsized, Seal)
    assert unsized.plain_bytes is None
    empty = planned(head("POST", f"{UP}?uploadType=media&name=a"))
    assert isinstance(empty, Seal)
    assert empty.plain_bytes == 0


def test_uploads_of_the_other_kinds_are_held() -> None:
    related = {"content-length": "9", "content-type": "multipart/related; boundary=x"}
    plan = planned(head("POST", f"{UP}?uploadType=multipart", related))
    assert isinstance(plan, Converse)
    assert isinstance(plan.spool, Reshape)
    assert (
        refused(head("POST", f"{UP}?uploadType=multipart", {"content-length": "9"})) is refusals.BAD_MESSAGE
    )
    digested = {**related, "content-md5": MD5}
    assert refused(head("POST", f"{UP}?uploadType=multipart", digested)) is refusals.BAD_MESSAGE
    chunk = {"content-length": "262144", "content-range": "bytes 0-262143/*"}
    plan = planned(head("PUT", f"{UP}?upload_id=x", chunk))
    assert isinstance(plan, Converse)
    assert isinstance(plan.spool, Reshape)
    assert "content-range" in plan.edits.drop
    for its in (
        head("POST", f"{UP}?uploadType=resumable", {"content-length": "2", "x-upload-content-length": "5"}),
        head("PUT", f"{UP}?upload_id=x", {"content-range": "bytes */*"}),
        head("DELETE", f"{UP}?upload_id=x"),
    ):
        plan = planned(its)
        assert isinstance(plan, Converse)
        assert plan.spool is None
    assert refused(head("PUT", f"{UP}?upload_id=", chunk)) is refusals.BAD_MESSAGE


def test_reads() -> None:
    media = f"{API}/a%2Fb?alt=media"
    assert isinstance(planned(head("GET", media)), Open)
    assert isinstance(planned(head("HEAD", media)), HeadSize)
    plan = planned(head("GET", media, {"range": "bytes=5-9", "if-range": '"e"'}))
    assert isinstance(plan, OpenRange)
    assert (plan.wanted, plan.if_range) == (ByteRange(first=5, last=9), '"e"')
    assert {"range", "if-range"} <= plan.edits.drop
    assert refused(head("GET", media, {"content-length": "5"})) is refusals.UNKNOWN_ROUTE


def test_the_rest_passes_without_a_body_or_with_a_document() -> None:
    for method, target in (
        ("GET", API),
        ("GET", f"{API}/a"),
        ("DELETE", f"{API}/a"),
        ("GET", "/storage/v1/b"),
    ):
        assert isinstance(planned(head(method, target)), Forward)
        with_body = head(method, target, {"content-length": "5"})
        if target != "/storage/v1/b":
            assert refused(with_body) is refusals.UNKNOWN_ROUTE
    for method, target in (
        ("PATCH", f"{API}/a"),
        ("PUT", f"{API}/a"),
        ("POST", f"{API}/a/copyTo/b/c/o/d"),
        ("POST", f"{API}/a/rewriteTo/b/c/o/d"),
        ("POST", "/storage/v1/b?project=p"),
    ):
        assert isinstance(planned(head(method, target, {"content-length": "5"})), Converse)
    assert refused(head("POST", f"{API}/a/compose", {"content-length": "5"})) is refusals.UNKNOWN_ROUTE


def test_codings_that_the_service_would_undo_are_refused() -> None:
    coded = {"content-length": "5", "content-encoding": "gzip"}
    assert refused(head("POST", f"{UP}?uploadType=media", coded)) is refusals.CONTENT_CODING
    query = f"{UP}?uploadType=media&contentEncoding=gzip"
    assert refused(head("POST", query, {"content-length": "5"})) is refusals.CONTENT_CODING
    plain = {"content-length": "5", "content-encoding": "identity"}
    assert isinstance(planned(head("POST", f"{UP}?uploadType=media", plain)), Seal)


def test_a_list_of_chosen_members_asks_for_metadata_too() -> None:
    plan = planned(head("GET", f"{API}?fields=items(name,size)"))
    assert isinstance(plan, Forward)
    assert plan.target == f"{API}?fields=items(metadata,name,size)"
    plan = planned(head("GET", f"{API}?prefix=a"))
    assert isinstance(plan, Forward)
    assert plan.target is None


# ---- documents


class Told(Talk):
    """The service answers a read of metadata with `metadata`; None: it does not let the client read."""

    def __init__(self, its: RequestHead, body: bytes, metadata: dict[str, str] | None) -> None:
        world = World(None, None)  # type: ignore[arg-type]
        super().__init__(world, request(its), body, None)
        self.metadata = metadata
        self.asked: list[tuple[str, str]] = []
        world.service.answer = self._answer  # type: ignore[method-assign]

    async def _answer(self, method: str, target: str, fields: object, body: object) -> Any:
        self.asked.append((method, target))
        assert body is None
        document = {} if self.metadata is None else {"metadata": self.metadata}
        status = 403 if self.metadata is None else 200
        return type(
            "Answered", (), {"status": status, "fields": Fields([]), "body": json.dumps(document).encode()}
        )


async def passed(
    method: str, target: str, document: object, metadata: dict[str, str] | None
) -> tuple[object, list[tuple[str, str]]]:
    body = json.dumps(document).encode()
    its = head(method, target, {"content-length": str(len(body))})
    plan = planned(its)
    assert isinstance(plan, Converse)
    talk = Told(its, body, metadata)
    decision = await plan.handler(talk)
    assert isinstance(decision, Proceed)
    return json.loads(decision.body), talk.asked


ASKED = [("GET", f"{API}/a?fields=metadata")]


async def test_a_change_of_metadata_keeps_the_mark() -> None:
    marked = {"old": "1", MARK: "77"}
    for method in ("PATCH", "PUT"):
        change = {"metadata": {"new": "2", MARK: "1"}}
        made = {"metadata": {"new": "2", MARK: "77"}}
        assert await passed(method, f"{API}/a", change, marked) == (made, ASKED)
        unmarked = {"metadata": {"new": "2"}}
        assert await passed(method, f"{API}/a", change, {"old": "1"}) == (unmarked, ASKED)
        unknown = {"metadata": {"new": "2", MARK: "?"}}
        assert await passed(method, f"{API}/a", change, None) == (unknown, ASKED)
    cleared = {"metadata": {"old": None, MARK: "77"}}
    assert await passed("PATCH", f"{API}/a", {"metadata": None}, marked) == (cleared, ASKED)
    other = {"contentType": "a/b"}
    assert await passed("PATCH", f"{API}/a", other, marked) == (other, [])
    whole = {"contentType": "a/b", "metadata": {MARK: "77"}}
    assert await passed("PUT", f"{API}/a", other, marked) == (whole, ASKED)


async def test_a_copy_with_metadata_of_its_own_keeps_the_mark() -> None:
    target = f"{API}/a/rewriteTo/b/c/o/d"
    document, made = {"contentType": "a/b"}, {"contentType": "a/b", "metadata": {MARK: "77"}}
    assert await passed("POST", target, document, {MARK: "77"}) == (made, ASKED)
    assert await passed("POST", target, {"name": "d"}, {MARK: "77"}) == ({"name": "d"}, [])
    assert await passed("POST", target, None, {MARK: "77"}) == (None, [])


@pytest.mark.parametrize("answer", [b"", b"not JSON", b"[]", b'{"metadata": {}} {}'])
async def test_a_mark_that_cannot_be_read_changes_nothing(answer: bytes) -> None:
    async def garbled(*_arguments: object) -> Answered:
        return Answered(200, Fields([]), answer)

    body = b'{"metadata": {"new": "2"}}'
    its = head("PATCH", f"{API}/a", {"content-length": str(len(body))})
    plan = planned(its)
    assert isinstance(plan, Converse)
    world = World(None, None)  # type: ignore[arg-type]
    world.service.answer = garbled  # type: ignore[method-assign,assignment]
    talk = Talk(world, request(its), body, None)
    with pytest.raises(RefusedError) as caught:
        await plan.handler(talk)
    assert caught.value.refusal is refusals.SERVICE_ANSWER


async def test_documents_that_are_none_are_refused() -> None:
    for method, target, document in (
        ("PATCH", f"{API}/a", {"content": "secret"}),
        ("PATCH", f"{API}/a", ["secret"]),
        ("PATCH", f"{API}/a", {"contentEncoding": "gzip"}),
        ("PATCH", "/storage/v1/b/box", ["secret"]),
    ):
        with pytest.raises(RefusedError):
            await passed(method, target, document, {})


# ---- answers


def test_answers_about_objects_are_rewritten() -> None:
    listed = answered(head("GET", API), {"content-type": "application/json"})
    assert isinstance(listed, Pass)
    assert isinstance(listed.body, MapBody)
    for its in (
        head("GET", f"{API}/a"),
        head("POST", f"{UP}?uploadType=media&name=a", {"content-length": "5"}),
    ):
        plan = answered(its, {"x-goog-hash": "crc32c=AAAAAA=="})
        assert isinstance(plan, Pass)
        assert isinstance(plan.body, MapWhole)
        assert "x-goog-hash" in plan.edits.drop
        assert isinstance(answered(its, {"content-encoding": "gzip"}), Refuse)
    missing = answered(head("GET", f"{API}/a"), status=404)
    assert isinstance(missing, Pass)
    assert missing.body is None
    deleted = answered(head("DELETE", f"{API}/a"), status=204)
    assert isinstance(deleted, Pass)
    assert deleted.body is None


def test_heads_of_reads_tell_nothing_of_what_is_stored() -> None:
    its = head("GET", f"{API}/a?alt=media")
    fields = {
        "content-length": str(sealed_length(100)),
        "x-goog-hash": "crc32c=AAAAAA==,md5=x",
        "x-goog-stored-content-length": str(sealed_length(100)),
        f"x-goog-meta-{MARK}": "100",
    }
    plan = answered(its, fields)
    assert isinstance(plan, OpenWhole)
    assert {"x-goog-hash", f"x-goog-meta-{MARK}"} <= plan.edits.drop
    assert dict(plan.edits.put)["x-goog-stored-content-length"] == "100"
    unsized = answered(its, {name: value for name, value in fields.items() if name != "content-length"})
    assert isinstance(unsized, OpenWhole)
    assert "x-goog-stored-content-length" in unsized.edits.drop
    looked = answered(head("HEAD", f"{API}/a?alt=media"), fields)
    assert isinstance(looked, MapSize)
    assert looked.probe, "it may be a composite"
    assert "x-goog-stored-content-length" in looked.edits.drop


def test_a_redirect_elsewhere_stays_refused() -> None:
    plan = answered(head("GET", f"{API}/a?alt=media"), {"location": "https://elsewhere.example/"}, status=302)
    assert isinstance(plan, Refuse)


async def test_empty_answers_stay_empty() -> None:
    plan = answered(head("GET", f"{API}/a"))
    assert isinstance(plan, Pass)
    assert isinstance(plan.body, MapWhole)
    talk: Conversation = Told(head("GET", f"{API}/a"), b"", {})
    reply = await plan.body.function(talk, AnswerHead(status=200, fields=Fields([])), b"")
    assert reply.body == b""


def test_refusals_are_googles() -> None:
    shape = PROFILE.shape(refusals.KEY_EXPIRED, head("GET", API))
    assert shape is not None
    assert shape.content_type.startswith("application/json")
    assert json.loads(shape.body)["error"]["code"] == 503
