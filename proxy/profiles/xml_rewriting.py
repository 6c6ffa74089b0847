"""XML that streams through us: some short texts in it are replaced, every other byte stays as it came.

1. A document is a stream of *entries* (S3's `Contents`, WebDAV's `response`) among bytes that only pass. One
   entry at a time is held, whole; the rest moves on as soon as it has been parsed.
2. A replacement is a splice: prefixes, quotes, white space, comments and everything unknown are not touched.
3. Expat parses; nothing is parsed by hand. What is not well formed, not UTF-8, has a document type (and so
   could have entities), is too deep, or has too long a token or entry is an error, and then nothing of it
   follows.
4. Memory is bounded by `Limits`, whatever comes, in whatever pieces. So is work: expat reads a token that is
   not complete again with every piece; sent byte by byte it would be read a hundred thousand times.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final
from xml.parsers import expat

from proxy import refusals
from proxy.profiles.entry_mapping import EntryMapper, Question
from proxy.refusals import Refusal

type Name = tuple[str | None, str]
"""Namespace and local name. Namespace "": in none; None: in whatever, for dialects that disagree on it."""
type Path = tuple[Name, ...]

_SEPARATOR: Final = "\x1f"
"""Between namespace and local name, as expat hands them over. It can stand in neither."""
_SLICE_BYTES: Final = 64 * 1024
_ENCODINGS: Final = frozenset({"utf-8", "us-ascii", "ascii"})


class XmlError(Exception):
    """Not a document that we rewrite; the text says why, and quotes nothing of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    depth: int = 64
    """Of elements in elements."""
    token_bytes: int = 128 * 1024
    """Of one tag, comment or instruction."""
    entry_bytes: int = 1024 * 1024
    entry_leaves: int = 10_000
    """Elements of one entry that a rule names."""
    again_bytes: int = 16 * 1024 * 1024
    again_factor: int = 1024
    """What may be read again: so many bytes, and so many for each that has come."""


LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryRule:
    """What an entry is, and which of its elements matter."""

    at: Path
    """From the root to the entry, both included. The root alone: the document is one entry."""
    leaves: frozenset[Path] = frozenset()
    """Below the entry, which is not included."""
    anywhere: frozenset[Name] = frozenset()
    """Elements of these names at any depth below the entry."""


@dataclass(slots=True, eq=False)
class Leaf:
    """An element of an entry, and where it stands in it, in bytes."""

    path: Path
    """Below the entry, with the namespaces of the document."""
    start: int
    content: int = -1
    """Where its content begins; `stop` if it is an empty-element tag."""
    end: int = -1
    """Where its content ends."""
    stop: int = -1
    is_empty_tag: bool = False
    has_children: bool = False
    pieces: list[str] = field(default_factory=list, repr=False)

    @property
    def name(self) -> Name:
        return self.path[-1]

    @property
    def text(self) -> str:
        """Its own character data, references resolved; not that of its children."""
        return "".join(self.pieces)


