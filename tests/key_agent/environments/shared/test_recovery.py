"""No environment counts: two administrators appoint one, which takes its own keys and brings others back."""

import asyncio
import base64
import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from envelope.errors import IntegrityError
from envelope.keys import KeyId, KeyState
from key_agent.environments.changes.healing_changes import retire_payload
from key_agent.environments.incidents.evidence import verify_bundle
from key_agent.environments.keys import own_wraps
from key_agent.environments.shared import approvals
from key_agent.environments.shared.approvals import Action, ApprovalError
from key_agent.environments.shared.documents import ApprovalBody, Kind
from key_agent.environments.shared.draft import Draft
from key_agent.environments.shared.recovery import appointed
from key_agent.environments.shared.shared_errors import StaleTermError
from key_agent.environments.states import EnvironmentState
from key_agent.registry.access import RefusedChangeError
from key_agent.registry.wrap_rows import store_wraps
from key_agent.sources.source import Kek, Rewrapped, WrappedKey
from tests.environments.healing_site import HealingMember, HealingSite, healing_site
from tests.environments.key_site import states
from tests.key_agent.conftest import until
from tests.pki import Tenant

E, S = EnvironmentState, KeyState


@pytest.fixture
async def site(tmp_path: Path, acme: Tenant) -> AsyncIterator[HealingSite]:
    async with healing_site(tmp_path, acme, "abc") as made:
        yield made


def environment(site: HealingSite, name: str, *, seen_by: str) -> EnvironmentState:
    state: EnvironmentState = site[seen_by].peering.view.environments[name].state
    return state


async def wraps(member: HealingMember, kek: Kek | str) -> int:
    kek_id = kek if isinstance(kek, str) else kek.reference.kek_id
    return await member.registry.wraps_under(kek_id)


async def until_so(check: Callable[[], Any]) -> None:
    """*check* is awaited again and again."""
    for _ in range(3000):
        if await check():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("never")


async def all_kek(site: HealingSite) -> dict[str, Kek]:
    """Every environment heals because of its KEK, and each KEK is disabled; which they are."""
    old = {name: await site[name].kek() for name in "abc"}
    await site.breach(c="kek", b="kek", a="kek")
    for name, kek in old.items():
        held = site[name].fake.keks[kek.reference.label, kek.reference.object_id]
        await until(lambda: not held.enabled, timeout_s=60)  # noqa: B023 - awaited here
    return old


async def bring_back(site: HealingSite, *names: str, at: str) -> None:
    """As ever, while the first one counts."""
    await site.rekey("inc-1", "inc-2", "inc-3", at=at)
    for name in names:
        await site.complete(name, await site.renew(name, at=at), at=at)
        found = await site.rejoin(name, at=at)
        assert (found["state"], found["problems"]) == ("active", {})


# From the KEK of before.


