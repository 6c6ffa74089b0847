"""All shared rows as they were committed last, in memory: a value, and what it is after some more rows."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from key_agent.environments.shared.documents import Body, Delta, SharedRow, digest_of, read_body, row_digest
from key_agent.environments.shared.shared_view import Key, Shared, changed, view_of
from key_agent.environments.shared.terms import WATCHED, Known, Terms


@dataclass(slots=True)
class State:
    """All rows as they were committed last."""

    rows: dict[Key, SharedRow] = field(default_factory=dict)
    bodies: dict[Key, Body] = field(default_factory=dict)
    digests: dict[Key, bytes] = field(default_factory=dict)
    shared: Shared = field(default_factory=Shared)
    terms: Terms = field(default_factory=Terms)

    def sign(self, signature: str) -> None:
        """The head is *signature* by the newest term's holder."""
        self.shared = changed(self.shared, head=signature)

    @property
    def known(self) -> Known:
        """As far as it decides whom to believe next."""
        watched = [key for key in self.rows if key[0] in WATCHED]
        return Known(
            position=(self.shared.term, self.shared.epoch),
            digest=self.shared.digest,
            terms=self.terms,
            digests={key: self.digests[key] for key in watched},
            bodies={key: self.bodies[key] for key in watched},
        )


def with_rows(state: State, rows: Iterable[SharedRow], *, term: int, epoch: int, tenant_id: str) -> State:
    """*state* after *rows*: values, nothing is written, nothing is checked but the terms' order."""
    after = State(rows=dict(state.rows), bodies=dict(state.bodies), digests=dict(state.digests))
    for row in rows:
        after.rows[row.key] = row
        after.bodies[row.key] = read_body(row.kind, row.body)
        after.digests[row.key] = row_digest(row)
    digest = digest_of(after.digests.items())
    after.shared = view_of(after.bodies, term=term, epoch=epoch, digest=digest, tenant_id=tenant_id)
    after.terms = Terms.of(after.rows.values())
    return after


def delta_of(state: State, epoch: int, *, tenant_id: str, agent_id: str) -> Delta:
    """What changed in *state* after *epoch*. *agent_id*: who asks, where nobody has held a term yet."""
    start = min(epoch, state.shared.epoch)
    holder = state.terms.newest
    return Delta(
        tenant=tenant_id,
        term=state.shared.term,
        epoch_from=start,
        epoch_to=state.shared.epoch,
        rows=tuple(row for row in state.rows.values() if row.epoch > start),
        digest=state.shared.digest,
        signer=agent_id if holder is None else holder.agent,
        signature=state.shared.head,
    )
