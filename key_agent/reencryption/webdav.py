"""Objects in a WebDAV store: listed and looked at directly, read and rewritten through the proxy.

1. The first 32 bytes of an object name its key (docs/format.md 2). They are read from the store itself, which
   learns nothing by that; whoever opens objects is the proxy.
2. An object is read to its end before a byte of it is written: a body that breaks off replaces nothing, and
   no server is asked to write what it is still reading. What does not fit into WHOLE_BYTES waits on disk,
   sealed (spool.py).
3. It is written with `If-Match` on the entity tag under which its key was read. A weak tag does not say that
   bytes are the same: such an object is refused, and told.
4. Answers of the store are bounded; its XML may have no document type.
5. A listing is understood as a whole, or the job stops: on a name that was passed over in silence the end of
   its key would rest.
6. A PUT is sent once. Where its connection breaks without an answer, nobody here knows what became of it:
   `Rewrite.UNANSWERED`, and whoever called looks again.
"""

import asyncio
import posixpath
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Final, override
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit
from xml.parsers import expat

import aiohttp

from envelope.errors import FormatError, IntegrityError
from envelope.keys import ANONYMOUS, KeyId
from envelope.objects import HEADER_SIZE, Header, has_magic
from key_agent.reencryption.connector import Connector, Found, Rewrite, StoreError
from key_agent.reencryption.spool import Spool
from runtime.tls import client_context

WHOLE_BYTES: Final = 8 << 20
MAX_LISTING_BYTES: Final = 64 << 20
_TIMEOUT_S: Final = 60.0
_PROPFIND: Final = b'<?xml version="1.0"?><propfind xmlns="DAV:"><prop><resourcetype/></prop></propfind>'
_SUCCESS: Final = re.compile(r"HTTP/\S+ 2\d\d\b")
_ERROR_HEADER: Final = "Sealgate-Error"
# What the proxy says of the object's own key; everything else it cannot do now is the same for all objects.
_OF_THE_OBJECT: Final = (
    "key-unknown",
    "key-withdrawn",
    "key-destroyed",
    "key-suspended",
    "object-invalid",
    "not-sealed",
)
_TRIES_GONE: Final = (HTTPStatus.NOT_FOUND, HTTPStatus.GONE)


@dataclass(frozen=True, slots=True, kw_only=True)
class WebDavStore:
    """Where a store is, and the same store behind the enterprise's proxy."""

    store_url: str
    """https://host[:port]/folder/ of the store itself."""
    through_url: str
    """The same folder by way of the proxy."""
    store_ca_file: Path
    through_ca_file: Path
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    timeout_s: float = _TIMEOUT_S

    def described(self) -> str:
        """For people, and to know it again: no secret."""
        return f"{self.store_url} by way of {self.through_url}"


_OTHER: Final = "what the proxy answers is not the object that was looked at (another entity tag, or a part)"
_BROKEN_OFF: Final = (Rewrite.REFUSED, "it breaks off: spoiled, or cut")


