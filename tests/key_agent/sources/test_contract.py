"""What every key source promises: the fake of the other tests keeps it as the real one does."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from cryptography import x509

from envelope.certificates import fingerprint
from envelope.keys import KeyId
from envelope.material import Expectation, Signer, open_envelope
from key_agent.errors import KekRevokedError, KeySourceError
from key_agent.sources.source import Kek, KeySource, Verdict
from tests.fakes.key_source import FakeKeySource
from tests.key_agent.sources.conftest import AGENT, NONCE, REFERENCE, MakeSource, owners, request_for
from tests.pki import Tenant
from tests.softhsm import SoftHsm


@dataclass
class Subject:
    """A source and the hand of the enterprise on its token."""

    source: KeySource
    destroy: Callable[[Kek], object]
    disable: Callable[[Kek], object]
    replace: Callable[[Kek], object]


@pytest.fixture(params=["fake", "softhsm"])
def subject(request: pytest.FixtureRequest, make_source: MakeSource, hsm: SoftHsm, acme: Tenant) -> Subject:
    if request.param == "softhsm":
        return Subject(
            make_source(),
            destroy=lambda kek: hsm.run("destroy", kek.reference),
            disable=lambda kek: hsm.run("set", kek.reference, arguments={"name": "DECRYPT", "value": False}),
            replace=lambda kek: (hsm.run("destroy", kek.reference), hsm.run("make", kek.reference)),
        )
    signing = acme.agent_signing(AGENT)
    fake = FakeKeySource(agent_id=AGENT, signing_key=signing.key, signing_certificate=signing.certificate)
    return Subject(fake, destroy=fake.destroy, disable=fake.disable, replace=fake.replace)


async def test_keys_arrive(subject: Subject, acme: Tenant, hsm: SoftHsm) -> None:
    kek = await subject.source.create_kek(REFERENCE)
    first, second = await subject.source.generate(kek, owners(2))
    service = acme.service(first.owner.service)
    [result] = await subject.source.seal_envelopes(kek, [request_for(first, service)])
    assert result.owner == first.owner
    assert not result.failed_keys
    token = result.tokens["proxy-0"]
    signing = getattr(subject.source, "signing_certificate", None)
    if signing is None:
        signing = x509.load_pem_x509_certificate((hsm.directory / "signing.pem").read_bytes())
    claims = open_envelope(
        token,
        Expectation(
            owner=first.owner,
            audience="proxy-0",
            recipient_certificate=service.certificate,
            recipient_key=service.key,
            signers={fingerprint(signing): Signer(signing, AGENT)},
            now_s=1_800_000_001,
            validity_s=330,
            nonce=NONCE,
            last_sequence=0,
            seen_token_ids=(),
        ),
    )
    assert [key.key_id for key in claims.keys] == [first.key_id]
    assert first.kek_id == second.kek_id == REFERENCE.kek_id
    assert first.token_serial == kek.token_serial


@pytest.mark.parametrize(
    ("hand", "verdict"),
    [
        ("destroy", Verdict.KEK_DESTROYED),
        ("disable", Verdict.KEK_DISABLED),
        ("replace", Verdict.KEK_REPLACED),
    ],
)
async def test_revocations(subject: Subject, hand: str, verdict: Verdict) -> None:
    kek = await subject.source.create_kek(REFERENCE)
    [key] = await subject.source.generate(kek, owners(1))
    assert (await subject.source.diagnose(kek)).verdict is Verdict.OK
    getattr(subject, hand)(kek)
    assert (await subject.source.diagnose(kek)).verdict is verdict
    for attempt in (
        subject.source.seal_envelopes(kek, [request_for(key)]),
        subject.source.generate(kek, owners(1)),
    ):
        with pytest.raises(KekRevokedError) as caught:
            await attempt
        assert caught.value.verdict is verdict
        assert caught.value.diagnosis.verdict is verdict


async def test_the_owners_own_hand(subject: Subject) -> None:
    kek = await subject.source.create_kek(REFERENCE)
    await subject.source.set_kek_enabled(kek, enabled=False)
    assert (await subject.source.diagnose(kek)).verdict is Verdict.KEK_DISABLED
    await subject.source.set_kek_enabled(kek, enabled=True)
    assert (await subject.source.diagnose(kek)).verdict is Verdict.OK
    await subject.source.destroy_kek(kek)
    await subject.source.destroy_kek(kek)
    assert (await subject.source.diagnose(kek)).verdict is Verdict.KEK_DESTROYED
    with pytest.raises(KeySourceError):
        await subject.source.set_kek_enabled(kek, enabled=True)


async def test_a_kek_is_made_once(subject: Subject) -> None:
    await subject.source.create_kek(REFERENCE)
    with pytest.raises(KeySourceError):
        await subject.source.create_kek(REFERENCE)
    again = await subject.source.create_kek(REFERENCE, replace_unfinished=True)
    assert (await subject.source.diagnose(again)).verdict is Verdict.OK


async def test_failures_of_one_key_or_recipient_are_values(
    subject: Subject, acme: Tenant, globex: Tenant
) -> None:
    kek = await subject.source.create_kek(REFERENCE)
    good, bad = await subject.source.generate(kek, owners(1) * 2)
    bad = replace(bad, wrapped=good.wrapped)
    request = request_for([good, bad], acme.service("service-0"), globex.service("service-0"))
    only_bad = request_for(bad, acme.service("service-0"))
    mixed, nothing = await subject.source.seal_envelopes(kek, [request, only_bad])
    assert set(mixed.failed_keys) == set(nothing.failed_keys) == {bad.key_id}
    assert set(mixed.tokens) == {"proxy-0"}
    assert set(mixed.failed_recipients) == {"proxy-1"}
    assert not nothing.tokens
    assert isinstance(next(iter(mixed.failed_keys)), KeyId)


async def test_description_and_end(subject: Subject) -> None:
    facts = await subject.source.describe()
    assert {"module", "token", "methods"} <= facts.keys()
    await subject.source.close()
    await subject.source.close()
