"""Options of the web profile: which requests bring content, which bring commands, which must not be asked.

1. A rule is named by method, path and, if need be, a parameter of the query. The longest path wins; of equal
   paths those with a parameter. Of several parameters that are asked for the strictest rule holds; of one
   name that with a method of its own.
2. A path is looked up as it stands and percent-decoded, rules likewise; the stricter of the two holds. A path
   that could be spelled otherwise still (dot segments, encoded letters, slashes, percent signs, controls) may
   be any rule's: nothing passes there in the clear, and a rule that refuses holds. Sealing harms nobody.
3. A parameter is looked for as servers read it, percent-decoded, where it makes something refused or sealed;
   where it would let something pass in the clear it has to stand there literally.
4. Upper and lower case differ: of an application that does not care every spelling wants its rule.
"""

import re
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Annotated, Final, NamedTuple, override
from urllib.parse import unquote, unquote_plus

from msgspec import Meta

from proxy.plans.profile_options import ProfileOptions, is_ambiguous, lies_under

_ROUTE: Final = r"^([A-Z]{1,16}|\*) /[^?\s]*(\?[^=&;?%+\s]+)?$"
_FIELD: Final = r"^[^\x00-\x1f\x7f]+$"


class RouteRule(StrEnum):
    """What the body of a request is."""

    SEAL = "seal"  # content, as a whole
    CLEAR = "clear"  # a command (a login, a setting, JSON): it passes as it is, recorded
    REFUSE = "refuse"  # with or without a body: nothing goes on


_BY_STRICTNESS: Final = (RouteRule.REFUSE, RouteRule.SEAL, RouteRule.CLEAR)
# Decoded twice, or cut at a NUL, it would be another path.
_MISREAD: Final = re.compile(r"%(?:[01][0-9a-f]|25|3b|7f)", re.IGNORECASE)


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
        asked = [
            each
            for each in map(_taken_apart, self.routes.items())
            if each.method in (method, "*")
            and _is_asked(query, each.parameter, literally=each.rule is RouteRule.CLEAR)
        ]
        if is_ambiguous(path) or _MISREAD.search(path):
            return _strictest(each.rule for each in asked if each.rule is not RouteRule.CLEAR)
        as_it_stands = _best([each for each in asked if lies_under(path, each.prefix)])
        decoded = _best([each for each in asked if lies_under(_decoded(path), _decoded(each.prefix))])
        readings = {as_it_stands, decoded}
        if None in readings:
            readings.discard(RouteRule.CLEAR)
        return _strictest(each for each in readings if each is not None)


class _Route(NamedTuple):
    method: str
    prefix: str
    parameter: str
    rule: RouteRule


def _taken_apart(given: tuple[str, RouteRule]) -> _Route:
    name, rule = given
    method, _, rest = name.partition(" ")
    prefix, _, parameter = rest.partition("?")
    return _Route(method, prefix, parameter, rule)


def _best(found: Sequence[_Route]) -> RouteRule | None:
    """Rule 1, of routes whose path is right."""
    if not found:
        return None
    rank = max((len(each.prefix), bool(each.parameter)) for each in found)
    found = [each for each in found if (len(each.prefix), bool(each.parameter)) == rank]
    own = {each.parameter for each in found if each.method != "*"}
    return _strictest(each.rule for each in found if each.method != "*" or each.parameter not in own)


def _strictest(rules: Iterable[RouteRule]) -> RouteRule | None:
    given = set(rules)
    return next((rule for rule in _BY_STRICTNESS if rule in given), None)


def _is_asked(query: str, parameter: str, *, literally: bool) -> bool:
    if not parameter:
        return True
    if literally:
        return parameter in _names_in(query)
    # Also what stands behind an encoded `&` or `;`, and PHP's `name[]`.
    names = {unquote_plus(name) for name in _names_in(query)} | _names_in(unquote_plus(query))
    return parameter in {re.split(r"[\[\x00]", name)[0] for name in names}


def _names_in(query: str) -> set[str]:
    return {part.partition("=")[0] for part in query.replace(";", "&").split("&")}


def _decoded(path: str) -> str:
    return unquote(path, errors="surrogateescape")
