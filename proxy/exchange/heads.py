"""How the head of a message is edited, and how a message departs: in mitmproxy's words.

1. The head of a message is edited after everything that may refuse it; a profile's signer sees it last.
2. What is declared of a body is what will leave, not what came.
"""

from typing import Any, cast

from mitmproxy.http import Headers, Message
from mitmproxy.http import Request as HttpRequest

from proxy import refusals
from proxy.asking import Outgoing
from proxy.gate.permit import Collect, Transform
from proxy.messages.message import AnswerHead
from proxy.plans.plan import Going
from proxy.plans.planner import is_target
from proxy.plans.request import Edits
from proxy.refusals import RefusedError


def edit(headers: Headers, edits: Edits) -> None:
    """In one pass: mitmproxy's mapping looks through all fields for each name."""
    last = dict(edits.put)
    gone = edits.drop.union(last, dict(edits.lists))
    kept = [field for field in headers.fields if field[0].decode("latin-1").lower() not in gone]
    kept += [(name.encode(), value.encode("utf-8", "surrogateescape")) for name, value in last.items()]
    for name, values in edits.lists:
        kept += [(name.encode(), value.encode("utf-8", "surrogateescape")) for value in values]
    headers.fields = tuple(kept)


def sized(edits: Edits, length_bytes: int) -> Edits:
    return edits.also(put=(("content-length", str(length_bytes)),))


def declared(edits: Edits, answer: AnswerHead, out_bytes: int | None) -> Edits:
    """*edits*, and the length of what will leave in place of what came."""
    if "content-length" not in answer.fields:
        return edits
    if out_bytes is None:
        return edits.also(drop=("content-length",))
    return sized(edits, out_bytes)


def declare(headers: Headers, length_bytes: int | None) -> None:
    """How a body ends, in a head that is held: by its length, else by chunks."""
    if length_bytes is None:
        headers.pop("content-length", None)
        headers["transfer-encoding"] = "chunked"
    else:
        headers.pop("transfer-encoding", None)
        headers["content-length"] = str(length_bytes)


def depart(request: HttpRequest, plan: Going, edits: Edits) -> None:
    """Edit the head for good, and have it signed."""
    edit(request.headers, edits)
    if plan.target is not None:
        request.path = _checked(plan.target)
    if plan.sign is None:
        return
    if "host" not in request.headers:  # HTTP/2: towards HTTP/1 it would be added later
        request.headers["Host"] = request.authority
    leaving = Outgoing(method=request.method, target=request.path, fields=tuple(request.headers.fields))
    signed = plan.sign(leaving)
    if signed.method != leaving.method:
        raise RefusedError(refusals.INTERNAL)
    request.headers.fields = signed.fields
    request.path = _checked(signed.target)


def depart_with(request: HttpRequest, plan: Going, edits: Edits, collected: Collect, body: bytes) -> None:
    """A request whose body was collected goes on with *body*."""
    if body or request.method in ("POST", "PUT"):
        edits = sized(edits.also(drop=("transfer-encoding",)), len(body))
    else:
        edits = edits.also(drop=("content-length", "transfer-encoding"))
    depart(request, plan, edits)
    approve(request, collected, body)


def _checked(target: str) -> str:
    if not is_target(target):
        raise RefusedError(refusals.INTERNAL)
    return target


def approve(message: Message, collected: Collect, body: bytes) -> None:
    collected.approve(body)
    message.raw_content = body


def stream(message: Message, transform: Transform) -> None:
    # Its pieces are any buffers; mitmproxy's annotation says bytes, its code only passes them on.
    message.stream = cast("Any", transform)
