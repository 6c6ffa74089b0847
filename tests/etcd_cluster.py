"""Three real etcd members on loopback, for tests; each can be killed, frozen and started again.

async with EtcdCluster(tmp_path) as etcd:
    etcd.urls
    etcd.members[0].freeze(); etcd.members[0].thaw(); etcd.members[0].kill(); etcd.members[0].start()
"""

import asyncio
import contextlib
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import aiohttp

from tests.ports import free_port

START_S: Final = 60.0


def find_etcd() -> str:
    """Missing is a failure, never a skip: these tests are the point."""
    found = shutil.which("etcd")
    if found is None:
        raise FileNotFoundError("etcd is not installed: apt-get install etcd-server")
    return found


class EtcdMember:
    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self._directory = directory
        self._peer_url = f"http://127.0.0.1:{free_port()}"
        self.url = f"http://127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None
        self.cluster = ""

    @property
    def peer(self) -> str:
        return f"{self.name}={self._peer_url}"

    def start(self) -> None:
        with (self._directory / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(find_etcd(), "--name", self.name, "--data-dir", str(self._directory / self.name)),
                    *("--listen-peer-urls", self._peer_url, "--initial-advertise-peer-urls", self._peer_url),
                    *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
                    *("--initial-cluster", self.cluster, "--initial-cluster-state", "new"),
                    *("--unsafe-no-fsync", "--heartbeat-interval", "100", "--election-timeout", "1000"),
                ],
                stdout=log,
                stderr=log,
            )

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9; its data stay."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)


class EtcdCluster:
    def __init__(self, directory: Path, *, size: int = 3) -> None:
        where = directory / "etcd"
        where.mkdir()
        self.members = [EtcdMember(where, f"m{number}") for number in range(size)]
        for member in self.members:
            member.cluster = ",".join(one.peer for one in self.members)

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(member.url for member in self.members)

    async def __aenter__(self) -> Self:
        for member in self.members:
            member.start()
        try:
            await self.ready()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def ready(self) -> None:
        """Return when every member says that there is a leader."""
        deadline_s = time.monotonic() + START_S
        timeout = aiohttp.ClientTimeout(total=2)
        async with aiohttp.ClientSession(timeout=timeout) as client:
            for url in self.urls:
                while True:
                    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                        async with client.get(f"{url}/health") as answer:
                            if (await answer.json(content_type=None)).get("health") == "true":
                                break
                    if time.monotonic() > deadline_s:
                        raise TimeoutError(f"{url} is not healthy")
                    await asyncio.sleep(0.05)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self.members:
            member.kill()
