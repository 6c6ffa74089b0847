"""No environment counts: whom members and load balancers believe, and what they do not.

a, the manager, and c were breached with their registry keys; b with its KEK alone. The attacker has the keys
of a and c, every row and head that was ever sent, and code that signs whatever they like (`Forger`).
"""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from envelope.errors import FormatError, IntegrityError
from envelope.keys import KeyState
from key_agent.environments.changes.healing_changes import recover
from key_agent.environments.shared.approvals import Action
from key_agent.environments.shared.documents import (
    ApprovalBody,
    Body,
    Delta,
    EnvironmentBody,
    Kind,
    SharedRow,
    TermBody,
    read_body,
    sign_row,
)
from key_agent.environments.shared.draft import Draft
from key_agent.environments.shared.recovery import Succession, appointed, read_succession, recovery_payload
from key_agent.environments.shared.shared_errors import StaleTermError
from key_agent.environments.states import EnvironmentState
from key_agent.load_balancing.following import Follower
from tests.key_agent.environments.forger import INVENTED, Forger, used
from tests.key_agent.environments.registries import (
    ADMINS,
    KID,
    NEXT_KID,
    NOW_MS,
    TENANT,
    Admins,
    Holder,
    key,
    registry_of,
)
from tests.key_agent.environments.rows import World

HEALING = EnvironmentState.HEALING
BY = Succession(old_kek="kek-b", lost=False, new_kek="kek-b2", kek_fingerprint="1234")


class Site:
    def __init__(self, a: Holder, b: Holder, c: Holder) -> None:
        self.a, self.b, self.c = a, b, c
        self.followers: list[Follower] = []
        self.early: Delta
        """While all were sound."""
        self.seen: Delta

    async def begin(self) -> None:
        """All are told all of it; a is the last that is withdrawn."""
        await self.a.write(*self.a.first_rows())
        for one in (self.b, self.c):
            one.shared.pin("agent-a", self.a.public)
            await self.a.write((Kind.ENVIRONMENT, one.name, one.environment()))
        self.early = await self.a.shared.since(0)
        await self.heals(self.c, registry_key_exposed=True)
        await self.heals(self.b)
        await self.heals(self.a, registry_key_exposed=True)
        for one in (self.b, self.c):
            await one.take(await self.a.shared.since(0))
        self.seen = await self.a.shared.since(0)

    async def heals(self, one: Holder, **more: object) -> None:
        await self.a.write((Kind.ENVIRONMENT, one.name, one.environment(state=HEALING, **more)))

    def follower(self) -> Follower:
        made = Follower(TENANT, agents=("agent-a", "agent-b", "agent-c"), manager=("agent-a", self.a.public))
        made.take(self.seen, agent="agent-a", asked_boot_s=0)
        return made

    async def refused(self, delta: Delta, *members: Holder) -> None:
        """By members, and by a load balancer's companion, that know what has happened."""
        for member in members or (self.b, self.c):
            before = await member.shared.snapshot()
            with pytest.raises((IntegrityError, FormatError, StaleTermError)):
                await member.take(delta)
            assert (await member.shared.snapshot()).digest == before.digest
        companion = self.follower()
        with pytest.raises((IntegrityError, FormatError)):
            companion.take(delta, agent=delta.signer, asked_boot_s=0)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        made = Site(*[await stack.enter_async_context(registry_of(tmp_path, name)) for name in "abc"])
        await made.begin()
        yield made


def payload_of(one: Holder, seen: Delta, **changes: Any) -> dict[str, object]:
    payload = recovery_payload(
        agent=f"agent-{one.name}",
        environment=one.name,
        registry_key=one.public,
        term=seen.term,
        epoch=seen.epoch_to,
        digest=seen.digest,
        by=BY,
    )
    return payload | changes


def signed(
    one: Holder,
    seen: Delta,
    *,
    admins: Admins = ADMINS,
    by: str = "ann bob",
    action: Action = Action.ENVIRONMENT_RECOVER,
    **changes: Any,
) -> tuple[str, ApprovalBody]:
    return admins.approval(action, one.name, payload_of(one, seen, **changes), by=by)


def forged(
    one: Holder,
    seen: Delta,
    approval: tuple[str, ApprovalBody],
    *,
    rows: tuple[SharedRow, ...] = (),
    term: int = 2,
) -> Delta:
    forger = Forger(one, seen)
    forger.begin(term, approval=approval[0], asked=used(approval[1]), rows=rows)
    return forger.delta()


