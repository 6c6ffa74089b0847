"""`key-agent` as its administrator meets it: real commands, a real process, a real HSM module, TLS.

What the proxy (tests/fakes/proxies.py) holds is looked at from outside; another process destroys the KEK.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from envelope.certificates import fingerprint
from envelope.derive import key_check_value, object_key
from envelope.keys import KeyMaterial, KeyState, NetworkService
from envelope.material import Signer
from envelope.objects import Opener, Sealer
from runtime.clock import SystemClock
from runtime.tls import server_context
from tests.children import output_of
from tests.fakes.proxies import FakeProxy, FakeProxyServer
from tests.lateness import lateness
from tests.pki import Tenant, issue_server, make_server_ca, write_certificate, write_credential
from tests.softhsm import SoftHsm

AGENT_ID = "hq"
S3 = NetworkService("acme", "s3")


@dataclass
class Site:
    """One enterprise: an HSM, an agent's files, and a proxy somewhere."""

    directory: Path
    tenant: Tenant
    hsm: SoftHsm
    proxy: FakeProxy
    server: FakeProxyServer
    environment: dict[str, str]
    processes: list[asyncio.subprocess.Process] = field(default_factory=list)

    @property
    def config(self) -> Path:
        return self.directory / "key-agent.toml"

    @property
    def state_dir(self) -> Path:
        return self.directory / "state"

    async def command(self, *words: str, exit_code: int = 0) -> Any:
        """Run a command to its end; its JSON."""
        process = await self.start(*words)
        out, err = await asyncio.wait_for(output_of(process), 60)
        assert process.returncode == exit_code, (words, process.returncode, out.decode(), err.decode())
        return json.loads(out) if out else json.loads(err.splitlines()[-1])["error"]

    async def start(self, *words: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "key_agent.cli",
            "--config",
            str(self.config),
            "--json",
            *words,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if words != ("run",) or self.processes_running() else None,
        )
        self.processes.append(process)
        return process

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.subprocess.Process]:
        """`key-agent run`, until SIGTERM; it must stop cleanly."""
        process = await self.start("run")
        try:
            await self.wait_for_socket(process)
            yield process
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0

    async def wait_for_socket(self, process: asyncio.subprocess.Process) -> None:
        def listens() -> bool:
            assert process.returncode is None, "the agent has ended"
            return (self.state_dir / "control.sock").exists()

        await until(listens)

    async def kek(self) -> dict[str, Any]:
        found = (await self.command("kek", "status"))["kek"]
        assert isinstance(found, dict)
        return found

    async def destroy_kek_by_another_process(self) -> None:
        kek = await self.kek()
        done = await asyncio.to_thread(self.hsm.run, "destroy", _reference(kek))
        assert done == 1

    def processes_running(self) -> bool:
        return any(process.returncode is None for process in self.processes)

    async def kill_all(self) -> None:
        for process in self.processes:
            if process.returncode is None:
                process.kill()
                await process.wait()


@dataclass
class _Reference:
    """As much of a `KekReference` as tests/softhsm.py wants."""

    label: str
    object_id: bytes


def _reference(kek: dict[str, Any]) -> _Reference:
    return _Reference(kek["label"], bytes.fromhex(kek["object_id"]))


async def _set_decrypt(site: Site, kek: dict[str, Any], *, allowed: bool) -> None:
    """By another process."""
    change = {"name": "DECRYPT", "value": allowed}
    await asyncio.to_thread(site.hsm.run, "set", _reference(kek), arguments=change)


async def until(condition: Callable[[], object], *, timeout_s: float = 30) -> float:
    """Seconds until *condition* held."""
    began_s = time.monotonic()
    while not condition():
        if time.monotonic() - began_s > timeout_s:
            raise TimeoutError("the condition did not come true")
        await asyncio.sleep(0.01)
    return time.monotonic() - began_s


