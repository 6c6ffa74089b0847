"""A command's way to the agent that runs: by its socket, or the word that none runs.

1. "Nobody listens" is no error: the command then does the work itself (performing.py).
2. A refusal arrives whole: its cause, its next step, its code and the exit code.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import quote

import aiohttp

from key_agent.api.routes import BY_NAME
from key_agent.operations.commands import Json
from runtime.cli import CommandError, ExitCode

_SLOW_S: Final = 300.0


async def call(path: Path, operation: str, arguments: Mapping[str, object]) -> Json | None:
    """Have the agent behind the socket *path* do it; None if no agent listens there.

    CommandError is its refusal.
    """
    route = BY_NAME[operation]
    in_path = set(re.findall(r"\{(\w+)\}", route.path))
    url = "http://key-agent" + route.path.format(**{name: _segment(str(arguments[name])) for name in in_path})
    body = {name: value for name, value in arguments.items() if name not in in_path}
    timeout = aiohttp.ClientTimeout(total=_SLOW_S)
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path)), timeout=timeout) as client,
            client.request(route.method, url, data=json.dumps(body).encode() if body else None) as response,
        ):
            content = await response.read()
            status, headers = response.status, response.headers
    except aiohttp.ClientConnectorError as error:
        if isinstance(error.os_error, ConnectionRefusedError | FileNotFoundError):
            return None
        raise CommandError(
            f"{path}: {error.os_error.strerror}", "run the command as the agent's user", ExitCode.FAILED
        ) from None
    except (aiohttp.ClientError, TimeoutError) as error:
        raise CommandError(
            f"the running agent did not answer: {type(error).__name__}",
            "`key-agent status`, then the same command again: it can be repeated",
            ExitCode.UNAVAILABLE,
        ) from None
    answer = json.loads(content)
    if status == 200:
        return dict(answer)
    raise CommandError(
        str(answer.get("detail", f"HTTP {status}")),
        str(answer.get("next_step", "see the agent's log")),
        ExitCode(int(headers.get("Sealgate-Exit-Code", "1"))),
        code=str(answer.get("code", "failed")),
    )


def _segment(text: str) -> str:
    """*text* as one path segment: `tenant/service` keeps its slash by another name."""
    return quote(text, safe="")
