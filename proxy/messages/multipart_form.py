"""Forms with files in them (multipart/form-data, RFC 7578): parsed and rewritten as they stream, without I/O.

1. Every byte goes in the order it came. What is not rewritten by a rule stays as it is, delimiters and part
   heads included; a part's head changes in its Content-Length alone, if it has one.
2. A rule is asked about each part when its head is complete: it passes, is collected and replaced, or its
   content goes through what the rule gives (a sealer). A part nobody has a rule for is the rule's to refuse.
3. Two readers must not see two forms. What parsers are known to take differently is refused: delimiters
   elsewhere than behind a line end, or that go on, two names, a folded head, text before the first delimiter
   or behind the last one, parts within parts, content that is coded once more.
4. Heads, numbers of parts and collected fields are bounded; contents are not, and are never held.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol, override

from envelope.objects import sealed_length
from proxy import refusals
from proxy.messages.multipart_body import BOUNDARY, HEAD_LINE, PLAIN_CODINGS, DelimitedBody
from proxy.refusals import RefusedError

MAX_HEAD_BYTES: Final = 16 * 1024
MAX_PARTS: Final = 1000
MAX_COLLECTED_BYTES: Final = 64 * 1024
MIN_BOUNDARY: Final = 6
"""Ciphertext must not look like the delimiter: `\\r\\n--` and six more are 80 bits."""

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_PARAMETER: Final = re.compile(
    r'[ \t]*;[ \t]*([!#$%&\'*+.^_`|~0-9A-Za-z-]+)[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^\s;"\\]*))[ \t]*'
)
_LENGTH: Final = re.compile(r"[0-9]{1,15}")
# A digest would be of the content before it is sealed; nobody is known to send one here.
_DIGESTS: Final = frozenset({"content-md5", "digest", "content-digest", "repr-digest"})


@dataclass(frozen=True, slots=True, kw_only=True)
class FormPart:
    """The head of one part. `fields`: by lower-case name, each came once."""

    name: str
    filename: str | None
    """As it came, percent and backslash escapes included; of `filename*` if there is no other."""
    fields: dict[str, str] = field(repr=False)
    content_at: int
    """How many bytes of the body lie before the content."""

    @property
    def is_file(self) -> bool:
        """Whether browsers and servers take it for a file: it names one, be it by an empty name."""
        return self.filename is not None

    @property
    def content_type(self) -> str:
        """Lower case, without parameters; empty where none was given."""
        return self.fields.get("content-type", "").partition(";")[0].strip().lower()


class Body(Protocol):
    """What a part's content goes through; `envelope.objects.Sealer` is one."""

    def update(self, piece: bytes) -> bytes | bytearray: ...

    def finalize(self) -> bytes | bytearray: ...


class Pass(Enum):
    """The content stays as it is."""

    AS_IT_IS = "as it is"


PASS: Final = Pass.AS_IT_IS


@dataclass(frozen=True, slots=True, kw_only=True)
class Collect:
    """The content is read whole, and what *function* makes of it takes its place."""

    function: Callable[[bytes], bytes]
    limit_bytes: int = MAX_COLLECTED_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Through:
    """The content goes through *body*. With *plain_bytes*: it must be as long as that."""

    body: Body
    plain_bytes: int | None = None


type Treatment = Pass | Collect | Through
type Rule = Callable[[FormPart], Treatment]
"""RefusedError for a part that must not go on."""


def boundary_of(content_type: str) -> bytes:
    """Of a Content-Type `multipart/form-data`. RefusedError if there is none that may be used."""
    kind, semicolon, rest = content_type.partition(";")
    if kind.strip().lower() != "multipart/form-data":
        raise RefusedError(refusals.BAD_MESSAGE)
    boundary = _parameters(semicolon + rest).get("boundary", "")
    if not BOUNDARY.fullmatch(boundary) or len(boundary) < MIN_BOUNDARY:
        raise RefusedError(refusals.BAD_MESSAGE)
    return boundary.encode("ascii")


def ending_bytes(boundary: bytes) -> int:
    """Length of what stands behind the last content: `CRLF--boundary--CRLF`, as all known clients send it."""
    return len(boundary) + 8


class _State(Enum):
    BEGIN = "begin"  # before the first delimiter
    DELIMITER = "delimiter"  # behind `--boundary`
    HEAD = "head"
    CONTENT = "content"
    END = "end"  # behind the last delimiter


class FormRewriter(DelimitedBody):
    """Takes a form's bytes, gives the rewritten form's. After an error it is dead.

    RefusedError for what is no form, or is refused by rule 3, 4 or *rule*.
    """

    def __init__(self, boundary: bytes, rule: Rule) -> None:
        super().__init__(boundary)
        self._rule: Final = rule
        self._state = _State.BEGIN
        self._parts = 0
        self._content: _Content | None = None
        self._steps: Final = {
            _State.BEGIN: self._begin,
            _State.DELIMITER: self._after_delimiter,
            _State.HEAD: self._head,
            _State.CONTENT: self._in_content,
            _State.END: self._check_end,
        }

    def finish(self) -> bytes:
        """The body has ended. RefusedError unless the form has, too."""
        if self._dead or self._state is not _State.END or bytes(self._pending) not in (b"", b"\r\n"):
            self._dead = True
            raise RefusedError(refusals.BAD_MESSAGE)
        self._dead = True
        return bytes(self._pending)

    @override
    def _step(self) -> bytes | None:
        return self._steps[self._state]()

    def _begin(self) -> bytes | None:
        if (taken := self._take_first_delimiter()) is not None:
            self._state = _State.DELIMITER
        return taken

    def _after_delimiter(self) -> bytes | None:
        if len(self._pending) < 2:
            return None
        if self._pending.startswith(b"--"):
            self._state = _State.END
        elif self._pending.startswith(b"\r\n"):
            self._parts += 1
            if self._parts > MAX_PARTS:
                raise RefusedError(refusals.TOO_LARGE)
            self._state = _State.HEAD
        else:
            # Padding is legal, and the beginning of a longer line is a delimiter to some and not to others.
            raise RefusedError(refusals.BAD_MESSAGE)
        return self._take(2)

    def _head(self) -> bytes | None:
        if (raw := self._take_head(limit_bytes=MAX_HEAD_BYTES)) is None:
            return None
        part = _part(raw, self._read_bytes)
        self._content = content = _Content(self._rule(part), part, self._delimiter)
        self._state = _State.CONTENT
        return content.head(raw) + b"\r\n\r\n"

    def _in_content(self) -> bytes | None:
        if self._content is None:
            raise RefusedError(refusals.INTERNAL)
        if (found := self._take_content()) is None:
            return None
        piece, is_last = found
        out = bytearray(self._content.update(piece))
        if is_last:
            out += self._content.finalize()
            self._content = None
            self._state = _State.DELIMITER
            out += self._take_delimiter()
        return bytes(out)


