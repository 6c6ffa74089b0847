"""KEKs in the token: create, find, enable, destroy.

1. A KEK is generated in the HSM, checked for what the token made of it, and proven before anything is
   wrapped by it. What fails is destroyed on the way out.
2. Destroying searches again on a new session and demands zero hits, beside a canary key that is visible.
"""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from pkcs11 import Attribute, KeyType, PKCS11Error

from envelope.keys import KEY_MATERIAL_SIZE
from key_agent.errors import KeySourceError, UnsupportedError
from key_agent.sources.hsm.session import (
    CANARY_KEY_ID,
    CANARY_KEY_LABEL,
    Token,
    attribute,
    destroy_all,
    discard,
    find_keys,
    sees_canary_key,
)
from key_agent.sources.hsm.wrapping import Wrapping, canary_binding, check_attributes, prove, wrapping_of
from key_agent.sources.source import Kek, KekReference, WrapMethod

PROBE_LABEL = "sealgate-probe"


def find_kek(token: Token, kek: Kek) -> Any:
    """The one key object of *kek* on the current session. KeySourceError if there is none, or several."""
    reference = kek.reference
    found = find_keys(token.session(serial=kek.token_serial), reference.label, reference.object_id)
    if len(found) != 1:
        raise KeySourceError(f"{len(found)} keys named {reference.label!r} in the token")
    return found[0]


def create_kek(
    token: Token,
    reference: KekReference,
    methods: Sequence[WrapMethod],
    *,
    replace_unfinished: bool,
    now_ms: int,
) -> Kek:
    """Make the KEK with the first of *methods* that it proves. See `KeySource.create_kek`."""
    label, object_id = reference.label, reference.object_id
    if find_keys(token.renew(), label, object_id):
        if not replace_unfinished:
            raise KeySourceError(f"a key named {label!r} with id {object_id.hex()} exists in the token")
        destroy_all(token, label, object_id, serial=None)
    _ensure_canary_key(token)
    reasons = []
    for method in methods:
        wrapping = wrapping_of(method)
        try:
            _make(token, label, object_id, wrapping)
        except (PKCS11Error, UnsupportedError) as error:
            reasons.append(_reason(method, error))
            continue
        return _with_canary(token, reference, wrapping, now_ms)
    raise UnsupportedError("no wrap method works on this token: " + "; ".join(reasons))


def try_methods(token: Token, methods: Sequence[WrapMethod], probe_id: bytes) -> dict[str, str]:
    """Method -> "ok" or the reason it is refused, each tried with a throw-away KEK."""
    outcome = {}
    for method in methods:
        try:
            _make(token, PROBE_LABEL, probe_id, wrapping_of(method))
        except (PKCS11Error, UnsupportedError) as error:
            outcome[str(method)] = _reason(method, error)
            continue
        destroy_all(token, PROBE_LABEL, probe_id, serial=None)
        outcome[str(method)] = "ok"
    return outcome


def destroy_kek(token: Token, kek: Kek) -> None:
    """See `KeySource.destroy_kek`."""
    destroy_all(token, kek.reference.label, kek.reference.object_id, serial=kek.token_serial)
    if not sees_canary_key(token.session(serial=kek.token_serial)):
        raise KeySourceError("no KEK found, but the canary key is not visible either: nothing is proven")


def set_kek_enabled(token: Token, kek: Kek, *, enabled: bool) -> None:
    """See `KeySource.set_kek_enabled`."""
    opening = wrapping_of(kek.method).opening
    token.renew(serial=kek.token_serial)
    refusal = ""
    try:
        find_kek(token, kek)[opening] = enabled
    except PKCS11Error as error:
        refusal = f" ({type(error).__name__})"
    token.renew(serial=kek.token_serial)
    if attribute(find_kek(token, kek), opening) is not enabled:
        raise UnsupportedError(f"the token does not let {opening.name} of the KEK be changed{refusal}")


def _make(token: Token, label: str, object_id: bytes, wrapping: Wrapping) -> None:
    """Generate, check, prove; on failure destroy, and raise what went wrong."""
    try:
        session = token.renew()
        session.generate_key(
            KeyType.AES,
            256,
            id=object_id,
            label=label,
            store=True,
            capabilities=wrapping.capabilities,
            template={Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False, Attribute.PRIVATE: True},
        )
        # Look at what is in the token, not at what the call returned.
        found = find_keys(session, label, object_id)
        if len(found) != 1:
            raise UnsupportedError(f"{len(found)} keys named {label!r} after creating one")  # noqa: TRY301
        check_attributes(found[0], wrapping)
        prove(token, label, object_id, wrapping)
    except BaseException as error:
        stuck = discard(token, lambda: destroy_all(token, label, object_id, serial=None))
        if stuck is not None:
            error.add_note(f"and the key could not be destroyed again ({stuck})")
        raise


def _with_canary(token: Token, reference: KekReference, wrapping: Wrapping, now_ms: int) -> Kek:
    session = token.renew()
    [key] = find_keys(session, reference.label, reference.object_id)
    canary: bytes = session.generate_random(8 * KEY_MATERIAL_SIZE)
    binding = canary_binding(reference)
    ciphertext = wrapping.seal(session, key, canary, binding)
    if wrapping.open(session, key, ciphertext, binding) != canary:
        raise UnsupportedError("the canary does not come back")
    return Kek(
        reference=reference,
        method=wrapping.method,
        token_serial=token.held_serial,
        canary_ciphertext=ciphertext,
        canary_sha256=sha256(canary).digest(),
        created_at_ms=now_ms,
    )


def _ensure_canary_key(token: Token) -> None:
    session = token.session()
    if sees_canary_key(session):
        return
    session.generate_key(
        KeyType.AES,
        256,
        id=CANARY_KEY_ID,
        label=CANARY_KEY_LABEL,
        store=True,
        capabilities=0,  # it may do nothing: it is there to be seen
        template={Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False, Attribute.PRIVATE: True},
    )
    if not sees_canary_key(token.renew()):
        raise UnsupportedError("the token does not keep the canary key")


def _reason(method: WrapMethod, error: Exception) -> str:
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return "; ".join([f"{method}: {text}", *getattr(error, "__notes__", ())])
