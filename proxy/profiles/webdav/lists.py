"""WebDAV's answers in XML: sizes become those of the plaintext, digests of ciphertext go, addresses are ours.

1. A size is computed where every object is a simple one. Where there may be composites (Nextcloud) or what
   was there before us (routes that migrate) the object is looked at, once per version; what cannot be found
   out is left out, never guessed.
2. A version is told by its ETag. Where the client has not asked for it, we do, and take it out again.
3. Collections have no content: what a server says of theirs stays.
4. What is no sealed object has the size it has: a read of it is refused, or not, by other rules.
"""

import re
from typing import Final

from envelope.errors import FormatError, SealgateError
from envelope.objects import plain_length, sealed_length
from proxy import refusals
from proxy.plans.conversing import Conversation
from proxy.plans.profile_options import StoredPolicy
from proxy.plans.request import Request
from proxy.profiles.entry_mapping import Question
from proxy.profiles.webdav.addresses import Addresses
from proxy.profiles.webdav.chunk_names import FUTURE_FILE, upload_path
from proxy.profiles.xml_rewriting import Entry, EntryRule, Leaf, Name, Path, XmlMapper, rewrite
from proxy.refusals import RefusedError

DAV: Final = "DAV:"
OWNCLOUD: Final = "http://owncloud.org/ns"

_HREF: Final[Name] = (DAV, "href")
_PROP: Final[Path] = ((DAV, "propstat"), (DAV, "prop"))
_LENGTH: Final[Path] = (*_PROP, (DAV, "getcontentlength"))
_TAG: Final[Path] = (*_PROP, (DAV, "getetag"))
_COLLECTION: Final[Path] = (*_PROP, (DAV, "resourcetype"), (DAV, "collection"))
_OC_SIZE: Final[Path] = (*_PROP, (OWNCLOUD, "size"))
_DIGESTS: Final[tuple[Path, ...]] = (
    (*_PROP, (OWNCLOUD, "checksums")),
    (*_PROP, (DAV, "getcontentmd5")),
    (*_PROP, ("urn:schemas-microsoft-com:", "Win32ContentHash")),
)
_RESPONSE: Final = EntryRule(
    at=((DAV, "multistatus"), (DAV, "response")),
    leaves=frozenset({(_HREF,), _LENGTH, _TAG, _COLLECTION, _OC_SIZE, *_DIGESTS}),
    anywhere=frozenset({_HREF}),
)
_ADDRESSES_ONLY: Final = tuple(
    EntryRule(at=at, anywhere=frozenset({_HREF}))
    for at in (
        ((DAV, "multistatus"), (DAV, "response")),
        ((DAV, "prop"),),
        ((DAV, "error"),),
    )
)
_PROPFIND_PROP: Final = EntryRule(
    at=((DAV, "propfind"),), leaves=frozenset({((DAV, "prop"),), ((DAV, "prop"), (DAV, "getetag"))})
)
_NUMBER: Final = re.compile(r"[0-9]{1,19}")
# Where Nextcloud and ownCloud have their files; nobody else puts objects together of parts.
_NEXTCLOUD: Final = re.compile(r"(?:/.*)?/(?:remote|public)\.php/(?:dav|webdav)(?:/.*)?", re.DOTALL)


def is_nextcloud(target: str) -> bool:
    """Whether objects at *target* may have been joined of chunks by the service."""
    return _NEXTCLOUD.fullmatch(target.partition("?")[0]) is not None


def needs_a_look(request: Request, target: str) -> bool:
    """Whether the stored length of an object at *target* does not tell that of its plaintext."""
    stored = request.options.policy_for(target) or StoredPolicy(request.service.legacy.value)
    return stored is StoredPolicy.MIGRATE or is_nextcloud(target)


def with_etags(body: bytes) -> tuple[bytes, bool]:
    """A PROPFIND body that asks for ETags too. True: it had not. XmlError."""
    is_added = False

    def ask(entry: Entry) -> None:
        nonlocal is_added
        prop = entry.first((DAV, "prop"))
        if prop is not None and entry.first((DAV, "prop"), (DAV, "getetag")) is None:
            entry.append(prop, b'<getetag xmlns="DAV:"/>')
            is_added = True

    return rewrite(body, [_PROPFIND_PROP], ask), is_added