async def test_from_its_own_wraps_to_all_environments_active(site: HealingSite) -> None:
    a = site["a"]
    old, before = await a.kek(), states(a)
    await site.breach(c="runtime", b="runtime", a="kek")
    await until(lambda: '"action":"kek-disable","outcome":"ok"' in a.audit(), timeout_s=60)
    assert {body.state for body in a.peering.view.environments.values()} == {E.HEALING}
    await a.commands.env_new_kek()
    with pytest.raises(RefusedChangeError, match=r"do not open: KEK kek-a .*kek_disabled"):
        await a.commands.env_recovery()
    a.fake.disable(old, enabled=True)
    recovery = await site.recover("a")
    assert (recovery["old_kek"], recovery["lost"]) == (old.reference.kek_id, [])
    await site.keys.in_step()
    for name in "abc":
        assert environment(site, "a", seen_by=name) is E.HEALING
        assert site[name].peering.view.terms.keys() == a.peering.view.terms.keys()
    assert a.fake.keks[old.reference.label, old.reference.object_id].enabled, "it is left alone meanwhile"
    await site.complete("a", recovery["kek_fingerprint"], at="a")
    for member in (a, site["b"]):  # its own word would not be enough
        told = await member.own_wraps.take(sorted(before))
        assert (told.verified, set(told.failed)) == ((), set(before))
    assert await wraps(a, recovery["new_kek"]) == 0, "nothing is stored before the load balancers know"
    found = await site.rejoin("a", at="a")
    assert (found["state"], found["problems"]) == ("active", {})
    assert await a.opens(before)
    await site.keys.in_step()
    # As before: the KEK is disabled again, and its wraps are gone.
    await until(lambda: not a.fake.keks[old.reference.label, old.reference.object_id].enabled, timeout_s=60)

    async def erased() -> bool:
        return await wraps(a, old) == 0

    await until_so(erased)
    await bring_back(site, "b", "c", at="a")
    await site.keys.keys_active()
    await site.keys.in_step()
    after, owners = states(a), {key_id: body.owner_environment for key_id, body in a.deks.items()}
    assert {owners[key_id]: after[key_id] for key_id in before} == {
        "a": S.ACTIVE, "b": S.COMPROMISED, "c": S.COMPROMISED,
    }  # fmt: skip
    for name in "abc":
        assert await site[name].opens(after), "what the first one brought"
    for incident in ("inc-1", "inc-2", "inc-3"):
        await a.commands.incident_close(incident=incident)


async def test_where_every_registry_key_was_exposed_another_one_is_named_by_two(site: HealingSite) -> None:
    """All of kind runtime: the KEKs are not disabled. b is first, whose agent was not the manager."""
    b, before = site["b"], states(site["a"])
    await site.breach(c="runtime", b="runtime", a="runtime")
    exposed = b.peering.view.environments["b"].registry_key
    await b.commands.env_new_kek()
    with pytest.raises(RefusedChangeError, match="was breached"):
        await b.commands.env_recovery()
    # Whoever has a's registry key leads no more: nothing that it writes is even begun. Looking goes on.
    a = site["a"]
    assert not a.peering.leads
    with pytest.raises(RefusedChangeError) as refused:
        await a.commands.env_add(environment="d", fingerprint="00")
    assert "env recovery" in refused.value.next_step
    assert (await a.commands.incident_status(incident="inc-3"))["state"] == "open"
    for _ in range(2):
        with pytest.raises(IntegrityError, match="env recovery"):
            await a.environments.shared.write(_sound("a"), term=1, now_ms=a.now_ms())
    made = await b.commands.env_new_registry_key()
    assert (await b.commands.env_new_registry_key())["fingerprint"] == made["fingerprint"]
    await b.stop()
    await b.start()
    assert (await b.commands.env_identity())["fingerprint"] == made["fingerprint"]
    assert b.peering.tampered is None
    with pytest.raises(RefusedChangeError, match="already"):
        await b.commands.env_new_registry_key()
    recovery = await site.recover("b")
    assert recovery["registry_fingerprint"] == made["fingerprint"]
    await site.keys.in_step()
    row = a.peering.view.environments["b"]
    assert (row.registry_key, row.registry_key_exposed) == (made["registry_key"], False)
    assert [former.registry_key for former in row.former_keys] == [exposed]
    # An old manager's term is over, and so is the old key.
    with pytest.raises(StaleTermError):
        await a.environments.shared.write(_sound("a"), term=1, now_ms=a.now_ms())
    with pytest.raises(RefusedChangeError, match="not the manager"):
        await a.commands.env_heal_complete(environment="a", attestation="x", new_certificates=True)
    await site.complete("b", recovery["kek_fingerprint"], at="b")
    assert (await site.rejoin("b", at="b"))["problems"] == {}
    assert await b.opens(before)
    await bring_back(site, "a", "c", at="b")
    await site.keys.in_step()
    await until(lambda: all(site[name].peering.verdict.state == "active" for name in "abc"), timeout_s=60)
    # All of that proves itself, by the tenant's root and the first manager's key.
    evidence = await b.commands.incident_evidence(incident="inc-2")
    account = verify_bundle(
        base64.b64decode(evidence["content_base64"]), root=site.keys.tenant.root.certificate, tenant="acme"
    )
    assert account.incident_id == "inc-2"


