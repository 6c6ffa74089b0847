"""B-31, 36, 38, 39, 57, 59, 60: healing and rejoining, and where users and providers are meanwhile."""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from certs import pki as dev_pki
from envelope.derive import ekm_binding
from envelope.inspect import Kind, describe
from envelope.keys import KeyId, NetworkService
from proxy.encryption_service.credentials import new_access_key
from proxy.encryption_service.model import DialectName, XksSettings, XksStore
from proxy.tenants.credential_store import Grant, issue_credential
from proxy.tenants.dialect_store import set_dialect
from proxy.tenants.model import Listen, Upstream
from proxy.tenants.network_service_store import add_service
from proxy.tenants.recipient_store import import_certificate
from tests import pki
from tests.environments.administrators import approved
from tests.environments.site import TENANT, SiteEnvironment, until
from tests.integration.key_residue import Known, children_of, memory_of
from tests.integration.proxy_rig import Answer, Origin, curl, webdav
from tests.ports import free_port
from tests.scenarios.balanced_site import KEY, more_calls
from tests.scenarios.healing_site import ALL, OWNER, PLAIN, Site, call, site_for_tests

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="site")
async def site_fixture(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with site_for_tests(tmp_path_factory.mktemp("healing")) as made:
        yield made


# B-38, B-31.


async def test_b_38_31_a_breach_amid_a_rotation_and_traffic_after_two_checks(site: Site) -> None:
    balanced, c = site.balanced, site["c"]
    old = {name: site.active(name) for name in ALL}
    known = set(site.states("a"))
    async with balanced.calling(count=4) as callers:
        c.agent.freeze()  # the new keys reach b, and not c
        try:
            rotating = asyncio.create_task(balanced.manager.ask("rotate", service=KEY), name="rotate")
            await until(lambda: _is_half_spread(site, known), timeout_s=60)
            new = dict(
                balanced.query(
                    balanced.manager, "SELECT owner_environment_id, id FROM dek WHERE state = 'pre-active'"
                )
            )
            assert set(new) == set(ALL)
            incident = await balanced.open_incident("b", "runtime")
            states = site.states("a")
            assert (states[old["b"]], states[new["b"]]) == ("compromised", "compromised")
            assert {states[old[name]] for name in ("a", "c")} == {"active"}
            assert {states[new[name]] for name in ("a", "c")} == {"pre-active"}, "the rotation is not over"
        finally:
            c.agent.thaw()
        await rotating
        await until(lambda: balanced.is_up("a", "c"), timeout_s=60)

        async def rotated() -> bool:
            return all(site.states("c")[new[name]] == "active" for name in ("a", "c"))

        await until(rotated, timeout_s=90)
        # B-31: once active, its traffic comes with two answers to HAProxy, however many more it would get.
        await balanced.rekey(incident)
        await balanced.heal_complete("b")
        site.gate.ration("b1", ups=2)
        passed = site.gate.passed["b1", "up"]
        joined = await balanced.rejoin("b")
        assert (joined["state"], joined["problems"]) == ("active", {})
        back_s = time.monotonic()

        async def seals() -> bool:
            late = [one for one in list(callers.sealed) if one.began_s > back_s]
            return "b" in balanced.by_owner(late)

        await until(seals, timeout_s=90)
        assert site.gate.passed["b1", "up"] - passed <= 2
        site.gate.free("b1")
        await more_calls(callers, 40)
    assert callers.errors == []
    assert {balanced.owners()[one.version] for one in callers.refused} <= {"b"}
    for name in ALL:
        states = site.states(name)
        assert (states[old["b"]], states[new["b"]]) == ("compromised", "compromised")
        assert {states[old["a"]], states[old["c"]]} == {"deactivated"}
        assert site.active("b", seen_by=name) not in (old["b"], new["b"])
        assert {site.active(other, seen_by=name) for other in ("a", "c")} == {new["a"], new["c"]}
    await balanced.manager.ask("incident_close", incident=incident)


async def _is_half_spread(site: Site, known: set[str]) -> bool:
    """Every new key has a proven wrap at b."""
    rows = site.balanced.query(
        site["b"],
        "SELECT d.id FROM dek d JOIN dek_wrap w ON w.dek_id = d.id "
        "WHERE d.state = 'pre-active' AND w.state = 'verified'",
    )
    return len({row[0] for row in rows} - known) == len(ALL)


# B-39, B-57.


async def test_b_39_57_who_heals_knows_no_key_and_learns_what_it_missed(site: Site) -> None:
    balanced, b, c = site.balanced, site["b"], site["c"]
    materials = await asyncio.to_thread(_materials, site)
    own = site.active("c")
    seen = await asyncio.to_thread(_remembered, [c.proxies[0].program.pid], materials)
    assert own in seen, "the scan finds what is there"
    sealed, lost = await site.seal("b"), site.active("b")
    runtime = await balanced.open_incident("c", "runtime")
    await until(lambda: balanced.is_up("a", "b"), timeout_s=60)
    await until(lambda: _refuses_all(c), timeout_s=60)
    # B-57.
    await until(lambda: _has_forgotten(c, materials), timeout_s=90)
    # B-39: c cannot hear of what happens to b.
    await c.agent.kill()
    opened = await balanced.open_incident("b", "dek", keys=[lost])
    assert site.states("c")[lost] == "active", "it was not told"

    async def is_told() -> bool:
        return {site.states(name)[lost] for name in ("a", "b")} == {"compromised"}

    await until(is_told)
    await c.agent.start()
    looked: list[int] = []
    looking = asyncio.create_task(_look(site, sealed, looked), name="look")
    await balanced.rekey(opened)
    joined = await balanced.bring_back("c", runtime)
    assert (joined["state"], joined["problems"]) == ("active", {})
    assert site.states("c")[lost] == "compromised"
    await site.all_are_up()
    looking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await looking
    assert 200 not in looked
    assert await site.opens("c", sealed) == 423
    # What it has now is new; what was in its memory is not there again.
    assert site.active("c") not in materials
    assert not await asyncio.to_thread(_remembered, [c.proxies[0].program.pid], {own: materials[own]})
    assert site.active("b") != lost
    assert b.agent.runs
    await balanced.manager.ask("incident_close", incident=opened)
    await balanced.manager.ask("incident_close", incident=runtime)


def _materials(site: Site) -> dict[str, Known]:
    """Every key that a's HSM opens, by a process that runs no code of Sealgate's."""
    a = site["a"]
    [(kek_id, label, object_id)] = site.balanced.query(
        a, "SELECT id, label, object_id FROM kek WHERE state = 'active'"
    )
    found = {}
    for key_id, wrapped in site.balanced.query(
        a,
        f"SELECT d.id, w.wrapped FROM dek d JOIN dek_wrap w ON w.dek_id = d.id "
        f"WHERE w.kek_id = '{kek_id}' AND d.state IN ('active', 'deactivated')",
    ):
        kid = KeyId.parse(key_id)
        binding = ekm_binding(OWNER, kid, kek_id=kek_id, environment_id="a")
        opened = a.hsm.run(
            "unwrap-gcm",
            arguments={
                "label": label,
                "id": bytes(object_id).hex(),
                "wrapped": wrapped.hex(),
                "binding": binding.hex(),
            },
        )
        found[key_id] = Known.of(bytes.fromhex(opened), OWNER, kid)
    return found


async def _has_forgotten(one: SiteEnvironment, materials: Mapping[str, Known]) -> bool:
    """Whether no process of that environment has any of these keys in its memory."""
    pids = [one.agent.pid, *children_of(one.agent.pid), *(proxy.program.pid for proxy in one.proxies)]
    pids += [child for proxy in one.proxies for child in children_of(proxy.program.pid)]
    return not await asyncio.to_thread(_remembered, pids, materials)


def _remembered(pids: Iterable[int], materials: Mapping[str, Known]) -> set[str]:
    """Which of these keys are in the memory of any of these processes. Blocking: the relays have to go on."""
    return {
        key_id
        for pid in pids
        for piece in memory_of(pid)
        for key_id, known in materials.items()
        if known.seen_in(piece)
    }


async def _refuses_all(one: SiteEnvironment) -> bool:
    return (await call(one.proxies[0])).status == 503


async def _look(site: Site, sealed: str, found: list[int]) -> None:
    while True:
        found.append(await site.opens("c", sealed))
        await asyncio.sleep(0.02)


# B-59.


async def test_b_59_users_move_to_another_environment_and_find_their_files(site: Site) -> None:
    """A and B in one: a proxied cloud service, whose users are at b until b is not to be trusted."""
    balanced = site.balanced
    before, after = os.urandom(300_000), os.urandom(70_000)
    certificate, key = balanced.site.directory / "server.pem", balanced.site.directory / "server.key"
    async with webdav(balanced.site.directory, certificate, key) as origin:
        doors = {name: await _proxied(site, name, origin) for name in ("b", "c")}
        await until(lambda: _puts(doors["b"], "/report", before), timeout_s=90)
        await until(lambda: _gets(doors["c"], "/report", before), timeout_s=90)
        owners = {name: _owner_of(site, origin.stored(name)) for name in origin.names()}
        assert owners == {"report": "b"}

        incident = await balanced.open_incident("b", "suspected", keep_keys=True)
        refused = await _until_status(doors["b"], "/report", 503)
        assert before[:32] not in refused.body
        assert not await _puts(doors["b"], "/not-there", after)
        # They go to c: what was written at b is there, and what they write now.
        assert await _gets(doors["c"], "/report", before)
        assert await _puts(doors["c"], "/minutes", after)
        assert await _gets(doors["c"], "/minutes", after)
        assert origin.names() == ["minutes", "report"]
        assert _owner_of(site, origin.stored("minutes")) == "c"

        # It was nothing. b is back by its one road, and opens what c has written.
        approval = await approved(
            site.ask, balanced.manager, dict(site.files), "incident-cancel", incident, {}
        )
        await site.ask(balanced.manager, "incident cancel", incident, "--approve-with", approval)
        await balanced.heal_complete("b")
        await balanced.rejoin("b")
        await until(lambda: _gets(doors["b"], "/minutes", after), timeout_s=90)
        assert await _gets(doors["b"], "/report", before)
        for name in origin.names():
            stored = origin.stored(name)
            assert not any(
                plain[at : at + 16] in stored for plain in (before, after) for at in range(0, 256, 16)
            )
            assert describe(stored).kind is Kind.OBJECT
    await site.all_are_up()


@dataclass(frozen=True)
class Door:
    """A proxied service at one environment's proxy."""

    port: int
    ca_file: Path

    async def ask(self, path: str, *arguments: str, body: bytes | None = None) -> Answer:
        url = f"https://127.0.0.1:{self.port}{path}"
        return await curl("--cacert", str(self.ca_file), *arguments, url, body=body)


async def _proxied(site: Site, name: str, origin: Origin) -> Door:
    """The cloud service at that environment's proxy, and its keys there."""
    one, tenant = site[name], site.balanced.site.tenant
    [proxy] = one.proxies
    owner, port = NetworkService(TENANT, "dav"), free_port()
    listen = Listen("127.0.0.1", port)
    csr = add_service(proxy.store, owner, Upstream.parse(origin.url), actor="test", reverse_listen=listen)
    signed = dev_pki.sign_service_csr(tenant.root, csr, pki.VALIDITY, valid_from=pki.VALID_FROM)
    import_certificate(proxy.store, owner, signed, actor="test")
    proxy.certificate_files["dav"] = pki.write_certificate(signed, proxy.config.parent / "dav.pem")
    await one.add_service("dav", proxy, tenant)
    return Door(port, proxy.store.snapshot().tenants[TENANT].interception_ca.certificate_file)


async def _puts(door: Door, path: str, content: bytes) -> bool:
    return (await door.ask(path, "-T", "-", body=content)).status in {201, 204}


async def _gets(door: Door, path: str, content: bytes) -> bool:
    answer = await door.ask(path)
    return answer.status == 200 and answer.body == content


async def _until_status(door: Door, path: str, status: int) -> Answer:
    answers: list[Answer] = []

    async def there() -> bool:
        answers.append(await door.ask(path))
        return answers[-1].status == status

    await until(there, timeout_s=60)
    return answers[-1]


def _owner_of(site: Site, stored: bytes) -> str:
    """The environment whose key has sealed an object."""
    key_id = describe(stored).key_id
    [(owner,)] = site.balanced.query(site["a"], f"SELECT owner_environment_id FROM dek WHERE id = '{key_id}'")
    return str(owner)


# B-36, B-60: the last one, for it ends with every KEK destroyed.


async def test_b_36_60_all_heal_one_comes_back_and_then_every_kek_is_revoked(site: Site) -> None:
    """A cloud provider calls by XKS, through HAProxy, always with the same credential."""
    balanced, a = site.balanced, site["a"]
    provider = _provider(site)
    first = await _until_provider(provider, "encrypt", {"plaintext": PLAIN}, 200)
    incident = await balanced.open_incident("c", "runtime")
    await until(lambda: balanced.is_up("a", "b"), timeout_s=60)
    for _ in range(6):
        status, document = await provider.ask("encrypt", {"plaintext": PLAIN})
        assert status == 200, "B-60: others serve it, and it has not noticed"
        assert (await provider.ask("decrypt", _back(document)))[1]["plaintext"] == PLAIN
    await balanced.rekey(incident)
    # B-36: two, then all.
    await balanced.open_incident("b", "runtime")
    async with balanced.calling(count=4) as callers:
        await until(lambda: balanced.is_up("a"), timeout_s=60)
        alone_s = time.monotonic()
        await more_calls(callers, 40)
        assert set(balanced.by_owner(one for one in callers.sealed if one.began_s > alone_s)) == {"a"}
    assert callers.errors == []
    await a.ask("env_declare", reason="the last one as well")
    await until(balanced.is_up, timeout_s=60)
    status, document = await provider.ask("encrypt", {"plaintext": PLAIN})
    assert status == 503, document
    for name in ALL:
        assert (await call(site[name].proxies[0])).status == 503
    # The first that has healed resumes, alone. It has to be the manager's: nobody else would be believed when
    # it brings keys. It was nothing, say two administrators; its KEK is what it was.
    await _was_nothing(site, "a")
    await until(lambda: balanced.is_up("a"), timeout_s=90)
    await _until_provider(provider, "encrypt", {"plaintext": PLAIN}, 200)
    async with balanced.calling(count=4) as callers:
        await more_calls(callers, 40)
        assert set(balanced.by_owner(callers.sealed)) == {"a"}
    assert callers.errors == []
    assert {(await call(site[name].proxies[0])).status for name in ("b", "c")} == {503}

    # B-60: the enterprise takes its consent back, in every HSM.
    await asyncio.gather(*(_destroy_kek(site[name]) for name in ALL))
    for name in ALL:
        await until(lambda: _is_final(site[name]), timeout_s=90)  # noqa: B023 - awaited here
    status, document = await provider.ask("encrypt", {"plaintext": PLAIN})
    assert status >= 400, document
    assert "ciphertext" not in document
    status, document = await provider.ask("decrypt", _back(first))
    assert status >= 400
    assert "plaintext" not in document


async def _was_nothing(site: Site, name: str) -> None:
    """The incident that an environment has declared is a false alarm, and it comes back."""
    manager = site.balanced.manager
    listed = (await manager.ask("incident_list"))["incidents"]
    incident = next(str(one["incident"]) for one in listed if one["environment"] == name)
    approval = await approved(site.ask, manager, dict(site.files), "incident-cancel", incident, {})
    await site.ask(manager, "incident cancel", incident, "--approve-with", approval)
    await manager.ask("env_heal_complete", environment=name, attestation="CHG-89", new_certificates=True)
    joined = await site.balanced.rejoin(name)
    assert (joined["state"], joined["problems"]) == ("active", {})


@dataclass(frozen=True)
class Provider:
    """AWS KMS with an external key store, as far as curl can be it."""

    url: str
    access_key: tuple[str, str]

    async def ask(self, operation: str, body: Mapping[str, object]) -> tuple[int, dict[str, Any]]:
        metadata = {
            "awsPrincipalArn": "arn:aws:iam::123456789012:user/Alice",
            "kmsKeyArn": "arn:aws:kms:us-east-2:123456789012:/key/1234abcd-12ab-34cd-56ef-1234567890ab",
            "kmsOperation": operation.capitalize(),
            "kmsRequestId": "4112f4d6-db54-4af4-ae30-c55a22a8dfae",
        }
        sent = {"requestMetadata": metadata, "encryptionAlgorithm": "AES_GCM", **body}
        answer = await curl(
            "--aws-sigv4", "aws:amz:us-east-1:kms-xks-proxy",
            "--user", ":".join(self.access_key),
            "--header", "Content-Type: application/json",
            "--data-binary", json.dumps(sent),
            f"{self.url}/kms/xks/v1/keys/orders/{operation}",
        )  # fmt: skip
        return answer.status, json.loads(answer.body)


def _provider(site: Site) -> Provider:
    """Every proxy of the tenant lets in the same access key."""
    access_key, prefix = new_access_key(), "store-9pXqU0w2cVb1"
    store = XksStore(prefix=prefix, keys={"orders": KEY})
    for name in ALL:
        for proxy in site[name].proxies:
            set_dialect(
                proxy.store, TENANT, DialectName.XKS, settings=XksSettings(stores=(store,)), actor="test"
            )
            grant = Grant(tenant=TENANT, dialect=DialectName.XKS, label="aws", endpoint=prefix)
            issue_credential(proxy.store, grant, actor="test", access_key=access_key)
    return Provider(f"http://{site.balanced.front}/{prefix}", access_key)


async def _until_provider(
    provider: Provider, operation: str, body: Mapping[str, object], status: int
) -> dict[str, Any]:
    """Repeat until every proxy has read who is let in."""
    answers: list[tuple[int, dict[str, Any]]] = []

    async def done() -> bool:
        answers.extend([await provider.ask(operation, body) for _ in range(4)])
        return {one for one, _ in answers[-4:]} == {status}

    try:
        await until(done, timeout_s=60)
    except TimeoutError:
        raise AssertionError(answers[-4:]) from None
    return answers[-1][1]


def _back(sealed: Mapping[str, Any]) -> dict[str, object]:
    return {
        "ciphertext": sealed["ciphertext"],
        "initializationVector": sealed["initializationVector"],
        "authenticationTag": sealed["authenticationTag"],
    } | ({"ciphertextMetadata": sealed["ciphertextMetadata"]} if "ciphertextMetadata" in sealed else {})


async def _destroy_kek(one: SiteEnvironment) -> None:
    """Another hand on its HSM."""
    kek = (await one.ask("kek_status"))["kek"]
    kind = "SECRET_KEY" if kek["type"] == "aes-256" else "PRIVATE_KEY"
    named = {"label": kek["label"], "id": kek["object_id"], "class": kind}
    assert await asyncio.to_thread(one.hsm.run, "destroy", arguments=named) == 1


async def _is_final(one: SiteEnvironment) -> bool:
    """It refuses, whoever asks."""
    return (await call(one.proxies[0])).status >= 400
