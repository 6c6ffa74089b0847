"""The owner of the HSM worker process: starts it, asks one question at a time, kills it when no answer comes.

1. One request in flight, under a lock, first come first served: one thread in the module, and the KEK watch
   waits for at most one batch.
2. Killed on a time-out **and** on cancellation: its late answer would be taken for the next request's.
3. Replaced at the next request. After the second failure in a row starts are spaced, 0.5 s to 10 s, and
   requests in between fail at once; one success ends that.
4. The child inherits nothing but the variables that PKCS#11 modules read; the PIN is in the first frame
   only.
5. What the module prints is read, cut and logged, so that a talkative module can neither block nor flood.
6. How long a request is with the worker tells whether the HSM is slow (pace.py); that changes nothing here.
"""

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping
from typing import Final

import structlog

from key_agent.errors import KeySourceError
from key_agent.sources import wire
from key_agent.sources.pace import START_ALLOWANCE_S, Pace, Stopwatch
from key_agent.sources.verdict import Verdict
from runtime.clock import Clock

WORKER_MODULE: Final = "key_agent.sources.worker_main"
FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 10.0
LOGGED_LINE_LIMIT: Final = 300
LOGGED_LINES_LIMIT: Final = 50
REAP_S: Final = 5.0

# What vendors' documents say that PKCS#11 modules read, and what libc needs. Others: the settings name them.
INHERITED_VARIABLES: Final = (
    "PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR",
    "SOFTHSM2_CONF", "NFAST_HOME", "CKNFAST_LOADSHARING", "CKNFAST_OVERRIDE_SECURITY_ASSURANCES",
    "ChrystokiConfigurationPath", "KMS_PKCS11_CONFIG", "YUBIHSM_PKCS11_CONF", "CS_PKCS11_R3_CFG",
    "CS_PKCS11_R2_CFG", "ET_PTKC_GENERAL_LIBRARY_MODE", "ET_HSM_NETCLIENT_SERVERLIST",
)  # fmt: skip

_log = structlog.get_logger(__name__)


def pause_s(failures: int) -> float:
    """Seconds between the latest of *failures* in a row and the next start."""
    if failures < 2:  # the first replacement is immediate: a crash costs 0.1 s, not a refresh
        return 0.0
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(failures - 2, 30))


