"""The worker process: hangs, crashes, time-outs, cancellation, and what it may not inherit."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from key_agent.errors import KeySourceError, UnsupportedError
from key_agent.sources.pkcs11 import Pkcs11Source
from key_agent.sources.source import Kek, Verdict, WrappedKey
from key_agent.sources.worker import LONGEST_PAUSE_S, pause_s
from key_agent.sources.worker_source import RETIRE_AFTER_S
from tests.fakes.clock import ManualClock
from tests.key_agent.sources.conftest import REFERENCE, FakeModule, MakeSource, new_keys, owners, request_for
from tests.softhsm import SoftHsm

ROOT = Path(__file__).parents[3]
HANG_LIMIT_S = 1.5
"""Long enough for an honest answer on a loaded machine, short enough to be waited for."""


@pytest.fixture
async def kek(source: Pkcs11Source) -> Kek:
    return await source.create_kek(REFERENCE)


@pytest.fixture
async def key(source: Pkcs11Source, kek: Kek) -> WrappedKey:
    [key] = await source.generate(kek, new_keys(1))
    return key


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def until_gone(pid: int) -> None:
    async with asyncio.timeout(30):
        while not is_gone(pid):  # noqa: ASYNC110 - another process sets no event
            await asyncio.sleep(0.01)


async def test_a_hang_is_killed_at_the_time_out_and_work_goes_on_without_an_operator(
    make_source: MakeSource, fake: FakeModule, kek: Kek, key: WrappedKey
) -> None:
    source = make_source(fake.settings(request_timeout_s=HANG_LIMIT_S))
    assert (await source.diagnose(kek)).verdict is Verdict.OK
    pid = source.worker_pid
    assert pid is not None
    fake.fail(C_Decrypt="hang")
    began_s = time.monotonic()
    with pytest.raises(KeySourceError, match=r"did not answer within 1\.5 s"):
        await source.seal_envelopes(kek, [request_for(key)])
    assert time.monotonic() - began_s >= HANG_LIMIT_S
    await until_gone(pid)
    found = await source.diagnose(kek)
    assert found.verdict is Verdict.UNREACHABLE
    fake.recover()
    assert (await source.diagnose(kek)).verdict is Verdict.OK
    [result] = await source.seal_envelopes(kek, [request_for(key)])
    assert not result.failed_keys


async def test_the_event_loop_runs_on_while_the_module_hangs(
    make_source: MakeSource, fake: FakeModule, kek: Kek
) -> None:
    source = make_source(fake.settings(request_timeout_s=HANG_LIMIT_S))
    fake.fail(C_FindObjectsInit="hang")
    diagnosis = asyncio.create_task(source.diagnose(kek), name="diagnosis")
    turns = 0
    while not diagnosis.done():
        await asyncio.sleep(0.01)
        turns += 1
    assert diagnosis.result().verdict is Verdict.UNREACHABLE
    assert turns > 3  # of a loop that is held up: one


async def test_a_cancelled_request_never_answers_the_next_one(
    make_source: MakeSource, fake: FakeModule, kek: Kek, key: WrappedKey
) -> None:
    source = make_source(fake.settings())
    assert (await source.diagnose(kek)).verdict is Verdict.OK
    pid = source.worker_pid
    assert pid is not None
    fake.fail(C_Decrypt="slow")
    request = asyncio.create_task(source.seal_envelopes(kek, [request_for(key)]), name="seal")
    await asyncio.sleep(0.05)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert source.worker_pid != pid
    await until_gone(pid)
    fake.recover()
    [made] = await source.generate(kek, new_keys(1))
    assert made.owner == owners(1)[0]
    assert (await source.diagnose(kek)).verdict is Verdict.OK


async def test_a_crash_costs_one_request(
    make_source: MakeSource, fake: FakeModule, kek: Kek, key: WrappedKey
) -> None:
    source = make_source(fake.settings())
    fake.fail(C_Decrypt="crash")
    with pytest.raises(KeySourceError, match=f"signal {int(signal.SIGSEGV)}"):
        await source.seal_envelopes(kek, [request_for(key)])
    fake.recover()
    [result] = await source.seal_envelopes(kek, [request_for(key)])
    assert not result.failed_keys


async def test_a_worker_killed_while_idle_is_replaced_unnoticed(source: Pkcs11Source, kek: Kek) -> None:
    pid = source.worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until_gone(pid)
    found = await source.diagnose(kek)
    assert found.verdict is Verdict.OK
    assert source.worker_pid != pid


async def test_what_a_module_prints_does_not_corrupt_the_stream(
    make_source: MakeSource, fake: FakeModule, kek: Kek, key: WrappedKey, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_source(fake.settings())
    fake.fail(C_Decrypt="garbage")
    [result] = await source.seal_envelopes(kek, [request_for(key)])
    assert not result.failed_keys
    async with asyncio.timeout(30):
        printed = ""
        while "vendor says hello" not in printed:
            printed += capsys.readouterr().out
            await asyncio.sleep(0.01)
    assert "the HSM worker printed" in printed


async def test_a_module_that_starts_badly_once_is_tried_again(
    make_source: MakeSource, fake: FakeModule, kek: Kek
) -> None:
    source = make_source(fake.settings())
    fake.fail(C_Initialize="once")
    assert (await source.diagnose(kek)).verdict is Verdict.OK


async def test_a_hanging_start_has_a_limit_of_its_own(
    make_source: MakeSource, fake: FakeModule, kek: Kek
) -> None:
    source = make_source(fake.settings(start_timeout_s=HANG_LIMIT_S))
    fake.fail(C_Initialize="hang")
    found = await source.diagnose(kek)
    assert found.verdict is Verdict.UNREACHABLE
    assert "did not start" in found.detail


async def test_starts_are_spaced_after_repeated_failures_and_a_success_ends_that(
    fake: FakeModule, kek: Kek, clock: ManualClock
) -> None:
    source = Pkcs11Source(fake.settings(), clock=clock)
    try:
        fake.fail(C_Initialize="device-error")
        assert (await source.diagnose(kek)).verdict is Verdict.UNREACHABLE  # two passes, two failures
        found = await source.diagnose(kek)
        assert "next start in 0.5 s" in found.detail or "does not begin" in found.detail
        with pytest.raises(KeySourceError, match="next start in"):
            await source.generate(kek, new_keys(1))
        fake.recover()
        with pytest.raises(KeySourceError, match="next start in"):
            await source.generate(kek, new_keys(1))
        clock.shift(LONGEST_PAUSE_S)
        assert len(await source.generate(kek, new_keys(1))) == 1
        fake.fail(C_Encrypt="crash")
        with pytest.raises(KeySourceError, match="died"):
            await source.generate(kek, new_keys(1))
        fake.recover()
        assert len(await source.generate(kek, new_keys(1))) == 1  # the first replacement is immediate
    finally:
        await source.close()


async def test_a_worker_that_has_handled_keys_does_not_grow_old(
    hsm: SoftHsm, kek: Kek, clock: ManualClock
) -> None:
    source = Pkcs11Source(hsm.settings(), clock=clock)
    try:
        assert (await source.diagnose(kek)).verdict is Verdict.OK
        first = source.worker_pid
        clock.shift(10 * RETIRE_AFTER_S)
        await source.diagnose(kek)
        assert source.worker_pid == first  # it never held a key
        await source.generate(kek, new_keys(1))
        clock.shift(RETIRE_AFTER_S / 2)
        await source.diagnose(kek)
        assert source.worker_pid == first
        clock.shift(RETIRE_AFTER_S / 2)
        assert (await source.diagnose(kek)).verdict is Verdict.OK
        second = source.worker_pid
        assert second != first
        clock.shift(10 * RETIRE_AFTER_S)
        await source.diagnose(kek)
        assert source.worker_pid == second
    finally:
        await source.close()


async def test_closing_while_a_request_is_under_way_ends_it(
    make_source: MakeSource, fake: FakeModule, kek: Kek
) -> None:
    source = make_source(fake.settings())
    await source.diagnose(kek)
    fake.fail(C_Encrypt="hang")
    task = asyncio.create_task(source.generate(kek, new_keys(1)), name="generate")
    await asyncio.sleep(0.05)
    await source.close()
    with pytest.raises(KeySourceError, match="closed"):
        await task


def test_pauses_grow_to_a_limit() -> None:
    assert [pause_s(failures) for failures in range(8)] == [0, 0, 0.5, 1, 2, 4, 8, LONGEST_PAUSE_S]
    assert pause_s(10**6) == LONGEST_PAUSE_S


async def test_the_watch_waits_for_one_batch_at_most(
    make_source: MakeSource, fake: FakeModule, kek: Kek
) -> None:
    """A slow HSM (200 ms per call) and a long list: a diagnosis still gets its turn in between."""
    source = make_source(fake.settings())
    fake.fail(C_Encrypt="slow")
    work = asyncio.create_task(source.generate(kek, new_keys(12)), name="generate")
    await asyncio.sleep(0.3)
    found = await source.diagnose(kek)
    assert found.verdict is Verdict.OK
    assert not work.done()
    fake.recover()
    assert len(await work) == 12


async def test_requests_that_meet_are_answered_each_by_its_own(source: Pkcs11Source, kek: Kek) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(source.generate(kek, [new]), name=str(new.owner)) for new in new_keys(20)]
        watch = group.create_task(source.diagnose(kek), name="watch")
    assert [task.result()[0].owner for task in tasks] == owners(20)
    assert watch.result().verdict is Verdict.OK


async def test_a_closed_source_says_so_and_leaves_no_process(source: Pkcs11Source, kek: Kek) -> None:
    pid = source.worker_pid
    assert pid is not None
    await source.close()
    await source.close()
    assert is_gone(pid)
    with pytest.raises(KeySourceError, match="closed"):
        await source.generate(kek, new_keys(1))


def run_on_uvloop(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


def test_hang_cancel_and_crash_on_the_loop_of_production(fake: FakeModule) -> None:
    async def main() -> None:
        source = Pkcs11Source(fake.settings(request_timeout_s=HANG_LIMIT_S))
        try:
            kek = await source.create_kek(REFERENCE)
            fake.fail(C_Encrypt="hang")
            with pytest.raises(KeySourceError, match="did not answer"):
                await source.generate(kek, new_keys(1))
            task = asyncio.create_task(source.generate(kek, new_keys(1)), name="generate")
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            fake.fail(C_Encrypt="crash")
            with pytest.raises(KeySourceError, match="died"):
                await source.generate(kek, new_keys(1))
            fake.recover()
            assert (await source.diagnose(kek)).verdict is Verdict.OK
        finally:
            await source.close()

    run_on_uvloop(main())


AGENT_THAT_WAITS = """
import asyncio, json, sys
from pathlib import Path
from key_agent.sources.pkcs11 import Pkcs11Source
from tests.softhsm import SoftHsm

