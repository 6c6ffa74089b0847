"""Who may write shared rows: what a breached agent tries that has its registry key, and what others believe.

The attackers here have what the real one would: the key of an environment that stands in the rows, every row
and head that was ever sent, and code that signs whatever they like (`Forger`).
"""

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from envelope.errors import FormatError, IntegrityError
from envelope.keys import KeyState
from key_agent.environments.shared.approvals import Action
from key_agent.environments.shared.documents import (
    LAST_EPOCH,
    MAX_EPOCHS_AHEAD,
    AdminState,
    ApprovalBody,
    Body,
    Delta,
    EnvironmentBody,
    Grounds,
    Head,
    Kind,
    SharedRow,
    TermBody,
    digest_of,
    read_body,
    row_digest,
    sign_row,
)
from key_agent.environments.shared.shared_errors import StaleTermError
from key_agent.environments.shared.terms import (
    WATCHED,
    Judgement,
    Known,
    Terms,
    judge,
    promotion_payload,
    term_id,
)
from key_agent.environments.shared.terms import Holder as TermHolder
from key_agent.environments.states import EnvironmentState
from key_agent.load_balancing.following import Follower
from tests.key_agent.environments.forger import Forger, used
from tests.key_agent.environments.registries import (
    ADMINS,
    KID,
    NOW_MS,
    TENANT,
    Admins,
    Holder,
    key,
    registry_of,
)

COMPROMISED = KeyState.COMPROMISED
HEALING = EnvironmentState.HEALING


class Site:
    """Three registries; a is the manager, b has been breached and heals."""

    def __init__(self, a: Holder, b: Holder, c: Holder) -> None:
        self.a, self.b, self.c = a, b, c

    async def begin(self) -> None:
        await self.a.write(*self.a.first_rows())
        await self.a.write(
            (Kind.ENVIRONMENT, "b", self.b.environment()), (Kind.ENVIRONMENT, "c", self.c.environment())
        )
        for one in (self.b, self.c):
            one.shared.pin("agent-a", self.a.public)
        await self.share(self.a)

    async def share(self, source: Holder, *others: Holder) -> None:
        for one in others or (self.a, self.b, self.c):
            if one is not source:
                await one.take(await source.shared.since(0))

    async def set_state(self, holder: Holder, state: EnvironmentState, **more: object) -> Delta:
        body = (await self.a.shared.snapshot()).environments[holder.name]
        changed = msgspec.structs.replace(body, state=state, **more)
        return await self.a.write((Kind.ENVIRONMENT, holder.name, changed))


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        made = Site(*[await stack.enter_async_context(registry_of(tmp_path, name)) for name in "abc"])
        await made.begin()
        yield made


def watched(seen: Delta, *names: tuple[Kind, str]) -> tuple[SharedRow, ...]:
    return tuple(row for row in seen.rows if row.key in names)


def follower(site: Site) -> Follower:
    return Follower(TENANT, agents=("agent-a", "agent-b", "agent-c"), manager=("agent-a", site.a.public))


async def believed_by_nobody(site: Site, make: Callable[[], Delta], seen: Delta) -> None:
    """Neither by members, nor by a load balancer's companion that knows the rows."""
    for member in (site.a, site.c):
        before = await member.shared.snapshot()
        with pytest.raises((IntegrityError, StaleTermError)):
            await member.take(make())
        assert (await member.shared.snapshot()).digest == before.digest
        await member.shared.verify()
    companion = follower(site)
    companion.take(seen, agent="agent-a", asked_boot_s=0)
    position = companion.position
    with pytest.raises(IntegrityError):
        companion.take(make(), agent="agent-b", asked_boot_s=0)
    assert companion.position == position


# What b does with its registry key, breached and already healing, retired, or not noticed yet.


def a_row_in_the_managers_term(forger: Forger) -> None:
    forger.epoch += 1
    forger.put(Kind.DEK, KID, key("a"))


def a_row_under_the_managers_name(forger: Forger) -> None:
    forger.epoch += 1
    forger.put(Kind.DEK, KID, key("a"))
    (row,) = (row for row in forger.rows.values() if row.kind is Kind.DEK)
    forger.rows[row.key] = msgspec.structs.replace(row, signer="agent-a")


def itself_active_again(forger: Forger) -> None:
    forger.epoch += 1
    forger.put(Kind.ENVIRONMENT, "b", _active(forger))


def _active(forger: Forger) -> Body:
    body = read_body(Kind.ENVIRONMENT, forger.rows[Kind.ENVIRONMENT, forger.holder.name].body)
    assert isinstance(body, EnvironmentBody)
    return msgspec.structs.replace(body, state=EnvironmentState.ACTIVE)


def a_term_without_a_word_of_why(forger: Forger) -> None:
    forger.begin(2)
    row = forger.rows[Kind.TERM, term_id(2)]
    body = msgspec.structs.replace(read_body(Kind.TERM, row.body), grounds=None)
    forger.put(Kind.TERM, term_id(2), body)


