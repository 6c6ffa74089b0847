"""A breach from beginning to end, by the commands of the runbook: three environments, a load balancer's agent
and two administrators, all real processes.

Every command of `incident`, `approval`, `admin`, `keys` and of healing is given here as JSON.
"""

import contextlib
import functools
import json
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer

from key_agent import cli as agent_cli
from tests import pki
from tests.environments.administrators import Commands, administrators, approved
from tests.environments.site import EnvironmentsSite, Program, SiteEnvironment, environments_site, until
from tests.ports import free_port

GROUPS = ("incident", "approval", "admin", "keys")
HEALING = {"env declare", "env new-kek", "env heal-complete", "env rejoin"}


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[EnvironmentsSite]:
    async with environments_site(tmp_path, proxies_each=1, rhythm=(30, 33, 0.3)) as made:
        yield made


async def _load_balancer(site: EnvironmentsSite) -> Program:
    """The configuration of an lb-agent that follows all agents, as a program to be started."""
    home = site.directory / "lb"
    home.mkdir()
    pki.write_certificate(site.tenant.root.certificate, home / "root.pem")
    pki.write_credential(site.tenant.balancer("lb-1"), home, "tls")
    agents = ""
    servers = ""
    for one in site.environments.values():
        key = (await one.ask("env_identity"))["registry_key"]
        agents += f'[[agents]]\nid = "{one.agent_id}"\nurl = "{one.url}"\nregistry_key = "{key}"\n'
        servers += (
            f'[[servers]]\nname = "{one.name}"\nenvironment = "{one.name}"\n'
            f'address = "127.0.0.1:{one.proxies[0].service_port}"\n'
            f'status_url = "http://127.0.0.1:{one.proxies[0].health_port}"\n'
        )
    config = home / "lb-agent.toml"
    config.write_text(f"""
[lb_agent]
id = "lb-1"
tenant = "acme"
root_certificate_file = "root.pem"
certificate_file = "tls.pem"
key_file = "tls.key"
manager = "{next(iter(site.environments.values())).agent_id}"
state_file = "rows"
port = {free_port()}
[frontend]
bind = "127.0.0.1:{free_port()}"
{agents}{servers}""")

    async def begun() -> bool:
        return True

    return Program(("key-agent", "lb-agent", "--lb-config", str(config)), {}, home / "log", begun)


