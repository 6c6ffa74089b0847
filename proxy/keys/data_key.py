"""One key of a network service, from its installation to its end (docs/format.md, "Keys").

1. Its deadline is a point on the boot clock. Whoever holds a key asks `DataKey.check` before every piece.
2. A refresh prolongs the very object that running bodies hold; withdrawal, suspension, expiry end it.
3. What is derived from the material is derived once, when it is first asked for, and lent, not given: when
   the key ends, it is overwritten with the material.
4. Contexts are the callers' to invent: the ciphers derived for them are bounded.
5. Nothing here prints a secret. Overwriting is best effort: Python may have copied, `bytes` cannot be wiped,
   and the cipher objects of `cryptography` are let go of, not overwritten.
"""

import hmac
import math
from collections.abc import Callable
from typing import Final, NoReturn, override

from cachetools import LRUCache
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_der_private_key

from envelope import derive
from envelope.errors import KeyUnavailableError, MisuseError, Unavailable
from envelope.keys import ANONYMOUS, KeyId, KeyMaterial, KeyState, KeyUse, NetworkService
from envelope.memory import wipe
from envelope.xaes import Xaes256Gcm

MAX_CONTEXT_CIPHERS: Final = 64
"""Per key: contexts are the callers' to invent. One more costs a derivation."""

_CAUSES: Final = {
    Unavailable.UNKNOWN: "is not known here",
    Unavailable.EXPIRED: "has expired and was not renewed",
    Unavailable.WITHDRAWN: "was withdrawn by the enterprise",
    Unavailable.NOT_ACTIVE: "is not active",
    Unavailable.SUSPENDED: "is suspended",
    Unavailable.COMPROMISED: "is compromised",
    Unavailable.DESTROYED: "was destroyed",
}

type SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


