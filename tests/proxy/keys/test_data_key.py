"""One key by itself: what it derives, when it ends, what is left of it then. In the cache: test_cache.py."""

import os

import pytest

from envelope import derive
from envelope.errors import KeyUnavailableError, MisuseError, Unavailable
from envelope.keys import ANONYMOUS, KeyId, KeyMaterial, KeyState, KeyUse, NetworkService, SigningAlgorithm
from envelope.xaes import Xaes256Gcm
from proxy.keys import data_key as data_key_module
from proxy.keys.data_key import MAX_CONTEXT_CIPHERS, DataKey
from tests.fakes.clock import ManualClock
from tests.proxy.encryption_service.service_rig import signing_material

OWNER = NetworkService("acme", "orders")
KEY_ID = KeyId(bytes(range(16)))
VALIDITY_S = 330.0


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def secret() -> bytes:
    return os.urandom(32)


@pytest.fixture
def key(clock: ManualClock, secret: bytes) -> DataKey:
    return make(clock, secret)


def make(clock: ManualClock, secret: bytes, use: KeyUse = KeyUse.DATA) -> DataKey:
    material = KeyMaterial(
        owner=OWNER,
        key_id=KEY_ID,
        state=KeyState.ACTIVE,
        use=use,
        algorithm="ES256" if use is KeyUse.SIGN else None,
        version=1,
        secret=bytearray(secret),
    )
    return DataKey(material, deadline_boot_s=clock.boot_s() + VALIDITY_S, boot_s=clock.boot_s)


def test_object_keys_are_the_derivations_of_the_format(key: DataKey, secret: bytes) -> None:
    assert key.object_key == derive.object_key(bytearray(secret), OWNER, KEY_ID)
    assert key.anonymous_object_key == derive.object_key(bytearray(secret), OWNER, ANONYMOUS)


def test_what_is_lent_is_zeros_when_the_key_ends(key: DataKey) -> None:
    lent = [key.object_key, key.anonymous_object_key]
    assert all(any(one) and one.readonly for one in lent)
    key.end(Unavailable.WITHDRAWN)
    assert not any(any(one) for one in lent)
    with pytest.raises(KeyUnavailableError):
        _ = key.object_key
    with pytest.raises(KeyUnavailableError):
        _ = key.anonymous_object_key


def test_a_key_ends_once_and_says_why(key: DataKey, clock: ManualClock) -> None:
    clock.shift(VALIDITY_S - 1)
    key.prolong(KeyState.DEACTIVATED, clock.boot_s() + 10)
    key.shorten(9)
    assert key.state is KeyState.DEACTIVATED
    assert key.valid_for_s == pytest.approx(1)
    key.end(Unavailable.SUSPENDED)
    key.end(Unavailable.WITHDRAWN)
    clock.shift(VALIDITY_S)
    with pytest.raises(KeyUnavailableError) as caught:
        key.check()
    assert caught.value.reason is Unavailable.SUSPENDED, "the first reason stays"
    with pytest.raises(MisuseError):
        key.prolong(KeyState.ACTIVE, clock.boot_s() + 10)


def test_a_data_key_does_not_sign(key: DataKey) -> None:
    with pytest.raises(MisuseError):
        _ = key.signing_key


def test_a_signing_key_is_loaded_once_and_derives_nothing(clock: ManualClock) -> None:
    key = make(clock, signing_material(SigningAlgorithm.ES256), KeyUse.SIGN)
    assert key.signing_key is key.signing_key
    with pytest.raises(MisuseError):
        key.service_cipher("native")
    key.end(Unavailable.WITHDRAWN)
    with pytest.raises(KeyUnavailableError):
        _ = key.signing_key


# Ciphers of the encryption service.


def test_a_service_cipher_is_derived_once_and_ends_with_its_key(
    key: DataKey, secret: bytes, clock: ManualClock
) -> None:
    cipher, in_context = key.service_cipher("xks"), key.service_cipher("xks", b"c")
    assert key.service_cipher("xks") is cipher
    assert key.service_cipher("xks", b"c") is in_context
    nonce, sealed = cipher.seal(b"plain", b"")
    dek = derive.service_key(secret, OWNER, KEY_ID, "xks")
    assert Xaes256Gcm(dek).decrypt(nonce, sealed, b"") == b"plain"
    key.prolong(KeyState.ACTIVE, clock.boot_s() + VALIDITY_S)
    assert key.service_cipher("xks") is cipher, "a refresh is not a rotation"
    key.end(Unavailable.WITHDRAWN)
    for context in (b"", b"c"):
        with pytest.raises(KeyUnavailableError):
            key.service_cipher("xks", context)
    assert not key._ciphers
    assert key._context_ciphers is None


def test_contexts_do_not_fill_the_memory(key: DataKey) -> None:
    for number in range(2 * MAX_CONTEXT_CIPHERS):
        key.service_cipher("transit", b"%d" % number)
    assert key._context_ciphers is not None
    assert len(key._context_ciphers) == MAX_CONTEXT_CIPHERS


def test_no_secret_is_printed(key: DataKey, secret: bytes) -> None:
    for hidden in (secret, bytes(key.object_key)):
        for text in (repr(key), str(key)):
            assert hidden.hex() not in text
            assert repr(hidden)[2:-1] not in text


def test_reasons_cover_the_enum() -> None:
    assert set(data_key_module._CAUSES) == set(Unavailable)