def a_term_by_an_election_that_never_was(forger: Forger) -> None:
    forger.begin(2, rows=watched(forger.seen, (Kind.ENVIRONMENT, "b")))


def a_term_far_ahead(forger: Forger) -> None:
    forger.begin(900)


def a_term_that_it_has_approved_by_itself(forger: Forger) -> None:
    """Its own administrators, in rows of its own, and what they sign."""
    mine = Admins("eve", "mallory")
    approval, asked = _promotion(forger, mine, by="eve mallory")
    rows = [
        sign_row(
            forger.holder.key, tenant=TENANT, kind=kind, row_id=name, body=body, term=1,
            epoch=forger.seen.epoch_to, signer=f"agent-{forger.holder.name}",
        )
        for kind, name, body in mine.rows()
    ]  # fmt: skip
    forger.begin(2, approval=approval, asked=used(asked), rows=tuple(rows))
    for kind, name, body in mine.rows():
        forger.put(kind, name, body)


def a_term_that_one_administrator_has_signed(forger: Forger) -> None:
    approval, asked = _promotion(forger, ADMINS, by="ann")
    forger.begin(2, approval=approval, asked=used(asked))


def a_term_by_an_approval_of_something_else(forger: Forger) -> None:
    payload: dict[str, object] = {"environment": "b"}
    approval, asked = ADMINS.approval(Action.ENVIRONMENT_RETIRE, "b", payload)
    forger.begin(2, approval=approval, asked=used(asked))


def a_term_that_was_approved_for_another_number(forger: Forger) -> None:
    approval, asked = _promotion(forger, ADMINS)
    forger.begin(3, approval=approval, asked=used(asked))


def a_term_on_a_registry_of_its_own(forger: Forger) -> None:
    approval, asked = _promotion(forger, ADMINS)
    forger.seen = forger.delta()  # b's head instead of a's
    forger.begin(2, approval=approval, asked=used(asked))


def a_term_on_an_elected_one_of_its_own(forger: Forger) -> None:
    """The elected term lets it write its own administrators; they approve of the next one."""
    forger.begin(5, rows=watched(forger.seen, (Kind.ENVIRONMENT, "b")))
    mine = Admins("eve", "mallory")
    for kind, name, body in mine.rows():
        forger.put(kind, name, body)
    forger.put(Kind.ENVIRONMENT, "b", _active(forger))
    forger.seen = forger.delta()
    approval, asked = _promotion(forger, mine, by="eve mallory")
    names = ((Kind.ENVIRONMENT, "b"), (Kind.ADMIN, "eve"), (Kind.ADMIN, "mallory"))
    forger.begin(6, approval=approval, asked=used(asked), rows=watched(forger.seen, *names))


def a_term_on_an_approval_without_a_bottom(forger: Forger) -> None:
    """What is read of it before anybody has signed it must not exhaust whoever reads."""
    _, asked = _promotion(forger, ADMINS)
    deep = msgspec.structs.replace(used(asked), payload='{"x":' + "[" * 60_000)
    forger.begin(2, approval="a-0000000000000000", asked=deep)


def a_recovery_on_an_approval_without_a_bottom(forger: Forger) -> None:
    _, asked = _promotion(forger, ADMINS)
    deep = msgspec.structs.replace(
        used(asked), action=Action.ENVIRONMENT_RECOVER, payload='{"x":' + "[" * 60_000
    )
    forger.begin(2, approval="a-0000000000000000", asked=deep)


def another_history_of_the_first_term(forger: Forger) -> None:
    """As if b had founded it all."""
    old = dict(forger.rows)
    forger.rows.clear()
    forger.term, forger.epoch = 1, forger.seen.epoch_to + 5
    first = TermBody(
        agent="agent-b", environment="b", registry_key=forger.public, since_ms=NOW_MS, cause="env init"
    )
    forger.put(Kind.TERM, term_id(1), first, epoch=1)
    for row in old.values():
        if row.kind is not Kind.TERM:
            forger.put(row.kind, row.id, read_body(row.kind, row.body))


def _promotion(forger: Forger, admins: Admins, *, by: str = "ann bob") -> tuple[str, ApprovalBody]:
    payload = promotion_payload(
        agent="agent-b",
        environment="b",
        registry_key=forger.public,
        term=forger.seen.term,
        epoch=forger.seen.epoch_to,
        digest=forger.seen.digest,
    )
    return admins.approval(Action.ENVIRONMENT_PROMOTE, "b", payload, by=by)


ATTACKS: dict[str, Callable[[Forger], None]] = {
    attack.__name__: attack
    for attack in (
        a_row_in_the_managers_term,
        a_row_under_the_managers_name,
        itself_active_again,
        a_term_without_a_word_of_why,
        a_term_by_an_election_that_never_was,
        a_term_far_ahead,
        a_term_that_it_has_approved_by_itself,
        a_term_that_one_administrator_has_signed,
        a_term_by_an_approval_of_something_else,
        a_term_that_was_approved_for_another_number,
        a_term_on_a_registry_of_its_own,
        a_term_on_an_elected_one_of_its_own,
        a_term_on_an_approval_without_a_bottom,
        a_recovery_on_an_approval_without_a_bottom,
        another_history_of_the_first_term,
    )
}


