"""How long a key server that wants to be asked less is left alone.

1. It says so itself (Retry-After), and is believed up to MAX_S: longer than that nobody would notice that a
   KEK was revoked there, and keys would run out for a limit that was lifted meanwhile.
2. Where it does not say, it is left alone for 1, 2, 4 ... s; the first answer that is none of this ends that.
3. Until then it is asked nothing: whoever would is told `throttled` at once.
"""

from typing import Final

from runtime.clock import Clock

MAX_S: Final = 30.0


class BackOff:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._in_a_row = 0
        self._until_boot_s = 0.0

    def throttled(self, retry_after_s: float) -> None:
        """The server has refused a request for being one too many; *retry_after_s*: 0 if it does not say."""
        wait_s = retry_after_s if retry_after_s > 0 else 2.0 ** min(self._in_a_row, 10)
        self._in_a_row += 1
        self._until_boot_s = self._clock.boot_s() + min(wait_s, MAX_S)

    def answered(self) -> None:
        """The server has done what it was asked."""
        self._in_a_row = 0

    def left_s(self) -> float:
        """Seconds for which it is not asked yet; 0: it may be."""
        return max(0.0, self._until_boot_s - self._clock.boot_s())
