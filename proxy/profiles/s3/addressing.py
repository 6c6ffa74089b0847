"""Which bucket and object a request is about: by its path, or by its host name and path.

1. Path style: `/bucket/key`. Virtual-host style: the host is `bucket.` and one of the service's host names,
   the path is `/key`. A bucket's name may have dots.
2. Nothing is decoded here but to tell a bucket from a key: a path goes on byte for byte.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from urllib.parse import parse_qsl


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
    for own in hosts:
        if name.endswith("." + own) and len(name) > len(own) + 1:
            return Address(bucket=name[: -len(own) - 1], key=path.removeprefix("/"), virtual_host=True)
    bucket, _, key = path.removeprefix("/").partition("/")
    return Address(bucket=bucket, key=key, virtual_host=False)


def host_name(host: str) -> str:
    """Of `name[:port]`: lower case, without port and root dot."""
    name, colon, port = host.rpartition(":")
    if not colon or not port.isdecimal() or (":" in name and not name.endswith("]")):
        name = host
    return name.lower().removesuffix(".")


def parameters(target: str) -> dict[str, str]:
    """The query's parameters, decoded, the first of each name; "" for one without a value."""
    query = target.partition("?")[2]
    found: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True, errors="surrogateescape"):
        found.setdefault(name, value)
    return found
