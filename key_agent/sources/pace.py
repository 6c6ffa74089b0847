"""Whether an HSM or key server answers as soon as it should: an early word, long before a time-out.

1. Slow is no verdict on the KEK. It withdraws nothing, stops no push and replaces no worker: it lets callers
   be sent to an environment that is quicker (environments/telling.py). A time-out is a time-out as before.
2. What counts is how long a request has been *in* the HSM. Not that it waited for its turn behind another,
   nor that the worker waited for a processor: a busy agent, or a busy machine, has no slow HSM. So the
   watch's canary needs no place of its own: whichever request is in there when the HSM stops tells of it.
3. A request may take as long as was asked of it (a batch, its budget; a start, START_ALLOWANCE_S), and
   `slow_after_s` besides. It is not waited for its answer: it is late from that moment.
4. Once slow, it takes QUICK_ANSWERS answers in a row, each within half of `slow_after_s`, to be quick again:
   one that answers now and then does not send callers to and fro.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import structlog

from runtime.clock import Clock

SLOW_AFTER_S: Final = 1.0
QUICK_ANSWERS: Final = 2
START_ALLOWANCE_S: Final = 4.0
"""For a new worker: Python, the vendor's module, its connection to the HSM, the login."""
_LOOK_AGAIN_S: Final = 0.05
"""An event loop that was held up reads first what has come in meanwhile."""

log = structlog.get_logger(__name__)


class Pace:
    """Pure: durations in, a word out. Listeners hear of changes; they must not wait and must not raise."""

    def __init__(self, slow_after_s: float = SLOW_AFTER_S, *, of: str = "the HSM") -> None:
        self.slow_after_s: Final = slow_after_s
        self._of: Final = of
        self._listeners: list[Callable[[str | None], None]] = []
        self._quick = 0
        self.slow: str | None = None
        """Why callers had better go elsewhere; None: there is no reason."""

    def listen(self, listener: Callable[[str | None], None]) -> None:
        """Call *listener* with each new value of `slow`, at once."""
        self._listeners.append(listener)

    def late(self, waited_s: float) -> None:
        """A request has been in there for *waited_s* beyond what it may take, and has no answer yet."""
        self._quick = 0
        if self.slow is None:
            log.warning("the HSM is slow", of=self._of, waited_s=round(waited_s, 2))
            self._become(f"{self._of} did not answer within {self.slow_after_s:g} s")

    def answered(self, took_s: float) -> None:
        """A request came back after *took_s* beyond what it may take."""
        self._quick = self._quick + 1 if took_s <= self.slow_after_s / 2 else 0
        if self.slow is not None and self._quick >= QUICK_ANSWERS:
            log.info("the HSM is quick again", of=self._of)
            self._become(None)

    def failed(self) -> None:
        """A request came to nothing: its worker died or was killed, or nobody waits for it any more."""
        self._quick = 0

    def _become(self, slow: str | None) -> None:
        self.slow = slow
        for listener in self._listeners:
            listener(slow)


def starved_s(pid: int) -> float:
    """For how long, in its life, the process was ready to run and got no processor (proc(5), schedstat).

    0 where the kernel does not count it: then all of a request's time is the HSM's.
    """
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


class Stopwatch:
    """A `with` block around one request, from its going out to its answer (rules 2 and 3).

    *pid*: of the worker. *allowed_s*: what the request may take besides. *counts*: whether its answer shows
    that the HSM is quick. *starved*: for how long a process got no processor, in its life.
    """

    def __init__(
        self,
        pace: Pace,
        clock: Clock,
        pid: int,
        *,
        allowed_s: float,
        counts: bool,
        starved: Callable[[int], float] = starved_s,
    ) -> None:
        self._pace = pace
        self._clock = clock
        self._pid = pid
        self._allowed_s = allowed_s
        self._counts = counts
        self._starved = starved
        self._began_s = 0.0
        self._starved_before_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._was_over = False

    def __enter__(self) -> Self:
        self._began_s, self._starved_before_s = self._clock.boot_s(), self._starved(self._pid)
        self._look_in(self._allowed_s + self._pace.slow_after_s)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if kind is not None:
            self._pace.failed()
        elif self._counts:
            self._pace.answered(self._beyond_s())

    def _beyond_s(self) -> float:
        """How long it has been in the HSM, beyond what it may take."""
        waited_s = max(0.0, self._starved(self._pid) - self._starved_before_s)
        return self._clock.boot_s() - self._began_s - waited_s - self._allowed_s

    def _look_in(self, delay_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._look)

    def _look(self) -> None:
        beyond_s = self._beyond_s()
        left_s = self._pace.slow_after_s - beyond_s
        if left_s > 0 or not self._was_over:
            self._was_over = left_s <= 0
            self._look_in(max(left_s, _LOOK_AGAIN_S))
            return
        self._timer = None
        self._pace.late(beyond_s)
