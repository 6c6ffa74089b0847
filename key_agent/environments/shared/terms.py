"""Who may write shared rows: whoever holds the term, and why a new term is believed.

1. A row belongs to a term. It counts only with the signature of the agent that held that term, by the key
   that the term's own row names, in the epochs between the term's beginning and the next one's. Any other
   environment's registry key signs nothing.
2. A term's row holds the digest of the row of the term before. Who believes one, knows all before it.
3. A term after the first begins on a registry that the term before has signed (`Grounds.built_on`), and only
   for an environment that counted: in the rows known before, or in newer ones that their term's holder has
   signed. The latter come with the term, so whoever missed "b is active again" before "b is the manager" is
   not stuck. What is not newer than what is known, and differs from it, proves nothing.
4. Appointed: it is the next number, and two administrators, known in the same way, have signed agent, key,
   environment, number, and the registry it goes on from (its epoch, or a later one of the same term).
   Elected: the election is asked about it; that is the caller's (`Judgement.elected`).
5. Whoever holds the newest term goes on writing only while the environment that the term's row names counts
   in the rows known before (its agent may have had another one, that was retired):
   the last thing that is taken from it is its own withdrawal. Then another one has to follow, unless there
   is no other one left that could. Rows that it has signed since do not begin the next term either.
6. Two promotions in a split network can have one number. Then the one that was asked for later holds, by the
   moment that the administrators have signed. The other history is judged by ours: what the term that both
   have says after ours has left it is not newer than what we know. Its holder has lost it, perhaps for a
   reason, and still has the key.
7. While no environment counts, what the newest holder writes shows others nothing; is its key in other hands,
   it writes nothing. Two administrators appoint an environment (recovery.py), as in rule 4, with the registry
   key and the KEK that they have seen there. Such a term begins though its environment heals, and never while
   another one counts; and where the key of the holder before is in other hands, on exactly what is known.
"""

import bisect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from envelope.errors import FormatError, IntegrityError
from key_agent.environments.shared import approvals
from key_agent.environments.shared.approvals import Action, ApprovalError
from key_agent.environments.shared.documents import (
    AdminBody,
    AdminState,
    ApprovalBody,
    Body,
    EnvironmentBody,
    Grounds,
    Head,
    Kind,
    SharedRow,
    TermBody,
    check_head,
    check_row,
    read_body,
    read_registry_key,
    row_digest,
)
from key_agent.environments.shared.recovery import is_recovery, read_succession, recovery_payload
from key_agent.environments.states import EnvironmentState

type Key = tuple[Kind, str]
type Position = tuple[int, int]
"""Term, epoch."""

WATCHED: Final = frozenset({Kind.ENVIRONMENT, Kind.ADMIN})
"""Kinds of rows that a new term is judged by."""
_ON_ITS_WAY: Final = (EnvironmentState.PROVISIONING, EnvironmentState.JOINING)
_NO_EPOCH_AFTER: Final = 2**63 - 1
"""No epoch of a term is later."""


def term_id(term: int) -> str:
    """The id of a term's row."""
    return f"{term:020d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who held a term."""

    term: int
    start: int
    """The epoch that it began with."""
    agent: str
    environment: str
    """Its agent's; "": not known."""
    registry_key: str
    digest: bytes
    """Of its row."""
    rank: tuple[int, str] = (0, "")
    """Rule 6: the higher one holds."""
    recovers: bool = False
    """Rule 7."""

    @property
    def key(self) -> Ed25519PublicKey:
        return read_registry_key(self.registry_key)


@dataclass(frozen=True, slots=True)
class _Begun:
    holder: Holder
    row: SharedRow
    body: TermBody


