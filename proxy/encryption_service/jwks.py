"""Key sets of token issuers (RFC 7517), fetched from configured URLs and kept.

1. A set is fetched when it is first needed, when a token names a key that it lacks, and when it is old. At
   most one fetch per URL runs, and at most one begins within MIN_INTERVAL_S: unknown key ids are anyone's to
   invent.
2. A fetch that fails leaves the old set as it is. It counts until MAX_STALE_S after it was fetched, then no
   longer: a key that its issuer has taken back must end here too, also when somebody cuts us off from hearing
   of it.
3. Whoever has a set to go on with waits only IMPATIENT_S for a newer one; the fetch goes on without him.
4. A set that is not a key set, or names one key id for two keys, is a failed fetch. Keys of other types, uses
   and algorithms than ours stand there rightly, and are passed over; so is one that holds its private half.
5. The URLs are few and configured, so the map of sets is bounded by the configuration.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
from joserfc.jwk import RSAKey

from envelope.base64url import b64u_decode
from envelope.errors import FormatError
from proxy.encryption_service.outbound import OutboundError
from proxy.encryption_service.tokens import (
    ALGORITHM,
    MAX_KID_CHARS,
    KeysNeededError,
    KeysUnavailableError,
    json_object,
)
from runtime.clock import Clock

MAX_AGE_S: Final = 3600.0
MAX_STALE_S: Final = 24 * 3600.0
MIN_INTERVAL_S: Final = 30.0
PATIENT_S: Final = 6.0
IMPATIENT_S: Final = 0.1
MAX_KEYS: Final = 100
MIN_BITS: Final = 2048
MAX_BITS: Final = 8192
_EXPONENTS: Final = range(3, 1 << 32)

log = structlog.get_logger(__name__)


class KeySetError(FormatError):
    """Not a key set that can be used."""


def parse_key_set(body: bytes) -> dict[str, RSAKey]:
    """RS256 keys by `kid` from a JWK set. KeySetError if it is none (rule 4); it may hold no key of ours."""
    try:
        keys = json_object(body).get("keys")
    except (ValueError, RecursionError):
        raise KeySetError("the answer is not a JSON object") from None
    if not isinstance(keys, list) or len(keys) > MAX_KEYS or not all(isinstance(key, dict) for key in keys):
        raise KeySetError(f"`keys` is not a list of at most {MAX_KEYS} keys")
    found: dict[str, RSAKey] = {}
    for jwk in keys:
        if not _is_ours(jwk):
            continue
        if jwk["kid"] in found:
            raise KeySetError("one key id names two keys")
        found[jwk["kid"]] = _public_key(jwk)
    return found


def _is_ours(jwk: Mapping[str, Any]) -> bool:
    kid, operations = jwk.get("kid"), jwk.get("key_ops", ["verify"])
    return (
        jwk.get("kty") == "RSA"
        and jwk.get("use", "sig") == "sig"
        and jwk.get("alg", ALGORITHM) == ALGORITHM
        and isinstance(operations, list)
        and "verify" in operations
        and "d" not in jwk
        and isinstance(kid, str)
        and 0 < len(kid) <= MAX_KID_CHARS
    )


def _public_key(jwk: Mapping[str, Any]) -> RSAKey:
    modulus, exponent = _number(jwk.get("n")), _number(jwk.get("e"))
    if not MIN_BITS <= modulus.bit_length() <= MAX_BITS or exponent not in _EXPONENTS or not exponent & 1:
        raise KeySetError(f"an RSA key outside {MIN_BITS} to {MAX_BITS} bits or with an unsafe exponent")
    try:
        return RSAKey.import_key(RSAPublicNumbers(exponent, modulus).public_key())
    except ValueError:
        raise KeySetError("an RSA key that is none") from None


def _number(text: object) -> int:
    if not isinstance(text, str) or len(text) > MAX_BITS:
        raise KeySetError("an RSA key without modulus or exponent")
    try:
        return int.from_bytes(b64u_decode(text.rstrip("=")))
    except FormatError:
        raise KeySetError("an RSA key whose numbers are not base64url") from None


@dataclass(slots=True)
class _Set:
    keys: dict[str, RSAKey] = field(default_factory=dict)
    fetched_boot_s: float | None = None
    attempted_boot_s: float | None = None
    fetch: asyncio.Task[None] | None = None


class KeySets:
    """The sets by URL. *get* fetches a body or raises OutboundError. One event loop, no threads."""

    def __init__(self, get: Callable[[str], Awaitable[bytes]], clock: Clock) -> None:
        self._get = get
        self._clock = clock
        self._sets: dict[str, _Set] = {}

    def find(self, url: str, kid: str) -> RSAKey | None:
        """The key *kid* of the set at *url*; None if a set as new as may be had lacks it.

        KeysNeededError: call `refresh`, then ask again; a fetch that has ended is not asked for again
        within MIN_INTERVAL_S.
        KeysUnavailableError: there is no set, and another fetch must wait.
        """
        held = self._sets.get(url)
        if held is None:
            raise KeysNeededError(url, patient=True)
        age_s = self._age_s(held)
        key = held.keys.get(kid) if age_s < MAX_STALE_S else None
        if key is None and (held.fetch is not None or self._may_begin(held)):
            raise KeysNeededError(url, patient=True)
        if age_s >= MAX_STALE_S:
            raise KeysUnavailableError("the token issuer's keys could not be fetched")
        if key is not None and age_s >= MAX_AGE_S and self._may_begin(held):
            raise KeysNeededError(url, patient=False)
        return key

    async def refresh(self, url: str, *, patient: bool) -> None:
        """Fetch the set at *url*, together with whoever else waits for it. Failure is seen by `find`."""
        held = self._sets.setdefault(url, _Set())
        if held.fetch is None:
            if not self._may_begin(held):
                return
            held.attempted_boot_s = self._clock.boot_s()
            held.fetch = asyncio.create_task(self._fetch(url, held), name=f"jwks:{url}")
        # wait, not await: one impatient or cancelled caller must not end the fetch of the others.
        await asyncio.wait({held.fetch}, timeout=PATIENT_S if patient else IMPATIENT_S)

    async def aclose(self) -> None:
        """End what still runs."""
        running = [held.fetch for held in self._sets.values() if held.fetch is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _fetch(self, url: str, held: _Set) -> None:
        try:
            keys = parse_key_set(await self._get(url))
        except (OutboundError, KeySetError) as error:
            log.warning("the keys of a token issuer were not fetched", url=url, cause=str(error))
        else:
            held.keys, held.fetched_boot_s = keys, self._clock.boot_s()
        finally:
            held.fetch = None

    def _age_s(self, held: _Set) -> float:
        return math.inf if held.fetched_boot_s is None else self._clock.boot_s() - held.fetched_boot_s

    def _may_begin(self, held: _Set) -> bool:
        last_s = held.attempted_boot_s
        return held.fetch is None and (last_s is None or self._clock.boot_s() - last_s >= MIN_INTERVAL_S)
