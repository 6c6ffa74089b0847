"""JSON that passes through us: some members of some objects are replaced, every other byte stays as it came.

1. `JsonObject` is one object, held whole: it is parsed strictly, and an edit is a splice. White space, order,
   escapes and everything unknown are not touched.
2. `JsonListMapper` is a document that streams: an object, one of whose members is a list of objects. One
   element at a time is held, within a limit; the rest moves on as it comes.
3. What is not well formed, not UTF-8, names a member twice where we edit, lies too deep or is too long is an
   error. Of what only passes the shape alone is checked: strings, brackets and what stands between them.
4. Memory is bounded by `Limits`, whatever comes, in whatever pieces.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final, NoReturn

from proxy import refusals
from proxy.profiles.entry_mapping import EntryMapper, Question
from proxy.refusals import Refusal

_SPACE: Final = re.compile(r"[ \t\r\n]*")
_SPACES: Final = re.compile(rb"[ \t\r\n]*")
_STRUCTURE: Final = re.compile(rb'["{}\[\]]')
_IN_STRING: Final = re.compile(rb'["\\]')
_BEHIND_SCALAR: Final = re.compile(rb"[^-+.0-9A-Za-z]")
_SCALAR: Final = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_BEGINS_SCALAR: Final = frozenset(b"-0123456789tfn")
_CLOSES: Final = {ord("{"): ord("}"), ord("["): ord("]")}


class JsonError(Exception):
    """Not a document that we rewrite; the text says why, and quotes nothing of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    depth: int = 64
    """Of arrays and objects in each other."""
    token_bytes: int = 64 * 1024
    """Of a member's name, and of a number or literal, in what streams."""
    element_bytes: int = 256 * 1024
    """A Cloud Storage object's resource: 8 KiB of metadata, a hundred entries of access."""
    members: int = 4096
    """Of one object whose members are looked at."""


LIMITS: Final = Limits()


def _refuse_constant(_text: str) -> NoReturn:
    raise JsonError("has a number that is none")


_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant)


@dataclass(slots=True, eq=False)
class _Member:
    """Of an object's text: `[start, stop)` from the quote of its name to the end of its value."""

    name: str
    start: int
    value_start: int
    stop: int
    value: object
    text: str | None = None
    """Put in place of the value."""
    inner: "JsonObject | None" = None
    is_removed: bool = False


class JsonObject:
    """One object and the edits of its members. JsonError if *data* is none, or more than one."""

    def __init__(self, data: bytes | str, *, limits: Limits = LIMITS) -> None:
        try:
            text = data if isinstance(data, str) else data.decode()
        except UnicodeDecodeError:
            raise JsonError("not in UTF-8") from None
        self._text: Final = text
        self._limits: Final = limits
        self._members: Final[dict[str, _Member]] = {}
        self._added: Final[dict[str, str]] = {}
        try:
            self._parse()
        except (ValueError, IndexError):  # also of an integer too long to be read
            raise JsonError("not well formed") from None
        except RecursionError:
            raise JsonError("lies too deep") from None

    def _parse(self) -> None:
        text, at = self._text, self._skip(0)
        if text[at] != "{":
            raise JsonError("no object")
        at = self._skip(at + 1)
        while text[at] != "}" or self._members:
            start = at
            if text[at] != '"':
                raise JsonError("not well formed")
            name, at = _DECODER.raw_decode(text, at)
            at = self._skip(at)
            if text[at] != ":":
                raise JsonError("not well formed")
            value_start = self._skip(at + 1)
            value, at = _DECODER.raw_decode(text, value_start)
            if _depth(value, self._limits.depth) >= self._limits.depth:
                raise JsonError("lies too deep")
            if name in self._members:
                raise JsonError("has a member twice")
            if len(self._members) >= self._limits.members:
                raise JsonError("has too many members")
            self._members[name] = _Member(name, start, value_start, at, value)
            at = self._skip(at)
            if text[at] == "}":
                break
            if text[at] != ",":
                raise JsonError("not well formed")
            at = self._skip(at + 1)
        if self._skip(at + 1) != len(text):
            raise JsonError("goes on behind its end")

    def _skip(self, at: int) -> int:
        match = _SPACE.match(self._text, at)
        return at if match is None else match.end()

    def __contains__(self, name: str) -> bool:
        member = self._members.get(name)
        return member is not None and not member.is_removed

    def names(self) -> Iterator[str]:
        """Of the members that are left, in their order."""
        return (name for name, member in self._members.items() if not member.is_removed)

    def value(self, name: str) -> object:
        """As it came; None where there is no such member."""
        member = self._members.get(name)
        return None if member is None or member.is_removed else member.value

    def text(self, name: str) -> str | None:
        """The value, if it is a string."""
        value = self.value(name)
        return value if isinstance(value, str) else None

    def edited(self, name: str) -> object:
        """As it will be rendered; None where there is no such member."""
        member = self._members.get(name)
        if member is None or member.is_removed or member.text is None:
            return self.value(name)
        return json.loads(member.text)

    def replace(self, name: str, value: object) -> None:
        """KeyError where there is no such member."""
        self._members[name].text = json.dumps(value)

    def put(self, name: str, value: object) -> None:
        """In place of the member's value, or as a new member behind all others."""
        if name in self:
            self.replace(name, value)
        else:
            self._added[name] = f"{json.dumps(name)}: {json.dumps(value)}"

    def remove(self, *names: str) -> None:
        """Those that are there."""
        for name in names:
            if (member := self._members.get(name)) is not None:
                member.is_removed = True

    def inner(self, name: str) -> "JsonObject | None":
        """The object that is a member's value; what is edited in it is rendered with this one."""
        member = self._members.get(name)
        if member is None or member.is_removed or not isinstance(member.value, dict):
            return None
        if member.inner is None:
            text = self._text[member.value_start : member.stop]
            member.inner = JsonObject(text, limits=self._limits)
        return member.inner

    def render(self) -> bytes:
        """UTF-8, edits applied."""
        # A lone surrogate can stand in an escape only, and escapes are not undone.
        return self._rendered().encode()

    def _rendered(self) -> str:
        members, added = list(self._members.values()), ", ".join(self._added.values())
        if all(member.is_removed for member in members):
            return self._text if not members and not added else f"{{{added}}}"
        out = [self._text[: members[0].start]]
        for place, member in enumerate(members):
            if member.is_removed:
                continue
            if len(out) > 1:
                # What stood before this member, comma and white space.
                out.append(self._text[members[place - 1].stop : member.start])
            out += (self._text[member.start : member.value_start], self._value_of(member))
        if added:
            out.append(f", {added}")
        out.append(self._text[members[-1].stop :])
        return "".join(out)

    def _value_of(self, member: _Member) -> str:
        if member.text is not None:
            return member.text
        if member.inner is not None:
            return member.inner._rendered()  # noqa: SLF001 - its own kind
        return self._text[member.value_start : member.stop]


