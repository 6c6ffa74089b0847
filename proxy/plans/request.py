"""One request to a managed service, as planner and profiles are asked about it.

It is known by its head, before a byte of its body moves: where it goes, how that was found, and which changes
to the head fields every such request needs.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from proxy.messages.message import BodyFrame, RequestHead
from proxy.plans.profile_options import ProfileOptions, StoredPolicy
from proxy.tenants.model import Directory, LegacyPolicy, ServiceEntry

EMPTY_DIRECTORY: Final = Directory.of(0, (), ())


class Mode(StrEnum):
    """How the client reached us."""

    FORWARD = "forward"  # CONNECT, or an absolute-form request
    REVERSE = "reverse"  # the client takes us for the service


_AS_THE_SERVICE: Final = {legacy: StoredPolicy(legacy.value) for legacy in LegacyPolicy}


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where a request goes: the network service and how it was found."""

    service: ServiceEntry
    mode: Mode
    options: ProfileOptions = field(default_factory=ProfileOptions)
    stored: StoredPolicy | None = None
    """What the options say of this path; None: nothing, the service's own policy holds."""
    pages: bool = False
    """What is not sealed is a page of the service's: it passes, and was never content of ours."""

    @property
    def policy(self) -> StoredPolicy:
        """What to do with a stored body that is not sealed."""
        if self.pages:
            return StoredPolicy.MIGRATE
        return self.stored or _AS_THE_SERVICE[self.service.legacy]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edits:
    """Changes to the header fields: `drop`, then `put` (name, value) in place of all of that name.

    Of a name that is put twice the later value counts. `lists`: names that take several values.
    """

    drop: frozenset[str] = frozenset()
    put: tuple[tuple[str, str], ...] = ()
    lists: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def also(self, *, drop: Iterable[str] = (), put: Iterable[tuple[str, str]] = ()) -> "Edits":
        return Edits(drop=self.drop.union(drop), put=(*self.put, *put), lists=self.lists)


NO_EDITS: Final = Edits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request, as a profile is asked about it."""

    head: RequestHead
    frame: BodyFrame
    edits: Edits
    """Those that every request to a managed service needs; a plan's edits are these and the profile's own."""
    route: Route
    now_s: float = 0.0
    """Wall clock, for signatures."""
    directory: Directory = EMPTY_DIRECTORY
    """The picture of the directory: credentials by which clients are authenticated."""

    @property
    def service(self) -> ServiceEntry:
        return self.route.service

    @property
    def options(self) -> ProfileOptions:
        """Of the profile's own `options` type."""
        return self.route.options
