"""Keys change their KEK in a real token: between wrap methods, between tokens, in batches.

(What every source promises of it: test_contract.py.)
"""

from dataclasses import replace
from typing import Any

import pytest

from envelope.derive import ekm_binding, key_check_value
from envelope.keys import KeyId
from key_agent.errors import KeySourceError
from key_agent.sources import wire
from key_agent.sources.source import Kek, WrapMethod, WrappedKey
from key_agent.sources.worker_source import _check_rewrapped
from tests.key_agent.sources.conftest import (
    ANOTHER_REFERENCE,
    REFERENCE,
    FakeModule,
    MakeSource,
    new_keys,
    owners,
    request_for,
)
from tests.pki import Tenant
from tests.softhsm import SoftHsm

NEW = Kek(
    reference=ANOTHER_REFERENCE,
    method=WrapMethod.GCM,
    token_serial="0002",
    canary_ciphertext=bytes(60),
    canary_sha256=bytes(32),
    created_at_ms=1,
)


@pytest.mark.parametrize(("before", "after"), [("gcm", "kw"), ("kw", "gcm")])
async def test_from_one_method_to_the_other(
    make_source: MakeSource, acme: Tenant, before: str, after: str
) -> None:
    old = await make_source(method=before).create_kek(REFERENCE)
    source = make_source(method=after)
    new = await source.create_kek(ANOTHER_REFERENCE)
    keys = await source.generate(old, new_keys(2))
    moved = await source.rewrap(old, new, keys)
    assert {key.method for key in moved.keys} == {WrapMethod(after)}
    requests = [request_for(key, acme.service(key.owner.service)) for key in moved.keys]
    assert all(result.tokens for result in await source.seal_envelopes(new, requests))


async def test_the_new_wrapping_holds_the_same_key_by_the_formats_words_alone(
    make_source: MakeSource, hsm: SoftHsm
) -> None:
    source = make_source(method="gcm")
    old, new = [await source.create_kek(reference) for reference in (REFERENCE, ANOTHER_REFERENCE)]
    [key] = await source.generate(old, new_keys(1))
    [moved] = (await source.rewrap(old, new, [key])).keys
    found = [
        hsm.run(
            "unwrap-gcm",
            kek.reference,
            arguments={
                "wrapped": wrapped.wrapped.hex(),
                "binding": ekm_binding(
                    key.owner, key.key_id, kek_id=kek.reference.kek_id, environment_id="env-1"
                ).hex(),
            },
        )
        for kek, wrapped in ((old, key), (new, moved))
    ]
    assert found[0] == found[1]
    assert key_check_value(bytes.fromhex(found[1]), key.owner, key.key_id) == moved.kcv


async def test_from_one_token_to_another(make_source: MakeSource, hsm: SoftHsm, acme: Tenant) -> None:
    """An HSM that came back beside its successor: same label, two serials."""
    old = await make_source().create_kek(REFERENCE)
    hsm.add_token()
    serials = hsm.run("serials")
    [serial] = set(serials) - {old.token_serial}
    source = make_source(token_serial=serial)
    new = await source.create_kek(ANOTHER_REFERENCE)
    assert new.token_serial == serial
    keys = await source.generate(old, new_keys(3))
    moved = await source.rewrap(old, new, keys)
    assert [key.token_serial for key in moved.keys] == [serial] * 3
    request = request_for(moved.keys[0], acme.service("service-0"))
    [result] = await source.seal_envelopes(new, [request])
    assert result.tokens


async def test_many_in_batches_of_a_short_budget(make_source: MakeSource) -> None:
    source = make_source(batch_s=0.002)
    old, new = [await source.create_kek(reference) for reference in (REFERENCE, ANOTHER_REFERENCE)]
    keys = await source.generate(old, new_keys(1) * 120)
    spoiled = replace(keys[60], wrapped=keys[0].wrapped)
    moved = await source.rewrap(old, new, [*keys[:60], spoiled, *keys[61:]])
    assert [key.key_id for key in moved.keys] == [key.key_id for key in keys if key is not keys[60]]
    assert set(moved.failed_keys) == {keys[60].key_id}


async def test_what_does_not_come_back_from_its_new_wrapping_is_no_new_wrapping(
    make_source: MakeSource, fake: FakeModule
) -> None:
    source = make_source(fake.settings())
    old, new = [await source.create_kek(reference) for reference in (REFERENCE, ANOTHER_REFERENCE)]
    keys = await source.generate(old, new_keys(2))
    fake.fail(C_Encrypt="garble")
    with pytest.raises(KeySourceError):
        await source.rewrap(old, new, keys)
    fake.recover()
    assert len((await source.rewrap(old, new, keys)).keys) == 2


def _key(**changes: Any) -> WrappedKey:
    fields: dict[str, Any] = {
        "owner": owners(1)[0],
        "key_id": KeyId(bytes(16)),
        "kek_id": "kek-1",
        "environment_id": "env-1",
        "method": WrapMethod.KW,
        "wrapped": bytes(72),
        "kcv": bytes(16),
        "token_serial": "0001",
        "created_at_ms": 1,
    }
    return WrappedKey(**(fields | changes))


def _moved(**changes: Any) -> WrappedKey:
    return _key(**({"kek_id": "kek-2", "method": WrapMethod.GCM, "token_serial": "0002"} | changes))


def test_what_the_worker_answers_is_not_believed() -> None:
    """It holds the vendor's library."""
    asked = [_key(), _key(key_id=KeyId(bytes(15) + b"\1"))]
    _check_rewrapped(wire.RewrapDone(keys=(_moved(),), failed_keys=()), asked, NEW)
    _check_rewrapped(wire.RewrapDone(keys=(), failed_keys=((asked[0].key_id, "bad"),)), asked, NEW)
    lies = [
        wire.RewrapDone(keys=(), failed_keys=()),
        wire.RewrapDone(keys=(_moved(key_id=asked[1].key_id),), failed_keys=()),
        wire.RewrapDone(keys=(_moved(), _moved()), failed_keys=()),
        wire.RewrapDone(keys=(_moved(),), failed_keys=((asked[0].key_id, "both"),)),
        wire.RewrapDone(keys=tuple(_moved() for _ in range(3)), failed_keys=()),
        wire.RewrapDone(keys=(_moved(owner=owners(2)[1]),), failed_keys=()),
        wire.RewrapDone(keys=(_moved(kcv=b"1" * 16),), failed_keys=()),
        wire.RewrapDone(keys=(_moved(kek_id="kek-1"),), failed_keys=()),
        wire.RewrapDone(keys=(_moved(environment_id="env-2"),), failed_keys=()),
        wire.RewrapDone(keys=(_moved(method=WrapMethod.KW),), failed_keys=()),
        wire.RewrapDone(keys=(_moved(token_serial="0001"),), failed_keys=()),
    ]
    for lie in lies:
        with pytest.raises(KeySourceError):
            _check_rewrapped(lie, asked, NEW)
