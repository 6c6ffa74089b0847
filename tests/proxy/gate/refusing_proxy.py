"""A proxy in a process of its own, whose memory is then its own: `test_memory.py` starts it.

    python -m tests.proxy.gate.refusing_proxy DIRECTORY POLICY

Prints the port of its listener, runs until its standard input ends, then prints its peak RSS in MiB.
"""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from mitmproxy.http import HTTPFlow

from proxy import gate, refusals
from proxy.gate import permit
from proxy.refusals import RefusedError
from tests.fakes.origin import RecordingOrigin
from tests.proxy.gate.harness import Pki, Script, permit_upload, running

MIB: Final = 1 << 20


def _refuse(flow: HTTPFlow) -> None:
    permit(flow).refusal = refusals.NO_ACTIVE_KEY


async def _refuse_late(flow: HTTPFlow) -> None:
    await asyncio.sleep(1)
    permit(flow).refusal = refusals.NO_ACTIVE_KEY


def _fail_in_mid_body(flow: HTTPFlow) -> None:
    transform = permit_upload(flow, error=RefusedError(refusals.KEY_EXPIRED))
    transform._fails_at = 100


def _forget(_: HTTPFlow) -> None:
    pass


POLICIES: Final[dict[str, Callable[[HTTPFlow], Any]]] = {
    "refused": _refuse,
    "refused-late": _refuse_late,
    "fails-in-mid-body": _fail_in_mid_body,
    "forgotten": _forget,
}


def peak_rss_mib() -> float:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


async def main(directory: Path, policy: str) -> None:
    gate.install()
    pki = Pki.make(directory)
    script = Script(requestheaders=POLICIES[policy])
    async with (
        RecordingOrigin(keep_bytes=False).listening() as origin,
        running(pki, script, origin=origin, origin_tls=False) as rig,
    ):
        print(rig.port, flush=True)
        await asyncio.to_thread(sys.stdin.read)
    print(peak_rss_mib(), flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
