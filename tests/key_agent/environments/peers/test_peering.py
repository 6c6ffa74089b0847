"""Agents of several environments in step: real TLS and databases, a network that is cut, clocks that skip."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import text

from envelope.errors import IntegrityError
from key_agent.consent import EnvironmentStanding
from key_agent.environments.peers import peer_rows
from key_agent.environments.peers.own_word import DECLARATION_NAME, Declaration, Notice
from key_agent.environments.peers.peer_transport import PeerAddress, PeerError
from key_agent.environments.peers.peers import HEARTBEAT_PATH, REGISTRY_PATH
from key_agent.environments.shared.documents import EnvironmentBody, Kind
from key_agent.environments.shared.draft import Draft
from key_agent.environments.shared.registry_key import read_or_make_registry_key
from key_agent.environments.shared.registry_lease import Position
from key_agent.environments.shared.shared_errors import RegistryTamperedError, StaleTermError
from key_agent.environments.states import EnvironmentState
from key_agent.registry.store import RefusedChangeError
from tests import postgres
from tests.environments.members import Member, MembersSite, members
from tests.key_agent.conftest import until
from tests.key_agent.environments.forger import Forger
from tests.pki import Tenant


@pytest.fixture
async def site(tmp_path: Path, acme: Tenant) -> AsyncIterator[MembersSite]:
    async with members(tmp_path, acme, "abc") as made:
        await made.unite()
        await until(lambda: all(serves(made[name]) for name in "abc"))
        yield made


class Breached(NamedTuple):
    """Whose registry key somebody else has."""

    name: str
    key: Ed25519PrivateKey


def serves(member: Member) -> bool:
    return member.consent.environment is EnvironmentStanding.SERVES


def proves(member: Member) -> bool:
    """Whether it serves on a proof of its lease that is as good as new."""
    left_s = member.peering.lease_left_s()
    return serves(member) and left_s is not None and left_s > 280


def acts_as(member: Member) -> str:
    return str(member.peering.verdict.state)


def state_of(seen_by: Member, name: str) -> EnvironmentState:
    body: EnvironmentBody = seen_by.peering.view.environments[name]
    return body.state


def renamed(name: str, region: str) -> Any:
    """A change that is harmless: the region of an environment."""

    def change(draft: Draft) -> None:
        body = draft.shared.environments[name]
        draft.put(Kind.ENVIRONMENT, name, msgspec.structs.replace(body, region=region))

    return change


async def test_what_the_manager_writes_everybody_has_at_once(tmp_path: Path, acme: Tenant) -> None:
    """And not when the next heartbeat is due."""
    async with members(tmp_path, acme, "abc", heartbeat_s=15) as site:
        await site.unite()
        took_s = 0.0
        for number in range(10):
            await site["a"].change(renamed("a", f"region {number}"))
            took_s += await site.in_step()
        assert all(site[name].peering.view.environments["a"].region == "region 9" for name in "abc")
        assert took_s < 60, "ten heartbeats take 150 s"


async def test_an_environment_that_was_away_catches_up_before_it_serves(site: MembersSite) -> None:
    b = site["b"]
    await site.in_step()
    await b.stop()
    await site["a"].change(renamed("b", "moved"))
    await site.in_step("a", "c")
    seen: list[tuple[bool, Position]] = []
    await b.start()
    b.peering.listen(lambda view: seen.append((serves(b), b.peering.position)))
    assert not serves(b)  # it has heard nobody yet
    await until(lambda: serves(b))
    newest = site["a"].peering.position
    assert all(position == newest for is_serving, position in seen if is_serving)
    assert b.peering.view.environments["b"].region == "moved"


async def test_cut_off_it_stops_when_its_lease_is_over_and_learns_before_it_serves_again(
    site: MembersSite,
) -> None:
    b = site["b"]
    await site.in_step()
    b.cut_off()
    await site["a"].change(renamed("b", "while it was away"))
    await site.in_step("a", "c")
    b.clock.skip(200)  # the rest is for a machine that is slow
    await asyncio.sleep(0.4)
    assert serves(b)
    left_s = b.peering.lease_left_s()
    assert left_s is not None
    assert left_s < 101
    b.clock.skip(101)
    await until(lambda: not serves(b))
    assert b.consent.environment is EnvironmentStanding.WITHDRAWN
    assert acts_as(b) == "healing"
    assert state_of(b, "b") is EnvironmentState.ACTIVE  # nobody has said so; it acts so
    assert serves(site["a"])
    assert serves(site["c"])
    was = b.peering.position
    states: list[tuple[bool, bool]] = []
    b.peering.listen(lambda view: states.append((serves(b), b.peering.position > was)))
    b.reconnect()
    await until(lambda: serves(b))
    assert all(knows for is_serving, knows in states if is_serving)


async def test_of_three_two_go_on_and_one_does_not_whoever_is_the_manager(site: MembersSite) -> None:
    a = site["a"]
    await site.in_step()
    a.cut_off()
    for member in site.members.values():
        member.clock.skip(301)
    await until(lambda: not serves(a))
    await until(lambda: serves(site["b"]) and serves(site["c"]))
    # It may still write what nobody learns; it is the manager as far as it knows.
    assert a.peering.leads
    a.reconnect()
    await until(lambda: all(map(serves, site.members.values())))


async def test_a_manager_that_was_cut_off_is_fenced_when_another_was_promoted(site: MembersSite) -> None:
    a, b, c = (site[name] for name in "abc")
    await site.in_step()
    a.cut_off()
    promoted = await site.promote(b)
    assert promoted["former"] == "a"
    assert promoted["former_knows"] is False
    assert promoted["spread"] == {"a": False, "c": True}
    # The old one goes on writing, into its own registry; and more than the new one has.
    for number in range(3):
        await a.change(renamed("c", f"stale {number}"))
    assert a.peering.position.epoch > b.peering.position.epoch
    stale = await a.environments.shared.since(0)
    with pytest.raises(StaleTermError):
        await c.peering.rows.offered(stale, "agent-a")
    a.reconnect()
    with pytest.raises(PeerError) as refused:
        await a.environments.peers.send_delta("c", stale)
    assert refused.value.code == "stale_term"
    await site.in_step()
    assert a.peering.position.term == b.peering.position.term == 2
    assert not a.peering.leads
    assert b.peering.leads
    assert a.peering.view.environments["c"].region == ""
    await b.change(renamed("c", "new"))
    await site.in_step()
    assert a.peering.view.environments["c"].region == "new"
    with pytest.raises(RefusedChangeError, match="not the manager"):
        await a.commands.env_drain(environment="c")


async def test_a_promotion_needs_two_administrators_and_serves_once(site: MembersSite) -> None:
    b = site["b"]
    await site.in_step()
    promotion = await b.commands.env_promotion()
    for signed in (
        site.sign(promotion, "ann"),
        {"approval": promotion["approval"], "asked": promotion["asked"]},
    ):
        with pytest.raises(Exception, match="of 2 signatures"):
            await b.commands.env_promote(**signed)
    other = await site["c"].commands.env_promotion()  # signed for another environment
    with pytest.raises(Exception, match="not"):
        await b.commands.env_promote(**site.sign(other))
    assert b.peering.position.term == 1
    signed = site.sign(promotion)
    await b.commands.env_promote(**signed)
    await site.in_step()
    await site.promote(site["c"])
    await site.in_step()
    with pytest.raises(Exception, match="used"):
        await b.commands.env_promote(**signed)
    assert [member.peering.leads for member in site.members.values()] == [False, False, True]


async def test_nobody_is_stopped_by_a_claim_that_cannot_be_shown(site: MembersSite) -> None:
    """A breached agent answers that it has term 900, and gives rows that nobody has signed."""
    b = site["b"]
    await site.in_step()
    answer, since = b.peering.answer, b.environments.shared.since

    def lie(question: Any) -> Any:
        from key_agent.environments.peers.heartbeats import sign_heartbeat

        beat = msgspec.structs.replace(answer(question), term=900, epoch=9000)
        return sign_heartbeat(beat, b.environments._registry_key)

    async def forge(epoch: int) -> Any:
        delta = await since(epoch)
        return msgspec.structs.replace(delta, term=900, epoch_to=9000)

    b.peering.answer = lie
    b.environments.shared.since = forge  # type: ignore[method-assign]
    await until(lambda: site["a"].peering.sights["b"].error)
    await site["a"].change(renamed("c", "goes on"))
    await site.in_step("a", "c")
    for member in site.members.values():
        member.clock.skip(301)
    await until(lambda: proves(site["a"]) and proves(site["c"]))
    assert site["a"].peering.position.term == 1


def claims(b: Member, **claim: Any) -> None:
    """From now on *b* says that this is where it stands."""
    from key_agent.environments.peers.heartbeats import sign_heartbeat

    answer = b.peering.answer

    def lie(question: Any) -> Any:
        beat = msgspec.structs.replace(answer(question), **claim)
        return sign_heartbeat(beat, b.environments._registry_key)

    b.peering.answer = lie


@pytest.mark.parametrize("term", [1, 900])
async def test_nobody_is_stopped_by_a_claim_whose_rows_are_never_given(site: MembersSite, term: int) -> None:
    """b says that it has something newer, and answers every question for it with an error."""
    a, b, c = (site[name] for name in "abc")
    await site.in_step()
    claims(b, term=term, epoch=9000)

    async def fail(epoch: int) -> Any:
        raise RegistryTamperedError("so sorry")

    b.environments.shared.since = fail  # type: ignore[method-assign]
    await until(lambda: a.peering.sights["b"].error and c.peering.sights["b"].error)
    for _ in range(3):  # it lasts, and not only between two of its answers
        for member in (a, c):
            member.clock.skip(200)
        await until(lambda: proves(a) and proves(c))
    assert a.peering.position.term == 1


async def test_who_is_withdrawn_brings_nothing(site: MembersSite) -> None:
    b, c = site["b"], site["c"]
    await site.in_step()

    def withdraw(draft: Draft) -> None:
        body = draft.shared.environments["b"]
        draft.put(Kind.ENVIRONMENT, "b", msgspec.structs.replace(body, state=EnvironmentState.HEALING))

    await site["a"].change(withdraw)
    await site.in_step()
    with pytest.raises(PeerError) as refused:
        await b.environments.peers.send_delta("c", await b.environments.shared.since(0))
    assert refused.value.code == "not_believed"
    assert serves(c)


async def test_a_manager_that_is_withdrawn_takes_nothing_back(site: MembersSite) -> None:
    """Its term goes on until another one follows. It writes nothing itself; what is forged nobody takes."""
    a, b, c = (site[name] for name in "abc")
    await site.in_step()

    def set_state(state: EnvironmentState) -> Any:
        def change(draft: Draft) -> None:
            body = draft.shared.environments["a"]
            draft.put(Kind.ENVIRONMENT, "a", msgspec.structs.replace(body, state=state))

        return change

    sound = a.peering.view.environments["a"]
    await a.change(set_state(EnvironmentState.HEALING))
    await site.in_step()
    epoch = b.peering.position.epoch
    with pytest.raises(IntegrityError):
        await a.change(set_state(EnvironmentState.ACTIVE))
    forger = Forger(
        Breached("a", read_or_make_registry_key(a.directory)), await a.environments.shared.since(0)
    )
    forger.epoch += 1
    forger.put(Kind.ENVIRONMENT, "a", sound)
    for member in (a, b, c):
        with pytest.raises(IntegrityError):
            await member.peering.apply(forger.delta())
    assert state_of(b, "a") is state_of(c, "a") is EnvironmentState.HEALING
    assert b.peering.position.epoch == c.peering.position.epoch == epoch
    await site.promote(b)
    await site.in_step()
    assert state_of(a, "a") is EnvironmentState.HEALING
    assert b.peering.leads


@pytest.mark.parametrize("follows", ["nobody", "b"])
async def test_a_withdrawn_manager_offers_itself_with_administrators_of_its_own(
    site: MembersSite, follows: str
) -> None:
    """One that is withdrawn may offer a new term of its own; what it signed itself shows nothing."""
    a, b, c = (site[name] for name in "abc")
    await site.in_step()

    def withdraw(draft: Draft) -> None:
        body = draft.shared.environments["a"]
        gone = msgspec.structs.replace(body, state=EnvironmentState.HEALING, registry_key_exposed=True)
        draft.put(Kind.ENVIRONMENT, "a", gone)

    await a.change(withdraw)
    await site.in_step()
    old = await a.environments.shared.since(0)
    if follows == "b":
        await site.promote(b)
        await site.in_step()
    forger = Forger(Breached("a", read_or_make_registry_key(a.directory)), old)
    forger.appoint_itself(2, at_ms=a.now_ms() + 60_000)
    for number in range(3, b.peering.position.term + 2):
        forger.follow_itself(number, at_ms=a.now_ms() + 60_000)
    before = {member.name: member.peering.view.digest for member in (b, c)}
    for member in (b, c):
        with pytest.raises(PeerError) as refused:
            await a.environments.peers.send_delta(member.name, forger.delta())
        assert refused.value.code == "not_believed"
        assert member.peering.view.digest == before[member.name]
        assert state_of(member, "a") is EnvironmentState.HEALING


async def test_two_managers_of_one_term_become_one_when_they_meet(site: MembersSite) -> None:
    a, b, c = (site[name] for name in "abc")
    await site.in_step()
    a.cut_off()
    b.cut_off()
    await site.promote(b)
    await b.change(renamed("a", "as b has it"))
    c.clock.skip(1)  # c's administrators are asked a second later
    await site.promote(c)
    assert b.peering.leads
    assert c.peering.leads
    assert b.peering.position.term == c.peering.position.term == 2
    for member in (a, b):
        member.reconnect()
    await site.in_step()
    assert [member.peering.leads for member in (a, b, c)] == [False, False, True]
    assert a.peering.view.environments["a"].region == ""
    await until(lambda: all(map(serves, (a, b, c))))


async def test_rows_edited_in_the_database_stop_the_environment_until_they_are_restored(
    site: MembersSite,
) -> None:
    b = site["b"]
    await site.in_step()
    before = b.peering.view.digest
    await b.registry._database.transact(
        lambda c: c.execute(text("UPDATE shared_row SET body = replace(body, 'agent-a', 'agent-x')"))
    )
    heard: list[str] = []
    b.peering.listen(lambda view: heard.append(acts_as(b)))
    b.peering._verify.set()
    await until(lambda: "healing" in heard)
    await until(lambda: serves(b))
    assert b.peering.tampered is None
    assert b.peering.view.digest == before
    assert serves(site["a"])
    audit = b.directory / "audit.jsonl"  # notes are written soon, not at once
    await until(lambda: "registry-restored" in audit.read_text())
    assert "registry-tampered" in audit.read_text()


def test_a_word_that_cannot_be_removed_from_the_disk_ends_all_the_same(tmp_path: Path) -> None:
    """And is said once more after a restart; it does not end the agent."""
    (tmp_path / DECLARATION_NAME).mkdir()
    word = Declaration(tmp_path)
    word.end()
    assert word.reason is None
    assert Declaration(tmp_path).reason is not None


async def test_an_environments_own_word_needs_no_manager_and_survives_a_restart(site: MembersSite) -> None:
    b, ratified = site["b"], asyncio.Event()
    await site.in_step()
    site["a"].cut_off()

    await b.peering.declare("the agent's machine was opened")
    assert b.consent.environment is EnvironmentStanding.WITHDRAWN
    await until(lambda: "b" in site["c"].peering.notices)
    assert "b" not in site["c"].peering._members().counted
    assert "b" not in site["a"].peering.notices
    await b.stop()
    await b.start()
    assert b.consent.environment is EnvironmentStanding.WITHDRAWN
    assert b.consent.environment_reason == "the agent's machine was opened"

    async def ratify(notice: Any) -> None:
        def change(draft: Draft) -> None:
            body = draft.shared.environments[notice.environment]
            draft.put(
                Kind.ENVIRONMENT,
                notice.environment,
                msgspec.structs.replace(body, state=EnvironmentState.HEALING, reason=notice.reason),
            )

        if state_of(site["a"], "b") is not EnvironmentState.HEALING:
            await site["a"].change(change)
        ratified.set()

    site["a"].peering.ratify = ratify
    site["a"].reconnect()
    b.peering._verify.set()  # it repeats its word every now and then
    await asyncio.wait_for(ratified.wait(), 150)  # one that is lost is repeated after 30 s
    await site.in_step()
    await until(lambda: not (b.directory / DECLARATION_NAME).exists())
    assert state_of(site["c"], "b") is EnvironmentState.HEALING
    assert not site["c"].peering.notices
    late = Notice(environment="b", reason="the agent's machine was opened", at_ms=1)
    await site["c"].peering.noticed(late)
    assert not site["c"].peering.notices, "a word that comes after the row would stand until the next one"
    assert acts_as(b) == "healing"


async def test_an_unreadable_declaration_still_counts(tmp_path: Path, acme: Tenant) -> None:
    async with members(tmp_path, acme, "a") as made:
        a = made["a"]
        await a.stop()
        (a.directory / DECLARATION_NAME).write_bytes(b"\xff")
        await a.start()
        assert a.consent.environment is EnvironmentStanding.WITHDRAWN


async def test_nobody_speaks_for_another_environment(site: MembersSite) -> None:
    await site.in_step()
    body = b'{"environment": "c", "reason": "down with it", "at_ms": 1}'
    with pytest.raises(PeerError) as refused:
        await site["b"].environments.peers.post("a", "/v1/env/notice", body)
    assert refused.value.code == "not_believed"
    assert not site["a"].peering.notices


async def test_a_hanging_environment_holds_up_nobody(site: MembersSite) -> None:
    """Its agent accepts and never answers: the others have a change all the same, before any time-out."""
    await site.in_step()
    for name in "ac":
        site[name].transport.hanging.add("agent-b")
    await site["a"].change(renamed("a", "without it"))
    await site.in_step("a", "c")
    assert site["c"].peering.view.environments["a"].region == "without it"


async def test_two_environments_the_managers_goes_on_alone(tmp_path: Path, acme: Tenant) -> None:
    async with members(tmp_path, acme, "ab") as made:
        await made.unite()
        await until(lambda: serves(made["a"]) and serves(made["b"]))
        made["b"].cut_off()
        for member in made.members.values():
            member.clock.skip(301)
        await until(lambda: not serves(made["b"]))
        assert serves(made["a"])


async def test_heartbeats_and_digests_are_all_that_is_said_when_nothing_happens(site: MembersSite) -> None:
    await site.in_step()
    a = site["a"]
    await until(lambda: a.peering.sights["b"].position == a.peering.position)
    await until(lambda: a.peering.sights["c"].position == a.peering.position)
    a.transport.calls.clear()
    await until(lambda: len(a.transport.calls) > 5)
    assert {path for _, _, path in a.transport.calls} == {HEARTBEAT_PATH}
    assert REGISTRY_PATH not in {path for _, _, path in a.transport.calls}


def held_up(member: Member, verb: str, agent_id: str) -> asyncio.Event:
    """Rows from or to that agent, which *member* asks for or brings, are on their way until it is set."""
    gate = asyncio.Event()
    real = member.transport.request

    async def request(
        peer: PeerAddress, method: str, path: str, body: bytes | None = None, **more: Any
    ) -> bytes:
        if (method, peer.agent_id) == (verb, agent_id) and path.startswith(REGISTRY_PATH):
            member.transport.calls.append((peer.agent_id, f"{method} begun", path))
            await gate.wait()
        return await real(peer, method, path, body, **more)

    member.transport.request = request  # type: ignore[method-assign]
    return gate


async def test_rows_that_are_long_on_their_way_keep_nobody_from_being_heard(site: MembersSite) -> None:
    """Two that need each other's voice do not lose it over the rows that one brings or the other asks for."""
    a, b, c = (site[name] for name in "abc")
    await site.in_step()
    brought, pulled = held_up(a, "PUT", b.agent_id), held_up(b, "GET", a.agent_id)
    c.cut_off()
    await a.change(renamed("c", "new"))
    await until(lambda: (b.agent_id, "PUT begun", REGISTRY_PATH) in a.transport.calls)
    await until(lambda: any(how == "GET begun" for _, how, _ in b.transport.calls))
    began_s = a.clock.boot_s()
    await until(lambda: a.peering.proven_boot_s() > began_s)
    asked = b.transport.calls.count((a.agent_id, "POST", HEARTBEAT_PATH))
    await until(lambda: b.transport.calls.count((a.agent_id, "POST", HEARTBEAT_PATH)) > asked + 2)
    assert b.peering.position < a.peering.position
    pulled.set()
    brought.set()
    await site.in_step("a", "b")
    await until(lambda: b.peering.proven_boot_s() > began_s)


