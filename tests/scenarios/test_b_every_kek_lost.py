"""B-36 to its end: every environment heals and each needs a new KEK; by processes, with SoftHSM.

1. First one HSM has its KEK of before. Its environment, which was not the manager's and whose registry key
   was exposed, is appointed, takes its own keys from its own wraps, and brings the others back.
2. Then no HSM has any: what is lost is listed, given up by two, and all come back with new keys.
3. Every step is a command of the runbook. No database is touched.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
import pytest_asyncio

from tests.environments.administrators import approved
from tests.environments.site import TENANT, SiteEnvironment, until
from tests.scenarios.healing_site import ALL, Site, call, in_step, site_for_tests

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="site")
async def site_fixture(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with site_for_tests(tmp_path_factory.mktemp("lost")) as made:
        yield made


async def test_b_36_one_old_kek_is_left_and_brings_all_keys_back(site: Site) -> None:
    a, b = site["a"], site["b"]
    sealed = {name: await site.seal(name) for name in ALL}
    lost = site.active("b")
    keys = sorted(site.states("b"))
    incidents = await _breach(site, at=a, c="kek", b="runtime", a="kek")
    await until(site.balanced.is_up, timeout_s=90)
    for name in ALL:
        assert (await call(site[name].proxies[0])).status == 503

    await site.ask(b, "env new-kek", "--type", b.kek_type)
    refused = await site.ask(b, "env recovery", str(b.directory / "none.json"), exit_code=3)
    assert "env new-registry-key" in refused["next_step"], refused
    made = await site.ask(b, "env new-registry-key")
    await b.agent.stop()
    await b.agent.start()
    recovery = await _recover(site, b)
    assert (recovery["lost"], recovery["registry_fingerprint"]) == ([], made["fingerprint"])
    await until(lambda: in_step(site), timeout_s=90)
    assert {(await site[name].ask("env_list"))["manager"] for name in ALL} == {"b"}
    assert (await call(b.proxies[0])).status == 503, "it heals as before"
    await _heal_complete(site, b, at=b, fingerprint=recovery["kek_fingerprint"])
    assert _wrapped(site, b, recovery["new_kek"]) == [], "nothing is stored before the load balancer knows"
    await site.ask(b, "env rejoin", "b", "--patience-s", "60")
    assert _wrapped(site, b, recovery["new_kek"]) == keys
    await until(lambda: site.balanced.is_up("b"), timeout_s=90)
    await until(lambda: _opens(site, "b", sealed["a"]), timeout_s=90)
    assert await site.opens("b", sealed["b"]) == 423, "what was compromised stays so"
    await until(lambda: site.balanced.serve("b"), timeout_s=90)

    await _bring_back(site, incidents, "a", "c", at=b)
    for name in ALL:
        await until(lambda: _opens(site, name, sealed["a"]), timeout_s=90)  # noqa: B023 - awaited here
        await until(lambda: _opens(site, name, sealed["c"]), timeout_s=90)  # noqa: B023 - awaited here
        assert site.states(name)[lost] == "compromised"
    assert _wrapped(site, b, recovery["old_kek"]) == [], "the wraps of before are erased"


async def test_b_36_no_kek_is_left_and_all_come_back_with_new_keys(site: Site) -> None:
    a, b = site["a"], site["b"]
    assert (await b.ask("env_list"))["leads"]
    sealed = {name: await site.seal(name) for name in ALL}
    gone = sorted(key for key, state in site.states("a").items() if state != "destroyed")
    incidents = await _breach(site, at=b, c="kek", a="kek", b="kek")
    await asyncio.gather(*(_destroy_kek(site[name]) for name in ALL))
    await until(site.balanced.is_up, timeout_s=90)

    await site.ask(a, "env new-kek", "--type", a.kek_type)
    refused = await site.ask(a, "env recovery", str(a.directory / "none.json"), exit_code=3)
    assert "--lost" in refused["next_step"], refused
    recovery = await _recover(site, a, "--lost")
    assert [one["kid"] for one in recovery["lost"]] == gone
    payload: dict[str, object] = {"accept_loss": True, "keys": gone}
    approval = await approved(site.ask, a, dict(site.files), "keys-retire", TENANT, payload)
    words = ("--keys", ",".join(gone), "--accept-loss", "--yes", "--approve-with", approval)
    ended = await site.ask(a, "keys retire", *words)
    assert ended["keys"] == dict.fromkeys(gone, "destroyed")
    await _heal_complete(site, a, at=a, fingerprint=recovery["kek_fingerprint"])
    await site.ask(a, "env rejoin", "a", "--patience-s", "60")
    await until(lambda: site.balanced.is_up("a"), timeout_s=90)
    await until(lambda: site.balanced.serve("a"), timeout_s=90)
    new = await site.seal("a")

    await _bring_back(site, incidents, "b", "c", at=a)
    for name in ALL:
        await until(lambda: _opens(site, name, new), timeout_s=90)  # noqa: B023 - awaited here
        for ciphertext in sealed.values():
            assert await site.opens(name, ciphertext) == 410
        assert _wrapped_keys(site, site[name]).isdisjoint(gone)
    assert await in_step(site)


async def _breach(site: Site, *, at: SiteEnvironment, **kinds: str) -> list[str]:
    """In that order; which incidents they are. The last environment is the manager's."""
    found = []
    for name, kind in kinds.items():
        opened = await site.ask(at, "incident open", "--env", name, "--kind", kind, "--reason", "IR")
        found.append(str(opened["incident"]))
    return found


