"""uploadType=multipart: held, judged, and sent as a request of ours."""

import base64
import hashlib
import json
from typing import Any, override

import pytest

from envelope.objects import Opener, Sealer
from proxy import refusals
from proxy.bodies.spool import Spools
from proxy.bodies.spooling import HeldUpload
from proxy.plans.conversing import PartOf, Reply
from proxy.plans.plan import Answer, Converse, Refuse, Reshape
from proxy.profiles.gcs import multipart
from proxy.profiles.gcs.told import MARK
from proxy.refusals import RefusedError
from tests.envelope.samples import KEY_ID, OBJECT_KEY, OWNER
from tests.proxy.profiles.gcs.test_related import body
from tests.proxy.profiles.gcs.upload_world import Talk, World, head, request

TARGET = "/upload/storage/v1/b/box/o?uploadType=multipart"
CONTENT = bytes(range(256)) * 300
MD5 = base64.b64encode(hashlib.md5(CONTENT, usedforsecurity=False).digest()).decode()


class Sent(Talk):
    """What went up, and what is answered."""

    sent: dict[str, str]
    stored: bytes = b""
    status = 200

    @override
    async def relay(self, answer: Any, *, limit_bytes: int = 1024 * 1024, to_upload: bool = False) -> Reply:
        assert to_upload
        document = {"name": "o", "size": "99999", "crc32c": "AAAAAA==", "md5Hash": "x"}
        return Reply(status=self.status, fields=(("X-Goog-Hash", "a"),), body=json.dumps(document).encode())


async def sent(data: bytes, fields: dict[str, str] | None = None, *, status: int = 200) -> tuple[Sent, Reply]:
    its = head("POST", TARGET, {"content-type": "multipart/related; boundary=x", **(fields or {})})
    plan = multipart.plan(request(its))
    assert isinstance(plan, Converse)
    assert isinstance(plan.spool, Reshape)

    def new_sealer(part: PartOf | None = None) -> Sealer:
        assert part is None
        return Sealer(OBJECT_KEY, OWNER, KEY_ID)

    reshaper, spool = plan.spool.make(new_sealer), Spools().open("acme")
    with spool:
        spool.write(reshaper.feed(data))
        spool.write(reshaper.finish())
        world = World(None, None)  # type: ignore[arg-type]
        talk = Sent(world, request(its), b"", HeldUpload(spool, None))
        talk.status = status

        async def answer(_method: str, _target: str, sent_fields: dict[str, str], pieces: Any) -> Any:
            talk.sent, talk.stored = sent_fields, b"".join([piece async for piece in pieces])

        world.service.answer = answer  # type: ignore[method-assign,assignment]
        decision = await plan.handler(talk)
    assert isinstance(decision, Answer)
    return talk, decision.reply


def parts_of(talk: Sent) -> tuple[dict[str, Any], bytes, bytes]:
    """Metadata, head of the content, content."""
    boundary = talk.sent["content-type"].partition('boundary="')[2].rstrip('"').encode()
    before, first, second, end = talk.stored.split(b"--" + boundary)
    assert (before, end) == (b"", b"--\r\n")
    fields, _, content = second.removeprefix(b"\r\n").partition(
        b"\r\n\r\n" if b"Content-Type" in second else b"\r\n"
    )
    opener = Opener(OWNER, lambda _header: OBJECT_KEY)
    plain = bytes(opener.update(content.removesuffix(b"\r\n"))) + opener.finalize()
    return json.loads(first.partition(b"\r\n\r\n")[2]), fields, plain


async def test_what_goes_up_is_metadata_without_digests_and_one_sealed_object() -> None:
    metadata = {"name": "o", "md5Hash": MD5, "metadata": {"a": "b", MARK: "1"}}
    talk, reply = await sent(
        body(CONTENT, metadata=json.dumps(metadata).encode()), {"x-goog-hash": f"md5={MD5}"}
    )
    told, fields, plain = parts_of(talk)
    assert told == {"name": "o", "metadata": {"a": "b"}}
    assert fields == b"Content-Type: a/b"
    assert plain == CONTENT
    answered = json.loads(reply.body)
    assert (answered["size"], answered["md5Hash"]) == (str(len(CONTENT)), MD5)
    assert reply.fields == ()


async def test_content_without_a_type_has_none() -> None:
    talk, _ = await sent(body(b"c", second=b""))
    assert parts_of(talk)[1:] == (b"", b"c")


async def test_boundaries_of_ours_are_drawn() -> None:
    seen = {(await sent(body()))[0].sent["content-type"] for _ in range(5)}
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("metadata", "fields"),
    [
        (b'{"md5Hash": "AAAAAAAAAAAAAAAAAAAAAA=="}', {}),
        (b'{"crc32c": "AAAAAA=="}', {}),
        (b"{}", {"x-goog-hash": "crc32c=AAAAAA=="}),
    ],
)
async def test_a_wrong_digest_sends_nothing(metadata: bytes, fields: dict[str, str]) -> None:
    with pytest.raises(RefusedError) as caught:
        await sent(body(CONTENT, metadata=metadata), fields)
    assert caught.value.refusal is refusals.BAD_DIGEST


@pytest.mark.parametrize("name", ["content-md5", "x-goog-hash", "digest"])
def test_a_digest_of_the_whole_body_is_not_passed_over(name: str) -> None:
    """It would be of delimiters and metadata, too; `X-Goog-Hash` is of the content."""
    value = {"content-md5": MD5, "x-goog-hash": f"md5={MD5}", "digest": f"md5={MD5}"}[name]
    its = head("POST", TARGET, {"content-type": "multipart/related; boundary=x", name: value})
    plan = multipart.plan(request(its))
    if name == "x-goog-hash":
        assert isinstance(plan, Converse)
    else:
        assert plan == Refuse(refusal=refusals.BAD_MESSAGE)


async def test_metadata_that_is_none_sends_nothing() -> None:
    for metadata, refusal in (
        (b'{"content": "x"}', refusals.MALFORMED_DOCUMENT),
        (b'{"contentEncoding": "gzip"}', refusals.CONTENT_CODING),
        (b"[]", refusals.MALFORMED_DOCUMENT),
    ):
        with pytest.raises(RefusedError) as caught:
            await sent(body(metadata=metadata))
        assert caught.value.refusal is refusal


async def test_an_error_of_the_service_passes() -> None:
    _, reply = await sent(body(), status=412)
    assert reply.status == 412
    assert json.loads(reply.body)["size"] == "99999"