async def test_a_breach_from_the_first_command_to_the_last(site: EnvironmentsSite, tmp_path: Path) -> None:
    a, b, c = site.environments.values()
    done: set[str] = set()
    ask = Commands(done)
    files = administrators(tmp_path)
    async with site.agents(), site.proxies():
        await site.unite()
        await site.add_service("files")
        keys = await _keys(a)
        await until(lambda: _active(a, 3))
        balancer = await _load_balancer(site)
        await balancer.start()
        try:
            for name in files:
                await ask(a, "admin add", name, "--public-key", str(tmp_path / f"{name}.pub"))
            assert [row["name"] for row in (await ask(a, "admin list"))["admins"]] == ["ann", "bob"]

            sealed = await _sealed(b)
            await until(lambda: _opens_with(a, sealed, 200))
            opened = await ask(a, "incident open", "--env", "b", "--kind", "runtime", "--reason", "IR-2214")
            assert (opened["incident"], opened["new"], opened["environment_state"]) == (
                "inc-1",
                True,
                "healing",
            )
            keys = {row["owner"]: row["kid"] for row in opened["keys"]}
            for one in (a, b, c):
                await until(functools.partial(_state_is, one, keys["b"], "compromised"))
            status = await ask(c, "incident status", "inc-1")
            assert {row["environment"] for row in status["environments"]} == {"a", "b", "c"}
            assert len((await ask(b, "incident list"))["incidents"]) == 1
            await until(lambda: _contained(a))

            # Two persons decide about the key of c; one signs away from any agent.
            payload = json.dumps({"keys": [keys["c"]]})
            asked = await ask(a, "approval request", "incident-compromise", "inc-1", "--payload", payload)
            approval = asked["approval"]
            further = ["inc-1", "--keys", keys["c"], "--approve-with", approval]
            refused = await ask(a, "incident compromise", *further, exit_code=3)
            assert refused["code"] == "approval-too-few"
            await ask(a, "approval sign", approval, "--admin", "ann", "--key", str(files["ann"]), "--yes")
            statement, signature = tmp_path / "statement", tmp_path / "signature"
            await ask(a, "approval show", approval, "--statement", str(statement))
            signed = await ask(a, "approval sign-file", str(statement), "--key", str(files["bob"]))
            signature.write_text(signed["signature"] + "\n")
            await ask(a, "approval submit", approval, "--admin", "bob", "--signature", str(signature))
            await ask(a, "incident compromise", *further)
            assert (await ask(a, "approval list"))["approvals"][0]["state"] == "used"
            scope = await ask(a, "incident scope", "inc-1")
            states = {row["owner"]: row["state"] for row in scope["keys"]}
            assert states == {"a": "active", "b": "compromised", "c": "compromised"}

            # New keys, a new KEK, and the road back.
            await ask(a, "incident rekey", "inc-1")
            await until(lambda: _rekeyed(a), timeout_s=90)
            made = await ask(b, "env new-kek", "--type", "rsa-3072")
            await until(lambda: _kek_is(a, "b", made["kek"]))
            refused = await ask(a, "env rejoin", "b", exit_code=3)
            assert "healing" in refused["cause"]
            healed = ["b", "--attest", "CHG-88", "--new-certs", "--kek"]
            await ask(a, "env heal-complete", *healed, "0000-0000", exit_code=3)
            assert (await ask(a, "env heal-complete", *healed, made["fingerprint"]))["state"] == "healed"
            joined = await ask(a, "env rejoin", "b", "--patience-s", "60")
            assert (joined["state"], joined["problems"]) == ("active", {})

            # What the old keys sealed, and their end.
            assert await _opens(a, sealed) == 423
            tomorrow = (datetime.now(UTC) + timedelta(days=1)).replace(microsecond=0)
            rescue = {"keys": [keys["b"]], "until_ms": int(tomorrow.timestamp() * 1000)}
            approval = await approved(ask, a, files, "key-rescue", "inc-1", rescue)
            words = ["--keys", keys["b"], "--until", tomorrow.isoformat(), "--approve-with", approval]
            await ask(a, "keys rescue", "inc-1", *words)
            await until(functools.partial(_opens_with, a, sealed, 200))
            (tmp_path / "store.toml").write_text(_STORE.format(ca=site.ca_file))
            stopped = await ask(
                a, "keys reencrypt start", "--incident", "inc-1", "--connector", str(tmp_path / "store.toml"),
                exit_code=4,
            )  # fmt: skip
            assert "resume" in stopped["next_step"]
            [job] = (await ask(a, "keys reencrypt list"))["reencryptions"]
            await ask(
                a, "keys reencrypt resume", job["job"], "--connector", str(tmp_path / "store.toml"),
                exit_code=4,
            )  # fmt: skip
            dropped = await ask(a, "keys reencrypt drop", job["job"])
            assert (dropped["dropped_at_ms"] is None, dropped["may_have_left"]) == (False, False)
            ending = {"accept_loss": True, "keys": [keys["b"]]}
            approval = await approved(ask, a, files, "keys-retire", "acme", ending)
            sign = ["--admin", "ann", "--key", str(files["ann"])]
            shown = (await ask(a, "approval sign", approval, *sign, exit_code=3))["cause"]
            assert f"no re-encryption has gone through a store for these keys:\n    {keys['b']}" in shown
            retire = ["--keys", keys["b"], "--approve-with", approval]
            assert "nothing shows" in (await ask(a, "keys retire", *retire, "--yes", exit_code=3))["cause"]
            ended = await ask(a, "keys retire", *retire, "--yes", "--accept-loss")
            assert ended["keys"] == {keys["b"]: "destroyed"}
            await until(functools.partial(_opens_with, a, sealed, 410))
            assert (await ask(a, "incident close", "inc-1"))["state"] == "closed"
            evidence = str(tmp_path / "inc1.zip")
            await ask(a, "incident evidence", "inc-1", "-o", evidence)
            found = await ask(a, "incident verify", evidence, "--root", str(a.directory / "root.pem"))
            assert (found["incident"], found["state"]) == ("inc-1", "closed")
            _flip_a_bit(Path(evidence))
            await ask(a, "incident verify", evidence, "--root", str(a.directory / "root.pem"), exit_code=3)

            # An environment gives itself up, and it was nothing.
            await ask(c, "env declare", "--reason", "looked odd")
            await until(lambda: _has_incident(a, "inc-2"))
            approval = await approved(ask, a, files, "incident-cancel", "inc-2", {})
            cancelled = await ask(a, "incident cancel", "inc-2", "--approve-with", approval)
            assert cancelled["state"] == "false_alarm"
            key = keys["a"]
            await a.command("key", "suspend", "files", key)
            approval = await approved(ask, a, files, "key-resume", "acme", {"keys": [key]})
            resumed = await ask(a, "keys resume", "--keys", key, "--approve-with", approval)
            assert resumed["keys"][key] in ("active", "deactivated")
            assert "2 administrators" in (await ask(a, "admin remove", "ann", exit_code=3))["cause"]
        finally:
            await balancer.stop()
    assert done == _commands() | HEALING