class Worker:
    """*hello* makes the first frame anew for every start (it reads the PIN); it may raise KeySourceError.

    *on_refusal* hears that the token refused that PIN; the worker that held it is gone by then.
    *pace* hears how long the answers take.
    """

    def __init__(
        self,
        hello: Callable[[], wire.Greeting],
        on_refusal: Callable[[Verdict], None],
        *,
        environment: Mapping[str, str],
        request_timeout_s: float,
        start_timeout_s: float,
        clock: Clock,
        pace: Pace | None = None,
        module: str = WORKER_MODULE,
        title: str = "HSM worker",
    ) -> None:
        self._hello = hello
        self._module = module
        self._title = title
        self._on_refusal = on_refusal
        self._environment = environment
        self._request_timeout_s = request_timeout_s
        self._start_timeout_s = start_timeout_s
        self._clock = clock
        self.pace = pace or Pace()
        self._lock = asyncio.Lock()
        self._process: Process | None = None
        self._failures = 0
        self._failed_at_s = 0.0
        self._number = 0
        self._reapers: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def request(
        self, message: wire.Message, *, timeout_s: float | None = None, fresh: bool = False
    ) -> wire.Reply:
        """The worker's answer to *message*, `Failed` included.

        *fresh*: in a new process, at once. KeySourceError: no worker, no answer in time, or not an answer.
        """
        async with self._lock:
            if self._closed:
                raise KeySourceError("the key source is closed")
            if fresh:
                self._discard()
            elif self._process is not None and self._process.returncode is not None:
                _log.warning("the HSM worker died while idle", status=_status_text(self._process.returncode))
                self._fail()
            # First of all: what the PIN's gate says is no failure of the worker.
            hello = self._hello() if self._process is None else None
            if not fresh and (rest_s := self._rest_s()) > 0:
                raise KeySourceError(
                    f"the {self._title} failed {self._failures} times in a row; next start in {rest_s:.1f} s"
                )
            reply = await self._guarded(hello, message, timeout_s or self._request_timeout_s)
            if isinstance(reply, wire.Failed | wire.Diagnosed) and reply.verdict.is_login_refusal:
                self._discard()
                self._on_refusal(reply.verdict)
            return reply

    async def close(self) -> None:
        """Kill the worker and wait until it is gone. Idempotent."""
        self._closed = True
        self._discard()
        if self._reapers:
            # A process stuck in the kernel cannot be waited for.
            await asyncio.wait(self._reapers, timeout=REAP_S)

    async def _guarded(
        self, hello: wire.Greeting | None, message: wire.Message, timeout_s: float
    ) -> wire.Reply:
        limit_s, doing = self._start_timeout_s, "start"
        try:
            if hello is not None:
                async with asyncio.timeout(limit_s):
                    await self._start(hello)
            limit_s, doing = timeout_s, "answer"
            async with asyncio.timeout(limit_s):
                with self._timed(message):
                    reply = await self._exchange(message)
        except TimeoutError:
            self._fail()
            raise KeySourceError(
                f"the {self._title} did not {doing} within {limit_s:g} s and was killed"
            ) from None
        except (OSError, EOFError, wire.ProtocolError) as error:
            process = self._process
            self._fail()
            raise KeySourceError(await self._fate(process, error)) from error
        except KeySourceError:
            self._fail()
            raise
        except BaseException:
            # Cancelled, or a bug: whoever asks next must not read this one's answer.
            self._discard()
            raise
        self._failures = 0
        return reply

    async def _start(self, hello: wire.Greeting) -> None:
        environment = {name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ}
        # -I: neither PYTHON* variables nor the working directory choose the code that gets the PIN. The
        # package is found because the distribution is installed (from a checkout: `pip install -e .`).
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-m", self._module, str(os.getpid()),
            stdin=PIPE, stdout=PIPE, stderr=PIPE,
            env=environment | dict(self._environment),
            start_new_session=True,
        )  # fmt: skip
        reaper = asyncio.create_task(_attend(self._process), name=f"hsm-worker:{self._process.pid}")
        self._reapers.add(reaper)
        reaper.add_done_callback(self._reapers.discard)
        with self._timed(hello):
            ready = await self._exchange(hello)
        if isinstance(ready, wire.Failed):
            raise KeySourceError(f"the {self._title} does not begin: {ready.detail}", verdict=ready.verdict)

    async def _exchange(self, message: wire.Message) -> wire.Reply:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise EOFError("no worker")
        self._number += 1
        process.stdin.write(wire.encode(self._number, message))
        await process.stdin.drain()
        size = wire.frame_size(await process.stdout.readexactly(wire.LENGTH_SIZE))
        reply = wire.decode_reply(await process.stdout.readexactly(size))
        if reply.number != self._number:
            raise wire.ProtocolError(f"answer {reply.number} to question {self._number}")
        return reply.message

    def _timed(self, message: wire.Message) -> contextlib.AbstractContextManager[object]:
        """Rule 6, for what the HSM is asked again and again."""
        match message:
            case wire.Hello() | wire.OpenBaoHello() | wire.KmipHello():
                allowed_s, counts = START_ALLOWANCE_S, False
            case wire.Diagnose():
                allowed_s, counts = 0.0, True
            case wire.SealEnvelopes() | wire.Rewrap() | wire.ExportKeys() | wire.ImportKeys():
                allowed_s, counts = message.budget_s, True
            case _:
                # An operator's request, or new keys: to make an RSA key takes seconds, on purpose.
                return contextlib.nullcontext()
        if (pid := self.pid) is None:
            return contextlib.nullcontext()
        return Stopwatch(self.pace, self._clock, pid, allowed_s=allowed_s, counts=counts)

    async def _fate(self, process: Process | None, error: Exception) -> str:
        """What became of the worker, for people."""
        if self._closed:
            return "the key source was closed"
        if process is None:
            return f"the {self._title} cannot be started: {error}"
        if isinstance(error, wire.ProtocolError):
            return f"the {self._title} does not keep to the protocol: {error}"
        try:
            async with asyncio.timeout(REAP_S):
                status = await process.wait()
        except TimeoutError:
            return f"the {self._title} closed its stream ({type(error).__name__})"
        return f"the {self._title} died ({_status_text(status)})"

    def _rest_s(self) -> float:
        return self._failed_at_s + pause_s(self._failures) - self._clock.boot_s()

    def _fail(self) -> None:
        self._discard()
        self._failures += 1
        self._failed_at_s = self._clock.boot_s()

    def _discard(self) -> None:
        """Kill at once; `_attend` reaps."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            # With all that the module may have started: the worker leads a session of its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if process.stdin is not None:
            process.stdin.close()


async def _attend(process: Process) -> None:
    """Log what the module prints, within limits, until the process is gone; then reap it."""
    lines = 0
    rest = b""
    while process.stderr is not None and (piece := await process.stderr.read(4096)):
        *whole, rest = (rest + piece).split(b"\n")
        rest = rest[:LOGGED_LINE_LIMIT]
        for line in whole:
            lines += 1
            if lines <= LOGGED_LINES_LIMIT:
                _log.warning(
                    "the HSM worker printed",
                    pid=process.pid,
                    line=line[:LOGGED_LINE_LIMIT].decode(errors="backslashreplace"),
                )
    status = await process.wait()
    _log.debug("HSM worker gone", pid=process.pid, status=_status_text(status), lines=lines)


def _status_text(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"
