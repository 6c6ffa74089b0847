"""Three environments as real processes, with an AES, an RSA and an EC KEK in tokens of their own: united by
commands, and then disturbed.

What cannot be seen here without keys for several environments is in tests/scenarios.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.environments.fault_proxy import Fault
from tests.environments.site import EnvironmentsSite, SiteEnvironment, environments_site, until
from tests.etcd_cluster import EtcdCluster


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[EnvironmentsSite]:
    async with environments_site(tmp_path, proxies_each=1, rhythm=(30, 33, 0.3)) as made:
        yield made


async def listed(environment: SiteEnvironment) -> dict[str, Any]:
    return dict(await environment.ask("env_list"))


async def position(environment: SiteEnvironment) -> tuple[int, int, str]:
    found = await listed(environment)
    return found["term"], found["epoch"], found["digest"]


async def in_step(*environments: SiteEnvironment) -> bool:
    return len(set(await asyncio.gather(*map(position, environments)))) == 1


async def serves(environment: SiteEnvironment) -> bool:
    return bool((await listed(environment))["serves"] == "serves")


async def leads(environment: SiteEnvironment) -> bool:
    return bool((await listed(environment))["leads"])


async def test_what_one_environment_has_all_have_and_each_goes_on_after_a_kill(
    site: EnvironmentsSite,
) -> None:
    """`env init` where there are keys; two join; a member and the manager are killed amid it all."""
    a, b, c = site.environments.values()
    async with site.agents(), site.proxies():
        # One environment with a service, as it was before there were several.
        await a.add_service("files", a.proxies[0], site.tenant)
        status, sealed = 0, dict[str, Any]()
        for _ in range(240):  # until the proxy has the key, and knows that it may serve
            status, sealed = await a.proxies[0].call("keys/files/encrypt", {"plaintext": "aGVsbG8="})
            if status == 200:
                break
            await asyncio.sleep(0.25)
        assert status == 200
        await site.unite()
        assert (await listed(a))["manager"] == "a"
        await until(lambda: in_step(a, b, c))
        for one in (a, b, c):
            assert await until(lambda: serves(one)) < 30  # noqa: B023 - awaited here
        # Its key is still its key: what was sealed before opens.
        status, opened = await a.proxies[0].call("keys/files/decrypt", {"ciphertext": sealed["ciphertext"]})
        assert (status, opened.get("plaintext")) == (200, "aGVsbG8=")

        await b.agent.kill()
        before = await position(a)
        await a.ask("env_drain", environment="c", reason="maintenance")
        await until(lambda: in_step(a, c))
        assert await position(a) != before
        await b.agent.start()
        await until(lambda: in_step(a, b, c))
        assert (await b.ask("env_status", environment="c"))["state"] == "draining"
        await a.agent.kill()
        await a.agent.start()
        await until(lambda: in_step(a, b, c))
        await until(lambda: serves(a))
        # Its own word that it is not to be trusted: its proxies refuse, and may be asked again later.
        await a.ask("env_declare", reason="the machine was opened")

        async def refuses() -> bool:
            status, told = await a.proxies[0].call("keys/files/encrypt", {"plaintext": "aGVsbG8="})
            return (status, told.get("code")) == (503, "env-healing")

        await until(refuses)


async def test_a_manager_frozen_while_another_is_promoted_changes_nothing_any_more(
    site: EnvironmentsSite, tmp_path: Path
) -> None:
    a, b, c = site.environments.values()
    keys = _administrators(tmp_path)
    async with site.agents():
        await site.unite()
        for name, (_, public) in keys.items():
            await a.ask("admin_add", admin=name, public_key_pem=public.read_text())
        await until(lambda: in_step(a, b, c))
        a.agent.freeze()
        promotion = tmp_path / "promotion.json"
        await b.command("env", "promotion", str(promotion))
        refused = await b.command("env", "promote", str(promotion), exit_code=3)
        assert "signatures" in refused["cause"]
        for name, (private, _) in keys.items():
            await b.command("env", "sign", str(promotion), "--admin", name, "--key", str(private))
        promoted = await b.command("env", "promote", str(promotion))
        assert (promoted["term"], promoted["former"], promoted["former_knows"]) == (2, "a", False)
        await b.ask("env_drain", environment="c")
        a.agent.thaw()
        await until(lambda: in_step(a, b, c))
        refused = await a.command("env", "drain", "b", exit_code=3)
        assert "not the manager: it is agent-b of b" in refused["cause"]
        assert (await listed(a))["term"] == 2


async def test_parted_from_the_others_it_is_seen_and_it_sees(site: EnvironmentsSite) -> None:
    a, b, c = site.environments.values()
    async with site.agents():
        await site.unite()
        await until(lambda: in_step(a, b, c))

        async def reaches(one: SiteEnvironment, other: str) -> bool:
            return bool((await one.ask("env_status", environment=other))["answers"])

        site.part("b")
        for one, other in ((a, "b"), (c, "b"), (b, "a"), (b, "c")):
            await until(lambda: _not(reaches(one, other)))  # noqa: B023 - awaited here
        assert await reaches(a, "c")
        site.heal_network()
        await until(lambda: reaches(b, "a"))
        await until(lambda: reaches(a, "b"))
        c.network.inject(Fault.HALF_OPEN)
        await until(lambda: _not(reaches(a, "c")))
        c.network.inject(Fault.NONE)
        await until(lambda: reaches(a, "c"))


async def test_strangers_and_wrong_fingerprints_are_refused(site: EnvironmentsSite) -> None:
    a, b, _ = site.environments.values()
    async with site.agents("a", "b"):
        await a.command("env", "init", "--url", a.url)
        mine = (await a.command("env", "identity"))["fingerprint"]
        join = ("env", "join", "--url", b.url, "--manager-url", a.url, "--manager-agent", "agent-a")
        refused = await b.command(*join, "--fingerprint", "0" * 64, exit_code=3)
        assert "another fingerprint" in refused["cause"]
        asked = await b.command(*join, "--fingerprint", mine)
        refused = await a.command("env", "add", "b", "--fingerprint", mine, exit_code=3)
        assert "another registry key" in refused["cause"]
        waiting = (await listed(a))["waiting"]
        assert [(row["environment"], row["fingerprint"]) for row in waiting] == [("b", asked["fingerprint"])]
        await a.command("env", "add", "b", "--fingerprint", asked["fingerprint"])
        await until(lambda: in_step(a, b))
        refused = await a.command("env", "init", "--url", a.url, exit_code=3)
        assert "already" in refused["cause"]


async def _not(condition: Any) -> bool:
    return not await condition


def _administrators(directory: Path) -> dict[str, tuple[Path, Path]]:
    """Private and public key files, by name."""
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    found = {}
    for name in ("ann", "bob"):
        key = Ed25519PrivateKey.generate()
        private, public = directory / f"{name}.pem", directory / f"{name}.pub"
        private.touch(mode=0o600)
        private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        found[name] = (private, public)

    return found


async def test_an_elected_manager_that_freezes_is_followed_and_fenced(tmp_path: Path) -> None:
    """By an etcd of three members: SIGSTOP, as a virtual machine that hangs."""
    async with EtcdCluster(tmp_path) as etcd:
        urls = ", ".join(f'"{url}"' for url in etcd.urls)
        more = f"[environments.etcd]\nurls = [{urls}]\nlease_s = 12\nkeep_alive_s = 1\nrequest_timeout_s = 1"
        async with (
            environments_site(tmp_path, proxies_each=0, rhythm=(30, 33, 0.3), more=more) as site,
            site.agents(),
        ):
            agents = list(site.environments.values())
            a = agents[0]
            await a.ask("env_init", url=a.url)
            await until(lambda: leads(a))
            for name in "bc":
                await site.join(name)
            first_term = (await listed(a))["term"]
            assert first_term > 1
            refused = await agents[1].command("env", "promotion", str(tmp_path / "p.json"), exit_code=3)
            assert "elected by etcd" in refused["cause"]
            a.agent.freeze()
            others = agents[1:]

            async def followed() -> bool:
                return any(await asyncio.gather(*map(leads, others)))

            await until(followed)
            await until(lambda: in_step(*others))
            [manager] = [one for one in others if await leads(one)]
            found = await listed(manager)
            assert (found["manager"], found["term"] > first_term) == (manager.name, True)
            await manager.ask("env_drain", environment=manager.name)  # written under the new term
            a.agent.thaw()
            await until(lambda: in_step(*agents))
            assert not await leads(a)
            assert (await listed(a))["manager"] != "a"
