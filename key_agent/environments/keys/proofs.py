"""Which wraps this environment's HSM has opened just now, so that it need not open all of them twice.

1. An environment that joins or returns has every wrap opened when it takes it in, and asked for again before
   it counts. With an RSA KEK and 10,000 keys one look takes an HSM half a minute; the second one would find
   what the first has found.
2. Remembered is everything that was opened: key, KEK, check value, and the wrapped bytes by digest. A row
   that was exchanged or damaged meanwhile is another wrap, and is opened.
3. Whether the KEK itself works now is never remembered: each look has the HSM open one wrap at least.
4. In memory alone and for KEPT_S. After that, and after a restart, everything is opened again.
"""

from collections.abc import Iterable, Mapping
from hashlib import sha256
from itertools import batched
from typing import Final

from envelope.derive import lp
from envelope.keys import KeyId
from key_agent.rotation import unopenable
from key_agent.sources.source import Kek, KeySource, WrappedKey
from runtime.clock import Clock

KEPT_S: Final = 600.0
_BATCH: Final = 500
"""Wraps in one request to the HSM: whoever else asks it something waits for so many."""

type _Digest = bytes


class Proofs:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._opened_boot_s: dict[_Digest, float] = {}

    def opened(self, keys: Iterable[WrappedKey]) -> None:
        """The HSM has just opened these, and they were what their check values say."""
        self._forget()  # nobody may ever look: each wrap that is brought again is another one
        now_s = self._clock.boot_s()
        self._opened_boot_s |= {_digest(key): now_s for key in keys}

    async def unopenable(
        self, source: KeySource, kek: Kek, keys: Iterable[WrappedKey]
    ) -> Mapping[KeyId, str]:
        """Those of *keys* that the HSM does not open, or not as what they should be, and why.

        KeySourceError if it cannot tell, of any of them.
        """
        self._forget()
        held = list(keys)
        unknown = [key for key in held if _digest(key) not in self._opened_boot_s] or held[:1]  # rule 3
        failed: dict[KeyId, str] = {}
        for some in batched(unknown, _BATCH):
            found = await unopenable(source, kek, some)
            failed |= found
            self.opened(key for key in some if key.key_id not in found)
        for key in held:
            if key.key_id in failed:
                self._opened_boot_s.pop(_digest(key), None)
        return failed

    def _forget(self) -> None:
        now_s = self._clock.boot_s()
        self._opened_boot_s = {
            digest: at_s for digest, at_s in self._opened_boot_s.items() if now_s - at_s < KEPT_S
        }


def _digest(key: WrappedKey) -> _Digest:
    facts = (
        str(key.owner),
        str(key.key_id),
        key.kek_id,
        key.environment_id,
        key.method,
        key.token_serial,
        key.use,
        key.algorithm or "",
    )
    hashed = sha256(key.kcv).digest() + sha256(key.wrapped).digest()
    return sha256(b"".join(lp(fact.encode()) for fact in facts) + hashed).digest()
