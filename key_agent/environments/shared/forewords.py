"""A withdrawal is known before the rows that it comes with are here.

1. Many rows are long on their way: ten thousand take seconds to be verified and stored. Their manager says
   beforehand what the environment that is asked to take them will be: its own row, as it is in that epoch.
2. The row proves itself: it is signed by whoever holds the newest known term, for an epoch that is not known
   yet, and its holder may go on (believing.py, rule 1). Whoever has it may pass it on; nobody can make one.
3. It can only take away. It counts until the own registry is at that epoch, or at a newer term.
"""

from dataclasses import dataclass

from envelope.errors import IntegrityError
from key_agent.environments.shared.documents import EnvironmentBody, Kind, SharedRow, read_body
from key_agent.environments.shared.registry_lease import Position
from key_agent.environments.shared.shared_errors import StaleTermError
from key_agent.environments.shared.shared_state import State
from key_agent.environments.shared.terms import check_goes_on


@dataclass(frozen=True, slots=True)
class Foreword:
    """What the own environment will be, at *position*."""

    position: Position
    body: EnvironmentBody


def check_foreword(tenant: str, environment: str, row: SharedRow, state: State) -> Foreword | None:
    """*row* as a foreword to *state*; None: it takes nothing away, or says what is known.

    StaleTermError, IntegrityError, FormatError: it is not to be believed.
    """
    if row.key != (Kind.ENVIRONMENT, environment):
        raise IntegrityError(f"row {row.kind} {row.id} is not environment {environment}'s")
    shared, holder = state.shared, state.terms.newest
    if holder is None or row.term > shared.term:
        raise IntegrityError(f"nobody is known to hold term {row.term}")
    if row.term < shared.term:
        raise StaleTermError(f"term {row.term} is over: {shared.term} has been seen")
    state.terms.check(tenant, row)
    check_goes_on(state.known, holder)
    body = read_body(row.kind, row.body)
    if row.epoch <= shared.epoch or not isinstance(body, EnvironmentBody) or body.state.pushes:
        return None
    return Foreword(Position(row.term, row.epoch), body)
