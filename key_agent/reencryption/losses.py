"""What is lost with a key, as far as the re-encryptions of this machine know (docs/environments.md).

1. A job that has met objects of a key and is not done outweighs every other one: it may be of another store.
2. Dropped, it still knows: its keys end with their loss accepted. One that may go on has to be dropped for
   that, or an accepted loss would take along what a command could still have rewritten.
3. Where no job has looked, that is said: no number stands for it.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from envelope.keys import KeyId
from key_agent.reencryption.job import JobState, Progress

NAMED: Final = 5
"""First names of each job: for people, who know by them what it is about."""


def rewritten(jobs: Sequence[Progress]) -> frozenset[KeyId]:
    """Keys of which a finished job has found nothing left, and no other one knows of any."""
    whole = {key_id for job in jobs if job.is_whole for key_id in job.sources}
    return frozenset(whole.difference(*(job.sources for job in jobs if job.may_have_left)))


def unfinished(jobs: Sequence[Progress]) -> Mapping[str, Collection[str]]:
    """Key -> jobs that know of its objects, are not done, and may go on (rule 2)."""
    found: dict[str, list[str]] = {}
    for job in jobs:
        if job.may_have_left and job.dropped_at_ms is None:
            for key_id in job.sources:
                found.setdefault(str(key_id), []).append(job.job_id)
    return found


def known_loss(jobs: Sequence[Progress], keys: Collection[str]) -> dict[str, Any]:
    """What jobs know to be left of *keys*, and of which keys nobody knows anything."""
    leaving = [job for job in jobs if job.may_have_left and not _of(job).isdisjoint(keys)]
    looked = set(map(str, rewritten(jobs))).union(*map(_of, leaving))
    return {
        "jobs": [
            {
                "job": job.job_id,
                "connector": job.connector,
                "state": job.state,
                "dropped_at_ms": job.dropped_at_ms,
                "keys": sorted(_of(job).intersection(keys)),
                "left": job.known_left,
                "may_be_more": job.state is JobState.RUNNING,
                "names": list(job.names_left[:NAMED]),
            }
            for job in leaving
        ],
        "not_looked": sorted(set(keys) - looked),
    }


def _of(job: Progress) -> frozenset[str]:
    return frozenset(map(str, job.sources))
