"""uploadType=multipart: metadata and content in one request, sealed, held, judged, and sent anew.

1. The content waits in the spool until the request is whole: the digests in its metadata come before it, and
   nothing goes up before they were compared.
2. What goes up is a request of ours with the same answer: one part of metadata, one of ciphertext.
"""

import secrets
from collections.abc import AsyncIterator
from functools import partial
from typing import Final

from proxy import refusals
from proxy.messages.message import digest_fields, request_digests
from proxy.plans.conversing import Conversation
from proxy.plans.plan import Answer, Converse, Decision, Refuse, RequestPlan, Reshape
from proxy.plans.request import Request
from proxy.profiles.gcs.digests import Digests
from proxy.profiles.gcs.related import Related, RelatedBody, boundary_of
from proxy.profiles.gcs.resources import HELD_LIMIT_BYTES, object_reply
from proxy.profiles.gcs.routes import CONDITIONS
from proxy.profiles.gcs.told import told_metadata

_METADATA_HEAD: Final = b"Content-Type: application/json; charset=UTF-8\r\n\r\n"


def plan(request: Request) -> RequestPlan:
    """RefusedError(BAD_MESSAGE) for what is not multipart/related."""
    fields = request.head.fields
    if digest_fields(fields) and request_digests(fields):
        # Of the whole body, delimiters and all: nobody is known to send one.
        return Refuse(refusal=refusals.BAD_MESSAGE)
    boundary, found = boundary_of(fields.sole("content-type") or ""), Related()
    return Converse(
        edits=request.edits,
        handler=partial(_send, found),
        limit_bytes=HELD_LIMIT_BYTES,
        spool=Reshape(
            edits=request.edits, make=lambda new_sealer: RelatedBody(boundary, found, new_sealer())
        ),
    )


async def _send(found: Related, talk: Conversation) -> Decision:
    spooled = talk.spooled
    if spooled is None:
        return Refuse(refusal=refusals.INTERNAL)
    told = told_metadata(found.metadata)
    digests = found.tally.digests
    digests.check(told.said)
    digests.check(Digests.of_fields(talk.request.head.fields, body=False))
    boundary = f"sealgate-{secrets.token_hex(16)}".encode()
    head = b"".join(
        (
            b"--" + boundary + b"\r\n" + _METADATA_HEAD + (told.document or b"{}"),
            b"\r\n--" + boundary + b"\r\n",
            b"" if found.content_type is None else b"Content-Type: " + _field(found.content_type) + b"\r\n",
            b"\r\n",
        )
    )
    tail = b"\r\n--" + boundary + b"--\r\n"

    async def body() -> AsyncIterator[bytes]:
        yield head
        async for piece in spooled.pieces():
            yield piece
        yield tail

    async with talk.ask(
        talk.request.head.method,
        fields=[("Content-Type", f'multipart/related; boundary="{boundary.decode()}"')],
        keep=CONDITIONS,
        body=body(),
        body_bytes=len(head) + spooled.stored_bytes + len(tail),
    ) as answer:
        reply = await talk.relay(answer, to_upload=True)
    if 200 <= reply.status < 300:
        reply = await object_reply(talk, reply, found.tally.uploaded)
    return Answer(reply=reply)


def _field(value: str) -> bytes:
    return value.encode("utf-8", "surrogateescape")