class WebDavConnector(Connector):
    def __init__(self, store: WebDavStore) -> None:
        """TlsError: a CA file is no good. StoreError: a URL is none."""
        self._store = store
        self._root = _folder(store.store_url)
        _folder(store.through_url)
        auth = None
        if store.user is not None:
            auth = aiohttp.BasicAuth(store.user, store.password or "", encoding="utf-8")
        self._direct = _session(store.store_ca_file, auth, store.timeout_s)
        self._through = _session(store.through_ca_file, auth, store.timeout_s)

    @override
    async def names(self, *, after: str) -> AsyncIterator[str]:
        async for name in self._walk("", after):
            yield name

    async def _walk(self, folder: str, after: str) -> AsyncIterator[str]:
        """Everything below *folder*, in the order of the names as text."""
        if (found := await self._list(folder)) is None:
            await self._check_gone(folder)
            return
        files, folders = found
        # A folder stands where its slash puts it: names of what is in it begin so.
        for name, is_folder in sorted([(n, False) for n in files] + [(f"{n}/", True) for n in folders]):
            if not is_folder:
                if name > after:
                    yield name
            elif name > after or after.startswith(name):
                async for inner in self._walk(name, after):
                    yield inner

    async def _check_gone(self, folder: str) -> None:
        """StoreError: the one above it lists it still, or is hidden itself."""
        name, _, _ = folder.rpartition("/")
        above, slash, _ = name.rpartition("/")
        if (found := await self._list(above + slash)) is None:
            await self._check_gone(above + slash)
        elif name in found[1]:
            raise StoreError(f"the store lists /{folder}, and says that it is not there")

    async def _list(self, folder: str) -> tuple[list[str], list[str]] | None:
        """Files and folders in it; None: it is not there, and is not the store's own folder."""
        content = bytearray()
        try:
            async with self._direct.request(
                "PROPFIND",
                self._url(self._store.store_url, folder),
                data=_PROPFIND,
                headers={"Depth": "1"},
                allow_redirects=False,
            ) as answer:
                if answer.status in _TRIES_GONE and folder:
                    return None
                _expect(answer, HTTPStatus.MULTI_STATUS)
                async for piece in answer.content.iter_chunked(1 << 16):
                    content += piece
                    if len(content) > MAX_LISTING_BYTES:
                        raise StoreError(f"the listing of /{folder} is too large")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _silence(error) from error
        files: list[str] = []
        folders: list[str] = []
        is_named = False
        for href, is_folder in read_listing(bytes(content)):
            name = self._name(href)
            if name.rstrip("/") == folder.rstrip("/"):
                is_named = is_folder
            elif not name.startswith(folder) or "/" in name[len(folder) :].rstrip("/"):
                raise _misread(href, "what was not asked for")
            else:
                (folders if is_folder else files).append(name.rstrip("/"))
        if not is_named:
            raise StoreError(f"the store's listing of /{folder} is not about that folder")
        for names in (files, folders):
            if len(set(names)) < len(names):  # two objects, and only one of them can be asked for
                raise StoreError(f"the store's listing of /{folder} has a name twice")
        return files, folders

    def _name(self, href: str) -> str:
        """Below the store's folder. StoreError: it is elsewhere, or cannot be named."""
        try:
            parts = urlsplit(href)
            path = unquote_to_bytes(parts.path).decode()
        except UnicodeDecodeError:
            raise _misread(href, "a name that is no UTF-8") from None
        except ValueError:
            raise _misread(href, "what is no URL") from None
        if "?" in href or "#" in href:
            raise _misread(href, "a name that is not encoded")
        if "//" in path:  # what is below an empty name would be taken for the folder itself
            raise _misread(href, "an empty name")
        if f"{path}/" == self._root:
            return ""
        # Dots in it lead elsewhere.
        if posixpath.normpath(path) != (path.rstrip("/") or "/") or not path.startswith(self._root):
            raise _misread(href, "what is elsewhere")
        return path[len(self._root) :]

    @override
    async def look(self, name: str) -> Found | None:
        try:
            found, is_told = await self._look(name, {"Range": f"bytes=0-{HEADER_SIZE - 1}"})
            if not is_told:
                found, _ = await self._look(name, {})
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _silence(error) from error
        return found

    async def _look(self, name: str, headers: dict[str, str]) -> tuple[Found | None, bool]:
        """The object, and whether the answer to a range says enough of it."""
        url = self._url(self._store.store_url, name)
        async with self._direct.get(url, headers=headers, allow_redirects=False) as answer:
            if answer.status in _TRIES_GONE:
                return None, True
            if headers and answer.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return None, False  # it may be empty, and its server may not know ranges either
            _expect(answer, HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT)
            # A server may ignore the range: no more than this is read of it.
            start = await _at_most(answer, HEADER_SIZE)
            if headers and answer.status == HTTPStatus.PARTIAL_CONTENT and len(start) < HEADER_SIZE:
                return None, False  # it may send less than it was asked for (RFC 9110 15.3.7)
            _check_first_bytes(answer, start)
            return Found(name=name, key_id=_key_of(start), version=answer.headers.get("ETag", "")), True

    @override
    async def rewrite(self, found: Found) -> tuple[Rewrite, str]:
        if not found.version.startswith('"'):
            return Rewrite.REFUSED, "the store gives no strong entity tag for it"
        url = self._url(self._store.through_url, found.name)
        try:
            return await self._rewrite(url, {"If-Match": found.version})
        except aiohttp.ClientPayloadError:  # the proxy cuts what does not verify
            return _BROKEN_OFF
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _silence(error) from error

    async def _rewrite(self, url: str, condition: dict[str, str]) -> tuple[Rewrite, str]:
        with Spool(whole_bytes=WHOLE_BYTES) as spool:
            async with self._through.get(url, headers=condition, allow_redirects=False) as answer:
                if (verdict := _verdict(answer)) is not None:
                    return verdict
                # A login page, a part, or nothing would be written over it: If-Match looks at what is there.
                if answer.status != HTTPStatus.OK or answer.headers.get("ETag") != condition["If-Match"]:
                    return Rewrite.REFUSED, f"{_OTHER}: HTTP {answer.status}"
                kind = answer.headers.get("Content-Type", "application/octet-stream")
                size_bytes = answer.content_length
                async for piece in answer.content.iter_chunked(1 << 16):
                    await _keep(spool, piece)
            if size_bytes is not None and spool.size_bytes != size_bytes:
                return _BROKEN_OFF
            headers = condition | {"Content-Type": kind, "Content-Length": str(spool.size_bytes)}
            try:
                async with self._through.put(
                    url, headers=headers, data=spool.read(), allow_redirects=False
                ) as answer:
                    return _verdict(answer) or (Rewrite.DONE, "")
            except _BrokeError as error:
                return Rewrite.UNANSWERED, f"the connection broke while it was written: {error}"

    @override
    async def close(self) -> None:
        await asyncio.gather(self._direct.close(), self._through.close())

    def _url(self, base: str, name: str) -> str:
        return base.rstrip("/") + "/" + quote(name)


