"""Which bucket and object a request is about: by its path, or by its host name and path.

1. Path style: `/bucket/key`. Virtual-host style: the host is `bucket.` and one of the service's host names,
   the path is `/key`. A bucket's name may have dots.
2. Nothing is decoded here but to tell a bucket from a key: a path goes on byte for byte.
3. A host that is none of the service's is none: read as path style, a key would become a bucket's name.
4. The names of parameters are compared decoded, everywhere: so the service reads them.
"""

import ipaddress
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from urllib.parse import parse_qsl, unquote_plus


class Level(Enum):
    SERVICE = "service"
    BUCKET = "bucket"
    OBJECT = "object"


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """`bucket` and `key` as they stand in the request, still percent-encoded; "" where there is none."""

    bucket: str
    key: str
    virtual_host: bool
    """Whether the bucket stands in the host name."""

    @property
    def level(self) -> Level:
        if self.key:
            return Level.OBJECT
        return Level.BUCKET if self.bucket else Level.SERVICE


def address_of(target: str, host: str, hosts: Iterable[str]) -> Address:
    """*hosts*: the names of the service, lower case, without ports. *target*: path and query."""
    path = target.partition("?")[0]
    name = host_name(host)
    own = max((own for own in hosts if _is_at_or_below(name, own)), key=len, default=name)
    if name != own:
        return Address(bucket=name[: -len(own) - 1], key=path.removeprefix("/"), virtual_host=True)
    bucket, _, key = path.removeprefix("/").partition("/")
    return Address(bucket=bucket, key=key, virtual_host=False)


def is_of_hosts(host: str, hosts: Iterable[str]) -> bool:
    """Whether *host* is one of *hosts*, or a bucket's name before one of them."""
    name = host_name(host)
    return any(_is_at_or_below(name, own) for own in hosts)


def _is_at_or_below(name: str, own: str) -> bool:
    return name == own or (name.endswith("." + own) and len(name) > len(own) + 1)


def is_of_listener(host: str, listen_host: str) -> bool:
    """Whether *host* is an address at which a listener bound to *listen_host* can be reached.

    An address, or `localhost`: no bucket stands before these.
    """
    name = host_name(host).strip("[]")
    if name == "localhost":
        return listen_host == "localhost" or _is_loopback_or_any(listen_host)
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    if listen_host == "localhost":
        return address.is_loopback
    bound = ipaddress.ip_address(listen_host)
    return bound.is_unspecified or bound == address


def _is_loopback_or_any(listen_host: str) -> bool:
    bound = ipaddress.ip_address(listen_host)
    return bound.is_loopback or bound.is_unspecified


def host_name(host: str) -> str:
    """Of `name[:port]`: lower case, without port and root dot."""
    name, colon, port = host.rpartition(":")
    if not colon or not port.isdecimal() or (":" in name and not name.endswith("]")):
        name = host
    return name.lower().removesuffix(".")


def parameter_name(part: str) -> str:
    """Of one piece of a query, decoded."""
    return unquote_plus(part.partition("=")[0], errors="surrogateescape")


def without_parameters(target: str, is_gone: Callable[[str], bool]) -> str:
    """*target* without the parameters whose decoded names *is_gone* tells, every other byte as it was."""
    path, mark, query = target.partition("?")
    if not mark:
        return target
    kept = [part for part in query.split("&") if not is_gone(parameter_name(part))]
    return f"{path}?{'&'.join(kept)}" if kept else path


def names_twice(target: str) -> bool:
    """Whether a parameter is given twice, `x-amz-*` in any case: two readers might take different ones."""
    names = [parameter_name(part) for part in target.partition("?")[2].split("&") if part]
    names = [name.lower() if name.lower().startswith("x-amz-") else name for name in names]
    return len(set(names)) < len(names)


def parameters(target: str) -> dict[str, str]:
    """The query's parameters, decoded, the first of each name; "" for one without a value."""
    query = target.partition("?")[2]
    found: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True, errors="surrogateescape"):
        found.setdefault(name, value)
    return found
