"""What answers say of objects: sizes, digests, addresses, and nothing of our mark."""

import json
from dataclasses import replace
from typing import Any, override

import pytest

from envelope.errors import KeyUnavailableError, Unavailable
from envelope.objects import sealed_length
from proxy import refusals
from proxy.plans.conversing import Inspected, Reply, StoredKind
from proxy.plans.profile_options import ProfileOptions, StoredPolicy
from proxy.plans.request import Mode
from proxy.profiles.gcs.digests import Digests, Uploaded
from proxy.profiles.gcs.resources import (
    Resources,
    edited,
    edited_rewrite,
    object_reply,
    our_url,
    path_at_service,
    stored_size_in,
)
from proxy.profiles.gcs.told import MARK
from proxy.profiles.json_rewriting import JsonObject
from proxy.refusals import RefusedError
from proxy.tenants.model import LegacyPolicy
from tests.proxy.profiles.gcs.upload_world import ENTRY, HOST, Talk, World, head, request

LIST = "/storage/v1/b/box/o"
OBJECT = f"{LIST}/a"


class Looking(Talk):
    """`objects`: what lies where, or why that is not told."""

    def __init__(
        self,
        target: str = LIST,
        *,
        mode: Mode = Mode.FORWARD,
        legacy: LegacyPolicy = LegacyPolicy.STRICT,
        options: ProfileOptions | None = None,
        host: str = HOST,
    ) -> None:
        its = request(head("GET", target, host=host), mode)
        service = replace(ENTRY, legacy=legacy)
        route = replace(its.route, service=service, options=options or ProfileOptions())
        super().__init__(World(None, None), replace(its, route=route), b"", None)  # type: ignore[arg-type]
        self.objects: dict[str, Inspected | Exception] = {}
        self.looked: list[str] = []

    @override
    async def inspect(self, target: str | None = None) -> Inspected | None:
        assert target is not None
        self.looked.append(target)
        found = self.objects.get(target.partition("?")[0])
        if isinstance(found, Exception):
            raise found
        return found


def composite(stored_bytes: int, plain_bytes: int, kind: StoredKind = StoredKind.COMPOSITE) -> Inspected:
    return Inspected(kind=kind, stored_bytes=stored_bytes, plain_bytes=plain_bytes, etag=None, manifest=None)


async def seen(talk: Looking, **more: Any) -> dict[str, Any]:
    """An object as a client sees it."""
    document = {"name": "a", "bucket": "box", "size": "1128", "crc32c": "AA==", "md5Hash": "BB==", **more}
    resource = JsonObject(json.dumps({name: value for name, value in document.items() if value is not ...}))
    question = Resources(talk)(resource)
    if question is not None:
        await question()
    found: dict[str, Any] = json.loads(resource.render())
    return found


# ---- sizes


async def test_sizes_are_arithmetic_where_there_is_no_mark() -> None:
    talk = Looking()
    assert await seen(talk) == {"name": "a", "bucket": "box", "size": "1024"}
    assert (await seen(talk, size=sealed_length(5)))["size"] == 5, "a number stays one"
    assert (await seen(talk, size="7"))["size"] == "7", "no sealed object has this length"
    for odd in (None, True, -1, "x", "9" * 20, [1]):
        assert (await seen(talk, size=odd))["size"] == odd
    assert not talk.looked


async def test_a_mark_says_the_size_and_is_not_seen() -> None:
    talk = Looking()
    found = await seen(talk, size="5000", metadata={"mine": "1", MARK: "4000"})
    assert (found["size"], found["metadata"]) == ("4000", {"mine": "1"})
    found = await seen(talk, size="5000", metadata={MARK: "4000"})
    assert found["size"] == "4000"
    assert "metadata" not in found
    assert not talk.looked


@pytest.mark.parametrize("mark", ["?", "", "5000", "99999", "-1"])
async def test_a_mark_that_says_none_is_looked_up(mark: str) -> None:
    talk = Looking()
    talk.objects[OBJECT] = composite(5000, 4321)
    assert (await seen(talk, size="5000", generation="7", metadata={MARK: mark}))["size"] == "4321"
    assert talk.looked == [f"{OBJECT}?alt=media&generation=7"]


@pytest.mark.parametrize(
    "failure",
    [
        RefusedError(refusals.NOT_SEALED),
        KeyUnavailableError(Unavailable.UNKNOWN, "k"),
        composite(6000, 1),  # of another version
        None,
    ],
    ids=["not sealed", "unknown key", "another version", "nothing"],
)
async def test_what_cannot_be_looked_up_is_arithmetic(failure: Inspected | Exception | None) -> None:
    """And the list goes on."""
    talk = Looking()
    if failure is not None:
        talk.objects[OBJECT] = failure
    assert (await seen(talk, metadata={MARK: "?"}))["size"] == "1024"
    assert len(talk.looked) == 1
    migrating = Looking(legacy=LegacyPolicy.MIGRATE)
    migrating.objects = talk.objects
    assert (await seen(migrating))["size"] == "1128", "it may be none of ours"


async def test_policies() -> None:
    migrating = Looking(legacy=LegacyPolicy.MIGRATE)
    migrating.objects[OBJECT] = composite(1128, 1128, StoredKind.OTHER)
    assert (await seen(migrating))["size"] == "1128"
    assert (await seen(migrating, metadata={MARK: "77"}))["size"] == "77"
    passing = Looking(options=ProfileOptions(legacy={"/storage/v1/b/box": StoredPolicy.PASSTHROUGH}))
    assert await seen(passing, metadata={MARK: "77"}) == {"name": "a", "bucket": "box", "size": "1128"}
    assert len(migrating.looked) == 1
    assert not passing.looked


