"""What a profile is told of one network service: `profile_options` of the directory, checked.

1. Every profile has these; a profile with options of its own subclasses `ProfileOptions`. An option nobody
   knows is an error, told when it is set and again when the directory is read.
2. Where there are rules for paths, a path that could be spelled otherwise (dot segments, empty segments,
   letters or slashes that are percent-encoded, parameters) is `strict`: it may be another rule's.
"""

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Annotated, Final, Self

import msgspec

from envelope.errors import FormatError

# `/a/../b`, `/a//b`, `\\`, `;x`; and `%` before what RFC 3986 2.3 says is never encoded, or before a slash.
_AMBIGUOUS: Final = re.compile(
    r"/\.{1,2}(?:/|\Z)|//|[\\;]|%(?:2[def]|3[0-9]|4[1-9a-f]|5[0-9acf]|6[1-9a-f]|7[0-9ae])", re.IGNORECASE
)


_CHANGE: Final = re.compile(r"([a-z][a-z0-9_]*)(?::(.+?))?=(.*)", re.DOTALL)


class StoredPolicy(StrEnum):
    """What to do with a stored body."""

    STRICT = "strict"  # what is not sealed is refused
    MIGRATE = "migrate"  # what is not sealed passes, counted and audited; what is sealed is opened
    PASSTHROUGH = "passthrough"  # all of it is served as it is stored, ciphertext too, counted and audited


class SealedUpload(StrEnum):
    """What to do with an upload that begins like a sealed object."""

    WRAP = "wrap"  # sealed like any other: what comes down is what went up
    PASS = "pass"  # noqa: S105 - stored as it is if it opens under a key of this service, refused if not


class ProfileOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options that every profile has."""

    legacy: dict[Annotated[str, msgspec.Meta(pattern="^/", max_length=1024)], StoredPolicy] = {}
    """Path prefix -> policy for stored bodies; the longest prefix wins, else the service's `legacy`."""
    sealed_upload: SealedUpload = SealedUpload.WRAP
    hide_key_ids: bool = False
    """Uploads of one request become objects that name no key. Parts and files of forms name theirs."""

    @property
    def has_subdomains(self) -> bool:
        """Whether names below the upstream's own belong to the service, in forward mode."""
        return False

    @property
    def reverse_hosts(self) -> tuple[str, ...]:
        """Names of this proxy that reverse mode serves: they, and one label before each of them."""
        return ()

    @property
    def has_pages(self) -> bool:
        """Whether what is read may be a page of the service's, which was never an object of ours, where
        `legacy` says nothing of its path. What begins like an object is opened all the same."""
        return False

    @classmethod
    def of(cls, given: Mapping[str, object]) -> Self:
        """FormatError, naming the option, for what this profile does not know or cannot use."""
        try:
            return msgspec.convert(dict(given), type=cls)
        except msgspec.ValidationError as error:
            raise FormatError(f"profile options: {error}") from None

    def policy_for(self, target: str) -> StoredPolicy | None:
        """What the rules say of this path and query; None: nothing."""
        if not self.legacy:
            return None
        path = target.partition("?")[0]
        if is_ambiguous(path):
            return StoredPolicy.STRICT
        prefixes = [prefix for prefix in self.legacy if lies_under(path, prefix)]
        return self.legacy[max(prefixes, key=len)] if prefixes else None


def edited(present: Mapping[str, object], changes: Iterable[str]) -> dict[str, object]:
    """*present* with *changes* made: `NAME=VALUE`, or `NAME:KEY=VALUE` for one entry of a table.

    A value is JSON if it is that, else text; an empty one takes the option away. FormatError for what has no
    such form. Whether a profile knows the option is `ProfileOptions.of`'s affair.
    """
    made: dict[str, object] = {name: _copy(value) for name, value in present.items()}
    for change in changes:
        match = _CHANGE.fullmatch(change)
        if match is None:
            raise FormatError(f"not NAME=VALUE or NAME:KEY=VALUE: {change!r}")
        name, key, text = match.groups()
        table = made
        if key is not None:
            found = made.setdefault(name, {})
            if not isinstance(found, dict):
                raise FormatError(f"the option {name} is no table")
            table, name = found, key
        if text:
            table[name] = _value(text)
        else:
            table.pop(name, None)
    return {name: value for name, value in made.items() if value != {}}


def _copy(value: object) -> object:
    return dict(value) if isinstance(value, dict) else value


def _value(text: str) -> object:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def is_ambiguous(path: str) -> bool:
    """Whether this path could be spelled otherwise (rule 2)."""
    return _AMBIGUOUS.search(path) is not None


def lies_under(path: str, prefix: str) -> bool:
    """By whole segments: `/old` is no prefix of `/older`."""
    return path == prefix or path.startswith(prefix if prefix.endswith("/") else prefix + "/")
