"""KEKs at a key server: create, adopt, enable, destroy; the same promises as with an HSM (hsm/keks.py).

1. A KEK is proven before anything is wrapped by it: what has to be refused is refused. One that fails is
   destroyed on the way out.
2. An adopted KEK is its owner's: it is proven, never changed, never destroyed on the way out.
3. Destroyed is what is not found on a new connection, beside a canary key that is visible.
"""

import os
from dataclasses import replace
from hashlib import sha256
from typing import Final

from envelope.keys import KEY_MATERIAL_SIZE
from key_agent.errors import KeySourceError, UnsupportedError
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
from key_agent.sources.source import Kek, KekReference, KekType

PROBE_NAME: Final = "sealgate-probe"


def create_kek(
    server: KeyServer,
    reference: KekReference,
    kek_type: KekType | None,
    valid_until_s: int | None,
    *,
    replace_unfinished: bool,
    now_ms: int,
) -> Kek:
    """See `KeySource.create_kek`."""
    if kek_type not in (None, KekType.AES_256):
        raise UnsupportedError(f"a key server makes KEKs of type {KekType.AES_256}, not {kek_type}")
    name = name_of(reference)
    if server.find(name).standing is not Standing.ABSENT:
        if not replace_unfinished:
            raise KeySourceError(f"a key named {name!r} exists at the server")
        server.destroy(name)
    if server.find(CANARY_NAME).standing is Standing.ABSENT:
        server.create(CANARY_NAME)
    server.create(name)
    try:
        return _proven(server, reference, now_ms=now_ms, valid_until_s=valid_until_s)
    except BaseException as error:
        try:
            server.destroy(name)
        except (ServerUnavailableError, KeyGoneError, Unsupported) as stuck:
            error.add_note(f"and the key could not be destroyed again ({stuck})")
        raise


def adopt_kek(
    server: KeyServer,
    reference: KekReference,
    kek_type: KekType | None,
    valid_from_s: int | None,
    valid_until_s: int | None,
    *,
    now_ms: int,
) -> Kek:
    """See `KeySource.adopt_kek`. The canary key has to be there too: its owner makes it once."""
    if kek_type not in (None, KekType.AES_256):
        raise UnsupportedError(f"a key server's KEK is of type {KekType.AES_256}, not {kek_type}")
    if server.find(CANARY_NAME).standing is Standing.ABSENT:
        try:
            server.create(CANARY_NAME)
        except Unsupported as error:
            raise UnsupportedError(f"the key {CANARY_NAME!r} is missing at the server, and {error}") from None
    kek = _proven(server, reference, now_ms=now_ms, valid_until_s=valid_until_s)
    return replace(kek, valid_from_s=valid_from_s, is_adopted=True)


def destroy_kek(server: KeyServer, kek: Kek) -> None:
    """See `KeySource.destroy_kek`."""
    _check_identity(server, kek)
    name = name_of(kek.reference)
    server.destroy(name)
    server.close()
    if server.find(name).standing is not Standing.ABSENT:
        raise KeySourceError(f"the server still shows a key named {name!r}")
    if server.find(CANARY_NAME).standing is not Standing.USABLE:
        raise KeySourceError("no KEK found, but the canary key is not visible either: nothing is proven")


def set_kek_enabled(server: KeyServer, kek: Kek, *, enabled: bool) -> None:
    """See `KeySource.set_kek_enabled`."""
    _check_identity(server, kek)
    name = name_of(kek.reference)
    if server.find(name).standing is Standing.ABSENT:
        raise KeySourceError(f"the server has no key named {name!r}")
    server.set_enabled(name, enabled=enabled)
    server.close()
    found = server.find(name)
    if found.standing is not (Standing.USABLE if enabled else Standing.DISABLED):
        raise UnsupportedError(f"the key is {found.standing} afterwards ({found.detail})")


def try_method(server: KeyServer) -> str:
    """ "ok", or why the server's method is refused, tried with a throw-away key."""
    name = f"{PROBE_NAME}-{os.urandom(8).hex()}"
    try:
        server.create(name)
        try:
            _prove(server, name)
        finally:
            server.destroy(name)
    except (ServerUnavailableError, KeyGoneError, Unsupported, UnsupportedError) as error:
        return f"not tried to the end: {error}"
    return "ok"


def _proven(server: KeyServer, reference: KekReference, *, now_ms: int, valid_until_s: int | None) -> Kek:
    name = name_of(reference)
    found = server.find(name)
    if found.standing is not Standing.USABLE:
        raise UnsupportedError(f"the key {name!r} is {found.standing}: {found.detail}")
    _prove(server, name)
    canary = server.random(KEY_MATERIAL_SIZE)
    binding = canary_binding(reference)
    [ciphertext] = server.seal(name, [Item(canary, binding)])
    if server.open(name, [Item(ciphertext, binding)]) != [canary]:
        raise UnsupportedError("the canary does not come back")
    return Kek(
        reference=reference,
        method=server.method,
        token_serial=server.identity(),
        canary_ciphertext=ciphertext,
        canary_sha256=sha256(canary).digest(),
        created_at_ms=now_ms,
        valid_until_s=valid_until_s,
    )


def _prove(server: KeyServer, name: str) -> None:
    """Negotiated by doing: UnsupportedError unless all that must be refused is refused."""
    material = server.random(KEY_MATERIAL_SIZE)
    binding, other = b"sealgate proof", b"sealgate prooF"
    sealed, again = server.seal(name, [Item(material, binding)] * 2)
    if sealed == again:
        raise UnsupportedError("two seals are equal: the IV repeats")
    if material in sealed:
        raise UnsupportedError("the sealed bytes hold the plaintext")
    if server.open(name, [Item(sealed, binding)]) != [material]:
        raise UnsupportedError("opened bytes differ from the sealed ones")
    tampered = {
        "a wrong binding": Item(sealed, other),
        "a changed last byte": Item(_changed(sealed, len(sealed) - 4), binding),
        "a changed middle byte": Item(_changed(sealed, len(sealed) // 2), binding),
        "a cut": Item(sealed[:-8], binding),
        "nothing": Item(b"", binding),
    }
    for what, item in tampered.items():
        server.close()  # a connection without a past
        [opened] = server.open(name, [item])
        if not isinstance(opened, Unopened):
            raise UnsupportedError(f"the server accepts {what}")
    if server.open(name, [Item(sealed, binding)]) != [material]:
        raise UnsupportedError("the KEK stopped working during its proof")


def _changed(data: bytes, index: int) -> bytes:
    """Another byte there, of the same alphabet: base64 must not hide the change in its unused bits."""
    was = data[index : index + 1]
    return data[:index] + (b"B" if was == b"A" else b"A") + data[index + 1 :]


def _check_identity(server: KeyServer, kek: Kek) -> None:
    if (identity := server.identity()) != kek.token_serial:
        raise KeySourceError(f"another server: {identity}, not {kek.token_serial}")
