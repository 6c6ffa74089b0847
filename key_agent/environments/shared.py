"""The shared registry: signed rows in this environment's database, one epoch after the other.

1. One agent writes, the manager; each write is one transaction and the next epoch. The others apply deltas,
   each in one transaction, in the order of epochs; what leaves a gap is refused and asked for again.
2. A term that is lower than one seen writes nothing (StaleTermError). A higher one may have another history:
   then its rows replace ours whole, but a key that was more restricted in ours stays so, and one that ours
   has used is deactivated while the other has not used it yet.
3. Every row bears the signature of whoever held its term, and the whole two: the head (digest and position),
   signed by the newest term's holder, and a seal, the same signed by this agent, both written in the same
   transaction. The mark (mark.py) says outside of the database how far it was.
4. `verify` compares all of it: rows, signatures, head, seal, mark, projections. What does not fit is
   RegistryTamperedError, and nothing of it is served before it was replaced by what another agent has.
5. Whether a new term is believed terms.py judges, by the rows that were here before it.
6. The wraps of a destroyed key are erased where its end is shown to be meant: it was never used, or two
   administrators have signed it. Without that it is destroyed in name; nothing is lost (endings.py).
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import batched
from pathlib import Path
from typing import Any, Final, Self, cast

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, bindparam, delete, insert, select, update

from envelope.errors import FormatError, IntegrityError
from envelope.keys import KeyState
from key_agent.environments.documents import (
    AdminBody,
    ApprovalBody,
    Body,
    DekBody,
    Delta,
    EnvironmentBody,
    FormerKey,
    Grounds,
    Head,
    IncidentBody,
    IncidentKeyBody,
    KekBody,
    Kind,
    RingBody,
    ServiceBody,
    SharedRow,
    TenantBody,
    TermBody,
    check_head,
    check_shape,
    digest_of,
    read_body,
    read_registry_key,
    row_digest,
    sign_head,
    sign_row,
)
from key_agent.environments.endings import check_kept, may_erase
from key_agent.environments.mark import Mark, MarkError, MarkHolder, read_mark, write_mark
from key_agent.environments.projection import clear, differences, project
from key_agent.environments.registry_key import public_text
from key_agent.environments.states import restrictiveness
from key_agent.environments.terms import (
    WATCHED,
    Holder,
    Judgement,
    Known,
    Terms,
    check_goes_on,
    goes_on,
    judge,
    term_id,
)
from key_agent.errors import KeyAgentError
from key_agent.registry.store import Registry
from key_agent.registry.tables import shared_row, shared_seal

_SEAL_DOMAIN: Final = b"sealgate/v1 registry seal\0"
_ONE: Final = 1
_BATCH: Final = 500
_MANY: Final = 1000
"""Rows whose signatures, or whose digest, take longer than others should wait for the event loop."""
_UPDATE_ROW: Final = (
    update(shared_row)
    .where(shared_row.c.kind == bindparam("b_kind"), shared_row.c.id == bindparam("b_id"))
    .values({name: bindparam(f"b_{name}") for name in ("term", "epoch", "signer", "body", "signature")})
)

type Key = tuple[Kind, str]
type Confirm = Callable[[Holder], Awaitable[None]]
"""IntegrityError unless the election gave that holder its term. What else it raises: nobody can tell."""
type AlsoWrite = Callable[[Connection], object]
"""Writes to this environment's own tables, in the transaction that writes the shared rows."""


class StaleTermError(KeyAgentError):
    """It was written under a term that another manager has followed."""

    next_step = "ask the newest manager: `key-agent env list` names it"


class EpochGapError(KeyAgentError):
    """A delta that does not begin where this registry ends, or does not lead to what it says."""

    def __init__(self, own_epoch: int) -> None:
        super().__init__(f"the shared registry is at epoch {own_epoch}")
        self.own_epoch = own_epoch

    next_step = "send what is missing, or everything"


