"""The watchdog beside HAProxy: while the lb-agent is silent every server is down.

1. HAProxy leaves a server as it was when its agent is silent. The watchdog sets it down by HAProxy's own
   socket; the next `up` of the lb-agent undoes that.
2. Whether HAProxy listens to us is tried at every look, not first when it is needed.
3. Nothing is said to be down that HAProxy has not confirmed: what it refuses stands in the log, with why.
"""

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

import structlog

from runtime.clock import Clock

log = structlog.get_logger(__name__)

_ANSWER_S: Final = 1.0
_MAX_ANSWER_BYTES: Final = 4096
_SILENT_LOOKS: Final = 2
"""One may be lost; HAProxy's own checks are as patient."""
_WEIGHT: Final = re.compile(r"\d+ \(initial \d+\)")


class Watchdog:
    def __init__(
        self,
        *,
        host: str,
        port: int,
        servers: Sequence[str],
        socket_path: Path,
        clock: Clock,
        every_s: float = 0.5,
    ) -> None:
        """*host*, *port*: the lb-agent. *servers*: of HAProxy's backend `any`, one at least."""
        self._host = host
        self._port = port
        self._servers = servers
        self._socket_path = socket_path
        self._clock = clock
        self._every_s = every_s
        self._said: tuple[bool, str | None] | None = None

    async def run(self) -> NoReturn:
        silent = 0
        while True:
            silent = 0 if await self._lb_agent_answers() else silent + 1
            is_silent = silent >= _SILENT_LOOKS
            self._say(is_silent=is_silent, problem=await (self._set_down() if is_silent else self._try()))
            await self._clock.sleep(self._every_s)

    async def _lb_agent_answers(self) -> bool:
        try:
            async with asyncio.timeout(_ANSWER_S):
                reader, writer = await asyncio.open_connection(self._host, self._port)
                try:
                    writer.write(f"{self._servers[0]}\n".encode())
                    return bool(await reader.read(64))
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return False

    async def _set_down(self) -> str | None:
        """Every server; the first thing that went wrong, or None."""
        problem: str | None = None
        for name in self._servers:
            answer, why = await self._ask(f"set server any/{name} agent down")
            problem = problem or why or (f"{name}: {answer}" if answer else None)
        return problem

    async def _try(self) -> str | None:
        """Rule 2, by a command that changes nothing."""
        answer, why = await self._ask(f"get weight any/{self._servers[0]}")
        return why or (None if _WEIGHT.match(answer) else answer or "no answer")

    async def _ask(self, command: str) -> tuple[str, str | None]:
        """HAProxy's answer, printable; or what went wrong on the way."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                reader, writer = await asyncio.open_unix_connection(self._socket_path)
                try:
                    writer.write(command.encode() + b"\n")
                    content = await reader.read(_MAX_ANSWER_BYTES)
                finally:
                    writer.close()
        except TimeoutError:
            return "", f"{self._socket_path}: no answer"
        except OSError as error:
            return "", f"{self._socket_path}: {error.strerror or type(error).__name__}"
        return "".join(one for one in content.decode("ascii", "replace").strip() if one.isprintable()), None

    def _say(self, *, is_silent: bool, problem: str | None) -> None:
        if (before := self._said) == (is_silent, problem):
            return
        self._said = (is_silent, problem)
        if problem is not None:
            text = (
                "the lb-agent is silent AND HAPROXY CANNOT BE TOLD: servers stay as they are"
                if is_silent
                else "HAProxy cannot be told: were the lb-agent silent, servers would stay as they are"
            )
            log.error(text, cause=problem)
        elif is_silent:
            log.error("the lb-agent is silent: every server is set down")
        elif before is not None:
            log.info("the lb-agent answers, HAProxy can be told")
