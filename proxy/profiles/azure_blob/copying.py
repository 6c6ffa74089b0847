"""Copies within the service: its ciphertext moves, so nothing is opened. Pure.

1. A source is named by its URL. In forward mode it names the service itself; in reverse mode a client may
   name us, and then the service's own address goes in its place, byte for byte behind the authority.
2. A source elsewhere is refused: it would be fetched as it is and never sealed. So is one of another
   account.
3. What the service says of a copy's source names us in reverse mode again.
"""

import re
from typing import Final
from urllib.parse import urlsplit

from proxy import refusals
from proxy.asking import host_field
from proxy.plans.request import Mode, Request
from proxy.profiles.azure_blob.addressing import Place, Target, read_target
from proxy.refusals import RefusedError

FIELD: Final = "x-ms-copy-source"
_PORTS: Final = {"http": 80, "https": 443}
_URL: Final = re.compile(r"(https?)://([^@/?#\\\x00-\x20\x7f]+)(/[^#\\\x00-\x20\x7f]*)", re.IGNORECASE)


def source_at_service(request: Request, target: Target) -> str:
    """What `x-ms-copy-source` has to be. RefusedError(COPY_SOURCE) for what is no blob of this account."""
    url = _URL.fullmatch(request.head.fields.sole(FIELD) or "")
    if url is None:
        raise RefusedError(refusals.COPY_SOURCE)
    source = read_target(url[3], account_in_path=bool(target.account))
    if source.place is not Place.BLOB or source.account != target.account:
        raise RefusedError(refusals.COPY_SOURCE)
    if _names_service(url, request):
        return url[0]
    if request.route.mode is not Mode.REVERSE or not _names_us(url, request):
        raise RefusedError(refusals.COPY_SOURCE)
    return f"{request.service.upstream.scheme}://{host_field(request.service)}{url[3]}"


def source_at_client(request: Request, text: str) -> str | None:
    """How a source of the service's is named to this client; None: as it is."""
    url = _URL.fullmatch(text)
    if request.route.mode is not Mode.REVERSE or url is None or not _names_service(url, request):
        return None
    return f"https://{request.head.host}{url[3]}"


def _names_service(url: re.Match[str], request: Request) -> bool:
    upstream = request.service.upstream
    return url[1].lower() == upstream.scheme and _host_port(url[2], url[1]) == (upstream.host, upstream.port)


def _names_us(url: re.Match[str], request: Request) -> bool:
    """By the name that this client uses for us. Who ends TLS before us may have changed the scheme."""
    named = _host_port(url[2], url[1])
    return named is not None and named == _host_port(request.head.host, url[1])


def _host_port(authority: str, scheme: str) -> tuple[str, int] | None:
    try:
        url = urlsplit(f"//{authority}")
        host, port = url.hostname, url.port
    except ValueError:
        return None
    return (host.rstrip(".").lower(), port or _PORTS[scheme.lower()]) if host else None
