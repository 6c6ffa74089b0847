"""How a flow fails at the gate, and what a log may say of it.

1. A refusal of the gate's own is a `VetoError`: the client is told the refusal, the log alone the cause.
2. The text of any other error may quote a body: a log names its type and its place (`origin_of`).
"""

from proxy import refusals
from proxy.refusals import Refusal, RefusedError


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


def origin_of(error: BaseException) -> str:
    """Type of *error* and where it was raised; its text may quote a body."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{trace.tb_frame.f_code.co_qualname}:{trace.tb_lineno}" if trace is not None else "unknown"
    return f"{type(error).__name__} in {where}"
