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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Self, cast

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection

from envelope.errors import FormatError, IntegrityError
from envelope.keys import KeyState
from key_agent.environments.shared.approvals import Action
from key_agent.environments.shared.believing import Believing, Confirm, beside
from key_agent.environments.shared.documents import (
    ApprovalBody,
    Body,
    DekBody,
    Delta,
    EnvironmentBody,
    Grounds,
    Head,
    Kind,
    SharedRow,
    TermBody,
    check_head,
    check_shape,
    check_step,
    digest_of,
    read_body,
    read_registry_key,
    row_digest,
    sign_head,
    sign_row,
)
from key_agent.environments.shared.draft import Draft, with_former_keys
from key_agent.environments.shared.endings import check_kept, may_erase
from key_agent.environments.shared.forewords import Foreword, check_foreword
from key_agent.environments.shared.mark import Mark, MarkFile
from key_agent.environments.shared.projection import clear, differences, project
from key_agent.environments.shared.registry_key import public_text
from key_agent.environments.shared.restrictions import (
    put_restrictions,
    restricted,
    restrictions_between,
    still,
)
from key_agent.environments.shared.shared_errors import EpochGapError, RegistryTamperedError, StaleTermError
from key_agent.environments.shared.shared_state import State, delta_of, with_rows
from key_agent.environments.shared.shared_tables import (
    delete_rows,
    read_rows,
    read_seal,
    write_rows,
    write_seal,
)
from key_agent.environments.shared.shared_view import Key, Shared, changed, view_of
from key_agent.environments.shared.terms import (
    Known,
    Terms,
    check_goes_on,
    judge,
    term_id,
)
from key_agent.registry.store import Registry

type AlsoWrite = Callable[[Connection], object]
"""Writes to this environment's own tables, in the transaction that writes the shared rows."""


