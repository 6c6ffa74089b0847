"""One pass of the proof: is the KEK sound, revoked, or can nobody tell? (docs/hsm.md)

1. Finding the KEK proves nothing, not finding it proves nothing: the canary ciphertext and the canary key
   decide.
2. `kek_replaced` needs a KEK that works and still does not open the canary: it must round-trip fresh bytes
   on a clean session. A token whose decryption is broken is unreachable, however well its searches and its
   generator do.
3. One pass is not the verdict. The caller makes a second one in a new worker, and that one counts.
4. The registry's dates are compared first: no token enforces its own, and some cannot even read them.
"""

import hmac
from dataclasses import replace
from datetime import UTC, date, datetime
from hashlib import sha256
from typing import Any

from pkcs11 import Attribute, ObjectClass, PKCS11Error

from envelope.keys import KEY_MATERIAL_SIZE
from key_agent.errors import KeySourceError, error_of
from key_agent.sources.hsm.key_objects import KekName, find_kek, look_for_kek, public_keys_in_token
from key_agent.sources.hsm.methods import wrapping_of
from key_agent.sources.hsm.session import Token, attribute, sees_canary_key
from key_agent.sources.hsm.wrapping import (
    KekObjects,
    Wrapping,
    WrongBindingError,
    canary_binding,
    random_bytes,
)
from key_agent.sources.source import Kek
from key_agent.sources.verdict import Diagnosis, Verdict


def diagnose(token: Token, kek: Kek, *, now_s: float) -> Diagnosis:
    """One pass, on a session of its own."""
    try:
        return _diagnose(token, kek, now_s)
    except KeySourceError as error:
        return error.diagnosis
    except PKCS11Error as error:
        return Diagnosis(Verdict.UNREACHABLE, f"PKCS#11: {type(error).__name__}")


def _diagnose(token: Token, kek: Kek, now_s: float) -> Diagnosis:
    ended = _end_in_registry(kek, now_s)
    if ended is not None:
        return ended
    wrapping = wrapping_of(kek.method, token.quirks.mechanisms)
    found = _search(token, kek, wrapping)
    if isinstance(found, Diagnosis):
        return found
    state = _state(found, wrapping, _day(now_s))
    if state is not None:
        return state
    if _opens_canary(token, kek, wrapping, found):
        return Diagnosis(Verdict.OK, "the KEK opened its canary")
    found = _search(token, kek, wrapping)
    if isinstance(found, Diagnosis):
        return found
    if _opens_canary(token, kek, wrapping, found):
        return Diagnosis(Verdict.OK, "the KEK opened its canary at the second attempt")
    found = _search(token, kek, wrapping)
    if isinstance(found, Diagnosis):
        return found
    if _round_trips(token, kek, wrapping, found):
        return Diagnosis(Verdict.KEK_REPLACED, "the key of that name works and does not open the canary")
    return Diagnosis(Verdict.UNREACHABLE, "the KEK seals and does not open what it sealed")


def usable_kek(token: Token, kek: Kek, *, now_s: float) -> KekObjects:
    """The key objects of *kek* on the current session, to be used for this call only.

    It has opened its canary: nothing is ever wrapped by another key of that name. KeySourceError
    if it is missing, ambiguous, disabled, past its end, or not that key; that alone proves nothing yet.
    """
    ended = _end_in_registry(kek, now_s)
    if ended is not None:
        raise error_of(ended)
    wrapping = wrapping_of(kek.method, token.quirks.mechanisms)
    found = find_kek(token.session(serial=kek.token_serial), KekName.of(kek), wrapping)
    state = _state(found, wrapping, _day(now_s))
    if state is not None:
        raise error_of(state)
    if not _opens_canary(token, kek, wrapping, found):
        raise KeySourceError("the KEK does not open its canary")
    return found


def _day(now_s: float) -> date:
    return datetime.fromtimestamp(now_s, UTC).date()


def _end_in_registry(kek: Kek, now_s: float) -> Diagnosis | None:
    if kek.valid_until_s is not None and now_s >= kek.valid_until_s:
        return Diagnosis(Verdict.KEK_EXPIRED, f"the KEK ended on {_text(kek.valid_until_s)}")
    if kek.valid_from_s is not None and now_s < kek.valid_from_s:
        return Diagnosis(Verdict.KEK_EXPIRED, f"the KEK begins on {_text(kek.valid_from_s)} only")
    return None


def _text(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(sep=" ")


def _search(token: Token, kek: Kek, wrapping: Wrapping) -> KekObjects | Diagnosis:
    """The KEK on a new session, or what its absence means."""
    session = token.renew(serial=kek.token_serial)
    label = kek.reference.label
    found = look_for_kek(session, KekName.of(kek), wrapping)
    if found.kek is not None:
        return found.kek
    if not found.is_missing:
        return Diagnosis(Verdict.KEK_AMBIGUOUS, f"{found.what} are named {label!r}")
    if sees_canary_key(session):
        return Diagnosis(
            Verdict.KEK_DESTROYED, f"{found.what} named {label!r}, and the canary key is visible"
        )
    return Diagnosis(Verdict.TOKEN_CHANGED, "neither the KEK nor the canary key is in the token")


def _state(found: KekObjects, wrapping: Wrapping, today: date) -> Diagnosis | None:
    """What the KEK's attributes say, or None for nothing."""
    if attribute(found.key, Attribute.KEY_TYPE) not in (None, wrapping.key_type):
        return Diagnosis(Verdict.KEK_REPLACED, f"the key of that name is no {wrapping.key_type.name} key")
    if attribute(found.key, wrapping.opening) is False:
        return Diagnosis(Verdict.KEK_DISABLED, f"{wrapping.opening.name} of the KEK is false")
    if found.mac is not None and attribute(found.mac, Attribute.SIGN) is False:
        return Diagnosis(Verdict.KEK_DISABLED, "SIGN of the KEK's HMAC key is false")
    ends, starts = _date(found.key, Attribute.END_DATE), _date(found.key, Attribute.START_DATE)
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


def _opens_canary(token: Token, kek: Kek, wrapping: Wrapping, found: KekObjects) -> bool:
    session = token.session(serial=kek.token_serial)
    try:
        canary = wrapping.open(session, found, kek.canary_ciphertext, canary_binding(kek.reference))
    except (PKCS11Error, WrongBindingError):
        return False
    return hmac.compare_digest(sha256(canary).digest(), kek.canary_sha256)


def _round_trips(token: Token, kek: Kek, wrapping: Wrapping, found: KekObjects) -> bool:
    """Fresh bytes, sealed and opened by what is there now; a key pair by the public half in the token."""
    session = token.session(serial=kek.token_serial)
    candidates = [found]
    if wrapping.object_class is ObjectClass.PRIVATE_KEY:
        shown = public_keys_in_token(session, found.key, KekName.of(kek))
        candidates = [replace(found, public_key_der=public_key_der) for public_key_der in shown]
    binding = canary_binding(kek.reference)
    fresh = random_bytes(session, KEY_MATERIAL_SIZE)
    for candidate in candidates:
        sealed = wrapping.seal(session, candidate, fresh, binding)
        try:
            if wrapping.open(session, candidate, sealed, binding) == fresh:
                return True
        except WrongBindingError:
            continue
    return False