@pytest.mark.parametrize("state", ["active", "healing", "retired"])
async def test_with_its_registry_key_alone_an_agent_writes_nothing(site: Site, state: str) -> None:
    if state != "active":
        await site.set_state(site.b, EnvironmentState(state))
    await site.a.write((Kind.DEK, KID, key("a", COMPROMISED)))
    await site.share(site.a)
    seen = await site.a.shared.since(0)

    for attack in ATTACKS:

        def make(name: str = attack) -> Delta:
            forger = Forger(site.b, seen)
            ATTACKS[name](forger)
            return forger.delta()

        await believed_by_nobody(site, make, seen)
    assert (await site.c.shared.snapshot()).deks[KID].state is COMPROMISED


async def test_a_manager_leaves_room_for_whoever_follows_it(site: Site) -> None:
    """Breached, it writes the last epoch that there is: no term could begin behind that."""
    seen = await site.a.shared.since(0)
    companion = follower(site)
    companion.take(seen, agent="agent-a", asked_boot_s=0)
    forger = Forger(site.a, seen)
    forger.epoch = seen.epoch_to + MAX_EPOCHS_AHEAD + 1
    forger.put(Kind.ENVIRONMENT, "a", read_body(Kind.ENVIRONMENT, forger.rows[Kind.ENVIRONMENT, "a"].body))
    last = forger.delta()
    changed = tuple(row for row in last.rows if row.epoch > seen.epoch_to)
    for delta in (last, msgspec.structs.replace(last, epoch_from=seen.epoch_to, rows=changed)):
        for member in (site.b, site.c):
            with pytest.raises(IntegrityError, match="leads from epoch"):
                await member.take(delta)
        with pytest.raises(IntegrityError, match="leads from epoch"):
            companion.take(delta, agent="agent-a", asked_boot_s=0)
    with pytest.raises(IntegrityError, match="leads from epoch"):
        await site.b.shared.restore(last, now_ms=NOW_MS)
    await site.b.promote(ADMINS)
    await site.share(site.b)
    assert {(await one.shared.snapshot()).term for one in (site.a, site.b, site.c)} == {2}


async def test_whoever_begins_after_a_jump_follows_as_those_that_saw_it(site: Site) -> None:
    """A companion that was restarted, or a new environment: it would be left out for ever."""
    seen = await site.a.shared.since(0)
    there = follower(site)
    there.take(seen, agent="agent-a", asked_boot_s=0)
    forger = Forger(site.a, seen)
    forger.epoch = seen.epoch_to + MAX_EPOCHS_AHEAD
    forger.put(Kind.ENVIRONMENT, "a", read_body(Kind.ENVIRONMENT, forger.rows[Kind.ENVIRONMENT, "a"].body))
    jumped = forger.delta()
    for companion in (there, follower(site)):
        companion.take(jumped, agent="agent-a", asked_boot_s=1)
        assert companion.epoch == forger.epoch
    forger.epoch = LAST_EPOCH + 1
    forger.put(Kind.ENVIRONMENT, "a", read_body(Kind.ENVIRONMENT, forger.rows[Kind.ENVIRONMENT, "a"].body))
    with pytest.raises(IntegrityError, match="leads from epoch"):
        follower(site).take(forger.delta(), agent="agent-a", asked_boot_s=0)


async def test_an_approved_term_is_believed_and_its_forged_copies_are_not(site: Site) -> None:
    """The one who is promoted; with every single field of its grounds changed it is nobody."""
    seen = await site.a.shared.since(0)
    await site.b.promote(ADMINS)
    real = await site.b.shared.since(0)
    (row,) = (row for row in real.rows if row.key == (Kind.TERM, term_id(2)))
    body = read_body(Kind.TERM, row.body)
    assert isinstance(body, TermBody)
    grounds = body.grounds
    assert grounds is not None
    assert grounds.asked is not None
    replace = msgspec.structs.replace
    wrong: Iterable[Grounds] = (
        replace(grounds, built_on=replace(grounds.built_on, epoch=grounds.built_on.epoch - 1)),
        replace(grounds, built_on=replace(grounds.built_on, digest="00" * 32)),
        replace(grounds, asked=replace(grounds.asked, requested_at_ms=NOW_MS + 1)),
        replace(grounds, asked=replace(grounds.asked, used_at_ms=None)),
        replace(grounds, asked=replace(grounds.asked, used_at_ms=grounds.asked.expires_at_ms)),
        replace(grounds, asked=replace(grounds.asked, subject="c")),
        replace(grounds, asked=None),
        replace(grounds, approval="a-0000000000000000"),
    )
    for one in wrong:

        def make(one: Grounds = one) -> Delta:
            forger = Forger(site.b, real)
            forger.put(Kind.TERM, term_id(2), replace(body, grounds=one))
            return forger.delta()

        await believed_by_nobody(site, make, seen)
    await site.share(site.b)
    assert (await site.c.shared.snapshot()).term == 2
    companion = follower(site)
    companion.take(seen, agent="agent-a", asked_boot_s=0)
    assert companion.take(real, agent="agent-b", asked_boot_s=0)


