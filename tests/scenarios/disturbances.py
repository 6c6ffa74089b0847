"""What a test does to the parts of a site: an HSM that hangs, checks held back, a clock that is wrong.

1. Every disturbance is a context manager, or ends with the process that it was given to.
2. None depends on time: a gate lets a number of answers through, a lock holds until it is let go.
"""

import asyncio
import contextlib
import fcntl
import os
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final, override

from tests.scenarios.listener import Listener
from tests.softhsm import SoftHsm

_SHIFTED: Final = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

static volatile long *shift;
static int (*real)(clockid_t, struct timespec *);

__attribute__((constructor)) static void begin(void)
{
    const char *name = getenv("WALL_CLOCK_SHIFT");
    int file = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
    real = dlsym(RTLD_NEXT, "clock_gettime");
    if (file >= 0) {
        void *at = mmap(NULL, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
        if (at != MAP_FAILED)
            shift = at;
    }
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    if (!real)
        real = dlsym(RTLD_NEXT, "clock_gettime");
    int answer = real(clock, now);
    if (!answer && shift && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += *shift;
    return answer;
}

int gettimeofday(struct timeval *now, void *zone)
{
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out)
{
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (out)
        *out = found.tv_sec;
    return found.tv_sec;
}
"""


class WallClock:
    """The wall clock of a program that is started with `environment`; it can be set wrongly while it runs.

    As by somebody with `date`, or a time server that lies: CLOCK_BOOTTIME and CLOCK_MONOTONIC do not follow.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._file = directory / f"{name}.clock"
        self.set_ahead(0)
        library = directory / "wall-clock.so"
        if not library.exists():
            source = directory / "wall-clock.c"
            source.write_text(_SHIFTED)
            made = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
            subprocess.run(made, check=True, timeout=60)
        self.environment = {"LD_PRELOAD": str(library), "WALL_CLOCK_SHIFT": str(self._file)}

    def set_ahead(self, seconds: int) -> None:
        """From now on; negative: behind."""
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(descriptor, struct.pack("=q", seconds), 0)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def hanging(hsm: SoftHsm) -> Iterator[None]:
    """The HSM takes every request and answers none: its files are locked by somebody else.

    SoftHSM waits for such a lock as a network HSM's library waits for its device. A worker that is replaced
    meets the same. (POSIX locks: they are this process's; a child of it does not inherit them.)
    """
    with contextlib.ExitStack() as held:
        for path in sorted(hsm.tokens.rglob("*")):
            if path.is_file():
                descriptor = os.open(path, os.O_RDWR)
                held.callback(os.close, descriptor)
                fcntl.lockf(descriptor, fcntl.LOCK_EX)
        yield


class Gate(Listener):
    """Between HAProxy and the lb-agent: every answer is seen, and those about one server can be rationed.

    HAProxy leaves a server as it is when a check is not answered, so what is held back changes nothing.
    """

    def __init__(self, target_port: int) -> None:
        super().__init__()
        self._target_port = target_port
        self._left: dict[str, int] = {}
        self.passed: Counter[tuple[str, str]] = Counter()
        """Server and first word of the answer: how many HAProxy has got."""

    def ration(self, server: str, *, ups: int) -> None:
        """HAProxy gets so many `up` about *server*, and then no answer about it at all."""
        self._left[server] = ups

    def free(self, server: str) -> None:
        self._left.pop(server, None)

    @override
    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        question = await reader.readuntil(b"\n")
        name = question.decode().strip()
        answer = await self._ask(question)
        if self._may_pass(name, answer):
            self.passed[name, answer.split()[0].decode()] += 1
            writer.write(answer)
            await writer.drain()

    async def _ask(self, question: bytes) -> bytes:
        there, back = await asyncio.open_connection("127.0.0.1", self._target_port)
        try:
            back.write(question)
            return await there.readuntil(b"\n")
        finally:
            back.close()

    def _may_pass(self, name: str, answer: bytes) -> bool:
        if name not in self._left:
            return True
        if not answer.startswith(b"up "):
            return self._left[name] > 0
        if self._left[name] == 0:
            return False
        self._left[name] -= 1
        return True