class Terms:
    """Those of one set of rows."""

    def __init__(self, holders: Iterable[Holder] = ()) -> None:
        self._holders = {holder.term: holder for holder in holders}
        self._order = sorted(self._holders)

    @classmethod
    def of(cls, rows: Iterable[SharedRow]) -> Self:
        """By the term rows among *rows*. FormatError, IntegrityError: they are no chain (rule 2)."""
        return cls(one.holder for one in _chain(rows))

    @property
    def newest(self) -> Holder | None:
        return self._holders[self._order[-1]] if self._order else None

    def holders(self) -> Iterator[Holder]:
        """All of them, the oldest first."""
        return (self._holders[term] for term in self._order)

    def holder(self, term: int) -> Holder:
        """IntegrityError: nobody held it."""
        found = self._holders.get(term)
        if found is None:
            raise IntegrityError(f"nobody is known to have held term {term}")
        return found

    def has(self, holder: Holder) -> bool:
        known = self._holders.get(holder.term)
        return known is not None and known.digest == holder.digest

    def after(self, term: int) -> Holder | None:
        """The first that follows *term*."""
        at = bisect.bisect_right(self._order, term)
        return self._holders[self._order[at]] if at < len(self._order) else None

    def check(self, tenant: str, row: SharedRow) -> None:
        """Rule 1. IntegrityError."""
        holder = self.holder(row.term)
        if row.signer != holder.agent:
            raise IntegrityError(
                f"row {row.kind} {row.id} is {row.signer}'s, but term {row.term} is {holder.agent}'s"
            )
        following = self.after(row.term)
        if row.epoch < holder.start or (following is not None and row.epoch >= following.start):
            raise IntegrityError(f"row {row.kind} {row.id}: epoch {row.epoch} is none of term {row.term}")
        check_row(tenant, row, {row.signer: holder.key})


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What somebody has, as far as it decides whom to believe next."""

    position: Position = (0, 0)
    digest: str = ""
    """Of all rows at that position; "": not known."""
    terms: Terms = field(default_factory=Terms)
    digests: Mapping[Key, bytes] = field(default_factory=dict)
    """Of the rows of WATCHED kinds."""
    bodies: Mapping[Key, Body] = field(default_factory=dict)
    """Of these rows, where they are to be believed."""
    pins: Mapping[str, str] = field(default_factory=dict)
    """Registry keys by agent, of who may hold a term for somebody who knows no rows yet."""
    withdrawn: bool = False
    """All that is known of the environment of the newest term's holder, where there are no bodies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    terms: Terms
    overruled: bool = False
    """Another history, which ours has followed: not to be taken (rule 6)."""
    forked: bool = False
    """Another history, which has overruled ours."""
    elected: Holder | None = None
    """The newest of the new terms that were elected: the election has to be asked about it. What was begun
    before is its holder's word."""


def judge(tenant: str, known: Known, rows: Iterable[SharedRow]) -> Judgement:
    """Whether the terms among *rows*, all that somebody else has, may follow what is *known*.

    IntegrityError, FormatError: they may not.
    """
    chain = _chain(rows)
    at = _common(tenant, known, chain)
    mine, theirs = known.terms.newest, chain[-1].holder
    common = chain[at].holder
    forked = mine is not None and common.term < mine.term
    if mine is not None and forked:
        if (theirs.term, theirs.rank) <= (mine.term, mine.rank):
            return Judgement(terms=known.terms, overruled=True)
        known = Known(
            position=(common.term, _NO_EPOCH_AFTER),
            terms=known.terms,
            digests=known.digests,
            bodies=known.bodies,
        )
    elected: Holder | None = None
    for number in range(at + 1, len(chain)):
        before = Terms(one.holder for one in chain[:number])
        if _check_begun(tenant, known, before, chain[number - 1].holder, chain[number]):
            elected = chain[number].holder
    return Judgement(terms=Terms(one.holder for one in chain), forked=forked, elected=elected)