@pytest.mark.parametrize(
    "changes",
    [{"state": HEALING}, {"state": EnvironmentState.HEALED}, {"registry_key_exposed": True}],
    ids=["healing", "healed", "exposed"],
)
async def test_no_term_begins_in_an_environment_that_does_not_count(
    site: Site, changes: dict[str, Any]
) -> None:
    """Though two administrators have signed: they did so before the others knew better."""
    seen = await site.a.shared.since(0)
    approval, asked = ADMINS.promotion(site.b, await site.b.shared.snapshot())
    await site.set_state(site.b, changes.pop("state", EnvironmentState.ACTIVE), **changes)
    await site.share(site.a, site.c)
    await site.b.shared.begin_term(2, cause="-", now_ms=NOW_MS, approval=(approval, asked))
    theirs = await site.b.shared.since(0)
    for member in (site.a, site.c):
        with pytest.raises(IntegrityError):
            await member.take(theirs)
    companion = follower(site)
    companion.take(seen, agent="agent-a", asked_boot_s=0)
    companion.take(await site.a.shared.since(0), agent="agent-a", asked_boot_s=0)
    with pytest.raises(IntegrityError):
        companion.take(theirs, agent="agent-b", asked_boot_s=0)


async def test_an_agent_does_not_begin_what_the_others_would_refuse(site: Site) -> None:
    await site.set_state(site.b, HEALING)
    await site.share(site.a)
    with pytest.raises(IntegrityError, match="healing"):
        await site.b.promote(ADMINS)
    with pytest.raises(StaleTermError):
        await site.b.write((Kind.DEK, KID, key("a", COMPROMISED)))
    await site.b.shared.verify()


async def test_who_missed_that_it_is_active_again_follows_the_new_manager(site: Site) -> None:
    """c was away: it knows b as healing, another administrator fewer, and hears of it from b alone."""
    await site.set_state(site.b, HEALING)
    await site.share(site.a)
    await site.set_state(site.b, EnvironmentState.ACTIVE)
    later = Admins("kim", "lee")
    await site.a.write(*later.rows())
    await site.share(site.a, site.b)
    assert (await site.c.shared.snapshot()).environments["b"].state is HEALING
    await site.b.promote(later, by="kim lee")
    found = await site.c.take(await site.b.shared.since(0))
    assert (found.term, found.environments["b"].state) == (2, EnvironmentState.ACTIVE)
    await site.c.shared.verify()


async def test_old_rows_do_not_bring_back_what_was_withdrawn_since(site: Site) -> None:
    """b shows its row from when it was active, and administrators of whom one was removed since."""
    seen = await site.b.shared.since(0)
    await site.set_state(site.b, HEALING)
    ann = (await site.a.shared.snapshot()).admins["ann"]
    await site.a.write((Kind.ADMIN, "ann", msgspec.structs.replace(ann, state=AdminState.REMOVED)))
    await site.share(site.a, site.c)
    names = ((Kind.ENVIRONMENT, "b"), (Kind.ADMIN, "ann"), (Kind.ADMIN, "bob"))

    def make() -> Delta:
        forger = Forger(site.b, seen)
        approval, asked = _promotion(forger, ADMINS)
        forger.begin(2, approval=approval, asked=used(asked), rows=watched(seen, *names))
        return forger.delta()

    await believed_by_nobody(site, make, await site.a.shared.since(0))
    # A removed administrator alone is enough to refuse it.
    await site.set_state(site.b, EnvironmentState.ACTIVE)
    await site.share(site.a, site.c)
    with pytest.raises(IntegrityError, match="of 2 signatures"):
        await site.c.take(make())


