"""What is to happen to one answer of a service: a value, made of its head and of its request's plan."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from proxy.messages.message import AnswerHead
from proxy.plans.conversing import Conversation, Reply
from proxy.plans.plan import Refuse
from proxy.plans.request import Edits


class BodyMapper(Protocol):
    """Rewrites the body of an answer as it streams. RefusedError where it cannot."""

    @property
    def pending(self) -> bool:
        """True: `settle` must be awaited before the next call. Never long: the answer stands still."""

    def feed(self, piece: bytes) -> bytes: ...

    def finish(self) -> bytes: ...

    async def settle(self) -> None:
        """Find out what the mapper waits for, the sizes of composites say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MapBody:
    """The body goes through a mapper. Its length is not known before: chunked, or to the end."""

    make: Callable[[Conversation], BodyMapper]


@dataclass(frozen=True, slots=True, kw_only=True)
class MapWhole:
    """The body is collected, at most *limit_bytes*, and *function* makes another answer of it."""

    limit_bytes: int
    function: Callable[[Conversation, AnswerHead, bytes], Awaitable[Reply]]
    """The reply's status and body replace the answer's, its fields those of the same name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """The answer passes as it is, but for the head."""

    edits: Edits
    may_be_sealed: bool = True
    """False: a body that begins like a sealed object is refused. It would be taken for plaintext."""
    body: MapBody | MapWhole | None = None
    """What becomes of the body, if there is one; `may_be_sealed` is then the mapper's affair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenWhole:
    """The body is a sealed object of `stored_bytes` (None: not declared)."""

    edits: Edits
    stored_bytes: int | None
    plain_bytes: int | None
    """None: not declared, or no object has that length; then opening it fails."""
    must_be_sealed: bool = False
    """Whatever the policy says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPart:
    """The body is the sealed range that was asked for."""

    edits: Edits


@dataclass(frozen=True, slots=True, kw_only=True)
class MapSize:
    """No body; its Content-Length is the stored one. `probe`: only the object's first bytes tell whose."""

    edits: Edits
    stored_bytes: int
    plain_bytes: int | None
    probe: bool = False
    """`plain_bytes` holds for a simple object only: look whether it is one, a composite, or none of ours."""


type AnswerPlan = Refuse | Pass | OpenWhole | OpenPart | MapSize
