"""Set Blob Properties: it sets all of them, and clears what is not given; the MD5 is one.

1. In place of the MD5 stands what we need in lists (block_names.py rule 5): it is read, and given again.
   What a client gives there is dropped, as it is for uploads (bodies.py rule 4).
2. Reading and setting are two requests. The version that was read is pinned unless the client pins one
   itself; where it has changed both are done again.
3. Who may set properties but not read them sets them all the same; a list then looks at the blob.
"""

from typing import Final

from proxy import refusals
from proxy.messages.message import strong_etag
from proxy.plans.conversing import Conversation
from proxy.plans.plan import Answer, Converse, Decision, RequestPlan
from proxy.profiles.azure_blob.call import CONDITIONS, Call
from proxy.profiles.azure_blob.uploading import relayed, without_checksums
from proxy.refusals import RefusedError

_TRIES: Final = 3
_MD5: Final = "x-ms-blob-content-md5"


def plan_properties(call: Call) -> RequestPlan:
    return Converse(
        edits=call.asking_edits(),
        sign=call.sign,
        handler=lambda talk: _set(talk, call),
        limit_bytes=0,
    )


async def _set(talk: Conversation, call: Call) -> Decision:
    its_own = [(name, value) for name, value in call.its_own_fields() if name != _MD5]
    for _try in range(_TRIES):
        fields = list(its_own)
        async with talk.ask("HEAD", call.target.asking(without=("comp",))) as looked:
            looked.leave()
            etag = strong_etag(looked.fields)
            md5 = looked.fields.sole("content-md5") if looked.status == 200 else None
        is_pinned = md5 is not None and etag is not None and "if-match" not in call.fields
        if md5 is not None:
            fields.append((_MD5, md5))
        if is_pinned and etag is not None:
            fields.append(("If-Match", etag))
        async with talk.ask("PUT", fields=fields, keep=CONDITIONS, body=b"") as answer:
            if answer.status == 412 and is_pinned and "if-none-match" not in call.fields:
                answer.leave()
                continue
            return Answer(reply=without_checksums(await relayed(talk, answer)))
    raise RefusedError(refusals.UPSTREAM_CHANGED)