class _Content:
    """The content of one part on its way."""

    def __init__(self, treatment: Treatment, part: FormPart, delimiter: bytes) -> None:
        self._treatment = treatment
        self._delimiter = delimiter
        self._declared = _declared_bytes(part) if isinstance(treatment, Through) else None
        self._bytes = 0
        self._collected = bytearray()
        if isinstance(treatment, Through):
            coding = part.fields.get("content-transfer-encoding", "binary").lower()
            if coding not in PLAIN_CODINGS or not _DIGESTS.isdisjoint(part.fields):
                raise RefusedError(refusals.BAD_MESSAGE)
        elif isinstance(treatment, Collect) and "content-length" in part.fields:
            raise RefusedError(refusals.BAD_MESSAGE)

    def head(self, raw: bytes) -> bytes:
        """The part's head, made to fit."""
        if self._declared is None:
            return raw
        length = str(sealed_length(self._declared)).encode()
        return re.sub(rb"(?im)^(content-length:[ \t]*)[0-9]+[ \t]*(?=\r|\Z)", rb"\g<1>" + length, raw)

    def update(self, piece: bytes) -> bytes | bytearray:
        self._bytes += len(piece)
        treatment = self._treatment
        if isinstance(treatment, Through):
            limits = [known for known in (treatment.plain_bytes, self._declared) if known is not None]
            if any(self._bytes > limit for limit in limits):
                raise RefusedError(refusals.BAD_LENGTH)
            return treatment.body.update(piece)
        if isinstance(treatment, Collect):
            if self._bytes > treatment.limit_bytes:
                raise RefusedError(refusals.TOO_LARGE)
            self._collected += piece
            return b""
        return piece

    def finalize(self) -> bytes | bytearray:
        treatment = self._treatment
        if isinstance(treatment, Through):
            if not {treatment.plain_bytes, self._declared} <= {None, self._bytes}:
                raise RefusedError(refusals.BAD_LENGTH)
            return treatment.body.finalize()
        if isinstance(treatment, Collect):
            made = treatment.function(bytes(self._collected))
            if self._delimiter in made:
                raise RefusedError(refusals.BAD_MESSAGE)
            return made
        return b""


def _declared_bytes(part: FormPart) -> int | None:
    given = part.fields.get("content-length")
    if given is None:
        return None
    if not _LENGTH.fullmatch(given):
        raise RefusedError(refusals.BAD_MESSAGE)
    return int(given)


def _part(raw: bytes, content_at: int) -> FormPart:
    fields: dict[str, str] = {}
    for line in raw.split(b"\r\n"):
        match = HEAD_LINE.fullmatch(line)
        if match is None:
            raise RefusedError(refusals.BAD_MESSAGE)
        name = match[1].decode("ascii").lower()
        if name in fields:
            raise RefusedError(refusals.BAD_MESSAGE)
        fields[name] = match[2].decode("utf-8", "surrogateescape").rstrip(" \t")
    kind, semicolon, rest = fields.get("content-disposition", "").partition(";")
    parameters = _parameters(semicolon + rest)
    nested = fields.get("content-type", "").lstrip().lower().startswith(("multipart/", "message/"))
    if kind.strip().lower() != "form-data" or nested:
        raise RefusedError(refusals.BAD_MESSAGE)
    # A parameter that no client is known to send may be to somebody what we took it not for.
    if "\\" in parameters.get("name", "\\") or not parameters.keys() <= {"name", "filename", "filename*"}:
        raise RefusedError(refusals.BAD_MESSAGE)
    return FormPart(
        name=parameters["name"],
        filename=parameters.get("filename", parameters.get("filename*")),
        fields=fields,
        content_at=content_at,
    )


def _parameters(text: str) -> dict[str, str]:
    """Of a field value, from its first semicolon on. RefusedError for anything else, or one given twice."""
    found: dict[str, str] = {}
    at = 0
    while at < len(text):
        match = _PARAMETER.match(text, at)
        if match is None:
            if text[at:].strip(" \t;"):
                raise RefusedError(refusals.BAD_MESSAGE)
            break  # a semicolon at the end is common, and means nothing
        name = match[1].lower()
        if name in found or not _TOKEN.fullmatch(name):
            raise RefusedError(refusals.BAD_MESSAGE)
        value = match[2] if match[2] is not None else match[3]
        if r"\"" in value and ";" in value:
            raise RefusedError(refusals.BAD_MESSAGE)  # to whom a backslash is none, it ends there
        found[name] = value
        at = match.end()
    return found