async def test_who_was_the_manager_once_rewrites_nothing(site: Site) -> None:
    """a is breached after b has followed it: its rows of term 1 were signed by the key that it still has."""
    await site.b.promote(ADMINS)
    await site.share(site.b)
    seen = await site.b.shared.since(0)
    evil = Admins("eve", "mallory")

    def in_its_own_time() -> Delta:
        forger = Forger(site.a, seen)
        forger.put(Kind.DEK, KID, key("a", COMPROMISED), term=1, epoch=2)
        rows = tuple(forger.rows.values())
        digest = digest_of((row.key, row_digest(row)) for row in rows)
        return msgspec.structs.replace(seen, rows=rows, digest=digest, epoch_to=seen.epoch_to + 1)

    def after_its_time() -> Delta:
        forger = Forger(site.a, seen)
        forger.epoch += 1
        forger.put(Kind.DEK, KID, key("a", COMPROMISED), term=1)
        return forger.delta(signer="agent-b")

    def with_administrators_of_its_own() -> Delta:
        """It claims that they stood there long ago."""
        forger = Forger(site.a, seen)
        for kind, name, body in evil.rows():
            forger.put(kind, name, body, term=1, epoch=2)
        payload = promotion_payload(
            agent="agent-a", environment="a", registry_key=site.a.public,
            term=seen.term, epoch=seen.epoch_to, digest=seen.digest,
        )  # fmt: skip
        approval, asked = evil.approval(Action.ENVIRONMENT_PROMOTE, "a", payload, by="eve mallory")
        names = ((Kind.ADMIN, "eve"), (Kind.ADMIN, "mallory"))
        rows = tuple(forger.rows[name] for name in names)
        forger.begin(3, approval=approval, asked=used(asked), rows=rows)
        return forger.delta()

    before = await site.c.shared.snapshot()
    companion = follower(site)
    companion.take(seen, agent="agent-b", asked_boot_s=0)
    for make in (in_its_own_time, after_its_time, with_administrators_of_its_own):
        with pytest.raises(IntegrityError):
            await site.c.take(make())
        with pytest.raises(IntegrityError):
            companion.take(make(), agent="agent-a", asked_boot_s=0)
    assert (await site.c.shared.snapshot()).digest == before.digest


async def test_a_row_counts_in_the_epochs_of_its_term_alone(site: Site) -> None:
    """Signed as it must be, by whoever held that term: before it began, or since the next one did."""
    await site.b.promote(ADMINS)
    seen = await site.b.shared.since(0)
    terms = Terms.of(seen.rows)
    first, second = terms.holders()
    assert (first.start, second.start) == (1, seen.epoch_to)

    def row(holder: Holder, term: int, epoch: int, *, signer: str = "") -> SharedRow:
        return sign_row(
            holder.key, tenant=TENANT, kind=Kind.DEK, row_id=KID, body=key("a"),
            term=term, epoch=epoch, signer=signer or f"agent-{holder.name}",
        )  # fmt: skip

    for good in (row(site.a, 1, 1), row(site.a, 1, second.start - 1), row(site.b, 2, second.start)):
        terms.check(TENANT, good)
    for bad, why in (
        (row(site.a, 1, 0), "epoch 0 is none of term 1"),
        (row(site.a, 1, second.start), f"epoch {second.start} is none of term 1"),
        (row(site.b, 2, second.start - 1), f"epoch {second.start - 1} is none of term 2"),
        (row(site.a, 1, 1, signer="agent-b"), "is agent-b's, but term 1 is agent-a's"),
        (row(site.b, 1, 1, signer="agent-a"), "does not bear agent-a's signature"),
        (row(site.b, 3, second.start), "nobody is known to have held term 3"),
    ):
        with pytest.raises(IntegrityError, match=why):
            terms.check(TENANT, bad)


async def test_pins_name_whom_to_believe_first_and_nobody_later(site: Site) -> None:
    seen = await site.a.shared.since(0)
    pins = {"agent-a": site.a.public}
    assert judge(TENANT, Known(pins=pins), seen.rows).terms.newest == next(Terms.of(seen.rows).holders())
    for other in ({}, {"agent-a": site.b.public}, {"agent-b": site.a.public}):
        with pytest.raises(IntegrityError, match="nobody whom the pins name"):
            judge(TENANT, Known(pins=other), seen.rows)
    # What b says that a has begun, and what b has begun: pinned, it would have been believed at first.
    (first,) = (row for row in seen.rows if row.kind is Kind.TERM)
    body = read_body(Kind.TERM, first.body)
    assert isinstance(body, TermBody)

    def by_b(agent: str, registry_key: str) -> list[SharedRow]:
        said = msgspec.structs.replace(body, agent=agent, registry_key=registry_key, cause="by b")
        return [
            sign_row(
                site.b.key, tenant=TENANT, kind=Kind.TERM, row_id=first.id, body=said,
                term=1, epoch=first.epoch, signer=agent,
            )
        ]  # fmt: skip

    with pytest.raises(IntegrityError, match="does not bear agent-a's signature"):
        judge(TENANT, Known(pins=pins), by_b("agent-a", site.a.public))
    theirs, pinned = by_b("agent-b", site.b.public), {"agent-b": site.b.public}
    assert judge(TENANT, Known(pins=pinned), theirs).terms.newest is not None
    with pytest.raises(IntegrityError, match="not a continuation"):
        judge(TENANT, Known(terms=Terms.of(seen.rows), pins=pinned), theirs)


