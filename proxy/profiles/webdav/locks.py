"""LOCK where nothing is: the service makes an empty resource (RFC 4918 7.3), and empty is not sealed.

1. An empty object is put there, under the new lock, before the client learns of it: whoever reads it gets the
   nothing that is in it. Where the service only notes the lock (Apache), there is still nothing to read.
2. Only where a resource was made: the service says so (201), or said just before that there was none. What
   lies at the service as 0 bytes otherwise stays what it is, damaged (docs/format.md).
3. If that fails the lock is none the less true: its client is told so, and can write.
"""

from collections.abc import AsyncIterator
from typing import Final

import structlog

from proxy.messages.message import AnswerHead, strong_etag
from proxy.plans.answer_plan import AnswerPlan, MapWhole, Pass
from proxy.plans.conversing import Conversation, Reply
from proxy.plans.request import Mode
from proxy.profiles.webdav.lists import address_mapper
from proxy.refusals import RefusedError

log = structlog.get_logger(__name__)

_LIMIT_BYTES: Final = 256 * 1024


async def is_absent(talk: Conversation) -> bool:
    """Whether the service says that there is nothing at the client's target."""
    async with talk.ask("HEAD") as answer:
        answer.leave()
        return answer.status == 404


def plan_locked(answer: AnswerHead, proposed: Pass, *, was_absent: bool) -> AnswerPlan:
    """The plan of the answer to a LOCK with a document, which *proposed* would let pass."""
    if answer.status == 201 or (answer.status == 200 and was_absent):
        return Pass(edits=proposed.edits, body=MapWhole(limit_bytes=_LIMIT_BYTES, function=_locked))
    return proposed


async def _locked(talk: Conversation, answer: AnswerHead, body: bytes) -> Reply:
    try:
        is_sound = await _store_nothing(talk, answer)
    except RefusedError as refused:
        log.info("no empty object stored", cause=refused.refusal.code)
        is_sound = False
    if not is_sound:
        log.warning("a new lock has no empty object", service=str(talk.request.service.owner))
    if talk.request.route.mode is Mode.REVERSE:
        mapper = address_mapper(talk.request)
        body = mapper.feed(body) + mapper.finish()
    return Reply(status=answer.status, body=body)


async def _store_nothing(talk: Conversation, answer: AnswerHead) -> bool:
    """False: what is there is not sealed, and cannot be read."""
    token = answer.fields.sole("lock-token")
    if token is None:
        return False
    fields = [("If", f"({token})"), ("Content-Type", "application/octet-stream")]
    if answer.status != 201:  # others may have made and written it since we asked
        async with talk.ask("HEAD") as there:
            there.leave()
            if there.status == 404:
                return True
            etag = strong_etag(there.fields)
            if there.status != 200 or there.fields.sole("content-length") != "0" or etag is None:
                return False
            fields.append(("If-Match", etag))
    sealing = await talk.sealing(_nothing(), 0)
    async with talk.ask("PUT", fields=fields, body=aiter(sealing), body_bytes=sealing.stored_bytes) as stored:
        stored.leave()
        return 200 <= stored.status < 300


async def _nothing() -> AsyncIterator[bytes]:
    for piece in tuple[bytes, ...]():
        yield piece