def address_mapper(request: Request) -> XmlMapper:
    """Rewrites addresses alone: answers to locks, copies, and errors."""
    addresses = Addresses(request)
    return XmlMapper(_ADDRESSES_ONLY, lambda entry: _map_addresses(entry, addresses))


def list_mapper(talk: Conversation, *, drop_etags: bool) -> XmlMapper:
    """Rewrites answers to PROPFIND, REPORT and SEARCH. *drop_etags*: the client has not asked for them."""
    return XmlMapper([_RESPONSE], _List(talk, drop_etags=drop_etags).judge)


class _List:
    def __init__(self, talk: Conversation, *, drop_etags: bool) -> None:
        self._talk = talk
        self._request = talk.request
        self._addresses = Addresses(talk.request)
        self._drop_etags = drop_etags

    def judge(self, entry: Entry) -> Question | None:
        href = entry.text(_HREF) or ""
        etag = entry.text(*_TAG)
        _map_addresses(entry, self._addresses)
        for path in _DIGESTS:
            for leaf in entry.all(*path):
                entry.remove(leaf)
        if self._drop_etags:
            for leaf in entry.all(*_TAG):
                entry.remove(leaf)
        sizes = [leaf for path in (_LENGTH, _OC_SIZE) for leaf in entry.all(*path) if _is_number(leaf)]
        if not sizes or href.endswith("/") or entry.first(*_COLLECTION) is not None:
            return None
        stored_bytes = int(sizes[0].text)
        target = self._addresses.path_at_service(href)
        policy = self._request.options.policy_for(target) if target is not None else None
        if (
            policy is StoredPolicy.PASSTHROUGH
            or href.endswith("/" + FUTURE_FILE)
            or stored_bytes < sealed_length(0)
        ):
            return None
        if target is None or not needs_a_look(self._request, target) or _is_chunk(target):
            _put(entry, sizes, _plain_or_stored(stored_bytes))
            return None

        async def look() -> None:
            _put(entry, sizes, await self._looked_up(target, etag, stored_bytes))

        return look

    async def _looked_up(self, target: str, etag: str | None, stored_bytes: int) -> int | None:
        try:
            size = await self._version_bytes(target, etag, stored_bytes)
        except RefusedError as refused:
            size = stored_bytes if refused.refusal is refusals.NOT_SEALED else None
        except SealgateError:
            size = None  # a read of it will say why
        return size

    async def _version_bytes(self, target: str, etag: str | None, stored_bytes: int) -> int | None:
        if etag is not None and not etag.startswith("W/"):
            tag = etag if etag.startswith('"') else f'"{etag}"'
            size = await self._talk.composite_bytes(target, etag=tag, stored_bytes=stored_bytes)
            if size is not None:
                return size
        # No version to remember it by, or another one by now (Apache's turn from weak to strong).
        found = await self._talk.inspect(target)
        return found.plain_bytes if found is not None and found.stored_bytes == stored_bytes else None


def _map_addresses(entry: Entry, addresses: Addresses) -> None:
    for leaf in entry.leaves:
        if leaf.name == _HREF and not leaf.has_children:
            ours = addresses.at_client(leaf.text.strip())
            if ours is not None:
                entry.replace(leaf, ours)


def _is_chunk(target: str) -> bool:
    """A chunk is as long as a single object of its content."""
    try:
        return upload_path(target) is not None
    except RefusedError:
        return False


def _is_number(leaf: Leaf) -> bool:
    return _NUMBER.fullmatch(leaf.text.strip()) is not None


def _put(entry: Entry, sizes: list[Leaf], size: int | None) -> None:
    for leaf in sizes:
        if size is None:
            entry.remove(leaf)
        else:
            entry.replace(leaf, str(size))


def _plain_or_stored(stored_bytes: int) -> int:
    try:
        return plain_length(stored_bytes)
    except FormatError:
        return stored_bytes  # no object of ours is so long