def check_goes_on(known: Known, holder: Holder) -> None:
    """Rule 5. IntegrityError: what *holder*, whose term is known, writes now is not to be taken."""
    if not known.terms.has(holder):
        return  # a new term: `judge` has judged it
    newest = known.terms.newest
    if known.withdrawn and newest is not None and newest.digest == holder.digest:
        raise IntegrityError(f"{holder.agent} holds term {holder.term}, but is known as withdrawn")
    if _is_in_other_hands(known, holder):
        raise IntegrityError(
            f"{holder.agent} holds term {holder.term}, but its registry key has been exposed: two "
            "administrators have to appoint an environment (`key-agent env recovery`)"
        )
    its = _known_environment(known, holder)
    if its is not None and not its.state.counts and not _none_counts(known):
        raise IntegrityError(
            f"{holder.agent} holds term {holder.term}, but its environment is {its.state}: "
            "another one has to follow (`key-agent env promote` there)"
        )


def goes_on(known: Known, holder: Holder) -> bool:
    """`check_goes_on`, as a word."""
    try:
        check_goes_on(known, holder)
    except IntegrityError:
        return False
    return True


def _chain(rows: Iterable[SharedRow]) -> Sequence[_Begun]:
    """The terms, oldest first (rule 2)."""
    found: list[_Begun] = []
    previous = ""
    for row in sorted((row for row in rows if row.kind is Kind.TERM), key=lambda row: row.id):
        body = cast("TermBody", read_body(row.kind, row.body))
        read_registry_key(body.registry_key)
        if row.id != term_id(row.term) or row.signer != body.agent:
            raise IntegrityError(f"the row of term {row.id} is {row.signer}'s, of term {row.term}")
        if body.previous != previous:
            raise IntegrityError(f"term {row.term} does not follow the one before it")
        digest = row_digest(row)
        previous = digest.hex()
        holder = Holder(
            term=row.term,
            start=row.epoch,
            agent=body.agent,
            environment=body.environment,
            registry_key=body.registry_key,
            digest=digest,
            rank=_rank(body.grounds),
            recovers=is_recovery(body.grounds),
        )
        found.append(_Begun(holder, row, body))
    if not found:
        raise IntegrityError("there are rows, but nobody held a term")
    return found


def _rank(grounds: Grounds | None) -> tuple[int, str]:
    if grounds is None or grounds.asked is None or grounds.approval is None:
        return (0, "")
    return (grounds.asked.requested_at_ms, grounds.approval)


def _common(tenant: str, known: Known, chain: Sequence[_Begun]) -> int:
    """The newest of *chain* that is known, or that a pinned agent holds."""
    for at in range(len(chain) - 1, -1, -1):
        holder = chain[at].holder
        if known.terms.has(holder):
            return at
        if known.terms.newest is None and known.pins.get(holder.agent) == holder.registry_key:
            check_row(tenant, chain[at].row, {holder.agent: holder.key})
            return at
    raise IntegrityError(
        "nobody whom the pins name holds a term"
        if known.terms.newest is None
        else "the terms are not a continuation of those that are known"
    )


def _check_begun(tenant: str, known: Known, before: Terms, previous: Holder, begun: _Begun) -> bool:
    """Rules 3 and 4; whether it was elected."""
    holder, body, grounds = begun.holder, begun.body, begun.body.grounds
    if grounds is None:
        raise IntegrityError(f"term {holder.term} does not say why it may begin")
    check_row(tenant, begun.row, {holder.agent: holder.key})
    head = grounds.built_on
    if head.term != previous.term or head.epoch < previous.start or holder.start != head.epoch + 1:
        raise IntegrityError(f"term {holder.term} does not go on from where term {previous.term} ended")
    check_head(tenant, head, previous.key)
    shown = _Shown(tenant, known, before, grounds)
    environment = shown.environment(body)
    if holder.recovers:
        _check_recovers(known, previous, grounds, shown, body)
        _check_approved(tenant, shown, body, holder.term, grounds)
        return False
    if (environment.agent_id, environment.registry_key) != (body.agent, body.registry_key):
        raise IntegrityError(f"{body.agent} is not the agent of {body.environment}, or has another key")
    if not environment.state.counts:
        raise IntegrityError(f"{body.environment} is {environment.state}: no term can begin there")
    if environment.registry_key_exposed:
        raise IntegrityError(f"the registry key of {body.environment} has been exposed")
    if grounds.approval is not None:
        _check_approved(tenant, shown, body, holder.term, grounds)
    return grounds.approval is None


