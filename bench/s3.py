"""Rows s3_put, s3_get: boto3 through Sealgate, which verifies, seals and signs anew, beside bare mitmproxy.

1. Both sides have a client process of their own that stays, with boto3's defaults: a CRC-32 behind a body in
   aws-chunked framing, connections that are kept. Only one runs at a time.
2. The origin is nginx, which keeps what it is sent and verifies nothing. What bare mitmproxy stores there has
   the framing in it; its GETs read an object that was put without.
"""

import contextlib
import os
import secrets
import statistics
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench.lab import Lab, lab
from bench.machine import OTHER_CORE, BenchError, pinned
from bench.product import sealgate
from bench.proxies import Side, interleave
from bench.results import Row, compare
from envelope.objects import MAGIC

NAMES: Final = ("s3_put", "s3_get")
GOAL: Final = 0.9
BODY_BYTES: Final = 64 << 20
ACCESS_KEY: Final = "BENCHKEY"
_PYTHON: Final = Path(__file__).parents[1] / ".venv-referees" / "bin" / "python"
_CLIENT: Final = Path(__file__).with_name("s3_client.py")


@dataclass(slots=True)
class _Client:
    """One boto3 process, asked by lines."""

    process: subprocess.Popen[str]
    errors: Path
    took_s: list[float] = field(default_factory=list)

    def transfer(self, verb: str) -> float:
        """Seconds that it took. BenchError if it failed."""
        if self.process.stdin is None or self.process.stdout is None:
            raise BenchError("boto3's process has no pipes")
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(verb + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise BenchError(f"boto3 {verb}: {self.errors.read_text()[-2000:]}")
        return float(line)


@contextlib.contextmanager
def _client(here: Lab, side: Side, secret: str) -> Iterator[_Client]:
    if not _PYTHON.exists():
        raise BenchError("boto3 is missing: make referees")
    errors = here.directory / f"boto3-{side.process.name}.log"
    argv = [str(_PYTHON), str(_CLIENT), f"https://localhost:{side.process.port}", str(side.ca)]
    argv += [str(here.body), ACCESS_KEY]
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    with errors.open("w") as log:
        process = subprocess.Popen(
            pinned(argv, OTHER_CORE),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**environment, "AWS_SECRET_ACCESS_KEY": secret, "AWS_EC2_METADATA_DISABLED": "true"},
        )
        with process:
            try:
                yield _Client(process, errors)
            finally:
                process.kill()


@contextlib.contextmanager
def _sides() -> Iterator[tuple[Lab, dict[str, _Client], Side, Side]]:
    secret = secrets.token_urlsafe(24)
    with contextlib.ExitStack() as running:
        here = running.enter_context(lab(body_bytes=BODY_BYTES))
        product = running.enter_context(
            sealgate(
                here.directory / "s3-sealgate",
                here.tls,
                here.origin.port,
                profile="s3",
                credential=(ACCESS_KEY, secret),
            )
        )
        ours = Side(product.process, product.ca, product.agent)
        bare = Side(running.enter_context(here.bare()), here.tls.ca)
        clients = {
            side.process.name: running.enter_context(_client(here, side, secret)) for side in (ours, bare)
        }
        yield here, clients, ours, bare


def run() -> list[Row]:
    rows = []
    with _sides() as (here, clients, ours, bare):
        stored = here.stored / "bucket" / "body"

        def measure(side: Side, verb: str) -> None:
            if verb == "GET":
                _swap(stored, sealed if side is ours else here.body)
            before_s = side.process.cpu_s()
            took_s = clients[side.process.name].transfer(verb)
            side.rounds.append(BODY_BYTES / 1e6 / took_s)
            side.cpu.append((side.process.cpu_s() - before_s) / (BODY_BYTES / 1e9))

        sealed = here.directory / "sealed"
        clients[ours.process.name].transfer("PUT")
        _check_sealed(stored, here.body)
        stored.rename(sealed)
        for verb in ("PUT", "GET"):
            for side in (ours, bare):
                side.forget()
            interleave((ours, bare), lambda side, verb=verb: measure(side, verb))  # type: ignore[misc]
            rows.append(
                compare(
                    f"s3_{verb.lower()}",
                    "MB/s",
                    ours.rounds,
                    bare.rounds,
                    goal=GOAL,
                    cpu_s_per_gb=statistics.median(ours.cpu),
                    baseline_cpu_s_per_gb=statistics.median(bare.cpu),
                )
            )
    return rows


def _swap(stored: Path, source: Path) -> None:
    """Have the origin serve *source* in the object's place."""
    stored.unlink(missing_ok=True)
    os.link(source, stored)


def _check_sealed(stored: Path, body: Path) -> None:
    """A comparison with a side that did not seal would be none."""
    plain = body.read_bytes()[:64]
    with stored.open("rb") as file:
        begin = file.read(4096)
    if plain[:16] in begin or not begin.startswith(MAGIC):
        raise BenchError("the object lies in the clear at the origin")