@pytest.fixture
async def site(tmp_path: Path, acme: Tenant) -> AsyncIterator[Site]:
    hsm = SoftHsm.create(tmp_path / "hsm")
    files = tmp_path / "key-agent"
    files.mkdir(mode=0o700)
    signing = acme.agent_signing(AGENT_ID)
    write_certificate(acme.root.certificate, files / "root.pem")
    write_credential(signing, files, "signing")
    write_credential(acme.agent_tls(AGENT_ID), files, "tls")
    (files / "pin").touch(mode=0o600)
    (files / "pin").write_text(hsm.pin + "\n")
    authority = make_server_ca()
    write_certificate(authority.certificate, tmp_path / "proxy-ca.pem")
    server_files = write_credential(issue_server(authority, ["localhost"]), tmp_path, "proxy")
    service = acme.service("s3")
    write_certificate(service.certificate, tmp_path / "s3.pem")
    proxy = FakeProxy(
        id="p1",
        clock=SystemClock(),
        signers={fingerprint(signing.certificate): Signer(signing.certificate, AGENT_ID)},
        services={S3: service},
    )
    server = FakeProxyServer(proxy)
    made = Site(
        directory=tmp_path,
        tenant=acme,
        hsm=hsm,
        proxy=proxy,
        server=server,
        environment=_environment(hsm.environment),
    )
    context = server_context(*server_files, client_roots=[acme.root.certificate])
    async with server.serving(context):
        yield made
        await made.kill_all()


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    root = str(Path(__file__).parents[2])
    # An interval that a test can wait for; the other constants as in production.
    return {
        **kept,
        **extra,
        "PYTHONPATH": root,
        "KEY_AGENT_REFRESH__INTERVAL_S": "20",
        "KEY_AGENT_REFRESH__VALIDITY_S": "30",
        "KEY_AGENT_ADMIN__PORT": "0",
    }


async def _init(site: Site) -> None:
    await site.command(
        "init",
        "--tenant",
        "acme",
        "--agent",
        AGENT_ID,
        "--module",
        str(site.hsm.module),
        "--token-label",
        site.hsm.label,
        "--state-dir",
        str(site.state_dir),
        "--files-dir",
        str(site.directory / "key-agent"),
    )


async def _provision(site: Site) -> None:
    await site.command(
        "proxy", "add", "p1", "--url", site.server.url, "--ca", str(site.directory / "proxy-ca.pem")
    )
    await site.command(
        "service", "add", "s3", "--proxy", "p1", "--certificate", str(site.directory / "s3.pem")
    )


async def test_from_init_to_revocation_and_back(site: Site) -> None:
    await _init(site)
    refused = await site.command("init", "--tenant", "acme", "--agent", AGENT_ID, "--module", "/m",
                                 "--token-label", "t", exit_code=3)  # fmt: skip
    assert "exists" in refused["cause"]
    await site.command("kek", "create")
    await _provision(site)
    assert site.proxy.accepted == [], "nothing runs, nothing is pushed"

    async with site.running():
        await until(lambda: site.proxy.valid_keys(S3))
        [old] = site.proxy.valid_keys(S3)
        second = await site.command("run", exit_code=4)
        assert second["code"] == "locked"
        doctor = await site.command("doctor")
        assert doctor["ok"], doctor
        status = await site.command("status")
        assert status["running"]
        assert status["services"][0]["proxies"][0]["state"] == "valid"

        # A refresh by itself: the same key, a later sequence.
        pushes = len(site.proxy.accepted)
        await until(lambda: len(site.proxy.accepted) > pushes)
        assert site.proxy.valid_keys(S3) == [old]
        assert site.proxy.accepted[-1].sequence > site.proxy.accepted[-2].sequence

        await site.destroy_kek_by_another_process()
        async with lateness() as late:
            took_s = await until(lambda: not site.proxy.valid_keys(S3))
            assert site.proxy.accepted[-1].keys == (), "by a signed withdrawal, not by expiry"
            assert took_s < 6 + late.allowance_s
        status = await site.command("status")
        assert status["standing"] == "revoked"
        assert status["diagnosis"]["verdict"] == "kek_destroyed"
        refused = await site.command("service", "add", "s3", "--proxy", "p1", "--certificate",
                                     str(site.directory / "s3.pem"), exit_code=3)  # fmt: skip
        assert "reinstate" in refused["next_step"]
        refused = await site.command("reinstate", exit_code=3)
        assert "acme/s3" in refused["cause"]

        await site.command("reinstate", "--yes")
        await until(lambda: site.proxy.valid_keys(S3))
        [new] = site.proxy.valid_keys(S3)
        assert new != old

        revoked = await site.command("kek", "revoke", "--yes")
        assert revoked["destroyed"]
        assert not site.proxy.valid_keys(S3)
        assert await asyncio.to_thread(site.hsm.run, "count", _reference(await site.kek())) == 0
    assert not (site.state_dir / "control.sock").exists()


