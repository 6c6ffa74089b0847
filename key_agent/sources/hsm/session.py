"""The token: finding it, logging in, finding keys by name. All through python-pkcs11, by one thread.

1. The token is found by label and, once pinned, by serial; one broken slot hides nobody else.
2. One session at a time. `renew` throws it away: after an error a session may hold a dead operation for
   ever (NSS does that). If it does not even close, C_Finalize takes it down.
3. One login attempt per PIN: after a refusal this process never logs in again.
4. Keys are found by class, label and id, exactly one, and never kept across requests. A KEK's HMAC key has
   its label and its id, both with `-mac`. Error *classes* say
   little, they differ by vendor and version: states are told apart by `diagnosis`, not here.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from pkcs11 import Attribute, ObjectClass, PKCS11Error, TokenFlag
from pkcs11.exceptions import (
    AttributeSensitive,
    AttributeTypeInvalid,
    PinExpired,
    PinIncorrect,
    PinInvalid,
    PinLenRange,
    PinLocked,
    UserPinNotInitialized,
)

from key_agent.errors import KeySourceError, LoginRefusedError
from key_agent.sources.hsm.module import load_module
from key_agent.sources.vendors import Quirks
from key_agent.sources.verdict import Verdict

CANARY_KEY_LABEL: Final = "sealgate-canary"
CANARY_KEY_ID: Final = b"sealgate-canary"
_WRONG_PIN: Final = (PinIncorrect, PinInvalid, PinLenRange, PinExpired)


@dataclass
class Token:
    """One token of one module, with at most one session.

    Everything raises KeySourceError (with a verdict) for what it understands, PKCS11Error for the rest.
    """

    module_path: str
    label: str
    serial: str | None
    pin: str = field(repr=False)
    module_arguments: str = ""
    quirks: Quirks = field(default_factory=Quirks)
    _library: Any = field(default=None, init=False)
    _session: Any = field(default=None, init=False)
    _held_serial: str = field(default="", init=False)
    _refusal: LoginRefusedError | None = field(default=None, init=False)

    def load(self) -> None:
        """Load the module and call C_Initialize. Once per process."""
        self._library = load_module(
            self.module_path, self.module_arguments, os_locking=self.quirks.os_locking
        )

    def session(self, *, serial: str | None = None) -> Any:
        """The open session, or a new one on the token whose serial is *serial* (or the settings')."""
        wanted = serial or self.serial
        if self._session is not None and wanted not in (None, self._held_serial):
            self.close()
        if self._session is None:
            token = self._find(wanted)
            self._session = self._log_in(token)
            self._held_serial = _serial_of(token)
        return self._session

    def renew(self, *, serial: str | None = None) -> Any:
        """A session without a past."""
        self.close()
        return self.session(serial=serial)

    def close(self) -> None:
        """Log out and close. Never raises: what cannot be closed is finalized."""
        session, self._session = self._session, None
        if session is None:
            return
        try:
            session.close()
        except PKCS11Error:
            # `close` gives up before C_CloseSession when C_Logout fails: the session would leak.
            self._reinitialize()

    def look_afresh(self) -> None:
        """Before a look at a KEK: a module that keeps its list of keys is made to read it again."""
        if self.quirks.reinitialize_before_look:
            self.close()
            self._reinitialize()

    @property
    def held_serial(self) -> str:
        """Serial of the token that the current session is on."""
        return self._held_serial

    @property
    def library(self) -> Any:
        return self._library

    def token(self) -> Any:
        """The token's information, without a login."""
        return self._find(self.serial)

    def _reinitialize(self) -> None:
        # CKR_CRYPTOKI_NOT_INITIALIZED or a dead device: the next C_Initialize says so if it matters.
        with contextlib.suppress(PKCS11Error):
            self._library.finalize()
        self._library.initialize()

    def _find(self, serial: str | None) -> Any:
        named, broken = [], 0
        for slot in self._library.get_slots(token_present=True):
            try:
                token = slot.get_token()
            except PKCS11Error:
                broken += 1
                continue
            if token.label == self.label:
                named.append(token)
        if not named:
            raise KeySourceError(f"no token is labelled {self.label!r} ({broken} slots unreadable)")
        if serial is None:
            if len(named) > 1:
                raise KeySourceError(f"{len(named)} tokens are labelled {self.label!r}: set token_serial")
            return named[0]
        matching = [token for token in named if _serial_of(token) == serial]
        if len(matching) == 1:
            return matching[0]
        if matching:
            raise KeySourceError(f"{len(matching)} tokens have the label {self.label!r} and one serial")
        if broken:
            # The right token may be the one that cannot be read: no proof.
            raise KeySourceError(
                f"token {self.label!r} with serial {serial} not found, {broken} slots unreadable"
            )
        others = ", ".join(_serial_of(token) for token in named)
        raise KeySourceError(
            f"the token labelled {self.label!r} has serial {others}, not {serial}",
            verdict=Verdict.TOKEN_CHANGED,
        )

    def _log_in(self, token: Any) -> Any:
        if self._refusal is not None:
            raise self._refusal
        if token.flags & TokenFlag.USER_PIN_LOCKED:
            self._refusal = LoginRefusedError("the token's user PIN is locked", verdict=Verdict.AUTH_LOCKED)
            raise self._refusal
        try:
            # Read-write wherever it is possible: some vendors have no read-only sessions.
            return token.open(rw=self.quirks.read_write, user_pin=self.pin)
        except PinLocked:
            self._refusal = LoginRefusedError("the token's user PIN is locked", verdict=Verdict.AUTH_LOCKED)
        except _WRONG_PIN as error:
            self._refusal = LoginRefusedError(
                f"the token refused the PIN ({type(error).__name__})", verdict=Verdict.AUTH_PIN
            )
        except UserPinNotInitialized:
            # Only C_InitToken leaves a token so, and it destroys every object: ours are gone.
            raise KeySourceError(
                "the token has no user PIN: it was initialised anew", verdict=Verdict.TOKEN_CHANGED
            ) from None
        except PKCS11Error:
            # python-pkcs11 does not close the session of an `open` whose login failed.
            self._reinitialize()
            raise
        raise self._refusal from None


def _serial_of(token: Any) -> str:
    serial: bytes = token.serial
    return serial.decode(errors="backslashreplace")


def find_keys(
    session: Any, label: str, object_id: bytes, *, object_class: ObjectClass = ObjectClass.SECRET_KEY
) -> list[Any]:
    """Every key of that class, label and id that this login can see."""
    template = {Attribute.CLASS: object_class, Attribute.LABEL: label, Attribute.ID: object_id}
    return list(session.get_objects(template))


def find_mac_keys(session: Any, label: str, object_id: bytes) -> list[Any]:
    """Every HMAC key that belongs to the KEK of that label and id."""
    return find_keys(session, *mac_name(label, object_id))


def mac_name(label: str, object_id: bytes) -> tuple[str, bytes]:
    """Label and id of the HMAC key of a KEK. Not the KEK's id: NSS replaces a secret key of the same id."""
    return f"{label}-mac", object_id + b"-mac"


def find_everything(session: Any, label: str, object_id: bytes) -> list[Any]:
    """Whatever bears the KEK's name: secret, private and public key, and the HMAC key."""
    classes = (ObjectClass.SECRET_KEY, ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY)
    found = [key for each in classes for key in find_keys(session, label, object_id, object_class=each)]
    return found + find_mac_keys(session, label, object_id)


def sees_canary_key(session: Any) -> bool:
    """True proves that private objects of this token are visible: what is not found beside it is gone.

    By label only: on some HSMs nobody chooses ids.
    """
    template = {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.LABEL: CANARY_KEY_LABEL}
    return bool(list(session.get_objects(template)))


def attribute(key: Any, name: Attribute) -> Any:
    """The attribute, or None where the token has none, hides it, or leaves it unset."""
    try:
        return key[name]
    except (AttributeTypeInvalid, AttributeSensitive, ValueError):
        return None


def destroy_all(token: Token, label: str, object_id: bytes, *, serial: str | None) -> None:
    """Destroy everything of that name and search again on a new session. KeySourceError if one is left."""
    for key in find_everything(token.renew(serial=serial), label, object_id):
        key.destroy()
    left = len(find_everything(token.renew(serial=serial), label, object_id))
    if left:
        raise KeySourceError(f"the token reported success and still has {left} keys named {label!r}")


def discard(token: Token, destroy: Callable[[], None]) -> str | None:
    """Run *destroy* on the way out of a failure; the reason if that failed too."""
    try:
        destroy()
    except (PKCS11Error, KeySourceError) as error:
        token.close()
        return f"{type(error).__name__}: {error}"
    return None
