"""A second module, NSS softokn: one alone teaches its habits as the standard.

Its GCM encryption fails, so `kw` is negotiated; a failed operation stays alive in its session; its serial is
the same for everybody; its configuration comes as an argument of C_Initialize.
"""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from key_agent.errors import KekRevokedError, LoginRefusedError
from key_agent.sources.pkcs11 import Pkcs11Source
from key_agent.sources.source import Verdict, WrapMethod
from tests.key_agent.sources.conftest import REFERENCE, new_keys, request_for
from tests.nss import PIN, WRAP_AND_UNWRAP, Nss
from tests.pki import Tenant, write_credential


@pytest.fixture
async def source(nss: Nss, acme: Tenant) -> AsyncIterator[Pkcs11Source]:
    certificate_file, key_file = write_credential(acme.agent_signing("hq"), nss.directory, "signing")
    source = Pkcs11Source(nss.settings(), key_file, certificate_file, "hq")
    yield source
    await source.close()


async def test_what_it_can_is_found_out_by_doing(source: Pkcs11Source) -> None:
    facts = await source.describe()
    methods = facts["methods"]
    assert isinstance(methods, dict)
    assert methods["kw"] == "ok"
    assert methods["gcm"].startswith("gcm: ")
    assert (await source.create_kek(REFERENCE)).method is WrapMethod.KW


async def test_keys_travel_and_bad_ones_are_left_out(source: Pkcs11Source, acme: Tenant) -> None:
    kek = await source.create_kek(REFERENCE)
    good, flipped, moved = await source.generate(kek, new_keys(1) * 3)
    flipped = replace(flipped, wrapped=bytes([flipped.wrapped[0] ^ 1]) + flipped.wrapped[1:])
    moved = replace(moved, wrapped=good.wrapped)
    # The bad ones first: a session that NSS left with a dead operation must not spoil the good one.
    request = request_for([flipped, moved, good], acme.service("service-0"))
    again = request_for(good, acme.service("service-0"))
    first, second = await source.seal_envelopes(kek, [request, again])
    assert set(first.failed_keys) == {flipped.key_id, moved.key_id}
    assert set(first.tokens) == {"proxy-0"}
    assert not second.failed_keys


@pytest.mark.parametrize(
    ("hand", "verdict"),
    [
        ([("destroy", {})], Verdict.KEK_DESTROYED),
        ([("set", {"name": "UNWRAP", "value": False})], Verdict.KEK_DISABLED),
        ([("destroy", {}), ("make", {"capabilities": WRAP_AND_UNWRAP})], Verdict.KEK_REPLACED),
    ],
    ids=["destroyed", "disabled", "replaced"],
)
async def test_revocations(
    source: Pkcs11Source, nss: Nss, hand: list[tuple[str, dict[str, Any]]], verdict: Verdict
) -> None:
    kek = await source.create_kek(REFERENCE)
    [key] = await source.generate(kek, new_keys(1))
    assert (await source.diagnose(kek)).verdict is Verdict.OK
    for action, arguments in hand:
        nss.run(action, REFERENCE, **arguments)
    assert (await source.diagnose(kek)).verdict is verdict
    with pytest.raises(KekRevokedError):
        await source.seal_envelopes(kek, [request_for(key)])


async def test_an_emptied_database_is_a_changed_token(source: Pkcs11Source, nss: Nss) -> None:
    """Its serial says nothing: only the canary key tells a kill switch from an outage."""
    kek = await source.create_kek(REFERENCE)
    nss.run("destroy", REFERENCE)
    nss.run("destroy", replace(REFERENCE, label="sealgate-canary", object_id=b"sealgate-canary"))
    assert (await source.diagnose(kek)).verdict is Verdict.TOKEN_CHANGED


async def test_a_wrong_password_is_a_refused_pin(source: Pkcs11Source, nss: Nss) -> None:
    (nss.directory / "pin").write_text("another one")
    with pytest.raises(LoginRefusedError):
        await source.create_kek(REFERENCE)
    (nss.directory / "pin").write_text(PIN)
    assert (await source.create_kek(REFERENCE)).method is WrapMethod.KW


async def test_disabling_and_destroying_by_our_own_hand(source: Pkcs11Source, nss: Nss) -> None:
    kek = await source.create_kek(REFERENCE)
    await source.set_kek_enabled(kek, enabled=False)
    assert (await source.diagnose(kek)).verdict is Verdict.KEK_DISABLED
    await source.set_kek_enabled(kek, enabled=True)
    assert (await source.diagnose(kek)).verdict is Verdict.OK
    await source.destroy_kek(kek)
    assert nss.run("count", REFERENCE) == 0