async def test_revoke_without_a_running_agent_reaches_the_proxy_too(site: Site) -> None:
    await _init(site)
    await site.command("kek", "create")
    await _provision(site)
    async with site.running():
        await until(lambda: site.proxy.valid_keys(S3))
    assert site.proxy.valid_keys(S3)
    await site.command("kek", "revoke", "--yes")
    assert not site.proxy.valid_keys(S3)
    assert site.proxy.accepted[-1].keys == ()


async def test_a_disabled_kek_comes_back_with_restore(site: Site) -> None:
    await _init(site)
    await site.command("kek", "create")
    await _provision(site)
    async with site.running():
        await until(lambda: site.proxy.valid_keys(S3))
        [key] = site.proxy.valid_keys(S3)
        kek = await site.kek()
        await _set_decrypt(site, kek, allowed=False)
        await until(lambda: not site.proxy.valid_keys(S3), timeout_s=60)
        await site.command("reinstate", "--restore", "--yes", exit_code=3)
        await _set_decrypt(site, kek, allowed=True)
        await site.command("reinstate", "--restore", "--yes")
        assert site.proxy.valid_keys(S3) == [key]


def _material(site: Site) -> dict[str, KeyMaterial]:
    """What the proxy holds of s3, by key id."""
    return {str(key.key_id): key for key in site.proxy.held[S3].claims.keys}


def _seal(key: KeyMaterial, content: bytes) -> bytes:
    sealer = Sealer(object_key(key.secret, S3, key.key_id), S3, key.key_id)
    return bytes(sealer.update(content)) + bytes(sealer.finalize())


def _unseal(held: dict[str, KeyMaterial], sealed: bytes) -> bytes:
    """As the proxy does it; KeyError if it does not hold the key that the object names."""
    opener = Opener(S3, lambda header: object_key(held[str(header.key_id)].secret, S3, header.key_id))
    return bytes(opener.update(sealed)) + bytes(opener.finalize())


@dataclass
class _Backup:
    """A copy of the token's files, made while the KEK was in it."""

    site: Site

    @property
    def directory(self) -> Path:
        return self.site.directory / "hsm-backup"

    async def make(self) -> None:
        await asyncio.to_thread(shutil.copytree, self.site.hsm.tokens, self.directory)

    async def bring_back(self, *, with_lock: bool = True) -> None:
        """What is missing in the token is put back: the KEK's file, and the lock beside it.

        Without its lock SoftHSM2 uses the object as ever, and calls it a failure when it destroys it.
        """
        await asyncio.to_thread(self._bring_back, {".object", ".lock"} if with_lock else {".object"})

    def _bring_back(self, suffixes: set[str]) -> None:
        kept = [path for path in self.directory.rglob("*") if path.is_file()]
        places = {path: self.site.hsm.tokens / path.relative_to(self.directory) for path in kept}
        lost = {path: place for path, place in places.items() if not place.exists()}
        assert {path.suffix for path in lost} >= suffixes
        assert {path.stem for path in lost} == {next(iter(lost)).stem}, "one object"
        for path, place in lost.items():
            if path.suffix in suffixes:
                shutil.copy(path, place)


