"""What jobs know decides whether a key ends, and what its end is said to lose."""

from dataclasses import replace

import pytest

from envelope.keys import KeyId
from key_agent.reencryption.job import JobState, Progress
from key_agent.reencryption.losses import rewritten, unfinished

OLD, ALSO_OLD = KeyId.random(), KeyId.random()
MET = Progress(job_id="a", incident_id="inc-1", connector="https://store/", sources=(OLD,), met=1)


def test_a_job_that_may_go_on_is_waited_for_and_a_dropped_one_not() -> None:
    both = replace(MET, job_id="b", sources=(OLD, ALSO_OLD), state=JobState.INCOMPLETE, failed=1)
    assert unfinished([MET, both]) == {str(OLD): ["a", "b"], str(ALSO_OLD): ["b"]}
    assert unfinished([MET, replace(both, dropped_at_ms=1)]) == {str(OLD): ["a"]}


@pytest.mark.parametrize("changed", [{"met": 0}, {"state": JobState.DONE}], ids=["met nothing", "done"])
def test_one_that_knows_of_no_object_is_not_waited_for(changed: dict[str, object]) -> None:
    assert unfinished([replace(MET, **changed)]) == {}  # type: ignore[arg-type]


def test_a_dropped_job_shows_nothing_of_its_keys() -> None:
    done = replace(MET, job_id="b", sources=(OLD, ALSO_OLD), state=JobState.DONE)
    assert rewritten([done]) == {OLD, ALSO_OLD}
    assert rewritten([done, replace(MET, dropped_at_ms=1)]) == {ALSO_OLD}
    assert rewritten([replace(MET, met=0, dropped_at_ms=1)]) == frozenset(), "dropped is not done"
