"""Two agents on one registry, as real processes with a real HSM: one leads, the other follows it."""

import asyncio
import contextlib
import json
import signal
import sqlite3
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from envelope.certificates import fingerprint
from envelope.material import Signer
from tests.key_agent.test_agent_softhsm import (  # noqa: F401 - `site` is a fixture
    S3,
    Site,
    _init,
    _provision,
    site,
    until,
)
from tests.pki import write_credential
from tests.ports import free_port
from tests.postgres import running

TAKE_OVER_S = 45.0
"""On a loaded machine; that the constants allow 15 s is tested in registry/test_lease.py."""


@pytest.fixture
async def pair(site: Site) -> AsyncIterator[tuple[Site, Site]]:  # noqa: F811
    """Two state directories, one registry, one HSM."""
    await _init(site)
    await site.command("kek", "create")
    await _provision(site)
    state_dir = site.directory / "state-2"
    state_dir.mkdir(mode=0o700)
    port = free_port()
    spare = replace(
        site,
        environment=site.environment
        | {
            "KEY_AGENT_AGENT__STATE_DIR": str(state_dir),
            "KEY_AGENT_AGENT__DATABASE_URL": f"sqlite:///{site.state_dir / 'registry.db'}",
            "KEY_AGENT_ADMIN__PORT": str(port),
            "PORT": str(port),
        },
        processes=[],
    )
    yield site, spare
    await spare.kill_all()


def _socket(spare: Site) -> Any:
    return spare.directory / "state-2" / "control.sock"


async def _get(spare: Site, path: str) -> tuple[int, Any]:
    def get() -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{spare.environment['PORT']}{path}", timeout=60
            ) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    return await asyncio.to_thread(get)


async def _serves(spare: Site) -> None:
    """As soon as it can be asked how it is."""
    began_s = time.monotonic()
    while True:
        with contextlib.suppress(OSError):
            if (await _get(spare, "/livez"))[0] == 200:
                return
        assert time.monotonic() - began_s < 60
        await asyncio.sleep(0.1)


async def _leads(spare: Site) -> dict[str, Any]:
    """Its status, as soon as it leads."""
    began_s = time.monotonic()
    while True:
        try:
            status, told = await _get(spare, "/v1/status")
        except OSError:
            status, told = 0, {}
        if status == 200 and told.get("role") == "leader":
            return dict(told)
        assert time.monotonic() - began_s < 60
        await asyncio.sleep(0.1)


async def test_the_spare_stands_by_follows_a_killed_leader_and_feeds_the_proxies(
    pair: tuple[Site, Site],
) -> None:
    first, spare = pair
    leader = await first.start("run")
    await first.wait_for_socket(leader)
    await until(lambda: first.proxy.valid_keys(S3))
    follower = await spare.start("run")
    await until(lambda: _socket(spare).exists(), timeout_s=60)
    await _serves(spare)  # by HTTP a moment later
    status, told = await _get(spare, "/v1/status")
    assert (status, told["role"]) == (200, "standby")
    assert (told["leader"]["agent"], told["leader"]["pid"]) == ("hq", leader.pid)
    status, told = await _get(spare, "/readyz")
    assert status == 503
    assert "leads" in told["reasons"][0]
    assert (await _get(spare, "/livez"))[0] == 200
    refused = await spare.command("kek", "revoke", "--yes", exit_code=4)
    assert (refused["code"], "that machine" in refused["next_step"]) == ("standby", True)
    before = (await first.command("status"))["term"]
    pushes = len(first.proxy.accepted)

    leader.kill()
    await leader.wait()
    began_s = time.monotonic()
    told = await _leads(spare)
    assert time.monotonic() - began_s < TAKE_OVER_S
    assert told["term"] == before + 1
    assert (await _get(spare, "/readyz"))[0] in (200, 503)
    await until(lambda: len(first.proxy.accepted) > pushes)

    # The first one comes back, and it is its turn to stand by; the kill switch works at the leader.
    (first.state_dir / "control.sock").unlink()  # the killed one left it
    returned = await first.start("run")
    await until((first.state_dir / "control.sock").exists)
    assert (await first.command("kek", "revoke", "--yes", exit_code=4))["code"] == "standby"
    done = await spare.command("kek", "revoke", "--yes")
    assert done["destroyed"] is True
    await until(lambda: not first.proxy.valid_keys(S3))
    for process in (returned, follower):
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0