def _check_recovers(
    known: Known, previous: Holder, grounds: Grounds, shown: "_Shown", body: TermBody
) -> None:
    """Rule 7, but for the approval. IntegrityError."""
    environments = shown.environments()
    own = environments[body.environment]
    # Who has digests alone is shown the rows by whoever asks: one that still counts could be left out.
    hidden = sorted(
        name for kind, name in known.digests if kind is Kind.ENVIRONMENT and name not in environments
    )
    if hidden:
        raise IntegrityError(f"nothing shows how {', '.join(hidden)} is: nobody is appointed")
    if own.agent_id != body.agent:
        raise IntegrityError(f"{body.agent} is not the agent of {body.environment}")
    if own.state is EnvironmentState.RETIRED or own.state in _ON_ITS_WAY:
        raise IntegrityError(f"{body.environment} is {own.state}: it has no keys to begin with")
    sound = sorted(one.name for one in environments.values() if one.state.counts and one is not own)
    if sound:
        raise IntegrityError(
            f"{', '.join(sound)} counts: no environment is appointed in its place (`key-agent env promote`)"
        )
    if body.registry_key == own.registry_key:
        if own.registry_key_exposed:
            raise IntegrityError(f"the registry key of {body.environment} has been exposed")
    elif any(_has_had(one, body.registry_key) for one in environments.values()):
        raise IntegrityError(f"the registry key of {body.environment} is one that an environment has had")
    exactly = (known.position[1], known.digest)
    bases: set[tuple[int | None, str]] = {(grounds.built_on.epoch, grounds.built_on.digest)}
    bases |= set() if grounds.asked is None else {_signed_base(grounds.asked)}
    is_withdrawn = known.withdrawn and known.terms.has(previous)
    if (is_withdrawn or _is_in_other_hands(known, previous)) and bases != {exactly}:
        raise IntegrityError(
            f"{previous.agent}'s registry key has been exposed: what it may have written after epoch "
            f"{known.position[1]} is not gone on from"
        )


def _has_had(body: EnvironmentBody, registry_key: str) -> bool:
    return registry_key in (body.registry_key, *(former.registry_key for former in body.former_keys))


def _known_environment(known: Known, holder: Holder) -> EnvironmentBody | None:
    # By its name: an agent may have had another environment before, that was retired.
    found = known.bodies.get((Kind.ENVIRONMENT, holder.environment))
    return found if isinstance(found, EnvironmentBody) else None


def _none_counts(known: Known) -> bool:
    bodies = [body for body in known.bodies.values() if isinstance(body, EnvironmentBody)]
    return bool(bodies) and not any(body.state.counts for body in bodies)


def _is_in_other_hands(known: Known, holder: Holder) -> bool:
    """Whether somebody else may have the key of *holder*, whose term is the newest known, and none counts."""
    its = _known_environment(known, holder)
    return (
        its is not None
        and its.registry_key_exposed
        and its.registry_key == holder.registry_key
        and known.position[0] == holder.term
        and _none_counts(known)
    )


def _shows_nothing(known: Known, holder: Holder) -> bool:
    """Rule 5, and rule 7: what *holder* has signed since is no ground for a term."""
    its = _known_environment(known, holder)
    if its is not None and not its.state.counts and _none_counts(known) and not holder.recovers:
        return True
    return not goes_on(known, holder)