async def test_old_objects_open_again_when_a_backup_of_the_hsm_brings_the_old_kek_back(site: Site) -> None:
    await _init(site)
    await site.command("kek", "create")
    await _provision(site)
    async with site.running():
        await until(lambda: site.proxy.valid_keys(S3))
        [old] = _material(site).values()
        sealed, kcv = _seal(old, b"written before"), key_check_value(old.secret, S3, old.key_id)
        old_kek = await site.kek()
        backup = _Backup(site)
        await backup.make()
        await site.destroy_kek_by_another_process()
        await until(lambda: not site.proxy.valid_keys(S3), timeout_s=60)
        await site.command("reinstate", "--yes")
        [new] = _material(site).values()
        with pytest.raises(KeyError, match=str(old.key_id)):
            _unseal(_material(site), sealed)
        refused = await site.command("reinstate", "--restore", "--yes", exit_code=3)
        assert "kek_destroyed" in refused["cause"]

        # The old KEK returns.
        await backup.bring_back(with_lock=False)
        asked = await site.command("reinstate", "--restore", exit_code=3)
        assert asked["code"] == "not-confirmed"
        assert "acme/s3 (1 key)" in asked["cause"]
        assert len(_material(site)) == 1, "nothing without a yes"
        result = await site.command("reinstate", "--restore", "--yes", exit_code=1)
        [one] = result["earlier"]
        assert (one["moved"], one["retired"]) == (1, False)
        assert "not destroyed in the HSM" in one["problem"]
        assert result["proxies"] == [{"proxy": "p1", "outcome": "accepted", "error": None}]

        held = _material(site)
        assert {kid: key.state for kid, key in held.items()} == {
            str(old.key_id): KeyState.DEACTIVATED,
            str(new.key_id): KeyState.ACTIVE,
        }
        returned = held[str(old.key_id)]
        assert key_check_value(returned.secret, S3, returned.key_id) == kcv
        assert _unseal(held, sealed) == b"written before"
        # The HSM said that it had not destroyed the old KEK: once more, until it is proven.
        result = await site.command("reinstate", "--restore", "--yes")
        [one] = result["earlier"]
        assert (one["moved"], one["retired"]) == (0, True)
        assert await asyncio.to_thread(site.hsm.run, "count", _reference(old_kek)) == 0

        # It stays so: the next refresh, and another life of the agent.
        pushes = len(site.proxy.accepted)
        await until(lambda: len(site.proxy.accepted) > pushes)
        assert _unseal(_material(site), sealed) == b"written before"
    site.proxy.restart()
    async with site.running():
        await until(lambda: site.proxy.valid_keys(S3))
        assert _unseal(_material(site), sealed) == b"written before"
        await site.command("kek", "revoke", "--yes")
        assert not site.proxy.valid_keys(S3)


async def test_kill_9_during_restore_loses_no_key_and_the_same_command_goes_on(site: Site) -> None:
    await _init(site)
    await site.command("kek", "create")
    await _provision(site)
    names = [f"box{number}" for number in range(4)]
    for name in names:
        credential = site.tenant.service(name)
        site.proxy.services[NetworkService("acme", name)] = credential
        certificate = write_certificate(credential.certificate, site.directory / f"{name}.pem")
        await site.command("service", "add", name, "--proxy", "p1", "--certificate", str(certificate))
    old_kek = await site.kek()
    backup = _Backup(site)
    await backup.make()
    await site.command("kek", "revoke", "--yes")
    await site.command("reinstate", "--yes")
    await backup.bring_back()
    for delay_s in (0.7, 1.1, 1.5, 2.0):
        restoring = await site.start("reinstate", "--restore", "--yes")
        await asyncio.sleep(delay_s)  # where in the work it dies is left to chance; no outcome depends on it
        if restoring.returncode is None:
            restoring.kill()
        await restoring.wait()
        listed = await site.command("service", "list")
        wraps = [key["keks"] for row in listed["services"] for key in row["keys"]]
        assert [len(keks) for keks in wraps] == [1] * 2 * (len(names) + 1)
        if any(old_kek["id"] in keks for keks in wraps):
            assert await asyncio.to_thread(site.hsm.run, "count", _reference(old_kek)) == 1
    finished = await site.start("reinstate", "--restore", "--yes")
    await output_of(finished)
    assert finished.returncode in {0, 3}, "done now, or nothing was left to do"
    assert await asyncio.to_thread(site.hsm.run, "count", _reference(old_kek)) == 0
    async with site.running():
        await until(lambda: len(site.proxy.held) == len(names) + 1)
        assert all(len(held.claims.keys) == 2 for held in site.proxy.held.values())