async def begin(site: Site, one: Holder) -> Delta:
    kek = World.kek(one.name, created_at_ms=NOW_MS, version=2)

    def change(draft: Draft) -> None:
        recover(draft, one.name, registry_key=one.public, kek_id="kek-b2", kek=kek, now_ms=NOW_MS)

    await one.shared.begin_term(2, cause="-", now_ms=NOW_MS, approval=signed(one, site.seen), also=change)
    return await one.shared.since(0)


async def test_who_is_appointed_is_believed_and_leads_until_one_counts(site: Site) -> None:
    companion = site.follower()
    theirs = await begin(site, site.b)
    for member in (site.a, site.c):
        view = await member.take(theirs)
        found = appointed(view)
        assert found is not None
        assert (found.environment, found.term, found.succession) == ("b", 2, BY)
        assert (view.environments["b"].state, view.environments["b"].kek_id) == (HEALING, "kek-b2")
    assert companion.take(theirs, agent="agent-b", asked_boot_s=0)
    # What it writes while it heals is followed; and whoever missed all of it follows by the rows alone.
    await site.b.write((Kind.DEK, NEXT_KID, key("b", KeyState.PRE_ACTIVE, 2)), term=2)
    theirs = await site.b.shared.since(0)
    for member in (site.a, site.c):
        assert NEXT_KID in (await member.take(theirs)).deks
    assert companion.take(theirs, agent="agent-b", asked_boot_s=0)
    with pytest.raises(StaleTermError):
        await site.a.write((Kind.DEK, KID, key("a")), term=1)
    await site.b.write((Kind.ENVIRONMENT, "b", site.b.environment()), term=2)
    view = await site.c.take(await site.b.shared.since(0))
    assert appointed(view) is None


async def test_who_missed_the_last_withdrawals_is_shown_them(site: Site, tmp_path: Path) -> None:
    """d was away since all were sound, and cannot ask anybody who counts."""
    async with registry_of(tmp_path, "d") as d:
        d.shared.pin("agent-a", site.a.public)
        view = await d.take(site.early)
        assert all(body.state.counts for body in view.environments.values())
        theirs = await begin(site, site.b)
        assert appointed(await d.take(theirs)) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"by": "ann"},
        {"admins": INVENTED, "by": "mallory trent"},
        {"action": Action.ENVIRONMENT_PROMOTE},
        {"action": Action.ENVIRONMENT_RETIRE},
        {"environment": "c"},
        {"agent": "agent-c"},
        {"term": 3},
        {"registry_key": "AAAA"},
        {"builds_on": {"term": 1, "epoch": 4, "digest": "00" * 32}},
        {"old_kek": 7},
    ],
    ids="-".join,
)
async def test_what_two_administrators_have_not_signed_begins_nothing(
    site: Site, changes: dict[str, Any]
) -> None:
    await site.refused(forged(site.b, site.seen, signed(site.b, site.seen, **changes)), site.a, site.c)


async def test_an_approval_serves_one_term_of_one_environment(site: Site) -> None:
    approval = signed(site.b, site.seen)
    await site.refused(forged(site.c, site.seen, approval), site.a, site.b)
    await site.refused(forged(site.b, site.seen, approval, term=3), site.a, site.c)
    theirs = await begin(site, site.b)
    for member in (site.a, site.c):
        await member.take(theirs)
    # Once more, for the next term.
    await site.refused(forged(site.b, theirs, approval, term=3), site.a, site.c)


async def test_whose_registry_key_was_exposed_is_not_appointed_with_it(site: Site) -> None:
    """Though two administrators have signed."""
    await site.refused(forged(site.c, site.seen, signed(site.c, site.seen)), site.a, site.b)
    # Nor with the key of another one: it signs for whoever has it.
    taken = signed(site.b, site.seen, registry_key=site.c.public)
    forger = Forger(site.c, site.seen)
    forger.begin(2, approval=taken[0], asked=used(taken[1]))
    [row] = [row for row in forger.rows.values() if row.kind is Kind.TERM and row.term == 2]
    body = msgspec.structs.replace(read_body(row.kind, row.body), agent="agent-b", environment="b")
    forger.rows[row.key] = sign_row(
        site.c.key, tenant=TENANT, kind=row.kind, row_id=row.id, body=body,
        term=row.term, epoch=row.epoch, signer="agent-b",
    )  # fmt: skip
    await site.refused(forger.delta(signer="agent-b"), site.a)
    with pytest.raises(IntegrityError, match="is one that an environment has had"):
        await site.a.take(forger.delta(signer="agent-b"))