async def _recover(site: Site, one: SiteEnvironment, *how: str) -> Mapping[str, Any]:
    """The file is written here, signed by both, and brought back; what `env recovery` said."""
    file = one.directory / "recovery.json"
    told: Mapping[str, Any] = await site.ask(one, "env recovery", str(file), *how)
    too_few = await site.ask(one, "env recover", str(file), "--yes", exit_code=3)
    assert too_few["code"].startswith("approval"), too_few
    for name, key in site.files.items():
        await site.ask(one, "env sign", str(file), "--admin", name, "--key", str(key))
    await site.ask(one, "env recover", str(file), "--yes")
    return told


async def _heal_complete(site: Site, one: SiteEnvironment, *, at: SiteEnvironment, fingerprint: str) -> None:
    words = (one.name, "--attest", "CHG-88", "--new-certs", "--kek", fingerprint)
    await site.ask(at, "env heal-complete", *words)


async def _bring_back(site: Site, incidents: list[str], *names: str, at: SiteEnvironment) -> None:
    """As ever, while one counts."""
    for incident in incidents:

        async def rekeyed(incident: str = incident) -> bool:
            await site.ask(at, "incident rekey", incident)
            return bool((await site.ask(at, "incident status", incident))["state"] in _REKEYED)

        await until(rekeyed, timeout_s=90)
    for name in names:
        made = await site.ask(site[name], "env new-kek", "--type", site[name].kek_type)

        async def announced(name: str = name, kek: str = made["kek"]) -> bool:
            return bool((await at.ask("env_status", environment=name))["kek"] == kek)

        await until(announced, timeout_s=90)
        await _heal_complete(site, site[name], at=at, fingerprint=made["fingerprint"])
        joined = await site.ask(at, "env rejoin", name, "--patience-s", "60")
        assert joined["state"] == "active"
    await site.all_are_up()
    for incident in incidents:
        await site.ask(at, "incident close", incident)


_REKEYED = ("rekeyed", "reencrypting")


async def _opens(site: Site, name: str, ciphertext: str) -> bool:
    return await site.opens(name, ciphertext) == 200


def _wrapped(site: Site, one: SiteEnvironment, kek_id: str) -> list[str]:
    """Keys that are wrapped by that KEK there."""
    rows = site.balanced.query(one, f"SELECT dek_id FROM dek_wrap WHERE kek_id = '{kek_id}' ORDER BY dek_id")
    return [str(key) for (key,) in rows]


def _wrapped_keys(site: Site, one: SiteEnvironment) -> set[str]:
    return {str(key) for (key,) in site.balanced.query(one, "SELECT dek_id FROM dek_wrap")}


async def _destroy_kek(one: SiteEnvironment) -> None:
    """Another hand on its HSM."""
    kek = (await one.ask("kek_status"))["kek"]
    kind = "SECRET_KEY" if kek["type"] == "aes-256" else "PRIVATE_KEY"
    named = {"label": kek["label"], "id": kek["object_id"], "class": kind}
    assert await asyncio.to_thread(one.hsm.run, "destroy", arguments=named) == 1