def _sound(name: str) -> Callable[[Draft], None]:
    """What a breached manager would write of itself."""

    def change(draft: Draft) -> None:
        body = draft.shared.environments[name]
        draft.put(Kind.ENVIRONMENT, name, msgspec.structs.replace(body, state=E.ACTIVE))

    return change


async def test_whose_word_alone_makes_it_sound_is_followed_by_nobody_until_two_have_signed(
    site: HealingSite,
) -> None:
    """The manager, in a set that heals altogether; its registry key is its own."""
    a = site["a"]
    await site.breach(c="suspected", b="suspected", a="suspected")
    for number in (1, 2, 3):
        approval = await site.approve("a", Action.INCIDENT_CANCEL, f"inc-{number}", {})
        await a.commands.incident_cancel(incident=f"inc-{number}", approval=approval)
    await a.commands.env_heal_complete(environment="a", attestation="x")
    position = a.peering.position
    assert (await site.rejoin("a", at="a"))["state"] == "active"
    for name in "bc":
        await site[name].peering.ask("a")
        assert environment(site, "a", seen_by=name) is E.HEALING
        assert site[name].peering.position < position
    with pytest.raises(RefusedChangeError, match="manager already"):
        await a.commands.env_promotion()
    recovery = await site.recover("a")
    assert (recovery["old_kek"], recovery["lost"]) == (None, [])
    await site.keys.in_step()
    assert [environment(site, "a", seen_by=name) for name in "abc"] == [E.ACTIVE] * 3

    def is_heard() -> bool:
        sights = a.peering.sights
        return all(sights[name].position == a.peering.position for name in "bc")

    await until(is_heard, timeout_s=60)
    with pytest.raises(RefusedChangeError, match="counts, and the others follow"):
        await a.commands.env_recovery()
    for name in "bc":
        await a.commands.env_heal_complete(environment=name, attestation="x")
        assert (await site.rejoin(name, at="a"))["state"] == "active"
    await site.keys.in_step()
    assert set(states(site["c"]).values()) == {S.ACTIVE}


# No KEK is left.


async def test_when_every_kek_is_gone_keys_are_given_up_by_name_and_all_come_back_with_new_ones(
    site: HealingSite,
) -> None:
    b, before = site["b"], sorted(states(site["a"]))
    old = await all_kek(site)
    for name, kek in old.items():
        site[name].fake.destroy(kek)
    await b.commands.env_new_kek()
    with pytest.raises(RefusedChangeError, match=r"do not open: KEK kek-b .*kek_destroyed") as refused:
        await b.commands.env_recovery()
    assert "--lost" in refused.value.next_step
    recovery = await site.recover("b", lost=True)
    assert [one["kid"] for one in recovery["lost"]] == before
    assert (recovery["old_kek"], recovery["kept"]) == (None, 0)
    await site.keys.in_step()
    # Not yet: they are only lost. Who did not give them up does not lose them by a command.
    await site.complete("b", recovery["kek_fingerprint"], at="b")
    found = await site.rejoin("b", at="b")
    assert (found["state"], sorted(found["problems"])) == ("healing", before)
    with pytest.raises(RefusedChangeError, match="only a deactivated"):
        await b.commands.keys_retire(keys=before, approval="a-0")
    approval = await site.approve("b", Action.KEYS_RETIRE, "acme", retire_payload(before, accept_loss=True))
    done = await b.commands.keys_retire(keys=before, approval=approval, accept_loss=True)
    assert set(done["keys"].values()) == {S.DESTROYED}
    await site.complete("b", recovery["kek_fingerprint"], at="b")
    assert (await site.rejoin("b", at="b"))["state"] == "active"
    new = await site.keys.keys_active(owners="b")
    assert not set(new.values()) & set(before)
    await bring_back(site, "a", "c", at="b")
    new = await site.keys.keys_active()
    await site.keys.in_step()
    for name in "abc":
        assert await site[name].opens(new.values())
        assert {states(site[name])[key_id] for key_id in before} == {S.DESTROYED}
        assert await wraps(site[name], old[name]) == 0
    # With an environment that counts, a key ends as ever: not while it is active.
    keys = [new["a"]]
    approval = await site.approve("b", Action.KEYS_RETIRE, "acme", retire_payload(keys, accept_loss=True))
    with pytest.raises(RefusedChangeError, match="only a deactivated"):
        await b.commands.keys_retire(keys=keys, approval=approval, accept_loss=True)


