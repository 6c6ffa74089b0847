"""The signed rows as a load balancer's companion has them: in memory, from several agents, never older.

1. Every row is checked as a member of the environments would (environments/row_keys.py), beginning with the
   keys that the settings name. What does not fit is not taken, whoever brings it.
2. The newest of what any agent has counts: one that is breached can keep something to itself, not undo it.
3. They are of now as long as some agent answers with them.
"""

from collections.abc import Mapping
from typing import Final

from envelope.errors import FormatError, IntegrityError
from key_agent.environments.documents import (
    Body,
    Delta,
    EnvironmentBody,
    Kind,
    SharedRow,
    check_delta,
    digest_of,
    read_body,
    row_digest,
)
from key_agent.environments.row_keys import RowKeys, named_in
from key_agent.environments.states import EnvironmentState


class Follower:
    """Pure: deltas in, states out."""

    def __init__(self, tenant: str, pins: Mapping[str, str]) -> None:
        """*pins*: registry keys (base64url) by agent id."""
        self._tenant: Final = tenant
        self._pins: Final = dict(pins)
        self._rows: dict[tuple[Kind, str], SharedRow] = {}
        self._bodies: dict[tuple[Kind, str], Body] = {}
        self.term = 0
        self.epoch = 0

    @property
    def position(self) -> tuple[int, int]:
        return (self.term, self.epoch)

    def state_of(self, environment: str) -> EnvironmentState | None:
        body = self._bodies.get((Kind.ENVIRONMENT, environment))
        return body.state if isinstance(body, EnvironmentBody) else None

    def states(self) -> dict[str, EnvironmentState]:
        return {
            row_id: body.state
            for (kind, row_id), body in self._bodies.items()
            if kind is Kind.ENVIRONMENT and isinstance(body, EnvironmentBody)
        }

    def needs(self) -> int:
        """After which epoch to ask for rows."""
        return self.epoch

    def take(self, delta: Delta) -> bool:
        """Whether it was newer. IntegrityError, FormatError: nothing was taken; ask for all (epoch 0)."""
        if delta.tenant != self._tenant:
            raise IntegrityError(f"rows of {delta.tenant} instead of {self._tenant}")
        if (delta.term, delta.epoch_to) <= self.position:
            return False
        keys = RowKeys.of(self._bodies, self._pins)
        check_delta(delta, keys.newest() | named_in(delta, keys, self._tenant))
        keys = RowKeys.of(self._bodies, self._pins).admitting(
            [row for row in delta.rows if row.kind is Kind.ENVIRONMENT], self._tenant
        )
        rows = {} if delta.epoch_from == 0 else dict(self._rows)
        bodies = {} if delta.epoch_from == 0 else dict(self._bodies)
        if delta.epoch_from not in (0, self.epoch):
            raise FormatError(f"rows after epoch {delta.epoch_from} do not follow epoch {self.epoch}")
        for row in delta.rows:
            keys.check(self._tenant, row)
            rows[row.key] = row
            bodies[row.key] = read_body(row.kind, row.body)
        if digest_of((key, row_digest(row)) for key, row in rows.items()) != delta.digest:
            raise IntegrityError("the rows are not all that their digest is of")
        self._rows, self._bodies = rows, bodies
        self.term, self.epoch = delta.term, delta.epoch_to
        return True