async def test_a_term_is_begun_by_its_holder_where_the_one_before_ended(site: Site) -> None:
    """Rules 3 and 4, of the row alone: no head of its holder's stands beside it here."""
    seen = await site.a.shared.since(0)
    known = Known(
        position=(1, seen.epoch_to),
        terms=Terms.of(seen.rows),
        digests={row.key: row_digest(row) for row in seen.rows if row.kind in WATCHED},
        bodies={row.key: read_body(row.kind, row.body) for row in seen.rows if row.kind in WATCHED},
    )
    await site.b.promote(ADMINS)
    first, second = sorted(
        (row for row in (await site.b.shared.since(0)).rows if row.kind is Kind.TERM), key=lambda row: row.id
    )
    body = read_body(Kind.TERM, second.body)
    assert isinstance(body, TermBody)
    assert body.grounds is not None
    grounds, replace = body.grounds, msgspec.structs.replace

    def begun(
        by: Holder = site.b, *, epoch: int = second.epoch, built_on: Head = grounds.built_on
    ) -> Judgement:
        row = sign_row(
            by.key, tenant=TENANT, kind=Kind.TERM, row_id=second.id, term=2, epoch=epoch, signer="agent-b",
            body=replace(body, grounds=replace(grounds, built_on=built_on)),
        )  # fmt: skip
        return judge(TENANT, known, [first, row])

    newest = begun().terms.newest
    assert newest is not None
    assert (newest.agent, newest.start) == ("agent-b", seen.epoch_to + 1)
    with pytest.raises(IntegrityError, match="does not bear agent-b's signature"):
        begun(site.c)
    before = replace(grounds.built_on, epoch=grounds.built_on.epoch - 1)
    none = replace(grounds.built_on, epoch=first.epoch - 1)
    for epoch, built_on in (
        (second.epoch + 1, grounds.built_on),
        (second.epoch - 1, grounds.built_on),
        (second.epoch, before),
        (none.epoch + 1, none),
        (second.epoch, replace(grounds.built_on, term=2)),
    ):
        with pytest.raises(IntegrityError, match="does not go on from where term 1 ended"):
            begun(epoch=epoch, built_on=built_on)
    with pytest.raises(IntegrityError, match="signature"):
        begun(epoch=second.epoch - 1, built_on=before)


async def test_terms_are_a_chain_from_the_first_to_the_newest(site: Site) -> None:
    """Rule 2: however well each row is signed."""
    await site.b.promote(ADMINS)
    rows = {row.key: row for row in (await site.b.shared.since(0)).rows if row.kind is Kind.TERM}
    first, second = (rows[key] for key in sorted(rows))
    body = read_body(Kind.TERM, second.body)
    assert isinstance(body, TermBody)
    assert [one.agent for one in Terms.of(rows.values()).holders()] == ["agent-a", "agent-b"]

    def signed(*, row_id: str = second.id, signer: str = "agent-b", **changes: object) -> SharedRow:
        return sign_row(
            site.b.key, tenant=TENANT, kind=Kind.TERM, row_id=row_id, signer=signer,
            body=msgspec.structs.replace(body, **changes), term=second.term, epoch=second.epoch,
        )  # fmt: skip

    for broken, why in (
        ([], "nobody held a term"),
        ([second], "does not follow the one before"),
        ([first, signed(previous="")], "does not follow the one before"),
        ([first, signed(previous="00" * 32)], "does not follow the one before"),
        ([first, signed(row_id=term_id(3))], f"the row of term {term_id(3)} is agent-b's, of term 2"),
        ([first, signed(signer="agent-c")], "is agent-c's"),
        ([first, signed(registry_key="00" * 31)], "registry key"),
    ):
        with pytest.raises((IntegrityError, FormatError), match=why):
            Terms.of(broken)


@pytest.mark.parametrize(
    ("state", "follows", "why"),
    [
        ("healing", False, "no term can begin"),
        ("healing", True, "no term can begin"),
        ("retired", True, "no term can begin"),
        ("active", True, "0 of 2 signatures"),
    ],
)
async def test_a_former_manager_begins_nothing_with_administrators_of_its_own(
    site: Site, state: str, follows: bool, why: str
) -> None:
    """In an epoch that it adds to its old term it is sound again. That term is over, or it may not go on."""
    await site.a.write((Kind.DEK, KID, key("a", COMPROMISED)))
    if state != "active":
        await site.set_state(site.a, HEALING, registry_key_exposed=True)
    await site.share(site.a)
    old = await site.a.shared.since(0)
    if follows:
        await site.b.promote(ADMINS)
    if state == "retired":
        retired = site.a.environment(state=EnvironmentState.RETIRED, registry_key_exposed=True)
        await site.b.write((Kind.ENVIRONMENT, "a", retired), term=2)
    await site.share(site.b, site.c)
    seen = await site.b.shared.since(0)

    def takeover(terms: int) -> Delta:
        """Approved of later than all that the real administrators have signed."""
        forger = Forger(site.a, old)
        forger.appoint_itself(2, at_ms=NOW_MS + 1)
        for number in range(3, 2 + terms):
            forger.follow_itself(number, at_ms=NOW_MS + number)
        return forger.delta()

    for terms in (1, 2):
        companion = follower(site)
        companion.take(seen, agent="agent-b", asked_boot_s=0)
        for member in (site.b, site.c):
            with pytest.raises(IntegrityError, match=why):
                await member.take(takeover(terms))
            now = await member.shared.snapshot()
            assert (now.digest, now.deks[KID].state) == (seen.digest, COMPROMISED)
            await member.shared.verify()
        with pytest.raises(IntegrityError, match=why):
            companion.take(takeover(terms), agent="agent-a", asked_boot_s=0)
        assert companion.position == (seen.term, seen.epoch_to)