def _under_a_name_of_its_own(first: Site, spare: Site) -> Site:
    """With its own certificates, as docs/key-agent.md recommends."""
    files = first.directory / "spare"
    files.mkdir(mode=0o700)
    signing = first.tenant.agent_signing("spare")
    write_credential(signing, files, "signing")
    write_credential(first.tenant.agent_tls("spare"), files, "tls")
    signer = Signer(signing.certificate, "spare")
    first.proxy.signers = {**first.proxy.signers, fingerprint(signing.certificate): signer}
    names = {
        f"KEY_AGENT_{section}__{option}": str(files / f"{section.lower()}.{ending}")
        for section in ("SIGNING", "TLS")
        for option, ending in (("KEY_FILE", "key"), ("CERTIFICATE_FILE", "pem"))
    }
    return replace(spare, environment=spare.environment | names | {"KEY_AGENT_AGENT__ID": "spare"})


async def _freeze_between_transactions(first: Site, leader: asyncio.subprocess.Process) -> None:
    """Inside of one it would keep SQLite's lock, which nobody can take from it (lease.py, rule 5)."""
    while True:
        leader.send_signal(signal.SIGSTOP)
        registry = sqlite3.connect(first.state_dir / "registry.db", timeout=0.5, isolation_level=None)
        try:
            registry.execute("BEGIN IMMEDIATE")
            registry.execute("ROLLBACK")
        except sqlite3.OperationalError:
            leader.send_signal(signal.SIGCONT)
            await asyncio.sleep(0.1)
        else:
            return
        finally:
            registry.close()


async def test_a_frozen_leader_wakes_up_to_no_harm(pair: tuple[Site, Site]) -> None:
    first, spare = pair
    spare = _under_a_name_of_its_own(first, spare)
    leader = await first.start("run")
    await first.wait_for_socket(leader)
    await until(lambda: first.proxy.valid_keys(S3))
    await _freeze_between_transactions(first, leader)
    follower = await spare.start("run")
    told = await _leads(spare)
    assert (told["leads"], told["agent"]) == (True, "spare")
    await spare.command("rotate", "s3")
    keys = (await spare.command("key", "list", "s3"))["keys"]
    leader.send_signal(signal.SIGCONT)
    assert await asyncio.wait_for(leader.wait(), 30) != 0, "it says that it was followed, and ends"
    assert (await spare.command("key", "list", "s3"))["keys"] == keys
    assert first.proxy.valid_keys(S3)
    follower.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(follower.wait(), 30) == 0


async def test_an_agent_whose_database_is_away_waits_says_so_and_goes_when_asked(site: Site) -> None:  # noqa: F811
    """PostgreSQL starts later than the agent, as after a power cut of both."""
    await _init(site)
    with running() as cluster:
        await asyncio.to_thread(cluster.kill)
        port = str(free_port())
        site.environment |= {"KEY_AGENT_AGENT__DATABASE_URL": cluster.url, "KEY_AGENT_ADMIN__PORT": port}
        site.environment["PORT"] = port
        for is_mended in (False, True):
            agent = await site.start("run")
            await _serves(site)
            status, told = await _get(site, "/readyz")
            assert status == 503
            assert "the registry cannot be used yet" in told["reasons"][0]
            assert (await _get(site, "/livez"))[0] == 200
            assert "connection" in (await _get(site, "/v1/status"))[1]["problem"]
            refused = await site.command("status", exit_code=4)
            assert (refused["code"], "mend the database" in refused["next_step"]) == ("registry", True)
            if is_mended:
                await asyncio.to_thread(cluster.start)
                assert (await _leads(site))["term"] == 1
            agent.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(agent.wait(), 60) == 0
