"""Small documents that S3 answers with, rewritten in place: every byte that is not ours to change stays.

1. They are read whole, within a limit: 1,000 parts of an upload, the result of a completion or a copy. What
   streams (lists of objects) is another matter.
2. No DTD, no depth; what is not well formed, or goes on behind its end, is refused and never passed on.
3. A result may come minutes after its head, behind white space that keeps connections alive: the white space
   goes on as it comes, the document when it has been read and what follows from it has been done.
"""

import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit
from xml.parsers import expat
from xml.sax.saxutils import escape

import msgspec

from envelope.errors import FormatError
from envelope.objects import plain_length
from proxy import refusals
from proxy.plans.request import Mode, Request
from proxy.profiles.s3 import etags
from proxy.profiles.s3.addressing import host_name
from proxy.profiles.s3.call import MAX_DOCUMENT_BYTES
from proxy.refusals import RefusedError
from proxy.uploads import Completion, KeptPart

_LISTS_OF_PARTS: Final = ("ListPartsResult", "ListPartsResponse")  # the second: moto's
_MAX_DEPTH: Final = 8
_MAX_ELEMENTS: Final = 40_000
_MAX_DECLARATION_BYTES: Final = 1024
_MAX_LOOKED_BYTES: Final = 4 * MAX_DOCUMENT_BYTES
"""Of a result that streams: with every piece it is looked at whether it has ended, from its beginning."""
# White space and the XML declaration; the root's `<` is not among it.
_PROLOGUE: Final = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^<>]*\?>\s*)?")
_HALF_PROLOGUE: Final = re.compile(rb"<(?:\?[^<>]*)?\Z")


@dataclass(frozen=True, slots=True)
class Element:
    """`[begin, end)` with its tags, `[inner, close)` without. `text`: None if it has children."""

    path: tuple[str, ...]
    begin: int
    inner: int
    close: int
    end: int
    text: str | None


def elements_of(document: bytes) -> list[Element]:
    """Every element, a parent behind its children. RefusedError(SERVICE_ANSWER) if it is no such document."""
    reader = _Reader(document)
    try:
        reader.parse()
    except (expat.ExpatError, ValueError):
        raise RefusedError(refusals.SERVICE_ANSWER) from None
    return reader.found