class Entry:
    """One entry: what was found in it, and what is to be replaced."""

    def __init__(self, rule: EntryRule, raw: bytes, leaves: Sequence[Leaf]) -> None:
        self.rule: Final = rule
        self.leaves: Final = leaves
        """In the order in which they begin."""
        self._raw = raw
        self._splices: list[tuple[int, int, bytes]] = []

    def all(self, *path: Name) -> list[Leaf]:
        """The leaves at *path* below the entry; a None namespace stands for any."""
        return [leaf for leaf in self.leaves if _fits(leaf.path, path)]

    def first(self, *path: Name) -> Leaf | None:
        return next(iter(self.all(*path)), None)

    def text(self, *path: Name) -> str | None:
        """Of the first such leaf, without white space around it; None if there is none."""
        leaf = self.first(*path)
        return None if leaf is None else leaf.text.strip()

    def replace(self, leaf: Leaf, text: str) -> None:
        """Put *text* in place of the content of *leaf*. XmlError if that is more than text."""
        if leaf.has_children:
            raise XmlError("an element of text has children")
        escaped = _escaped(text)
        if leaf.is_empty_tag:
            self._fill(leaf, escaped)
        else:
            self._splice(leaf.content, leaf.end, escaped)

    def append(self, leaf: Leaf, element: bytes) -> None:
        """Put *element*, well-formed XML, behind all that is in *leaf*."""
        if leaf.is_empty_tag:
            self._fill(leaf, element)
        else:
            self._splice(leaf.end, leaf.end, element)

    def _fill(self, leaf: Leaf, content: bytes) -> None:
        tag = self._raw[leaf.start : leaf.stop - 2]
        qualified = tag[1:].split(None, 1)[0]
        self._splice(leaf.start, leaf.stop, tag.rstrip() + b">" + content + b"</" + qualified + b">")

    def remove(self, leaf: Leaf) -> None:
        """Take the element out, with all that is in it."""
        self._splice(leaf.start, leaf.stop, b"")

    def _splice(self, start: int, stop: int, text: bytes) -> None:
        self._splices.append((start, stop, text))

    def render(self) -> bytes:
        """The entry with its replacements. XmlError if two of them overlap."""
        out = bytearray()
        at = 0
        for start, stop, text in sorted(self._splices):
            if start < at:
                raise XmlError("replacements overlap")
            out += self._raw[at:start]
            out += text
            at = stop
        out += self._raw[at:]
        return bytes(out)


@dataclass(slots=True, eq=False)
class _Building:
    """The entry that is being read."""

    rule: EntryRule
    start: int
    depth: int
    """Of its own element: 1 is the root."""
    leaves: list[Leaf] = field(default_factory=list)
    open: list[Leaf | None] = field(default_factory=list)
    """For each open element below it, the leaf that it is."""
    names: list[Name] = field(default_factory=list)


