"""Several real worker processes behind one port: keys in all of them, blind together, killed and replaced."""

# ruff: noqa: ASYNC110 - what other processes do has no event here

import asyncio
import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import aiohttp
import pytest

from envelope.audit import EMPTY
from proxy import config
from proxy.tenants.named_key_store import set_blocked
from runtime.audit_files import read_chain
from runtime.settings import SettingsError
from tests.children import output_of
from tests.integration.service_site import OWNER, PROGRAM, REPOSITORY, Site
from tests.integration.test_proxy_process import Installation, installation, running

__all__ = ["installation"]

MANY = 40
"""Connections: that the kernel gives all of them to one of two workers has a chance of 2^-39."""


async def until_replaced(site: Site, gone: int) -> None:
    """Two workers, none of them *gone*, and the proxy says that it is ready."""
    async with asyncio.timeout(60):
        while len(site.workers()) != 2 or gone in site.workers():
            await asyncio.sleep(0.02)
        number = 0
        while number < 2:
            number = (
                sum(event["action"] == "worker-started" for worker in (0, 1) for event in site.audit(worker))
                - 1
            )
            await asyncio.sleep(0.02)
    await site.ready()


def is_gone(pid: int) -> bool:
    """Ended: no such process, or one that only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


async def test_all_workers_hold_the_keys_and_are_blind_before_the_receipt(tmp_path: Path) -> None:
    site = Site.make(tmp_path, workers=2)
    async with site.running() as process:
        assert len(site.workers()) == 2
        assert (await site.encrypt())[0] == 503
        assert (await site.push())["status"] == "accepted"
        answers = [await site.encrypt() for _ in range(MANY)]
        assert {status for status, _ in answers} == {200}
        assert all(site.calls(worker) > 0 for worker in (0, 1))
        # What one has encrypted any other decrypts.
        for _, ciphertext in answers[:10]:
            status, document = await site.call("decrypt", {"ciphertext": ciphertext})
            assert (status, document["data"]) == (200, {"plaintext": "aGVsbG8="})
        _, metrics = await site.health("/metrics")
        total = 'sealgate_service_requests_total{dialect="transit",operation="encrypt",outcome="ok"}'
        assert f"{total} {float(MANY)}" in metrics
        assert metrics.count("sealgate_key_can_seal{") == 1

        assert (await site.push(keys=False))["status"] == "accepted"
        blind = [await site.encrypt() for _ in range(MANY)]
        assert {status for status, _ in blind} == {503}
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            assert await process.wait() == 0
    for name in ("audit.jsonl", "audit-worker-0.jsonl", "audit-worker-1.jsonl"):
        with (tmp_path / "state" / name).open("rb") as stream:
            assert read_chain(stream).head != EMPTY
    assert [event["action"] for event in site.audit(0)][-1] == "worker-stopped"
    assert "Traceback" not in site.log
    assert site.material.hex() not in site.log


async def test_a_killed_worker_loses_its_requests_only_and_comes_back_with_its_keys(tmp_path: Path) -> None:
    site = Site.make(tmp_path, workers=2)
    body, headers = {"plaintext": "aGVsbG8="}, {"X-Vault-Token": site.token}
    url = f"http://127.0.0.1:{site.port}/v1/transit/encrypt/orders"
    statuses: list[int] = []
    lost = 0
    stop = asyncio.Event()

    async def caller() -> None:
        """One kept connection; when it breaks, the next one is opened."""
        nonlocal lost
        while not stop.is_set():
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session:
                with contextlib.suppress(aiohttp.ClientError):
                    while not stop.is_set():
                        async with session.post(url, json=body, headers=headers) as answer:
                            await answer.read()
                            statuses.append(answer.status)
                        await asyncio.sleep(0.001)
                    return
                lost += 1

    async with site.running(), asyncio.TaskGroup() as group:
        await site.push()
        instance = await site.instance()
        callers = 16
        for _ in range(callers):
            group.create_task(caller())
        async with asyncio.timeout(30):
            while not all(site.calls(worker) for worker in (0, 1)):
                await asyncio.sleep(0.02)
        victim = site.workers()[0]
        before = len(statuses)
        os.kill(victim, signal.SIGKILL)
        await until_replaced(site, victim)
        answered = len(statuses) - before
        served = [site.calls(worker) for worker in (0, 1)]
        # The new one has the keys, by the envelopes that were kept: nobody has pushed since.
        async with asyncio.timeout(60):
            while not all(site.calls(worker) > served[worker] for worker in (0, 1)):
                assert (await site.encrypt())[0] == 200
        stop.set()
        assert await site.instance() == instance
    assert set(statuses) == {200}
    assert answered > 0  # the other one went on
    assert 0 < lost <= callers


async def test_a_worker_that_does_not_answer_is_dead_before_a_withdrawal_is_acknowledged(
    tmp_path: Path,
) -> None:
    site = Site.make(tmp_path, workers=2, patience_s=2.0)
    async with site.running():
        assert (await site.push())["status"] == "accepted"
        hung = site.workers()[0]
        os.kill(hung, signal.SIGSTOP)
        began = time.monotonic()
        assert (await site.push(keys=False))["status"] == "accepted"
        assert time.monotonic() - began < 8  # less than an agent waits
        assert is_gone(hung)
        assert {(await site.encrypt())[0] for _ in range(10)} == {503}
        await until_replaced(site, hung)
        # The new one was told of the withdrawal as well.
        assert {(await site.encrypt())[0] for _ in range(MANY)} == {503}


async def test_workers_follow_the_directory_and_end_with_their_proxy(tmp_path: Path) -> None:
    site = Site.make(tmp_path, workers=2)
    async with site.running() as process:
        await site.push()
        with site.store() as store:
            set_blocked(store, OWNER, blocked=True, actor="test")
        async with asyncio.timeout(30):
            while {(await site.encrypt())[0] for _ in range(10)} != {400}:
                await asyncio.sleep(0.02)
        assert {(await site.encrypt())[0] for _ in range(MANY)} == {400}
        workers = site.workers()
        process.kill()
        async with asyncio.timeout(30):
            while not all(is_gone(pid) for pid in workers):
                await asyncio.sleep(0.01)


async def test_the_engine_shares_its_ports_among_workers_too(installation: Installation) -> None:
    text = installation.config.read_text()
    installation.config.write_text(
        text.replace('id = "proxy-1"', 'id = "proxy-1"\nworkers = 2\nworker_patience_s = 5.0')
    )
    plain = os.urandom(5_000)
    async with running(installation):
        assert (await installation.push())["status"] == "accepted"
        assert (await installation.ask("/a", "-T", "-", body=plain)).status == 201
        got = [await installation.ask("/a") for _ in range(20)]
        assert {answer.body for answer in got} == {plain}
        state = installation.directory / "state"
        for worker in (0, 1):
            assert "object-open" in (state / f"audit-worker-{worker}.jsonl").read_text()
        assert (await installation.push(keys=False))["status"] == "accepted"
        assert {(await installation.ask("/a")).code for _ in range(20)} == {"key-withdrawn"}


async def test_what_a_worker_cannot_do_ends_the_process_with_cause_and_next_step(tmp_path: Path) -> None:
    site = Site.make(tmp_path, workers=2)
    squatter = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", site.port)
    async with squatter:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, str(site.config),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd=REPOSITORY,
        )  # fmt: skip
        out, _ = await output_of(process)
    assert process.returncode != 0
    assert b"CommandError" in out
    assert str(site.port).encode() in out


@pytest.mark.parametrize("workers", [0, 65])
def test_how_many_is_bounded(tmp_path: Path, workers: int) -> None:
    site = Site.make(tmp_path, workers=workers)
    with pytest.raises(SettingsError, match=r"proxy\.workers must be between 1 and 64"):
        config.load(site.config, {})
