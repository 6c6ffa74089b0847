"""What jobs know decides whether a key ends, and what its end is said to lose."""

from dataclasses import replace

import pytest

from envelope.keys import KeyId
from key_agent.reencryption.job import JobState, Progress
from key_agent.reencryption.losses import NAMED, known_loss, rewritten, unfinished

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


def test_a_loss_names_who_knows_of_it_how_much_and_whether_that_is_all() -> None:
    gone = replace(MET, sources=(OLD, ALSO_OLD), left_before=7, named_before=tuple("abcdef"), dropped_at_ms=5)
    assert known_loss([gone], {str(OLD)}) == {
        "jobs": [
            {
                "job": "a",
                "connector": "https://store/",
                "state": JobState.RUNNING,
                "dropped_at_ms": 5,
                "keys": [str(OLD)],
                "left": 7,
                "may_be_more": True,
                "names": list("abcdef"[:NAMED]),
            }
        ],
        "not_looked": [],
    }
    through = replace(gone, state=JobState.INCOMPLETE)
    [job] = known_loss([through], {str(OLD)})["jobs"]
    assert job["may_be_more"] is False


@pytest.mark.parametrize(
    "jobs",
    [[], [replace(MET, met=0)], [replace(MET, met=0, dropped_at_ms=5)], [replace(MET, sources=(ALSO_OLD,))]],
    ids=["no job", "begun alone", "dropped before it began", "of another key"],
)
def test_where_no_job_has_looked_that_is_said(jobs: list[Progress]) -> None:
    assert known_loss(jobs, {str(OLD)}) == {"jobs": [], "not_looked": [str(OLD)]}


def test_what_a_finished_job_has_looked_through_is_not_unknown_beside_one_that_knows_of_objects() -> None:
    done = replace(MET, job_id="b", state=JobState.DONE)
    assert known_loss([done], {str(OLD)}) == {"jobs": [], "not_looked": []}
    found = known_loss([done, MET], {str(OLD)})
    assert ([job["job"] for job in found["jobs"]], found["not_looked"]) == (["a"], [])
