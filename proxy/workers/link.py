"""One worker process as its proxy sees it: a child, a socket pair, questions with answers in time.

1. The child is started fresh, with `-I`: neither PYTHON* variables nor the working directory choose its code.
   It inherits its end of the socket pair and the standard streams.
2. Whoever gets no answer in time kills it: `ask` raises WorkerLostError only when the process is on its way
   out; `ended` tells whether it is, `gone` when.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import sys
from typing import Final, Self

import structlog

from envelope.errors import SealgateError
from proxy.workers import wire

WORKER_MODULE: Final = "proxy.workers.worker_main"
REAP_S: Final = 5.0

_log: Final = structlog.get_logger("workers")


class WorkerLostError(SealgateError):
    """This worker does not serve any more. `next_step`, if it has said one."""

    def __init__(self, cause: str, next_step: str = "") -> None:
        super().__init__(cause)
        self.next_step = next_step


class WorkerStuckError(SealgateError):
    """A worker that was killed does not end: the kernel holds it. What it serves nobody can say."""


class WorkerLink:
    """A running worker. `WorkerLink.start`, then `ask`; `kill` at any time."""

    def __init__(
        self,
        number: int,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.number: Final = number
        self.problems: tuple[str, ...] = ()
        """What it said last of itself."""
        self._process = process
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[wire.Answer]] = {}
        self._cause = ""
        self._listening = asyncio.create_task(self._listen(), name=f"worker:{number}")

    @classmethod
    async def start(cls, number: int) -> Self:
        """A new process, that has been told nothing yet. OSError."""
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-m", WORKER_MODULE, str(os.getpid()), str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        return cls(number, process, reader, writer)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def lives(self) -> bool:
        return not self._listening.done()

    async def ask(self, request: wire.Request, *, timeout_s: float) -> wire.Answer:
        """The answer to *request*. WorkerLostError: there is none, or the worker has failed."""
        if not self.lives:
            raise WorkerLostError(self._cause)
        number = next(self._numbers)
        answered: asyncio.Future[wire.Answer] = asyncio.get_running_loop().create_future()
        self._asked[number] = answered
        try:
            async with asyncio.timeout(timeout_s):
                self._writer.write(wire.encode(number, request))
                answer = await answered
        except TimeoutError:
            self.kill(f"it did not answer {type(request).__name__} within {timeout_s:g} s")
            raise WorkerLostError(self._cause) from None
        finally:
            del self._asked[number]
        if isinstance(answer, wire.Failed):
            self.kill(answer.cause)
            raise WorkerLostError(answer.cause, answer.next_step)
        if isinstance(answer, wire.Done):
            self.problems = answer.problems
        return answer

    def kill(self, cause: str) -> None:
        """End it now: it answers nothing and serves nobody from here on."""
        self._cause = self._cause or cause
        if self._process.returncode is None:
            _log.warning("worker killed", worker=self.number, pid=self.pid, cause=cause)
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)

    async def ended(self) -> None:
        """Return when the process, once killed, has ended. WorkerStuckError after REAP_S."""
        try:
            async with asyncio.timeout(REAP_S):
                await self._process.wait()
        except TimeoutError:
            raise WorkerStuckError(f"worker {self.number}, process {self.pid}, does not end") from None

    async def gone(self) -> str:
        """Return when the process has ended: why, as far as it is known."""
        await asyncio.wait([self._listening])
        status = await self._process.wait()
        return self._cause or (f"signal {-status}" if status < 0 else f"exit status {status}")

    async def close(self, *, patience_s: float = 0.0) -> None:
        """Wait for its end that long, then kill it if it still runs, and reap it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._process.wait()
        if self._process.returncode is None and self.lives:
            self.kill("it is not needed any more")
        self._listening.cancel()
        await asyncio.wait([self._listening])
        with contextlib.suppress(WorkerStuckError):
            await self.ended()

    async def _listen(self) -> None:
        """Hand out answers until the worker is gone; then nobody waits any longer."""
        try:
            while True:
                number, answer = await wire.read_answer(self._reader)
                waiting = self._asked.get(number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
        except (EOFError, OSError):
            self._cause = self._cause or "it has ended"
        except wire.WireError as error:
            self.kill(f"it does not keep to the protocol: {error}")
        finally:
            self._writer.close()
            if self._process.returncode is None and self._cause != "it has ended":
                self.kill(self._cause or "it is not needed any more")
            for waiting in self._asked.values():
                if not waiting.done():
                    waiting.set_exception(WorkerLostError(self._cause))