class SharedRegistry:
    """Of one environment's agent; use `open`."""

    def __init__(self, registry: Registry, *, key: Ed25519PrivateKey, state_dir: Path) -> None:
        self._registry = registry
        self._key = key
        self._verified: dict[Key, bytes] = {}
        """Digest of each row whose signature was found right."""
        self._state: State | None = None
        self._committed: State | None = None
        """The newest that was right, while the next is written or all is verified."""
        self._mark = MarkFile(state_dir, key, tenant=registry.tenant_id, environment=registry.environment_id)
        self._believing = Believing(registry.tenant_id)
        self._one_at_a_time = asyncio.Lock()

    @property
    def confirm(self) -> Confirm | None:
        """Asks the election about a new term; None: there is none, so no elected term is believed."""
        return self._believing.confirm

    @confirm.setter
    def confirm(self, confirm: Confirm | None) -> None:
        self._believing.confirm = confirm

    @classmethod
    async def open(cls, registry: Registry, *, key: Ed25519PrivateKey, state_dir: Path) -> Self:
        """*key*: this environment's registry key. Nothing is read yet: `snapshot` and `verify` do that."""
        return cls(registry, key=key, state_dir=state_dir)

    def pin(self, agent_id: str, registry_key: str) -> None:
        """While there are no rows yet: *agent_id*, by this public key (base64url), may hold the newest term.

        FormatError if it is none.
        """
        read_registry_key(registry_key)
        self._believing.pins[agent_id] = registry_key

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
        also: Callable[[Draft], object] | None = None,
    ) -> Delta:
        """This agent holds *term* from now on: appointed by *approval* (id, and what was signed), or elected.
        *also*: what changes in the same epoch.

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
                if also is not None:
                    also(draft)

            return await self._write(state, change, term=term, now_ms=now_ms)

    def _grounds(self, state: State, asked: ApprovalBody | None) -> Grounds:
        signers = () if asked is None else tuple(asked.signatures)
        shared = state.shared
        # That none counts has to be shown of all of them.
        is_recovery = asked is not None and asked.action == Action.ENVIRONMENT_RECOVER
        wanted = [
            *((Kind.ENVIRONMENT, name) for name in shared.environments if is_recovery),
            *(() if is_recovery else ((Kind.ENVIRONMENT, self._registry.environment_id),)),
            *((Kind.ADMIN, name) for name in signers),
        ]
        return Grounds(
            built_on=Head(term=shared.term, epoch=shared.epoch, digest=shared.digest, signature=shared.head),
            rows=tuple(state.rows[key] for key in wanted if key in state.rows),
        )

    async def _write(
        self,
        state: State,
        change: Callable[[Draft], object],
        *,
        term: int,
        now_ms: int,
        also: AlsoWrite | None = None,
    ) -> Delta:
        draft = Draft(state.shared, tenant_id=self._tenant, now_ms=now_ms)
        change(draft)
        put_restrictions(draft, self._mark.restrictions)
        if not draft.changed:
            return self._delta(state, state.shared.epoch)

        def prepared() -> tuple[list[SharedRow], State]:
            rows = self._signed(draft, state, term)
            after = with_rows(state, rows, term=term, epoch=draft.epoch, tenant_id=self._tenant)
            shared = after.shared
            head = sign_head(
                self._key, tenant=self._tenant, term=term, epoch=shared.epoch, digest=shared.digest
            )
            after.sign(head.signature)
            self._check_own(state, after)
            return rows, after

        rows, after = await beside(len(state.rows) + len(draft.changed), prepared)
        await self._store(
            after,
            rows,
            before=state.bodies,
            gone=(),
            now_ms=now_ms,
            restrictions=still(self._mark.restrictions, after.bodies),
            also=also,
        )
        return self._delta(after, draft.epoch - 1)

    def _check_own(self, state: State, after: State) -> None:
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
            check_step(delta, shared.epoch)
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
            await self._believing.check(delta, state.known, after)
            if after.shared.digest != delta.digest:
                raise EpochGapError(shared.epoch)  # another history up to here
            check_kept(state.bodies, after.bodies, changed=[row.key for row in delta.rows])
            restrictions = still(self._mark.restrictions, after.bodies)
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

        Never older than the mark, nor far ahead of it. Errors as `apply`.
        """
        async with self._one_at_a_time:
            if delta.tenant != self._tenant or delta.epoch_from != 0:
                raise FormatError("a registry is restored from all rows of its tenant")
            mark = await self._mark.read()
            if mark is not None and (delta.term, delta.epoch_to) < mark.position:
                raise StaleTermError(
                    f"epoch {delta.epoch_to} of term {delta.term} is older than what was here: "
                    f"{mark.epoch} of {mark.term}"
                )
            check_step(delta, 0 if mark is None else mark.epoch)
            rows = await self._registry.transact(read_rows)
            # What these rows say counts for nothing: anybody may have written it. The mark knows better.
            known = Known() if mark is None else mark.known
            if mark is not None and (delta.term, delta.epoch_to, delta.digest) == (
                *mark.position,
                mark.digest,
            ):
                known = replace(known, withdrawn=False)  # what was here itself, the withdrawal last
            await self._replace(State(rows=rows), known, delta, now_ms)

    async def foreword(self, row: SharedRow) -> Foreword | None:
        """What *row* says of the own environment before the rest of its epoch is here (forewords.py).

        StaleTermError, IntegrityError, FormatError; RegistryTamperedError, RegistryError.
        """
        environment = self._registry.environment_id
        if (state := self._committed) is None:
            async with self._one_at_a_time:
                state = await self._loaded()
        return check_foreword(self._tenant, environment, row, state)

    async def since(self, epoch: int) -> Delta:
        """What changed after *epoch*; everything for 0. RegistryTamperedError, RegistryError."""
        if self._one_at_a_time.locked() and self._committed is not None:
            return self._delta(self._committed, epoch)  # as true as a moment ago, and nobody waits for it
        async with self._one_at_a_time:
            return self._delta(await self._loaded(), epoch)

    # ---- reading

    @property
    def _tenant(self) -> str:
        return self._registry.tenant_id

    async def _loaded(self) -> State:
        if self._state is None:
            try:
                self._state = self._committed = await self._read()
            except RegistryTamperedError:
                self._committed = None
                raise
        return self._state

    async def _read(self) -> State:
        mark = await self._mark.read()
        state = await self._registry.transact(lambda c: self._load(c, mark))
        shared = state.shared
        if mark is None or mark.position < (shared.term, shared.epoch):
            await self._mark.follow(state, self._mark.restrictions)
        return state

    def _load(self, c: Connection, mark: Mark | None) -> State:
        rows, seal = read_rows(c), read_seal(c)
        if not rows and seal is None:
            if mark is not None and mark.epoch > 0:
                raise RegistryTamperedError("the shared rows are gone")
            return State()
        if mark is None:
            raise RegistryTamperedError("there are shared rows, but no mark of them in the state directory")
        if seal is None:
            raise RegistryTamperedError("the seal of the shared rows is gone")
        digests = {key: row_digest(row) for key, row in rows.items()}
        digest = digest_of(digests.items())
        seal.check(self._key, self._tenant, digest)
        if seal.position < mark.position:
            raise RegistryTamperedError(
                f"the shared rows are those of epoch {seal.head.epoch}; epoch {mark.epoch} was here already"
            )
        if seal.position == mark.position and digest != mark.digest:
            raise RegistryTamperedError("the shared rows are not those that the mark is of")
        bodies, terms = self._check_rows(rows, digests)
        self._check_stored_head(seal.head, terms)
        shared = view_of(
            bodies, term=seal.head.term, epoch=seal.head.epoch, digest=digest, tenant_id=self._tenant
        )
        wrong = differences(c, restricted(bodies, mark.restrictions), tenant_id=self._tenant)
        if wrong:
            raise RegistryTamperedError(
                f"{len(wrong)} values are not what the signed rows say: {', '.join(wrong[:3])}"
            )
        return State(
            rows=rows,
            bodies=bodies,
            digests=digests,
            shared=changed(shared, head=seal.head.signature),
            terms=terms,
        )

    def _check_stored_head(self, head: Head, terms: Terms) -> None:
        try:
            check_head(self._tenant, head, terms.holder(head.term).key)
        except IntegrityError as error:
            raise RegistryTamperedError(str(error)) from None

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

    def _signed(self, draft: Draft, state: State, term: int) -> list[SharedRow]:
        rows = []
        for (kind, row_id), body in draft.changed.items():
            written = body
            if isinstance(written, EnvironmentBody):
                before = state.bodies.get((kind, row_id))
                written = with_former_keys(written, cast("EnvironmentBody | None", before), draft.epoch)
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

    async def _replace(self, state: State, known: Known, delta: Delta, now_ms: int) -> None:
        """Everything of *delta* in place of all that is here, if *known* lets its writer be believed."""
        after = await self._after_delta(State(), delta)
        if after.shared.digest != delta.digest:
            raise IntegrityError("a delta's rows are not those of its digest")
        judged = await self._believing.check(delta, known, after)
        if judged.forked:
            await self._mark.lower(after)
        elif not _leaves(judged.terms, state):
            check_kept(state.bodies, after.bodies)
        restrictions = restrictions_between(self._mark.restrictions, state.bodies, after.bodies)
        gone = [key for key in state.rows if key not in after.rows]
        await self._store(
            after,
            list(after.rows.values()),
            before=state.bodies,
            gone=gone,
            now_ms=now_ms,
            restrictions=restrictions,
        )

    async def _after_delta(self, state: State, delta: Delta) -> State:
        def after() -> State:
            return with_rows(state, delta.rows, term=delta.term, epoch=delta.epoch_to, tenant_id=self._tenant)

        return await beside(len(state.rows) + len(delta.rows), after)

    async def _store(
        self,
        after: State,
        rows: Iterable[SharedRow],
        *,
        before: Mapping[Key, Body],
        gone: Iterable[Key],
        now_ms: int,
        restrictions: Mapping[str, KeyState],
        also: AlsoWrite | None = None,
    ) -> None:
        written, removed, shared = list(rows), list(gone), after.shared

        was = restricted(before, self._mark.restrictions)
        ended = {
            row.id: (cast("DekBody | None", was.get(row.key)), cast("DekBody", after.bodies[row.key]))
            for row in written
            if row.kind is Kind.DEK
        }
        erasable = may_erase(self._tenant, ended, shared.approvals, shared.admins)

        def work(c: Connection) -> None:
            delete_rows(c, removed)
            write_rows(c, written)
            clear(c, removed, now_ms=now_ms)
            bodies = {row.key: after.bodies[row.key] for row in written}
            project(
                c,
                restricted(bodies, restrictions),
                tenant_id=self._tenant,
                now_ms=now_ms,
                may_erase=erasable,
            )
            if also is not None:
                also(c)
            write_seal(c, self._key, self._tenant, shared)

        if not self._mark.is_there:
            # Before the first rows: without a mark they would not be believed after a crash.
            await self._mark.follow(State(), {})
        self._state = None  # whatever happens now is read anew
        await self._registry.transact(work)
        await self._mark.follow(after, restrictions)
        self._verified |= {row.key: after.digests[row.key] for row in written}
        self._state = self._committed = after

    def _delta(self, state: State, epoch: int) -> Delta:
        return delta_of(state, epoch, tenant_id=self._tenant, agent_id=self._registry.agent_id)


def _leaves(terms: Terms, ours: State) -> bool:
    """Whether a term among *terms*, which follow ours, began before the end of *ours*: another history."""
    following = terms.after(ours.shared.term)
    return following is not None and following.start <= ours.shared.epoch