async def main():
    directory, module, environment = sys.argv[1:]
    settings = SoftHsm(directory=Path(directory)).settings(
        module_path=Path(module), environment=json.loads(environment), administration_timeout_s=600
    )
    source = Pkcs11Source(settings)
    asking = asyncio.create_task(source.describe(), name="describe")
    while source.worker_pid is None:
        await asyncio.sleep(0.01)
    print(source.worker_pid, flush=True)
    await asking

asyncio.run(main())
"""


def test_a_worker_that_hangs_dies_with_the_agent(fake: FakeModule) -> None:
    """It reads no more and would not see the end of its input: the kernel has to end it."""
    fake.fail(C_Login="hang")
    settings = fake.settings()
    arguments = [str(fake.hsm.directory), str(settings.module_path), json.dumps(settings.environment)]
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT_THAT_WAITS, *arguments], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert agent.stdout is not None
    deadline_s = time.monotonic() + 60
    with agent:
        worker = int(agent.stdout.readline())
        while fake.logins == 0:  # from here on it is in the module, for ever
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        assert not is_gone(worker)
        agent.kill()
    while not is_gone(worker):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


async def test_the_worker_ignores_the_terminals_signals(source: Pkcs11Source, kek: Kek) -> None:
    pid = source.worker_pid
    assert pid is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)
    assert (await source.diagnose(kek)).verdict is Verdict.OK
    assert source.worker_pid == pid


async def test_a_token_that_weakens_the_kek_is_refused_and_cleaned_up(
    make_source: MakeSource, fake: FakeModule
) -> None:
    source = make_source(fake.settings())
    fake.fail(C_GetAttributeValue="weaken")
    with pytest.raises(UnsupportedError, match="EXTRACTABLE"):
        await source.create_kek(REFERENCE)
    fake.recover()
    assert fake.hsm.run("count", REFERENCE) == 0


async def test_a_token_without_gcm_gets_kw(make_source: MakeSource, fake: FakeModule) -> None:
    source = make_source(fake.settings())
    fake.fail(C_EncryptInit="unsupported")
    kek = await source.create_kek(REFERENCE)
    assert kek.method == "kw"
    assert (await source.diagnose(kek)).verdict is Verdict.OK
    facts = await source.describe()
    methods = facts["methods"]
    assert isinstance(methods, dict)
    assert methods["kw"] == "ok"
    assert "MechanismInvalid" in methods["gcm"]


async def test_a_pinned_method_is_not_negotiated_away(make_source: MakeSource, fake: FakeModule) -> None:
    source = make_source(fake.settings(method="gcm"))
    fake.fail(C_EncryptInit="unsupported")
    with pytest.raises(UnsupportedError, match="gcm: MechanismInvalid"):
        await source.create_kek(REFERENCE)


async def test_a_token_that_opens_anything_is_refused(make_source: MakeSource, fake: FakeModule) -> None:
    source = make_source(fake.settings(method="gcm"))
    fake.fail(C_Decrypt="zeros")
    with pytest.raises(UnsupportedError):
        await source.create_kek(REFERENCE)


async def test_a_dead_generator_makes_no_keys(make_source: MakeSource, fake: FakeModule, kek: Kek) -> None:
    source = make_source(fake.settings())
    fake.fail(C_GenerateRandom="zeros")
    with pytest.raises(KeySourceError):
        await source.generate(kek, new_keys(1))
    with pytest.raises(KeySourceError, match="zeros"):
        await source.create_kek(REFERENCE, replace_unfinished=True)


async def test_a_destroy_that_destroys_nothing_is_no_success(
    make_source: MakeSource, fake: FakeModule, kek: Kek
) -> None:
    source = make_source(fake.settings())
    fake.fail(C_DestroyObject="lie")
    with pytest.raises(KeySourceError, match="still has 1 keys"):
        await source.destroy_kek(kek)
    assert fake.hsm.run("count", REFERENCE) == 1


@pytest.mark.parametrize("fault", ["lie", "device-error"])
async def test_an_attribute_that_cannot_be_changed_is_said(
    make_source: MakeSource, fake: FakeModule, kek: Kek, fault: str
) -> None:
    source = make_source(fake.settings())
    fake.fail(C_SetAttributeValue=fault)
    with pytest.raises(UnsupportedError, match="DECRYPT"):
        await source.set_kek_enabled(kek, enabled=False)
    assert (await source.diagnose(kek)).verdict is Verdict.OK