async def test_a_withdrawal_counts_before_its_rows_are_here(
    site: MembersSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long they take; and no longer than until they are here."""
    monkeypatch.setattr(peer_rows, "MANY", 1)
    a, b = site["a"], site["b"]
    await site.in_step()
    brought = held_up(a, "PUT", b.agent_id)
    pulled = [held_up(b, "GET", site[name].agent_id) for name in "ac"]

    def withdrawn(draft: Draft) -> None:
        body = draft.shared.environments["b"]
        changed = msgspec.structs.replace(body, state=EnvironmentState.HEALING, reason="breached")
        draft.put(Kind.ENVIRONMENT, "b", changed)

    await a.change(withdrawn)
    await until(lambda: b.peering.verdict.standing is EnvironmentStanding.WITHDRAWN)
    assert b.peering.verdict.state == "healing"
    assert b.peering.position < a.peering.position
    assert state_of(b, "b") is EnvironmentState.ACTIVE
    for gate in (brought, *pulled):
        gate.set()
    await site.in_step()
    assert state_of(b, "b") is EnvironmentState.HEALING

    def back(draft: Draft) -> None:
        body = draft.shared.environments["b"]
        draft.put(Kind.ENVIRONMENT, "b", msgspec.structs.replace(body, state=EnvironmentState.ACTIVE))

    await a.change(back)
    await until(lambda: serves(b))


@pytest.mark.parametrize(
    ("signer", "whose", "ahead", "term", "code"),
    [
        pytest.param("c", "b", 1, 1, "not_believed", id="signed-by-somebody-else"),
        pytest.param("a", "c", 1, 1, "not_believed", id="of-another-environment"),
        pytest.param("a", "b", 1, 2, "not_believed", id="of-a-term-that-nobody-knows"),
        pytest.param("a", "b", 0, 1, None, id="of-an-epoch-that-is-here"),
    ],
)
async def test_a_foreword_that_proves_nothing_takes_nothing_away(
    site: MembersSite, *, signer: str, whose: str, ahead: int, term: int, code: str | None
) -> None:
    a, b = site["a"], site["b"]
    await site.in_step()
    seen = await a.environments.shared.since(0)
    forger = Forger(Breached(signer, read_or_make_registry_key(site[signer].directory)), seen)
    body = msgspec.structs.replace(b.peering.view.environments[whose], state=EnvironmentState.HEALING)
    forger.put(Kind.ENVIRONMENT, whose, body, term=term, epoch=seen.epoch_to + ahead)
    row = forger.rows[Kind.ENVIRONMENT, whose]
    refused: str | None = None
    try:
        await site["c"].environments.peers.forewarn("b", row)
    except PeerError as error:
        refused = error.code
    assert refused == code
    assert serves(b)
    assert b.peering.verdict.state == "active"


async def test_a_foreword_gives_nothing_back(site: MembersSite) -> None:
    """It serves again when its rows are here, those of restricted keys among them; no sooner."""
    a, b = site["a"], site["b"]
    await site.in_step()

    def withdrawn(draft: Draft) -> None:
        body = draft.shared.environments["b"]
        draft.put(Kind.ENVIRONMENT, "b", msgspec.structs.replace(body, state=EnvironmentState.HEALING))

    await a.change(withdrawn)
    await until(lambda: acts_as(b) == "healing")
    await site.in_step()
    seen = await a.environments.shared.since(0)
    forger = Forger(Breached("a", read_or_make_registry_key(a.directory)), seen)
    body = msgspec.structs.replace(b.peering.view.environments["b"], state=EnvironmentState.ACTIVE)
    forger.put(Kind.ENVIRONMENT, "b", body, term=1, epoch=seen.epoch_to + 1)
    await site["c"].environments.peers.forewarn("b", forger.rows[Kind.ENVIRONMENT, "b"])
    assert b.peering.verdict.reason == "it is healing"
    assert not serves(b)


async def test_a_manager_that_is_withdrawn_warns_of_nothing(site: MembersSite) -> None:
    """It still has the key of its term, and the others do not stop by its word."""
    a, b, c = (site[name] for name in "abc")
    await site.in_step()

    def withdrawn(draft: Draft) -> None:
        body = draft.shared.environments["a"]
        draft.put(Kind.ENVIRONMENT, "a", msgspec.structs.replace(body, state=EnvironmentState.HEALING))

    await a.change(withdrawn)
    await until(lambda: state_of(b, "a") is EnvironmentState.HEALING and serves(b))  # it has heard c
    seen = await a.environments.shared.since(0)
    forger = Forger(Breached("a", read_or_make_registry_key(a.directory)), seen)
    body = msgspec.structs.replace(b.peering.view.environments["b"], state=EnvironmentState.HEALING)
    forger.put(Kind.ENVIRONMENT, "b", body, term=1, epoch=seen.epoch_to + 1)
    with pytest.raises(PeerError) as refused:
        await c.environments.peers.forewarn("b", forger.rows[Kind.ENVIRONMENT, "b"])
    assert refused.value.code == "not_believed"
    assert acts_as(b) == "active"


async def test_an_older_foreword_does_not_take_the_place_of_a_newer_one(site: MembersSite) -> None:
    """It would count until its own epoch alone, and the rows of that may say that the environment serves."""
    a, b, c = (site[name] for name in "abc")
    await site.in_step()
    seen = await a.environments.shared.since(0)
    forger = Forger(Breached("a", read_or_make_registry_key(a.directory)), seen)
    own = b.peering.view.environments["b"]
    for state, ahead in ((EnvironmentState.HEALING, 3), (EnvironmentState.HEALED, 2)):
        body = msgspec.structs.replace(own, state=state)
        forger.put(Kind.ENVIRONMENT, "b", body, term=1, epoch=seen.epoch_to + ahead)
        await c.environments.peers.forewarn("b", forger.rows[Kind.ENVIRONMENT, "b"])
        assert acts_as(b) == "healing"
    for region in ("one", "two"):
        await a.change(renamed("c", region))
        await until(lambda: b.peering.position == a.peering.position)
        assert acts_as(b) == "healing"
    await a.change(renamed("c", "three"))
    await until(lambda: serves(b))  # what was foretold is here, and says something else


async def test_rows_are_brought_once_whoever_waits_for_them(site: MembersSite) -> None:
    a, b = site["a"], site["b"]
    await site.in_step()
    held_up(b, "GET", a.agent_id)
    held_up(b, "GET", site["c"].agent_id)
    gate = held_up(a, "PUT", b.agent_id)
    a.transport.calls.clear()
    await a.change(renamed("c", "new"))
    assert await a.peering.spread(["b"], timeout_s=0.2) == {"b": False}  # it does not wait for ever
    spreading = asyncio.create_task(a.peering.spread(["b"], timeout_s=60))
    gate.set()
    assert await spreading == {"b": True}
    assert a.transport.calls.count((b.agent_id, "PUT", REGISTRY_PATH)) == 1


async def test_rows_are_given_while_others_are_written(site: MembersSite) -> None:
    """A database that takes its time keeps nobody waiting for what is known."""
    a = site["a"]
    await site.in_step()
    shared, registry = a.environments.shared, a.registry
    before = await shared.since(0)
    gate, is_begun = asyncio.Event(), asyncio.Event()
    real = registry.transact

    async def slow(work: Any) -> Any:
        is_begun.set()
        await gate.wait()
        return await real(work)

    registry.transact = slow  # type: ignore[method-assign]
    writing = asyncio.create_task(a.change(renamed("c", "new")))
    await is_begun.wait()
    async with asyncio.timeout(60):
        assert await shared.since(0) == before
    assert not writing.done()
    gate.set()
    await writing
    assert (await shared.since(0)).epoch_to == before.epoch_to + 1


@pytest.mark.skipif(
    postgres.URL_VARIABLE not in os.environ, reason="no PostgreSQL: run by `python -m tests.postgres`"
)
async def test_the_same_on_postgresql(tmp_path: Path, acme: Tenant) -> None:
    from sqlalchemy import create_engine
    from sqlalchemy.engine import make_url

    common = make_url(os.environ[postgres.URL_VARIABLE])
    engine = create_engine(common, isolation_level="AUTOCOMMIT")
    names = {name: f"{common.database}_env_{name}" for name in "abc"}
    with engine.connect() as connection:
        for database in names.values():
            connection.execute(text(f'DROP DATABASE IF EXISTS "{database}"'))
            connection.execute(text(f'CREATE DATABASE "{database}"'))
    try:
        async with members(
            tmp_path,
            acme,
            "abc",
            urls=lambda name: common.set(database=names[name]).render_as_string(hide_password=False),
        ) as made:
            await made.unite()
            await until(lambda: all(map(serves, made.members.values())))
            made["a"].cut_off()
            await made.promote(made["b"])
            await made["b"].change(renamed("c", "new"))
            made["a"].reconnect()
            await made.in_step()
    finally:
        with engine.connect() as connection:
            for database in names.values():
                connection.execute(text(f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)'))
        engine.dispose()
