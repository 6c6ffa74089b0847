"""Promise 3 in numbers: two `sealgate run`, one `key-agent run`, one HSM, and another process that destroys.

A proxy that can be reached refuses within 6 s of the KEK's destruction (5 s to find out, 1 s to tell); one
that nobody can reach refuses when the validity ends. Neither gets keys again, whoever restarts.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.whole_site import Site, until, whole_site
from tests.lateness import lateness

INTERVAL_S, VALIDITY_S = 8, 24
DETECTED_S, TOLD_S = 5.0, 1.0


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with whole_site(
        tmp_path, names=("near", "far"), interval_s=INTERVAL_S, validity_s=VALIDITY_S
    ) as made:
        yield made


async def test_the_kek_is_destroyed(site: Site) -> None:
    near, far = site.proxies
    plain = os.urandom(1 << 20)
    async with contextlib.AsyncExitStack() as stack:
        near_process = await stack.enter_async_context(site.proxy(near))
        await stack.enter_async_context(site.proxy(far))
        agent = await stack.enter_async_context(site.agent())

        async def uploaded() -> bool:
            return (await near.ask("/a", "-T", "-", body=plain)).status in {201, 204}

        await until(uploaded)
        assert await far.serves("/a", plain), "one key, both proxies"
        assert (await near.ask("/big", "-T", "-", body=os.urandom(40 << 20))).status == 201

        # A download is under way that would take half a minute; and one proxy is out of reach.
        running = asyncio.create_task(near.ask("/big", "--limit-rate", "1M"))
        await far.relay.cut()
        late = await stack.enter_async_context(lateness())
        began_s = time.monotonic()
        far_ends_s = began_s + await far.valid_for_s()

        async def near_refuses() -> bool:
            return not await near.serves("/a", plain)

        async def far_refuses() -> bool:
            return not await far.serves("/a", plain)

        await site.destroy_kek_by_another_process()
        took_s = await until(near_refuses)
        assert took_s < DETECTED_S + TOLD_S + late.allowance_s, f"{took_s:.2f} s"
        refused = await near.ask("/a")
        assert (refused.status, refused.code) == (503, "key-withdrawn")
        assert (await near.ask("/b", "-T", "-", body=b"new")).code == "key-withdrawn"
        assert "b" not in site.origin.names()
        cut = await asyncio.wait_for(running, 30)
        assert cut.exit_code != 0, "the download that was under way did not end well"
        assert len(cut.body) < 40 << 20

        left_s = far_ends_s - time.monotonic()
        if left_s > 1:
            assert await far.serves("/a", plain), "nobody could tell it, and its keys are still good"
        await until(far_refuses, timeout_s=VALIDITY_S + 30)
        assert time.monotonic() < far_ends_s + 1.5 + late.allowance_s, "it refused when the validity ended"
        assert (await far.ask("/a")).code == "key-expired"
        assert far.actions().count("keys-withdrawn") == 0

        # Whoever comes back gets nothing: the proxy out of reach, a proxy that restarts, an agent that does.
        await far.relay.open()
        near_process.kill()
        await near_process.wait()
        await stack.enter_async_context(site.proxy(near))
        agent.kill()
        await agent.wait()
        await stack.enter_async_context(site.agent())
        status = await site.command("status")
        assert status["standing"] == "revoked"
        await asyncio.sleep(INTERVAL_S + 1)  # longer than the interval: a push would have come
        assert await near_refuses()
        assert await far_refuses()
    log = (site.directory / "log").read_text()
    assert "Traceback" not in log
    assert site.hsm.pin not in log