async def test_an_agent_whose_former_environment_was_retired_leads_in_another(
    site: Site, tmp_path: Path
) -> None:
    """As docs/environments.md has it after a breach of the agent; both bear the same agent's name."""
    async with registry_of(tmp_path, "old") as old:
        retired = old.environment(
            agent_id="agent-b", state=EnvironmentState.RETIRED, registry_key_exposed=True
        )
        await site.a.write((Kind.ENVIRONMENT, "old", retired))
    await site.share(site.a)
    await site.b.promote(ADMINS)
    await site.share(site.b)
    await site.b.write((Kind.DEK, KID, key("a", COMPROMISED)), term=2)
    companion = follower(site)
    companion.take(await site.a.shared.since(0), agent="agent-a", asked_boot_s=0)
    companion.take(await site.b.shared.since(0), agent="agent-b", asked_boot_s=0)
    assert companion.position == (2, (await site.b.shared.snapshot()).epoch)
    await site.share(site.b)
    for member in (site.a, site.c):
        assert (await member.shared.snapshot()).deks[KID].state is COMPROMISED
    # Its present one counts as every other's: withdrawn, it writes no more, and notices that itself.
    await site.b.write((Kind.ENVIRONMENT, "b", site.b.environment(state=HEALING)), term=2)
    with pytest.raises(IntegrityError, match="another one has to follow"):
        await site.b.write((Kind.ENVIRONMENT, "b", site.b.environment()), term=2)
    assert (await site.b.shared.snapshot()).environments["b"].state is HEALING


async def test_a_restart_of_the_companion_brings_no_former_manager_back(site: Site) -> None:
    """Its settings still name a, which was followed by b, retired, and then breached."""
    companion = follower(site)
    companion.take(await site.a.shared.since(0), agent="agent-a", asked_boot_s=0)
    await site.b.promote(ADMINS)
    companion.take(await site.b.shared.since(0), agent="agent-b", asked_boot_s=0)
    kept = companion.everything()
    again = follower(site)
    again.remember(kept)
    assert again.position == companion.position
    stale = await site.a.shared.since(0)
    forger = Forger(site.a, stale)
    forger.begin(2)
    forger.epoch += 50
    with pytest.raises(IntegrityError):
        again.take(forger.delta(), agent="agent-a", asked_boot_s=0)
    for damaged in (
        msgspec.structs.replace(kept, digest="00" * 32),
        msgspec.structs.replace(kept, signature="00" * 64),
        msgspec.structs.replace(kept, rows=kept.rows[1:]),
        msgspec.structs.replace(kept, tenant="acma"),
        msgspec.structs.replace(kept, epoch_from=1),
    ):
        with pytest.raises((IntegrityError, FormatError)):
            follower(site).remember(damaged)


async def test_two_managers_of_one_term_end_with_the_one_that_was_asked_for_later(site: Site) -> None:
    """Administrators promote b in one half of a split network and c in the other; then the halves meet."""
    for holder, at_ms in ((site.b, NOW_MS), (site.c, NOW_MS + 1)):
        approval = ADMINS.promotion(holder, await holder.shared.snapshot(), at_ms=at_ms)
        await holder.shared.begin_term(2, cause="-", now_ms=NOW_MS + 2, approval=approval)
    for number in range(3):
        await site.b.write((Kind.DEK, KID, key("a", COMPROMISED, since_ms=NOW_MS + number)), term=2)
    await site.a.take(await site.b.shared.since(0))
    theirs, ours = await site.b.shared.since(0), await site.c.shared.since(0)
    assert theirs.epoch_to > ours.epoch_to
    with pytest.raises(StaleTermError):
        await site.c.take(theirs)
    for loser in (site.a, site.b):
        found = await loser.take(ours)
        assert (found.term, found.epoch, found.terms[term_id(2)].agent) == (2, ours.epoch_to, "agent-c")
        await loser.shared.verify()
        # What was taken away in the other half stays so.
        assert [row[0] for row in await loser.sql("SELECT state FROM dek")] == [str(COMPROMISED)]
    with pytest.raises(StaleTermError):
        await site.b.take(theirs)
    with pytest.raises(StaleTermError):
        await site.b.write((Kind.DEK, KID, key("a", KeyState.SUSPENDED)), term=2)
    # The next one is followed by all, whichever half it comes from.
    await site.a.promote(ADMINS)
    await site.share(site.a)
    assert {(await one.shared.snapshot()).term for one in (site.a, site.b, site.c)} == {3}


