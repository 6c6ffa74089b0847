"""How an environment becomes one of the set: two consoles, two fingerprints, and nothing on first sight."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from envelope.errors import IntegrityError
from key_agent.environments.peers.membership import FORGET_S, JOINING_NAME, MAX_WAITING
from key_agent.environments.peers.peer_transport import PeerError
from key_agent.environments.peers.peers import JoinRequest
from key_agent.environments.shared.documents import EnvironmentBody
from key_agent.environments.shared.registry_key import fingerprint_of
from key_agent.environments.states import EnvironmentState
from key_agent.registry.store import RefusedChangeError
from tests.environments.members import Member, MembersSite, members
from tests.key_agent.conftest import until
from tests.pki import Tenant


@pytest.fixture
async def site(tmp_path: Path, acme: Tenant) -> AsyncIterator[MembersSite]:
    async with members(tmp_path, acme, "ab") as made:
        await made["a"].commands.env_init(url=made["a"].url)
        yield made


async def fingerprint(member: Member) -> str:
    return str((await member.commands.env_identity())["fingerprint"])


async def ask(site: MembersSite, **changes: str) -> dict[str, Any]:
    """b asks a to be added."""
    a, b = site["a"], site["b"]
    arguments = {
        "url": b.url,
        "manager_url": a.url,
        "manager_agent": a.agent_id,
        "fingerprint": await fingerprint(a),
    }
    return dict(await b.commands.env_join(**(arguments | changes)))


def request_of(member: Member) -> JoinRequest:
    joining = member.environments.membership.joining
    assert joining is not None
    return joining.request


async def test_each_administrator_says_yes_to_the_others_fingerprint(site: MembersSite) -> None:
    a, b = site["a"], site["b"]
    asked = await ask(site)
    assert asked["fingerprint"] == await fingerprint(b)
    listed: Any = await a.commands.env_list()
    assert [row["fingerprint"] for row in listed["waiting"]] == [asked["fingerprint"]]
    own: Any = await b.commands.env_list()
    assert "env add" in own["joining"]["problem"]
    assert own["united"] is False
    await a.commands.env_add(environment="b", fingerprint=asked["fingerprint"])
    await until(lambda: "b" in b.peering.view.environments)
    row: EnvironmentBody = b.peering.view.environments["b"]
    assert (row.state, row.agent_id, row.api_url) == (EnvironmentState.JOINING, "agent-b", b.url)
    assert row.transport_certificate_pem.startswith("-----BEGIN CERTIFICATE")
    await until(lambda: b.environments.membership.joining is None)
    assert not (b.directory / JOINING_NAME).exists()
    again = await a.commands.env_add(environment="b", fingerprint=asked["fingerprint"])
    assert again["state"] == EnvironmentState.JOINING  # it can be repeated


async def test_nobody_is_asked_who_is_not_meant(site: MembersSite) -> None:
    a, b = site["a"], site["b"]
    for wrong in ("0" * 64, await fingerprint(b), "", (await fingerprint(a))[:-2]):
        with pytest.raises(RefusedChangeError, match="another fingerprint"):
            await ask(site, fingerprint=wrong)
    with pytest.raises(PeerError) as refused:  # the agent at that address has another name
        await ask(site, manager_agent="agent-x")
    assert refused.value.code == "tls"
    assert b.environments.membership.joining is None
    assert not a.environments.membership.waiting()


async def test_nobody_is_added_who_is_not_meant(site: MembersSite) -> None:
    a = site["a"]
    with pytest.raises(RefusedChangeError, match="no environment b asks"):
        await a.commands.env_add(environment="b", fingerprint="0" * 64)
    await ask(site)
    for wrong in ("0" * 64, await fingerprint(a)):
        with pytest.raises(RefusedChangeError, match="another registry key"):
            await a.commands.env_add(environment="b", fingerprint=wrong)
    assert set(a.peering.view.environments) == {"a"}


async def test_it_goes_on_asking_after_a_restart_of_either_side(site: MembersSite) -> None:
    a, b = site["a"], site["b"]
    asked = await ask(site)
    await a.stop()
    await a.start()
    await until(lambda: "b" in a.environments.membership.waiting())
    await b.stop()
    await b.start()
    assert b.environments.membership.joining is not None
    await a.commands.env_add(environment="b", fingerprint=asked["fingerprint"])
    await until(lambda: "b" in b.peering.view.environments)


async def test_a_request_is_signed_whole_and_speaks_for_its_sender(site: MembersSite) -> None:
    """A man in the middle has b's TLS certificate and puts his own transport key in."""
    a, b = site["a"], site["b"]
    await ask(site)
    request, membership = request_of(b), a.environments.membership
    request.check()
    for change in (
        {"url": "https://elsewhere:1"},
        {"transport_certificate_pem": "another"},
        {"kek_id": "another"},
        {"kek": msgspec.structs.replace(request.kek, public_key="another")},
        {"signature": ""},
        {"signature": "zz"},
        {"introduction": msgspec.structs.replace(request.introduction, environment="c")},
        {"introduction": msgspec.structs.replace(request.introduction, registry_key="no key")},
    ):
        with pytest.raises(IntegrityError, match="not signed"):
            membership.asked("agent-b", msgspec.structs.replace(request, **change))
    with pytest.raises(IntegrityError, match="in the name of"):
        membership.asked("agent-c", request)
    assert set(JoinRequest.__struct_fields__) == {
        "introduction", "url", "region", "geo", "load_balancer_name", "address", "kms_type",
        "transport_certificate_pem", "kek_id", "kek", "signature",
    }  # fmt: skip


