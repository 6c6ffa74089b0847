"""Genuine deliveries, sent once more by whoever is a member: what is not lacked is not taken in."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from envelope.keys import KeyState, KeyUse
from key_agent.environments.keys.deliveries import HELD, QUIET_S, Refusals, Why, judge
from key_agent.environments.keys.wrap_messages import Delivery, Stored
from key_agent.environments.peers.peer_transport import PeerError
from key_agent.environments.peers.peers import WRAPS_PATH
from key_agent.environments.shared.documents import Kind
from key_agent.environments.shared.draft import Draft
from key_agent.environments.states import EnvironmentState
from key_agent.journal import Journal
from runtime.audit import AuditLog
from tests.environments.key_site import FILES, KeySite, key_site
from tests.fakes.clock import ManualClock
from tests.key_agent.conftest import until
from tests.key_agent.environments.keys.parcels import parcels_for
from tests.key_agent.environments.registries import key
from tests.pki import Tenant

KID, OTHER = "11" * 16, "22" * 16
S = EnvironmentState


@pytest.mark.parametrize(
    ("state", "own", "why"),
    [
        (KeyState.PRE_ACTIVE, S.ACTIVE, None),
        (KeyState.ACTIVE, S.ACTIVE, None),
        (KeyState.SUSPENDED, S.ACTIVE, None),
        (KeyState.DEACTIVATED, S.ACTIVE, None),
        (KeyState.COMPROMISED, S.ACTIVE, Why.KEY_STATE),
        (KeyState.COMPROMISED, S.JOINING, None),
        (KeyState.COMPROMISED, S.REJOINING, None),
        (KeyState.COMPROMISED, S.DRAINING, None),
        (KeyState.DESTROYED, S.ACTIVE, Why.KEY_STATE),
        (KeyState.DESTROYED, S.REJOINING, Why.KEY_STATE),
    ],
)
def test_what_is_lacked(state: KeyState, own: EnvironmentState, why: Why | None) -> None:
    found = judge(KID, key("a", state), own=own, held={OTHER})
    assert (None if found is None else found[0]) is why
    held = judge(KID, key("a", state), own=own, held={KID})
    assert held is not None
    assert held[0] is (why or Why.HELD)


def test_what_the_signed_rows_do_not_know_is_not_lacked() -> None:
    found = judge(KID, None, own=S.JOINING, held=set())
    assert found is not None
    assert found[0] is Why.UNKNOWN


@pytest.fixture
async def site(tmp_path: Path, acme: Tenant) -> AsyncIterator[KeySite]:
    async with key_site(tmp_path, acme, "abc") as made:
        await made.unite()
        await made["a"].manager.ensure_service(FILES, KeyUse.DATA, None)
        await made.keys_active()
        await made.in_step()
        yield made


async def play(site: KeySite, by: str, to: str, delivery: Delivery) -> Stored:
    """By its own TLS identity."""
    answer = await site[by].environments.peers.post(
        to, WRAPS_PATH, msgspec.json.encode(delivery), method="PUT"
    )
    return msgspec.json.decode(answer, type=Stored)


async def rows(site: KeySite, name: str) -> list[Any]:
    return sorted(await site[name].sql("SELECT dek_id, kek_id, wrapped, state, made_at_ms FROM dek_wrap"))


def refusals(site: KeySite, name: str) -> list[dict[str, Any]]:
    lines = (site[name].directory / "audit.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["action"] == "wraps-refused"]


async def written(site: KeySite, name: str, count: int) -> dict[str, Any]:
    """The last of so many refusals."""
    await until(lambda: len(refusals(site, name)) >= count, timeout_s=30)
    assert len(refusals(site, name)) == count
    return refusals(site, name)[-1]


async def put(site: KeySite, kind: Kind, name: str, **changes: object) -> None:
    def change(draft: Draft) -> None:
        of = draft.shared.environments if kind is Kind.ENVIRONMENT else draft.shared.deks
        draft.put(kind, name, msgspec.structs.replace(of[name], **changes))

    await site["a"].change(change)
    await site.in_step()


async def test_what_is_here_is_not_taken_in_again_nor_shown_to_the_hsm(site: KeySite) -> None:
    delivery = await parcels_for(site, "b")
    before, asked = await rows(site, "b"), len(site["b"].fake.calls)
    for by in ("c", "a"):
        found = await play(site, by, "b", delivery)
        assert found == Stored(verified=(), failed={one.key_id: HELD for one in delivery.keys})
    assert await rows(site, "b") == before
    assert "import_keys" not in site["b"].fake.calls[asked:]
    await written(site, "b", 2)
    assert [
        (one["agent"], one["environment"], one["reason"], one["wraps"]) for one in refusals(site, "b")
    ] == [("agent-c", "c", "held", 3), ("agent-a", "a", "held", 3)]


async def test_one_that_the_hsm_did_not_open_is_taken_in(site: KeySite) -> None:
    """The rows look sound, and are not: that is known since it was last looked."""
    delivery = await parcels_for(site, "b")
    kid, other = (one.key_id for one in delivery.keys[:2])
    [(wrapped, digest)] = await site["b"].sql(
        "SELECT wrapped, wrapped_sha256 FROM dek_wrap WHERE dek_id = :kid", kid=other
    )
    await site["b"].sql(
        "UPDATE dek_wrap SET wrapped = :wrapped, wrapped_sha256 = :digest WHERE dek_id = :kid",
        wrapped=wrapped,
        digest=digest,
        kid=kid,
    )
    assert not await site["b"].opens([kid])
    assert kid in (await play(site, "c", "b", delivery)).failed
    assert await site["a"].manager.prove("b") == {}
    assert await site["b"].opens([one.key_id for one in delivery.keys])
    assert (await play(site, "c", "b", delivery)).verified == ()


async def test_a_compromised_key_comes_back_to_none_that_serves(site: KeySite) -> None:
    delivery = await parcels_for(site, "b")
    lost = delivery.keys[0].key_id
    await put(site, Kind.DEK, lost, state=KeyState.COMPROMISED)
    await site["b"].sql("DELETE FROM dek_wrap WHERE dek_id = :kid", kid=lost)
    assert (await play(site, "c", "b", delivery)).failed[lost] == "compromised"
    assert lost not in await site["b"].wrapped()
    assert {one["reason"] for one in refusals(site, "b")} <= {"key-state", "held"}
    await written(site, "b", 2)
    # One that returns has to have it, for a rescue; it stays what the signed rows say.
    await put(site, Kind.ENVIRONMENT, "b", state=S.REJOINING, incident_id="inc-1")
    assert (await play(site, "a", "b", delivery)).verified == (lost,)
    assert site["b"].deks[lost].state is KeyState.COMPROMISED


async def test_who_heals_delivers_nothing_and_is_named(site: KeySite) -> None:
    to_a = await parcels_for(site, "b")
    await put(site, Kind.ENVIRONMENT, "c", state=S.HEALING, incident_id="inc-1")
    await site["b"].sql("DELETE FROM dek_wrap WHERE dek_id = :kid", kid=to_a.keys[0].key_id)
    with pytest.raises(PeerError, match="not_believed"):
        await play(site, "c", "b", to_a)
    assert to_a.keys[0].key_id not in await site["b"].wrapped()
    told = await written(site, "b", 1)
    assert (told["agent"], told["environment"], told["reason"]) == ("agent-c", "c", "sender")
    # And takes none.
    with pytest.raises(PeerError, match="stores no keys"):
        await play(site, "b", "c", msgspec.structs.replace(to_a, environment="c", kek_id="kek-c"))
    told = await written(site, "c", 1)
    assert (told["agent"], told["reason"], told["outcome"]) == ("agent-b", "state", "refused")


async def test_other_reasons_and_other_agents_are_events_of_their_own(site: KeySite) -> None:
    delivery = await parcels_for(site, "b")
    await play(site, "c", "b", delivery)
    for elsewhere in ({"environment": "a"}, {"kek_id": "kek-a"}):
        found = await play(site, "c", "b", msgspec.structs.replace(delivery, **elsewhere))
        assert found.verified == ()
        assert all("the one of today is kek-b of b" in why for why in found.failed.values())
    assert (await written(site, "b", 2))["reason"] == "destination"
    await play(site, "a", "b", delivery)
    assert (await written(site, "b", 3))["agent"] == "agent-a"
    exchanged = tuple(
        msgspec.structs.replace(one, sealed=other.sealed)
        for one, other in zip(delivery.keys, (*delivery.keys[1:], delivery.keys[0]), strict=True)
    )
    await site["b"].sql("DELETE FROM dek_wrap")
    assert (await play(site, "c", "b", msgspec.structs.replace(delivery, keys=exchanged))).verified == ()
    assert await rows(site, "b") == []
    assert (await written(site, "b", 4))["reason"] == "parcel"


async def test_nobody_fills_the_audit_log_and_no_refusal_is_left_out(
    tmp_path: Path, clock: ManualClock
) -> None:
    log = AuditLog.open(tmp_path / "audit.jsonl", clock)
    journal = Journal(log)
    refusals = Refusals(journal, clock)

    def events() -> list[tuple[int, int, str]]:
        lines = map(json.loads, log.path.read_text().splitlines())
        return [(one["deliveries"], one["wraps"], one["kid"]) for one in lines]

    async def play_again() -> None:
        refusals.tell("agent-c", "c", Why.HELD, HELD, [KID, OTHER])

    running = asyncio.create_task(refusals.run(), name="refusals")
    await clock.wait_for_sleepers(1)
    for _ in range(20):
        await play_again()
    await journal.record("x", deliveries=0, wraps=0, kid="")  # what was noted before is written
    assert events()[:-1] == [(1, 2, KID)]
    # Its time is over: what was counted is written, and the next is new.
    await clock.advance(QUIET_S)
    await clock.advance(QUIET_S)
    await play_again()
    await journal.record("x", deliveries=0, wraps=0, kid="")
    assert [one for one in events() if one[0]] == [(1, 2, KID), (19, 38, KID), (1, 2, KID)]
    # Without the loop, the next one has the count written.
    running.cancel()
    await play_again()
    clock.shift(QUIET_S)
    await play_again()
    await journal.close()
    assert [one for one in events() if one[0]][3:] == [(1, 2, KID), (1, 2, KID)]


async def test_a_manager_whose_answer_was_lost_asks_what_is_there(site: KeySite) -> None:
    """b has taken the key in; the manager does not know, sends it again, is refused, and looks."""
    keys = await site.keys_active()
    standing = site["a"].manager.bringing.standings["b"]
    assert standing.looked_boot_s is not None
    standing.proven.discard(keys["c"])
    site["a"].manager.wake()
    await until(lambda: keys["c"] in standing.proven, timeout_s=30)
    assert standing.failed == {}
    told = await written(site, "b", 1)
    assert (told["agent"], told["reason"], told["kid"]) == ("agent-a", "held", keys["c"])
