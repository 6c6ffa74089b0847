"""KEKs in the token: create, adopt, enable, destroy.

1. A KEK is generated in the HSM, checked for what the token made of it, and proven before anything is
   wrapped by it. What fails is destroyed on the way out; so the key that a method failed with was a
   throw-away key.
2. An adopted KEK is its owner's: it is checked and proven, never changed, never destroyed on the way out. A
   method by which the HSM makes the IV is tried on it only if a throw-away key has shown it, or the operator
   names it: a token that ignores the request would use the same IV at each attempt.
3. Destroying searches again on a new session and demands zero hits, beside a canary key that is visible.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from hashlib import sha256
from typing import Any, Final

from pkcs11 import Attribute, KeyType, MechanismFlag, PKCS11Error
from pkcs11.constants import DEFAULT

from envelope.keys import KEY_MATERIAL_SIZE
from key_agent.errors import KeySourceError, UnsupportedError
from key_agent.sources.hsm.key_objects import KekName, find_kek, look_for_kek
from key_agent.sources.hsm.methods import wrapping_of
from key_agent.sources.hsm.proof import P256_PARAMETERS, check_attributes, prove
from key_agent.sources.hsm.session import (
    CANARY_KEY_ID,
    CANARY_KEY_LABEL,
    Token,
    attribute,
    destroy_all,
    discard,
    find_everything,
    find_keys,
    find_mac_keys,
    mac_name,
    sees_canary_key,
)
from key_agent.sources.hsm.wrapping import Wrapping, canary_binding, random_bytes
from key_agent.sources.source import Kek, KekReference, KekType, WrapMethod

PROBE_LABEL: Final = "sealgate-probe"
PROBE_ID_SIZE: Final = 16
_HSM_MAKES_IV: Final = (WrapMethod.GCM_IN_PLACE, WrapMethod.GCM_APPENDED)
_SECRET: Final = {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False, Attribute.PRIVATE: True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """What is wanted of a new or adopted KEK, beside its name."""

    methods: Sequence[WrapMethod]
    """Candidates, best first."""
    now_ms: int
    valid_from_s: int | None = None
    valid_until_s: int | None = None


def create_kek(token: Token, reference: KekReference, making: Making, *, replace_unfinished: bool) -> Kek:
    """Make the KEK with the first method that it proves. See `KeySource.create_kek`."""
    _demand_key_making(token)
    name = KekName.new(reference)
    if find_everything(token.renew(), name.label, name.object_id):
        if not replace_unfinished:
            raise KeySourceError(
                f"a key named {name.label!r} with id {name.object_id.hex()} exists in the token"
            )
        destroy_all(token, name.label, name.object_id, serial=None)
    _ensure_canary_key(token)
    reasons = []
    for method in making.methods:
        wrapping = wrapping_of(method, token.quirks.mechanisms)
        try:
            _make(token, name, wrapping)
        except (PKCS11Error, UnsupportedError) as error:
            reasons.append(_reason(method, error))
            continue
        _note_end(token, name, wrapping, making.valid_until_s)
        return _with_canary(token, reference, wrapping, making, is_adopted=False)
    raise UnsupportedError("no wrap method works on this token: " + "; ".join(reasons))


def adopt_kek(token: Token, reference: KekReference, making: Making, *, is_method_pinned: bool) -> Kek:
    """Prove a key that is there. See `KeySource.adopt_kek`."""
    name = KekName.new(reference)
    session = token.renew()
    if not sees_canary_key(session):
        _ensure_canary_key(token)
    reasons = []
    for method in making.methods:
        wrapping = wrapping_of(method, token.quirks.mechanisms)
        try:
            _adopt(token, name, wrapping, is_method_pinned=is_method_pinned)
        except (PKCS11Error, UnsupportedError, KeySourceError) as error:
            reasons.append(_reason(method, error))
            continue
        return _with_canary(token, reference, wrapping, making, is_adopted=True)
    raise UnsupportedError(
        f"the key {name.label!r} with id {name.object_id.hex()} cannot be adopted: " + "; ".join(reasons)
    )


def try_methods(token: Token, methods: Sequence[WrapMethod]) -> dict[str, str]:
    """Method -> "ok" or the reason it is refused, each tried with a throw-away KEK."""
    if not token.quirks.makes_keys:
        return {str(method): "not tried: keys are not made here" for method in methods}
    outcome = {}
    for method in methods:
        try:
            _try_on_throw_away_key(token, wrapping_of(method, token.quirks.mechanisms))
        except (PKCS11Error, UnsupportedError) as error:
            outcome[str(method)] = _reason(method, error)
            continue
        outcome[str(method)] = "ok"
    return outcome


def destroy_kek(token: Token, kek: Kek) -> None:
    """See `KeySource.destroy_kek`."""
    destroy_all(token, kek.reference.label, kek.reference.object_id, serial=kek.token_serial)
    if not sees_canary_key(token.session(serial=kek.token_serial)):
        raise KeySourceError("no KEK found, but the canary key is not visible either: nothing is proven")


def set_kek_enabled(token: Token, kek: Kek, *, enabled: bool) -> None:
    """See `KeySource.set_kek_enabled`."""
    if not token.quirks.can_disable:
        raise UnsupportedError(
            "this HSM does not let a KEK be switched: use the vendor's tools, or destroy the KEK"
        )
    wrapping = wrapping_of(kek.method, token.quirks.mechanisms)
    opening, name = wrapping.opening, KekName.of(kek)
    session = token.renew(serial=kek.token_serial)
    refusal = ""
    try:
        find_kek(session, name, wrapping).key[opening] = enabled
    except PKCS11Error as error:
        refusal = f" ({type(error).__name__})"
    session = token.renew(serial=kek.token_serial)
    if attribute(find_kek(session, name, wrapping).key, opening) is not enabled:
        raise UnsupportedError(f"the token does not let {opening.name} of the KEK be changed{refusal}")


def _make(token: Token, name: KekName, wrapping: Wrapping) -> None:
    """Generate, check, prove; on failure destroy, and raise what went wrong."""
    try:
        session = token.renew()
        _generate(token, session, name, wrapping)
        if wrapping.method.has_mac_key:
            _generate_mac_key(token, session, name)
        # Look at what is in the token, not at what the calls returned.
        found = look_for_kek(session, name, wrapping)
        if found.kek is None:
            raise UnsupportedError(f"{found.what} named {name.label!r} after creating one")  # noqa: TRY301
        check_attributes(found.kek, wrapping)
        prove(token, name, wrapping)
    except BaseException as error:
        _undo(token, error, lambda: destroy_all(token, name.label, name.object_id, serial=None))
        raise


def _adopt(token: Token, name: KekName, wrapping: Wrapping, *, is_method_pinned: bool) -> None:
    session = token.renew()
    keys = find_keys(session, name.label, name.object_id, object_class=wrapping.object_class)
    if len(keys) != 1 or attribute(keys[0], Attribute.KEY_TYPE) != wrapping.key_type:
        raise UnsupportedError(f"{len(keys)} keys of that name and class in the token, or of another type")
    if wrapping.method in _HSM_MAKES_IV and not is_method_pinned:
        if not token.quirks.makes_keys:
            raise UnsupportedError("is not tried on a key that counts: set `method`, or name the vendor")
        _try_on_throw_away_key(token, wrapping)
        session = token.renew()
    made_mac = False
    if wrapping.method.has_mac_key and not find_mac_keys(session, name.label, name.object_id):
        _demand_key_making(token)
        _generate_mac_key(token, session, name)
        made_mac = True
    try:
        found = look_for_kek(session, name, wrapping)
        if found.kek is None:
            raise UnsupportedError(f"{found.what} of that name in the token, not one")  # noqa: TRY301
        check_attributes(found.kek, wrapping)
        prove(token, name, wrapping)
    except BaseException as error:
        if made_mac:
            _undo(token, error, lambda: _destroy_mac_key(token, name))
        raise


def _try_on_throw_away_key(token: Token, wrapping: Wrapping) -> None:
    probe = KekName(PROBE_LABEL, os.urandom(PROBE_ID_SIZE))
    _make(token, probe, wrapping)
    destroy_all(token, probe.label, probe.object_id, serial=None)


def _generate(token: Token, session: Any, name: KekName, wrapping: Wrapping) -> None:
    common: dict[str, Any] = {
        "id": name.object_id,
        "label": name.label,
        "store": True,
        "capabilities": wrapping.capabilities,
    }
    private = _SECRET | _left_out(token)
    match wrapping.method.kek_type:
        case KekType.AES_256:
            session.generate_key(KeyType.AES, 256, template=private, **common)
        case KekType.RSA_3072:
            # The public half may encrypt; that it does so elsewhere too is the point of it.
            session.generate_keypair(
                KeyType.RSA,
                3072,
                public_template={Attribute.ENCRYPT: True} | _left_out(token),
                private_template=private,
                **common,
            )
        case KekType.EC_P256:
            parameters = session.create_domain_parameters(
                KeyType.EC, {Attribute.EC_PARAMS: P256_PARAMETERS}, local=True
            )
            parameters.generate_keypair(public_template=_left_out(token), private_template=private, **common)


def _generate_mac_key(token: Token, session: Any, name: KekName) -> None:
    label, object_id = mac_name(name.label, name.object_id)
    session.generate_key(
        KeyType.GENERIC_SECRET,
        256,
        id=object_id,
        label=label,
        store=True,
        capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY,
        template=_SECRET | _left_out(token),
    )


def _destroy_mac_key(token: Token, name: KekName) -> None:
    for key in find_mac_keys(token.renew(), name.label, name.object_id):
        key.destroy()


def _note_end(token: Token, name: KekName, wrapping: Wrapping, valid_until_s: int | None) -> None:
    """CKA_END_DATE, for whoever looks into the token. Ours is in the registry, and that one counts."""
    if valid_until_s is None:
        return
    session = token.renew()
    last: date = datetime.fromtimestamp(valid_until_s - 1, UTC).date()
    try:
        find_kek(session, name, wrapping).key[Attribute.END_DATE] = last
    except PKCS11Error:
        token.renew()


def _with_canary(
    token: Token, reference: KekReference, wrapping: Wrapping, making: Making, *, is_adopted: bool
) -> Kek:
    session = token.renew()
    key = find_kek(session, KekName.new(reference), wrapping)
    canary = random_bytes(session, KEY_MATERIAL_SIZE)
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
        created_at_ms=making.now_ms,
        public_key_der=key.public_key_der,
        valid_from_s=making.valid_from_s,
        valid_until_s=making.valid_until_s,
        is_adopted=is_adopted,
    )


def _demand_key_making(token: Token) -> None:
    if not token.quirks.makes_keys:
        raise UnsupportedError(
            "this HSM's module makes no keys: make them with the vendor's tools, then adopt the KEK"
        )


def _ensure_canary_key(token: Token) -> None:
    session = token.session()
    if sees_canary_key(session):
        return
    if not token.quirks.makes_keys:
        raise UnsupportedError(f"make a secret key labelled {CANARY_KEY_LABEL!r} with the vendor's tools")
    session.generate_key(
        KeyType.AES,
        256,
        id=CANARY_KEY_ID,
        label=CANARY_KEY_LABEL,
        store=True,
        capabilities=0,  # it may do nothing: it is there to be seen
        template=_SECRET | _left_out(token),
    )
    if not sees_canary_key(token.renew()):
        raise UnsupportedError("the token does not keep the canary key")


def _left_out(token: Token) -> dict[Attribute, Any]:
    """Attributes that python-pkcs11 would send and this token cannot bear."""
    return {Attribute[name]: DEFAULT for name in token.quirks.left_out_attributes}


def _undo(token: Token, error: BaseException, undo: Callable[[], None]) -> None:
    stuck = discard(token, undo)
    if stuck is not None:
        error.add_note(f"and the key could not be destroyed again ({stuck})")


def _reason(method: WrapMethod, error: Exception) -> str:
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return "; ".join([f"{method}: {text}", *getattr(error, "__notes__", ())])
