"""How often calls of people whom nobody knows are recorded: they must not be able to fill the audit log."""

from typing import Final

from runtime.clock import Clock

PER_S: Final = 10.0
BURST: Final = 100.0


class Strangers:
    """PER_S calls a second are recorded, BURST at once; the next that is says how many were not."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._left = BURST
        self._at_s = clock.boot_s()
        self._unrecorded = 0

    def counted(self) -> int:
        """How many calls the record of this one stands for, itself included; 0: do not record it."""
        now_s = self._clock.boot_s()
        self._left = min(BURST, self._left + (now_s - self._at_s) * PER_S)
        self._at_s = now_s
        if self._left < 1:
            self._unrecorded += 1
            return 0
        self._left -= 1
        stands_for, self._unrecorded = 1 + self._unrecorded, 0
        return stands_for
