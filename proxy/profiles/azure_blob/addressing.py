"""What a path and a query name: account, container, blob, and the parameters of an operation.

1. Source: "Naming and referencing containers, blobs, and metadata" (Azure Storage REST reference). A
   service is one account by its host's name, or several by the first segment of the path (emulators).
2. Paths and parameters that stay go on byte for byte. What is decoded is decoded to understand it, and to
   name an upload: there are many spellings of one name.
3. A parameter that is given twice is refused: we and the service might read different ones.
4. Blobs in the root container without its name in the path (`/name`) are refused, as no operation fits
   them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from envelope.multipart import upload_ref
from proxy import refusals
from proxy.refusals import RefusedError

_CONTAINER: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{1,61})[a-z0-9]|\$root|\$web|\$logs|\$blobchangefeed")


_SLASHES: Final = re.compile(r"[/\\]")
_DOTS: Final = frozenset({".", ".."})


class Place(StrEnum):
    """What an operation is about."""

    SERVICE = "service"
    CONTAINER = "container"
    BLOB = "blob"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Path and query of a request, understood."""

    path: str
    """As it was sent."""
    members: tuple[str, ...] = field(repr=False)
    """The query's parts, as they were sent: a SAS token is a credential."""
    parameters: Mapping[str, str] = field(repr=False)
    """By lower-case name, decoded."""
    account: str
    """Where the path names it, else ""."""
    container: str
    blob: str

    @property
    def place(self) -> Place:
        if self.blob:
            return Place.BLOB
        return Place.CONTAINER if self.container else Place.SERVICE

    @property
    def upload_ref(self) -> bytes:
        """Names all blocks of this blob (docs/format.md 3.5)."""
        return upload_ref(f"azure-blob/{self.account}/{self.container}/{self.blob}")

    @property
    def container_path(self) -> str:
        return f"/{self.account}/{self.container}" if self.account else f"/{self.container}"

    def asking(self, *put: tuple[str, str], without: Iterable[str] = ()) -> str:
        """The same path with *put* in place of the parameters of these names, and of those in *without*."""
        gone = {name for name, _ in put}.union(without)
        kept = [member for member in self.members if _name_of(member) not in gone]
        kept += [f"{name}={quote(value, safe='')}" for name, value in put]
        return f"{self.path}?{'&'.join(kept)}" if kept else self.path


def read_target(target: str, *, account_in_path: bool) -> Target:
    """RefusedError for what names nothing, or could be read in two ways."""
    path, _, query = target.partition("?")
    members = tuple(filter(None, query.split("&")))
    parameters: dict[str, str] = {}
    for member in members:
        name, _, value = member.partition("=")
        key = _decoded(name.replace("+", " ")).lower()
        if key in parameters:
            raise RefusedError(refusals.BAD_MESSAGE)
        parameters[key] = _decoded(value.replace("+", " "))
    if not _DOTS.isdisjoint(_SLASHES.split(_decoded(path))):
        raise RefusedError(refusals.BAD_MESSAGE)  # who resolves them comes to another account's blob
    segments = path.removeprefix("/").split("/")
    account = _decoded(segments.pop(0)) if account_in_path else ""
    container, blob = (_decoded(segments[0]), _decoded("/".join(segments[1:]))) if segments else ("", "")
    if account_in_path and not account:
        raise RefusedError(refusals.UNKNOWN_ROUTE)
    if "/" in container or "/" in account or (blob and not _CONTAINER.fullmatch(container)):
        raise RefusedError(refusals.UNKNOWN_ROUTE)
    return Target(
        path=path,
        members=members,
        parameters=parameters,
        account=account,
        container=container,
        blob=blob,
    )


def _name_of(member: str) -> str:
    return _decoded(member.partition("=")[0].replace("+", " ")).lower()


def _decoded(text: str) -> str:
    try:
        return unquote_to_bytes(text.encode("utf-8", "surrogateescape")).decode()
    except UnicodeDecodeError:
        raise RefusedError(refusals.BAD_MESSAGE) from None
