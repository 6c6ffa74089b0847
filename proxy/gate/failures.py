"""How a flow fails at the gate, and what a log may say of it.

1. A refusal of the gate's own is a `VetoError`: the client is told the refusal, the log alone the cause.
2. The text of any other error may quote a body: a log names its type and its place (`origin_of`).
3. Of a request it names the method and the beginning of the host, as it was sent: paths and query strings may
   be the user's, and what mitmproxy makes of a host for people takes a second where a client makes it long.
"""

from typing import Final

from mitmproxy.http import Request

from proxy import refusals
from proxy.refusals import Refusal, RefusedError

_METHOD_CHARS: Final = 20
_HOST_CHARS: Final = 100


class VetoError(RefusedError):
    """The gate itself refuses; *cause* goes to the log only."""

    def __init__(self, refusal: Refusal, cause: str) -> None:
        super().__init__(refusal)
        self.cause = cause


class ClientGoneError(Exception):
    """Nobody is left to answer."""


def the[T](value: object, kind: type[T]) -> T:
    """*value*, of which the engine promised that it is a *kind*. VetoError if it is not."""
    if not isinstance(value, kind):
        raise VetoError(refusals.INTERNAL, f"{type(value).__name__} instead of {kind.__name__}")
    return value


def described(request: Request) -> str:
    """*request*, for a log (rule 3)."""
    host = (request.host_header or request.host)[:_HOST_CHARS]
    return f"{request.method[:_METHOD_CHARS]} {host.encode('ascii', 'backslashreplace').decode()}"


def origin_of(error: BaseException) -> str:
    """Type of *error* and where it was raised; its text may quote a body."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{trace.tb_frame.f_code.co_qualname}:{trace.tb_lineno}" if trace is not None else "unknown"
    return f"{type(error).__name__} in {where}"