class _Shown:
    """The rows that a term is judged by: known ones, and newer ones that it brings along."""

    def __init__(self, tenant: str, known: Known, before: Terms, grounds: Grounds) -> None:
        self._known = known
        self._brought: dict[Key, Body] = {}
        for row in grounds.rows:
            if row.kind not in WATCHED:
                raise IntegrityError("a term is not begun on rows of that kind")
            if known.digests.get(row.key) != row_digest(row):
                if (row.term, row.epoch) <= known.position or row.epoch > grounds.built_on.epoch:
                    continue  # not newer than what is known: what is known decides
                before.check(tenant, row)
                if _shows_nothing(known, before.holder(row.term)):
                    continue
            self._brought[row.key] = read_body(row.kind, row.body)

    def environment(self, body: TermBody) -> EnvironmentBody:
        found = self._find((Kind.ENVIRONMENT, body.environment))
        if not isinstance(found, EnvironmentBody):
            raise IntegrityError(f"nothing shows that there is an environment {body.environment}")
        return found

    def environments(self) -> dict[str, EnvironmentBody]:
        """All that there are, by name."""
        bodies = (*self._known.bodies.values(), *self._brought.values())
        return {body.name: body for body in bodies if isinstance(body, EnvironmentBody)}

    def admins(self, names: Iterable[str]) -> dict[str, AdminBody]:
        """Those of them who may sign."""
        found = {name: self._find((Kind.ADMIN, name)) for name in names}
        return {
            name: body
            for name, body in found.items()
            if isinstance(body, AdminBody) and body.state is AdminState.ACTIVE
        }

    def _find(self, key: Key) -> Body | None:
        return self._brought.get(key) or self._known.bodies.get(key)


def promotion_payload(
    *, agent: str, environment: str, registry_key: str, term: int, epoch: int, digest: str
) -> dict[str, object]:
    """What two administrators sign: *agent* holds the term after *term*, from that epoch of it on."""
    return {
        "agent": agent,
        "builds_on": {"digest": digest, "epoch": epoch, "term": term},
        "environment": environment,
        "registry_key": registry_key,
        "term": term + 1,
    }


def check_appointment(
    tenant: str,
    approval: str,
    asked: ApprovalBody,
    admins: Mapping[str, AdminBody],
    *,
    action: Action,
    agent: str,
    environment: str,
    registry_key: str,
    built_on: Head,
    now_ms: int,
) -> tuple[str, ...]:
    """The administrators who have signed that *agent* goes on from *built_on*, by either of the two actions.

    ApprovalError; FormatError: a recovery names no KEKs.
    """
    epoch, digest = _signed_base(asked)
    is_later = epoch is not None and epoch < built_on.epoch
    said: dict[str, Any] = {
        "agent": agent,
        "environment": environment,
        "registry_key": registry_key,
        "term": built_on.term,
        "epoch": epoch if is_later else built_on.epoch,
        "digest": digest if is_later else built_on.digest,
    }
    return approvals.check_granted(
        tenant,
        approval,
        asked,
        admins,
        action=action,
        subject=environment,
        payload=promotion_payload(**said)
        if action is Action.ENVIRONMENT_PROMOTE
        else recovery_payload(**said, by=read_succession(asked.payload)),
        now_ms=now_ms,
    )


def _signed_base(asked: ApprovalBody) -> tuple[int | None, str]:
    """Epoch and digest that the payload names, anybody's words still; check_granted compares all of it."""
    try:
        base = json.loads(asked.payload)["builds_on"]
        epoch, digest = base["epoch"], base["digest"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, ""
    return (epoch, digest) if isinstance(epoch, int) and isinstance(digest, str) else (None, "")


def _check_approved(tenant: str, shown: _Shown, body: TermBody, term: int, grounds: Grounds) -> None:
    approval, asked = grounds.approval or "", grounds.asked
    if term != grounds.built_on.term + 1 or asked is None or asked.used_at_ms is None:
        raise IntegrityError(f"term {term} is not the one that was approved")
    unused = approvals.unused(asked)
    action = Action.ENVIRONMENT_RECOVER if is_recovery(grounds) else Action.ENVIRONMENT_PROMOTE
    try:
        check_appointment(
            tenant,
            approval,
            unused,
            shown.admins(asked.signatures),
            action=action,
            agent=body.agent,
            environment=body.environment,
            registry_key=body.registry_key,
            built_on=grounds.built_on,
            now_ms=asked.used_at_ms,
        )
    except (ApprovalError, FormatError) as error:
        raise IntegrityError(f"term {term}: {error}") from None
