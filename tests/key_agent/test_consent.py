"""One answer, decided by proofs: every standing times every verdict."""

from itertools import product

import pytest

from envelope.errors import MisuseError
from key_agent.consent import Change, Consent, EnvironmentStanding, Standing, next_standing
from key_agent.registry.model import KekRow
from key_agent.registry.states import TRANSITIONS, KekState, check_transition
from key_agent.sources.source import Diagnosis, Kek, KekReference, Verdict, WrapMethod
from tests.fakes.clock import ManualClock


def _row(kek_id: str = "k1", state: KekState = KekState.ACTIVE) -> KekRow:
    reference = KekReference(kek_id=kek_id, label=f"l-{kek_id}", object_id=b"i", environment_id="main")
    kek = Kek(
        reference=reference,
        method=WrapMethod.GCM,
        token_serial="s",
        canary_ciphertext=b"c",
        canary_sha256=b"h",
        created_at_ms=0,
    )
    return KekRow(reference=reference, version=1, kek=kek, state=state, reason=None, since_ms=0)


def _kek(row: KekRow) -> Kek:
    assert row.kek is not None
    return row.kek


def test_only_ok_ever_leads_to_pushing() -> None:
    for standing, verdict in product(Standing, Verdict):
        after = next_standing(standing, verdict)
        if after is Standing.CONSENTED:
            assert verdict is Verdict.OK


def test_a_revocation_is_sticky_for_every_verdict() -> None:
    assert {next_standing(Standing.REVOKED, verdict) for verdict in Verdict} == {Standing.REVOKED}


def test_what_withdraws_is_what_the_verdict_says() -> None:
    for verdict in Verdict:
        assert next_standing(Standing.CONSENTED, verdict).is_withdrawn == verdict.withdraws
        assert (next_standing(Standing.CONSENTED, verdict) is Standing.REVOKED) == verdict.is_revocation


def test_a_suspended_token_stays_withdrawn_while_nobody_can_tell() -> None:
    for verdict in Verdict:
        after = next_standing(Standing.SUSPENDED, verdict)
        assert after.is_withdrawn or verdict is Verdict.OK


def test_listeners_hear_of_changes_only(clock: ManualClock) -> None:
    consent = Consent(clock)
    heard: list[Change] = []
    consent.listen(heard.append)
    row = _row()
    consent.adopt(row)
    for _ in range(3):
        consent.observe(_kek(row), Diagnosis(Verdict.OK, "fine"))
    assert [change.new for change in heard] == [Standing.UNPROVEN, Standing.CONSENTED]
    assert consent.may_push


def test_old_news_of_another_kek_change_nothing(clock: ManualClock) -> None:
    consent = Consent(clock)
    consent.adopt(_row("new"))
    consent.observe(_kek(_row("old")), Diagnosis(Verdict.KEK_DESTROYED, "gone"))
    assert consent.standing is Standing.UNPROVEN


@pytest.mark.parametrize(
    ("state", "standing"),
    [
        (KekState.ACTIVE, Standing.UNPROVEN),
        (KekState.SUSPENDED, Standing.SUSPENDED),
        (KekState.REVOKED, Standing.REVOKED),
        (KekState.DESTROYED, Standing.REVOKED),
    ],
)
def test_the_registry_never_proves_consent(clock: ManualClock, state: KekState, standing: Standing) -> None:
    consent = Consent(clock)
    consent.adopt(_row(state=state))
    assert consent.standing is standing
    assert not consent.may_push


def test_kek_states_go_only_where_the_table_says() -> None:
    for old, new in product(KekState, KekState):
        if new in TRANSITIONS[old]:
            check_transition(old, new)
        else:
            with pytest.raises(MisuseError):
                check_transition(old, new)
    to_active = {old for old, news in TRANSITIONS.items() if KekState.ACTIVE in news}
    assert to_active == {
        KekState.PRE_ACTIVE,
        KekState.STAGED,
        KekState.SUSPENDED,
        KekState.REVOKED,
        KekState.DESTROYED,
    }


def test_an_environment_that_does_not_serve_pushes_nothing_whatever_its_kek_says(clock: ManualClock) -> None:
    consent, row = Consent(clock), _row()
    heard: list[EnvironmentStanding] = []
    consent.listen_environment(heard.append)
    consent.adopt(row)
    consent.observe(_kek(row), Diagnosis(Verdict.OK, "opens"))
    assert (consent.may_push, consent.is_withdrawn) == (True, False)
    consent.set_environment(EnvironmentStanding.UNPROVEN, "nobody was heard yet")
    assert (consent.may_push, consent.is_withdrawn) == (False, False)
    consent.set_environment(EnvironmentStanding.WITHDRAWN, "healing")
    consent.set_environment(EnvironmentStanding.WITHDRAWN, "healing still")
    assert (consent.may_push, consent.is_withdrawn) == (False, True)
    assert consent.environment_reason == "healing still"
    # The KEK's own verdicts change nothing about it, and it nothing about them.
    consent.observe(_kek(row), Diagnosis(Verdict.OK, "opens"))
    assert (consent.may_push, consent.standing) == (False, Standing.CONSENTED)
    consent.set_environment(EnvironmentStanding.SERVES, None)
    assert (consent.may_push, consent.is_withdrawn) == (True, False)
    assert heard == [
        EnvironmentStanding.UNPROVEN,
        EnvironmentStanding.WITHDRAWN,
        EnvironmentStanding.SERVES,
    ]
    consent.revoke("by command")
    assert consent.is_withdrawn
