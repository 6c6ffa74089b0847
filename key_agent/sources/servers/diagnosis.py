"""One pass of the proof at a key server: is the KEK sound, revoked, or can nobody tell? (docs/hsm.md)

1. Not finding the KEK proves a revocation only while the canary key is there: a moved mount, another tenant's
   login or an emptied server look the same.
2. A ciphertext that does not open is looked at together with the canary ciphertext: if that opens, the one
   ciphertext is bad; if it does not, and fresh bytes come back, the key was replaced.
3. Nothing is ever decided by encrypting: OpenBao makes a missing key then, if our token may.
4. One pass is not the verdict; see hsm/diagnosis.py, rule 3.
"""

import hmac
from hashlib import sha256

from envelope.keys import KEY_MATERIAL_SIZE
from key_agent.errors import KeySourceError, error_of
from key_agent.sources.envelopes import canary_binding
from key_agent.sources.servers.server import (
    CANARY_NAME,
    Item,
    KeyGoneError,
    KeyServer,
    ServerUnavailableError,
    Standing,
    Unopened,
    Unsupported,
    name_of,
)
from key_agent.sources.source import Kek
from key_agent.sources.verdict import Diagnosis, Verdict


def diagnose(server: KeyServer, kek: Kek, *, now_s: float) -> Diagnosis:
    """One pass, over a connection of its own."""
    server.close()
    try:
        return _diagnose(server, kek, now_s)
    except ServerUnavailableError as error:
        return Diagnosis(error.verdict, str(error), error.retry_after_s)
    except KeyGoneError as error:
        # Gone between two questions: the next look finds it so.
        return Diagnosis(Verdict.UNREACHABLE, f"the key changed meanwhile: {error}")
    except Unsupported as error:
        return Diagnosis(Verdict.UNSUPPORTED, str(error))


def _diagnose(server: KeyServer, kek: Kek, now_s: float) -> Diagnosis:
    if (told := _by_date(kek, now_s)) is not None:
        return told
    name = name_of(kek.reference)
    identity = server.identity()
    found = server.find(name)
    match found.standing:
        case Standing.USABLE:
            pass
        case Standing.ABSENT:
            if identity != kek.token_serial or server.find(CANARY_NAME).standing is Standing.ABSENT:
                return Diagnosis(Verdict.TOKEN_CHANGED, "neither the KEK nor its canary key is at the server")
            return Diagnosis(Verdict.KEK_DESTROYED, f"{found.detail}, and the canary key is visible")
        case Standing.DISABLED:
            return Diagnosis(Verdict.KEK_DISABLED, found.detail)
        case Standing.AMBIGUOUS:
            return Diagnosis(Verdict.KEK_AMBIGUOUS, found.detail)
        case Standing.FOREIGN:
            return Diagnosis(Verdict.KEK_REPLACED, found.detail)
    if identity != kek.token_serial:
        return Diagnosis(Verdict.TOKEN_CHANGED, f"another server: {identity}, not {kek.token_serial}")
    canary = Item(kek.canary_ciphertext, canary_binding(kek.reference))
    [opened] = server.open(name, [canary])
    if isinstance(opened, bytes) and hmac.compare_digest(sha256(opened).digest(), kek.canary_sha256):
        return Diagnosis(Verdict.OK, "the KEK opened its canary")
    if isinstance(opened, Unopened) and opened.is_disallowed:
        return Diagnosis(Verdict.KEK_DISABLED, f"the canary: {opened.reason}")
    # Seen a moment ago, so nothing is made by this encryption.
    fresh = server.random(KEY_MATERIAL_SIZE)
    [sealed] = server.seal(name, [Item(fresh, canary.binding)])
    if server.open(name, [Item(sealed, canary.binding)]) == [fresh]:
        return Diagnosis(Verdict.KEK_REPLACED, "the key of that name works and does not open the canary")
    return Diagnosis(Verdict.UNREACHABLE, "the server seals and does not open what it sealed")


def _by_date(kek: Kek, now_s: float) -> Diagnosis | None:
    if kek.valid_until_s is not None and now_s >= kek.valid_until_s:
        return Diagnosis(Verdict.KEK_EXPIRED, "the KEK is past its end")
    if kek.valid_from_s is not None and now_s < kek.valid_from_s:
        return Diagnosis(Verdict.KEK_EXPIRED, "the KEK's time has not come")
    return None


def require_usable(server: KeyServer, kek: Kek, now_s: float) -> None:
    """The canary opens: nothing is wrapped by another key of that name. KeySourceError proves nothing yet."""
    found = diagnose(server, kek, now_s=now_s)
    if found.verdict is not Verdict.OK:
        raise error_of(found) if not found.verdict.withdraws else KeySourceError(found.detail)
