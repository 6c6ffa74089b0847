"""URLs inside of WebDAV's messages: Destination, If, href. Pure.

1. In forward mode the client names the service itself: nothing is rewritten.
2. In reverse mode the client names us. What it says of us becomes the service, byte for byte behind the
   authority; what the service says of itself becomes a path, which means us.
3. A destination elsewhere is refused: the service would be asked to carry an object to where its key is not
   known, or where nobody seals.
"""

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from proxy import refusals
from proxy.asking import host_field
from proxy.plans.request import Mode, Request
from proxy.refusals import RefusedError

_PORTS: Final = {"http": 80, "https": 443}
_ABSOLUTE: Final = re.compile(r"(https?)://([^/?#\\@\s]+)([/?#].*)?", re.IGNORECASE | re.DOTALL)
_PATH: Final = re.compile(r"/(?![/\\])[^\\\x00-\x20\x7f]*")
# RFC 4918 10.4.2: lists in parentheses, state tokens in them; entity tags may hold any of these characters.
_IF_TOKEN: Final = re.compile(r'\[(?:W/)?"[^"]*"\]|<[^<>]*>|[()]|[^()<\[]+|[<\[]')
"""No reference has a `<` in it: looked for in one, a quarter of a million of them would take minutes."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Of one request."""

    request: Request

    @property
    def _is_reverse(self) -> bool:
        return self.request.route.mode is Mode.REVERSE

    def destination(self) -> str | None:
        """What Destination has to be at the service; None: there is none. RefusedError."""
        values = self.request.head.fields.all("destination")
        if not values:
            return None
        if len(values) > 1:
            raise RefusedError(refusals.BAD_DESTINATION)
        if _PATH.fullmatch(values[0]):
            return values[0]
        absolute = _ABSOLUTE.fullmatch(values[0])
        if absolute is None:
            raise RefusedError(refusals.BAD_DESTINATION)
        there = self._at_service(absolute)
        if there is None:
            raise RefusedError(refusals.FOREIGN_DESTINATION)
        return there

    def destination_path(self) -> str | None:
        """Path of the destination, as it is spelt. RefusedError."""
        destination = self.destination()
        if destination is None:
            return None
        return destination if destination.startswith("/") else path_of_url(destination)

    def conditions(self) -> str | None:
        """What If has to be at the service: its resource tags name the service. None: as it is, or absent."""
        value = self.request.head.fields.sole("if")
        if value is None or not self._is_reverse:
            return None
        depth, out = 0, []
        for token in _IF_TOKEN.findall(value):
            depth += (token == "(") - (token == ")")  # noqa: S105 - no secret
            absolute = None if depth else _ABSOLUTE.fullmatch(token[1:-1])
            there = self._at_service(absolute) if absolute is not None and token[0] == "<" else None
            out.append(token if there is None else f"<{there}>")
        return "".join(out)

    def at_client(self, reference: str) -> str | None:
        """A path for what the service says of itself, as the client may use it. None: it stays as it is."""
        if not self._is_reverse:
            return None
        absolute = _ABSOLUTE.fullmatch(reference)
        if absolute is None or not self._names_service(absolute):
            return None
        rest = absolute[3] or "/"
        return rest if _PATH.fullmatch(rest) else None

    def path_at_service(self, reference: str) -> str | None:
        """The path that can be asked for to get what the service calls *reference*; None: it is elsewhere."""
        if _PATH.fullmatch(reference):
            return reference
        absolute = _ABSOLUTE.fullmatch(reference)
        if absolute is None or not self._names_service(absolute):
            return None
        rest = absolute[3] or "/"
        return rest if _PATH.fullmatch(rest) else None

    def _at_service(self, absolute: re.Match[str]) -> str | None:
        """The URL at the service for one that the client has written; None: it means somebody else."""
        if self._names_service(absolute):
            if not self._is_reverse:
                return absolute[0]
        elif not self._is_reverse or not self._names_us(absolute):
            return None
        service = self.request.service
        return f"{service.upstream.scheme}://{host_field(service)}{absolute[3] or '/'}"

    def _names_service(self, absolute: re.Match[str]) -> bool:
        upstream = self.request.service.upstream
        named = _host_port(absolute[2], absolute[1])
        return absolute[1].lower() == upstream.scheme and named == (upstream.host, upstream.port)

    def _names_us(self, absolute: re.Match[str]) -> bool:
        """By the name that this client uses for us. Who ends TLS before us may have changed the scheme."""
        named = _host_port(absolute[2], absolute[1])
        return named is not None and named == _host_port(self.request.head.host, absolute[1])


def path_of_url(url: str) -> str:
    """Path and query, as they are spelt; `/` if there are none."""
    absolute = _ABSOLUTE.fullmatch(url)
    rest = (absolute[3] if absolute is not None else None) or "/"
    return rest if rest.startswith("/") else "/" + rest


def _host_port(authority: str, scheme: str) -> tuple[str, int] | None:
    try:
        url = urlsplit(f"//{authority}")
        host, port = url.hostname, url.port
    except ValueError:
        return None
    if not host or url.username is not None:
        return None
    return host.rstrip(".").lower(), port or _PORTS[scheme.lower()]