_STORE = """
[webdav]
store_url = "https://localhost:1/"
through_url = "https://localhost:1/"
store_ca_file = "{ca}"
through_ca_file = "{ca}"
timeout_s = 2.0
"""


def _commands() -> set[str]:
    def below(command: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
        if not hasattr(command, "commands"):
            yield " ".join(path)
            return
        for name, each in command.commands.items():
            yield from below(each, (*path, name))

    return {name for name in below(typer.main.get_command(agent_cli.program)) if name.split()[0] in GROUPS}


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


async def _sealed(at: SiteEnvironment) -> str:
    """Sealed there, as soon as its proxy has the keys that the agents have made."""
    found: list[str] = []

    async def seals() -> bool:
        status, answer = await at.proxies[0].call("keys/files/encrypt", {"plaintext": "aGVsbG8="})
        found.extend([answer["ciphertext"]] if status == 200 else [])
        return status == 200

    await until(seals)
    return found[0]


async def _opens(at: SiteEnvironment, sealed: str) -> int:
    """The status with which an environment's encryption service answers."""
    return (await at.proxies[0].call("keys/files/decrypt", {"ciphertext": sealed}))[0]


async def _opens_with(at: SiteEnvironment, sealed: str, *statuses: int) -> bool:
    return await _opens(at, sealed) in statuses


async def _keys(at: SiteEnvironment) -> dict[str, str]:
    found = (await at.ask("key_list", service="files"))["keys"]
    return {key["kid"]: key["state"] for key in found}


async def _active(at: SiteEnvironment, count: int) -> bool:
    return sum(state == "active" for state in (await _keys(at)).values()) == count


async def _state_is(at: SiteEnvironment, key: str, state: str) -> bool:
    return (await _keys(at)).get(key) == state


async def _contained(at: SiteEnvironment) -> bool:
    return bool((await at.ask("incident_status", incident="inc-1"))["contained"])


async def _rekeyed(at: SiteEnvironment) -> bool:
    return bool((await at.ask("incident_status", incident="inc-1"))["state"] == "rekeyed")


async def _kek_is(at: SiteEnvironment, environment: str, kek: str) -> bool:
    return bool((await at.ask("env_status", environment=environment))["kek"] == kek)


async def _has_incident(at: SiteEnvironment, name: str) -> bool:
    with contextlib.suppress(Exception):
        return bool(await at.ask("incident_scope", incident=name))
    return False