async def test_nothing_is_given_up_while_a_kek_still_opens(site: HealingSite) -> None:
    old = await all_kek(site)
    c = site["c"]
    await c.commands.env_new_kek()
    c.fake.disable(old["c"], enabled=True)
    with pytest.raises(RefusedChangeError, match="KEK kek-c opens: nothing has to be given up"):
        await c.commands.env_recovery(lost=True)
    with pytest.raises(RefusedChangeError, match="no key is wrapped by a KEK kek-b here"):
        await c.commands.env_recovery(old_kek="kek-b")
    assert (await c.commands.env_recovery(old_kek="kek-c"))["old_kek"] == "kek-c"


# What is refused.


async def test_the_road_is_closed_while_any_environment_is_sound(site: HealingSite) -> None:
    a, b = site["a"], site["b"]
    await site.breach(b="runtime")
    for name in "abc":
        with pytest.raises(RefusedChangeError) as refused:
            await site[name].commands.env_recovery()
        assert "env rejoin" in refused.value.next_step
    with pytest.raises(RefusedChangeError, match="counts"):
        await b.commands.env_new_registry_key()
    # It was asked for and signed while none counted; then one came back by the normal road.
    await site.breach(c="suspected", a="suspected")
    signed = site.sign(await site["c"].commands.env_recovery())
    recovery = await site.recover("a")
    assert recovery["old_kek"] is None
    await a.commands.env_heal_complete(environment="a", attestation="x")
    approval = await site.approve("a", Action.INCIDENT_CANCEL, "inc-3", {})
    await a.commands.incident_cancel(incident="inc-3", approval=approval)
    assert (await site.rejoin("a", at="a"))["state"] == "active"
    await site.keys.in_step()
    with pytest.raises(RefusedChangeError, match="a counts"):
        await site["c"].commands.env_recover(**signed)
    assert appointed(site["c"].peering.view) is None