def read_listing(content: bytes) -> list[tuple[str, bool]]:
    """Each `href` of a multistatus document, and whether it is a collection (RFC 4918 14).

    StoreError, also where that is not said, or a listing is said to be cut (507, as in RFC 6578 3.6).
    """
    reader = _Listing()
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.text
    parser.StartDoctypeDeclHandler = reader.doctype
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise StoreError(f"the store's listing cannot be read: {error}") from None
    return reader.found


class _Listing:
    def __init__(self) -> None:
        self.found: list[tuple[str, bool]] = []
        self._path: list[str] = []
        self._href = ""
        self._status = ""
        self._is_typed = False
        self._is_folder = False

    def start(self, name: str, _attributes: object) -> None:
        self._path.append(name)
        if name == "DAV: response":
            self._href, self._is_typed, self._is_folder = "", False, False
        elif name == "DAV: status":
            self._status = ""
        elif name == "DAV: resourcetype":
            self._is_typed = True
        elif name == "DAV: collection" and "DAV: resourcetype" in self._path:
            self._is_folder = True

    def end(self, name: str) -> None:
        self._path.pop()
        if name == "DAV: status" and not _SUCCESS.match(self._status.strip()):
            raise _misread(self._href.strip(), f"what it answers with {self._status.strip()[:80]!r}")
        if name == "DAV: response":
            if not self._is_typed:
                raise _misread(self._href.strip(), "what may be a folder or not (no resourcetype)")
            self.found.append((self._href.strip(), self._is_folder))

    def text(self, data: str) -> None:
        if self._path[-2:] == ["DAV: response", "DAV: href"]:
            self._href += data
        elif self._path[-1:] == ["DAV: status"]:
            self._status += data

    def doctype(self, *_: object) -> None:
        raise StoreError("the store's listing has a document type, which may hide anything")


class _BrokeError(Exception):
    """A connection ended before the answer to a request on it that may have changed something."""


