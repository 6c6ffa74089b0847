"""The response that tells a client of a refusal: in the shape of its dialect where the permit has one."""

import logging
import time
from typing import Final

from mitmproxy.http import Headers, Response
from mitmproxy.net.http import status_codes

from proxy import refusals
from proxy.gate.failures import origin_of
from proxy.gate.permit import Shape
from proxy.refusals import Refusal, Shaped

log = logging.getLogger(__name__)

LAST: Final = (refusals.BAD_MESSAGE, refusals.USER_MISMATCH)
"""Their answer ends an HTTP/1 connection. Others may see the end of a bad message elsewhere: what follows it
is nobody's request. A proxy in front that pools its connections opens another one for another tenant."""


def response_for(refusal: Refusal, shape: Shape | None) -> Response:
    body, headers = refusal.body(), Headers([(n.encode(), v.encode()) for n, v in refusal.headers()])
    if shape is not None and (shaped := _shaped(refusal, shape)) is not None:
        body = shaped.body
        for name, value in shaped.fields:
            headers[name] = value
        headers["content-type"] = shaped.content_type
        headers["content-length"] = str(len(body))
        headers["sealgate-error"] = refusal.code
    now_s = time.time()
    reason = status_codes.RESPONSES.get(refusal.status, "").encode()
    return Response(b"HTTP/1.1", refusal.status, reason, headers, body, None, now_s, now_s)


def _shaped(refusal: Refusal, shape: Shape) -> Shaped | None:
    """The refusal in the client's dialect. None where that fails: it must be told all the same."""
    try:
        shaped = shape(refusal)
        if shaped is None:
            return None
        texts = [shaped.content_type, *(text for field in shaped.fields for text in field)]
        if type(shaped.body) is bytes and all(text.isascii() and text.isprintable() for text in texts):
            return shaped
    except Exception as error:  # noqa: BLE001 - whatever a profile raises
        log.error("refusal not shaped: %s", origin_of(error))  # noqa: TRY400
    return None