class XmlRewriter:
    """Takes a document apart into bytes that pass, and entries. No I/O, no policy.

    `feed` and `finish` raise XmlError; the rewriter is dead then.
    """

    def __init__(self, rules: Iterable[EntryRule] = (), *, limits: Limits = LIMITS) -> None:
        self._rules = tuple(rules)
        self._locals = frozenset(
            name[1] for rule in self._rules for name in (*rule.anywhere, *(path[-1] for path in rule.leaves))
        )
        self._limits = limits
        self._parser = parser = expat.ParserCreate("UTF-8", _SEPARATOR)
        parser.buffer_text = False  # events would come late, at the place of another one
        # Else an entry might be found complete only at the end, when nothing can be asked about it any more.
        # What expat protects from so, a long token in tiny pieces parsed again at each, `token_bytes` bounds.
        if hasattr(parser, "SetReparseDeferralEnabled"):
            parser.SetReparseDeferralEnabled(False)
        parser.XmlDeclHandler = self._on_declaration
        parser.StartDoctypeDeclHandler = self._on_doctype
        parser.StartElementHandler = self._on_start
        parser.EndElementHandler = self._on_end
        parser.CharacterDataHandler = self._on_text
        parser.CommentHandler = parser.DefaultHandlerExpand = self._on_other
        parser.ProcessingInstructionHandler = self._on_instruction
        parser.StartCdataSectionHandler = parser.EndCdataSectionHandler = self._on_section
        self._held = bytearray()
        self._base = 0
        """Offset in the document of the first byte that is held."""
        self._last = 0
        """Offset of the last event: everything before it has been parsed."""
        self._fed = 0
        self._again = 0
        """Bytes of unfinished tokens, counted each time that expat reads them."""
        self._stack: list[Name] = []
        self._entry: _Building | None = None
        self._has_just_begun = False
        """The last event was a start tag."""
        self._tag: Leaf | None = None
        """A leaf whose start tag ends where the next event is."""
        self._out: list[bytes | Entry] = []
        self._is_dead = False
        self.root: Name | None = None
        """The document's element, once it has begun."""

    # ---- the stream

    def feed(self, piece: bytes) -> list[bytes | Entry]:
        """What *piece* completes, in order."""
        for at in range(0, len(piece), _SLICE_BYTES):
            self._parse(piece[at : at + _SLICE_BYTES], is_last=False)
        return self._taken()

    def finish(self) -> list[bytes | Entry]:
        """The rest; the document has ended."""
        self._parse(b"", is_last=True)
        self._pass_until(self._fed)
        self._forget()
        return self._taken()

    def _parse(self, piece: bytes, *, is_last: bool) -> None:
        if self._is_dead:
            raise XmlError("the document has failed already, or ended")
        if not self._fed and piece[:1] in (b"\xfe", b"\xff"):  # UTF-16's mark counts more than what we said
            self._forget()
            raise XmlError("not in UTF-8")
        self._again += self._fed - self._last
        self._held += piece
        self._fed += len(piece)
        if self._again > self._limits.again_bytes + self._limits.again_factor * self._fed:
            self._forget()
            raise XmlError("a long token comes in too small pieces")
        try:
            self._parser.Parse(piece, is_last)
        except expat.ExpatError as error:
            self._forget()
            raise XmlError(f"not well formed: {expat.ErrorString(error.code)}") from None
        except BaseException:
            self._forget()
            raise
        if self._fed - self._last > 2 * self._limits.token_bytes:
            self._forget()
            raise XmlError("a token is too long")
        if self._entry is None:
            self._pass_until(self._last)
        elif self._fed - self._entry.start > self._limits.entry_bytes:
            self._forget()
            raise XmlError("an entry is too long")

    def _taken(self) -> list[bytes | Entry]:
        out, self._out = self._out, []
        return out

    def _pass_until(self, offset: int) -> None:
        if offset > self._base:
            self._out.append(self._take(offset))

    def _take(self, offset: int) -> bytes:
        size = offset - self._base
        taken = bytes(self._held[:size])
        del self._held[:size]
        self._base = offset
        return taken

    def _forget(self) -> None:
        """Parser and handlers refer to each other; what is held is of no use any more."""
        self._is_dead = True
        self._held.clear()
        parser = self._parser
        parser.XmlDeclHandler = parser.StartDoctypeDeclHandler = None
        parser.StartElementHandler = parser.EndElementHandler = parser.CharacterDataHandler = None
        parser.CommentHandler = parser.DefaultHandlerExpand = parser.ProcessingInstructionHandler = None
        parser.StartCdataSectionHandler = parser.EndCdataSectionHandler = None

    # ---- events

    def _on_event(self) -> int:
        """Where in the document this event is; the token before it ends there."""
        at = self._parser.CurrentByteIndex
        if at - self._last > self._limits.token_bytes:
            raise XmlError("a token is too long")
        self._last = at
        self._has_just_begun = False
        if self._tag is not None and self._entry is not None:
            leaf, self._tag = self._tag, None
            leaf.content = at - self._entry.start
            leaf.is_empty_tag = self._is_after_empty_tag(at)
        return at

    def _is_after_empty_tag(self, at: int) -> bool:
        here = at - self._base
        return self._held[here - 2 : here] == b"/>"

    def _on_declaration(self, version: str, encoding: str | None, _standalone: int) -> None:
        self._on_event()
        if encoding is not None and encoding.lower() not in _ENCODINGS:
            raise XmlError("not in UTF-8")
        if version != "1.0":
            raise XmlError("not XML 1.0")

    def _on_doctype(self, *_: object) -> None:
        raise XmlError("has a document type")

    def _on_section(self) -> None:
        self._on_event()

    def _on_other(self, _data: str) -> None:
        self._on_event()

    def _on_instruction(self, _target: str, _data: str) -> None:
        self._on_event()

    def _on_text(self, data: str) -> None:
        self._on_event()
        entry = self._entry
        if entry is not None and entry.open and (leaf := entry.open[-1]) is not None:
            leaf.pieces.append(data)

    def _on_start(self, qualified: str, _attributes: dict[str, str]) -> None:
        at = self._on_event()
        self._has_just_begun = True
        namespace, _, local = qualified.rpartition(_SEPARATOR)
        name = (namespace, local)
        self._stack.append(name)
        if len(self._stack) > self._limits.depth:
            raise XmlError("elements lie too deep")
        if self.root is None:
            self.root = name
        if self._entry is None:
            self._begin_entry(at)
            return
        entry = self._entry
        if entry.open and (above := entry.open[-1]) is not None:
            above.has_children = True
        entry.names.append(name)
        leaf = None
        if local in self._locals and _is_wanted(entry.rule, tuple(entry.names)):
            leaf = self._tag = Leaf(tuple(entry.names), at - entry.start)
            entry.leaves.append(leaf)
            if len(entry.leaves) > self._limits.entry_leaves:
                raise XmlError("an entry has too many elements")
        entry.open.append(leaf)

    def _begin_entry(self, at: int) -> None:
        for rule in self._rules:
            if _fits(self._stack, rule.at):
                self._pass_until(at)
                self._entry = _Building(rule, at, len(self._stack))
                return

    def _on_end(self, _qualified: str) -> None:
        has_just_begun = self._has_just_begun
        at = self._on_event()
        depth = len(self._stack)
        self._stack.pop()
        entry = self._entry
        if entry is None:
            return
        if depth == entry.depth:
            # An empty-element tag has ended by its end event, another end tag begins there.
            is_empty = has_just_begun and self._is_after_empty_tag(at)
            stop = at if is_empty else self._tag_end(at)
            leaves, self._entry = entry.leaves, None
            self._pass_until(entry.start)
            if stop - entry.start > self._limits.entry_bytes:
                raise XmlError("an entry is too long")
            self._out.append(Entry(entry.rule, self._take(stop), leaves))
            self._last = stop
            return
        entry.names.pop()
        leaf = entry.open.pop()
        if leaf is None:
            return
        if leaf.is_empty_tag:
            leaf.end = leaf.stop = at - entry.start
        else:
            leaf.end = at - entry.start
            leaf.stop = self._tag_end(at) - entry.start

    def _tag_end(self, at: int) -> int:
        """Where the end tag that stands at *at* ends. No `>` can be in it before its end."""
        return self._base + self._held.index(b">", at - self._base) + 1


