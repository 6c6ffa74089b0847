"""What is asked for in place of a range (with real servers: tests/integration/test_small_ranges.py)."""

import ssl
from pathlib import Path
from typing import Any, cast

import pytest

from envelope.keys import NetworkService
from proxy.bodies.prefetch import Prefetch, Source
from proxy.bodies.reading import RangePlan, Read, Reading
from proxy.keys.cache import KeyCache
from proxy.messages.message import ByteRange, Fields
from proxy.plans.plan import LegacyRange, OpenRange
from proxy.plans.request import NO_EDITS, Mode, Route
from proxy.tenants.model import LegacyPolicy, ServiceEntry, Upstream
from tests.fakes.clock import ManualClock
from tests.fakes.origin import RecordingOrigin, Reply


async def range_of(reply: Reply, legacy: LegacyPolicy, plan: OpenRange, clock: ManualClock) -> RangePlan:
    async with RecordingOrigin().listening() as origin, Prefetch(ssl.create_default_context()) as prefetch:
        origin.reply = reply
        service = ServiceEntry(
            owner=NetworkService("acme", "files"),
            upstream=Upstream.parse(f"http://127.0.0.1:{origin.port}"),
            profile="generic",
            legacy=legacy,
            reverse_listen=None,
            certificate=None,
            key_file=Path("/unused"),
        )
        read = Read(
            route=Route(service=service, mode=Mode.FORWARD),
            trail=cast("Any", None),  # no key is used
            source=Source(service=service, target="/x", fields=()),
            composites=False,
        )
        return await Reading(KeyCache(clock), prefetch).range(read, plan, Fields(()))


NOTHING = [Reply(416, [("Content-Range", "bytes */0")], [b"no"]), Reply(200, [], [])]


@pytest.mark.parametrize("if_range", [None, '"v1"'])
@pytest.mark.parametrize("reply", NOTHING, ids=["refused", "whole"])
async def test_the_range_of_what_was_empty_before_us_is_the_services_to_judge(
    reply: Reply, if_range: str | None, clock: ManualClock
) -> None:
    plan = OpenRange(edits=NO_EDITS, wanted=ByteRange(first=1, last=5), if_range=if_range)
    got = await range_of(reply, LegacyPolicy.MIGRATE, plan, clock)
    # A version that nobody looked at: no answer may be taken for it (planner).
    assert got.plan == LegacyRange(edits=NO_EDITS, etag=None, pinned=False)
    assert dict(got.edits.put) == {"range": "bytes=1-5"} | ({"if-range": if_range} if if_range else {})


@pytest.mark.parametrize("reply", NOTHING, ids=["refused", "whole"])
async def test_where_all_has_to_be_sealed_no_range_of_nothing_goes_up(
    reply: Reply, clock: ManualClock
) -> None:
    """It is no object: what comes of the whole is refused, where a service's 416 would pass."""
    plan = OpenRange(edits=NO_EDITS, wanted=ByteRange(first=1, last=5), if_range=None)
    assert await range_of(reply, LegacyPolicy.STRICT, plan, clock) == RangePlan(plan=plan, edits=NO_EDITS)