async def test_kill_9_at_any_time_loses_nothing_that_was_acknowledged(site: Site) -> None:
    await _init(site)
    await site.command("kek", "create")
    await site.command(
        "proxy", "add", "p1", "--url", site.server.url, "--ca", str(site.directory / "proxy-ca.pem")
    )
    acknowledged: dict[str, set[str]] = {}
    commands = []
    for number, delay_s in enumerate((0.05, 0.3, 0.6, 0.9, 1.2)):
        name = f"s{number}"
        credential = site.tenant.service(name)
        site.proxy.services[NetworkService("acme", name)] = credential
        certificate = write_certificate(credential.certificate, site.directory / f"{name}.pem")
        add = ("service", "add", name, "--proxy", "p1", "--certificate", str(certificate))
        commands.append(add)
        agent = await site.start("run")
        await site.wait_for_socket(agent)
        adding = await site.start(*add)
        await asyncio.sleep(delay_s)  # where in the work it dies is left to chance; no outcome depends on it
        agent.kill()
        await agent.wait()
        # Nobody runs now: the command finds the lock free and does it itself, was cut off, or had its answer.
        await asyncio.wait_for(output_of(adding), 60)
        for service, held in site.proxy.held.items():
            acknowledged.setdefault(str(service), set()).update(str(key.key_id) for key in held.claims.keys)
        listed = await site.command("service", "list")
        known = {key["kid"] for row in listed["services"] for key in row["keys"]}
        for kids in acknowledged.values():
            assert kids <= known, "a proxy holds a key that the registry cannot reproduce"
    for add in commands:
        await site.command(*add)
    site.proxy.restart()
    async with site.running():
        await until(lambda: len(site.proxy.held) == len(commands))
        for owner, kids in acknowledged.items():
            assert kids <= set(site.proxy.valid_keys(NetworkService.parse(owner)))


async def test_kill_9_during_reinstate_leaves_one_kek_and_no_lost_key(site: Site) -> None:
    await _init(site)
    await site.command("kek", "create")
    await _provision(site)
    labels: list[str] = []
    keks: list[str] = []
    for delay_s in (0.05, 0.5, 0.9, 1.3):
        await site.command("kek", "revoke", "--yes")
        reinstating = await site.start("reinstate", "--yes")
        await asyncio.sleep(delay_s)
        if reinstating.returncode is None:
            reinstating.kill()
        await reinstating.wait()
        if (await site.kek())["state"] != "active":
            await site.command("reinstate", "--yes")
        labels = await asyncio.to_thread(site.hsm.run, "list")
        keks = [label for label in labels if label == (await site.kek())["label"]]
        assert len(keks) == 1
    site.proxy.restart()
    async with site.running():
        await until(lambda: site.proxy.valid_keys(S3))
    listed = await site.command("service", "list")
    [row] = listed["services"]
    assert [key["state"] for key in row["keys"]].count("active") == 1
    others = [label for label in labels if label.startswith("sealgate-") and "canary" not in label]
    assert others == keks, "no half-made KEK is left behind"