class RegistryTamperedError(KeyAgentError):
    """The shared registry is not what was written: edited, rolled back, or incomplete."""

    next_step = (
        "find out who has written to the database; the agent takes the rows of another environment as soon "
        "as it reaches one"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """All shared rows at one epoch."""

    term: int = 0
    epoch: int = 0
    digest: str = ""
    tenant: TenantBody | None = None
    terms: Mapping[str, TermBody] = field(default_factory=dict)
    environments: Mapping[str, EnvironmentBody] = field(default_factory=dict)
    keks: Mapping[str, KekBody] = field(default_factory=dict)
    services: Mapping[str, ServiceBody] = field(default_factory=dict)
    rings: Mapping[str, RingBody] = field(default_factory=dict)
    deks: Mapping[str, DekBody] = field(default_factory=dict)
    incidents: Mapping[str, IncidentBody] = field(default_factory=dict)
    incident_keys: Mapping[str, IncidentKeyBody] = field(default_factory=dict)
    admins: Mapping[str, AdminBody] = field(default_factory=dict)
    approvals: Mapping[str, ApprovalBody] = field(default_factory=dict)
    head: str = ""
    """The signature of the newest term's holder under term, epoch and digest."""


_FIELDS: Final[Mapping[Kind, str]] = {
    Kind.TERM: "terms",
    Kind.ENVIRONMENT: "environments",
    Kind.KEK: "keks",
    Kind.SERVICE: "services",
    Kind.RING: "rings",
    Kind.DEK: "deks",
    Kind.INCIDENT: "incidents",
    Kind.INCIDENT_KEY: "incident_keys",
    Kind.ADMIN: "admins",
    Kind.APPROVAL: "approvals",
}


class Draft:
    """What a write is about to change: `put` bodies, look at `shared` as they leave it."""

    def __init__(self, shared: Shared, *, tenant_id: str, now_ms: int) -> None:
        self.epoch: Final = shared.epoch + 1
        """The epoch this write will have."""
        self.now_ms: Final = now_ms
        self.changed: dict[Key, Body] = {}
        self._tenant_id = tenant_id
        self._kinds: dict[Kind, dict[str, Body]] = {}
        self._before = shared
        self._shared: Shared = shared

    @property
    def shared(self) -> Shared:
        return self._shared

    def put(self, kind: Kind, row_id: str, body: Body) -> None:
        """Set a row. One that is as it was changes nothing."""
        if kind is Kind.TENANT:
            self._shared = _changed(self._shared, tenant=cast("TenantBody", body))
        else:
            if kind not in self._kinds:  # the first of its kind: from now on ours to change
                self._kinds[kind] = dict(getattr(self._shared, _FIELDS[kind]))
                self._shared = _changed(self._shared, **{_FIELDS[kind]: self._kinds[kind]})
            self._kinds[kind][row_id] = body
        if self._body_before(kind, row_id) == body:
            self.changed.pop((kind, row_id), None)
        else:
            self.changed[kind, row_id] = body

    def _body_before(self, kind: Kind, row_id: str) -> Body | None:
        if kind is Kind.TENANT:
            return self._before.tenant if row_id == self._tenant_id else None
        found: Body | None = getattr(self._before, _FIELDS[kind]).get(row_id)
        return found


def _changed(shared: Shared, **changes: Any) -> Shared:
    fields = {name: getattr(shared, name) for name in Shared.__dataclass_fields__}
    return Shared(**(fields | changes))


@dataclass(slots=True)
class _State:
    """All rows as they were committed last."""

    rows: dict[Key, SharedRow] = field(default_factory=dict)
    bodies: dict[Key, Body] = field(default_factory=dict)
    digests: dict[Key, bytes] = field(default_factory=dict)
    shared: Shared = field(default_factory=Shared)
    terms: Terms = field(default_factory=Terms)

    def sign(self, signature: str) -> None:
        """The head is *signature* by the newest term's holder."""
        self.shared = _changed(self.shared, head=signature)

    @property
    def known(self) -> Known:
        """As far as it decides whom to believe next."""
        watched = [key for key in self.rows if key[0] in WATCHED]
        return Known(
            position=(self.shared.term, self.shared.epoch),
            terms=self.terms,
            digests={key: self.digests[key] for key in watched},
            bodies={key: self.bodies[key] for key in watched},
        )


class SharedRegistry:
    """Of one environment's agent; use `open`."""

    def __init__(self, registry: Registry, *, key: Ed25519PrivateKey, state_dir: Path) -> None:
        self._registry = registry
        self._key = key
        self._state_dir = state_dir
        self._pins: dict[str, str] = {}
        self._verified: dict[Key, bytes] = {}
        """Digest of each row whose signature was found right."""
        self._state: _State | None = None
        self._mark: Mark | None = None
        self._one_at_a_time = asyncio.Lock()
        self.confirm: Confirm | None = None
        """Asks the election about a new term; None: there is none, so no elected term is believed."""

    @classmethod
    async def open(cls, registry: Registry, *, key: Ed25519PrivateKey, state_dir: Path) -> Self:
        """*key*: this environment's registry key. Nothing is read yet: `snapshot` and `verify` do that."""
        return cls(registry, key=key, state_dir=state_dir)

    def pin(self, agent_id: str, registry_key: str) -> None:
        """While there are no rows yet: *agent_id*, by this public key (base64url), may hold the newest term.

        FormatError if it is none.
        """
        read_registry_key(registry_key)
        self._pins[agent_id] = registry_key

    async def snapshot(self) -> Shared:
        """The rows of now, verified when they were first read. RegistryTamperedError, RegistryError."""
        async with self._one_at_a_time:
            return (await self._loaded()).shared

    async def verify(self) -> None:
        """Read everything again and compare (rule 4). RegistryTamperedError, RegistryError."""
        async with self._one_at_a_time:
            self._state = None
            await self._loaded()

    async def write(
        self,
        change: Callable[[Draft], object],
        *,
        term: int,
        now_ms: int,
        also: AlsoWrite | None = None,
    ) -> Delta:
        """The manager's: what *change* puts becomes the next epoch. It may be called once only, and is pure.

        *also* writes to this environment's own tables in the same transaction, after the rows; it is not run
        if *change* put nothing new. Returns what changed. StaleTermError; what *change* raises.
        """
        async with self._one_at_a_time:
            state = await self._loaded()
            if term < state.shared.term:
                raise StaleTermError(f"term {term} is over: {state.shared.term} has been seen")
            return await self._write(state, change, term=term, now_ms=now_ms, also=also)

    async def begin_term(
        self,
        term: int,
        *,
        cause: str,
        now_ms: int,
        approval: tuple[str, ApprovalBody] | None = None,
    ) -> Delta:
        """This agent holds *term* from now on: appointed by *approval* (id, and what was signed), or elected.

        It is judged as the others will judge it. StaleTermError; IntegrityError: they would not believe it.
        """
        async with self._one_at_a_time:
            state = await self._loaded()
            before = state.terms.newest
            if before is None or term <= before.term:
                raise StaleTermError(f"term {term} cannot follow term {state.shared.term}")
            grounds = self._grounds(state, None if approval is None else approval[1])
            if approval is not None:
                used = msgspec.structs.replace(approval[1], used_at_ms=now_ms, used_for=f"term {term}")
                grounds = msgspec.structs.replace(grounds, approval=approval[0], asked=used)
            body = TermBody(
                agent=self._registry.agent_id,
                environment=self._registry.environment_id,
                registry_key=public_text(self._key),
                since_ms=now_ms,
                cause=cause,
                previous=before.digest.hex(),
                grounds=grounds,
            )

            def change(draft: Draft) -> None:
                draft.put(Kind.TERM, term_id(term), body)
                if approval is not None and grounds.asked is not None:
                    draft.put(Kind.APPROVAL, approval[0], grounds.asked)

            return await self._write(state, change, term=term, now_ms=now_ms)

    def _grounds(self, state: _State, asked: ApprovalBody | None) -> Grounds:
        signers = () if asked is None else tuple(asked.signatures)
        wanted = [
            (Kind.ENVIRONMENT, self._registry.environment_id),
            *((Kind.ADMIN, name) for name in signers),
        ]
        shared = state.shared
        return Grounds(
            built_on=Head(term=shared.term, epoch=shared.epoch, digest=shared.digest, signature=shared.head),
            rows=tuple(state.rows[key] for key in wanted if key in state.rows),
        )

    async def _write(
        self,
        state: _State,
        change: Callable[[Draft], object],
        *,
        term: int,
        now_ms: int,
        also: AlsoWrite | None = None,
    ) -> Delta:
        draft = Draft(state.shared, tenant_id=self._tenant, now_ms=now_ms)
        change(draft)
        self._restrict(draft)
        if not draft.changed:
            return self._delta(state, state.shared.epoch)

        def prepared() -> tuple[list[SharedRow], _State]:
            rows = self._signed(draft, state, term)
            after = self._after(state, rows, term=term, epoch=draft.epoch)
            shared = after.shared
            head = sign_head(
                self._key, tenant=self._tenant, term=term, epoch=shared.epoch, digest=shared.digest
            )
            after.sign(head.signature)
            self._check_own(state, after)
            return rows, after

        rows, after = await _beside(len(state.rows) + len(draft.changed), prepared)
        await self._store(
            after,
            rows,
            before=state.bodies,
            gone=(),
            now_ms=now_ms,
            restrictions=self._still_restricted(after),
            also=also,
        )
        return self._delta(after, draft.epoch - 1)

    def _check_own(self, state: _State, after: _State) -> None:
        """StaleTermError unless this agent holds the term that it has written in; IntegrityError unless the
        others will believe that it does.
        """
        holder = after.terms.newest
        mine = (after.shared.term, self._registry.agent_id, public_text(self._key))
        if holder is None or (holder.term, holder.agent, holder.registry_key) != mine:
            raise StaleTermError(f"term {after.shared.term} is not this agent's")
        if state.terms.newest is not None:
            judge(self._tenant, state.known, after.rows.values())
            check_goes_on(state.known, holder)

    async def apply(self, delta: Delta, *, now_ms: int) -> None:
        """Take *delta* over (rule 1, 2). Nothing of it holds unless all of it does.

        StaleTermError, EpochGapError, IntegrityError, FormatError, RegistryTamperedError, RegistryError.
        """
        async with self._one_at_a_time:
            state = await self._loaded()
            shared = state.shared
            if delta.tenant != self._tenant:
                raise IntegrityError(f"a delta of {delta.tenant} came to {self._tenant}")
            if delta.term < shared.term:
                raise StaleTermError(f"term {delta.term} is over: {shared.term} has been seen")
            check_shape(delta)
            is_fork = any(
                row.kind is Kind.TERM and row.key in state.rows and row_digest(row) != state.digests[row.key]
                for row in delta.rows
            )
            if not is_fork and (delta.term, delta.epoch_to) <= (shared.term, shared.epoch):
                if (delta.term, delta.epoch_to, delta.digest) == (shared.term, shared.epoch, shared.digest):
                    return
                raise EpochGapError(shared.epoch)
            if delta.epoch_from == 0:
                await self._replace(state, state.known, delta, now_ms)
                return
            if is_fork or delta.epoch_from != shared.epoch:
                raise EpochGapError(shared.epoch)
            after = await self._after_delta(state, delta)
            await self._check(delta, state.known, after)
            if after.shared.digest != delta.digest:
                raise EpochGapError(shared.epoch)  # another history up to here
            check_kept(state.bodies, after.bodies, changed=[row.key for row in delta.rows])
            restrictions = self._still_restricted(after)
            await self._store(
                after,
                delta.rows,
                before=state.bodies,
                gone=(),
                now_ms=now_ms,
                restrictions=restrictions,
            )

    async def restore(self, delta: Delta, *, now_ms: int) -> None:
        """Put everything another agent has (*delta* from epoch 0) in place of rows that do not fit.

        Never older than the mark. Errors as `apply`.
        """
        async with self._one_at_a_time:
            if delta.tenant != self._tenant or delta.epoch_from != 0:
                raise FormatError("a registry is restored from all rows of its tenant")
            mark = await self._read_mark()
            if mark is not None and (delta.term, delta.epoch_to) < mark.position:
                raise StaleTermError(
                    f"epoch {delta.epoch_to} of term {delta.term} is older than what was here: "
                    f"{mark.epoch} of {mark.term}"
                )
            rows = await self._registry.transact(_read_rows)
            # What these rows say counts for nothing: anybody may have written it. The mark knows better.
            known = Known() if mark is None else mark.known
            if mark is not None and (delta.term, delta.epoch_to, delta.digest) == (
                *mark.position,
                mark.digest,
            ):
                known = replace(known, withdrawn=False)  # what was here itself, the withdrawal last
            await self._replace(_State(rows=rows), known, delta, now_ms)

    async def since(self, epoch: int) -> Delta:
        """What changed after *epoch*; everything for 0. RegistryTamperedError, RegistryError."""
        async with self._one_at_a_time:
            return self._delta(await self._loaded(), epoch)

    # ---- reading

    @property
    def _tenant(self) -> str:
        return self._registry.tenant_id

    async def _loaded(self) -> _State:
        if self._state is None:
            mark = await self._read_mark()
            self._state = await self._registry.transact(lambda c: self._load(c, mark))
            shared = self._state.shared
            if mark is None or mark.position < (shared.term, shared.epoch):
                await self._write_mark(shared, {} if mark is None else mark.restrictions, self._state)
        return self._state

    async def _read_mark(self) -> Mark | None:
        registry = self._registry
        try:
            self._mark = await asyncio.to_thread(
                read_mark,
                self._state_dir,
                self._key,
                tenant=registry.tenant_id,
                environment=registry.environment_id,
            )
        except (MarkError, OSError) as error:
            raise RegistryTamperedError(str(error)) from None
        return self._mark

    def _load(self, c: Connection, mark: Mark | None) -> _State:
        rows = _read_rows(c)
        seal = c.execute(select(shared_seal)).one_or_none()
        if not rows and seal is None:
            if mark is not None and mark.epoch > 0:
                raise RegistryTamperedError("the shared rows are gone")
            return _State()
        if mark is None:
            raise RegistryTamperedError("there are shared rows, but no mark of them in the state directory")
        if seal is None:
            raise RegistryTamperedError("the seal of the shared rows is gone")
        digests = {key: row_digest(row) for key, row in rows.items()}
        digest = digest_of(digests.items())
        self._check_seal(seal, digest)
        if (seal.term, seal.epoch) < mark.position:
            raise RegistryTamperedError(
                f"the shared rows are those of epoch {seal.epoch}; epoch {mark.epoch} was here already"
            )
        if (seal.term, seal.epoch) == mark.position and digest != mark.digest:
            raise RegistryTamperedError("the shared rows are not those that the mark is of")
        bodies, terms = self._check_rows(rows, digests)
        self._check_stored_head(seal, terms)
        shared = _view(bodies, term=seal.term, epoch=seal.epoch, digest=digest, tenant_id=self._tenant)
        wrong = differences(c, _restricted(bodies, mark.restrictions), tenant_id=self._tenant)
        if wrong:
            raise RegistryTamperedError(
                f"{len(wrong)} values are not what the signed rows say: {', '.join(wrong[:3])}"
            )
        return _State(
            rows=rows,
            bodies=bodies,
            digests=digests,
            shared=_changed(shared, head=seal.head_signature),
            terms=terms,
        )

    def _check_stored_head(self, seal: Any, terms: Terms) -> None:
        head = Head(term=seal.term, epoch=seal.epoch, digest=seal.digest, signature=seal.head_signature)
        try:
            check_head(self._tenant, head, terms.holder(seal.term).key)
        except IntegrityError as error:
            raise RegistryTamperedError(str(error)) from None

    def _check_seal(self, seal: Any, digest: str) -> None:
        try:
            self._key.public_key().verify(
                bytes.fromhex(seal.signature), self._seal_bytes(seal.term, seal.epoch, seal.digest)
            )
        except (InvalidSignature, ValueError):
            raise RegistryTamperedError("the seal of the shared rows is not this agent's") from None
        if digest != seal.digest:
            raise RegistryTamperedError("the shared rows are not those that were sealed")

    def _check_rows(
        self, rows: Mapping[Key, SharedRow], digests: Mapping[Key, bytes]
    ) -> tuple[dict[Key, Body], Terms]:
        try:
            bodies = {key: read_body(row.kind, row.body) for key, row in rows.items()}
            terms = Terms.of(rows.values())
            for key, row in rows.items():
                if self._verified.get(key) != digests[key]:
                    terms.check(self._tenant, row)
                    self._verified[key] = digests[key]
        except (FormatError, IntegrityError) as error:
            raise RegistryTamperedError(str(error)) from None
        return bodies, terms

    # ---- writing

    def _restrict(self, draft: Draft) -> None:
        """What another history had restricted is written down by the new one."""
        restrictions = {} if self._mark is None else self._mark.restrictions
        for key_id, state in restrictions.items():
            body = draft.shared.deks.get(key_id)
            if body is not None and restrictiveness(body.state) < restrictiveness(state):
                draft.put(
                    Kind.DEK,
                    key_id,
                    msgspec.structs.replace(
                        body, state=state, since_ms=draft.now_ms, reason="restricted under another manager"
                    ),
                )

    def _signed(self, draft: Draft, state: _State, term: int) -> list[SharedRow]:
        rows = []
        for (kind, row_id), body in draft.changed.items():
            written = body
            if isinstance(written, EnvironmentBody):
                before = state.bodies.get((kind, row_id))
                written = _with_former_keys(written, cast("EnvironmentBody | None", before), draft.epoch)
            rows.append(
                sign_row(
                    self._key,
                    tenant=self._tenant,
                    kind=kind,
                    row_id=row_id,
                    body=written,
                    term=term,
                    epoch=draft.epoch,
                    signer=self._registry.agent_id,
                )
            )
        return rows

    async def _replace(self, state: _State, known: Known, delta: Delta, now_ms: int) -> None:
        """Everything of *delta* in place of all that is here, if *known* lets its writer be believed."""
        after = await self._after_delta(_State(), delta)
        if after.shared.digest != delta.digest:
            raise IntegrityError("a delta's rows are not those of its digest")
        judged = await self._check(delta, known, after)
        if judged.forked:
            await self._lower_mark(after)
        elif not _leaves(judged.terms, state):
            check_kept(state.bodies, after.bodies)
        restrictions = self._restrictions_between(state, after)
        gone = [key for key in state.rows if key not in after.rows]
        await self._store(
            after,
            list(after.rows.values()),
            before=state.bodies,
            gone=gone,
            now_ms=now_ms,
            restrictions=restrictions,
        )

    async def _check(self, delta: Delta, known: Known, after: _State) -> Judgement:
        """By whom *after*, to which *delta* leads, was written: the holders of its terms, and nobody else."""
        check_shape(delta)
        if known.terms.newest is None:
            known = Known(pins=self._pins)
        judged = judge(self._tenant, known, after.rows.values())
        if judged.overruled:
            raise StaleTermError(f"term {delta.term} has two managers, and ours was approved later")
        holder = judged.terms.newest
        if holder is None or (holder.term, holder.agent) != (delta.term, delta.signer):
            raise IntegrityError(f"a delta of term {delta.term} is not its holder's")
        check_goes_on(known, holder)
        check_head(self._tenant, delta.head, holder.key)

        def check_rows() -> None:
            for row in delta.rows:
                judged.terms.check(self._tenant, row)

        await _beside(len(delta.rows), check_rows)
        if judged.elected is not None:
            if self.confirm is None:
                raise IntegrityError(f"term {judged.elected.term} was elected, and no election is known here")
            await self.confirm(judged.elected)
        after.sign(delta.signature)
        return judged

    async def _lower_mark(self, after: _State) -> None:
        """Another history of the same term may be shorter than ours: after a crash it has to be believed."""
        if self._mark is None:
            return
        start = after.terms.newest
        lowest = (after.shared.term, 0) if start is None else (start.term, start.start)
        if lowest < self._mark.position:
            await self._keep_mark(msgspec.structs.replace(self._mark, term=lowest[0], epoch=0, digest=""))

    def _after(self, state: _State, rows: Iterable[SharedRow], *, term: int, epoch: int) -> _State:
        """*state* after *rows*: values, nothing is written, nothing is checked but the terms' order."""
        return _with(state, rows, term=term, epoch=epoch, tenant_id=self._tenant)

    async def _after_delta(self, state: _State, delta: Delta) -> _State:
        def after() -> _State:
            return self._after(state, delta.rows, term=delta.term, epoch=delta.epoch_to)

        return await _beside(len(state.rows) + len(delta.rows), after)

    def _restrictions_between(self, before: _State, after: _State) -> dict[str, KeyState]:
        kept = dict({} if self._mark is None else self._mark.restrictions)
        for (kind, row_id), body in before.bodies.items():
            if kind is Kind.DEK and isinstance(body, DekBody):
                known = kept.get(row_id, body.state)
                kept[row_id] = max(known, body.state, key=restrictiveness)
        return _still(kept, after)

    def _still_restricted(self, after: _State) -> dict[str, KeyState]:
        return _still({} if self._mark is None else self._mark.restrictions, after)

    async def _store(
        self,
        after: _State,
        rows: Iterable[SharedRow],
        *,
        before: Mapping[Key, Body],
        gone: Iterable[Key],
        now_ms: int,
        restrictions: Mapping[str, KeyState],
        also: AlsoWrite | None = None,
    ) -> None:
        written, removed, shared = list(rows), list(gone), after.shared

        was = _restricted(before, {} if self._mark is None else self._mark.restrictions)
        ended = {
            row.id: (cast("DekBody | None", was.get(row.key)), cast("DekBody", after.bodies[row.key]))
            for row in written
            if row.kind is Kind.DEK
        }
        erasable = may_erase(self._tenant, ended, shared.approvals, shared.admins)

        def work(c: Connection) -> None:
            for key in removed:
                c.execute(delete(shared_row).where(shared_row.c.kind == key[0], shared_row.c.id == key[1]))
            for some in batched(written, _BATCH):
                _write_rows(c, some)
            clear(c, removed, now_ms=now_ms)
            changed = {row.key: after.bodies[row.key] for row in written}
            project(
                c,
                _restricted(changed, restrictions),
                tenant_id=self._tenant,
                now_ms=now_ms,
                may_erase=erasable,
            )
            if also is not None:
                also(c)
            signature = self._key.sign(self._seal_bytes(shared.term, shared.epoch, shared.digest)).hex()
            c.execute(delete(shared_seal))
            c.execute(
                insert(shared_seal).values(
                    id=_ONE,
                    term=shared.term,
                    epoch=shared.epoch,
                    digest=shared.digest,
                    signature=signature,
                    head_signature=shared.head,
                )
            )

        if self._mark is None:
            # Before the first rows: without a mark they would not be believed after a crash.
            await self._write_mark(Shared(), {}, _State())
        self._state = None  # whatever happens now is read anew
        await self._registry.transact(work)
        await self._write_mark(shared, restrictions, after)
        self._verified |= {row.key: after.digests[row.key] for row in written}
        self._state = after

    async def _write_mark(self, shared: Shared, restrictions: Mapping[str, KeyState], state: _State) -> None:
        """RegistryTamperedError: where it cannot be written, what was stored cannot be proven later."""
        holder = state.terms.newest
        is_over = holder is not None and not goes_on(state.known, holder)
        await self._keep_mark(
            Mark(
                tenant=self._tenant,
                environment=self._registry.environment_id,
                term=shared.term,
                epoch=shared.epoch,
                digest=shared.digest,
                restrictions=dict(restrictions),
                holder=None if holder is None else MarkHolder.of(holder),
                rows={f"{key[0]} {key[1]}": digest.hex() for key, digest in state.known.digests.items()},
                withdrawn=True if is_over else msgspec.UNSET,
            )
        )

    async def _keep_mark(self, mark: Mark) -> None:
        try:
            await asyncio.to_thread(write_mark, self._state_dir, self._key, mark)
        except OSError as error:
            raise RegistryTamperedError(f"the mark cannot be written: {error}") from None
        self._mark = mark

    def _seal_bytes(self, term: int, epoch: int, digest: str) -> bytes:
        return _SEAL_DOMAIN + f"{self._tenant}\0{term}\0{epoch}\0{digest}".encode()

    def _delta(self, state: _State, epoch: int) -> Delta:
        start = min(epoch, state.shared.epoch)
        rows = tuple(row for row in state.rows.values() if row.epoch > start)
        holder = state.terms.newest
        return Delta(
            tenant=self._tenant,
            term=state.shared.term,
            epoch_from=start,
            epoch_to=state.shared.epoch,
            rows=rows,
            digest=state.shared.digest,
            signer=self._registry.agent_id if holder is None else holder.agent,
            signature=state.shared.head,
        )


async def _beside[T](rows: int, work: Callable[[], T]) -> T:
    """What *work* returns; in a thread if it is about many rows: whoever asks meanwhile is answered.

    It touches nothing but values, or what the caller's lock keeps to itself.
    """
    return work() if rows < _MANY else await asyncio.to_thread(work)


def _with_former_keys(body: EnvironmentBody, before: EnvironmentBody | None, epoch: int) -> EnvironmentBody:
    """Which keys it had, and until when."""
    former = () if before is None else before.former_keys
    if (
        before is not None
        and before.registry_key
        and (before.agent_id, before.registry_key)
        != (
            body.agent_id,
            body.registry_key,
        )
    ):
        gone = FormerKey(agent_id=before.agent_id, registry_key=before.registry_key, until_epoch=epoch - 1)
        former = (*former, gone)
    return msgspec.structs.replace(body, former_keys=former)


def _with(state: _State, rows: Iterable[SharedRow], *, term: int, epoch: int, tenant_id: str) -> _State:
    """*state* after *rows*: values, nothing is written."""
    after = _State(rows=dict(state.rows), bodies=dict(state.bodies), digests=dict(state.digests))
    for row in rows:
        after.rows[row.key] = row
        after.bodies[row.key] = read_body(row.kind, row.body)
        after.digests[row.key] = row_digest(row)
    digest = digest_of(after.digests.items())
    after.shared = _view(after.bodies, term=term, epoch=epoch, digest=digest, tenant_id=tenant_id)
    after.terms = Terms.of(after.rows.values())
    return after


def _view(bodies: Mapping[Key, Body], *, term: int, epoch: int, digest: str, tenant_id: str) -> Shared:
    kinds: dict[str, dict[str, Body]] = {name: {} for name in _FIELDS.values()}
    tenant: Body | None = None
    for (kind, row_id), body in bodies.items():
        if kind is not Kind.TENANT:
            kinds[_FIELDS[kind]][row_id] = body
        elif row_id == tenant_id:
            tenant = body
    fields: dict[str, Any] = {"term": term, "epoch": epoch, "digest": digest, "tenant": tenant, **kinds}
    return Shared(**fields)


def _restricted(bodies: Mapping[Key, Body], restrictions: Mapping[str, KeyState]) -> Mapping[Key, Body]:
    """*bodies* as the tables are to have them: keys at least as restricted as another history had them."""
    if not restrictions:
        return bodies
    changed = dict(bodies)
    for key_id, state in restrictions.items():
        body = changed.get((Kind.DEK, key_id))
        if isinstance(body, DekBody) and restrictiveness(body.state) < restrictiveness(state):
            changed[Kind.DEK, key_id] = msgspec.structs.replace(body, state=state)
    return changed


def _leaves(terms: Terms, ours: _State) -> bool:
    """Whether a term among *terms*, which follow ours, began before the end of *ours*: another history."""
    following = terms.after(ours.shared.term)
    return following is not None and following.start <= ours.shared.epoch


def _still(restrictions: Mapping[str, KeyState], after: _State) -> dict[str, KeyState]:
    """Those that the rows of now do not say themselves."""
    kept: dict[str, KeyState] = {}
    for key_id, state in restrictions.items():
        body = after.bodies.get((Kind.DEK, key_id))
        if not isinstance(body, DekBody):
            if state is not KeyState.PRE_ACTIVE:
                kept[key_id] = state  # should it come back, it has been used
            continue
        taken_away = restrictiveness(state) > restrictiveness(KeyState.DEACTIVATED)
        if taken_away and restrictiveness(body.state) < restrictiveness(state):
            kept[key_id] = state
        elif body.state is KeyState.PRE_ACTIVE and state is not KeyState.PRE_ACTIVE:
            kept[key_id] = KeyState.DEACTIVATED  # it has sealed: its wraps are not those of an unused key
    return kept


def _read_rows(c: Connection) -> dict[Key, SharedRow]:
    rows: dict[Key, SharedRow] = {}
    for row in c.execute(select(shared_row)):
        try:
            kind = Kind(row.kind)
        except ValueError:
            raise RegistryTamperedError(f"a shared row is of no known kind: {row.kind[:32]!r}") from None
        rows[kind, row.id] = SharedRow(
            kind=kind,
            id=row.id,
            term=row.term,
            epoch=row.epoch,
            signer=row.signer,
            body=row.body,
            signature=row.signature,
        )
    return rows


def _write_rows(c: Connection, rows: Sequence[SharedRow]) -> None:
    there: set[Key] = set()
    for kind in {row.kind for row in rows}:
        ids = [row.id for row in rows if row.kind is kind]
        query = select(shared_row.c.id).where(shared_row.c.kind == kind, shared_row.c.id.in_(ids))
        there |= {(kind, row_id) for row_id in c.scalars(query)}
    if known := [row for row in rows if row.key in there]:
        c.execute(
            _UPDATE_ROW, [{f"b_{name}": value for name, value in _columns(row).items()} for row in known]
        )
    if new := [row for row in rows if row.key not in there]:
        c.execute(insert(shared_row), [_columns(row) for row in new])


def _columns(row: SharedRow) -> dict[str, object]:
    return {
        "kind": row.kind.value,
        "id": row.id,
        "term": row.term,
        "epoch": row.epoch,
        "signer": row.signer,
        "body": row.body,
        "signature": row.signature,
    }
