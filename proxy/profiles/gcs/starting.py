"""A resumable upload is begun, or given up.

1. What the service is told of the object is told now: its metadata, with our mark (told.py), and neither the
   content's length nor its digests, which are of what is not stored. They are compared with what comes.
2. The service's answer must name a session at this service, of this bucket: elsewhere nobody would seal.
"""

import os
import re
from dataclasses import replace
from typing import Final

from envelope.multipart import UPLOAD_REF_SIZE, upload_ref
from proxy import refusals
from proxy.messages.message import Fields
from proxy.plans.conversing import Conversation, Reply
from proxy.plans.plan import Answer, Decision, Refuse
from proxy.profiles.gcs.digests import Digests
from proxy.profiles.gcs.resources import our_url, path_at_service
from proxy.profiles.gcs.routes import CONDITIONS, Operation, session_id
from proxy.profiles.gcs.sessions import Known, State
from proxy.profiles.gcs.told import UNKNOWN_SIZE, told_metadata
from proxy.refusals import RefusedError
from proxy.uploads import Upload

TOTAL: Final = "x-upload-content-length"
GONE: Final = (404, 410)
_CANCELLED: Final = 499
"""Google's answer to a cancelled upload."""
_JSON: Final = "application/json; charset=UTF-8"
_LENGTH: Final = re.compile(r"[0-9]{1,15}")


def session_ref(bucket: str, name: str) -> bytes:
    """What the session *name*, an upload to *bucket*, is remembered by."""
    return upload_ref(f"gcs\x1f{bucket}\x1f{name}")


async def start(talk: Conversation, operation: Operation) -> Decision:
    request, uploads = talk.request, talk.uploads  # without a place for its state nothing is begun
    total = _declared_total(request.head.fields)
    told = told_metadata(talk.body, mark=UNKNOWN_SIZE if total is None else str(total))
    said = _both(told.said, Digests.of_fields(request.head.fields))
    key = await talk.sealing_key(size_bytes=total)
    async with talk.ask(
        request.head.method, fields=[("Content-Type", _JSON)], keep=CONDITIONS, body=told.document
    ) as answer:
        reply = await talk.relay(answer, to_upload=True)
        location = answer.fields.sole("location")
    if not 200 <= reply.status < 300:
        return Answer(reply=reply)
    path = None if location is None else path_at_service(location, request)
    name = None if path is None else session_id(path, operation.bucket)
    if location is None or name is None:
        # Elsewhere its chunks would go by where nobody seals them.
        return Refuse(refusal=refusals.ANSWER_REFUSED)
    ref = os.urandom(UPLOAD_REF_SIZE)
    known = Known(said_crc32c=said.crc32c, said_md5=said.md5)
    state = State(ref=ref, secrets=known.sealed(key, ref), total_bytes=total)
    upload = Upload(request.service.owner, session_ref(operation.bucket, name))
    await uploads.begin_session(upload, state.encode())
    ours = our_url(location, request) or location
    return Answer(reply=_with_field(reply, "Location", ours))


def _both(one: Digests, other: Digests) -> Digests:
    one.check(other)
    return Digests(crc32c=one.crc32c or other.crc32c, md5=one.md5 or other.md5)


def _declared_total(fields: Fields) -> int | None:
    if TOTAL not in fields:
        return None
    value = fields.sole(TOTAL) or ""
    if not _LENGTH.fullmatch(value):
        raise RefusedError(refusals.BAD_MESSAGE)
    return int(value)


async def cancel(talk: Conversation, upload: Upload) -> Decision:
    async with talk.ask("DELETE", keep=CONDITIONS) as answer:
        reply = await talk.relay(answer)
    if reply.status < 300 or reply.status in (*GONE, _CANCELLED):
        await talk.uploads.forget_session(upload)
    return Answer(reply=reply)


def _with_field(reply: Reply, name: str, value: str) -> Reply:
    kept = tuple(pair for pair in reply.fields if pair[0].lower() != name.lower())
    return replace(reply, fields=(*kept, (name, value)))
