"""In reverse mode a browser names us as the origin of its requests, and the application expects its own name.

1. Origin and Referer that name us name the service there: an application compares them with its Host, against
   forged requests. What names anybody else stays, and the application refuses it, as it would directly.
2. An answer that lets the service's own origin read it (CORS) lets ours.
"""

import re
from typing import Final
from urllib.parse import urlsplit

from proxy.asking import host_field
from proxy.messages.message import AnswerHead
from proxy.plans.request import Mode, Request

_URL: Final = re.compile(r"(https?)://([^/?#\\@\s]+)([/?#][^\x00-\x20\x7f]*)?", re.IGNORECASE)
_PORTS: Final = {"http": 80, "https": 443}
_ALLOWED: Final = "access-control-allow-origin"


def at_service(request: Request) -> tuple[tuple[str, str], ...]:
    """Origin and Referer as the service is to see them, if they are to change."""
    if request.route.mode is not Mode.REVERSE:
        return ()
    put = []
    for name in ("origin", "referer"):
        value = request.head.fields.sole(name)
        named = _URL.fullmatch(value) if value is not None else None
        if named is not None and _names_us(named, request):
            put.append((name, _origin(request) + (named[3] or "")))
    return tuple(put)


def at_client(request: Request, answer: AnswerHead) -> tuple[tuple[str, str], ...]:
    """The same of an answer: who may read it."""
    ours = request.head.fields.sole("origin")
    if ours is None or answer.fields.sole(_ALLOWED) != _origin(request):
        return ()
    return ((_ALLOWED, ours),) if dict(at_service(request)).get("origin") else ()


def _origin(request: Request) -> str:
    return f"{request.service.upstream.scheme}://{host_field(request.service)}"


def _names_us(named: "re.Match[str]", request: Request) -> bool:
    """By the name this client uses. Who ends TLS before us may have changed the scheme."""
    scheme = named[1].lower()
    theirs = _address(named[2], scheme)
    return theirs is not None and theirs == _address(request.head.host, scheme)


def _address(authority: str, scheme: str) -> tuple[str, int] | None:
    try:
        url = urlsplit(f"//{authority}")
        host, port = url.hostname, url.port
    except ValueError:
        return None
    return None if not host else (host.rstrip(".").lower(), port or _PORTS[scheme])