async def test_an_environment_is_appointed_with_its_own_agent(site: Site) -> None:
    """Two administrators were made to sign that another agent speaks for b, by a key that nobody has had."""

    class Stranger:
        name = "c"
        key = Ed25519PrivateKey.generate()

    forger = Forger(Stranger(), site.seen)
    payload = payload_of(site.b, site.seen, agent="agent-c", registry_key=forger.public)
    approval, asked = ADMINS.approval(Action.ENVIRONMENT_RECOVER, "b", payload)
    forger.begin(2, approval=approval, asked=used(asked))
    [row] = [row for row in forger.rows.values() if row.kind is Kind.TERM and row.term == 2]
    body = read_body(row.kind, row.body)
    assert isinstance(body, TermBody)
    forger.put(Kind.TERM, row.id, msgspec.structs.replace(body, environment="b"))
    await site.refused(forger.delta(), site.a, site.b)


async def test_nobody_is_appointed_while_another_one_counts(site: Site) -> None:
    """By what the judge knows, or what is shown to it."""
    theirs = await begin(site, site.b)
    async with AsyncExitStack() as stack:
        place = site.a.directory.parent / "later"
        place.mkdir()
        e = await stack.enter_async_context(registry_of(place, "e"))
        f = await stack.enter_async_context(registry_of(place, "f"))
        # e is the manager of a set in which f was withdrawn and e was not.
        await e.write(*e.first_rows())
        await e.write((Kind.ENVIRONMENT, "f", f.environment(state=HEALING)))
        f.shared.pin("agent-e", e.public)
        seen = await e.shared.since(0)
        await f.take(seen)
        with pytest.raises(IntegrityError, match="e counts"):
            await f.shared.begin_term(2, cause="-", now_ms=NOW_MS, approval=signed(f, seen))
        with pytest.raises(IntegrityError, match="e counts"):
            await e.take(forged(f, seen, signed(f, seen)))
    assert theirs.term == 2


@pytest.mark.parametrize("state", ["provisioning", "joining", "retired"])
async def test_only_an_environment_that_had_every_key_is_appointed(tmp_path: Path, state: str) -> None:
    async with registry_of(tmp_path, "a") as a, registry_of(tmp_path, "b") as b:
        await a.write(*a.first_rows())
        await a.write((Kind.ENVIRONMENT, "b", b.environment(state=EnvironmentState(state))))
        await a.write((Kind.ENVIRONMENT, "a", a.environment(state=HEALING)))
        b.shared.pin("agent-a", a.public)
        seen = await a.shared.since(0)
        await b.take(seen)
        with pytest.raises(IntegrityError, match=state):
            await b.shared.begin_term(2, cause="-", now_ms=NOW_MS, approval=signed(b, seen))


# What somebody does with the manager's registry key, while none counts.


def _sound(forger: Forger, name: str) -> Body:
    body = read_body(Kind.ENVIRONMENT, forger.rows[Kind.ENVIRONMENT, name].body)
    assert isinstance(body, EnvironmentBody)
    return msgspec.structs.replace(body, state=EnvironmentState.ACTIVE, registry_key_exposed=False)


def itself_sound(forger: Forger) -> None:
    forger.epoch += 1
    forger.put(Kind.ENVIRONMENT, "a", _sound(forger, "a"))


def another_one_sound(forger: Forger) -> None:
    forger.epoch += 1
    forger.put(Kind.ENVIRONMENT, "c", _sound(forger, "c"))


def a_key_of_its_own(forger: Forger) -> None:
    forger.epoch += 1
    forger.put(Kind.DEK, NEXT_KID, key("a"))


def promoted_by_administrators_of_its_own(forger: Forger) -> None:
    forger.appoint_itself(2)


def appointed_by_administrators_of_its_own(forger: Forger) -> None:
    """In rows of its own term, the last of which it signs now."""
    forger.epoch += 1
    for kind, row_id, body in INVENTED.rows():
        forger.put(kind, row_id, body)
    forger.put(
        Kind.ENVIRONMENT,
        "a",
        msgspec.structs.replace(_sound(forger, "a"), state=HEALING),
    )
    seen = forger.seen = forger.delta()
    payload = recovery_payload(
        agent="agent-a", environment="a", registry_key=forger.public, term=1, epoch=seen.epoch_to,
        digest=seen.digest, by=BY,
    )  # fmt: skip
    approval, asked = INVENTED.approval(Action.ENVIRONMENT_RECOVER, "a", payload, by="mallory trent")
    shown = [(Kind.ENVIRONMENT, "a"), *((Kind.ADMIN, name) for name in INVENTED.keys)]
    forger.begin(2, approval=approval, asked=used(asked), rows=tuple(forger.rows[one] for one in shown))


