"""`kek rotate` in real processes over a real token, killed by SIGKILL: at steps of a table, and by chance.

What a killed one left is what the next one finds: nothing is mended in between. No EKM is lost, every key
opens under the KEK of the moment, and in the end one KEK object is in the token.
"""

import asyncio
import os
import random
import sys
from pathlib import Path

import pytest

from envelope.audit import EMPTY
from envelope.keys import KeyId
from key_agent import app, config
from key_agent.operations.operations import Operations
from key_agent.registry.states import KekState
from key_agent.rotation import unopenable
from runtime.audit_files import read_files
from tests.fakes.proxies import pem
from tests.key_agent import test_agent_softhsm as rig
from tests.key_agent.test_agent_softhsm import Site

SCRIPT = Path(__file__).with_name("rotating_process.py")
STEPS = (3, 5, 7, 9, 12, 15, 17, 20, 22)
"""Before and after: naming, making, staging, wrapping, succeeding, erasing, destroying, retiring."""
CHANCES = 12
SERVICES = 60

site = rig.site


async def _run(site: Site, *words: str, kill_after_s: float | None = None) -> tuple[int | None, str]:
    """One life of the command; how it ended and what it said."""
    site.hsm.recover()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(SCRIPT),
        str(site.config),
        *words,
        env=site.environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    site.processes.append(process)
    assert process.stdout is not None
    if kill_after_s is not None:
        first = await asyncio.wait_for(process.stdout.readline(), 60)
        assert first == b"opened\n"
        await asyncio.sleep(kill_after_s)
        if process.returncode is None:
            process.kill()
    out = await asyncio.wait_for(process.stdout.read(), 60)
    await process.wait()
    return process.returncode, out.decode()


async def _provision_many(site: Site) -> set[KeyId]:
    """A KEK and keys of many services under it; their ids."""
    async with app.opened(config.load(site.config, os.environ | site.environment)) as agent:
        operations = Operations(agent)
        await operations.kek_create()
        await operations.proxy_add(
            proxy="p1", url=site.server.url, ca_pem=(site.directory / "proxy-ca.pem").read_text()
        )
        for number in range(SERVICES):
            credential = site.tenant.service(f"s{number}")
            await operations.service_add(
                service=f"s{number}", proxy="p1", certificate_pem=pem(credential.certificate)
            )
        return {key.key_id for key in await agent.registry.data_keys()}


async def _check(site: Site, keys: set[KeyId], *, is_over: bool) -> None:
    """Every key opens under the one KEK of today; when it is over, by no other KEK."""
    site.hsm.recover()
    async with app.opened(config.load(site.config, os.environ | site.environment)) as agent:
        rows = await agent.registry.keks()
        [current] = [row for row in rows if row.state is KekState.ACTIVE]
        assert current.kek is not None
        wrapped = await agent.registry.wrapped_keys(current.reference.kek_id)
        assert {key.key_id for key in wrapped} == keys, "an EKM is lost"
        assert await unopenable(agent.source, current.kek, wrapped) == {}
        if is_over:
            assert {row.state for row in rows} == {KekState.ACTIVE, KekState.RETIRED}
            labels = await asyncio.to_thread(site.hsm.run, "list")
            ours = [label for label in labels if label.startswith("sealgate-") and "canary" not in label]
            assert ours == [current.reference.label], "one KEK is in the token"


async def test_killed_again_and_again_no_key_is_lost(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in site.hsm.environment.items():
        monkeypatch.setenv(name, value)  # for the workers of this process
    site.environment["KEY_AGENT_AUDIT__MAX_BYTES"] = "4096"  # so that it is killed amid its rotations, too
    await rig._init(site)
    keys = await _provision_many(site)
    died_at = []
    for step in STEPS:
        code, said = await _run(site, str(step))
        died_at.append(said.splitlines()[-1] if code else "came through")
    await _check(site, keys, is_over=False)
    killed = 0
    for number in range(CHANCES):
        # From the first moment to about where a whole rotation ends.
        code, _ = await _run(site, kill_after_s=random.uniform(0, 0.6))
        killed += code != 0
        if number % 5 == 4:
            await _check(site, keys, is_over=False)
    assert killed >= 3, "chance has to strike, or nothing was shown"
    assert len(set(died_at)) > len(STEPS) / 2, died_at
    for _ in range(2):  # what was left, and a whole one
        code, said = await _run(site)
        assert code == 0, said
        assert said.split()[-1] == "True", said
    await _check(site, keys, is_over=True)
    files = read_files(site.state_dir / "audit.jsonl")
    assert files.closed
    assert files.start == EMPTY