def _is_wanted(rule: EntryRule, path: Path) -> bool:
    return any(_fits(path[-1:], (name,)) for name in rule.anywhere) or any(
        _fits(path, wanted) for wanted in rule.leaves
    )


def _fits(path: Sequence[Name], wanted: Sequence[Name]) -> bool:
    return len(path) == len(wanted) and all(
        name[1] == want[1] and want[0] in (None, name[0]) for name, want in zip(path, wanted, strict=True)
    )


def _escaped(text: str) -> bytes:
    """As ASCII. XmlError for what XML 1.0 cannot hold at all."""
    out = []
    for character in text:
        code = ord(character)
        if character in "&<>\r" or code > 0x7E:
            if 0xD800 <= code < 0xE000 or code in (0xFFFE, 0xFFFF):
                raise XmlError("a replacement has a character that XML cannot hold")
            out.append(f"&#{code};")
        elif code < 0x20 and character not in "\t\n":
            raise XmlError("a replacement has a character that XML cannot hold")
        else:
            out.append(character)
    return "".join(out).encode("ascii")


def document_root(body: bytes, *, limits: Limits = LIMITS) -> Name:
    """The root element's name of a whole document. XmlError if it is none, or not one we would rewrite."""
    rewriter = XmlRewriter(limits=limits)
    rewriter.feed(body)
    rewriter.finish()
    assert rewriter.root is not None  # noqa: S101 - a well-formed document has one
    return rewriter.root


def rewrite(body: bytes, rules: Iterable[EntryRule], judge: Callable[[Entry], None]) -> bytes:
    """A whole document with what *judge* replaces in its entries. XmlError."""
    rewriter = XmlRewriter(rules)
    out = bytearray()
    for part in (*rewriter.feed(body), *rewriter.finish()):
        if isinstance(part, Entry):
            judge(part)
            out += part.render()
        else:
            out += part
    return bytes(out)


type Judge = Callable[[Entry], Question | None]


class XmlMapper(EntryMapper[Entry]):
    """A `plan.BodyMapper`: the document goes through, *judge* makes the replacements in each entry."""

    def __init__(
        self, rules: Iterable[EntryRule], judge: Judge, *, refusal: Refusal = refusals.SERVICE_ANSWER
    ) -> None:
        super().__init__(XmlRewriter(rules), Entry, judge, error=XmlError, refusal=refusal)
