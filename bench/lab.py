"""The bench's surroundings: certificates, an origin in memory, and the proxies that are compared."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import nginx
from bench.machine import PROXY_CORE, Process, free_port, memory_directory, serving
from bench.product import Product, sealgate
from certs import pki

BODY_BYTES: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class Lab:
    """One origin, over TLS, whose files are in memory; `body` is what is uploaded."""

    directory: Path
    tls: nginx.Tls
    origin: Process
    stored: Path
    body: Path

    @contextlib.contextmanager
    def bare(self, *options: str, name: str = "bare") -> Iterator[Process]:
        """mitmproxy by itself, or with the *options* of bench/bare.py."""
        port = free_port()
        both = self.directory / "both.pem"
        both.write_bytes(self.tls.key.read_bytes() + self.tls.certificate.read_bytes())
        argv = [sys.executable, "-m", "bench.bare", "--port", str(port)]
        argv += [
            "--origin-port",
            str(self.origin.port),
            "--ca",
            str(self.tls.ca),
            "--certificate",
            str(both),
            *options,
        ]
        with (
            (self.directory / f"{name}.log").open("wb") as log,
            serving(name, argv, port=port, core=PROXY_CORE, log=log) as process,
        ):
            yield process

    @contextlib.contextmanager
    def sealgate(
        self,
        *,
        name: str = "sealgate",
        http2: bool = False,
        without: tuple[str, ...] = (),
        workers: int = 1,
        core: int | None = PROXY_CORE,
    ) -> Iterator[Product]:
        """The product itself, ready to seal."""
        with sealgate(
            self.directory / name,
            self.tls,
            self.origin.port,
            http2=http2,
            without=without,
            workers=workers,
            core=core,
        ) as product:
            yield product

    @contextlib.contextmanager
    def nginx(self) -> Iterator[Process]:
        with nginx.passing(self.directory / "nginx", self.tls, self.origin.port) as process:
            yield process


@contextlib.contextmanager
def lab(*, body_bytes: int = BODY_BYTES) -> Iterator[Lab]:
    with memory_directory() as directory:
        ca = pki.make_server_ca("bench")
        ca_file, _ = pki.write_credential(ca, directory, "ca")
        certificate, key = pki.write_credential(pki.issue_server(ca, ["localhost"]), directory, "server")
        tls = nginx.Tls(ca_file, certificate, key)
        body = directory / "body"
        with body.open("wb") as file, Path("/dev/urandom").open("rb") as source:
            for start in range(0, body_bytes, 1 << 20):
                file.write(source.read(min(1 << 20, body_bytes - start)))
        with nginx.origin(directory / "origin", tls) as (origin, stored):
            yield Lab(directory, tls, origin, stored, body)