async def test_who_asks_is_bounded_and_forgotten(site: MembersSite) -> None:
    a, b = site["a"], site["b"]
    await ask(site)
    await b.stop()
    membership = a.environments.membership
    request = msgspec.json.decode((b.directory / JOINING_NAME).read_bytes())["request"]
    key = b.environments._registry_key
    template = msgspec.convert(request, JoinRequest)

    def named(name: str) -> JoinRequest:
        introduction = msgspec.structs.replace(template.introduction, environment=name)
        return msgspec.structs.replace(template, introduction=introduction).signed_by(key)

    for number in range(MAX_WAITING - 1):
        membership.asked("agent-b", named(f"e{number}"))
    with pytest.raises(IntegrityError, match="wait already"):
        membership.asked("agent-b", named("one-more"))
    membership.asked("agent-b", named("e0"))  # who waits may repeat it
    a.clock.skip(FORGET_S + 1)
    assert not membership.waiting()
    membership.asked("agent-b", named("one-more"))


async def test_since_when_a_kek_is_known_the_manager_says(site: MembersSite) -> None:
    """Dated ahead by its own agent it would be newer than any breach, and no other one asked for."""
    a, b = site["a"], site["b"]
    own, founded_ms = await a.registry.current_kek(), a.peering.view.environments["a"].since_ms
    assert own is not None
    assert own.since_ms < founded_ms
    assert a.peering.view.keks["kek-a"].since_ms == founded_ms
    await ask(site)
    asked = request_of(b)
    await b.stop()  # else it would repeat its honest request
    ahead_ms = a.now_ms() + 1_000_000
    kek = msgspec.structs.replace(asked.kek, since_ms=ahead_ms, created_at_ms=ahead_ms)
    lying = msgspec.structs.replace(asked, kek=kek).signed_by(b.environments._registry_key)
    a.environments.membership.asked("agent-b", lying)
    await a.commands.env_add(environment="b", fingerprint=fingerprint_of(asked.introduction.registry_key))
    known = a.peering.view.keks["kek-b"]
    assert known.created_at_ms == ahead_ms, "its agent's word"
    assert founded_ms <= known.since_ms <= a.now_ms()


async def test_what_has_keys_of_its_own_or_is_in_a_set_does_not_join(site: MembersSite) -> None:
    a, b = site["a"], site["b"]
    with pytest.raises(RefusedChangeError, match="is one of several already"):
        await a.commands.env_join(url=a.url, manager_url=b.url, manager_agent="agent-b", fingerprint="0")
    asked = await ask(site)
    with pytest.raises(RefusedChangeError, match="asks another one"):
        await b.commands.env_init(url=b.url)
    await a.commands.env_add(environment="b", fingerprint=str(asked["fingerprint"]))
    await until(lambda: b.peering.is_united)
    for member in (a, b):
        with pytest.raises(RefusedChangeError, match="already"):
            await member.commands.env_init(url=member.url)


async def test_only_the_manager_adds_drains_and_retires(site: MembersSite) -> None:
    a, b = site["a"], site["b"]
    asked = await ask(site)
    await a.commands.env_add(environment="b", fingerprint=str(asked["fingerprint"]))
    await until(lambda: b.peering.is_united)
    for refused in (
        b.commands.env_add(environment="c", fingerprint="0"),
        b.commands.env_drain(environment="a"),
        b.commands.env_undrain(environment="a"),
    ):
        with pytest.raises(RefusedChangeError, match="not the manager: it is agent-a of a"):
            await refused
    with pytest.raises(RefusedChangeError, match="cannot be"):
        await a.commands.env_drain(environment="b")  # it is not active yet
    with pytest.raises(RefusedChangeError, match="no environment x"):
        await a.commands.env_drain(environment="x")
    with pytest.raises(RefusedChangeError, match="the manager's environment"):
        await a.commands.env_retire(environment="a", approval="a-0")
    with pytest.raises(Exception, match="no approval"):
        await a.commands.env_retire(environment="b", approval="a-0")
    drained = await a.commands.env_drain(environment="a", reason="maintenance")
    assert drained["spread"] == {"b": True}
    assert fingerprint_of(b.environments.membership.introduction.registry_key) == asked["fingerprint"]