def check_request(operation: str, body: bytes) -> None:
    """Of the protocol's documents that clients send: nothing, JSON for a policy, XML for all else.

    RefusedError(MALFORMED_DOCUMENT): content must not go up because its address was taken for a bucket's.
    """
    if not body:
        return
    try:
        if operation == "PutBucketPolicy":
            is_document = isinstance(msgspec.json.decode(body), dict)
        else:
            root = root_of(body).rpartition(":")[2]
            is_document = operation != "CreateBucket" or root == "CreateBucketConfiguration"
    except (RefusedError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        is_document = False
    if not is_document:
        raise RefusedError(refusals.MALFORMED_DOCUMENT)


def root_of(document: bytes) -> str:
    """The name of the document's root. RefusedError(SERVICE_ANSWER)."""
    return elements_of(document)[-1].path[0]


def error_code(document: bytes) -> str | None:
    """The code of a service's `Error`; None for anything else."""
    try:
        elements = elements_of(document)
    except RefusedError:
        return None
    for element in elements:
        if element.path == ("Error", "Code") and element.text is not None:
            return element.text.strip()
    return None


class _Reader:
    def __init__(self, document: bytes) -> None:
        self.found: list[Element] = []
        self._document = document
        self._open: list[tuple[str, int, int, list[str] | None]] = []
        self._parser = parser = expat.ParserCreate(namespace_separator=" ")
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._data
        parser.StartDoctypeDeclHandler = self._refuse

    def parse(self) -> None:
        self._parser.Parse(self._document, True)

    def _refuse(self, *_arguments: object) -> None:
        raise ValueError

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        begin = self._parser.CurrentByteIndex
        if len(self._open) >= _MAX_DEPTH or len(self.found) >= _MAX_ELEMENTS:
            raise ValueError
        if any(">" in value for value in attributes.values()):
            raise ValueError  # the end of the tag is looked for
        if self._open:
            parent = self._open[-1]
            self._open[-1] = (*parent[:3], None)
        inner = self._document.index(b">", begin) + 1
        self._open.append((name.rpartition(" ")[2], begin, inner, []))

    def _data(self, data: str) -> None:
        texts = self._open[-1][3] if self._open else None
        if texts is not None:
            texts.append(data)

    def _end(self, _name: str) -> None:
        close = self._parser.CurrentByteIndex
        path = tuple(item[0] for item in self._open)
        _, begin, inner, texts = self._open.pop()
        if self._document[inner - 2 : inner - 1] == b"/":  # <Empty/>
            close = end = inner
        else:
            end = self._document.index(b">", close) + 1
        text = None if texts is None else "".join(texts)
        self.found.append(Element(path, begin, inner, close, end, text))


type Splice = tuple[int, int, bytes]


def spliced(document: bytes, splices: Iterable[Splice]) -> bytes:
    """*document* with each [from, to) replaced; none may overlap another."""
    out, at = bytearray(), 0
    for begin, end, new in sorted(splices):
        if begin < at:
            raise RefusedError(refusals.SERVICE_ANSWER)
        out += document[at:begin] + new
        at = end
    return bytes(out + document[at:])


def _text(element: Element, text: str) -> Splice:
    return element.inner, element.close, escape(text).encode()


# Results.


def map_result(document: bytes, request: Request) -> bytes:
    """A completion's or a copy's result as the client is to see it."""
    return spliced(document, _result_splices(elements_of(document), request))


def _result_splices(elements: Iterable[Element], request: Request) -> Iterator[Splice]:
    for element in elements:
        name = element.path[-1]
        if len(element.path) != 2 or element.text is None or element.close == element.inner:
            continue
        if name == "ETag":
            yield _text(element, etags.to_client(element.text))
        elif name.startswith("Checksum"):
            yield element.begin, element.end, b""
        elif name == "Location" and request.route.mode is Mode.REVERSE:
            yield _text(element, own_location(element.text, request))


def own_location(text: str, request: Request) -> str:
    """An address at the service as one at this proxy, the bucket in the host name included."""
    try:
        parts = urlsplit(text)
        host = parts.hostname or ""
    except ValueError:
        return text
    upstream = request.service.upstream.host.lower()
    base = request.head.host
    if parts.scheme not in ("http", "https") or not (host == upstream or host.endswith("." + upstream)):
        return text
    prefix = host.removesuffix(upstream)
    if prefix and host_name(base).startswith(prefix):
        prefix = ""  # the client has the bucket in the host name already
    return parts._replace(scheme="https", netloc=prefix + base).geturl()


class ResultMapper:
    """A result that streams (rule 3). *ended* is told the root's name once all of it is there."""

    def __init__(self, request: Request, ended: Callable[[str], Awaitable[None]]) -> None:
        self._request = request
        self._ended = ended
        self._held = bytearray()
        self._has_begun = False
        self._looked_bytes = 0
        self._root: str | None = None
        self._made = b""
        self._is_done = False

    @property
    def pending(self) -> bool:
        return self._root is not None and not self._is_done

    def feed(self, piece: bytes) -> bytes:
        self._held += piece
        if len(self._held) > MAX_DOCUMENT_BYTES:
            raise RefusedError(refusals.SERVICE_ANSWER)
        if self._is_done:
            return self._rest()
        out = b"" if self._has_begun else self._prologue()
        if self._has_begun and self._root is None and b">" in piece:
            self._look()
        return out

    def _prologue(self) -> bytes:
        match = _PROLOGUE.match(self._held)
        length = match.end() if match is not None else 0
        left = bytes(self._held[length:])
        self._has_begun = left != b"" and _HALF_PROLOGUE.match(left) is None
        if not self._has_begun and len(left) > _MAX_DECLARATION_BYTES:
            raise RefusedError(refusals.SERVICE_ANSWER)
        return self._take(length)

    def _look(self) -> None:
        """Whether all of the document is there."""
        document = bytes(self._held)
        if not document.rstrip().endswith(b">"):
            return
        self._looked_bytes += len(document)
        if self._looked_bytes > _MAX_LOOKED_BYTES:
            raise RefusedError(refusals.SERVICE_ANSWER)
        try:
            elements = elements_of(document)
        except RefusedError:
            return  # more may come; at the end it is refused
        self._root = elements[-1].path[0]
        self._made = spliced(document, _result_splices(elements, self._request))
        self._held.clear()

    async def settle(self) -> None:
        if self._root is None:
            raise RefusedError(refusals.INTERNAL)
        await self._ended(self._root)
        self._is_done = True

    def finish(self) -> bytes:
        if not self._is_done:
            raise RefusedError(refusals.SERVICE_ANSWER)
        return self._rest()

    def _rest(self) -> bytes:
        made, self._made = self._made, b""
        if bytes(self._held).strip():
            raise RefusedError(refusals.SERVICE_ANSWER)
        return made + self._take(len(self._held))

    def _take(self, count: int) -> bytes:
        taken = bytes(memoryview(self._held)[:count])
        del self._held[:count]
        return taken


# Lists of parts.


def map_parts(document: bytes, kept: Iterable[KeptPart], completion: Completion | None) -> bytes:
    """A ListPartsResult with plaintext sizes, without the part that is ours. RefusedError(SERVICE_ANSWER)."""
    remembered = list(kept)
    by_tag = {(item.part.number, item.tag.lower()): item for item in remembered}
    newest = {item.part.number: item for item in reversed(remembered)}
    elements = elements_of(document)
    if elements[-1].path[0] not in _LISTS_OF_PARTS:
        raise RefusedError(refusals.SERVICE_ANSWER)
    splices: list[Splice] = []
    entry: dict[str, Element] = {}
    checksums: list[Element] = []
    for element in elements:
        if element.path[1:2] != ("Part",):
            continue
        if len(element.path) > 2:
            entry[element.path[-1]] = element
            if element.path[2].startswith("Checksum"):
                checksums.append(element)
            continue
        number, tag = _number(entry), (_said(entry, "ETag")).strip('"')
        found = by_tag.get((number, tag.lower()))
        if found is None and completion is not None and number == completion.final_number:
            found = newest.get(number) if completion.is_joined else None
            if found is None:
                splices.append((element.begin, element.end, b""))
                entry, checksums = {}, []
                continue
            tag = found.tag
        splices.append(_text(entry["ETag"], f'"{etags.to_client(tag)}"'))
        splices.append(_text(entry["Size"], str(_plain_bytes(found, _said(entry, "Size")))))
        splices.extend((item.begin, item.end, b"") for item in checksums)
        entry, checksums = {}, []
    return spliced(document, splices)


def _said(entry: dict[str, Element], name: str) -> str:
    element = entry.get(name)
    if element is None or element.text is None:
        raise RefusedError(refusals.SERVICE_ANSWER)
    return element.text.strip()


def _number(entry: dict[str, Element]) -> int:
    text = _said(entry, "PartNumber")
    if not (text.isascii() and text.isdecimal() and len(text) <= 5):
        raise RefusedError(refusals.SERVICE_ANSWER)
    return int(text)


def _plain_bytes(found: KeptPart | None, said: str) -> int:
    if found is not None:
        return found.part.plain_bytes
    if not (said.isascii() and said.isdecimal() and len(said) <= 15):
        raise RefusedError(refusals.SERVICE_ANSWER)
    try:
        return plain_length(int(said))
    except FormatError:
        return int(said)  # not sealed: sent another way
