"""Rows webdav_put, webdav_get: a WebDAV client through Sealgate, beside rclone's crypt in the same run.

1. Both stand before the same Apache, over TLS on both hops, each on core 0; client and origin share core 1.
2. `ceiling` is the same client straight to that origin, in turns with the others: what core 1 alone allows.
   Nothing before it can be seen to be faster, so where a side comes near it, look at the CPU time instead:
   `cpu_ratio` is what the other side takes for a gigabyte, to what ours takes.
"""

import contextlib
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from bench.lab import Lab, lab
from bench.machine import BenchError
from bench.peers import apache_webdav, rclone_crypt
from bench.product import sealgate
from bench.proxies import Side, interleave
from bench.results import Row, compare

NAMES: Final = ("webdav_put", "webdav_get")
GOAL: Final = 1.5


@contextlib.contextmanager
def _sides() -> Iterator[tuple[Lab, Side, Side, Side]]:
    """Ours, the peer, and the origin by itself."""
    with contextlib.ExitStack() as running:
        here = running.enter_context(lab())
        origin, stored = running.enter_context(apache_webdav(here.directory / "apache", here.tls))
        product = running.enter_context(
            sealgate(here.directory / "dav-sealgate", here.tls, origin.port, profile="webdav")
        )
        peer = running.enter_context(rclone_crypt(here.directory / "rclone", here.tls, origin.port))
        yield (
            here,
            Side(product.process, product.ca, product.agent),
            Side(peer, here.tls.ca),
            Side(origin, here.tls.ca),
        )
        (stored / f"{origin.name}-body").unlink()
        _check_sealed(stored, here.body.read_bytes()[:64])


def run() -> list[Row]:
    rows = []
    with _sides() as (here, ours, peer, direct):
        sides = (ours, peer, direct)
        verbs: tuple[Literal["PUT", "GET"], ...] = ("PUT", "GET")
        for verb in verbs:
            for side in sides:
                side.forget()
            interleave(sides, lambda side, verb=verb: side.transfer(here, verb))  # type: ignore[misc]
            mine, other = statistics.median(ours.cpu), statistics.median(peer.cpu)
            rows.append(
                compare(
                    f"webdav_{verb.lower()}",
                    "MB/s",
                    ours.rounds,
                    peer.rounds,
                    goal=GOAL,
                    ceiling=statistics.median(direct.rounds),
                    cpu_s_per_gb=mine,
                    baseline_cpu_s_per_gb=other,
                    cpu_ratio=other / mine,
                    rss_mib=ours.process.rss_bytes() / (1 << 20),
                    baseline_rss_mib=peer.process.rss_bytes() / (1 << 20),
                )
            )
    return rows


def _check_sealed(stored: Path, plain: bytes) -> None:
    """Both sides are to have encrypted: a comparison with one that does not would be none."""
    files = [path for path in stored.iterdir() if path.is_file()]
    if len(files) < 2:
        raise BenchError("the origin has not stored what both sides sent")
    for path in files:
        with path.open("rb") as file:
            if plain[:16] in file.read(4096):
                raise BenchError(f"{path.name} lies in the clear at the origin")