async def test_a_promotion_goes_on_from_what_was_signed_or_later_never_from_before(site: Site) -> None:
    view = await site.b.shared.snapshot()
    approval = ADMINS.promotion(site.b, view)
    await site.a.write((Kind.DEK, KID, key("a", KeyState.SUSPENDED)))
    early = ADMINS.promotion(site.c, await site.a.shared.snapshot())
    with pytest.raises(IntegrityError):  # c has not taken that epoch over yet
        await site.c.shared.begin_term(2, cause="-", now_ms=NOW_MS, approval=early)
    await site.share(site.a, site.b)
    await site.b.shared.begin_term(2, cause="-", now_ms=NOW_MS, approval=approval)
    await site.share(site.b)
    # It serves once: the next term is another number.
    with pytest.raises(StaleTermError):
        await site.b.shared.begin_term(2, cause="-", now_ms=NOW_MS, approval=approval)
    with pytest.raises(IntegrityError):
        await site.b.shared.begin_term(3, cause="-", now_ms=NOW_MS, approval=approval)


class _Election:
    """Answers as etcd would."""

    def __init__(self, *winners: tuple[int, str]) -> None:
        self.winners = dict(winners)

    async def confirm(self, holder: TermHolder) -> None:
        if self.winners.get(holder.term) != holder.agent:
            raise IntegrityError(f"nobody gave term {holder.term} to {holder.agent}")


async def test_an_elected_term_is_believed_when_the_election_says_so(site: Site) -> None:
    election = _Election((40, "agent-b"))
    await site.b.shared.begin_term(40, cause="elected", now_ms=NOW_MS)
    theirs = await site.b.shared.since(0)
    with pytest.raises(IntegrityError, match="no election"):
        await site.c.take(theirs)
    for member in (site.a, site.c):
        member.shared.confirm = election.confirm
    assert (await site.c.take(theirs)).term == 40
    # A breached one that is not withdrawn yet says that it was elected.
    forger = Forger(site.c, theirs)
    forger.begin(41)
    with pytest.raises(IntegrityError, match="41"):
        await site.a.take(forger.delta())
    # The companion beside HAProxy does not ask etcd: it takes most agents' word.
    companion = follower(site)
    companion.take(await site.a.shared.since(0), agent="agent-a", asked_boot_s=0)
    for _ in range(2):
        with pytest.raises(IntegrityError, match="alone"):
            companion.take(theirs, agent="agent-b", asked_boot_s=0)
    assert companion.take(theirs, agent="agent-c", asked_boot_s=0)


async def test_a_restored_registry_believes_whom_the_mark_knows(site: Site) -> None:
    """The rows are gone from c's database; b, breached, is the first to offer some."""
    await site.set_state(site.b, HEALING)
    await site.share(site.a)
    seen = await site.a.shared.since(0)
    await site.c.sql("DELETE FROM shared_row")
    for attack in ATTACKS.values():
        forger = Forger(site.b, seen)
        attack(forger)
        with pytest.raises(IntegrityError):
            await site.c.shared.restore(forger.delta(), now_ms=NOW_MS)
    # Then b is sound again and follows a: newer rows show that, and rows whose digests the mark knows.
    await site.set_state(site.b, EnvironmentState.ACTIVE)
    await site.share(site.a, site.b)
    await site.b.promote(ADMINS)
    await site.c.shared.restore(await site.b.shared.since(0), now_ms=NOW_MS)
    await site.c.shared.verify()
    assert (await site.c.shared.snapshot()).term == 2


@pytest.mark.parametrize("begins", [False, True])
async def test_a_restored_registry_does_not_believe_a_manager_that_it_knew_as_withdrawn(
    site: Site, begins: bool
) -> None:
    """The rows that said so are gone from c's database; a, breached, is the first to offer some."""
    assert b"withdrawn" not in site.c.mark.read_bytes()  # as marks were before they could say it
    await site.set_state(site.a, HEALING)
    await site.share(site.a)
    real = await site.a.shared.since(0)
    await site.c.sql("DELETE FROM shared_row")
    forger = Forger(site.a, real)
    if begins:
        forger.appoint_itself(2)
    else:
        forger.epoch += 1
        forger.put(Kind.ENVIRONMENT, "a", site.a.environment())
    with pytest.raises(IntegrityError):
        await site.c.shared.restore(forger.delta(), now_ms=NOW_MS)
    # What was there may be there again, and whoever follows brings more.
    await site.c.shared.restore(await site.b.shared.since(0), now_ms=NOW_MS)
    assert (await site.c.shared.snapshot()).environments["a"].state is HEALING
    await site.b.promote(ADMINS)
    await site.c.sql("DELETE FROM shared_row")
    await site.c.shared.restore(await site.b.shared.since(0), now_ms=NOW_MS)
    await site.c.shared.verify()
    assert (await site.c.shared.snapshot()).term == 2