WITH_THE_MANAGERS_KEY: dict[str, Callable[[Forger], None]] = {
    attack.__name__: attack
    for attack in (
        itself_sound,
        another_one_sound,
        a_key_of_its_own,
        promoted_by_administrators_of_its_own,
        appointed_by_administrators_of_its_own,
    )
}


@pytest.mark.parametrize("attack", WITH_THE_MANAGERS_KEY)
async def test_with_the_managers_exposed_key_nothing_is_written_any_more(site: Site, attack: str) -> None:
    forger = Forger(site.a, site.seen)
    WITH_THE_MANAGERS_KEY[attack](forger)
    await site.refused(forger.delta(), site.b, site.c)


async def test_what_was_written_since_with_the_exposed_key_is_not_gone_on_from(site: Site) -> None:
    """a told b of a key of the attacker's, and c of none. Two administrators have signed what b has."""
    forger = Forger(site.a, site.seen)
    a_key_of_its_own(forger)
    planted = forger.delta()
    approval = signed(site.b, planted)
    delta = forged(site.b, planted, approval)
    await site.refused(delta, site.a, site.c)


async def test_a_withdrawn_holder_shows_nothing_though_its_key_is_its_own(tmp_path: Path) -> None:
    """Of kind kek. Its word is not believed while none counts, its own administrators' least of all."""
    async with AsyncExitStack() as stack:
        a, b = [await stack.enter_async_context(registry_of(tmp_path, name)) for name in "ab"]
        await a.write(*a.first_rows())
        b.shared.pin("agent-a", a.public)
        await a.write((Kind.ENVIRONMENT, "b", b.environment(state=HEALING)))
        await a.write((Kind.ENVIRONMENT, "a", a.environment(state=HEALING)))
        seen = await a.shared.since(0)
        await b.take(seen)
        for attack in (promoted_by_administrators_of_its_own, appointed_by_administrators_of_its_own):
            forger = Forger(a, seen)
            attack(forger)
            with pytest.raises(IntegrityError):
                await b.take(forger.delta())


async def test_who_has_its_mark_alone_goes_on_from_exactly_what_it_knew(site: Site) -> None:
    """c's rows are lost: what it knows of them is their digest. a's key has planted a key since."""
    forger = Forger(site.a, site.seen)
    a_key_of_its_own(forger)
    planted = forger.delta()
    await site.c.sql("DELETE FROM shared_row")
    for approval in (signed(site.b, planted), signed(site.b, site.seen)):
        rows = tuple(row for row in planted.rows if row.kind in (Kind.ENVIRONMENT, Kind.ADMIN))
        with pytest.raises(IntegrityError, match="is not gone on from"):
            await site.c.shared.restore(forged(site.b, planted, approval, rows=rows), now_ms=NOW_MS)
    await site.c.shared.restore(await begin(site, site.b), now_ms=NOW_MS)
    assert appointed(await site.c.shared.snapshot()) is not None


async def test_who_has_its_mark_alone_is_shown_every_environment(tmp_path: Path) -> None:
    """That a counts is left out of what b's term is begun on."""
    async with AsyncExitStack() as stack:
        a, b, c = [await stack.enter_async_context(registry_of(tmp_path, name)) for name in "abc"]
        await a.write(*a.first_rows())
        c.shared.pin("agent-a", a.public)
        await a.write((Kind.ENVIRONMENT, "b", b.environment(state=HEALING)))
        seen = await a.shared.since(0)
        await c.take(seen)
        await c.sql("DELETE FROM shared_row")
        shown = {(Kind.ENVIRONMENT, "b"), (Kind.ADMIN, "ann"), (Kind.ADMIN, "bob")}
        rows = tuple(row for row in seen.rows if row.key in shown)
        with pytest.raises(IntegrityError, match="nothing shows how a is"):
            await c.shared.restore(forged(b, seen, signed(b, seen), rows=rows), now_ms=NOW_MS)


@pytest.mark.parametrize(
    "payload",
    ["[]", "{}", '{"x":' + "[" * 60_000, '{"old_kek":' + "[" * 60_000],
    ids=["list", "empty", "deep", "deep-name"],
)
def test_what_names_no_keks_is_no_recovery(payload: str) -> None:
    with pytest.raises(FormatError):
        read_succession(payload)
