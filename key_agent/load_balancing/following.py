"""The signed rows as a load balancer's companion has them: in memory, from several agents, never older.

1. Every row is checked as a member of the environments would (environments/terms.py). The first manager is
   whom the settings name, or whom the state file knows; who follows has to be shown to.
2. The newest of what any agent has counts: one that is breached can keep something to itself, not undo it.
3. A term that was elected is believed when more than half of the agents that are asked have it: etcd is not
   asked from here.
4. They are of now as long as the environments that are not withdrawn say so: more than half of those whose
   agents are asked, or half of them with the manager's. One agent alone keeps nothing alive.
5. Of two histories of one term, which two promotions in a split network make, the one may count that is
   shorter: older rows are late only if the head that they lead to is by whoever holds the term here.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from envelope.errors import FormatError, IntegrityError
from key_agent.environments.shared.documents import (
    Body,
    Delta,
    EnvironmentBody,
    Kind,
    SharedRow,
    TenantBody,
    check_head,
    check_shape,
    check_step,
    digest_of,
    read_body,
    row_digest,
)
from key_agent.environments.shared.terms import WATCHED, Holder, Known, Terms, check_goes_on, judge
from key_agent.environments.states import EnvironmentState

NEVER_S: Final = float("-inf")
_LEASE_S: Final = 300.0


class Follower:
    """Pure: deltas in, states out."""

    def __init__(self, tenant: str, *, agents: Iterable[str], manager: tuple[str, str]) -> None:
        """*agents*: who is asked. *manager*: its agent id and registry key (base64url)."""
        self._tenant: Final = tenant
        self._agents: Final = frozenset(agents)
        self._pins: Final = dict((manager,))
        self._rows: dict[tuple[Kind, str], SharedRow] = {}
        self._bodies: dict[tuple[Kind, str], Body] = {}
        self._terms = Terms()
        self._head = self._digest = ""
        self._elected: dict[bytes, set[str]] = {}
        """Digest of an elected term's row -> agents that have it (rule 3)."""
        self._heard_boot_s: dict[str, float] = {}
        self.term = 0
        self.epoch = 0

    @property
    def position(self) -> tuple[int, int]:
        return (self.term, self.epoch)

    def state_of(self, environment: str) -> EnvironmentState | None:
        body = self._bodies.get((Kind.ENVIRONMENT, environment))
        return body.state if isinstance(body, EnvironmentBody) else None

    def states(self) -> dict[str, EnvironmentState]:
        return {body.name: body.state for body in self._environments()}

    def needs(self) -> int:
        """After which epoch to ask for rows."""
        return self.epoch

    def take(self, delta: Delta, *, agent: str, asked_boot_s: float) -> bool:
        """What *agent* answered to a question of that moment; whether it was newer.

        IntegrityError, FormatError: nothing was taken; ask for all (epoch 0).
        """
        if delta.tenant != self._tenant:
            raise IntegrityError(f"rows of {delta.tenant} instead of {self._tenant}")
        check_shape(delta)
        check_step(delta, self.epoch)
        if (delta.term, delta.epoch_to) < self.position:
            if self._is_late(delta):
                return False
            if delta.epoch_from:
                raise FormatError("another history of this term")
        if (delta.term, delta.epoch_to) == self.position:
            if delta.digest == self._digest:
                self._heard(agent, asked_boot_s)
                return False
            if delta.epoch_from:
                raise FormatError("other rows at the same epoch")
        if delta.epoch_from not in (0, self.epoch):
            raise FormatError(f"rows after epoch {delta.epoch_from} do not follow epoch {self.epoch}")
        rows = {} if delta.epoch_from == 0 else dict(self._rows)
        bodies = {} if delta.epoch_from == 0 else dict(self._bodies)
        for row in delta.rows:
            rows[row.key] = row
            bodies[row.key] = read_body(row.kind, row.body)
        if digest_of((key, row_digest(row)) for key, row in rows.items()) != delta.digest:
            raise IntegrityError("the rows are not all that their digest is of")
        self._terms = self._judged(delta, rows.values(), agent)
        self._rows, self._bodies = rows, bodies
        self._head, self._digest = delta.signature, delta.digest
        self.term, self.epoch = delta.term, delta.epoch_to
        self._heard(agent, asked_boot_s)
        return True

    def _is_late(self, delta: Delta) -> bool:
        """Whether these older rows are of the history that was followed, as far as they show it (rule 5)."""
        holder = self._terms.newest
        if holder is None or delta.term < holder.term:
            return True
        try:
            check_head(self._tenant, delta.head, holder.key)
        except IntegrityError:
            return False
        return True

    def _judged(self, delta: Delta, rows: Iterable[SharedRow], agent: str) -> Terms:
        """Whose rows these are (rule 1). IntegrityError."""
        known = self._known()
        judged = judge(self._tenant, known, rows)
        holder = judged.terms.newest
        if judged.overruled or holder is None or (holder.term, holder.agent) != (delta.term, delta.signer):
            raise IntegrityError(f"rows of term {delta.term} that are not its holder's")
        check_goes_on(known, holder)
        check_head(self._tenant, delta.head, holder.key)
        for row in delta.rows:
            judged.terms.check(self._tenant, row)
        if judged.elected is not None:
            self._check_elected(judged.elected, agent)
        return judged.terms

    def _known(self) -> Known:
        if self._terms.newest is None:
            return Known(pins=self._pins)
        watched = [key for key in self._rows if key[0] in WATCHED]
        return Known(
            position=self.position,
            digest=self._digest,
            terms=self._terms,
            digests={key: row_digest(self._rows[key]) for key in watched},
            bodies={key: self._bodies[key] for key in watched},
        )

    def _check_elected(self, holder: Holder, agent: str) -> None:
        """Rule 3."""
        said = self._elected.setdefault(holder.digest, set())
        said.add(agent)
        if len(said & self._agents) * 2 <= len(self._agents):
            raise IntegrityError(f"term {holder.term} was elected, says {agent} alone")
        self._elected.clear()

    def _heard(self, agent: str, asked_boot_s: float) -> None:
        self._heard_boot_s[agent] = max(asked_boot_s, self._heard_boot_s.get(agent, NEVER_S))

    # Rule 4.

    @property
    def lease_s(self) -> float:
        """For how long the environments go on without a proof, so these rows as well."""
        body = self._bodies.get((Kind.TENANT, self._tenant))
        return float(body.registry_lease_s) if isinstance(body, TenantBody) else _LEASE_S

    @property
    def heard(self) -> Mapping[str, float]:
        """By agent: when it was asked last that answered with these rows."""
        return self._heard_boot_s

    def heard_boot_s(self) -> float:
        """When any agent was asked last that answered with these rows."""
        return max(self._heard_boot_s.values(), default=NEVER_S)

    def proven_boot_s(self) -> float:
        """When these rows were last proven to be the newest; NEVER_S without a proof."""
        counted = {
            body.agent_id: self._heard_boot_s.get(body.agent_id, NEVER_S)
            for body in self._environments()
            if body.state.counts and body.agent_id in self._agents
        }
        if not counted:
            # All are withdrawn: nothing is up that somebody could wrongly keep up.
            return self.heard_boot_s()
        times = sorted(counted.values(), reverse=True)
        majority_s = times[len(times) // 2]
        holder = self._terms.newest
        if len(times) % 2 or holder is None or holder.agent not in counted:
            return majority_s
        return max(majority_s, min(counted[holder.agent], times[len(times) // 2 - 1]))

    def _environments(self) -> list[EnvironmentBody]:
        return [body for body in self._bodies.values() if isinstance(body, EnvironmentBody)]

    # The state file.

    def anchor(self) -> tuple[int, frozenset[bytes]]:
        """Changes with whatever decides whom to believe next."""
        holder = self._terms.newest
        held = () if holder is None else (holder.digest,)
        return self.term, frozenset((*held, *self._known().digests.values()))

    def everything(self) -> Delta:
        """What was taken, as an agent would give it. FormatError: nothing was."""
        holder = self._terms.newest
        if holder is None:
            raise FormatError("no rows have been taken yet")
        return Delta(
            tenant=self._tenant,
            term=self.term,
            epoch_from=0,
            epoch_to=self.epoch,
            rows=tuple(self._rows.values()),
            digest=self._digest,
            signer=holder.agent,
            signature=self._head,
        )

    def remember(self, delta: Delta) -> None:
        """Begin with what `everything` gave in an earlier life. IntegrityError, FormatError: damaged."""
        terms = Terms.of(delta.rows)
        holder = terms.newest
        if delta.tenant != self._tenant:
            raise FormatError(f"it is of tenant {delta.tenant}, and this is a companion of {self._tenant}")
        if delta.epoch_from or holder is None:
            raise FormatError("not what this program has written")
        if digest_of((row.key, row_digest(row)) for row in delta.rows) != delta.digest:
            raise IntegrityError("the rows are not all that their digest is of")
        check_head(self._tenant, delta.head, holder.key)
        self._bodies = {row.key: read_body(row.kind, row.body) for row in delta.rows}
        self._rows = {row.key: row for row in delta.rows}
        self._terms, self._head, self._digest = terms, delta.signature, delta.digest
        self.term, self.epoch = delta.term, delta.epoch_to
