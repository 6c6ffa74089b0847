"""Whether an environment serves: the signed state, the lease, its own word."""

import pytest

from key_agent.consent import EnvironmentStanding
from key_agent.environments.peers.standing import Verdict, judge
from key_agent.environments.shared.documents import EnvironmentBody
from key_agent.environments.shared.registry_lease import NEVER_S
from key_agent.environments.states import EnvironmentState


def verdict(
    state: EnvironmentState | None,
    *,
    proven_boot_s: float = 990.0,
    was_proven: bool = True,
    tampered: str | None = None,
    declared: str | None = None,
    is_shared: bool = True,
) -> Verdict:
    own = (
        None
        if state is None
        else EnvironmentBody(
            name="a", agent_id="x", api_url="https://a", state=state, since_ms=0, reason=f"was {state}"
        )
    )
    return judge(
        own,
        is_shared=is_shared,
        tampered=tampered,
        declared=declared,
        proven_boot_s=proven_boot_s,
        was_proven=was_proven,
        lease_s=300,
        now_boot_s=1000,
    )


@pytest.mark.parametrize("state", EnvironmentState)
def test_only_active_and_draining_serve(state: EnvironmentState) -> None:
    found = verdict(state)
    serves = state in (EnvironmentState.ACTIVE, EnvironmentState.DRAINING)
    assert (found.standing is EnvironmentStanding.SERVES) == serves
    assert found.state == state
    assert found.until_boot_s == (1290 if serves else None)
    assert serves or found.standing is EnvironmentStanding.WITHDRAWN


@pytest.mark.parametrize("state", [*EnvironmentState, None])
@pytest.mark.parametrize("word", ["tampered", "declared"])
def test_the_own_word_withdraws_in_every_state(state: EnvironmentState | None, word: str) -> None:
    for is_shared in (True, False):
        found = verdict(
            state,
            is_shared=is_shared,
            tampered="rows" if word == "tampered" else None,
            declared="breach" if word == "declared" else None,
        )
        assert (found.standing, found.state) == (EnvironmentStanding.WITHDRAWN, "healing")


def test_a_lease_that_is_over_is_as_healing() -> None:
    assert verdict(EnvironmentState.ACTIVE, proven_boot_s=700.1).standing is EnvironmentStanding.SERVES
    for proven_boot_s in (700.0, NEVER_S):
        found = verdict(EnvironmentState.ACTIVE, proven_boot_s=proven_boot_s)
        assert (found.standing, found.state) == (EnvironmentStanding.WITHDRAWN, "healing")
        assert found.reason is not None
        assert "lease" in found.reason


def test_who_has_just_started_waits_and_takes_nothing_back() -> None:
    found = verdict(EnvironmentState.ACTIVE, proven_boot_s=NEVER_S, was_proven=False)
    assert found.standing is EnvironmentStanding.UNPROVEN


def test_the_only_environment_serves_and_one_that_is_in_no_set_does_not() -> None:
    assert verdict(None, is_shared=False, proven_boot_s=NEVER_S).standing is EnvironmentStanding.SERVES
    assert verdict(None).standing is EnvironmentStanding.WITHDRAWN