async def test_selected_members() -> None:
    widened = Looking(f"{LIST}?fields=items(name,size)")
    assert await seen(widened, bucket=..., metadata={"mine": "1"}) == {"name": "a", "size": "1024"}
    partial = Looking(f"{LIST}?fields=items/name,items/size")
    partial.objects[OBJECT] = composite(1128, 999)
    assert await seen(partial, bucket=...) == {"name": "a", "size": "999"}
    # Its metadata is here, whatever was chosen, and our mark is not in it: a single object.
    chosen = Looking(f"{LIST}?fields=items(size)&$fields=items(metadata)")
    told = await seen(chosen, metadata={"a": "b"})
    assert (told["size"], told["metadata"], chosen.looked) == ("1024", {"a": "b"}, [])
    nameless = Looking(f"{LIST}?fields=items/size")
    assert await seen(nameless, bucket=..., name=...) == {}
    assert not nameless.looked


async def test_names_are_escaped_where_they_are_looked_up() -> None:
    talk = Looking()
    await seen(talk, name="\u00e4/../?x", metadata={MARK: "?"})
    assert talk.looked == [f"{LIST}/%C3%A4%2F..%2F%3Fx?alt=media"]


# ---- uploads


async def test_an_upload_is_answered_with_what_was_uploaded() -> None:
    talk = Looking(OBJECT)
    known = Uploaded(plain_bytes=5, digests=Digests(crc32c=bytes(4)))
    document = (
        b'{"name": "a", "size": "109", "crc32c": "x", "md5Hash": "y", "metadata": {"sealgate-size": "?"}}'
    )
    found = json.loads(await edited(document, talk, known=known))
    assert found == {"name": "a", "size": "5", "crc32c": "AAAAAA=="}
    reply = Reply(status=200, fields=(("X-Goog-Hash", "crc32c=x"), ("ETag", "e")), body=document)
    made = await object_reply(talk, reply, known)
    assert made.fields == (("ETag", "e"),)
    assert json.loads(made.body) == found
    assert (await object_reply(talk, Reply(status=200), known)).body == b""
    assert not talk.looked


async def test_what_is_no_object_is_refused() -> None:
    for document in (b"[]", b"<html>", b'{"a": 1, "a": 2}'):
        for function in (edited, edited_rewrite):
            with pytest.raises(RefusedError) as caught:
                await function(document, Looking(OBJECT))
            assert caught.value.refusal is refusals.SERVICE_ANSWER
    assert stored_size_in(b'{"size": "5"}') == 5
    assert stored_size_in(b"{}") is None
    assert stored_size_in(b"") is None


async def test_rewrites() -> None:
    stored = str(sealed_length(100_000))
    resource = {"name": "a", "bucket": "box", "size": stored, "crc32c": "x"}

    async def rewritten(**answer: Any) -> Any:
        return json.loads(await edited_rewrite(json.dumps(answer).encode(), Looking(OBJECT)))

    assert await rewritten(done=True, objectSize=stored, totalBytesRewritten=stored, resource=resource) == {
        "done": True,
        "objectSize": "100000",
        "totalBytesRewritten": "100000",
        "resource": {"name": "a", "bucket": "box", "size": "100000"},
    }
    assert await rewritten(done=False, objectSize=stored, totalBytesRewritten="5", rewriteToken="t") == {
        "done": False,
        "objectSize": "100000",
        "totalBytesRewritten": "5",
        "rewriteToken": "t",
    }
    marked = {**resource, "size": "5000", "metadata": {MARK: "4000"}}
    found = await rewritten(objectSize="5000", totalBytesRewritten="5000", resource=marked)
    assert (found["objectSize"], found["totalBytesRewritten"]) == ("4000", "4000")
    assert "metadata" not in found["resource"]


# ---- addresses


async def test_addresses_are_ours_in_reverse_mode() -> None:
    links = {"selfLink": f"https://{HOST}{OBJECT}", "mediaLink": f"http://{HOST}:443{OBJECT}?alt=media"}
    found = await seen(Looking(mode=Mode.REVERSE, host="ours.example:8443"), **links)
    assert found["selfLink"] == f"https://ours.example:8443{OBJECT}"
    assert found["mediaLink"] == f"https://ours.example:8443{OBJECT}?alt=media"
    forward = await seen(Looking(), **links)
    assert {name: forward[name] for name in links} == links


@pytest.mark.parametrize(
    "reference",
    [
        "https://elsewhere.example/a",
        f"https://{HOST}:444/a",
        f"https://{HOST}@elsewhere.example/a",
        f"https://x@{HOST}/a",
        f"https://{HOST}\\@elsewhere.example/a",
        "//elsewhere.example/a",
        f"ftp://{HOST}/a",
        "a",
        "",
        "https://[/",
        f"https://{HOST}:x/",
    ],
)
def test_addresses_of_others(reference: str) -> None:
    its = request(head("GET", LIST, host="ours.example"), Mode.REVERSE)
    assert our_url(reference, its) is None
    assert path_at_service(reference, its) is None


def test_addresses_of_the_service() -> None:
    its = request(head("GET", LIST))
    assert path_at_service(f"https://{HOST}/a?b=c#d", its) == "/a?b=c"
    assert path_at_service(f"https://{HOST.upper()}:443", its) == "/"
    assert path_at_service("/a?b", its) == "/a?b"
    assert path_at_service(f"http://{HOST}/a", its) is None
    assert path_at_service(f"http://{HOST}:443/a", its, any_scheme=True) == "/a"
