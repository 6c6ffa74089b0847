"""Options of the web profile: which requests bring content, which bring commands, which must not be asked.

1. A rule is named by method, path and, if need be, a parameter of the query. The longest path wins; of equal
   paths that with a parameter, then that with a method of its own.
2. A path that could be spelled otherwise may be another rule's: nothing passes there in the clear, and a rule
   that refuses holds wherever its path lies. Sealing harms nobody.
3. A parameter is looked for as servers read it, percent-decoded, where it makes something refused or sealed;
   where it would let something pass in the clear it has to stand there literally.
"""

from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Final, override
from urllib.parse import unquote_plus

from msgspec import Meta

from proxy.profile_options import ProfileOptions, is_ambiguous, lies_under

_ROUTE: Final = r"^([A-Z]{1,16}|\*) /[^?\s]*(\?[^=&;?%+\s]+)?$"
_FIELD: Final = r"^[^\x00-\x1f\x7f]+$"


class RouteRule(StrEnum):
    """What the body of a request is."""

    SEAL = "seal"  # content, as a whole
    CLEAR = "clear"  # a command (a login, a setting, JSON): it passes as it is, recorded
    REFUSE = "refuse"  # with or without a body: nothing goes on


class FieldRule(StrEnum):
    """What a part of a form is, whether or not it has a file's name."""

    CLEAR = "clear"  # no content
    REFUSE = "refuse"


class FormLength(StrEnum):
    """How the service is told the length of a form with sealed files."""

    HELD = "held"  # the sealed form is held here until it has all come
    LAST = "last"  # streamed: its only file is its last part, as in S3's forms; else it is refused
    CHUNKED = "chunked"  # streamed, without a length: few applications take that


class Archives(StrEnum):
    """What becomes of archives (zip, tar ...) that a service makes, of sealed files, say."""

    REFUSE = "refuse"
    PASS = "pass"  # noqa: S105 - as they are


class WebOptions(ProfileOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    routes: dict[Annotated[str, Meta(pattern=_ROUTE, max_length=1024)], RouteRule] = {}  # noqa: RUF012 - msgspec copies it
    """`METHOD /path`, `METHOD /path?parameter`, `* /path` -> what becomes of a body that is no form."""
    fields: dict[Annotated[str, Meta(pattern=_FIELD, max_length=256)], FieldRule] = {}  # noqa: RUF012 - msgspec copies it
    """Parts of forms by name. Without a rule a part is content if it has a file's name, else a short text."""
    form_length: FormLength = FormLength.HELD
    field_bytes: Annotated[int, Meta(ge=1, le=1024 * 1024)] = 4096
    """The longest text of a form that passes in the clear."""
    clear_bytes: Annotated[int, Meta(ge=1, le=16 * 1024 * 1024)] = 64 * 1024
    """The longest body of a `clear` route."""
    archives: Archives = Archives.REFUSE

    @property
    @override
    def has_pages(self) -> bool:
        return True

    def rule_for(self, method: str, target: str) -> RouteRule | None:
        """The rule of a request; None: there is none."""
        path, _, query = target.partition("?")
        found = [
            (rule, prefix, parameter, own)
            for name, rule in self.routes.items()
            for own, prefix, parameter in [_taken_apart(name)]
            if own in (method, "*") and _is_asked(query, parameter, literally=rule is RouteRule.CLEAR)
        ]
        if is_ambiguous(path):
            return _strictest(rule for rule, *_ in found)
        found = [each for each in found if lies_under(path, each[1])]
        if not found:
            return None
        return max(found, key=lambda each: (len(each[1]), bool(each[2]), each[3] != "*"))[0]


def _strictest(rules: Iterable[RouteRule]) -> RouteRule | None:
    given = set(rules)
    return next((rule for rule in (RouteRule.REFUSE, RouteRule.SEAL) if rule in given), None)


def _taken_apart(name: str) -> tuple[str, str, str]:
    """Method, path prefix and parameter (or nothing) of a rule's name."""
    method, _, rest = name.partition(" ")
    prefix, _, parameter = rest.partition("?")
    return method, prefix, parameter


def _is_asked(query: str, parameter: str, *, literally: bool) -> bool:
    if not parameter:
        return True
    names = [part.partition("=")[0] for part in query.replace(";", "&").split("&")]
    return parameter in (names if literally else map(unquote_plus, names))