async def test_it_takes_exactly_what_two_administrators_have_signed(site: HealingSite) -> None:
    old = await all_kek(site)
    a, b = site["a"], site["b"]
    for member, name in ((a, "a"), (b, "b")):
        member.fake.disable(old[name], enabled=True)
        await member.commands.env_new_kek()
    await until(lambda: a.peering.view.environments["b"].kek_id != "kek-b", timeout_s=60)
    recovery = await a.commands.env_recovery()
    positions = {name: site[name].peering.position for name in "bc"}

    async def refused(code: str, at: HealingMember, signed: dict[str, Any]) -> None:
        with pytest.raises(ApprovalError) as found:
            await at.commands.env_recover(**signed)
        assert found.value.code == code

    await refused("too-few", a, {"approval": recovery["approval"], "asked": recovery["asked"]})
    await refused("too-few", a, site.sign(recovery, "ann"))
    await refused("other-action", b, site.sign(recovery))
    await refused("signature", a, site.sign({**recovery, "tenant": "other"}))
    for change in (
        {"old_kek": old["b"].reference.kek_id},  # signed as it was, then edited
        {"old_kek": None, "lost": True},
        {"new_kek": "of-somebody-else"},
        {"kek_fingerprint": "0000"},
    ):
        signed = site.sign(recovery)
        payload = json.loads(signed["asked"]["payload"]) | change
        signed["asked"]["payload"] = approvals.payload_text(payload)
        with pytest.raises(ApprovalError):
            await a.commands.env_recover(**signed)
        # As two administrators would sign what somebody has put before them.
        asked = msgspec.convert(recovery["asked"], ApprovalBody)
        text = approvals.payload_text(payload)
        forged = msgspec.structs.replace(asked, payload=text, payload_sha256=approvals.payload_sha256(text))
        if "old_kek" not in change:
            await refused("other-payload", a, site.sign({**recovery, "asked": msgspec.to_builtins(forged)}))
    promotion = {**recovery, "asked": {**recovery["asked"], "action": Action.ENVIRONMENT_PROMOTE}}
    await refused("other-action", a, site.sign(promotion))
    assert {name: site[name].peering.position for name in "bc"} == positions
    # Another KEK has been made since.
    await a.commands.env_new_kek()
    await refused("other-payload", a, site.sign(recovery))
    recovery = await a.commands.env_recovery()
    signed = site.sign(recovery)
    await a.commands.env_recover(**signed)
    await refused("used", a, signed)
    await site.keys.in_step()
    # And another one after it has been appointed: it is not the one that was approved.
    told = await a.commands.env_new_kek()
    await until(lambda: a.peering.view.environments["a"].kek_id == told["kek"], timeout_s=60)
    await site.complete("a", told["fingerprint"], at="a")
    found = await site.rejoin("a", at="a")
    assert "is not the one of now" in found["problems"]["wraps"]
    assert await wraps(a, told["kek"]) == 0


async def test_what_is_no_key_of_the_signed_rows_is_not_taken_from_the_kek_of_before(
    site: HealingSite,
) -> None:
    """Somebody has exchanged what is wrapped: it opens, to something else."""
    old = await all_kek(site)
    a = site["a"]
    a.fake.disable(old["a"], enabled=True)
    [key_id, *_] = sorted(states(a))
    row = next(key for key in await a.registry.wrapped_keys("kek-a") if str(key.key_id) == key_id)
    forged = a.fake._wrap(old["a"], a.fake._usable(old["a"]), row, os.urandom(32))
    stored = await a.registry.transact(lambda c: store_wraps(c, [forged], route="kms", now_ms=1))
    assert stored == [key_id]
    await a.commands.env_new_kek()
    recovery = await site.recover("a")
    assert [one["kid"] for one in recovery["lost"]] == [key_id]
    await site.complete("a", recovery["kek_fingerprint"], at="a")
    found = await site.rejoin("a", at="a")
    assert (found["state"], list(found["problems"])) == ("healing", [key_id])
    assert key_id not in await a.wrapped()
    assert len(await a.wrapped()) == 2