class DataKey:
    """One key of one network service while it may be used; bodies in flight hold it.

    The object stays the same over refreshes, so that a refresh prolongs what is running. Once it has ended it
    never comes back: a later push of the same key id makes a new object.
    """

    __slots__ = (
        "_anonymous_key",
        "_boot_s",
        "_ciphers",
        "_context_ciphers",
        "_deadline_boot_s",
        "_object_key",
        "_reason",
        "_secret",
        "_signing_key",
        "_state",
        "_use",
        "algorithm",
        "key_id",
        "owner",
        "version",
    )

    def __init__(self, material: KeyMaterial, *, deadline_boot_s: float, boot_s: Callable[[], float]) -> None:
        self.owner: Final = material.owner
        self.key_id: Final = material.key_id
        self.version: Final = material.version
        self.algorithm: Final = material.algorithm
        self._use: Final = material.use
        self._secret: Final = material.secret  # taken over: the cache wipes it
        self._state = material.state
        self._object_key: bytearray | None = None
        self._anonymous_key: bytearray | None = None
        self._ciphers: dict[str, Xaes256Gcm] = {}
        self._context_ciphers: LRUCache[tuple[str, bytes], Xaes256Gcm] | None = None
        self._signing_key: SigningKey | None = None
        self._deadline_boot_s = deadline_boot_s
        self._reason = Unavailable.EXPIRED
        self._boot_s: Final = boot_s

    @override
    def __repr__(self) -> str:
        return f"<DataKey {self.owner} {self.key_id} {self._state}>"

    @property
    def state(self) -> KeyState:
        return self._state

    @property
    def use(self) -> KeyUse:
        return self._use

    @property
    def deadline_boot_s(self) -> float:
        """On the boot clock; minus infinity when the key has ended."""
        return self._deadline_boot_s

    @property
    def valid_for_s(self) -> float:
        """Seconds until the deadline, 0 when it has passed."""
        return max(0.0, self._deadline_boot_s - self._boot_s())

    @property
    def object_key(self) -> memoryview:
        """K_obj, 32 bytes (docs/format.md 6.1), to be used at once. KeyUnavailableError when it has ended.

        No copy, for a copy would stay in memory when the key ends: what is returned is zeros from then on.
        """
        self.check()
        if self._object_key is None:
            derived = derive.object_key(self._secret, self.owner, self.key_id)
            self._object_key = bytearray(derived)
            wipe(derived)
        return memoryview(self._object_key).toreadonly()

    @property
    def anonymous_object_key(self) -> memoryview:
        """As `object_key`, for objects that name no key: of the zero key id (docs/format.md 6.4)."""
        self.check()
        if self._anonymous_key is None:
            derived = derive.object_key(self._secret, self.owner, ANONYMOUS)
            self._anonymous_key = bytearray(derived)
            wipe(derived)
        return memoryview(self._anonymous_key).toreadonly()

    def service_cipher(self, dialect: str, context: bytes = b"") -> Xaes256Gcm:
        """The cipher of a dialect of the encryption service, and in it of *context* (docs/format.md 6.1).

        KeyUnavailableError when the key has ended, MisuseError for a signing key. Not to be kept.
        """
        self.check()
        if not context:
            cipher = self._ciphers.get(dialect)
            if cipher is None:
                cipher = self._ciphers[dialect] = self._derived_cipher(dialect, context)
            return cipher
        if self._context_ciphers is None:
            self._context_ciphers = LRUCache(maxsize=MAX_CONTEXT_CIPHERS)
        cipher = self._context_ciphers.get((dialect, context))
        if cipher is None:
            cipher = self._context_ciphers[dialect, context] = self._derived_cipher(dialect, context)
        return cipher

    def _derived_cipher(self, dialect: str, context: bytes) -> Xaes256Gcm:
        if self._use is not KeyUse.DATA:
            raise MisuseError(f"key {self.key_id} is for signing")
        key = derive.service_key(self._secret, self.owner, self.key_id, dialect, context)
        try:
            return Xaes256Gcm(key)
        finally:
            wipe(key)

    @property
    def signing_key(self) -> SigningKey:
        """The private key. KeyUnavailableError when it has ended, MisuseError if it does not sign."""
        self.check()
        if self._signing_key is None:
            if self._use is not KeyUse.SIGN:
                raise MisuseError(f"key {self.key_id} is for data")
            # Not validated again: the check value that came with it was computed from it.
            key = load_der_private_key(self._secret, password=None, unsafe_skip_rsa_key_validation=True)
            if not isinstance(
                key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
            ):
                raise MisuseError(f"key {self.key_id} is a {type(key).__name__}")
            self._signing_key = key
        return self._signing_key

    def check(self) -> None:
        """Return if the key may still be used, else KeyUnavailableError. Cheap: asked at every piece."""
        if self._boot_s() >= self._deadline_boot_s:
            self._refuse()

    def _refuse(self) -> NoReturn:
        self.end(Unavailable.EXPIRED)  # keeps the reason it already has
        raise unavailable(self._reason, self.owner, self.key_id)

    def prolong(self, state: KeyState, deadline_boot_s: float) -> None:
        """A push repeated this key: new state, new deadline. Only the cache calls this."""
        if self._deadline_boot_s == -math.inf:
            raise MisuseError(f"key {self.key_id} has ended and cannot be prolonged")
        self._state = state
        self._deadline_boot_s = deadline_boot_s

    def shorten(self, lost_s: float) -> None:
        """So much of its time has passed unseen. Only the cache calls this."""
        self._deadline_boot_s -= lost_s

    def holds(self, secret: bytearray) -> bool:
        """Whether *secret* is this key's material, compared in constant time."""
        return hmac.compare_digest(self._secret, secret)

    def end(self, reason: Unavailable) -> None:
        """No use from now on; overwrite what was secret. The first reason stays."""
        if self._deadline_boot_s == -math.inf:
            return
        self._deadline_boot_s = -math.inf
        self._reason = reason
        self._secret[:] = bytes(len(self._secret))
        for derived in (self._object_key, self._anonymous_key):
            if derived is not None:
                derived[:] = bytes(len(derived))
        self._ciphers.clear()
        self._context_ciphers = None
        self._signing_key = None


def unavailable(reason: Unavailable, owner: NetworkService, key_id: KeyId | None) -> KeyUnavailableError:
    """The error for *reason*; without *key_id* it is about the key to seal with."""
    name = "the sealing key" if key_id is None else f"key {key_id}"
    return KeyUnavailableError(reason, f"{owner}: {name} {_CAUSES[reason]}")
