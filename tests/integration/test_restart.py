"""A proxy that restarts has no keys. It gets them within seconds, long before the agent's next refresh.

Two `sealgate run`, one `key-agent run` with its default times, one HSM; see test_kill_switch.py for the site.
"""

import asyncio
import contextlib
import os
import time

from tests.integration.test_kill_switch import INTERVAL_S, VALIDITY_S, site
from tests.integration.whole_site import Site, until
from tests.lateness import lateness

__all__ = ["site"]

NOTICED_S = 10.0


async def test_a_killed_proxy_has_its_keys_again_within_seconds(site: Site) -> None:
    config = site.agent_config.read_text()
    site.agent_config.write_text(
        config.replace(f"interval_s = {INTERVAL_S}", "").replace(f"validity_s = {VALIDITY_S}", "")
    )
    near, far = site.proxies
    plain = os.urandom(1 << 20)
    async with contextlib.AsyncExitStack() as stack:
        process = await stack.enter_async_context(site.proxy(near))
        await stack.enter_async_context(site.proxy(far))
        await stack.enter_async_context(site.agent())

        async def uploaded() -> bool:
            return (await near.ask("/a", "-T", "-", body=plain)).status in {201, 204}

        async def served() -> bool:
            return await near.serves("/a", plain)

        async def far_serves() -> bool:
            return await far.serves("/a", plain)

        await until(uploaded)
        await until(far_serves)
        late = await stack.enter_async_context(lateness())
        far_until_s = time.monotonic() + await far.valid_for_s()
        for _ in range(2):
            process.kill()
            await process.wait()
            process = await stack.enter_async_context(site.proxy(near))
            took_s = await until(served, timeout_s=60)
            assert took_s < NOTICED_S + late.allowance_s, f"{took_s:.1f} s after it listened again"
            assert await near.valid_for_s() > 300, "pushed anew, for the whole validity"
        still_s = time.monotonic() + await far.valid_for_s()
        assert abs(still_s - far_until_s) < 2 + late.allowance_s, (
            "nothing was pushed to the proxy that did not restart"
        )

        # While it is away, `status` says so; and no keys come without consent.
        process.kill()
        await process.wait()

        async def is_missed() -> bool:
            status = await site.command("status")
            answers = {proxy["proxy"]: proxy["answers"] for proxy in status["proxies"]}
            return answers == {"near": False, "far": True}

        await until(is_missed, timeout_s=90)
        await site.destroy_kek_by_another_process()

        async def is_revoked() -> bool:
            return bool((await site.command("status"))["standing"] == "revoked")

        await until(is_revoked, timeout_s=90)
        await stack.enter_async_context(site.proxy(near))
        await asyncio.sleep(NOTICED_S)  # longer than the agent needs to notice: keys would have come
        assert not await served()
    log = (site.directory / "log").read_text()
    assert "Traceback" not in log
    assert log.count("a proxy answers again") <= 3