def _depth(value: object, limit: int) -> int:
    """How deep arrays and objects lie in *value*; *limit* if as deep as that."""
    depth, level = 0, [value]
    while depth < limit:
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        if not below:
            return depth
        level, depth = below, depth + 1
    return limit


class _Extent:
    """Finds where a value ends, in pieces, and checks its brackets."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._open = bytearray()
        self._in_string = False
        self._is_escaped = False
        self._scalar: bytearray | None = None
        self._has_begun = False

    def advance(self, data: bytes | bytearray, at: int) -> tuple[int, bool]:
        """Where it stands behind *data*, from *at* on, and whether the value has ended there. JsonError."""
        while at < len(data):
            if self._in_string:
                at = self._string(data, at)
            elif self._scalar is not None:
                return self._in_scalar(data, at)
            elif self._has_begun:
                match = _STRUCTURE.search(data, at)
                if match is None:
                    return len(data), False
                at = match.end()
                self._bracket(data[at - 1])
            else:
                self._has_begun = True
                if data[at] in _BEGINS_SCALAR:
                    self._scalar = bytearray()
                    continue
                if data[at] not in b'"{[':
                    raise JsonError("not well formed")
                self._bracket(data[at])
                at += 1
            if not self._open and not self._in_string:
                return at, True
        return at, False

    def _bracket(self, byte: int) -> None:
        if byte == ord('"'):
            self._in_string = True
        elif byte in _CLOSES:
            self._open.append(_CLOSES[byte])
            if len(self._open) > self._limits.depth:
                raise JsonError("lies too deep")
        elif not self._open or self._open.pop() != byte:
            raise JsonError("not well formed")

    def _string(self, data: bytes | bytearray, at: int) -> int:
        if self._is_escaped:
            self._is_escaped = False
            return at + 1
        match = _IN_STRING.search(data, at)
        if match is None:
            return len(data)
        if match[0] == b'"':
            self._in_string = False
        else:
            self._is_escaped = True
        return match.end()

    def _in_scalar(self, data: bytes | bytearray, at: int) -> tuple[int, bool]:
        scalar = self._scalar if self._scalar is not None else bytearray()
        match = _BEHIND_SCALAR.search(data, at)
        stop = len(data) if match is None else match.start()
        scalar += data[at:stop]
        if len(scalar) > self._limits.token_bytes:
            raise JsonError("a token is too long")
        if match is None:
            return stop, False
        if not _SCALAR.fullmatch(scalar):
            raise JsonError("not well formed")
        return stop, True


class _At(Enum):
    BEGIN = "begin"  # before the document's brace
    NAME = "name"  # a member, or the end of an empty object
    NEXT_NAME = "next name"  # a member: a comma was there
    COLON = "colon"
    VALUE = "value"
    BEHIND_VALUE = "behind value"
    ELEMENT = "element"  # of the list, or its end
    NEXT_ELEMENT = "next element"
    IN_ELEMENT = "in element"
    BEHIND_ELEMENT = "behind element"
    END = "end"


class JsonListRewriter:
    """Finds the elements of the list that is the member *name* of the document's object. JsonError."""

    def __init__(self, name: str, *, limits: Limits = LIMITS) -> None:
        self._name: Final = name
        self._limits: Final = limits
        self._at = _At.BEGIN
        self._held = bytearray()
        self._member = ""
        self._lists = 0
        self._extent: _Extent | None = None
        self._scanned = 0
        self._is_dead = False

    def feed(self, piece: bytes) -> list["bytes | JsonObject"]:
        """What *piece* completes, in order: bytes that pass, and elements that are objects."""
        if self._is_dead:
            raise JsonError("the document has failed already, or ended")
        self._is_dead = True
        self._held += piece
        out: list[bytes | JsonObject] = []
        passing = bytearray()
        while (step := self._step(passing)) is not None:
            if step:
                out += (bytes(passing), *step)
                passing.clear()
        if passing:
            out.append(bytes(passing))
        self._is_dead = False
        return out

    def finish(self) -> list["bytes | JsonObject"]:
        """The document has ended; nothing was left."""
        is_over = self._at is _At.END and not self._held and not self._is_dead
        self._is_dead = True
        if not is_over:
            raise JsonError("ends too early")
        return []

    def _step(self, passing: bytearray) -> list[JsonObject] | None:
        """One token further. None: more must come first."""
        if self._at is _At.VALUE and self._extent is not None:
            return self._value(passing)
        if self._at is _At.IN_ELEMENT:
            return self._element()
        match = _SPACES.match(self._held)
        spaces = 0 if match is None else match.end()
        del match  # it holds the buffer
        passing += self._held[:spaces]
        del self._held[:spaces]
        if not self._held:
            return None
        byte = self._held[0]
        match self._at:
            case _At.BEGIN if byte == ord("{"):
                self._at = _At.NAME
            case _At.NAME if byte == ord("}"):
                self._at = _At.END
            case _At.NAME | _At.NEXT_NAME if byte == ord('"'):
                return self._member_name(passing)
            case _At.COLON if byte == ord(":"):
                self._at = _At.VALUE
            case _At.VALUE if self._member == self._name and byte == ord("["):
                self._lists += 1
                if self._lists > 1:
                    raise JsonError("has a member twice")
                self._at = _At.ELEMENT
            case _At.VALUE:
                self._extent = _Extent(self._limits)
                return []
            case _At.BEHIND_VALUE if byte == ord(","):
                self._at = _At.NEXT_NAME
            case _At.BEHIND_VALUE if byte == ord("}"):
                self._at = _At.END
            case _At.ELEMENT | _At.BEHIND_ELEMENT if byte == ord("]"):
                self._at = _At.BEHIND_VALUE
            case _At.ELEMENT | _At.NEXT_ELEMENT if byte == ord("{"):
                self._at, self._extent, self._scanned = _At.IN_ELEMENT, _Extent(self._limits), 0
                return []
            case _At.BEHIND_ELEMENT if byte == ord(","):
                self._at = _At.NEXT_ELEMENT
            case _:
                raise JsonError("not well formed")
        passing.append(byte)
        del self._held[:1]
        return []

    def _member_name(self, passing: bytearray) -> list[JsonObject] | None:
        extent = _Extent(self._limits)
        stop, is_whole = extent.advance(self._held, 0)
        if stop > self._limits.token_bytes:
            raise JsonError("a token is too long")
        if not is_whole:
            return None
        try:
            self._member = str(_DECODER.decode(self._held[:stop].decode()))
        except ValueError:
            raise JsonError("not well formed") from None
        passing += self._held[:stop]
        del self._held[:stop]
        self._at = _At.COLON
        return []

    def _value(self, passing: bytearray) -> list[JsonObject] | None:
        """Of any other member: it only passes."""
        if self._extent is None or not self._held:
            return None
        stop, is_over = self._extent.advance(self._held, 0)
        passing += self._held[:stop]
        del self._held[:stop]
        if not is_over:
            return None
        self._extent, self._at = None, _At.BEHIND_VALUE
        return []

    def _element(self) -> list[JsonObject] | None:
        if self._extent is None or self._scanned == len(self._held):
            return None
        stop, is_over = self._extent.advance(self._held, self._scanned)
        if stop > self._limits.element_bytes:
            raise JsonError("an element is too long")
        self._scanned = stop
        if not is_over:
            return None
        element = JsonObject(bytes(self._held[:stop]), limits=self._limits)
        del self._held[:stop]
        self._extent, self._at = None, _At.BEHIND_ELEMENT
        return [element]


type Judge = Callable[[JsonObject], Question | None]


class JsonListMapper(EntryMapper[JsonObject]):
    """A `plan.BodyMapper`: the document goes through, *judge* edits each element of its list *name*."""

    def __init__(self, name: str, judge: Judge, *, refusal: Refusal = refusals.SERVICE_ANSWER) -> None:
        super().__init__(JsonListRewriter(name), JsonObject, judge, error=JsonError, refusal=refusal)
