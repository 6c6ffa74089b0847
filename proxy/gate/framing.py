"""How a message that leaves says where its body ends: once, and truly.

1. One Content-Length, or one Transfer-Encoding, never both; a transfer coding besides chunked passes for
   CLEAR alone.
2. A declared length is the length of what leaves, not of what came.
3. HTTP/2 frames by itself. What came by it is framed here for HTTP/1: mitmproxy would send it unframed, and
   a body that ends with its connection ends visibly only if it is chunked.
"""

from mitmproxy.http import HTTPFlow, Message, Request, Response
from mitmproxy.net.http import validate
from mitmproxy.proxy.context import Context

from proxy import refusals
from proxy.gate.failures import VetoError
from proxy.gate.permit import CLEAR, Collect, Grant


def declared_length(message: Message) -> int | None:
    value = message.headers.get("content-length")
    return None if value is None else int(value)


def may_have_body(flow: HTTPFlow, response: Response) -> bool:
    return flow.request.method != "HEAD" and response.status_code not in (204, 304)


def is_framed(message: Message, granted: Grant | None, expected_bytes: int | None) -> bool:
    """True if *message* says how its body ends. VetoError if it says so twice, or wrongly."""
    lengths = message.headers.get_all("content-length")
    codings = message.headers.get_all("transfer-encoding")
    if len(lengths) + len(codings) > 1:
        raise VetoError(refusals.INTERNAL, "ambiguous framing")
    if lengths:
        try:
            declared = validate.parse_content_length(lengths[0])
        except ValueError:
            raise VetoError(refusals.INTERNAL, "invalid content-length") from None
        if granted is not CLEAR and expected_bytes != declared:
            raise VetoError(refusals.INTERNAL, "content-length is not the length of what leaves")
    if codings and isinstance(granted, Collect):
        raise VetoError(refusals.INTERNAL, "a collected body has a length")
    if codings and granted is not CLEAR and codings[0].strip().lower() != "chunked":
        raise VetoError(refusals.INTERNAL, "a transfer coding besides chunked")
    return bool(lengths or codings)


def frame_request(request: Request, context: Context, *, body_follows: bool) -> None:
    """To be called once the upstream is connected: what it speaks is known only then."""
    headers = request.headers
    if context.server.alpn == b"h2":
        headers.pop("transfer-encoding", None)
    elif "content-length" not in headers and "transfer-encoding" not in headers:
        if body_follows:
            headers["transfer-encoding"] = "chunked"
        elif request.raw_content:
            headers["content-length"] = str(len(request.raw_content))


def frame_response(response: Response, request: Request, context: Context) -> None:
    """For a response whose body is still to come."""
    headers = response.headers
    if (
        context.client.alpn != b"h2"
        and request.http_version != "HTTP/1.0"
        and "content-length" not in headers
        and "transfer-encoding" not in headers
    ):
        headers["transfer-encoding"] = "chunked"
        response.http_version = "HTTP/1.1"