@pytest.mark.parametrize("kind", ["kek", "suspected"])
async def test_breached_again_while_its_keys_come_it_opens_and_stores_nothing_more(
    site: HealingSite, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Between two batches, and while one is in the HSM; after `suspected` both KEKs open on."""
    old = await all_kek(site)
    a = site["a"]
    a.fake.disable(old["a"], enabled=True)
    new = await a.commands.env_new_kek()
    recovery = await site.recover("a")
    await site.complete("a", recovery["kek_fingerprint"], at="a")
    rewrap, opened = a.fake.rewrap, list[str]()

    async def slow(old: Kek, new: Kek, keys: Sequence[WrappedKey]) -> Rewrapped:
        made = await rewrap(old, new, keys)
        opened.extend(str(key.key_id) for key in keys)
        await a.commands.incident_open(environment="a", kind=kind, reason="again")
        return made

    monkeypatch.setattr(own_wraps, "BATCH", 1)
    monkeypatch.setattr(a.fake, "rewrap", slow)
    found = await site.rejoin("a", at="a")
    assert found["state"] == "healing"
    assert len(opened) == 1
    assert await wraps(a, new["kek"]) == 0


async def test_without_two_administrators_the_manager_makes_no_keys_and_says_what_leads_back(
    site: HealingSite,
) -> None:
    """Its registry key is its own, so it goes on writing; nobody else follows, and it stores nothing."""
    old = await all_kek(site)
    a = site["a"]
    a.fake.disable(old["a"], enabled=True)
    [_, _, key_id] = sorted(states(a))
    approval = await site.approve("a", Action.INCIDENT_COMPROMISE, "inc-3", {"keys": [key_id]})
    await a.commands.incident_compromise(incident="inc-3", keys=[key_id], approval=approval)
    with pytest.raises(RefusedChangeError, match="none makes keys") as refused:
        await a.commands.incident_rekey(incident="inc-3")
    assert "env recovery" in refused.value.next_step
    fingerprint = await site.renew("a", at="a")
    await site.complete("a", fingerprint, at="a")
    with pytest.raises(RefusedChangeError, match="no successors") as refused:
        await site.rejoin("a", at="a")
    assert "env recovery" in refused.value.next_step
    assert await a.wrapped() == {}
    recovery = await site.recover("a")
    await site.complete("a", recovery["kek_fingerprint"], at="a")
    assert (await site.rejoin("a", at="a"))["state"] == "active"
    await site.rekey("inc-3", at="a")
    assert states(a)[key_id] is S.COMPROMISED


async def test_its_kek_disabled_again_it_heals_again_and_can_return(site: HealingSite) -> None:
    old = await all_kek(site)
    a = site["a"]
    a.fake.disable(old["a"], enabled=True)
    await a.commands.env_new_kek()
    recovery = await site.recover("a")
    a.fake.disable(old["a"])
    for is_enabled in (False, True):
        a.fake.disable(old["a"], enabled=is_enabled)
        await site.complete("a", recovery["kek_fingerprint"], at="a")
        found = await site.rejoin("a", at="a")
        assert found["state"] == ("active" if is_enabled else "healing")
    assert await a.opens(states(a))


async def test_killed_on_its_way_it_goes_on_where_it_was(site: HealingSite) -> None:
    """After it was appointed; and in the midst of taking its keys, with one of them stored."""
    old = await all_kek(site)
    a = site["a"]
    a.fake.disable(old["a"], enabled=True)
    await a.commands.env_new_kek()
    recovery = await site.recover("a")
    await a.stop()
    await a.start()
    assert a.fake.keks[old["a"].reference.label, old["a"].reference.object_id].enabled
    await site.complete("a", recovery["kek_fingerprint"], at="a")
    [spoiled, *_] = sorted(states(a))
    a.fake.spoil(KeyId.parse(spoiled))
    assert (await site.rejoin("a", at="a"))["state"] == "healing"
    before = await a.wrapped()
    assert len(before) == 2
    a.fake.unspoil(KeyId.parse(spoiled))
    await site.complete("a", recovery["kek_fingerprint"], at="a")
    reached = asyncio.Event()

    def hangs(name: str) -> None:
        if name == "rewrap":
            reached.set()
            a.fake.hang()

    a.fake.on_call = hangs
    task = asyncio.create_task(site.rejoin("a", at="a"), name="rejoin")
    await asyncio.wait_for(reached.wait(), 60)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    a.fake.on_call = None
    a.fake.recover()
    await a.stop()
    await a.start()
    assert environment(site, "a", seen_by="a") is E.REJOINING
    assert (await site.rejoin("a", at="a"))["state"] == "active"
    after = await a.wrapped()
    assert {key_id: after[key_id] for key_id in before} == before, "what was stored is not made again"
    assert await a.opens(states(a))
    await site.keys.in_step()
