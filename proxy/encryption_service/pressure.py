"""Whether this thread has any time left: how much of the past it ran, or waited for a core to run on.

1. From the kernel's accounting, not from what calls took: on a machine that others use as well, a process can
   be at its end with half a core.
2. A kernel that does not tell (no CONFIG_SCHED_INFO) is one of which nothing is known: 0.
"""

import os
from pathlib import Path
from typing import Final, Self

LOOK_S: Final = 0.1
_SOURCE: Final = Path("/proc/thread-self/schedstat")


class Pressure:
    """Ask it every LOOK_S or so, from the thread that it is about."""

    def __init__(self, source: Path = _SOURCE) -> None:
        self._source = source
        self._wanted_ns = 0
        self._at_s = 0.0

    @classmethod
    def of_this_thread(cls) -> Self:
        """Bound to the calling thread, whoever asks later."""
        return cls(Path(os.path.realpath("/proc/thread-self")) / "schedstat")

    def look(self, now_s: float) -> float:
        """The part of the time since the last look that the thread wanted to run: 0 to 1."""
        try:
            running_ns, waiting_ns, _ = map(int, self._source.read_bytes().split())
        except (OSError, ValueError):
            return 0.0
        wanted_ns, past_s = running_ns + waiting_ns, now_s - self._at_s
        part = (wanted_ns - self._wanted_ns) / (past_s * 1e9) if self._at_s and past_s > 0 else 0.0
        self._wanted_ns, self._at_s = wanted_ns, now_s
        return min(1.0, max(0.0, part))
