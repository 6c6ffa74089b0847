"""One pass of the proof: is the KEK sound, revoked, or can nobody tell? (hsm.md 5)

1. Finding the KEK proves nothing, not finding it proves nothing: the canary ciphertext and the canary key
   decide.
2. `kek_replaced` needs a KEK that works and still does not open the canary: it must round-trip fresh bytes
   on a clean session. A token whose decryption is broken is unreachable, however well its searches and its
   generator do.
3. One pass is not the verdict. The caller makes a second one in a new worker, and that one counts.
"""

import hmac
from datetime import UTC, date, datetime
from hashlib import sha256
from typing import Any

from pkcs11 import Attribute, KeyType, PKCS11Error

from envelope.keys import KEY_MATERIAL_SIZE
from key_agent.errors import KeySourceError, error_of
from key_agent.sources.hsm.keks import find_kek
from key_agent.sources.hsm.session import Token, attribute, find_keys, sees_canary_key
from key_agent.sources.hsm.wrapping import Wrapping, WrongBindingError, canary_binding, wrapping_of
from key_agent.sources.source import Kek
from key_agent.sources.verdict import Diagnosis, Verdict


def diagnose(token: Token, kek: Kek, *, now_s: float) -> Diagnosis:
    """One pass, on a session of its own."""
    try:
        return _diagnose(token, kek, _day(now_s))
    except KeySourceError as error:
        return error.diagnosis
    except PKCS11Error as error:
        return Diagnosis(Verdict.UNREACHABLE, f"PKCS#11: {type(error).__name__}")


def _diagnose(token: Token, kek: Kek, today: date) -> Diagnosis:
    wrapping = wrapping_of(kek.method)
    found = _search(token, kek)
    if isinstance(found, Diagnosis):
        return found
    state = _state(found, wrapping, today)
    if state is not None:
        return state
    if _opens_canary(token, kek, wrapping, found):
        return Diagnosis(Verdict.OK, "the KEK opened its canary")
    found = _search(token, kek)
    if isinstance(found, Diagnosis):
        return found
    if _opens_canary(token, kek, wrapping, found):
        return Diagnosis(Verdict.OK, "the KEK opened its canary at the second attempt")
    found = _search(token, kek)
    if isinstance(found, Diagnosis):
        return found
    if _round_trips(token, kek, wrapping, found):
        return Diagnosis(Verdict.KEK_REPLACED, "the key of that name works and does not open the canary")
    return Diagnosis(Verdict.UNREACHABLE, "the KEK seals and does not open what it sealed")


def usable_kek(token: Token, kek: Kek, *, now_s: float) -> Any:
    """The key object of *kek* on the current session, to be used for this call only.

    It has opened its canary: nothing is ever wrapped by another key of that name. KeySourceError
    if it is missing, ambiguous, disabled, past its end, or not that key; that alone proves nothing yet.
    """
    found = find_kek(token, kek)
    wrapping = wrapping_of(kek.method)
    state = _state(found, wrapping, _day(now_s))
    if state is not None:
        raise error_of(state)
    if not _opens_canary(token, kek, wrapping, found):
        raise KeySourceError("the KEK does not open its canary")
    return found


def _day(now_s: float) -> date:
    return datetime.fromtimestamp(now_s, UTC).date()


def _search(token: Token, kek: Kek) -> Any | Diagnosis:
    """The KEK on a new session, or what its absence means."""
    session = token.renew(serial=kek.token_serial)
    label = kek.reference.label
    found = find_keys(session, label, kek.reference.object_id)
    if len(found) == 1:
        return found[0]
    if found:
        return Diagnosis(Verdict.KEK_AMBIGUOUS, f"{len(found)} keys are named {label!r}")
    if sees_canary_key(session):
        return Diagnosis(Verdict.KEK_DESTROYED, f"no key is named {label!r}, and the canary key is visible")
    return Diagnosis(Verdict.TOKEN_CHANGED, "neither the KEK nor the canary key is in the token")


def _state(found: Any, wrapping: Wrapping, today: date) -> Diagnosis | None:
    """What the KEK's attributes say, or None for nothing."""
    if attribute(found, Attribute.KEY_TYPE) not in (None, KeyType.AES):
        return Diagnosis(Verdict.KEK_REPLACED, "the key of that name is no AES key")
    if attribute(found, wrapping.opening) is False:
        return Diagnosis(Verdict.KEK_DISABLED, f"{wrapping.opening.name} of the KEK is false")
    # No token enforces these dates (hsm.md 1.9).
    ends, starts = _date(found, Attribute.END_DATE), _date(found, Attribute.START_DATE)
    if ends is not None and today > ends:
        return Diagnosis(Verdict.KEK_EXPIRED, f"the KEK ended on {ends}")
    if starts is not None and today < starts:
        return Diagnosis(Verdict.KEK_EXPIRED, f"the KEK begins on {starts} only")
    return None


def _date(found: Any, name: Attribute) -> date | None:
    """None where it is unset or unreadable: SoftHSM2 answers GeneralError for a private key that has one."""
    try:
        value = attribute(found, name)
    except PKCS11Error:
        return None
    return value if isinstance(value, date) else None


def _opens_canary(token: Token, kek: Kek, wrapping: Wrapping, found: Any) -> bool:
    session = token.session(serial=kek.token_serial)
    try:
        canary = wrapping.open(session, found, kek.canary_ciphertext, canary_binding(kek.reference))
    except (PKCS11Error, WrongBindingError):
        return False
    return hmac.compare_digest(sha256(canary).digest(), kek.canary_sha256)


def _round_trips(token: Token, kek: Kek, wrapping: Wrapping, found: Any) -> bool:
    session = token.session(serial=kek.token_serial)
    binding = canary_binding(kek.reference)
    fresh: bytes = session.generate_random(8 * KEY_MATERIAL_SIZE)
    sealed = wrapping.seal(session, found, fresh, binding)
    return wrapping.open(session, found, sealed, binding) == fresh
