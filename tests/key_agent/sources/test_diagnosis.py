"""Revocation or outage: every verdict, each brought about for real by another process (docs/hsm.md)."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from key_agent.errors import KekRevokedError, KeySourceError, LoginRefusedError
from key_agent.sources.pkcs11 import Pkcs11Source
from key_agent.sources.source import Kek, Verdict, WrappedKey
from tests.key_agent.sources.conftest import KINDS, REFERENCE, FakeModule, MakeSource, new_keys, request_for
from tests.softhsm import SoftHsm

pytestmark = pytest.mark.parametrize("method", ["gcm", "kw"])


@pytest.fixture
def source(make_source: MakeSource, method: str) -> Pkcs11Source:
    return make_source(method=method)


@pytest.fixture
async def kek(source: Pkcs11Source) -> Kek:
    return await source.create_kek(REFERENCE)


@pytest.fixture
async def key(source: Pkcs11Source, kek: Kek) -> WrappedKey:
    [key] = await source.generate(kek, new_keys(1))
    return key


def opening(method: str) -> str:
    return KINDS[method].opening


def capabilities(method: str) -> int:
    return KINDS[method].capabilities


def destroy(hsm: SoftHsm, _: str) -> None:
    hsm.run("destroy", REFERENCE)


def disable(hsm: SoftHsm, method: str) -> None:
    hsm.run("set", REFERENCE, arguments={"name": opening(method), "value": False})


def replace_by(**arguments: int) -> Callable[[SoftHsm, str], None]:
    def act(hsm: SoftHsm, method: str) -> None:
        hsm.run("destroy", REFERENCE)
        hsm.run("make", REFERENCE, arguments={"capabilities": capabilities(method)} | arguments)

    return act


def double(hsm: SoftHsm, method: str) -> None:
    hsm.run("make", REFERENCE, arguments={"capabilities": capabilities(method)})


REVOCATIONS = {
    "destroyed": (destroy, Verdict.KEK_DESTROYED),
    "disabled": (disable, Verdict.KEK_DISABLED),
    "replaced": (replace_by(), Verdict.KEK_REPLACED),
    "replaced-by-a-shorter-key": (replace_by(bits=128), Verdict.KEK_REPLACED),
    "token-initialised-anew": (lambda hsm, _: hsm.initialize(), Verdict.TOKEN_CHANGED),
    "another-token-of-that-label": (lambda hsm, _: hsm.replace_token(), Verdict.TOKEN_CHANGED),
}


@pytest.mark.parametrize("case", REVOCATIONS)
async def test_a_revocation_is_proven_and_stops_everything(  # noqa: PLR0917 - fixtures
    source: Pkcs11Source, hsm: SoftHsm, kek: Kek, key: WrappedKey, method: str, case: str
) -> None:
    act, verdict = REVOCATIONS[case]
    assert (await source.diagnose(kek)).verdict is Verdict.OK
    act(hsm, method)
    assert (await source.diagnose(kek)).verdict is verdict
    assert verdict.withdraws
    assert verdict.is_revocation is (verdict is not Verdict.TOKEN_CHANGED)
    with pytest.raises(KekRevokedError) as caught:
        await source.seal_envelopes(kek, [request_for(key)])
    assert caught.value.verdict is verdict
    with pytest.raises(KekRevokedError):
        await source.generate(kek, new_keys(1))


@pytest.mark.parametrize(
    ("dates", "verdict"),
    [
        ("ended", Verdict.KEK_EXPIRED),
        ("begins", Verdict.KEK_EXPIRED),
        ("ends", Verdict.OK),
        ("began", Verdict.OK),
    ],
)
async def test_the_keks_dates_are_kept_although_no_token_enforces_them(  # noqa: PLR0917 - fixtures
    make_source: MakeSource, fake: FakeModule, kek: Kek, key: WrappedKey, dates: str, verdict: Verdict
) -> None:
    """By the fake module: SoftHSM2 lets dates be set on a private key and then cannot read them."""
    source = make_source(fake.settings(method=kek.method))
    fake.fail(C_GetAttributeValue=dates)
    assert (await source.diagnose(kek)).verdict is verdict
    if verdict is Verdict.OK:
        assert len(await source.generate(kek, new_keys(1))) == 1
    else:
        with pytest.raises(KekRevokedError):
            await source.seal_envelopes(kek, [request_for(key)])
        with pytest.raises(KekRevokedError):
            await source.generate(kek, new_keys(1))


async def test_dates_that_the_token_cannot_read_are_no_outage(
    source: Pkcs11Source, hsm: SoftHsm, kek: Kek
) -> None:
    hsm.run("set", REFERENCE, arguments={"name": "END_DATE", "value": "2000-01-01"})
    assert (await source.diagnose(kek)).verdict is Verdict.OK


async def test_a_disabled_kek_comes_back_when_it_is_enabled(
    source: Pkcs11Source, hsm: SoftHsm, kek: Kek, key: WrappedKey, method: str
) -> None:
    disable(hsm, method)
    assert (await source.diagnose(kek)).verdict is Verdict.KEK_DISABLED
    hsm.run("set", REFERENCE, arguments={"name": opening(method), "value": True})
    assert (await source.diagnose(kek)).verdict is Verdict.OK
    [result] = await source.seal_envelopes(kek, [request_for(key)])
    assert not result.failed_keys


async def test_two_keys_of_one_name_prove_nothing(
    source: Pkcs11Source, hsm: SoftHsm, kek: Kek, key: WrappedKey, method: str
) -> None:
    double(hsm, method)
    found = await source.diagnose(kek)
    assert found.verdict is Verdict.KEK_AMBIGUOUS
    assert not found.verdict.withdraws
    with pytest.raises(KeySourceError) as caught:
        await source.seal_envelopes(kek, [request_for(key)])
    assert not isinstance(caught.value, KekRevokedError)


async def test_storage_gone_is_an_outage_and_back_is_back(
    source: Pkcs11Source, hsm: SoftHsm, kek: Kek, key: WrappedKey, method: str
) -> None:
    hsm.unmount()
    for _ in range(2):
        found = await source.diagnose(kek)
        assert found.verdict is Verdict.UNREACHABLE
    with pytest.raises(KeySourceError) as caught:
        await source.seal_envelopes(kek, [request_for(key)])
    assert not isinstance(caught.value, KekRevokedError)
    hsm.mount()
    assert (await source.diagnose(kek)).verdict is Verdict.OK
    [result] = await source.seal_envelopes(kek, [request_for(key)])
    assert not result.failed_keys


async def test_storage_gone_under_a_new_agent_is_an_outage(
    make_source: MakeSource, hsm: SoftHsm, kek: Kek, method: str
) -> None:
    hsm.unmount()
    hsm.tokens.mkdir()
    try:
        assert (await make_source(method=method).diagnose(kek)).verdict is Verdict.UNREACHABLE
    finally:
        hsm.tokens.rmdir()
        hsm.mount()


async def test_a_wrong_pin_reaches_the_token_once_however_often_one_asks(
    make_source: MakeSource, fake: FakeModule, kek: Kek, key: WrappedKey, method: str
) -> None:
    fake.hsm.write_pin("wrong")
    settings = fake.settings(method=method)
    source = make_source(settings)
    for _ in range(3):
        found = await source.diagnose(kek)
        assert found.verdict is Verdict.AUTH_PIN
        assert not found.verdict.withdraws
        with pytest.raises(LoginRefusedError):
            await source.seal_envelopes(kek, [request_for(key)])
        with pytest.raises(LoginRefusedError, match=re.escape(str(settings.pin_file))):
            await source.create_kek(replace(REFERENCE, label="another"))
    assert fake.logins == 1
    restarted = make_source(settings)
    assert (await restarted.diagnose(kek)).verdict is Verdict.AUTH_PIN
    assert fake.logins == 1
    fake.hsm.write_pin(fake.hsm.pin)
    for either in (source, restarted):
        assert (await either.diagnose(kek)).verdict is Verdict.OK


async def test_a_pin_that_the_token_locked_is_told_apart(
    make_source: MakeSource, fake: FakeModule, kek: Kek, method: str
) -> None:
    source = make_source(fake.settings(method=method))
    fake.fail(C_Login="locked")
    for _ in range(3):
        assert (await source.diagnose(kek)).verdict is Verdict.AUTH_LOCKED
    assert fake.logins == 1


async def test_a_pin_changed_in_the_token_is_noticed_by_the_next_worker(
    make_source: MakeSource, hsm: SoftHsm, kek: Kek, method: str
) -> None:
    hsm.change_pin("another pin")
    source = make_source(method=method)
    assert (await source.diagnose(kek)).verdict is Verdict.AUTH_PIN
    hsm.write_pin(hsm.pin)
    assert (await source.diagnose(kek)).verdict is Verdict.OK


@pytest.mark.parametrize("fault", ["device-error", "session-gone", "crash"])
async def test_a_broken_decryption_is_an_outage_however_well_the_rest_works(  # noqa: PLR0917 - fixtures
    make_source: MakeSource, fake: FakeModule, kek: Kek, key: WrappedKey, method: str, fault: str
) -> None:
    """Searching and generator work, the canary does not open: that must not look like `kek_replaced`."""
    source = make_source(fake.settings(method=method))
    fake.fail(**{KINDS[method].function: fault})
    for _ in range(2):
        found = await source.diagnose(kek)
        assert found.verdict is Verdict.UNREACHABLE, found.detail
    with pytest.raises(KeySourceError) as caught:
        await source.seal_envelopes(kek, [request_for(key)])
    assert not isinstance(caught.value, KekRevokedError)


async def test_a_decryption_that_returns_rubbish_is_an_outage(
    make_source: MakeSource, fake: FakeModule, method: str
) -> None:
    """Only `gcm` can be lied to like that: `kw` is opened by C_UnwrapKey, which returns a handle."""
    source = make_source(fake.settings(method="gcm"))
    kek = await source.create_kek(REFERENCE)
    fake.fail(C_Decrypt="zeros")
    assert (await source.diagnose(kek)).verdict is Verdict.UNREACHABLE


async def test_one_transient_error_is_neither_an_outage_nor_a_lost_key(
    make_source: MakeSource, fake: FakeModule, kek: Kek, key: WrappedKey, method: str
) -> None:
    source = make_source(fake.settings(method=method))
    function = KINDS[method].function
    fake.fail(**{function: "once"})
    assert (await source.diagnose(kek)).verdict is Verdict.OK
    assert not fake.is_armed
    fake.fail(**{function: "once"})
    [result] = await source.seal_envelopes(kek, [request_for(key)])
    assert not fake.is_armed
    assert not result.failed_keys


async def test_a_device_that_died_is_back_after_a_new_start(
    make_source: MakeSource, fake: FakeModule, kek: Kek, key: WrappedKey, method: str
) -> None:
    """CKR_DEVICE_ERROR by everything until C_Finalize: a second worker is what brings it back."""
    source = make_source(fake.settings(method=method))
    assert (await source.diagnose(kek)).verdict is Verdict.OK
    pid = source.worker_pid
    # The faults go with the first call; the module is dead from then on, whatever is asked of it.
    fake.fail(**{KINDS[method].function: "dies-once"})
    assert (await source.diagnose(kek)).verdict is Verdict.OK
    assert source.worker_pid != pid
    [result] = await source.seal_envelopes(kek, [request_for(key)])
    assert not result.failed_keys
    fake.fail(C_OpenSession="dies")
    assert (await source.diagnose(kek)).verdict is Verdict.UNREACHABLE
    fake.recover()
    assert (await source.diagnose(kek)).verdict is Verdict.OK


async def test_too_many_sessions_are_an_outage(
    make_source: MakeSource, fake: FakeModule, kek: Kek, method: str
) -> None:
    source = make_source(fake.settings(method=method))
    fake.fail(C_OpenSession="session-count")
    found = await source.diagnose(kek)
    assert (found.verdict, "SessionCount" in found.detail) == (Verdict.UNREACHABLE, True)
    fake.recover()
    assert (await source.diagnose(kek)).verdict is Verdict.OK


async def test_a_session_with_a_dead_operation_spoils_nothing(
    make_source: MakeSource, fake: FakeModule, kek: Kek, key: WrappedKey, method: str
) -> None:
    """As NSS: after one failure each later call on that session answers OperationActive."""
    fake.be("stuck")
    source = make_source(fake.settings(method=method))
    bad = replace(key, wrapped=bytes([key.wrapped[0] ^ 1]) + key.wrapped[1:])
    mixed, good = await source.seal_envelopes(kek, [request_for([bad, bad, key]), request_for(key)])
    assert set(mixed.failed_keys) == {key.key_id}
    assert not good.failed_keys
    assert (await source.diagnose(kek)).verdict is Verdict.OK


async def test_the_third_wrong_pin_would_have_locked_the_token(
    make_source: MakeSource, fake: FakeModule, kek: Kek, method: str
) -> None:
    fake.be("locking")
    source = make_source(fake.settings(method=method))
    verdicts = []
    for wrong in ("first", "second", "third"):
        fake.hsm.write_pin(wrong)
        verdicts += [(await source.diagnose(kek)).verdict for _ in range(3)]
    assert verdicts == [Verdict.AUTH_PIN] * 6 + [Verdict.AUTH_LOCKED] * 3
    assert fake.logins == 3
    fake.hsm.write_pin(fake.hsm.pin)
    assert (await source.diagnose(kek)).verdict is Verdict.AUTH_LOCKED
    assert fake.logins == 4


async def test_a_module_that_keeps_its_list_of_keys_hides_no_revocation(
    make_source: MakeSource, fake: FakeModule, kek: Kek, key: WrappedKey, method: str
) -> None:
    """The first worker still finds the key, which does not open: an outage so far. The second one knows."""
    fake.be("cached")
    source = make_source(fake.settings(method=method))
    [result] = await source.seal_envelopes(kek, [request_for(key)])
    assert not result.failed_keys
    fake.hsm.run("destroy", REFERENCE)
    assert (await source.diagnose(kek)).verdict is Verdict.KEK_DESTROYED
    with pytest.raises(KekRevokedError):
        await source.seal_envelopes(kek, [request_for(key)])
