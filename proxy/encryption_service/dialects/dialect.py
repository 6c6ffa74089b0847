"""What a dialect is: a pure function from a call to an answer.

1. `handle` returns plainly on the fast path: no await, no task. It may return an awaitable where it has to
   wait (a JWKS to fetch, a body that streams).
2. What the HTTP layer itself has to refuse (unknown path, too large, overload, a crash) it has the dialect
   say, by `refuse`, so that even these answers have the dialect's own shape. `refuse` never raises.
3. A dialect never sees a socket, a file or a key.
"""

from abc import ABC, abstractmethod
from collections.abc import Awaitable
from enum import StrEnum

from proxy.encryption_service.call import Answer, Call, StreamingAnswer
from proxy.encryption_service.model import DialectName


class Trouble(StrEnum):
    """What the HTTP layer has to answer itself. The value is for logs and metrics."""

    NOT_FOUND = "not-found"  # a path of the dialect's, but no such thing there
    METHOD = "method"  # the path exists, not for this method
    TOO_LARGE = "too-large"  # the body exceeds `max_body_bytes`
    MALFORMED_HTTP = "malformed-http"  # the request cannot be parsed
    OVERLOAD = "overload"  # too many calls at once: retry later
    TIMEOUT = "timeout"  # the client was too slow with its request
    CRASH = "crash"  # a bug of ours: `handle` raised
    STOPPING = "stopping"  # the process ends: retry elsewhere


class Dialect(ABC):
    """One wire protocol. One object per process serves all tenants."""

    name: DialectName
    max_body_bytes: int
    """The HTTP layer answers `Trouble.TOO_LARGE` beyond it, without reading on."""

    @abstractmethod
    def claims(self, path: str) -> bool:
        """Whether *path* (raw, without query) is this dialect's; decided before authentication."""

    @abstractmethod
    def handle(self, call: Call) -> Answer | Awaitable[Answer | StreamingAnswer]:
        """Serve *call*. Raises only by a bug; the HTTP layer then answers `Trouble.CRASH`."""

    @abstractmethod
    def refuse(self, trouble: Trouble, call: Call | None, detail: str = "") -> Answer:
        """The dialect's own answer to *trouble*; *call* is None if nothing could be parsed.

        *detail* is for the other side's log: public, one line, no secret.
        """

    def tenant_of(self, call: Call) -> str | None:
        """Whose caller sends *call*, of which the head alone is here; empty: nobody's, as `handle` will say.

        None: the head does not tell. A dialect whose bodies may be long has to be able to tell. Nothing is
        recorded and no quota taken by this.
        """
        del call
        return None

    def wants_stream(self, method: str, path: str) -> bool:
        """Whether this call's body is to be handed over as `Call.body_stream`, beyond `max_body_bytes`."""
        del method, path
        return False
