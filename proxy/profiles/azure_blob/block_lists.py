"""Lists of blocks: what a client commits, what the service is asked, what it answers. Without I/O.

1. Source: "Put Block List" and "Get Block List" (Azure Storage REST reference). A document that is not of
   that shape, has a document type, or lists more blocks than Azure takes, is refused.
2. In an answer a block is shown by its client's name and plaintext size. The block of the manifest is in no
   list, and neither is one of which nothing is known here: nobody could commit it.
3. A long list takes seconds: whoever has others to serve reads it in a thread.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from xml.parsers import expat
from xml.sax.saxutils import escape

from proxy import refusals
from proxy.profiles.azure_blob.block_names import MAX_ENCODED
from proxy.profiles.xml_rewriting import Entry, EntryRule, Name, XmlError, XmlRewriter
from proxy.refusals import RefusedError

MAX_BLOCKS: Final = 50_000
MAX_LIST_BYTES: Final = 8 << 20
"""50,000 names of 88 letters with their elements are some 6 MiB."""
MAX_ANSWER_BYTES: Final = 32 << 20
"""Of MAX_SHOWN blocks."""
MAX_SHOWN: Final = 150_001
"""50,000 committed and 100,000 other blocks, and the manifest."""
_SLICE_BYTES: Final = 64 << 10
_ROOT: Final = "BlockList"


class Source(StrEnum):
    """Where the service is to look for a block, by the elements' names."""

    COMMITTED = "Committed"
    UNCOMMITTED = "Uncommitted"
    LATEST = "Latest"


@dataclass(frozen=True, slots=True)
class Listed:
    """One entry: `name` in base64, as it stands there."""

    source: Source
    name: str


def read_block_list(document: bytes) -> list[Listed]:
    """RefusedError(MALFORMED_DOCUMENT)."""
    reader = _Reader()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.text
    # A DTD is the root of all entities but the five that XML itself has.
    parser.StartDoctypeDeclHandler = reader.refuse
    try:
        parser.Parse(document, True)
    except (expat.ExpatError, ValueError):
        raise RefusedError(refusals.MALFORMED_DOCUMENT) from None
    return reader.found


class _Reader:
    def __init__(self) -> None:
        self.found: list[Listed] = []
        self._depth = 0
        self._source: Source | None = None
        self._text = ""

    def refuse(self, *_arguments: object) -> None:
        raise ValueError

    def start(self, name: str, _attributes: Mapping[str, str]) -> None:
        self._depth += 1
        if self._depth == 1:
            if name != _ROOT:
                raise ValueError
            return
        if self._depth > 2 or len(self.found) >= MAX_BLOCKS:
            raise ValueError
        self._source, self._text = Source(name), ""

    def text(self, data: str) -> None:
        if self._source is None:
            if data.strip():
                raise ValueError
            return
        self._text += data
        if len(self._text) > 2 * MAX_ENCODED:
            raise ValueError

    def end(self, _name: str) -> None:
        self._depth -= 1
        if self._source is not None:
            self.found.append(Listed(self._source, self._text.strip()))
            self._source = None


def block_list_document(entries: Iterable[Listed]) -> bytes:
    listed = "".join(f"<{entry.source}>{escape(entry.name)}</{entry.source}>" for entry in entries)
    return f'<?xml version="1.0" encoding="utf-8"?><{_ROOT}>{listed}</{_ROOT}>'.encode()


# Answers.


def _any(name: str) -> Name:
    return (None, name)


_NAME, _SIZE = (_any("Name"),), (_any("Size"),)
_COMMITTED, _UNCOMMITTED = "CommittedBlocks", "UncommittedBlocks"
_RULES: Final = tuple(
    EntryRule(at=(_any(_ROOT), _any(section), _any("Block")), leaves=frozenset({_NAME, _SIZE}))
    for section in (_COMMITTED, _UNCOMMITTED)
)


@dataclass(frozen=True, slots=True)
class Shown:
    """How a block is to be shown."""

    name: str
    plain_bytes: int


type Show = Callable[[str], Shown | None]
"""A stored name -> how it is shown; None: not at all."""


def stored_names(document: bytes) -> list[str]:
    """The committed blocks of an answer to Get Block List, in order. RefusedError(SERVICE_ANSWER)."""
    return [
        entry.text(*_NAME) or ""
        for entry in _parts(document)
        if isinstance(entry, Entry) and entry.rule is _RULES[0]
    ]


def shown_block_list(document: bytes, *, committed: Show | None, uncommitted: Show) -> bytes:
    """The answer as its client may see it. *committed* None: those are none of ours, and stay."""
    out = bytearray()
    for part in _parts(document):
        if not isinstance(part, Entry):
            out += part
            continue
        show = committed if part.rule is _RULES[0] else uncommitted
        if show is not None and not _show(part, show):
            continue
        out += part.render()
    return bytes(out)


def _show(entry: Entry, show: Show) -> bool:
    name, size = entry.first(*_NAME), entry.first(*_SIZE)
    if name is None or size is None:
        raise RefusedError(refusals.SERVICE_ANSWER)
    shown = show(name.text.strip())
    if shown is None:
        return False
    entry.replace(name, shown.name)
    entry.replace(size, str(shown.plain_bytes))
    return True


def _parts(document: bytes) -> Iterator[bytes | Entry]:
    rewriter, entries = XmlRewriter(_RULES), 0
    try:
        for parts in _fed(rewriter, document):
            entries += sum(isinstance(part, Entry) for part in parts)
            if entries > MAX_SHOWN:
                raise RefusedError(refusals.SERVICE_ANSWER)
            yield from parts
    except XmlError:
        raise RefusedError(refusals.SERVICE_ANSWER) from None


def _fed(rewriter: XmlRewriter, document: bytes) -> Iterator[list[bytes | Entry]]:
    for at in range(0, len(document), _SLICE_BYTES):
        yield rewriter.feed(document[at : at + _SLICE_BYTES])
    yield rewriter.finish()