async def _sent_once(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Rule 6: the library repeats PUT on a kept connection that broke, conditions or not."""
    try:
        return await handler(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        if request.method != "PUT":
            raise
        raise _BrokeError(type(error).__name__) from error


def _session(ca_file: Path, auth: aiohttp.BasicAuth | None, timeout_s: float) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=client_context(ca_file), limit=8),
        auth=auth,
        middlewares=(_sent_once,),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=timeout_s),
        headers={"Accept-Encoding": "identity", "User-Agent": "sealgate-reencryption"},
        trust_env=False,
    )


def _folder(url: str) -> str:
    """The path of a folder's URL, with its slash. StoreError if it is no https URL."""
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise StoreError(f"not the URL of a folder: {url!r} (https://host/folder/ is)")
    return unquote(parts.path).rstrip("/") + "/"


async def _at_most(answer: aiohttp.ClientResponse, size_bytes: int) -> bytes:
    content = bytearray()
    while len(content) < size_bytes and (piece := await answer.content.read(size_bytes - len(content))):
        content += piece
    return bytes(content)


def _verdict(answer: aiohttp.ClientResponse) -> tuple[Rewrite, str] | None:
    """What an answer means for the object; None: it goes on. StoreError: for none of them at present."""
    match answer.status:
        case status if 200 <= status < 300:
            return None
        case HTTPStatus.PRECONDITION_FAILED:
            return Rewrite.CHANGED, "it was changed meanwhile"
        case status if status in _TRIES_GONE:
            return Rewrite.GONE, f"HTTP {answer.status}"
        case status if answer.headers.get(_ERROR_HEADER) in _OF_THE_OBJECT:
            return Rewrite.REFUSED, f"HTTP {status}, {answer.headers[_ERROR_HEADER]}"
        case status if status >= 500 or status in (
            HTTPStatus.UNAUTHORIZED,
            HTTPStatus.PROXY_AUTHENTICATION_REQUIRED,
            HTTPStatus.TOO_MANY_REQUESTS,
        ):
            raise StoreError(f"HTTP {status} {answer.headers.get(_ERROR_HEADER, '')}".rstrip())
        case status:
            return Rewrite.REFUSED, f"HTTP {status}"


def _expect(answer: aiohttp.ClientResponse, *statuses: int) -> None:
    if answer.status not in statuses:
        raise StoreError(f"the store answers HTTP {answer.status}")


def _check_first_bytes(answer: aiohttp.ClientResponse, start: bytes) -> None:
    """StoreError: they are not the object's own, so they name no key, and it would be taken for nobody's."""
    coding = answer.headers.get("Content-Encoding", "identity")
    part = answer.headers.get("Content-Range", "")
    if "ETag" not in answer.headers and not has_magic(start):  # a login page has none, a store's objects do
        raise StoreError("the store answers without an entity tag, which need not be the object")
    if answer.status == HTTPStatus.PARTIAL_CONTENT and not part.lower().startswith("bytes 0-"):
        raise StoreError(f"the store answers another part than the first: {part[:80]!r}")
    if coding.lower() != "identity" and not has_magic(start):  # else it is a mere label, as .gz gets one
        raise StoreError(f"the store answers in the coding {coding[:40]!r}, which nobody asked for")


def _key_of(start: bytes) -> KeyId | None:
    """Who sealed what begins so; None: nobody of ours."""
    if not has_magic(start):
        return None
    try:
        return Header.parse(start).key_id
    except (FormatError, IntegrityError):  # cut, damaged, or of a later version: it may be any key's
        return ANONYMOUS


async def _keep(spool: Spool, piece: bytes) -> None:
    try:
        await spool.write(piece)
    except OSError as error:
        raise StoreError(f"no room to keep an object aside: {error.strerror}") from error


def _misread(href: str, what: str) -> StoreError:
    return StoreError(f"the store's listing names {what}: {href[:200]!r}")


def _silence(error: BaseException) -> StoreError:
    return StoreError(f"store or proxy do not answer: {type(error).__name__}")
